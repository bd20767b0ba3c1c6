"""Checkpoints in the format "sparse-bitmask" of compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from offpath.convert import decompress_bitmasks

WEIGHT = torch.zeros(3, 10)
WEIGHT[[0, 0, 1, 1, 2, 2, 2, 2], [8, 9, 6, 7, 0, 1, 2, 4]] = torch.tensor([1.0, 2, 1, -1, 3, -1, 1, 1])


def _file(**changes: Tensor) -> dict[str, Tensor]:
    """WEIGHT as compressed-tensors 0.9.4, the last series that could write it, did."""
    parts = {
        "shape": torch.tensor([3, 10]),
        "compressed": torch.tensor([1.0, 2.0, 1.0, -1.0, 3.0, -1.0, 1.0, 1.0]),
        "bitmask": torch.tensor([[0, 3], [192, 0], [23, 0]], dtype=torch.uint8),
        "row_offsets": torch.tensor([0, 2, 4]),
    }
    return {f"a.b.{name}": part for name, part in (parts | changes).items()}


def test_weights_are_written_out_and_the_rest_stays() -> None:
    rest = {"a.b.bias": torch.ones(3), "norm.weight": torch.ones(2)}
    dense = decompress_bitmasks(rest | _file())
    assert dense.keys() == {"a.b.weight", *rest} and all(dense[name] is rest[name] for name in rest)
    assert torch.equal(dense["a.b.weight"], WEIGHT)
    half = decompress_bitmasks(_file(compressed=_file()["a.b.compressed"].bfloat16()))
    assert half["a.b.weight"].dtype is torch.bfloat16 and torch.equal(half["a.b.weight"].float(), WEIGHT)


def test_older_files_name_the_parts_after_the_weight() -> None:
    older = {name.replace("a.b.", "a.b.weight."): part for name, part in _file().items()}
    dense = decompress_bitmasks(older)
    assert dense.keys() == {"a.b.weight"} and torch.equal(dense["a.b.weight"], WEIGHT)
    with pytest.raises(ValueError, match=r"got a\.b\.weight and a\.b\.weight\.bitmask"):
        decompress_bitmasks(older | dense)


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": torch.tensor([3, 17])},
        {"shape": torch.tensor([3, 9])},  # a bit beyond the last column
        {"shape": torch.tensor([-3, 10])},
        {"shape": torch.tensor([30])},
        {"shape": torch.tensor([3.0, 10.0])},
        {"compressed": torch.ones(7)},
        {"compressed": torch.ones(8, 1)},
        {"bitmask": torch.zeros(3, 2, dtype=torch.int8)},
        {"bitmask": torch.zeros(2, 2, dtype=torch.uint8)},
        {"row_offsets": torch.tensor([0, 2, 5])},
        {"row_offsets": torch.tensor([0, 2])},
    ],
    ids=str,
)
def test_parts_that_do_not_fit_together_are_refused_by_name(changes: dict[str, Tensor]) -> None:
    with pytest.raises(ValueError, match=r"a\.b\."):
        decompress_bitmasks(_file(**changes))


@pytest.mark.parametrize("part", ["shape", "compressed", "row_offsets", "bitmask"])
def test_a_missing_part_is_named(part: str) -> None:
    file = _file()
    del file[f"a.b.{part}"]
    with pytest.raises(ValueError, match=f"{part} is not there; of a checkpoint in several"):
        decompress_bitmasks(file)


def test_float8_is_written_out_as_it_is() -> None:
    eighth = _file(compressed=_file()["a.b.compressed"].to(torch.float8_e4m3fn))
    dense = decompress_bitmasks(eighth)["a.b.weight"]
    assert dense.dtype is torch.float8_e4m3fn and torch.equal(dense.float(), WEIGHT)


def test_a_weight_that_is_there_already_is_not_replaced_in_silence() -> None:
    with pytest.raises(ValueError, match=r"expected a\.b to be stored once"):
        decompress_bitmasks({"a.b.weight": WEIGHT} | _file())
