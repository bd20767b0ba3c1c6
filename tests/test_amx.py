"""The products on AMX with its tile registers emulated: few machines that run these tests have them.

Where one has, the other tests of kernels run them as they are; here, their code for any tile is held to exact sums.
"""

from __future__ import annotations

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from whole_numbers import whole_numbers

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
SOURCES = ["bitmap.cpp", "parallel.cpp", "plan.cpp", "product_plan.cpp", "scratch.cpp", "tiles.cpp", "transposed.cpp"]
COMPILE = ["c++", "-std=c++20", "-O2", "-fPIC", "-fno-exceptions", "-fno-rtti", "-Wno-psabi", f"-I{CSRC}"]
# Lane by lane, as the sanitizers run it, so that any processor with AVX2 does.
EMULATED = ["-march=x86-64-v3", "-DOFFPATH_EMULATE_BF16"]
EMULATED += [
    part for name in ("avx512", "amx") for part in ("-include", str(TESTS / "sanitize" / f"emulated_{name}.h"))
]
# Of two strips and more in each dimension; one row, column or token beyond a strip, a step, a task; nothing.
SIZES = [
    (1, 1, 1),
    (33, 65, 17),
    (16, 32, 16),
    (130, 290, 49),
    (290, 33, 520),
    (700, 520, 33),
    (40, 70, 1100),
    (5, 3, 0),
    (2100, 140, 20),
]


@pytest.fixture(scope="module")
def products(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if platform.machine() != "x86_64" or not torch.cpu._is_avx2_supported():
        pytest.skip("needs a processor with AVX2, on which AVX-512 and AMX are emulated")
    if shutil.which("c++") is None:
        pytest.skip("needs c++, which built the package")
    folder = tmp_path_factory.mktemp("amx")
    kernels, library = folder / "kernels.o", folder / "products.so"
    subprocess.run([*COMPILE, *EMULATED, "-c", CSRC / "variant_avx512amx.cpp", "-o", kernels], check=True)
    others = [TESTS / "amx" / "products.cpp", *(CSRC / name for name in SOURCES)]
    own = [flag for flag in COMPILE if flag != "-fno-exceptions"]
    subprocess.run([*own, "-shared", *others, kernels, "-ldl", "-o", library], check=True)
    return ctypes.CDLL(str(library))


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(None if tensor is None else tensor.data_ptr()) for tensor in tensors]


def _strides(matrix: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 2)(matrix.stride(1), matrix.stride(0))


@pytest.mark.parametrize("by_feature", [False, True], ids=["tokens", "features"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_product_is_exact(
    products: ctypes.CDLL, size: tuple[int, int, int], sparsity: float, by_feature: bool
) -> None:
    rows, columns, batch = size
    pattern, values, x, dy, bias = whole_numbers(rows, columns, batch, sparsity, torch.bfloat16)
    weight, mask = pattern.to_dense(values).double(), pattern.to_mask()
    if by_feature:
        x, dy = x.t().contiguous().t(), dy.t().contiguous().t()
    given_bias = None if by_feature else bias
    expected = {
        "y": x.double() @ weight.t() + (0 if given_bias is None else given_bias.double()),
        "dx": dy.double() @ weight,
        "dvalues": (dy.double().t() @ x.double())[mask],
        "dbias": dy.double().sum(0),
    }
    found = {name: torch.full_like(e, torch.nan, dtype=torch.bfloat16) for name, e in expected.items()}
    both = torch.full((batch * columns + pattern.nnz + rows,), torch.nan, dtype=torch.bfloat16)
    threads = 2
    products.run(
        *_pointers(pattern.crow_indices, pattern.col_indices),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        *_pointers(values, given_bias, x),
        _strides(x),
        *_pointers(dy),
        _strides(dy),
        ctypes.c_int64(batch),
        ctypes.c_bool(by_feature),
        ctypes.c_int(threads),
        *_pointers(found["y"], found["dx"], found["dvalues"], both),
    )
    dx, dvalues, found["dbias"] = both.split([batch * columns, pattern.nnz, rows])
    if by_feature:
        found["y"], dx = found["y"].view(rows, batch).t(), dx.view(columns, batch).t()
    assert torch.equal(dx.reshape(batch, columns), expected["dx"].to(torch.bfloat16))
    assert torch.equal(dvalues, expected["dvalues"].to(torch.bfloat16))
    for name, exact in expected.items():
        assert torch.equal(found[name], exact.to(torch.bfloat16)), name


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_products_with_int8_values_are_exact(
    products: ctypes.CDLL, size: tuple[int, int, int], sparsity: float, activations: str
) -> None:
    rows, columns, batch = size
    if activations == "int8" and batch:
        batch = max(batch, 12)  # fewer are multiplied in vectors
    pattern, small, x, _, bias = whole_numbers(rows, columns, batch, sparsity, torch.bfloat16)
    values, scales = small.to(torch.int8), torch.arange(rows).remainder(3) - 1.0
    values[::7], x[:, : columns // 2] = -128, 0
    if activations == "int8":
        x[:, 0] = 127  # every token's scale is 1, so that nothing is rounded
    given_bias = bias if sparsity else None
    weight = scales.double().unsqueeze(1) * pattern.to_dense(values.double())
    exact = nn.functional.linear(x.double(), weight, None if given_bias is None else given_bias.double())
    y = torch.full((batch, rows), torch.nan, dtype=torch.bfloat16)
    products.run_int8(
        ctypes.c_int(activations == "int8"),
        *_pointers(pattern.crow_indices, pattern.col_indices),
        ctypes.c_int64(rows),
        ctypes.c_int64(columns),
        *_pointers(values, scales, given_bias, x),
        _strides(x),
        ctypes.c_int64(batch),
        ctypes.c_int(2),
        *_pointers(y),
    )
    assert torch.equal(y, exact.to(torch.bfloat16))
