"""The backend of CUDA tensors as far as a machine without a GPU can tell: what is missing, chosen, and computed.

Its kernels have tests of their own; here, a whole training stack runs through Triton's interpreter in another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offpath import SparseLinear, kernels
from offpath.kernels import KernelError
from offpath.kernels.gpu import availability
from offpath.kernels.gpu.availability import Part
from offpath.kernels.operands import made_once
from offpath.kernels.reference_rows import ROWS as DEFINITION
from offpath.nn import SparseConv2d
from offpath.ops import forced_methods, topk_rows

ROOT = Path(__file__).parent
HAS_GPU = torch.cuda.is_available()
without_gpu = pytest.mark.skipif(HAS_GPU, reason="there is a GPU: make gpu checks it")


def _run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OFFPATH_BACKEND", "OFFPATH_ISA", "TRITON_"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, check=False, cwd=ROOT
    )


def test_products_of_the_cpu_load_neither_triton_nor_cuda() -> None:
    code = (
        "import sys, torch, offpath\n"
        "with offpath.ops.forced_methods(forward='row-wise'):\n"
        "    offpath.SparseLinear(8, 8)(torch.ones(2, 8))\n"
        "print('triton' in sys.modules, torch.cuda.is_initialized(), [m for m in sys.modules if 'gpu.back' in m])"
    )
    assert _run(code).stdout.strip() == "False False []"


@without_gpu
@pytest.mark.parametrize(
    ("environment", "device"), [({}, "cuda"), ({"OFFPATH_BACKEND": "gpu"}, "cpu"), ({"OFFPATH_BACKEND": "gpu"}, "cuda")]
)
def test_a_gpu_that_is_not_there_is_refused_by_name(environment: dict[str, str], device: str) -> None:
    finished = _run(f"import torch, offpath; offpath.kernels.select({device!r}, torch.float32)", **environment)
    assert "KernelError: expected a GPU that kernels can run on; " in finished.stderr, finished.stderr
    with pytest.raises(KernelError, match="expected a GPU that kernels can run on"), kernels.forced("gpu"):
        pass


@pytest.mark.parametrize("missing", ["torch_part", "driver_part", "device_part", "triton_part"])
def test_what_is_missing_is_what_the_error_names(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("torch_part", "driver_part", "device_part", "triton_part")
    found = {name: lambda name=name: Part(name, name != missing, f"detail of {name}") for name in names}
    monkeypatch.setattr(availability, "_DEVICE", tuple(found[name] for name in names[:3]))
    assert availability.problem(found["triton_part"]) == f"{missing}: detail of {missing}"
    found[missing] = lambda: Part(missing, True, "")
    monkeypatch.setattr(availability, "_DEVICE", tuple(found[name] for name in names[:3]))
    assert availability.problem(found["triton_part"]) is None


def test_an_old_driver_and_an_old_triton_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    class Driver:
        @staticmethod
        def cuDriverGetVersion(found: object) -> int:
            found._obj.value = 12040
            return 0

    monkeypatch.setattr(availability.ctypes, "CDLL", lambda name: Driver)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    part = availability.driver_part()
    assert not part.usable and "CUDA 12.4" in part.detail and "needs CUDA 13.0" in part.detail
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    assert availability.driver_part() == Part("NVIDIA driver", True, "for CUDA 12.4")
    monkeypatch.setattr(availability, "_version", lambda package: "3.2.0")
    assert not availability.triton_part().usable and "3.6 or newer, got 3.2.0" in availability.triton_part().detail


def test_info_lists_every_part() -> None:
    finished = _run("from offpath_cli import main; import sys; sys.argv[1:] = ['info']; main()", COLUMNS="400")
    for name in ("(Triton)", "(NVRTC)", "CUDA build of torch", "NVIDIA driver", "device"):
        assert name in finished.stdout


def test_a_forced_method_that_a_backend_lacks_is_refused() -> None:
    lacking = replace(kernels.backends()["reference"], name="some", methods=frozenset({"row-wise", "dense"}))
    layer = SparseLinear(8, 8)
    with kernels.forced(lacking), forced_methods(forward="bucketed"):
        with pytest.raises(KernelError, match=r"a method that backend 'some' has \(row-wise, dense\), got forward='bu"):
            layer(torch.ones(2, 8))
        assert {option.method for option in _options(lacking)} == {"row-wise", "dense"}


def _options(backend: kernels.Backend):
    with kernels.forced(backend), forced_methods(forward="dense"):
        return SparseLinear(8, 8).explain(3).options


@pytest.mark.long
def test_the_whole_stack_runs_through_the_interpreter() -> None:
    """Layers, both gradients, topology updates, an autoencoder, checkpoints: on the kernels that a GPU runs."""
    finished = _run(
        "import gpu_stack, watched_memory; watched_memory.watch(); gpu_stack.main()",
        TRITON_INTERPRET="1",
        OFFPATH_BACKEND="gpu",
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.splitlines()[-1] == "all on gpu:interpreted"


class _Costs:
    """Seconds as a test wants them."""

    def __init__(self, **seconds: float) -> None:
        self.seconds = seconds

    def layer(self, product, method, rows, columns, nnz, batch, dtype) -> float:
        return self.seconds[method.replace("-", "_")] * batch

    def rows(self, product, nnz, rows, columns, width, dtype) -> tuple[float, float]:
        return self.seconds["sparse"], self.seconds["dense"]


def _with(**seconds: float) -> kernels.Backend:
    methods = frozenset({"row-wise", "dense"})
    return replace(kernels.backends()["reference"], name=str(seconds), methods=methods, costs=_Costs(**seconds))


def test_the_costs_of_a_device_choose_and_near_ties_go_to_the_dense_product() -> None:
    for row_wise, expected in ((0.5, "row-wise"), (0.9, "dense"), (2.0, "dense")):
        with kernels.forced(_with(row_wise=row_wise, dense=1.0)):
            layer = SparseLinear(8, 8)
            assert set(layer.explain(4).chosen.values()) == {expected}
            assert {(o.method, o.seconds) for o in layer.explain(4).options} == {
                ("row-wise", 4 * row_wise),
                ("dense", 4),
            }
            layer(torch.ones(3, 8, requires_grad=True)).sum().backward()
    with kernels.forced(_with(row_wise=2.0, dense=1.0)):
        assert set(SparseLinear(8, 8, prefer="memory").explain(4).chosen.values()) == {"row-wise"}


def test_the_costs_of_a_device_say_when_zeros_are_written_out() -> None:
    called = []

    def matmul(*operands):
        called.append(operands)
        return DEFINITION.matmul(*operands)

    rows = topk_rows(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    for sparse, expected in ((1.0, 1), (1.1, 1), (2.0, 0)):
        called.clear()
        with kernels.forced(replace(_with(sparse=sparse, dense=1.0), rows=replace(DEFINITION, matmul=matmul))):
            assert torch.equal(rows.matmul(torch.eye(3)), torch.tensor([[0.0, 3.0, 2.0]]))
        assert len(called) == expected


def test_a_digest_on_a_device_is_read_once_after_each_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading it waits for the device, and a wrong one must be refused in every call."""

    class OnDevice(torch.Tensor):
        is_cpu = False
        reads = 0

        def item(self) -> int:
            OnDevice.reads += 1
            return self.as_subclass(torch.Tensor).item()

    layer, x = SparseLinear(8, 8), torch.ones(2, 8)
    layer.topology_digest = layer.topology_digest.as_subclass(OnDevice)
    with kernels.forced("reference"):
        layer(x), layer(x)
        assert OnDevice.reads == 1
        with torch.no_grad():
            layer.topology_digest.add_(0)
        layer(x), layer(x)
        assert OnDevice.reads == 2
        with torch.no_grad():
            layer.topology_digest.add_(2**60)
        for _ in range(2):
            with pytest.raises(RuntimeError, match="the topologies differ"):
                layer(x)
        with torch.no_grad():
            layer.topology_digest.sub_(2**60)
        layer(x)


