"""CUDA source to machine code at run time, through NVRTC; what was compiled once lies on disk."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch

from offpath.kernels.errors import KernelError
from offpath.kernels.measured import cache_folder

_log = logging.getLogger("offpath")

SOURCES = Path(__file__).parent / "cuda"
MAJORS = (13, 12)  # of NVRTC, newest first
_DIGEST_BYTES = 32


def cubin(source: str, capability: tuple[int, int], defines: dict[str, int]) -> bytes:
    """The machine code of `source`, a file in cuda/, for GPUs of this compute capability.

    `defines` are preprocessor symbols. Read from the user's cache directory where this source, architecture, NVRTC and
    these options were compiled before. Raises `KernelError` when NVRTC is missing or refuses, with its log.
    """
    nvrtc = library()
    code = text_of(source)
    options = [
        f"--gpu-architecture=sm_{nvrtc.architecture(capability)}",
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in sorted(defines.items())),
    ]
    key = json.dumps([code, options, nvrtc.version])
    name = f"{Path(source).stem}-{hashlib.sha256(key.encode()).hexdigest()[:32]}.cubin"
    found = _read(name)
    if found is None:
        found = nvrtc.compile(code, source, options)
        _write(name, found)
    return found


def text_of(source: str) -> str:
    """A file in cuda/ behind what all of them begin with; messages name its own lines."""
    return f'{(SOURCES / "common.cu").read_text()}\n#line 1 "{source}"\n{(SOURCES / source).read_text()}'


@lru_cache(maxsize=1)
def library() -> NVRTC:
    """NVRTC, loaded when first asked for; raises `KernelError` where there is none."""
    problems = []
    for path in _candidates():
        try:
            return NVRTC(path)
        except OSError as error:
            problems.append(str(error))
    raise KernelError(
        "NVRTC, which compiles the CUDA kernels, was not found: install offpath[gpu] or a CUDA build of torch, or put "
        f"libnvrtc on the loader's path ({'; '.join(problems)})"
    )


class NVRTC:
    """The functions of one libnvrtc."""

    def __init__(self, path: str) -> None:
        # libnvrtc opens libnvrtc-builtins by name, and finds it only when it is on the loader's path or loaded already.
        for builtins in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")) if "/" in path else []:
            ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
        self._functions = ctypes.CDLL(path)
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = (major.value, minor.value)
        self.path = path

    def architecture(self, capability: tuple[int, int]) -> int:
        """The newest architecture (such as 90) that this NVRTC compiles for and that runs on such a GPU."""
        count = ctypes.c_int()
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        known = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", known)
        major, minor = capability
        # Machine code runs on GPUs of the same major version with the same or a higher minor version.
        fitting = [architecture for architecture in known if 10 * major <= architecture <= 10 * major + minor]
        if not fitting:
            raise KernelError(
                f"NVRTC {self.version[0]}.{self.version[1]} compiles for compute capabilities {known[0] / 10} to "
                f"{known[-1] / 10}, and this GPU has {major}.{minor}. Install another version of NVRTC"
            )
        return max(fitting)

    def compile(self, code: str, name: str, options: list[str]) -> bytes:
        """Machine code; raises `KernelError` with the compiler's log."""
        program = ctypes.c_void_p()
        self._call("nvrtcCreateProgram", ctypes.byref(program), code.encode(), name.encode(), 0, None, None)
        try:
            arguments = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            status = self._functions.nvrtcCompileProgram(program, len(options), arguments)
            if status:
                log = self._text(program, "nvrtcGetProgramLog").decode(errors="replace").strip("\0\n ")
                raise KernelError(f"NVRTC could not compile {name} with {' '.join(options)}:\n{log}")
            return self._text(program, "nvrtcGetCUBIN")
        finally:
            self._functions.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, getter: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"{getter}Size", program, ctypes.byref(size))
        text = ctypes.create_string_buffer(size.value)
        self._call(getter, program, text)
        return text.raw

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._functions, name)(*arguments)
        if status:
            raise KernelError(f"NVRTC at {self.path}: {name} failed with status {status}")


def _candidates() -> Iterator[str]:
    """Files and names of libnvrtc: of torch's own CUDA first, from installed packages before the system's."""
    cuda = torch.version.cuda
    own = int(cuda.split(".")[0]) if cuda else None
    packages = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (packages.submodule_search_locations or [])] if packages else []
    for major in sorted(MAJORS, key=lambda major: major != own):
        for folder in folders:
            yield from map(str, sorted(folder.glob(f"*/lib/libnvrtc.so.{major}")))
        yield f"libnvrtc.so.{major}"


def _read(name: str) -> bytes | None:
    try:
        kept = _kept(name).read_bytes()
    except OSError:
        return None
    digest, found = kept[:_DIGEST_BYTES], kept[_DIGEST_BYTES:]
    return found if hashlib.sha256(found).digest() == digest else None


def _kept(name: str) -> Path:
    return cache_folder() / "cubin" / name


def _write(name: str, found: bytes) -> None:
    try:
        path = _kept(name)
        beside = path.with_name(f".{name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(hashlib.sha256(found).digest() + found)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("offpath compiles its CUDA kernels in every process: cannot use its cache (%s)", error)
