"""Files that an enemy writes, with a checksum that fits: refused by name, with the model as it was, and never out of
bounds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from torch import Tensor

import offpath
from offpath import SparseLinear, StorageError
from storage_cases import Forged, dense_model, must_be_refused, saved_model, whole_file

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return whole_file(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def forged(tmp_path: Path, whole: bytes) -> Forged:
    return Forged(tmp_path / "forged", whole)


def test_a_forged_file_without_changes_is_loaded(forged: Forged) -> None:
    """Or all that follows would show nothing."""
    assert offpath.load(forged.write())[0].nnz == 720
    assert {entry["encoding"] for entry in forged.header["layers"].values()} == {"bitmap", "columns"}


def _set(*path: str, to: Any) -> Callable[[Forged], None]:
    def change(forged: Forged) -> None:
        place = forged.header
        for name in path[:-1]:
            place = place[name]
        place[path[-1]] = to

    change.__name__ = f"{'.'.join(path)}={to!r:.30}"
    return change


def _tensor(key: str, make: Callable[[Tensor], Tensor]) -> Callable[[Forged], None]:
    def change(forged: Forged) -> None:
        forged.tensors[key] = make(forged.tensors[key]).contiguous()

    return change


def _swapped(columns: Tensor) -> Tensor:
    return columns.int().flip(0).to(columns.dtype)


def _ones_more(bitmap: Tensor) -> Tensor:
    first_free = int((bitmap != 255).nonzero()[0])
    bitmap[first_free] |= int(bitmap[first_free]) + 1
    return bitmap


def _moved_to_another_row(counts: Tensor) -> Tensor:
    moved = counts.int()
    moved[int(moved.argmax())] -= 1
    moved[-1] += 2
    return moved.to(counts.dtype)


HEADER_CHANGES = [
    *(_set(name, to=value) for name in ("layers", "shared", "tied") for value in (None, [], 3, "x", {"a": 3})),
    *(_set("version", to=value) for value in (2, 0, "1", None, [], 10**30)),
    *(_set("format", to=value) for value in ("other", None)),
    *(_set("model", to=value) for value in (3, [], "nn.Linear")),
    _set("more", to=1),
    *(_set("layers", "0", "kind", to=value) for value in ("Linear", "os.system", "Sparse" * 9**5, None, {}, [])),
    _set("layers", "0", "kind", to="SparseSparseLinear"),
    *(_set("layers", "0", "encoding", to=value) for value in ("columns", "rle", None, {}, 3)),
    _set("layers", "2", "encoding", to="bitmap"),
    *(
        _set("layers", "0", "nnz", to=value)
        for value in (719, 721, -1, 2**31, 2**31 - 1, 1.5, True, None, "720", 10**40)
    ),
    *(_set("layers", "2", "nnz", to=value) for value in (0, 2, 4, 2**31 - 1)),
    *(
        _set("layers", layer, "arguments", size, to=value)
        for layer in ("0", "2")
        for size in ("in_features", "out_features")
        for value in (0, 1, 21, -20, 2**31 - 1, 2**31, 10**400, 3.0, True, "20", None, [20], {}, [[]] * 9)
    ),
    *(_set("layers", "0", "arguments", "prefer", to=value) for value in ("fast", "", None, 3, ["speed"])),
    _set("layers", "0", "arguments", "device", to="cuda"),
    _set("layers", "0", "arguments", to={"in_features": 30}),
    _set("layers", "0", to=[]),
    _set("layers", "9", to={}),
    _set("layers", "", to={"kind": "SparseLinear", "arguments": {}, "nnz": 1, "encoding": "bitmap"}),
    _set("tied", "3.weight", to="3.weight"),
    _set("tied", "x", to="nowhere"),
    _set("tied", "x", to="0.values"),
    _set("shared", "x", to="nowhere"),
    _set("shared", "0", to="2"),
    _set("shared", "nowhere", to="0"),
]


@pytest.mark.parametrize("change", HEADER_CHANGES, ids=lambda change: change.__name__)
def test_headers_that_do_not_fit_the_tensors_are_refused(forged: Forged, change: Callable[[Forged], None]) -> None:
    change(forged)
    must_be_refused(forged.write())


TENSOR_CHANGES = {
    "a bit too many": (_tensor("0.bitmap", _ones_more), "bitmap of 720 connections"),
    "a bit too few": (_tensor("0.bitmap", lambda bitmap: bitmap & (bitmap - 1)), "bitmap of 720 connections"),
    "no bits": (_tensor("0.bitmap", torch.zeros_like), "bitmap of 720 connections"),
    "short bitmap": (_tensor("0.bitmap", lambda bitmap: bitmap[:-1]), r"uint8 \[300\], got torch.uint8 \[299\]"),
    "bitmap of int8": (_tensor("0.bitmap", lambda bitmap: bitmap.view(torch.int8)), "got torch.int8"),
    "square bitmap": (_tensor("0.bitmap", lambda bitmap: bitmap.view(3, 100)), r"got torch.uint8 \[3, 100\]"),
    "columns beyond the end": (_tensor("2.col_indices", lambda columns: columns.int().add(80).to(columns.dtype)), "in"),
    "columns in descending order": (_tensor("2.col_indices", _swapped), "ascending|add up"),
    "columns twice": (_tensor("2.col_indices", torch.zeros_like), "duplicate|ascending|add up"),
    "negative columns": (_tensor("2.col_indices", lambda columns: columns.view(torch.int16).neg()), "got torch.int16"),
    "wide columns": (_tensor("2.col_indices", lambda columns: columns.int()), "got torch.int32"),
    "too few columns": (_tensor("2.col_indices", lambda columns: columns[1:]), r"uint16 \[3\], got torch.uint16 \[2\]"),
    "counts that do not add up": (_tensor("2.row_counts", _moved_to_another_row), "add up to 3 connections, got 4"),
    "too many counts": (_tensor("2.row_counts", lambda counts: torch.cat([counts, counts])), r"\[5\], got .*\[10\]"),
    "too few values": (_tensor("0.values", lambda values: values[1:]), "one value a column"),
    "values as a matrix": (_tensor("0.values", lambda values: values.view(10, 72)), "one value a column"),
    "whole values": (_tensor("0.values", lambda values: values.int()), "floating point"),
    "a longer bias": (_tensor("0.bias", lambda bias: torch.cat([bias, bias])), "expected a bias of shape"),
    "a longer dense bias": (_tensor("3.bias", lambda bias: torch.cat([bias, bias])), "size mismatch for 3.bias"),
    "a dense weight of integers": (_tensor("3.weight", lambda weight: weight.long()), "'3.weight', got torch.int64"),
}


@pytest.mark.parametrize("name", TENSOR_CHANGES)
def test_tensors_that_are_not_what_the_header_says_are_refused(forged: Forged, name: str) -> None:
    change, message = TENSOR_CHANGES[name]
    if name in ("columns in descending order", "columns twice"):  # needs two connections in a row
        forged.tensors["2.row_counts"] = torch.tensor([3, 0, 0, 0, 0]).to(torch.uint16)
        forged.tensors["2.col_indices"] = torch.tensor([1, 5, 7]).to(torch.uint16)
        offpath.load(forged.write())
    change(forged)
    must_be_refused(forged.write(), message)


@pytest.mark.parametrize("key", ["0.bitmap", "0.values", "2.row_counts", "2.col_indices", "3.weight"])
def test_a_missing_tensor_is_refused(forged: Forged, key: str) -> None:
    del forged.tensors[key]
    must_be_refused(forged.write())


@pytest.mark.parametrize("key", ["0.more", "3.more", "more", "0.bitmap.more", ""])
def test_one_tensor_too_many_is_refused(forged: Forged, key: str) -> None:
    forged.tensors[key] = torch.zeros(2)
    must_be_refused(forged.write())


def test_bits_behind_the_end_are_refused(tmp_path: Path) -> None:
    layer = SparseLinear(3, 5, density=1)
    offpath.save(layer, tmp_path / "m")
    forged = Forged(tmp_path / "m", (tmp_path / "m").read_bytes())
    assert forged.tensors["bitmap"].tolist() == [255, 127]
    forged.tensors["bitmap"][:] = torch.tensor([127, 255])
    with pytest.raises(StorageError, match="no bits behind its end"):
        offpath.load(forged.write())


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '"offpath"',
        "{'format'",
        "NaN",
        "[" * 100_000,
        '{"format":' * 50_000,
        '{"format": "offpath", "version": 1}',
        '{"format": "offpath", "version": ' + "9" * 5000 + "}",
        '{"format": "offpath", "version": 1, "layers": ' + '{"a":' * 900 + "1" + "}" * 900 + "}",
        " " * (2**24 + 1),
        "\ud7ff\x00",
    ],
    ids=lambda text: repr(text[:20]),
)
def test_json_that_is_no_header_is_refused(forged: Forged, text: str) -> None:
    must_be_refused(forged.write(text), "header|version|got other JSON")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_value_anywhere_in_the_header_is_refused_or_changes_nothing(
    whole: bytes, tmp_path: Path, data: st.DataObject
) -> None:
    forged = Forged(tmp_path / "forged", whole)
    place, value = forged.header, data.draw(JSON)
    while True:
        key = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[key], dict) and place[key] and data.draw(st.booleans()):
            place = place[key]
            continue
        place[key] = value
        break
    path = forged.write()
    try:
        loaded = offpath.load(path, dense_model())
    except StorageError as error:
        assert str(error).startswith(str(path))
    else:
        expected = saved_model().state_dict()
        assert loaded.state_dict().keys() == expected.keys()
        assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items() if key[0] != "3")


# --- architectures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "model",
    [
        {"pickle": {}},
        {"sequential": {}},
        {"sequential": {"class": "Module", "arguments": {}}},
        {"sequential": {"class": "system", "arguments": {"command": "true"}}},
        {"sequential": {"class": "Linear", "arguments": {"in_features": -1, "out_features": 2, "bias": True}}},
        {"sequential": {"class": "Linear", "arguments": {"in_features": "os", "out_features": [], "bias": {}}}},
        {"sequential": {"class": "Linear", "arguments": {"in_features": 1}}},
        {"sequential": {"class": "ReLU", "arguments": {"inplace": True}}},
        {"sequential": {"stored": "SparseLinear"}},
        {"sequential": {"same_as": "0"}},
        {"sequential": {"children": {"forward": {"class": "ReLU", "arguments": {}}}}},
        {"sequential": {"children": {"0": None}}},
        {"sequential": {"children": 3}},
        {"sequential": {"children": {}}, "transformers": {}},
        {"transformers": {}},
        {"transformers": {"class": "BertModel"}},
        *(
            {"transformers": {"class": name, "config": {}}}
            for name in (
                "pipeline",
                "AutoModel",
                "PreTrainedModel",
                "BertConfig",
                "__builtins__",
                "os",
                "",
                "Nothing",
                "utils",
            )
        ),
        *(
            {"transformers": {"class": "BertModel", "config": config}}
            for config in (
                {"hidden_size": 2**40},
                {"hidden_size": "large"},
                {"hidden_size": 7, "num_attention_heads": 3},
                {"num_labels": 10**9},
                {"num_hidden_layers": 2**23, "hidden_size": 2, "num_attention_heads": 1, "intermediate_size": 2},
                {"max_position_embeddings": 2**24},
                {"vocab_size": 2**24, "hidden_size": 2**24, "num_attention_heads": 1},
                {"auto_map": {"AutoModel": "evil--model.Model"}},
                {"attn_implementation": "evil/kernel"},
                {"_attn_implementation": "evil/kernel"},
                {"nested": [{"attn_implementation": "evil/kernel"}]},
                {"quantization_config": {"quant_method": "bitsandbytes"}},
                {"dtype": "system"},
                {"hidden_act": "os.system"},
                {"__class__": "evil"},
                {"from_dict": 1, "to_dict": 2},
            )
        ),
    ],
    ids=lambda model: repr(model)[:90],
)
def test_architectures_that_are_not_what_the_file_holds_are_refused(forged: Forged, model: Any) -> None:
    forged.header["model"] = model
    with pytest.raises(StorageError):
        offpath.load(forged.write())
    assert torch.is_grad_enabled()  # constructors turn it off for a while
    offpath.load(forged.path, dense_model())  # whoever knows the architecture needs no description
