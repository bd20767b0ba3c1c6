"""The "sparse-bitmask" files that llm-compressor wrote until 2025, which nothing reads any more.

transformers 5 with compressed-tensors 0.20 loads such a checkpoint with random weights and no error: it does not know
the names in it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

PARTS = ("compressed", "bitmask", "shape", "row_offsets")


def decompress_bitmasks(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors`, a checkpoint of compressed-tensors' format "sparse-bitmask", with its weights written out dense.

    A layer's weight is stored there as `<layer>.compressed` [nnz], the nonzeros row by row; `<layer>.bitmask` uint8
    [rows, ceil(columns / 8)], one bit a position, the lowest first; `<layer>.shape` [2] and `<layer>.row_offsets`
    [rows]. It becomes `<layer>.weight`; other tensors stay. Older files name the parts after the weight,
    `<layer>.weight.compressed` and so on, which comes to the same. Give all files of a checkpoint in one mapping.
    Raises `ValueError`, naming the layer, for parts that are missing or do not fit together.

    >>> bits = torch.tensor([[0b101], [0b010]], dtype=torch.uint8)
    >>> file = {"a.bitmask": bits, "a.compressed": torch.tensor([1.0, 2.0, 3.0]), "a.shape": torch.tensor([2, 3])}
    >>> decompress_bitmasks(file | {"a.row_offsets": torch.tensor([0, 2])})["a.weight"].tolist()
    [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0]]
    """
    ends = (".compressed", ".bitmask")
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in tensors if name.endswith(ends)))
    dense = {_weight(layer): _dense(layer, tensors) for layer in layers}
    parts = {f"{layer}.{part}" for layer in layers for part in PARTS}
    return {name: tensor for name, tensor in tensors.items() if name not in parts} | dense


def _weight(layer: str) -> str:
    return layer if layer.rpartition(".")[2] == "weight" else f"{layer}.weight"


def _dense(layer: str, tensors: Mapping[str, Tensor]) -> Tensor:
    missing = [part for part in PARTS if f"{layer}.{part}" not in tensors]
    if missing:
        raise ValueError(
            f"expected {', '.join(f'{layer}.{part}' for part in PARTS)} together, but {', '.join(missing)} is not "
            "there; of a checkpoint in several files, pass the tensors of all of them"
        )
    if _weight(layer) in tensors:
        raise ValueError(f"expected {layer} to be stored once, got {_weight(layer)} and {layer}.bitmask")
    values, bits, shape, offsets = (tensors[f"{layer}.{part}"] for part in PARTS)
    if shape.dtype not in (torch.int64, torch.int32) or shape.shape != (2,):
        raise ValueError(f"expected {layer}.shape to be 2 integers, got {shape.dtype} {tuple(shape.shape)}")
    rows, columns = shape.tolist()
    if bits.dtype != torch.uint8 or tuple(bits.shape) != (rows, -(-columns // 8)):
        raise ValueError(
            f"expected {layer}.bitmask to be uint8 of shape ({rows}, {-(-columns // 8)}) for a weight of ({rows}, "
            f"{columns}), got {bits.dtype} {tuple(bits.shape)}"
        )
    positions = np.unpackbits(bits.numpy(), axis=-1, bitorder="little").astype(bool)
    mask = torch.from_numpy(positions[:, :columns])
    counts = mask.sum(1)
    fits = values.shape == (int(counts.sum()),) and torch.equal(offsets.long(), counts.cumsum(0) - counts)
    if not fits or positions[:, columns:].any():
        raise ValueError(
            f"expected as many numbers in {layer}.compressed as bits in its bitmask, and row_offsets to say where each "
            f"row begins; got {tuple(values.shape)} numbers for {int(positions.sum())} bits"
        )
    # As bytes, where torch cannot scatter the numbers themselves: those of float8.
    stored = values.contiguous().view(torch.uint8) if values.itemsize == 1 else values
    return stored.new_zeros(rows, columns).masked_scatter_(mask, stored).view(values.dtype)
