"""GPU kernels as they are compiled, run on the CPU: the tests of Triton's interpreter, and those of the CUDA sources.

Without their mutants, most of whose time would go into compiling them: run without `-k`, they are rejected here, too.
"""

from __future__ import annotations

import pytest
import torch

import compiled_on_cpu
import ptx
from children import run_tests
from offpath.kernels.gpu import launch, sparse_weight
from ptx_memory import Faults

FILES = {
    "products": ["triton_in_python.py"],
    "gradients, selections": [f"{name}_in_python.py" for name in ("gradients", "selection", "memory")],
    "CUDA": [f"test_gpu_{name}.py" for name in ("cuda", "tiles", "buckets")],
}


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("files", FILES.values(), ids=FILES)
def test_kernels(files: list[str]) -> None:
    run_tests(files, "-p", "compiled_on_cpu", "-k", "not mutant and not mistakes")


def test_a_barrier_left_out_of_a_compiled_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", True)
    monkeypatch.setattr(launch, "_launch_by_triton", compiled_on_cpu.run_compiled)
    x, y = torch.randn(64, 64), torch.zeros(64, 64)
    sparse_weight.transpose(x, y)
    assert torch.equal(y, x.t())
    parse = ptx.parse
    monkeypatch.setattr(compiled_on_cpu, "_programs", {})
    monkeypatch.setattr(ptx, "parse", lambda text: parse(text.replace("bar.sync", "// bar.sync")))
    with pytest.raises(Faults, match="without a barrier between them"):
        sparse_weight.transpose(x, y)
