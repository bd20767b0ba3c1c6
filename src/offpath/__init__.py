"""Dynamic, unstructured sparsity for PyTorch that pays on the hardware people own."""

from importlib.metadata import version as _version

from offpath import kernels as kernels, nn as nn, ops as ops, pattern as pattern, topology as topology
from offpath.convert import (
    compress as compress,
    densify as densify,
    fuse as fuse,
    pack_attention as pack_attention,
    prune as prune,
    sparsify as sparsify,
    unpack_attention as unpack_attention,
)
from offpath.nn import SparseLinear as SparseLinear
from offpath.ops import SparseRows as SparseRows
from offpath.pattern import Pattern as Pattern
from offpath.storage import StorageError as StorageError, load as load, save as save
from offpath.topology import GMP as GMP, MEST as MEST, SET as SET, RigL as RigL, Static as Static

__version__ = _version("offpath")
