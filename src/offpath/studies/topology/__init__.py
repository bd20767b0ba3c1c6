"""Does it pay to let the connections move? Real data, seeds, and dense nets of the same size beside."""

from offpath.studies.topology.config import StudyConfig as StudyConfig
from offpath.studies.topology.result import StudyResult as StudyResult
from offpath.studies.topology.study import study as study
