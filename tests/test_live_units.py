"""TopK, BatchTopK and JumpReLU: who lives, with which gradients, and what a module goes through besides."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor, nn

from offpath.nn import (
    BatchTopK,
    JumpReLU,
    KWinners,
    KWinners2d,
    ProductKeyMemory,
    SparseInputLinear,
    SparseSparseLinear,
    TopK,
)
from offpath.ops import SparseRows, above

# Few different numbers, so that ties are common.
small = st.integers(-3, 3).map(float)


@st.composite
def scores(draw: st.DrawFn) -> Tensor:
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(1, 6))
    numbers = draw(st.lists(small, min_size=rows * columns, max_size=rows * columns))
    return torch.tensor(numbers).view(rows, columns)


def _largest(numbers: list[float], k: int) -> set[int]:
    return set(sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))[:k])


def _both(module: nn.Module, x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Output, dense, and the gradient of the input for `dy`."""
    x = x.clone().requires_grad_()
    y = module(x)
    y = y.to_dense().view(x.shape) if isinstance(y, SparseRows) else y
    y.backward(dy)
    return y.detach(), x.grad


@pytest.mark.parametrize("output", ["rows", "dense"])
@pytest.mark.parametrize("relu", [True, False])
@given(x=scores(), data=st.data())
@settings(max_examples=40)
def test_topk(output: str, relu: bool, x: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, x.shape[1]))
    live = torch.zeros_like(x, dtype=torch.bool)
    for mask, row in zip(live, x.tolist(), strict=True):
        mask[list(_largest(row, k))] = True
    live &= (x > 0) | (not relu)
    dy = torch.arange(1.0, x.numel() + 1).view(x.shape)
    y, dx = _both(TopK(k, relu, output), x, dy)
    assert torch.equal(y, x * live)
    assert torch.equal(dx, dy * live)


@pytest.mark.parametrize("output", ["rows", "dense"])
@pytest.mark.parametrize("relu", [True, False])
@given(x=scores(), data=st.data())
@settings(max_examples=40)
def test_batch_topk_while_training(output: str, relu: bool, x: Tensor, data: st.DataObject) -> None:
    k = data.draw(st.integers(0, x.shape[1]))
    live = torch.zeros(x.numel(), dtype=torch.bool)
    live[list(_largest(x.flatten().tolist(), k * x.shape[0]))] = True
    live = live.view(x.shape) & ((x > 0) | (not relu))
    dy = torch.arange(1.0, x.numel() + 1).view(x.shape)
    layer = BatchTopK(k, relu, output)
    y, dx = _both(layer, x, dy)
    assert torch.equal(y, x * live)
    assert torch.equal(dx, dy * live)
    assert layer.threshold == (x[live].min() if live.any() else 0)
    assert layer.num_batches_tracked == live.any()


def test_the_batch_threshold_is_an_average_and_then_moves() -> None:
    layer = BatchTopK(1, momentum=0.25)
    expected = 0.0
    for step in range(1, 9):
        layer(torch.tensor([[float(step), 0.5, 0.25], [9.0, -1.0, 0.125]]))
        weight = max(1 / step, 0.25)
        expected += weight * (min(step, 9) - expected)
        # The average of the first 1 / 0.25 batches is the plain one.
        assert step > 4 or expected == pytest.approx((step + 1) / 2)
    assert layer.threshold.item() == pytest.approx(expected, rel=8 * 2**-23)


def test_batches_without_news_leave_the_threshold() -> None:
    layer = BatchTopK(1)
    layer(torch.tensor([[2.0, 1.0]]))
    for nothing in (torch.tensor([[-2.0, -1.0]]), torch.full((1, 2), math.nan), torch.ones(0, 2)):
        layer(nothing)
    assert layer.threshold == 2 and layer.num_batches_tracked == 1


