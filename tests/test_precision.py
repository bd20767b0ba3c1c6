"""In what torch may multiply float32, however it was told."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from offpath.kernels import precision

BOTH = "from offpath.kernels.precision import float32_precision as p; print(p('cpu'), p('cuda'))"


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("pass", "ieee ieee"),
        ("torch.set_float32_matmul_precision('high')", "tf32 tf32"),
        ("torch.set_float32_matmul_precision('medium')", "bf16 tf32"),
        ("torch.backends.cuda.matmul.allow_tf32 = True", "ieee tf32"),
        ("torch.backends.cuda.matmul.fp32_precision = 'tf32'", "ieee tf32"),
        ("torch.backends.mkldnn.matmul.fp32_precision = 'bf16'", "bf16 ieee"),
        ("torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'", "tf32 ieee"),
    ],
)
def test_every_way_to_set_it_is_read(setting: str, found: str) -> None:
    """In a process of its own: torch refuses to answer through the getter of old once the new settings were used."""
    done = subprocess.run(
        [sys.executable, "-c", f"import torch; {setting}; {BOTH}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == found.split()


@pytest.mark.parametrize(
    ("setting", "found"), [("highest", ("ieee", "ieee")), ("high", ("tf32", "tf32")), ("medium", ("bf16", "tf32"))]
)
def test_torch_before_2_9_is_read(monkeypatch: pytest.MonkeyPatch, setting: str, found: tuple[str, str]) -> None:
    older = SimpleNamespace(cuda=SimpleNamespace(matmul=SimpleNamespace(allow_tf32=False)), mkldnn=SimpleNamespace())
    monkeypatch.setattr(torch, "backends", older)
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: setting)
    assert (precision.float32_precision("cpu"), precision.float32_precision("cuda")) == found
    with precision.multiplied_in_tf32():
        assert older.cuda.matmul.allow_tf32
    assert not older.cuda.matmul.allow_tf32


@pytest.mark.parametrize("before", ["none", "ieee", "tf32"])
def test_block_in_tf32_leaves_the_setting_as_it_was(before: str) -> None:
    code = "import torch; from offpath.kernels.precision import multiplied_in_tf32\n"
    code += f"matmul = torch.backends.cuda.matmul; matmul.fp32_precision = {before!r}\n"
    code += "with multiplied_in_tf32():\n    print(matmul.fp32_precision)\nprint(matmul.fp32_precision)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["tf32", before], done.stderr
