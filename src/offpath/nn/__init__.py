"""Layers with sparse weights."""

from offpath.nn.linear import SparseLinear as SparseLinear
