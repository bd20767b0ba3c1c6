"""In what torch may multiply float32, however it was told."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from children import outcomes_under
from offpath.kernels import precision

# What is set, and what then holds on the CPU and on CUDA devices.
SETTINGS = {
    "pass": "ieee ieee",
    "torch.set_float32_matmul_precision('high')": "tf32 tf32",
    "torch.set_float32_matmul_precision('medium')": "bf16 tf32",
    "torch.backends.cuda.matmul.allow_tf32 = True": "ieee tf32",
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": "ieee tf32",
    "torch.backends.mkldnn.matmul.fp32_precision = 'bf16'": "bf16 ieee",
    "torch.backends.fp32_precision = 'tf32'; torch.backends.cuda.matmul.fp32_precision = 'ieee'": "tf32 ieee",
}
READ = """
from offpath.kernels.precision import float32_precision
exec(os.environ["SETTING"])
print(float32_precision("cpu"), float32_precision("cuda"))
"""
ROUND = """
from offpath.kernels.precision import multiplied_in_tf32
matmul = torch.backends.cuda.matmul
matmul.fp32_precision = os.environ["SETTING"]
with multiplied_in_tf32():
    print(matmul.fp32_precision)
print(matmul.fp32_precision)
"""


def _outcomes(settings: list[str], code: str) -> dict[str, tuple[int, str, str]]:
    return dict(zip(settings, outcomes_under([{"SETTING": setting} for setting in settings], code), strict=True))


def test_every_way_to_set_it_is_read() -> None:
    """Each in a process: torch refuses to answer through the getter of old once the new settings were used."""
    outcomes = _outcomes(list(SETTINGS), READ)
    assert outcomes == {setting: (0, f"{found}\n", "") for setting, found in SETTINGS.items()}


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


def test_block_in_tf32_leaves_the_setting_as_it_was() -> None:
    outcomes = _outcomes(["none", "ieee", "tf32"], ROUND)
    assert outcomes == {before: (0, f"tf32\n{before}\n", "") for before in outcomes}
