"""`SparseConv2d` and `SparseConv1d`: what `nn.Conv2d` does, on torch's own machinery."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from offpath import kernels, ops
from offpath.nn import SparseConv1d, SparseConv2d
from offpath.ops import convolution_choice

SETTINGS = (
    {"kernel_size": 3, "padding": 1},
    {"kernel_size": (3, 1), "padding": "same", "dilation": (2, 1)},
    {"kernel_size": (2, 4), "padding": (1, 3), "groups": 3},
    {"kernel_size": 3, "stride": 2, "padding": "valid", "bias": False},
    {"kernel_size": 1},
    {"kernel_size": 1, "stride": 2, "groups": 3},
)
METHODS = (
    {"forward": "bucketed", "dx": "bucketed", "dvalues": "tiled"},
    dict.fromkeys(("forward", "dx", "dvalues"), "dense"),
)


def _pruned(conv: nn.Module, share: float = 0.6) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        conv.weight.mul_(torch.rand(conv.weight.shape, generator=generator) > share)
    return conv


@pytest.mark.parametrize("methods", METHODS, ids=("planes", "dense"))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_layer_is_its_dense_layer(settings: dict, memory_format: torch.memory_format, methods: dict) -> None:
    """float64 to 1e-12 of the largest: both add up at most 200 products of numbers below 10 (gamma_200 < 1e-13)."""
    dense = _pruned(nn.Conv2d(6, 9, dtype=torch.float64, **settings))
    sparse = SparseConv2d.from_dense(dense)
    x = torch.randn(2, 6, 9, 11, dtype=torch.float64).contiguous(memory_format=memory_format)
    with ops.forced_methods(**methods):
        results = []
        for layer in (dense, sparse):
            own = x.clone().requires_grad_()
            y = layer(own)
            y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape))
            results.append((y, own.grad, *(p.grad for p in layer.parameters())))
    pattern = sparse.pattern
    (y, dx, dweight, *dbias), (got, got_dx, dvalues, *got_dbias) = results
    expected = dweight.flatten(1)[pattern.row_indices().long(), pattern.col_indices.long()]
    for wanted, found in zip((y, dx, expected, *dbias), (got, got_dx, dvalues, *got_dbias), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert got.stride() == y.stride() and got_dx.stride() == x.stride()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_same_padding_of_an_even_kernel_has_more_behind() -> None:
    dense = _pruned(nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(3, 1), dtype=torch.float64))
    x = torch.randn(2, 3, 7, 8, dtype=torch.float64)
    for methods in METHODS:
        with ops.forced_methods(**methods):
            sparse = SparseConv2d.from_dense(dense)
            own, rival = (x.clone().requires_grad_() for _ in range(2))
            sparse(own).square().sum().backward()
            dense(rival).square().sum().backward()
            torch.testing.assert_close(sparse(x), dense(x), rtol=0, atol=1e-12)
            torch.testing.assert_close(own.grad, rival.grad, rtol=0, atol=1e-12)


def test_one_dimension_and_no_images() -> None:
    dense = _pruned(nn.Conv1d(4, 6, 5, stride=2, padding=3, dtype=torch.float64))
    sparse = SparseConv1d.from_dense(dense)
    for shape in ((2, 4, 33), (4, 33)):
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(sparse(x), dense(x), rtol=0, atol=1e-12)
    assert torch.equal(sparse.to_dense().weight, dense.weight)
    image = torch.randn(6, 7, 8)
    layer = SparseConv2d(6, 3, 3)
    assert torch.equal(layer(image), layer(image[None])[0])


def test_gradients() -> None:
    layer = SparseConv2d(4, 6, (3, 2), density=0.4, groups=2, dtype=torch.float64)
    topology = layer.connections.crow_indices, layer.connections.col_indices
    x = torch.randn(2, 4, 5, 4, dtype=torch.float64, requires_grad=True)

    def call(x, values, bias):
        return ops.sparse_conv2d(x, values, bias, *topology, (3, 2), (2, 1), (1, 2, 0, 1), (1, 2), 2)

    assert torch.autograd.gradcheck(call, (x, layer.values, layer.bias))
    assert torch.autograd.gradgradcheck(call, (x, layer.values, layer.bias))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # which opcheck reads
def test_ops_as_torch_wants_them() -> None:
    layer = SparseConv2d(4, 6, 3, density=0.4)
    topology = layer.crow_indices, layer.col_indices
    x = torch.randn(2, 4, 6, 5).contiguous(memory_format=torch.channels_last).requires_grad_()
    dy, values = torch.randn(2, 6, 4, 3, requires_grad=True), layer.values
    sizes = [3, 3], [1, 1], [0, 0, 0, 0], [1, 1], 1
    torch.library.opcheck(torch.ops.offpath.sparse_conv2d.default, (x, values, layer.bias, *topology, *sizes))
    torch.library.opcheck(
        torch.ops.offpath.sparse_conv2d_dx.default, (dy, values, *topology, [2, 4, 6, 5], True, *sizes)
    )
    torch.library.opcheck(torch.ops.offpath.sparse_conv2d_dvalues.default, (dy, x, *topology, *sizes))


def test_compiles_whole() -> None:
    model = nn.Sequential(SparseConv2d(3, 8, 3, padding="same"), nn.ReLU(), SparseConv2d(8, 4, 1))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(2, 3, 8, 9).contiguous(memory_format=memory_format)
        torch.testing.assert_close(compiled(x), model(x))
        assert compiled(x).stride() == model(x).stride()


def test_copies_pickles_and_checkpoints() -> None:
    layer = SparseConv2d.from_dense(_pruned(nn.Conv2d(6, 9, 3, groups=3)))
    x = torch.randn(1, 6, 5, 5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x)) and other.values is not layer.values
    fresh = SparseConv2d(6, 9, 3, groups=3)  # of another nnz
    fresh.load_state_dict(layer.state_dict())
    assert torch.equal(fresh(x), layer(x)) and torch.equal(fresh.col_indices, layer.col_indices)
    with pytest.raises(RuntimeError, match="dense weight"):
        fresh.load_state_dict(layer.to_dense().state_dict())


def test_autocast_and_bfloat16() -> None:
    layer, x = SparseConv2d(3, 4, 3), torch.randn(1, 3, 6, 6)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16 and torch.equal(y, layer.bfloat16()(x.bfloat16()))


def test_an_autocast_changes_no_op() -> None:
    layer, x = SparseConv2d(3, 4, 3), torch.randn(1, 3, 6, 6, requires_grad=True)
    operands = layer.values, layer.bias, layer.crow_indices, layer.col_indices, (3, 3)
    for methods in METHODS:
        results = []
        for enabled in (False, True):
            with ops.forced_methods(**methods), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                y = ops.sparse_conv2d(x, *operands)
                results.append((y, *torch.autograd.grad(y.sum(), (x, layer.values, layer.bias))))
        for outside, inside in zip(*results, strict=True):
            assert inside.dtype is torch.float32 and torch.equal(outside, inside)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"padding_mode": "circular"}, "padding_mode='zeros'"),
        ({"groups": 4}, "groups=4"),
        ({"padding": "same", "stride": 2}, "'same' with stride 1"),
        ({"padding": "full"}, "'valid'"),
        ({"stride": 0}, "stride"),
        ({"dilation": (1, 2, 3)}, "dilation"),
        ({"prefer": "best"}, "prefer"),
    ],
)
def test_settings_that_do_not_fit_are_refused(given: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SparseConv2d(6, 9, 3, **given)


def test_inputs_that_do_not_fit_are_refused() -> None:
    layer = SparseConv2d(6, 9, 5)
    for x, said in (
        (torch.randn(2, 5, 8, 8), "6, height"),
        (torch.randn(6, 8), "6, height"),
        (torch.randn(2, 6, 4, 8), "kernel fits"),
        (torch.randn(2, 6, 8, 8).double(), "cast"),
    ):
        with pytest.raises(ValueError, match=said):
            layer(x)
    with pytest.raises(ValueError, match="expected Conv2d, got ConvTranspose2d"):
        SparseConv2d.from_dense(nn.ConvTranspose2d(3, 4, 3))


def test_the_faster_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever is said to be faster computes; `prefer="memory"` and the definition go over planes always."""
    x = torch.randn(1, 3, 6, 6)
    asked, said = [], {}

    def seconds(backend, convolution, nnz, images, dtype, channels_last):
        asked.append(images)
        return {p: {"planes": 1.0, "dense": said["dense"]} for p in ("forward", "dx", "dvalues")}

    monkeypatch.setattr(convolution_choice, "_seconds", seconds)
    calls: list[str] = []
    monkeypatch.setattr(
        ops.prepared_convolutions.DenseConvolution,
        "forward",
        lambda *_: calls.append("dense") or torch.zeros(1, 4, 4, 4),
    )
    for seconds_of_dense, prefer, expected in ((0.5, "speed", ["dense"]), (0.95, "speed", []), (0.5, "memory", [])):
        calls.clear()
        said["dense"] = seconds_of_dense
        layer = SparseConv2d(3, 4, 3, prefer=prefer)
        layer(x), layer(x)
        assert calls == 2 * expected
    assert asked == [1, 1], "asked in every call"
    with kernels.forced("reference"):
        layer.prefer = "speed"
        layer(x)
    assert asked == [1, 1]
    # In inference, the way to the kernel is another one, and the result the same.
    layer = SparseConv2d(3, 4, 3, prefer="memory")
    y = layer(x)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    with pytest.raises(kernels.KernelError, match="two sizes in kernel"):
        ops.sparse_conv2d(x, layer.values, None, layer.crow_indices, layer.col_indices, (3,))


