"""What is missing on a machine is named, and what was compiled once is not compiled again."""

from __future__ import annotations

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from offpath.kernels import KernelError
from offpath.kernels.gpu import driver, nvrtc
from offpath.kernels.gpu.decode import decode, shared_bytes_of
from offpath.kernels.gpu.formats import pack
from offpath.kernels.gpu.live import live_matmul
from test_gpu_formats import csr, random_mask

CALLED = (
    "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxGetCurrent", "cuCtxPushCurrent_v2", "cuCtxPopCurrent_v2",
    "cuModuleLoadData", "cuModuleGetFunction", "cuFuncGetAttribute", "cuFuncSetAttribute", "cuDriverGetVersion",
    "cuGetErrorString",
)  # fmt: skip
OPTIONS = {"BATCH": 1, "BF16": 1, "DEPTH": 4, "WARPS": 8, "BLOCKS": 4}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path))
    return tmp_path / "cubin"


def test_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = nvrtc.cubin("live.cu", (9, 0), OPTIONS)
    assert found[:4] == b"\x7fELF"
    (kept,) = folder.iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc.NVRTC, "compile", lambda *_: pytest.fail("compiled again"))
        assert nvrtc.cubin("live.cu", (9, 0), OPTIONS) == found
    kept.write_bytes(kept.read_bytes()[:-100])
    assert nvrtc.cubin("live.cu", (9, 0), OPTIONS) == found, "half a file was believed"
    # Other options, another architecture, another version: another file.
    keys = {kept.name}
    monkeypatch.setattr(nvrtc.NVRTC, "compile", lambda *_: b"compiled")
    for capability, options in (((8, 0), OPTIONS), ((9, 0), {**OPTIONS, "DEPTH": 2})):
        assert nvrtc.cubin("live.cu", capability, options) == b"compiled"
        names = {path.name for path in folder.iterdir()}
        assert len(names) == len(keys) + 1
        keys = names
    monkeypatch.setattr(nvrtc.library(), "version", (99, 0))
    assert nvrtc.cubin("live.cu", (9, 0), OPTIONS) == b"compiled"
    assert not [name for name in keys if name.startswith(".")], "a file beside was left"


def test_a_cache_that_cannot_be_written_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path / "file" / "below"))
    monkeypatch.setattr(nvrtc.NVRTC, "compile", lambda *_: b"compiled")
    assert nvrtc.cubin("live.cu", (9, 0), OPTIONS) == b"compiled"
    assert "compiles its CUDA kernels in every process" in caplog.text


def test_architectures() -> None:
    library = nvrtc.library()
    assert [library.architecture(capability) for capability in ((8, 0), (8, 9), (9, 0), (12, 0))] == [80, 89, 90, 120]
    assert library.architecture((12, 9)) // 10 == 12, "code of a lower minor version runs as well"
    with pytest.raises(KernelError, match=r"this GPU has 3\.5\. Install another version of NVRTC"):
        library.architecture((3, 5))


def test_what_does_not_compile_brings_its_log(folder: Path) -> None:
    with pytest.raises(KernelError, match="NVRTC could not compile") as refused:
        nvrtc.cubin("live.cu", (9, 0), {name: value for name, value in OPTIONS.items() if name != "BATCH"})
    assert 'identifier "BATCH" is undefined' in str(refused.value)
    assert not folder.exists()


def test_no_nvrtc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["libnvrtc.so.0"]))
    nvrtc.library.cache_clear()
    with pytest.raises(KernelError, match=r"NVRTC.* was not found: install offpath\[gpu\].*libnvrtc\.so\.0"):
        nvrtc.library()


def libcuda(monkeypatch: pytest.MonkeyPatch, version: int | None, status: int = 0) -> None:
    def get_version(place) -> int:
        place._obj.value = version
        return 0

    def load(name: str):
        if version is None:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(cuInit=lambda _: status, cuDriverGetVersion=get_version)

    nvrtc.library()  # which loads a library as well
    monkeypatch.setattr(driver.ctypes, "CDLL", load)
    driver.driver.cache_clear()


@pytest.mark.parametrize(
    ("version", "status", "message"),
    [
        (None, 0, r"no NVIDIA driver: libcuda\.so\.1: cannot open"),
        (13000, 100, "finds no GPU that it can use"),
        (12040, 0, r"knows CUDA up to 12\.4, and NVRTC 13\.\d+ writes code for 13\.0 and later\. Update the driver"),
    ],
)
def test_drivers_that_will_not_do(monkeypatch: pytest.MonkeyPatch, version, status, message) -> None:
    libcuda(monkeypatch, version, status)
    monkeypatch.setattr(nvrtc.library(), "version", (13, 0))
    with pytest.raises(KernelError, match=message):
        driver.driver()


def test_a_new_driver_will_do(monkeypatch: pytest.MonkeyPatch) -> None:
    libcuda(monkeypatch, 13000)
    assert driver.driver().cuInit(0) == 0
    driver.driver.cache_clear()