@pytest.mark.parametrize("trained", [True, False])
def test_in_eval_a_sample_does_not_depend_on_its_neighbours(trained: bool) -> None:
    torch.manual_seed(0)
    layer = BatchTopK(2, output="dense")
    if trained:
        layer(torch.randn(32, 8))
    layer.eval()
    x = torch.randn(6, 8)
    together = layer(x)
    assert torch.equal(together, torch.cat([layer(row[None]) for row in x]))
    expected = x * (x > layer.threshold) if trained else TopK(2, output="dense")(x)
    assert torch.equal(together, expected)


@given(threshold=st.floats(2**-10, 4, width=32), value=st.floats(0, 4, width=32))
def test_a_threshold_between_two_bfloat16_is_rounded_so_that_nobody_changes_sides(
    threshold: float, value: float
) -> None:
    threshold, x = torch.tensor(threshold), torch.tensor([value, threshold, threshold + 0.01]).bfloat16()
    assert torch.equal(above(x[None], threshold).values, x[x.float() > threshold])


def test_jumprelu_has_the_gradients_of_the_paper() -> None:
    """All numbers are dyadic, so that every sum is exact: theta is 1, the window (0.75, 1.25)."""
    layer = JumpReLU(2, bandwidth=0.5, threshold=1.0, output="dense")
    x = torch.tensor([[0.75, 0.875], [1.0, 1.125], [1.25, 3.0], [0.0, -1.0]], requires_grad=True)
    dy = torch.tensor([[1.0, 2.0], [4.0, 8.0], [16.0, 32.0], [64.0, 128.0]])
    live, near = x.detach() > 1, (x.detach() - 1).abs() < 0.25
    y, l0 = layer(x, with_l0=True)
    assert torch.equal(y, x * live)
    assert torch.equal(l0, live.sum(1).float())
    y.backward(dy, retain_graph=True)
    assert torch.equal(x.grad, dy * live)
    assert torch.equal(layer.log_threshold.grad, -1 / 0.5 * (dy * near).sum(0))  # theta is 1, and so is its derivative
    x.grad = layer.log_threshold.grad = None
    l0.backward(torch.tensor([1.0, 2.0, 4.0, 8.0]))
    assert torch.equal(layer.log_threshold.grad, -1 / 0.5 * (torch.tensor([1.0, 2.0, 4.0, 8.0])[:, None] * near).sum(0))
    assert x.grad is None or not x.grad.any()


def test_jumprelu_rows_pass_the_gradient_of_what_lies_just_below() -> None:
    """A loss behind the rows needs dy where the output is zero: so rows store those entries, and no others."""
    torch.manual_seed(0)
    layers = [JumpReLU(8, 0.5, 0.5, output, dtype=torch.float64) for output in ("rows", "dense")]
    x, weight = torch.randn(5, 8, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    rows, dense = (layer(x) for layer in layers)
    assert rows.nnz == (x > 0.25).sum() and rows.live_counts().sum() == (x > 0.5).sum()
    rows.matmul(weight).square().sum().backward()
    (dense @ weight).square().sum().backward()
    torch.testing.assert_close(layers[0].log_threshold.grad, layers[1].log_threshold.grad)
    with torch.no_grad():
        assert layers[0](x).nnz == (x > 0.5).sum()


def test_jumprelu_scales_with_theta() -> None:
    """d output / d log theta = -theta / bandwidth * theta near theta."""
    layer = JumpReLU(1, bandwidth=1.0, threshold=2.0, dtype=torch.float64)
    layer(torch.tensor([[2.25]], dtype=torch.float64)).values.sum().backward()
    torch.testing.assert_close(layer.log_threshold.grad, torch.tensor([-4.0], dtype=torch.float64))


def test_jumprelu_compares_bfloat16_with_the_exact_threshold() -> None:
    layer = JumpReLU(1, threshold=1.003)  # between 1 and 1.0078125
    x = torch.tensor([[1.0], [1.0078125]], dtype=torch.bfloat16)
    assert layer(x).to_dense().flatten().tolist() == [0.0, 1.0078125]


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.nan])
def test_jumprelu_refuses(bandwidth: float) -> None:
    with pytest.raises(ValueError, match="above 0"):
        JumpReLU(3, bandwidth=bandwidth)


