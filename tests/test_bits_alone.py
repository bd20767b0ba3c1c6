"""Layers of which only inference is asked keep one bit per position, and give everything else as if they kept more."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from offpath import SparseLinear, kernels, load, pattern as patterns, save
from offpath.cost import memory_bytes, model_bytes
from offpath.kernels import cpu
from offpath.kernels.plans import columns_of_bitmap, make_bitmap
from offpath.nn import Int8SparseLinear, rewire
from offpath.ops import forced_methods
from problems import LARGE_PROBLEMS, PROBLEMS, Problem

METHODS = ("bitmap", "filled", "dense", "bucketed", "row-wise")


def _layer(dtype: torch.dtype = torch.float32) -> SparseLinear:
    return SparseLinear(130, 70, sparsity=0.5, dtype=dtype, generator=torch.Generator().manual_seed(3))


def _input(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(5, 130, generator=torch.Generator().manual_seed(4)).to(dtype)


@torch.no_grad()
def _let_go(layer: nn.Module, x: Tensor | None = None, method: str = "bitmap") -> Tensor:
    """What the layer answers, which leaves it without indices."""
    with forced_methods(forward=method):
        y = layer(_input() if x is None else x)
    assert _is_without(layer), "it has kept its indices"
    return y


def _is_without(layer: nn.Module) -> bool:
    connections = layer._connections
    return connections._col_indices is None and connections._prepared.matrix._col_indices is None


def _problem_of(problem: Problem, columns_of: Callable[..., Tensor]) -> str | None:
    """What is wrong with the columns that `columns_of` finds in a bitmap of the problem's pattern."""
    pattern = problem.pattern
    found = columns_of(make_bitmap(pattern.crow_indices, pattern.col_indices, pattern.shape[1]))
    if found.dtype is not torch.int32 or found.shape != pattern.col_indices.shape:
        return f"{found.dtype} {tuple(found.shape)}"
    return None if torch.equal(found, pattern.col_indices) else "other columns"


@pytest.mark.parametrize("problem", [*PROBLEMS, *LARGE_PROBLEMS], ids=lambda problem: problem.name)
def test_a_bitmap_has_all_that_the_columns_say(problem: Problem, threads: int) -> None:
    assert _problem_of(problem, columns_of_bitmap) is None


@pytest.mark.parametrize("wrong", [lambda c: c + 1, lambda c: c.flip(0), lambda c: c[1:], lambda c: c.long()])
def test_wrong_columns_are_noticed(wrong: Callable[[Tensor], Tensor]) -> None:
    assert _problem_of(PROBLEMS[7], lambda bitmap: wrong(columns_of_bitmap(bitmap))) is not None


