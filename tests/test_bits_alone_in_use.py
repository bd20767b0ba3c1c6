"""Layers that have let go of their column indices, under compilers, transforms, modes and threads."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bits_alone_cases import gradients_of, half_sparse, is_without_columns, let_go, some_input
from offpath import SparseLinear
from offpath.ops import forced_methods


@pytest.fixture(autouse=True)
def no_compiler_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process other tests may have compiled; after that, layers keep their columns."""
    monkeypatch.setattr("offpath.ops.prepared._Compilers.have_come", False)


@pytest.mark.parametrize("how", ["compile", "export", "strict export"])
def test_compilers_and_exporters_get_the_columns_of_all(how: str) -> None:
    x, layer, other = some_input(), half_sparse().eval(), half_sparse().eval()
    expected = let_go(layer)
    let_go(other)
    with torch.no_grad(), forced_methods(forward="bitmap"):
        if how == "compile":
            made = torch.compile(layer, backend="eager", fullgraph=True)
        else:
            made = torch.export.export(layer, (x,), strict=how.startswith("strict")).module()
        assert torch.equal(made(x), expected)
        assert torch.equal(other(x), expected)
    assert not is_without_columns(layer)
    assert not is_without_columns(other)


def test_fake_tensors_and_transforms_get_the_indices() -> None:
    x, twin = some_input(), half_sparse()
    for run in (
        lambda layer: torch.func.vmap(layer)(x),
        lambda layer: torch.func.jvp(layer, (x,), (x,))[1],
        lambda layer: torch.func.grad(lambda inputs: layer(inputs).sum())(x),
        lambda layer: torch.func.jacrev(layer)(x),
    ):
        layer = half_sparse()
        let_go(layer)
        assert torch.equal(run(layer), run(twin))
    layer = half_sparse()
    let_go(layer)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        assert layer(mode.from_tensor(x)).shape == (5, 70)
    assert torch.equal(_infer(layer), _infer(twin))


@pytest.mark.parametrize("then", ["row-wise", None])
def test_inference_mode_does_not_spoil_training(then: str | None) -> None:
    layer, twin = half_sparse(), half_sparse()
    with torch.inference_mode(), forced_methods(forward="bitmap"):
        layer(some_input())
    assert is_without_columns(layer)
    with torch.inference_mode(), forced_methods(**({} if then is None else {"forward": then})):
        layer(some_input())
        assert layer.connections.col_indices.numel() == layer.nnz
    for ours, theirs in zip(gradients_of(layer), gradients_of(twin), strict=True):
        assert torch.equal(ours, theirs)


def test_many_threads_find_the_same_connections() -> None:
    x, twin = some_input(), half_sparse()
    for _ in range(20):
        layer = half_sparse()

        @torch.no_grad()
        def use(number: int, layer: SparseLinear = layer) -> Tensor:
            if number % 4 == 3:
                assert torch.equal(layer.connections.col_indices, twin.col_indices)
            assert layer.pattern.equals(twin.pattern)
            return layer(x)

        with forced_methods(forward="bitmap"), ThreadPoolExecutor(max_workers=8) as pool:
            answers = list(pool.map(use, range(16)))
        assert all(torch.equal(answer, answers[0]) for answer in answers)


def test_threads_that_train_at_once_cannot_go_back_over_another_topology() -> None:
    other = SparseLinear(130, 70, sparsity=0.5)
    for _ in range(30):
        layer, barrier = half_sparse(), Barrier(2)
        let_go(layer)

        def forward(layer: SparseLinear = layer, barrier: Barrier = barrier) -> Tensor:
            barrier.wait()
            return layer(some_input())

        with ThreadPoolExecutor(max_workers=2) as pool:
            graphs = [future.result() for future in [pool.submit(forward) for _ in range(2)]]
        layer.load_state_dict(other.state_dict())
        for y in graphs:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                y.sum().backward()


def _frames(compiled: Callable[[], object], rounds: int) -> int:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for _ in range(rounds):
        compiled()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@torch.no_grad()
def _infer(layer: SparseLinear) -> Tensor:
    with forced_methods(forward="bitmap"):
        return layer(some_input())