def test_gradcheck() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    jump = JumpReLU(5, threshold=0.3).requires_grad_(False)
    kwinners = KWinners(5, 0.4, output="rows").eval()
    for module in (TopK(2), TopK(2, relu=False), BatchTopK(2), BatchTopK(2).eval(), jump, kwinners):
        assert torch.autograd.gradcheck(lambda x, weight, m=module: m(x).matmul(weight), (x, weight))
    assert torch.autograd.gradgradcheck(lambda x, weight: jump(x).matmul(weight), (x, weight))


MODULES = {
    "topk": lambda **kw: TopK(3, **kw),
    "batch topk": lambda **kw: BatchTopK(3, **kw),
    "jumprelu": lambda **kw: JumpReLU(8, threshold=0.1, **kw),
    "kwinners": lambda **kw: KWinners(8, 0.25, **kw),
    "kwinners 2d": lambda **kw: KWinners2d(8, 0.25, **kw),
    "kwinners local": lambda **kw: KWinners2d(8, 0.25, local=True, **kw),
}


@pytest.fixture(params=MODULES)
def make(request: pytest.FixtureRequest):
    return MODULES[request.param]


def _input(module: nn.Module, batch: int = 5, **options) -> Tensor:
    x = torch.randn(batch, 2, 3, 8, **options)
    return x.permute(0, 3, 1, 2) if isinstance(module, KWinners2d) else x


def test_rows_and_dense_agree(make) -> None:
    torch.manual_seed(0)
    sparse, dense = make(output="rows"), make(output="dense")
    for training in (True, True, False):
        x = _input(dense)
        rows, y = sparse.train(training)(x), dense.train(training)(x)
        assert isinstance(rows, SparseRows) and y.shape == x.shape
        if isinstance(dense, KWinners2d):
            y = y.permute(0, 2, 3, 1) if dense.local else y
        assert torch.equal(rows.to_dense(), y.reshape(rows.shape))


@pytest.mark.parametrize("output", ["rows", "dense"])
def test_no_samples(make, output: str) -> None:
    module = make(output=output)
    before = copy.deepcopy(module.state_dict())
    y = module(_input(module, batch=0, requires_grad=True))
    (y.values if isinstance(y, SparseRows) else y).sum().backward()
    assert y.shape[0] == 0
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


