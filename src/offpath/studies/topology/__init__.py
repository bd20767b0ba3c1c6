"""Does it pay to let the connections move? Real data, seeds, and dense nets of the same size beside."""

from offpath.studies.topology.config import StudyConfig as StudyConfig
