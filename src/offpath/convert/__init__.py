"""Dense model <-> sparse model."""

from offpath.convert.attention import pack_attention as pack_attention, unpack_attention as unpack_attention
from offpath.convert.bitmasks import decompress_bitmasks as decompress_bitmasks
from offpath.convert.compress import (
    CompressedEmbedding as CompressedEmbedding,
    CompressedLayer as CompressedLayer,
    CompressReport as CompressReport,
    EndToEnd as EndToEnd,
    Measured as Measured,
    compress as compress,
)
from offpath.convert.densify import densify as densify
from offpath.convert.fuse import fuse as fuse
from offpath.convert.fused_encoders import fuse_only_dense_encoders as fuse_only_dense_encoders
from offpath.convert.prune import PrunedLayer as PrunedLayer, PruneReport as PruneReport, prune as prune
from offpath.convert.report import ConversionReport as ConversionReport, LayerReport as LayerReport
from offpath.convert.sparsify import sparsify as sparsify
