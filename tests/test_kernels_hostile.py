"""What a kernel must refuse, and what must not change its result."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from cases import PRODUCTS, Product
from checkers import poisoned_memory
from children import outcomes_under
from offpath import SparseLinear, kernels, pattern as patterns
from offpath.kernels import KernelError, _native, cpu, variant
from problems import PROBLEMS, Problem, freed, gaussian

NATIVE = [name for name in kernels.backends() if name.startswith("cpu:")]
LARGE = [p for p in PROBLEMS if p.name.startswith("several threads")]


@pytest.mark.parametrize("problem", LARGE, ids=lambda p: p.name)
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", NATIVE)
def test_result_does_not_depend_on_the_thread_count(name: str, product: Product, problem: Problem) -> None:
    pattern = problem.pattern
    operands = product.draw(pattern, problem.batch, gaussian(3, torch.float32))
    before = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(product.run(kernels.backends()[name], pattern, operands))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


FUSED = [name for name in ("cpu:avx2", "cpu:avx512", "cpu:neon", "cpu:neonbf16") if name in NATIVE]


@pytest.mark.skipif(len(FUSED) < 2, reason="needs a machine that runs two ISAs with fused multiply-add")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "product",
    # Over plans, AVX2 adds up runs of connections and AVX-512 buckets of columns.
    [p for p in PRODUCTS if "spmm" in p.name and "bitmap" not in p.name and "planned" not in p.name],
    ids=lambda p: p.name,
)
def test_spmm_has_the_same_bits_on_every_isa_with_fma(product: Product, dtype: torch.dtype) -> None:
    for problem in LARGE:
        pattern = problem.pattern
        operands = product.draw(pattern, problem.batch, gaussian(4, dtype))
        first, second = (product.run(kernels.backends()[name], pattern, operands) for name in FUSED)
        assert torch.equal(first, second)


def _operands() -> dict[str, torch.Tensor]:
    pattern = patterns.random((6, 8), 12, torch.Generator().manual_seed(0))
    return {
        "crow_indices": pattern.crow_indices,
        "col_indices": pattern.col_indices,
        "values": torch.randn(12),
        "x": torch.randn(5, 8),
    }


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(5, 8, dtype=torch.float64)},
        {"x": torch.randn(8)},
        {"x": torch.randn(5, 8, device="meta")},
        {"x": torch.randn(5, 8).to_sparse()},
        {"values": torch.randn(11)},
        {"values": torch.randn(12).half(), "x": torch.randn(5, 8).half()},
        {"values": torch.randn(12).bfloat16()},
        {"values": torch.randn(24)[::2]},
        {"col_indices": torch.zeros(12, dtype=torch.int64)},
        {"crow_indices": torch.zeros(7, dtype=torch.int64)},
        {"crow_indices": torch.zeros(0, dtype=torch.int32)},
        {"bias": torch.randn(5)},
        {"bias": torch.randn(6).double()},
    ],
    ids=lambda change: " and ".join(f"{k} {v.dtype} {tuple(v.shape)} {v.device}" for k, v in change.items()),
)
def test_misfitting_operands_are_refused(name: str, change: dict[str, torch.Tensor]) -> None:
    with pytest.raises(KernelError, match="got"):
        kernels.backends()[name].spmm(**(_operands() | change))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    "change", [{"dy": torch.randn(4, 6)}, {"dy": torch.randn(5, 7)}, {"dy": torch.randn(5, 6).half()}]
)
def test_misfitting_gradients_are_refused(name: str, change: dict[str, torch.Tensor]) -> None:
    operands = _operands() | {"dy": torch.randn(5, 6)} | change
    del operands["values"]
    with pytest.raises(KernelError, match="got"):
        kernels.backends()[name].sddmm(**operands)


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    "change",
    [
        {"x": torch.randn(5, 7)},
        {"x": torch.randn(5, 8).double()},
        {"values": torch.randn(11)},
        {"values": torch.randn(24)[::2]},
        {"bias": torch.randn(5)},
    ],
    ids=lambda change: " and ".join(f"{k} {v.dtype} {tuple(v.shape)}" for k, v in change.items()),
)
def test_operands_that_do_not_fit_the_plan_are_refused(name: str, change: dict[str, torch.Tensor]) -> None:
    backend, operands = kernels.backends()[name], _operands()
    plan = backend.plan(operands.pop("crow_indices"), operands.pop("col_indices"), 8, torch.float32)
    with pytest.raises(KernelError, match="got"):
        backend.planned_spmm(plan, **(operands | change))


MISFITS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "another dtype": torch.Tensor.double,
    "half": torch.Tensor.half,
    "on meta": lambda operand: operand.to("meta"),
    "freed": freed,
    "a dimension less": lambda operand: operand[0],
    "a dimension more": lambda vector: vector[None],
    "sparse": lambda operand: operand.to_sparse(),
    "twice as long, every other entry": lambda vector: vector.repeat_interleave(2)[::2],
    "too long": lambda operand: torch.cat([operand, operand[..., :1]], -1),
    "too short": lambda operand: operand[..., 1:],
    "fewer tokens": lambda activations: activations[1:],
}


@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("product", PRODUCTS, ids=lambda p: p.name)
@pytest.mark.parametrize("name", NATIVE)
def test_every_product_refuses_every_operand_that_does_not_fit(name: str, product: Product, misfit: str) -> None:
    pattern = patterns.random((6, 8), 12, torch.Generator().manual_seed(0))
    operands = product.draw(pattern, 5, gaussian(6, torch.float32))
    product.run(kernels.backends()[name], pattern, operands)  # as they stand they fit
    # The width of x is the pattern's where nothing was made of it, which is for its owner to check.
    of_width = [key for key in operands if key != "x" or not product.name.startswith(("spmm", "sddmm"))]
    # Int8 values and their scales go with an x of any dtype, and a single operand with itself.
    of_dtype = [key for key in operands if len(operands) > 1 and not (key == "x" and "scales" in operands)]
    vectors = [key for key, operand in operands.items() if operand.dim() == 1]
    apply_to = {
        "another dtype": of_dtype,
        "twice as long, every other entry": vectors,
        "a dimension more": vectors,
        "too long": of_width,
        "too short": of_width,
        "fewer tokens": ["x"] if {"x", "dy"} <= operands.keys() else [],
    }.get(misfit, list(operands))
    for key in apply_to:
        with pytest.raises(KernelError, match="storage was freed" if misfit == "freed" else "got"):
            product.run(kernels.backends()[name], pattern, operands | {key: MISFITS[misfit](operands[key])})


@pytest.mark.parametrize("name", NATIVE)
def test_indices_of_two_dimensions_are_refused_whatever_comes_with_them(name: str) -> None:
    backend, fits = kernels.backends()[name], _operands()
    crow, col, x = fits["crow_indices"], fits["col_indices"][None], fits["x"]
    one, dy = torch.ones(1, 1), torch.ones(5, 6)
    for call in (
        lambda: backend.spmm(crow, col, one, x),
        lambda: backend.sddmm(crow, col, dy, x),
        lambda: backend.plan(crow, col, 8, torch.float32, one.int()),
        lambda: backend.tiles(crow, col, 8),
        lambda: backend.bitmap(crow, col, 8),
        lambda: backend.digest(crow, col),
    ):
        with pytest.raises(KernelError, match="got"):
            call()


@pytest.mark.parametrize("name", NATIVE)
def test_indices_of_another_number_than_the_row_pointer_says_are_refused(name: str) -> None:
    backend, operands = kernels.backends()[name], _operands()
    crow, col = operands["crow_indices"], operands["col_indices"][:0]
    for call in (
        lambda: backend.spmm(crow, col, torch.ones(0), operands["x"]),
        lambda: backend.plan(crow, col, 8, torch.float32),
        lambda: backend.tiles(crow, col, 8),
        lambda: backend.bitmap(crow, col, 8),
    ):
        with pytest.raises(KernelError, match="got"):
            call()


def test_a_result_of_more_bytes_than_there_are_numbers_for_is_refused() -> None:
    layer = SparseLinear(1, 4096, density=1.0)
    with torch.no_grad(), pytest.raises(RuntimeError, match="overflow"):
        layer(torch.zeros(1, 1).expand(2**50, 1))


@pytest.mark.parametrize("name", NATIVE)
def test_a_plan_does_not_follow_later_writes_into_its_pattern(name: str) -> None:
    backend, operands = kernels.backends()[name], _operands()
    crow, col = operands.pop("crow_indices").clone(), operands.pop("col_indices").clone()
    plan = backend.plan(crow, col, 8, torch.float32)
    before = backend.planned_spmm(plan, **operands)
    col.fill_(2**30)
    crow.fill_(2**30)
    assert torch.equal(backend.planned_spmm(plan, **operands), before)


def test_scratch_memory_is_kept_within_its_limit() -> None:
    pattern = patterns.random((64, 4096), 4096, torch.Generator().manual_seed(0))
    for batch in (1024, 9000, 18000, 512):
        kernels.backends()[NATIVE[-1]].spmm(
            pattern.crow_indices, pattern.col_indices, torch.ones(4096), torch.ones(batch, 4096)
        )
        assert _native.kept_scratch_bytes() <= 256 * 2**20


def test_outputs_from_kept_memory_are_nobody_elses_while_they_live() -> None:
    pattern = patterns.random((512, 64), 4096, torch.Generator().manual_seed(0))
    backend, values = kernels.backends()[NATIVE[-1]], torch.randn(4096)

    def output(seed: int) -> torch.Tensor:
        x = torch.randn(512, 64, generator=torch.Generator().manual_seed(seed))  # 1 MiB of output
        return backend.spmm(pattern.crow_indices, pattern.col_indices, values, x)

    outputs = [output(seed) for seed in range(4)]
    copies = [y.clone() for y in outputs]
    kept = outputs[1].view(-1)[7:]  # a view holds the memory as the tensor did
    outputs[0] = outputs[1] = output(4)
    assert len({y.data_ptr() for y in (outputs[0], kept, *outputs[2:])}) == 4
    assert torch.equal(kept, copies[1].view(-1)[7:])
    assert all(torch.equal(y, copy) for y, copy in zip(outputs[2:], copies[2:], strict=True))


def test_outputs_from_kept_memory_are_filled_where_torch_would_fill_them() -> None:
    with poisoned_memory():
        assert bool(variant.output(torch.empty(0), 512, 512).isnan().all())
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", NATIVE)
def test_any_strides_give_the_same_result(name: str) -> None:
    operands = _operands()
    expected = kernels.backends()[name].spmm(**operands)
    x = operands["x"]
    wide = torch.randn(10, 16)
    wide[::2, ::2] = x
    padded = torch.randn(5, 9)
    padded[:, :8] = x
    feature_major = torch.randn(9, 5).t()
    feature_major[:, :8] = x
    for layout in (wide[::2, ::2], padded[:, :8], feature_major[:, :8]):
        assert torch.equal(kernels.backends()[name].spmm(**(operands | {"x": layout})), expected)
    same_everywhere = x[:1].expand(5, 8)
    repeated = kernels.backends()[name].spmm(**(operands | {"x": same_everywhere}))
    assert torch.equal(repeated, expected[:1].expand(5, 6))


def test_no_kernel_for_a_dtype_raises_instead_of_falling_back() -> None:
    with pytest.raises(KernelError, match="OFFPATH_BACKEND=reference"):
        kernels.select("cpu", torch.float16)
    with kernels.forced(NATIVE[0]), pytest.raises(KernelError, match="no kernels for"):
        kernels.select("cuda", torch.float32)


def test_forced_backend_holds_in_every_thread() -> None:
    with kernels.forced("reference"), ThreadPoolExecutor(1) as pool:
        assert pool.submit(kernels.select, "cpu", torch.float32).result().name == "reference"


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(KernelError, match="expected one of reference"), kernels.forced("tpu"):
        pass


def test_unknown_isa_is_refused() -> None:
    with pytest.raises(KernelError, match="it was not built"):
        cpu.make_backend("avx1024")


RUN = """
print(offpath.kernels.select('cpu', torch.float32).name)
with offpath.ops.forced_methods(forward="bucketed"):
    offpath.SparseLinear(64, 64)(torch.randn(8, 64))