def test_compiled_code_serves_every_topology_and_every_layer_alike() -> None:
    """Guards on what connections keep would compile anew for each, until torch gives up."""
    x, layer = some_input(), half_sparse()
    run = torch.compile(lambda layer, x: layer(x), backend="eager", fullgraph=True)

    def other_topology() -> None:
        layer.load_state_dict(SparseLinear(130, 70, sparsity=0.5).state_dict())
        _infer(layer)
        run(layer, x).sum().backward()

    def other_layer() -> None:
        new = half_sparse()
        _infer(new)
        stale = run(new, x)
        new.load_state_dict(SparseLinear(130, 70, sparsity=0.5).state_dict())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            stale.sum().backward()

    assert _frames(other_topology, 10) == 1
    assert _frames(other_layer, 10) == 1


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_compiled_code_saves_and_reads_are_numbers(backend: str) -> None:
    """It serves layers that were not there when it was compiled, and topologies that came later."""
    x, layer, gone = some_input(), half_sparse(), half_sparse()
    let_go(gone)
    torch._dynamo.reset()
    run = torch.compile(lambda layer, x: layer(x), backend=backend)
    read = torch.compile(lambda layer: layer.col_indices + layer.connections.col_indices, backend=backend)

    def check(served: SparseLinear) -> None:
        with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved.clone(), lambda saved: saved):
            run(served, x).sum().backward()
        assert torch.equal(read(served), 2 * served.pattern.col_indices)

    check(layer)
    check(gone)
    layer.load_state_dict(SparseLinear(130, 70, sparsity=0.5).state_dict())
    later = half_sparse()
    for served in (layer, later):
        _infer(served)
        check(served)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*jit.*:DeprecationWarning")
def test_tracers_keep_the_columns_of_what_they_trace() -> None:
    layer, other = half_sparse().eval(), half_sparse().eval()
    expected = let_go(layer)
    let_go(other)
    with torch.no_grad(), forced_methods(forward="bitmap"):
        assert torch.equal(torch.jit.trace(layer, (some_input(),))(some_input()), expected)
    assert not is_without_columns(layer)
    assert is_without_columns(other)


class _CallsTheOp(nn.Module):
    """What `layer.connections` are there for."""

    def __init__(self, layer: SparseLinear) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        own = self.layer.connections
        y = torch.ops.offpath.sparse_linear(x, self.layer.values, self.layer.bias, own.crow_indices, own.col_indices)
        return y + self.layer.col_indices.sum()


@pytest.mark.parametrize(
    "run",
    [
        lambda model, x: model(x),
        lambda model, x: torch.compile(model, backend="eager", fullgraph=True)(x),
        lambda model, x: torch.export.export(model, (x,), strict=True).module()(x),
        lambda model, x: torch.export.export(model, (x,), strict=False).module()(x),
    ],
    ids=["eager", "compiled", "exported strictly", "exported"],
)
def test_those_who_call_the_ops_themselves_get_the_indices(run: Callable[[nn.Module, Tensor], Tensor]) -> None:
    x, layer, expected = some_input(), half_sparse(), _CallsTheOp(half_sparse())(some_input()).detach()
    let_go(layer)
    with torch.no_grad():
        assert torch.equal(run(_CallsTheOp(layer), x), expected)


def test_a_layer_is_pickled_when_the_interpreter_ends(tmp_path) -> None:
    script = (
        "import atexit, sys, torch, offpath\n"
        "layer, x = offpath.SparseLinear(130, 70, sparsity=0.5), torch.randn(5, 130)\n"
        "with torch.no_grad(), offpath.ops.forced_methods(forward='bitmap'):\n"
        "    layer(x)\n"
        "assert layer._connections._are_gone\n"
        "atexit.register(lambda: torch.save(layer, sys.argv[1]))\n"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path / "layer.pt"], check=True, timeout=120)
    assert torch.load(tmp_path / "layer.pt", weights_only=False).nnz == 4550


def test_the_default_device_and_fake_modes_do_not_matter() -> None:
    layer, twin, x = half_sparse(), half_sparse(), some_input()
    let_go(layer)
    with torch.device("meta"):
        state, copied = layer.state_dict(), copy.deepcopy(layer)
        with torch.no_grad(), forced_methods(forward="bucketed"):
            layer(x)
    assert torch.equal(state["col_indices"], twin.col_indices)
    assert copied.pattern.equals(twin.pattern)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert layer.state_dict()["col_indices"].shape == (layer.nnz,)
    assert is_without_columns(layer)
