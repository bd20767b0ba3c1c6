"""From which sparsity on a sparse layer pays on this machine."""

from offpath.studies.crossover.config import CrossoverConfig as CrossoverConfig
from offpath.studies.crossover.result import CrossoverResult as CrossoverResult
from offpath.studies.crossover.run import UnwrittenResult as UnwrittenResult, crossover as crossover
