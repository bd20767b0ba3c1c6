"""Layers with sparse weights, and layers that make and read sparse activations."""

from offpath.nn.attention import UnpackedAttention as UnpackedAttention
from offpath.nn.autoencoder import SparseAutoencoder as SparseAutoencoder
from offpath.nn.autoencoder_loss import SAELoss as SAELoss
from offpath.nn.conv import SparseConv1d as SparseConv1d, SparseConv2d as SparseConv2d
from offpath.nn.int8_embedding import Int8Embedding as Int8Embedding
from offpath.nn.int8_linear import Int8SparseLinear as Int8SparseLinear
from offpath.nn.jumprelu import JumpReLU as JumpReLU
from offpath.nn.kwinners import (
    KWinners as KWinners,
    KWinners2d as KWinners2d,
    update_boost_strength as update_boost_strength,
)
from offpath.nn.linear import SparseLinear as SparseLinear
from offpath.nn.packed_linear import PackedSparseLinear as PackedSparseLinear
from offpath.nn.product_key_memory import ProductKeyMemory as ProductKeyMemory
from offpath.nn.rewire import check_rewire as check_rewire, rewire as rewire
from offpath.nn.sparse_input_linear import SparseInputLinear as SparseInputLinear
from offpath.nn.sparse_sparse_linear import SparseSparseLinear as SparseSparseLinear
from offpath.nn.topk import BatchTopK as BatchTopK, TopK as TopK
