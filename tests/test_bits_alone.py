"""Layers of which only inference is asked keep one bit per position, and give everything else as if they kept more."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from bits_alone_cases import gradients_of, half_sparse, is_without_columns, let_go, some_input
from offpath import SparseLinear, kernels, load, pattern as patterns, save
from offpath.cost import memory_bytes, model_bytes
from offpath.kernels import cpu
from offpath.kernels.plans import columns_of_bitmap, make_bitmap
from offpath.nn import Int8SparseLinear, rewire
from offpath.ops import forced_methods
from offpath.pattern import PatternError
from problems import LARGE_PROBLEMS, PROBLEMS, Problem

METHODS = ("bitmap", "filled", "dense", "bucketed", "row-wise")


@pytest.fixture(autouse=True)
def no_compiler_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process other tests may have compiled; after that, layers keep their columns."""
    monkeypatch.setattr("offpath.ops.prepared._Compilers.have_come", False)


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
    let_go(layer, torch.randn(3, 512).to(dtype), method)
    bits = make_bitmap(layer.crow_indices, layer.col_indices, 512).bytes
    assert memory_bytes(layer) == with_indices - 4 * layer.nnz + bits
    # Half of the values, a bit beside at least 16 for each position (1/16), row pointers and slots of chunks (1/64).
    assert memory_bytes(layer) < 0.7 * memory_bytes(layer.to_dense())
    assert model_bytes(layer) == on_disk


@pytest.mark.parametrize("first", ["bitmap", "filled", "dense"])
@pytest.mark.parametrize("then", METHODS)
def test_every_method_gives_the_same_bits_as_before(first: str, then: str) -> None:
    layer, x = half_sparse(), some_input()
    with torch.no_grad(), forced_methods(forward=then):
        expected = half_sparse()(x)
    let_go(layer, x, first)
    with torch.no_grad(), forced_methods(forward=then):
        assert torch.equal(layer(x), expected)
        assert torch.equal(layer(x), expected)
    assert is_without_columns(layer) == (then != "row-wise")
    gradients_of(layer)


def test_what_is_given_away_are_copies_of_columns_that_came_back() -> None:
    """Row-wise products read them unchecked: who writes into a state_dict must not write into these."""
    layer = half_sparse()
    let_go(layer)
    with torch.no_grad(), forced_methods(forward="row-wise"):
        expected = layer(some_input())
        for copied in (layer.state_dict()["col_indices"], layer.col_indices, layer.pattern.col_indices):
            copied.fill_(2**30)
        assert torch.equal(layer(some_input()), expected)


@pytest.mark.parametrize(
    "make", [half_sparse, lambda: Int8SparseLinear.from_sparse(half_sparse())], ids=["float", "int8"]
)
def test_an_input_of_another_width_never_reaches_a_kernel(make: Callable[[], nn.Module]) -> None:
    """`in_features` is an attribute that anybody can write into."""
    for is_let_go in (False, True):
        layer = make()
        if is_let_go:
            let_go(layer)
        layer.in_features = 100
        with torch.no_grad(), forced_methods(forward="row-wise"), pytest.raises(PatternError, match="got 129"):
            layer(some_input()[:, :100])


def test_a_plan_is_made_of_the_bits_and_the_columns_are_not_kept() -> None:
    layer = half_sparse()
    let_go(layer)
    before = memory_bytes(layer)
    with torch.no_grad(), forced_methods(forward="bucketed"):
        layer(some_input())
    assert is_without_columns(layer)
    assert memory_bytes(layer) > before, "there is no plan"


def test_columns_that_were_needed_again_stay() -> None:
    """Or calls of two numbers of tokens in turns would find and forget them each time."""
    layer = half_sparse()
    let_go(layer)
    with torch.no_grad():
        for method in ("row-wise", "bitmap"):
            with forced_methods(forward=method):
                layer(some_input())
    assert layer._connections._prepared.matrix.kept_columns is not None


