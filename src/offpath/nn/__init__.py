"""Layers with sparse weights."""

from offpath.nn.linear import SparseLinear as SparseLinear
from offpath.nn.rewire import check_rewire as check_rewire, rewire as rewire
