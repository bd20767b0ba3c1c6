"""`Int8Embedding`: an `nn.Embedding` whose rows take one byte an entry, for inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from offpath.nn.casts import keep_dtypes
from offpath.nn.quantise import quantise_rows


class Int8Embedding(nn.Module):
    """Rows of int8 with one float32 scale each: row i is scales[i] * values[i], in `dtype`.

    Input: integers of any shape; output [..., embedding_dim]. Buffers and no parameters: `values` int8
    [num_embeddings, embedding_dim], `scales` float32 [num_embeddings].

    >>> table = nn.Embedding(10, 4, padding_idx=0)
    >>> small = Int8Embedding.from_dense(table)
    >>> small
    Int8Embedding(10, 4, padding_idx=0, dtype=torch.float32)
    >>> small(torch.tensor([[0, 3]])).shape
    torch.Size([1, 2, 4])
    """

    values: Tensor
    scales: Tensor
    # What changes rows while they are read, or only matters to gradients.
    refused = ("max_norm", "scale_grad_by_freq", "sparse")

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        shape = num_embeddings, embedding_dim
        self.register_buffer("values", torch.zeros(shape, dtype=torch.int8, device=device))
        self.register_buffer("scales", torch.ones(num_embeddings, dtype=torch.float32, device=device))

    def forward(self, indices: Tensor) -> Tensor:
        """The rows at `indices`."""
        rows = nn.functional.embedding(indices, self.values)
        return (rows * nn.functional.embedding(indices, self.scales.unsqueeze(1))).to(self.dtype)

    @classmethod
    def from_dense(cls, embedding: nn.Embedding) -> Int8Embedding:
        """The int8 rows of `embedding`: each entry is off by at most half its row's scale, max |row| / 127.

        Keeps device, dtype of the output, padding_idx and training mode; shares no memory with `embedding`. Raises
        `ValueError` for weights that are not finite, for max_norm, scale_grad_by_freq and sparse, and for what is not
        looked up as `nn.Embedding` does.
        """
        if not isinstance(embedding, nn.Embedding) or type(embedding).forward is not nn.Embedding.forward:
            raise ValueError(
                f"expected nn.Embedding, got {type(embedding).__name__}, which does not compute the same: its rows "
                "alone would not stand for it"
            )
        asked = [name for name in cls.refused if getattr(embedding, name)]
        if asked:
            raise ValueError(
                f"expected an embedding whose rows only are read, got one with {', '.join(asked)}; build the "
                "nn.Embedding without it first"
            )
        weight = embedding.weight.detach()
        count, width = weight.shape
        quantised = cls(count, width, embedding.padding_idx, weight.device, weight.dtype)
        rows = torch.arange(count, device=weight.device).repeat_interleave(width)
        values, quantised.scales = quantise_rows(weight.flatten(), rows, count)
        quantised.values = values.view(weight.shape)
        return quantised.train(embedding.training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}, dtype={self.dtype}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Embedding:
        before = {"values": self.values, "scales": self.scales}
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.values.device)).dtype
        super()._apply(fn, recurse)
        keep_dtypes(self, before)
        return self
