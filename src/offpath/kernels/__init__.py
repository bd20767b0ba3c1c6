"""The same few products on every backend. Plain tensors in and out; nothing here knows `Pattern`."""

from offpath.kernels.backend import Backend as Backend, KernelError as KernelError
from offpath.kernels.registry import (
    backends as backends,
    default_backend as default_backend,
    forced as forced,
    select as select,
)
