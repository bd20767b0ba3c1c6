"""Where a pattern meets a kernel: `torch.library` ops with autograd."""

from offpath.ops.choice import (
    PREFERENCES as PREFERENCES,
    Explanation as Explanation,
    explain as explain,
    forced_methods as forced_methods,
)
from offpath.ops.prepared import Connections as Connections
from offpath.ops.sparse_linear import sparse_linear as sparse_linear
