def isas() -> list[tuple[str, bool]]: ...
def calls(isa: int) -> int: ...
def pool_library() -> str: ...
def kept_scratch_bytes() -> int: ...
def digest(rows: int, nnz: int, crow_indices: int, col_indices: int, /) -> int: ...

class Plan:
    @property
    def bytes(self) -> int: ...

def make_plan(
    rows: int, columns: int, crow_indices: int, col_indices: int, permutation: int, threads: int, /
) -> Plan: ...
def planned_spmm_f32(
    isa: int,
    plan: Plan,
    batch: int,
    values: int,
    bias: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def spmm_f32(
    isa: int,
    rows: int,
    columns: int,
    batch: int,
    crow_indices: int,
    col_indices: int,
    values: int,
    bias: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    y: int,
    threads: int,
    /,
) -> None: ...
def sddmm_f32(
    isa: int,
    rows: int,
    columns: int,
    batch: int,
    crow_indices: int,
    col_indices: int,
    dy: int,
    dy_feature_stride: int,
    dy_batch_stride: int,
    x: int,
    x_feature_stride: int,
    x_batch_stride: int,
    dvalues: int,
    threads: int,
    /,
) -> None: ...

spmm_f64 = spmm_f32
planned_spmm_f64 = planned_spmm_f32
sddmm_f64 = sddmm_f32