def test_what_is_kept_of_connections_is_not_made_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be there after a replay of that graph, and be read before."""

    class OnDevice(torch.Tensor):
        is_cuda = True

    waits = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: SimpleNamespace(synchronize=lambda: waits.append(1)))
    layer, x = SparseLinear(8, 8), torch.ones(20, 8, requires_grad=True)
    for method in ("dense", "row-wise"):
        prepared = layer._connections._prepared
        prepared._weight.matrix.crow_indices = prepared._weight.matrix.crow_indices.as_subclass(OnDevice)
        with kernels.forced("reference"), forced_methods(forward="row-wise", dx=method, dvalues=method):
            y = layer(x)  # makes nothing
            with monkeypatch.context() as patch, pytest.raises(KernelError, match="Run it once before"):
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                y.sum().backward(retain_graph=True)
            y.sum().backward()
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
                layer(x).sum().backward()
        assert waits, "another stream may ask next"
        waits.clear()
        layer = SparseLinear(8, 8)


def test_a_convolution_makes_its_bits_once_whatever_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs of many sizes hold its address, and a graph that is captured cannot make it."""
    made = []
    reference = kernels.backends()["reference"]
    counted = replace(reference, bitmap=lambda *indices: made.append(0) or reference.bitmap(*indices))
    layer = SparseConv2d(2, 4, 3)
    with kernels.forced(counted), forced_methods(forward="dense", dx="dense", dvalues="dense"):
        for size in range(3, 15):
            layer(torch.ones(1, 2, size, size, requires_grad=True)).sum().backward()
    assert len(made) == 1


def test_what_is_kept_is_made_outside_of_the_memory_that_a_graph_gives_its_thread(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    indices = SimpleNamespace(is_cuda=True, device="cuda")
    stream = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    streams = []
    monkeypatch.setattr(torch.cuda, "stream", lambda used: streams.append(used) or nullcontext())
    with torch.device("meta"):  # as `torch.compile` has the GPU by default meanwhile
        thread, made = made_once(lambda: (threading.get_ident(), torch.zeros(1)), indices)
    assert thread != threading.get_ident() and streams == [stream] and made.device.type == "cpu"

    def fail() -> None:
        raise torch.OutOfMemoryError("none left")

    with pytest.raises(torch.OutOfMemoryError, match="none left"):
        made_once(fail, indices)


def test_a_device_before_ampere_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, major, minor, total_memory, multi_processor_count = "Old GPU", 7, 5, 2**34, 40

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    part = availability.device_part()
    assert not part.usable and "Old GPU has compute capability 7.5; the kernels need 8.0" in part.detail
    Properties.major, Properties.minor = 9, 0
    assert availability.device_part() == Part(
        "device", True, "Old GPU (compute capability 9.0), 16 GiB, 40 multiprocessors"
    )