@pytest.mark.parametrize("method", ["bitmap", "filled", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inference_takes_less_memory_than_the_dense_layer_at_half_the_weights(dtype: torch.dtype, method: str) -> None:
    layer = SparseLinear(512, 512, sparsity=0.5, dtype=dtype)
    with_indices, on_disk = memory_bytes(layer), model_bytes(layer)
    _let_go(layer, torch.randn(3, 512).to(dtype), method)
    indices = 4 * layer.nnz
    assert memory_bytes(layer) < min(0.7 * memory_bytes(layer.to_dense()), with_indices - 0.8 * indices)
    assert model_bytes(layer) == on_disk


@pytest.mark.parametrize("first", ["bitmap", "filled", "dense"])
@pytest.mark.parametrize("then", METHODS)
def test_every_method_gives_the_same_bits_as_before(first: str, then: str) -> None:
    layer, x = _layer(), _input()
    with torch.no_grad(), forced_methods(forward=then):
        expected = _layer()(x)
    _let_go(layer, x, first)
    with torch.no_grad(), forced_methods(forward=then):
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert _is_without(layer) == (then != "row-wise")
    _with_gradients(layer)


def test_a_plan_is_made_of_the_bits_and_the_columns_are_not_kept() -> None:
    layer = _layer()
    _let_go(layer)
    before = memory_bytes(layer)
    with torch.no_grad(), forced_methods(forward="bucketed"):
        layer(_input())
    assert _is_without(layer)
    assert memory_bytes(layer) > before, "there is no plan"


def test_columns_that_were_needed_again_stay() -> None:
    """Or calls of two numbers of tokens in turns would find and forget them each time."""
    layer = _layer()
    _let_go(layer)
    with torch.no_grad():
        for method in ("row-wise", "bitmap"):
            with forced_methods(forward=method):
                layer(_input())
    assert layer._connections._prepared.matrix._col_indices is not None


def _with_gradients(layer: SparseLinear) -> list[Tensor]:
    x = _input(layer.values.dtype).requires_grad_()
    layer(x).square().sum().backward()
    gradients = [x.grad, layer.values.grad, layer.bias.grad]
    layer.zero_grad()
    return gradients


@pytest.mark.parametrize("methods", [("bucketed", "tiled"), ("row-wise", "row-wise"), ("bitmap", "bitmap")])
def test_training_afterwards_is_the_same_and_keeps_the_indices(methods: tuple[str, str]) -> None:
    layer, twin = _layer(), _layer()
    _let_go(layer)
    with forced_methods(dx=methods[0], dvalues=methods[1]):
        for ours, theirs in zip(_with_gradients(layer), _with_gradients(twin), strict=True):
            assert torch.equal(ours, theirs)
    handed_out = layer._connections.col_indices
    with torch.no_grad(), forced_methods(forward="bitmap"):
        layer(_input())
    assert layer._connections.col_indices is handed_out, "a graph remembers what it has been given"


def test_a_layer_that_trains_never_lets_go() -> None:
    layer = _layer()
    _with_gradients(layer)
    with torch.no_grad(), forced_methods(forward="bitmap"):
        layer(_input())
    assert not _is_without(layer)


def test_what_is_read_of_the_topology_is_the_same_and_leaves_no_indices_behind(tmp_path) -> None:
    layer, twin = _layer(), _layer()
    expected = _let_go(layer)
    assert layer.pattern.equals(twin.pattern)
    assert torch.equal(layer.crow_indices, twin.crow_indices)
    assert torch.equal(layer.col_indices, twin.col_indices)
    state = layer.state_dict()
    assert all(torch.equal(state[name], number) for name, number in twin.state_dict().items())
    assert layer.connections.digest() == twin.connections.digest()
    assert torch.equal(layer.to_dense().weight, twin.to_dense().weight)
    save(nn.Sequential(layer), tmp_path / "layer.safetensors")
    assert load(tmp_path / "layer.safetensors")[0].pattern.equals(twin.pattern)
    layer.load_state_dict(twin.state_dict())
    assert _is_without(layer)
    copied = copy.deepcopy(layer)
    assert _is_without(layer)
    assert not _is_without(copied), "it has not been called"
    assert torch.equal(_let_go(copied), expected)
    assert copied.pattern.equals(twin.pattern)


def test_pickles_and_torch_save_have_the_topology() -> None:
    layer = _layer()
    expected = _let_go(layer)
    assert torch.equal(_let_go(pickle.loads(pickle.dumps(layer))), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(_let_go(torch.load(file, weights_only=False)), expected)


def test_connections_that_change_are_those_that_count() -> None:
    layer = _layer()
    _let_go(layer)
    other = SparseLinear(130, 70, sparsity=0.8)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(_let_go(layer), _let_go(other))
    pattern = layer.pattern
    edit = patterns.edit(pattern, drop=torch.arange(20))
    assert _is_without(layer)
    rewire(layer, edit)
    assert layer.pattern.equals(edit.pattern)
    with torch.no_grad(), forced_methods(forward="bitmap"):
        torch.testing.assert_close(layer(_input()), layer.to_dense()(_input()))


def test_a_moved_layer_has_the_topology() -> None:
    layer = _layer()
    _let_go(layer)
    assert layer.to(torch.float64).pattern.equals(_layer().pattern)
    assert _is_without(layer), "a dtype is no matter of the connections"
    assert copy.deepcopy(layer).to("meta").connections.is_meta


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.*:DeprecationWarning")
def test_compilers_exporters_and_tracers_get_the_indices() -> None:
    x = _input()
    expected = _let_go(_layer())
    compiled, traced = _layer().eval(), _layer().eval()
    for layer in (compiled, traced):
        _let_go(layer)
    with torch.no_grad(), forced_methods(forward="bitmap"):
        assert torch.equal(torch.compile(compiled, backend="eager", fullgraph=True)(x), expected)
        for strict in (False, True):
            _let_go(anew := _layer().eval())
            program = torch.export.export(anew, (x,), strict=strict)
            assert torch.equal(program.module()(x), expected)
        assert torch.equal(torch.jit.trace(traced, (x,))(x), expected)


def test_fake_tensors_and_transforms_get_the_indices() -> None:
    x, twin = _input(), _layer()
    for run in (
        lambda layer: torch.func.vmap(layer)(x),
        lambda layer: torch.func.jvp(layer, (x,), (x,))[1],
        lambda layer: torch.func.grad(lambda inputs: layer(inputs).sum())(x),
        lambda layer: torch.func.jacrev(layer)(x),
    ):
        layer = _layer()
        _let_go(layer)
        assert torch.equal(run(layer), run(twin))
    layer = _layer()
    _let_go(layer)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert layer(mode.from_tensor(x)).shape == (5, 70)
    assert torch.equal(_let_go_or_not(layer), _let_go_or_not(twin))


@torch.no_grad()
def _let_go_or_not(layer: nn.Module) -> Tensor:
    return layer(_input())


@pytest.mark.parametrize("then", ["row-wise", None])
def test_inference_mode_does_not_spoil_training(then: str | None) -> None:
    layer, twin = _layer(), _layer()
    with torch.inference_mode(), forced_methods(forward="bitmap"):
        layer(_input())
    assert _is_without(layer)
    with torch.inference_mode(), forced_methods(**({} if then is None else {"forward": then})):
        layer(_input())
        layer.connections.col_indices  # noqa: B018  # asking for them is what is tried
    for ours, theirs in zip(_with_gradients(layer), _with_gradients(twin), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_int8_layers_keep_the_bits_alone_too(activations: str) -> None:
    layer = Int8SparseLinear.from_sparse(_layer(), activations=activations)
    expected = layer(_input())
    with forced_methods(forward="bitmap"):  # with gradients on, as nobody asks for one
        y = layer(_input())
    assert _is_without(layer)
    torch.testing.assert_close(y, expected)
    assert layer.pattern.equals(_layer().pattern)


def test_many_threads_find_the_same_connections() -> None:
    x, twin = _input(), _layer()
    for _ in range(20):
        layer = _layer()

        @torch.no_grad()
        def use(number: int, layer: SparseLinear = layer) -> Tensor:
            if number % 4 == 3:
                assert torch.equal(layer.connections.col_indices, twin.col_indices)
            assert layer.pattern.equals(twin.pattern)
            return layer(x)

        with forced_methods(forward="bitmap"), ThreadPoolExecutor(max_workers=8) as pool:
            answers = list(pool.map(use, range(16)))
        assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_a_backend_whose_bitmaps_are_no_smaller_keeps_the_indices() -> None:
    layer = _layer()
    with kernels.forced("reference"), torch.no_grad():
        layer(_input())
    assert not _is_without(layer)


def test_bitmaps_are_refused_what_has_no_room_for_their_columns() -> None:
    pattern = _layer().pattern
    bitmap = make_bitmap(pattern.crow_indices, pattern.col_indices, 130)
    for wrong in (torch.empty(pattern.nnz - 1, dtype=torch.int32), torch.empty(pattern.nnz)):
        assert not cpu._native.write_columns(bitmap.native, wrong, 1)