@pytest.mark.parametrize("methods", [("bucketed", "tiled"), ("row-wise", "row-wise"), ("bitmap", "bitmap")])
def test_training_afterwards_is_the_same_and_keeps_the_indices(methods: tuple[str, str]) -> None:
    layer, twin = half_sparse(), half_sparse()
    let_go(layer)
    with forced_methods(dx=methods[0], dvalues=methods[1]):
        for ours, theirs in zip(gradients_of(layer), gradients_of(twin), strict=True):
            assert torch.equal(ours, theirs)
    with torch.no_grad(), forced_methods(forward="bitmap"):
        layer(some_input())
    assert not is_without_columns(layer), "a graph remembers what it has been given"


def test_a_layer_that_trains_never_lets_go() -> None:
    layer = half_sparse()
    gradients_of(layer)
    with torch.no_grad(), forced_methods(forward="bitmap"):
        layer(some_input())
    assert not is_without_columns(layer)


def test_what_is_read_of_the_topology_is_the_same_and_leaves_no_indices_behind(tmp_path) -> None:
    layer, twin = half_sparse(), half_sparse()
    expected = let_go(layer)
    assert layer.pattern.equals(twin.pattern)
    assert torch.equal(layer.crow_indices, twin.crow_indices)
    assert torch.equal(layer.col_indices, twin.col_indices)
    state = layer.state_dict()
    assert all(torch.equal(state[name], number) for name, number in twin.state_dict().items())
    assert layer._connections.digest() == twin._connections.digest()
    assert torch.equal(layer.to_dense().weight, twin.to_dense().weight)
    save(nn.Sequential(layer), tmp_path / "layer.safetensors")
    assert load(tmp_path / "layer.safetensors")[0].pattern.equals(twin.pattern)
    layer.load_state_dict(twin.state_dict())
    assert is_without_columns(layer)
    copied = copy.deepcopy(layer)
    assert is_without_columns(layer)
    assert not is_without_columns(copied), "it has not been called"
    assert torch.equal(let_go(copied), expected)
    assert copied.pattern.equals(twin.pattern)


def test_pickles_and_torch_save_have_the_topology() -> None:
    layer = half_sparse()
    expected = let_go(layer)
    assert torch.equal(let_go(pickle.loads(pickle.dumps(layer))), expected)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.equal(let_go(torch.load(file, weights_only=False)), expected)


def test_connections_that_change_are_those_that_count() -> None:
    layer = half_sparse()
    let_go(layer)
    other = SparseLinear(130, 70, sparsity=0.8)
    layer.load_state_dict(other.state_dict())
    assert torch.equal(let_go(layer), let_go(other))
    pattern = layer.pattern
    edit = patterns.edit(pattern, drop=torch.arange(20))
    assert is_without_columns(layer)
    rewire(layer, edit)
    assert layer.pattern.equals(edit.pattern)
    with torch.no_grad(), forced_methods(forward="bitmap"):
        torch.testing.assert_close(layer(some_input()), layer.to_dense()(some_input()))


def test_a_moved_layer_has_the_topology() -> None:
    layer = half_sparse()
    let_go(layer)
    assert layer.to(torch.float64).pattern.equals(half_sparse().pattern)
    assert is_without_columns(layer), "a dtype is no matter of the connections"
    assert copy.deepcopy(layer).to("meta").connections.is_meta


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_int8_layers_keep_the_bits_alone_too(activations: str) -> None:
    layer = Int8SparseLinear.from_sparse(half_sparse(), activations=activations)
    expected = layer(some_input())
    with forced_methods(forward="bitmap"):  # with gradients on, as nobody asks for one
        y = layer(some_input())
    assert is_without_columns(layer)
    torch.testing.assert_close(y, expected)
    assert layer.pattern.equals(half_sparse().pattern)


def test_a_backend_whose_bitmaps_are_no_smaller_keeps_the_indices() -> None:
    layer = half_sparse()
    with kernels.forced("reference"), torch.no_grad():
        layer(some_input())
    assert not is_without_columns(layer)


def test_bitmaps_are_refused_what_has_no_room_for_their_columns() -> None:
    pattern = half_sparse().pattern
    bitmap = make_bitmap(pattern.crow_indices, pattern.col_indices, 130)
    for wrong in (torch.empty(pattern.nnz - 1, dtype=torch.int32), torch.empty(pattern.nnz)):
        assert not cpu._native.write_columns(bitmap.native, wrong, 1)