def test_tensors_elsewhere_are_refused() -> None:
    packed = pack(*csr(random_mask(4, 8, 0.5), torch.float32), 8)
    for call in (lambda: decode(packed, torch.ones(1, 8)), lambda: live_matmul(torch.ones(1, 8), torch.ones(8, 4))):
        with pytest.raises(KernelError, match="expected tensors on an NVIDIA GPU, got cpu"):
            call()


def test_operands_that_do_not_fit() -> None:
    packed = pack(*csr(random_mask(4, 8, 0.5), torch.float32), 8)
    x, bias = torch.ones(2, 8), torch.ones(4)
    for wrong in (
        (torch.ones(9, 8),),
        (torch.ones(2, 7),),
        (torch.ones(8),),
        (x.bfloat16(),),
        (x.double(),),
        (torch.ones(8, 2).t(),),
        (x, bias[:3]),
        (x, bias.bfloat16()),
        (x, torch.ones(8)[::2]),
    ):
        with pytest.raises(KernelError, match="expected contiguous x"):
            decode(packed, *wrong)
    weight = torch.ones(8, 4)
    for wrong in (
        (torch.ones(5, 8), weight),
        (torch.ones(2, 7), weight),
        (x.bfloat16(), weight),
        (x.double(), weight.double()),
        (x, torch.ones(4, 8).t()),
        (x, weight, bias[:3]),
    ):
        with pytest.raises(KernelError, match="expected contiguous x"):
            live_matmul(*wrong)
    with pytest.raises(KernelError, match="begin at multiples of 16 bytes, got 3 columns"):
        live_matmul(x, torch.ones(8, 3))


@pytest.mark.parametrize(("kind", "name"), [("n4", "values"), ("n4", "columns"), ("n4", "gaps"), ("c16", "columns")])
def test_a_packed_weight_begins_at_whole_words(kind: str, name: str) -> None:
    packed = pack(*csr(random_mask(4, 8, 0.5), torch.float32), 8, kind)
    tensor = getattr(packed, name)
    beside = replace(packed, **{name: torch.cat([tensor[:1], tensor])[1:]})
    found = rf"aligned to 16 bytes, got {name} of {tensor.dtype} at an address with a rest of {tensor.itemsize}\. Pack"
    with pytest.raises(KernelError, match=found):
        decode(beside, torch.ones(1, 8))


def _believe_in_an_h100(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver, "_attribute", lambda index, number: {97: 232_448, 111: 1024}[number])
    monkeypatch.setattr(driver, "_index", lambda device: 0)
    monkeypatch.setattr(driver, "driver", lambda: None)
    monkeypatch.setattr(nvrtc, "cubin", lambda *_: b"a module")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda index: None)
    properties = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_a_module_gets_the_memory_that_torch_keeps_without_need(failures: int, monkeypatch: pytest.MonkeyPatch) -> None:
    statuses, emptied = iter([2] * failures), []

    def loads(*_: object) -> int:
        return next(statuses, 0)

    _believe_in_an_h100(monkeypatch)
    functions = dict.fromkeys(CALLED, lambda *_: 0) | {"cuModuleLoadData": loads}
    monkeypatch.setattr(driver, "driver", lambda: SimpleNamespace(**functions))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(1))
    refused = pytest.raises(torch.OutOfMemoryError, match=r"cuModuleLoadData failed: unknown error \(2\)")
    with refused if failures == 2 else nullcontext():
        driver._load.__wrapped__("decode.cu", "decode", 0, ())
    assert len(emptied) == (failures > 0)


@pytest.mark.parametrize("counted", [0, 1024], ids=["beside a kernel's own", "among a kernel's own"])
def test_no_kernel_asks_for_what_the_driver_reserves(counted: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """On an H100: 227 KiB of a block, of which one is reserved."""
    asked = []

    def call(name: str, *arguments) -> None:
        if name == "cuFuncGetAttribute":
            arguments[0]._obj.value = counted
        elif name == "cuFuncSetAttribute":
            asked.append(arguments[2])

    _believe_in_an_h100(monkeypatch)
    monkeypatch.setattr(driver, "_call", call)
    limit = driver.shared_bytes_limit(torch.device("cuda"))
    driver._load.__wrapped__("decode.cu", "decode", 0, ())
    assert (asked, limit) == ([231_424], 231_424)
    assert shared_bytes_of(14336, 8, torch.bfloat16) == limit, "8 tokens of 14,336 columns have to fit"


def test_nothing_is_loaded_before_it_is_used() -> None:
    code = """
import sys, torch
def loaded(): return {line.split()[-1] for line in open("/proc/self/maps") if "nvrtc" in line or "libcuda.so" in line}
by_torch = loaded()  # whose builds for CUDA bring NVRTC
import offpath, offpath.kernels.gpu.decode, offpath.kernels.gpu.live
assert not torch.cuda.is_initialized() and "triton" not in sys.modules and loaded() == by_torch
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
