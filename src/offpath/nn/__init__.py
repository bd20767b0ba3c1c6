"""Layers with sparse weights."""

from offpath.nn.linear import SparseLinear as SparseLinear
from offpath.nn.rewire import rewire as rewire
