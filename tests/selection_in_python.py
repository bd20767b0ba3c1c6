"""Selections on a GPU, run in Python as in `triton_in_python.py`: which entries they choose, and that nothing waits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from offpath import SparseLinear, kernels, ops
from offpath.kernels import KernelError
from offpath.kernels.gpu import counting_sort, launch, selection, ties
from offpath.kernels.gpu.selection import batch_topk, encode_topk, topk
from offpath.kernels.reference_rows import ROWS as DEFINITION
from offpath.nn import BatchTopK, SparseAutoencoder, SparseInputLinear, TopK, autoencoder, row_blocks, straight_through
from offpath.ops import library
from triton_in_python import every_dtype, mutated
from waits import Counts, Waited, Waits

NAN, INF = torch.nan, torch.inf
SCORES = {
    "ties": [[1.0, 3.0, 3.0, 3.0, 0.0], [2.0, 2.0, 2.0, 2.0, 2.0], [5.0, 4.0, 3.0, 2.0, 1.0]],
    "zeros of both signs": [[0.0, -0.0, 0.0, -0.0, -1.0], [-0.0, 0.0, 5.0, -0.0, 0.0]],
    "NaN": [[NAN, 1.0, NAN, NAN, 2.0], [1.0, NAN, INF, 0.0, 1.0], [NAN, INF, INF, INF, NAN]],
    "infinities": [[-INF, INF, INF, -INF, 0.0], [-INF, -INF, -INF, 1.0, -INF]],
    "no rows": torch.empty(0, 5),
}


def _same(got: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    for one, other in zip(got, right, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", SCORES)
@every_dtype
def test_selection_chooses_what_the_definition_does(name: str, dtype: torch.dtype) -> None:
    x = torch.as_tensor(SCORES[name]).to(dtype)
    for k in range(6):
        _same(topk(x, k), DEFINITION.topk(x, k))
        count = min(2 * k, x.numel())
        _same(batch_topk(x, count), DEFINITION.batch_topk(x, count))


def _crowded(dtype: torch.dtype) -> Tensor:
    """Rows with many equals, without any, of one number alone, and with NaN of both signs and other bits."""
    x = torch.randn(5, 150, generator=torch.Generator().manual_seed(0))
    x[:2] = x[:2].mul(2).round().div(2)
    x[3], x[4, ::3] = 0.0, NAN
    x[3, ::2] = -0.0
    x = x.to(dtype)
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    x[4].view(bits)[::9] ^= -(2 ** (8 * x.element_size() - 1)) | 1
    return x


def _check_crowded() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = _crowded(dtype)
        for k in (1, 60, 149, 150):
            _same(topk(x, k), DEFINITION.topk(x, k))
        for k in (60, 500, 749):
            _same(batch_topk(x, k), DEFINITION.batch_topk(x, k))


def test_equals_in_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ties, "BLOCK", 32)
    _check_crowded()
    x = _crowded(torch.float32)
    for view in (x.t(), x[:, 1::2], x[:1].expand(3, -1), x[:, 5:90]):
        _same(topk(view, 4), DEFINITION.topk(view, 4))


MUTANTS = {
    "equals are not counted": ("(score == least) | ((", "(score == least) & (("),
    "NaN is no number like others": ("| ((score != score) & (least == least))", ""),
    "a next NaN is not seen": ("(spare == least) | (spare != spare)", "spare == least"),
    "one too few": ("<= left)", "< left)"),
    "any of the equals": ("<= left)", ">= 0)"),
    "the wrong block of counts": ("larger_ends + row * blocks + blocks - 1", "larger_ends + row * blocks"),
    "what is behind the last column": ("return inside & larger, inside & equal", "return larger, equal"),
    "the wrong row": ("scores + row * stride", "scores + row // 2 * stride"),
    "equals before are forgotten": ("larger_before + tl.minimum(equal_before, wanted)", "larger_before"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_rejected(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mutant = mutated(ties, *MUTANTS[name], tmp_path)
    mutant.BLOCK = 32
    monkeypatch.setattr(selection, "take_first_of_equals", mutant.take_first_of_equals)
    with pytest.raises((AssertionError, IndexError, RuntimeError)):
        _check_crowded()


def test_an_encoder_takes_its_rows_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "BLOCK_ENTRIES", 50)
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randint(-3, 4, s, generator=generator).float() for s in ((11, 6), (20, 6), (20,)))
    for some in (None, bias):
        _same(encode_topk(x, weight, some, 3), DEFINITION.encode_topk(x, weight, some, 3))


def test_scores_that_change_meanwhile_lead_to_no_other_memory() -> None:
    memory = torch.full((3, 4), -1)
    best = torch.tensor([[5.0] * 5, [1.0] * 5])
    ties.take_first_of_equals(torch.tensor([[7.0] * 50, [0.0] * 50]), best, memory[1:])
    assert memory.tolist() == [[-1] * 4, [0, 1, 2, 3], [-1] * 4]


def test_scores_that_no_kernel_reads_are_refused() -> None:
    with pytest.raises(KernelError, match="one dtype among"):
        topk(torch.ones(2, 5, dtype=torch.float16), 2)


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch):
    """CPU tensors are treated as those of a GPU: nobody looks at what the indices say, and blocks are other ones."""
    monkeypatch.setattr(launch, "check_rows", lambda *_: None)
    monkeypatch.setattr(row_blocks, "_is_on_device", lambda x: True)
    monkeypatch.setattr(straight_through, "_adds_in_order", lambda sums: False)
    monkeypatch.setattr(row_blocks, "DEVICE_BLOCK_ENTRIES", 4 * 16)  # three blocks of four rows
    with kernels.forced("gpu:interpreted"):
        yield


def _x() -> Tensor:
    return torch.randn(11, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()


def _steps() -> dict[str, Callable[[], object]]:
    """Whole steps, forward and backward, without a wait."""
    sae = SparseAutoencoder(12, 16, k=3, aux_coefficient=0)
    x, dense = _x(), torch.randn(16, 12)

    def added() -> None:
        rows = ops.topk_rows(_x(), 4)
        rows.detach().add_weight_gradient(torch.randn(11, 5), torch.zeros(12, 5))
        rows.counts()

    def densely() -> None:
        with ops.forced_dense_rows(True):
            SparseInputLinear(12, 8)(TopK(4)(x)).sum().backward()

    return {
        "TopK": lambda: SparseInputLinear(12, 8)(TopK(4)(x)).sum().backward(),
        "BatchTopK": lambda: SparseInputLinear(12, 8)(BatchTopK(4)(x)).sum().backward(),
        "TopK with its zeros": densely,
        "encode_topk": lambda: ops.encode_topk(x, dense, None, 3).matmul(dense).sum().backward(),
        "autoencoder": lambda: sae.decode(sae.encode(x)).sum().backward(),
        "add_weight_gradient": added,
    }


@pytest.mark.parametrize("name", _steps())
def test_a_step_waits_for_nothing(on_device: None, name: str) -> None:
    step = _steps()[name]
    with Waits():
        step()


@pytest.mark.parametrize(
    ("activation", "aux_coefficient", "waits"),
    [("topk", 0, 1), ("topk", 1, 2), ("batch_topk", 0, 2), ("batch_topk", 1, 3), ("jumprelu", 0, 5)],
)
def test_the_loss_of_an_autoencoder_waits_as_often_as_its_page_says(
    on_device: None, activation: str, aux_coefficient: float, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether rows differ, which latents are dead if that is wanted, how many entries: JumpReLU's in each block."""
    sae = SparseAutoencoder(12, 16, k=3, activation=activation, aux_coefficient=aux_coefficient)
    with Waits(most=9) as waiting:
        sae.loss(_x()).total.backward()
    assert len(waiting.found) == waits, waiting.found
    # While a graph is captured, nobody asks whether rows differ.
    monkeypatch.setattr(autoencoder, "expect_variance", lambda *_: None)
    with Waits(most=waits - 1):
        sae.loss(_x()).total.backward()


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "jumprelu"])
def test_a_step_of_an_autoencoder_sorts_its_entries_once(
    on_device: None, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_ones, sort = [], counting_sort.sort
    monkeypatch.setattr(counting_sort, "sort", lambda of, size: (sorted_ones.append(of), sort(of, size))[1])
    sae = SparseAutoencoder(12, 16, k=3, activation=activation, aux_coefficient=0)
    x, gradients = _x().detach(), []
    for backend in ("reference", "gpu:interpreted"):
        sae.zero_grad()
        with kernels.forced(backend):
            sae.loss(x).total.backward()
        gradients.append([parameter.grad for parameter in sae.parameters()])
    for right, got in zip(*gradients, strict=True):
        torch.testing.assert_close(got, right)
    assert len(sorted_ones) == 1
    # Who calls the op may be a compiler, which captures graphs: nothing is kept for the next one then.
    monkeypatch.setattr(library, "nobody_listens", lambda *_: False)
    sae.loss(x).total.backward()
    assert len(sorted_ones) == 3


@pytest.mark.parametrize("k", [0, 1, 30, 90])
def test_the_best_of_blocks_are_those_of_all(on_device: None, k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randint(-2, 3, s, generator=generator).float() for s in ((11, 12), (16, 12), (16,)))
    x[2, 3] = NAN
    scores = x @ weight.T + bias
    crow_indices, indices, values = DEFINITION.batch_topk(scores, k)
    right = ops.SparseRows(crow_indices, indices, values.where(~(values <= 0), 0), 16).to_dense()
    found = row_blocks.encode_batch_topk(x, weight, bias, k)
    assert found.nnz == int((right != 0).sum())
    _same((found.to_dense(),), (right,))


def _any_tied(x: Tensor, k: int) -> Tensor:
    """`topk` as it was when it asked the device whether there is a tie."""
    best, places = x.topk(min(k + 1, x.shape[1]), dim=1)
    if bool((best[:, k] == best[:, k - 1]).any()):
        places = x.sort(dim=1, descending=True, stable=True).indices
    return places[:, :k].sort(dim=1).values


def test_a_selection_that_asks_is_caught(on_device: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "_places_of_largest", _any_tied)
    with pytest.raises(Waited, match="is_nonzero"), Waits():
        ops.topk_rows(_x(), 3)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x[x > 0],
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: (x > 0).nonzero(),
        lambda x: torch.where(x > 0),
        lambda x: x.long().abs().repeat_interleave(x.long().abs()),
        lambda x: x.masked_select(x > 0),
        lambda x: x.clone().index_put_((x > 0,), x[0]),
        lambda x: x.clone().index_put_((x.long().abs(),), x[0], accumulate=True),
        lambda x: x.unique(),
        lambda x: x.long().abs().bincount(),
        lambda x: torch.equal(x, x),
        lambda x: torch.tensor(1.0, device=x.device),
    ],
)
def test_what_waits_is_known(wait: Callable[[Tensor], object]) -> None:
    x = torch.arange(-3.0, 3.0)
    with pytest.raises(Waited), Waits():
        wait(x)
    with Waits():
        x.long().abs().repeat_interleave(x.long().abs(), output_size=9)
        x[x.argsort()], x.masked_fill(x > 0, 0), torch.where(x > 0, x, 0)


def test_a_step_with_the_weight_written_out_launches_two_kernels_more_than_a_dense_one(
    on_device: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weight is written out once for two products; modes would keep the layer from that, so they are hidden."""
    monkeypatch.setattr(library, "_count_of_modes", lambda: 0)
    launched: list[str] = []
    run = launch._launch_by_triton

    def launch_counted(kernel: Any, *arguments: Any) -> object:
        launched.append(kernel.fn.__name__)
        return run(kernel, *arguments)

    monkeypatch.setattr(launch, "_launch_by_triton", launch_counted)
    layer = SparseLinear(12, 8, sparsity=0.5)
    for one, kernels_of_triton in ((layer, ["expand_kernel", "compress_kernel"]), (layer.to_dense(), [])):
        x, dy = _x(), torch.randn(11, 8)
        with ops.forced_methods(forward="dense", dx="dense", dvalues="dense"):
            one(x)  # the first call finds out what is known of the connections
            launched.clear()
            with Counts("addmm", "mm", "sum") as counts:
                one(x).backward(dy)
        assert launched == kernels_of_triton and counts.found == {"addmm": 1, "mm": 2, "sum": 1}