print(*[isa for isa in offpath.kernels.cpu.isas() if offpath.kernels.cpu.calls(isa)])
"""


def test_forced_choice_is_the_one_that_runs_and_one_that_cannot_be_met_raises() -> None:
    forced = [({"OFFPATH_ISA": isa}, f"cpu:{isa}", isa) for isa in (name.removeprefix("cpu:") for name in NATIVE)]
    forced.append(({"OFFPATH_BACKEND": "reference"}, "reference", ""))
    impossible = [
        ({"OFFPATH_ISA": "sve2"}, "got 'sve2': it was not built"),
        ({"OFFPATH_BACKEND": "tpu"}, "expected OFFPATH_BACKEND to be one of cpu, gpu, reference, got 'tpu'"),
        ({"OFFPATH_BACKEND": "gpu", "OFFPATH_ISA": "avx2"}, "has no ISA"),
        ({"OFFPATH_BACKEND": "reference", "OFFPATH_ISA": "avx2"}, "has no ISA"),
    ]
    outcomes = outcomes_under([environment for environment, *_ in (*forced, *impossible)], RUN)
    for (_, name, isa), (status, out, errors) in zip(forced, outcomes, strict=False):
        assert status == 0 and out.splitlines() == [name, isa], errors
    for (_, message), (status, out, errors) in zip(impossible, outcomes[len(forced) :], strict=True):
        assert status == 1 and not out and message in errors