def test_nan_lives_and_harms_nobody_else(make) -> None:
    torch.manual_seed(0)
    module = make(output="dense")
    for training in (True, False):
        x = _input(module)
        x[1] = math.nan
        y = module.train(training)(x)
        assert y[1].isnan().any() and not y[[0, 2, 3, 4]].isnan().any()
    assert not any(buffer.isnan().any() for buffer in module.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtypes_and_autocast(make, dtype: torch.dtype) -> None:
    module = make().to(dtype)
    x = _input(module).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype is dtype  # it chooses and multiplies nothing
    assert module(x).dtype is dtype
    assert all(b.element_size() >= 4 for b in module.buffers()), "averages over many steps are not kept in 16 bits"


def test_state_dict_and_deepcopy(make) -> None:
    torch.manual_seed(0)
    module = make()
    module(_input(module))
    fresh, copied = make(), copy.deepcopy(module)
    fresh.load_state_dict(module.state_dict())
    x = _input(module)
    for training in (True, False):
        expected = module.train(training)(x)
        for other in (fresh, copied):
            y = other.train(training)(x)
            y, y0 = (t.to_dense() if isinstance(t, SparseRows) else t for t in (y, expected))
            assert torch.equal(y, y0)
            assert all(torch.equal(value, other.state_dict()[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("module", [TopK(4), BatchTopK(4), BatchTopK(4).eval()])
def test_more_than_there_are(module: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"expected k .*got 4"):
        module(torch.ones(2, 3))


@pytest.mark.parametrize("k", [-1, 2.5, True])
@pytest.mark.parametrize("kind", [TopK, BatchTopK])
def test_what_k_may_be(kind: type, k: object) -> None:
    with pytest.raises(ValueError, match="expected k to be an int"):
        kind(k)
    layer = kind(1)
    layer.k = k
    with pytest.raises(ValueError, match="expected k to be an int"):
        layer(torch.ones(2, 3))


def test_wrong_shapes_and_outputs(make) -> None:
    with pytest.raises(ValueError, match="expected output to be 'rows'"):
        make(output="sparse")
    with pytest.raises(ValueError, match="expected \\["):
        make()(torch.tensor(1.0))


@pytest.mark.parametrize(
    "module",
    [
        nn.Sequential(TopK(3), SparseInputLinear(8, 4)),
        nn.Sequential(BatchTopK(3), SparseInputLinear(8, 4)),
        nn.Sequential(JumpReLU(8, 0.5, 0.2), SparseInputLinear(8, 4)),
        nn.Sequential(KWinners(8, 0.25, break_ties=True, output="rows"), SparseInputLinear(8, 4)),
        KWinners(8, 0.25),
        ProductKeyMemory(8, 4, keys=5, k=2, heads=2, key_features=6),
    ],
    ids=["topk", "batch topk", "jumprelu", "kwinners rows", "kwinners", "memory"],
)
def test_compiles_without_a_break(module: nn.Module) -> None:
    torch.manual_seed(0)
    torch.compiler.reset()
    eager = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, 8)
    results = []
    for run in (eager, compiled):
        z = x.clone().requires_grad_()
        y = run(z)
        y.square().sum().backward()
        results.append([y, z.grad, *(p.grad for p in run.parameters()), *run.buffers()])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_one_graph_computes_batches_of_all_sizes() -> None:
    torch.compiler.reset()
    module = nn.Sequential(nn.Linear(8, 16), BatchTopK(3, output="dense"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for batch in range(2, 14):  # torch gives up after eight graphs
        compiled(torch.randn(batch, 8)).sum().backward()
    exported = torch.export.export(module, (torch.randn(4, 8),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    assert exported.module()(torch.randn(7, 8)).shape == (7, 16)


@pytest.mark.parametrize(
    "reader", [JumpReLU(8, 0.5, 0.2, output="dense"), nn.Sequential(nn.ReLU(), SparseSparseLinear(8, 4))]
)
def test_inductor_compiles_an_empty_batch(reader: nn.Module) -> None:
    torch.compiler.reset()
    module = nn.Sequential(nn.Linear(6, 8), reader)
    compiled = torch.compile(module, fullgraph=True)
    for batch in (3, 0):
        x = torch.randn(batch, 6, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert y.shape == module(x).shape and x.grad.shape == (batch, 6)


def test_meta_device() -> None:
    for module in (
        nn.Sequential(TopK(3), SparseInputLinear(8, 4, device="meta")),
        nn.Sequential(BatchTopK(3, device="meta"), SparseInputLinear(8, 4, device="meta")),
        nn.Sequential(KWinners(8, 0.25, device="meta"), SparseInputLinear(8, 4, device="meta")),
        ProductKeyMemory(8, 4, keys=5, k=2, heads=2, key_features=6, device="meta"),
    ):
        y = module(torch.empty(5, 8, device="meta"))
        assert y.is_meta and y.shape == (5, 4)
        assert all(tensor.is_meta for tensor in module.state_dict().values())
        repr(module)


def test_the_gradient_of_a_threshold_in_16_bits_is_summed_wide_and_misses_nobody() -> None:
    """8192 rows within the bandwidth of the threshold, and a bandwidth that bfloat16 would round away."""
    for bandwidth, value in ((0.25, 1.015625), (0.001, 1.0)):
        gradients = []
        for dtype in (torch.float32, torch.bfloat16):
            layer = JumpReLU(2, bandwidth=bandwidth, threshold=1.0).to(dtype)
            layer(torch.full((8192, 2), value, dtype=dtype)).to_dense().sum().backward()
            gradients.append(layer.log_threshold.grad.float())
        # The whole sum is rounded once; each entry's own share has been rounded to bfloat16 before.
        assert gradients[0].abs().min() > 0
        torch.testing.assert_close(gradients[1], gradients[0], rtol=2 * 2**-8, atol=0)
