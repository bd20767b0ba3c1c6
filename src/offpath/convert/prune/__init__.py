"""One-shot pruning: which weights of a dense model become zero, in place."""

from offpath.convert.prune.prune import prune as prune
from offpath.convert.prune.report import PrunedLayer as PrunedLayer, PruneReport as PruneReport