def test_explain_tells_what_is_chosen_and_what_each_way_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {"forward": 0.5, "dx": 2.0, "dvalues": 0.95}
    asked = []

    def seconds(backend, convolution, nnz, images, dtype, channels_last):
        asked.append((convolution.size, convolution.stride, images, channels_last))
        return {p: {"planes": 1.0, "dense": dense[p]} for p in dense}

    monkeypatch.setattr(convolution_choice, "_seconds", seconds)
    layer = SparseConv2d(256, 512, 3, stride=2, padding=1, sparsity=0.8)
    explanation = layer.explain(32, (12, 12), channels_last=True)
    assert explanation.chosen == {"forward": "dense", "dx": "planes", "dvalues": "planes"}
    # 6 x 6 pixels of 256 x 512 x 9 multiply-adds each: 23 images are measured instead of 32.
    assert set(asked) == {((12, 12), (2, 2), 23, True)}
    told = {(o.product, o.method): o.seconds for o in explanation.options}
    assert told == pytest.approx(
        {(p, m): 32 / 23 * s for p in dense for m, s in (("planes", 1.0), ("dense", dense[p]))}
    )
    assert "* forward  dense" in str(explanation) and "* dx       planes" in str(explanation)
    with ops.forced_methods(forward="bucketed"):
        forced = layer.explain(1, 12)
    assert forced.chosen["forward"] == "planes" and "except where forced: forward=bucketed" in forced.reason
    layer.prefer = "memory"
    assert {(o.method, o.seconds is None) for o in layer.explain(1, 12).options} == {("planes", False)}
    with kernels.forced("reference"):
        assert {(o.method, o.seconds) for o in layer.explain(1, 12).options} == {("planes", None)}


def test_explain_answers_as_the_layer_computes() -> None:
    for layer, shape, channels_last in (
        (SparseConv2d(6, 9, 3, padding=1), (2, 6, 8, 8), False),
        (SparseConv2d(6, 9, 1), (2, 6, 8, 8), True),
        (SparseConv1d(6, 9, 3), (2, 6, 8), False),
    ):
        images, _, *size = shape
        explanation = layer.explain(images, tuple(size), channels_last)
        pointwise = layer.kernel_size == (1, 1)
        assert explanation.chosen.keys() == {"forward", "dx", "dvalues"}
        assert ({o.method for o in explanation.options} == {"planes", "dense"}) is not pointwise
        assert all(option.seconds > 0 for option in explanation.options)
    with pytest.raises(ValueError, match="at least one image, got 0"):
        SparseConv2d(6, 9, 3).explain(0, 8)
    with pytest.raises(ValueError, match="expected size as a number or 2"):
        SparseConv2d(6, 9, 3).explain(1, (8, 8, 8))
    with pytest.raises(ValueError, match="kernel fits"):
        SparseConv2d(6, 9, 3).explain(1, 2)
