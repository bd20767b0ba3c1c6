"""Layers whose weights are mostly zero -> sparse layers, where that pays on this machine."""

from offpath.convert.compress.compress import compress as compress
from offpath.convert.compress.report import (
    CompressedEmbedding as CompressedEmbedding,
    CompressedLayer as CompressedLayer,
    CompressReport as CompressReport,
    EndToEnd as EndToEnd,
    Measured as Measured,
)
