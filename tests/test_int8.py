"""Values of one byte: the op, the layer and the embedding; the products over floats are in cases.py."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from checkers import gamma, poisoned_memory
from offpath import kernels, pattern as patterns
from offpath.kernels import Backend, KernelError, cpu
from offpath.kernels.methods import METHODS
from offpath.kernels.reference import quantise_tokens
from offpath.nn import Int8SparseLinear, SparseLinear
from offpath.ops import forced_methods, int8_linear
from offpath.pattern import Pattern
from problems import PROBLEMS, WIDTHS, Problem, gaussian, small_integers

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
REFERENCE = kernels.backends()["reference"]
SMALL = [p for p in PROBLEMS if not p.name.startswith("batch over")]


def _layer(in_features: int = 70, out_features: int = 33, seed: int = 0, **options) -> Int8SparseLinear:
    generator = torch.Generator().manual_seed(seed)
    return Int8SparseLinear.from_sparse(
        SparseLinear(in_features, out_features, sparsity=0.7, generator=generator), **options
    )


def _operands(problem: Problem, dtype: torch.dtype, whole: bool) -> tuple[Pattern, tuple[Tensor, ...]]:
    pattern = problem.pattern
    rows, columns = pattern.shape
    draw = small_integers(5, dtype) if whole else gaussian(5, dtype)
    x = draw((problem.batch, columns))
    if whole and columns:
        x[:, 0] = 127  # every token's scale is 1, so that nothing is rounded
    bytes_ = torch.randint(-128, 128, (pattern.nnz,), generator=torch.Generator().manual_seed(6)).to(torch.int8)
    return pattern, (bytes_, draw((rows,)).float(), x, draw((rows,)))


def _dots(backend: Backend, pattern: Pattern, operands: tuple[Tensor, ...]) -> Tensor:
    bitmap = backend.bitmap(pattern.crow_indices, pattern.col_indices, pattern.shape[1])
    with poisoned_memory():
        return backend.int8_dots(bitmap, *operands)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_whole_activations_give_the_same_bits_as_the_definition(
    backend: Backend, dtype: torch.dtype, threads: int
) -> None:
    for problem in (*WIDTHS, *SMALL):
        pattern, operands = _operands(problem, dtype, whole=True)
        result = _dots(backend, pattern, operands)
        assert result.dtype is dtype
        assert torch.equal(result, _dots(REFERENCE, pattern, operands)), problem.name
        values, scales, x, bias = operands
        layer = scales.double().unsqueeze(1) * pattern.to_dense(values.double())
        assert torch.equal(result, nn.functional.linear(x.double(), layer, bias.double()).to(dtype)), problem.name


@pytest.mark.parametrize("feature_major", [False, True])
def test_rounded_activations_are_those_of_the_definition(backend: Backend, feature_major: bool) -> None:
    for problem in (*WIDTHS, *SMALL):
        pattern, (values, scales, x, bias) = _operands(problem, torch.float32, whole=False)
        x = x.t().contiguous().t() if feature_major else x
        result = _dots(backend, pattern, (values, scales, x, bias)).double()
        levels, sizes = quantise_tokens(x)
        # Exact but for the float32 result: scale * size, times the sum, which is rounded to float32, plus the bias.
        weight = scales.double().unsqueeze(1) * pattern.to_dense(values.double())
        product = nn.functional.linear(levels.double() * sizes.double().unsqueeze(1), weight)
        bound = gamma(torch.tensor(3), torch.float32) * (product.abs() + bias.double().abs())
        assert bool(((result - product - bias.double()).abs() <= bound).all()), problem.name


def test_rounding_moves_an_activation_by_at_most_half_its_tokens_level() -> None:
    x = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-30, 30, 40).unsqueeze(1)
    levels, sizes = quantise_tokens(x)
    error = (x.double() - levels.double() * sizes.double().unsqueeze(1)).abs()
    # The factor 127 / largest, the product with it and the size are rounded: three times 127 units of a level.
    level = sizes.double().unsqueeze(1) * (0.5 + 127 * gamma(torch.tensor(3), torch.float32))
    assert bool((error <= level).all()) and levels.abs().max() == 127


def test_a_token_that_is_not_finite_is_nan_and_no_other_one(backend: Backend) -> None:
    pattern, (values, scales, x, bias) = _operands(PROBLEMS[-2], torch.float32, whole=False)
    x[3, 5], x[7, 0], x[20, 299] = torch.inf, torch.nan, -torch.inf
    x[9] = 0
    x[10] *= 1e-40
    result = _dots(backend, pattern, (values, scales, x, bias))
    assert result.isnan().all(1).nonzero().flatten().tolist() == [3, 7, 20]
    assert not result[[i for i in range(len(x)) if i not in (3, 7, 20)]].isnan().any()
    assert torch.equal(result[9], bias) and torch.equal(result[10], bias)


@pytest.mark.parametrize("method", METHODS["forward"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_method_is_within_the_bound(backend: Backend, method: str, dtype: torch.dtype) -> None:
    for problem in (*WIDTHS[::5], *SMALL):
        pattern, (values, scales, x, bias) = _operands(problem, dtype, whole=False)
        with forced_methods(forward=method):
            y = int8_linear(x, values, scales, bias, pattern.crow_indices, pattern.col_indices)
        weight = scales.double().unsqueeze(1) * pattern.to_dense(values.double())
        exact = nn.functional.linear(x.double(), weight, bias.double())
        size = nn.functional.linear(x.double().abs(), weight.abs(), bias.double().abs())
        summed_in = torch.float32 if dtype is torch.bfloat16 else dtype
        bound = gamma(pattern.row_counts + 2, summed_in) * size
        if dtype is torch.bfloat16:  # at most the sum, its product with the scale and the result are rounded to it
            bound = bound + gamma(torch.tensor(2), dtype) * (size + bound)
        assert bool(((y.double() - exact).abs() <= bound).all()), problem.name


def test_an_infinite_input_reaches_only_the_rows_that_read_it(backend: Backend) -> None:
    pattern = patterns.random((30, 90), 800, torch.Generator().manual_seed(0))
    values = torch.ones(800, dtype=torch.int8)
    x = torch.ones(70, 90)  # more tokens than are copied at a time
    x[[1, 8, 69], 70] = torch.inf
    reached = x.isinf().any(1, keepdim=True) & pattern.to_mask()[:, 70]
    for method in ("bitmap", "bucketed"):
        with forced_methods(forward=method):
            y = int8_linear(x, values, torch.ones(30), None, pattern.crow_indices, pattern.col_indices)
        assert torch.equal(y.isinf(), reached)
        assert torch.equal(y, pattern.row_counts.expand(70, 30).float().where(~reached, torch.inf))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"values": torch.zeros(24)}, "one int8 value"),
        ({"values": torch.zeros(23, dtype=torch.int8)}, "one int8 value"),
        ({"scales": torch.ones(5)}, "float32 scales"),
        ({"scales": torch.ones(6).double()}, "float32 scales"),
        ({"bias": torch.ones(6).double()}, "expected bias"),
        ({"bias": torch.ones(5)}, "expected bias"),
        ({"x": torch.ones(5, 8).half()}, "no kernels for"),
        ({"x": torch.ones(5, 8, device="meta")}, "on one device|no kernels for"),
        ({"activations": "int4"}, "'float' or 'int8'"),
        ({"prefer": "beauty"}, "'speed' or 'memory'"),
    ],
)
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_misfitting_operands_are_refused(change: dict, message: str, activations: str) -> None:
    pattern = patterns.random((6, 8), 24, torch.Generator().manual_seed(0))
    fitting = {
        "x": torch.ones(5, 8),
        "values": torch.ones(24, dtype=torch.int8),
        "scales": torch.ones(6),
        "bias": None,
        "crow_indices": pattern.crow_indices,
        "col_indices": pattern.col_indices,
        "activations": activations,
    }
    int8_linear(**fitting)
    if "prefer" in change and activations == "int8":
        return  # which has one way to be computed
    with pytest.raises(KernelError, match=message):
        int8_linear(**(fitting | change))


def test_more_inputs_than_int32_sums_hold_are_refused() -> None:
    layer = Int8SparseLinear(2**17 + 1, 1, activations="int8")
    with pytest.raises(KernelError, match="at most 131072 inputs"), kernels.forced(f"cpu:{cpu.best_isa()}"):
        layer(torch.ones(1, 2**17 + 1))


def test_the_largest_sums_do_not_leave_int32(backend: Backend) -> None:
    width = 2**17
    pattern = patterns.full((1, width))
    values = torch.full((width,), -128, dtype=torch.int8)
    y = _dots(backend, pattern, (values, torch.ones(1), torch.full((2, width), 127.0), None))
    assert y.flatten().tolist() == [-128 * 127 * width] * 2


def test_opcheck() -> None:
    pattern = patterns.random((6, 8), 24, torch.Generator().manual_seed(0))
    values, indices = torch.ones(24, dtype=torch.int8), (pattern.crow_indices, pattern.col_indices)
    for activations in ("float", "int8"):
        for bias in (None, torch.ones(6)):
            operands = (torch.randn(2, 3, 8), values, torch.ones(6), bias, *indices, "speed", activations)
            opcheck(torch.ops.offpath.int8_linear.default, operands)


def test_layers_are_compiled_without_graph_breaks(one_thread: None) -> None:
    layers = [_layer(activations=activations) for activations in ("float", "int8")]
    compiled = torch.compile(lambda x: [layer(x) * 2 for layer in layers], fullgraph=True)
    for batch in (7, 3):
        x = torch.randn(batch, 70)
        for got, layer in zip(compiled(x), layers, strict=True):
            assert torch.equal(got, layer(x) * 2)


def test_gradients_are_refused() -> None:
    layer, x = _layer(), torch.randn(3, 70, requires_grad=True)
    with pytest.raises(RuntimeError, match="train the SparseLinear and quantise it afterwards"):
        layer(x)
    with pytest.raises(RuntimeError, match="inference only"):
        torch.compile(layer, fullgraph=True, backend="eager")(x)
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.detach()))
    assert not list(layer.parameters())


def test_a_layer_is_as_close_as_its_scales_say() -> None:
    sparse = SparseLinear(70, 33, sparsity=0.7)
    layer = Int8SparseLinear.from_sparse(sparse)
    x = torch.randn(9, 70)
    dense = layer.to_sparse(torch.float64).to_dense().weight
    error = (sparse.double().to_dense().weight - dense).abs()
    assert bool((error <= layer.scales.double().unsqueeze(1) / 2).all())
    size = nn.functional.linear(x.double().abs(), dense.abs(), layer.bias.double().abs())
    exact = nn.functional.linear(x.double(), dense, layer.bias.double())
    bound = gamma(layer.pattern.row_counts + 2, torch.float32) * size
    assert bool(((layer(x).double() - exact).abs() <= bound).all())


def test_a_way_back_is_trainable_and_quantises_to_the_same_bytes() -> None:
    layer = _layer()
    state = torch.get_rng_state()
    sparse = layer.to_sparse()
    assert torch.equal(torch.get_rng_state(), state)  # converting draws nothing
    assert all(p.requires_grad for p in sparse.parameters()) and len(list(sparse.parameters())) == 2
    again = Int8SparseLinear.from_sparse(sparse)
    assert torch.equal(again.values, layer.values)
    sparse(torch.randn(2, 70)).sum().backward()
    sparse.values.data.zero_()
    assert bool(layer.values.any())


def test_rows_without_connections_and_of_zeros_are_zero(backend: Backend) -> None:
    mask = torch.zeros(6, 9, dtype=torch.bool)
    mask[1:3] = True
    sparse = SparseLinear(9, 6, pattern=patterns.from_mask(mask))
    sparse.values.data[9:] = 0
    layer = Int8SparseLinear.from_sparse(sparse)
    y = layer(torch.randn(2, 9))
    expected = layer.bias.expand(2, 6).clone()
    expected[:, 1] = y[:, 1]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("leading", [(), (1,), (2, 3), (2, 0, 3), (0,)])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_leading_dimensions(leading: tuple[int, ...], activations: str) -> None:
    layer = _layer(activations=activations)
    x = torch.randn(*leading, 70)
    y = layer(x)
    assert y.shape == (*leading, 33) and y.is_contiguous()
    assert torch.equal(y.reshape(-1, 33), layer(x.reshape(x[..., 0].numel(), 70)))


def test_a_models_dtype_is_that_of_its_activations() -> None:
    layer = _layer()
    x = torch.randn(5, 70)
    expected = layer(x.bfloat16())
    assert expected.dtype is torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), expected)
    scales = layer.scales.clone()
    layer.bfloat16()
    assert layer.values.dtype is torch.int8 and torch.equal(layer.scales, scales) and layer.bias.dtype is torch.bfloat16
    assert torch.equal(layer(x.bfloat16()), expected)
    assert layer.double()(x.double()).dtype is torch.float64


def test_a_checkpoint_brings_its_topology() -> None:
    layer, other = _layer(), Int8SparseLinear(70, 33)
    assert other.nnz == 0
    other.load_state_dict(layer.state_dict())
    x = torch.randn(4, 70)
    assert torch.equal(other(x), layer(x)) and other.nnz == layer.nnz
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    with torch.device("meta"):
        empty = Int8SparseLinear(70, 33)
    empty.load_state_dict(torch.load(file), assign=True)
    assert torch.equal(empty(x), layer(x))


def test_copies_and_pickles_compute_the_same() -> None:
    layer, x = _layer(activations="int8").eval(), torch.randn(4, 70)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x)) and not twin.training
        twin.values.zero_()
    assert bool(layer.values.any())


def test_a_checkpoint_that_does_not_fit_leaves_the_layer_as_it_was() -> None:
    layer, sparse = _layer(), SparseLinear(70, 33, sparsity=0.7)
    before, sparse_before = copy.deepcopy(layer.state_dict()), copy.deepcopy(sparse.state_dict())
    other = _layer(seed=1).state_dict()
    floats = {**other, "values": other["values"].float()}
    for bad, message in (
        (sparse.state_dict(), "scales is missing"),
        (floats, "from_sparse and to_sparse"),
        ({**other, "scales": torch.ones(3)}, "expected scales of shape"),
        ({**other, "bias": torch.ones(3)}, "expected a bias of shape"),
        ({**other, "values": other["values"][:-1]}, "one value a column"),
    ):
        with pytest.raises(RuntimeError, match=message):
            layer.load_state_dict(bad)
    with pytest.raises(RuntimeError, match="from_sparse and to_sparse"):
        sparse.load_state_dict(other)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert all(torch.equal(tensor, sparse_before[name]) for name, tensor in sparse.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales_whose_product_no_float_holds_are_no_zero(backend: Backend, dtype: torch.dtype) -> None:
    columns = 2**14
    pattern = patterns.full((2, columns))
    values = torch.full((2 * columns,), 127, dtype=torch.int8)
    scales, x = torch.full((2,), 1e-24), torch.full((1, columns), 8e-17, dtype=dtype)
    got = _dots(backend, pattern, (values, scales, x, torch.zeros(2, dtype=dtype)))
    exact = float(scales[0]) * 127 * columns * float(x[0, 0])
    # Two divisions by 127, a factor and the result are rounded, all of them normal numbers of float32 or more.
    assert torch.allclose(got.double(), torch.full((1, 2), exact, dtype=torch.float64), rtol=2**-22, atol=0)
