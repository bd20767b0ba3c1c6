"""Where a pattern meets a kernel: `torch.library` ops with autograd."""

from offpath.ops.prepared import prepared_bytes as prepared_bytes
from offpath.ops.sparse_linear import sparse_linear as sparse_linear
