"""Where a pattern meets a kernel: `torch.library` ops with autograd."""

from offpath.ops import (
    flops as flops,
    live_linear as live_linear,
    packed_linear as packed_linear,
    row_products as row_products,
)
from offpath.ops.choice import (
    PREFERENCES as PREFERENCES,
    Explanation as Explanation,
    explain as explain,
    forced_methods as forced_methods,
)
from offpath.ops.int8_linear import ACTIVATIONS as ACTIVATIONS, int8_linear as int8_linear
from offpath.ops.nonzeros import sparse_matmul_of_nonzeros as sparse_matmul_of_nonzeros
from offpath.ops.owned_linear import int8_linear_of as int8_linear_of, sparse_linear_of as sparse_linear_of
from offpath.ops.prepared import Connections as Connections, keep_all_columns as keep_all_columns
from offpath.ops.row_choice import forced_dense_rows as forced_dense_rows
from offpath.ops.selected_rows import (
    above as above,
    batch_topk as batch_topk,
    encode_topk as encode_topk,
    topk_rows as topk_rows,
)
from offpath.ops.sparse_conv import explain_conv2d as explain_conv2d, sparse_conv2d as sparse_conv2d
from offpath.ops.sparse_linear import sparse_linear as sparse_linear
from offpath.ops.sparse_row_products import sparse_matmul as sparse_matmul
from offpath.ops.sparse_rows import SparseRows as SparseRows

flops.register_when_imported()
