"""`SparseInputLinear`: `nn.Linear` for inputs of which each sample has a few live units."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from offpath.nn.autocast import under_autocast
from offpath.ops import SparseRows
from offpath.ops.live_linear import live_linear, reads_live_rows


class SparseInputLinear(nn.Module):
    """A linear layer with a dense weight that reads `SparseRows`, and only what they name.

    y = x @ weight_t + bias for `x` `SparseRows` of shape (rows, in_features), giving [rows, out_features]; or for a
    dense tensor [..., in_features], multiplied densely as by `nn.Linear` (in inference on a GPU, up to 4 tokens read no
    row of a unit that is zero in all of them, where that is not slower). The weight is stored by input, `weight_t`
    [in_features, out_features], so that a live unit is one row in memory: a sample reads, and its gradient writes, the
    rows of its live units alone. The parameter is not called `weight`, since a square one of `nn.Linear` would fit it
    the wrong way round; a `state_dict` of `nn.Linear` loads, transposed. Initial values are distributed as those of
    `nn.Linear`. Under autocast the whole weight is cast in every call, as there. Raises `ValueError` for an input of
    other than in_features units.

    >>> from offpath.nn import TopK
    >>> layer = SparseInputLinear(16, 4)
    >>> layer(TopK(2)(torch.randn(8, 16))).shape
    torch.Size([8, 4])
    >>> layer(torch.randn(2, 3, 16)).shape
    torch.Size([2, 3, 4])
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight_t = nn.Parameter(torch.empty(in_features, out_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weight and bias from U(-1/sqrt(in_features), 1/sqrt(in_features)), as `nn.Linear` does."""
        bound = 1 / math.sqrt(self.in_features) if self.in_features else 0.0
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(self, x: SparseRows | Tensor) -> Tensor:
        if x.shape[-1:] != (self.in_features,):
            raise ValueError(f"expected SparseRows or a tensor of {self.in_features} features, got shape {x.shape}")
        if isinstance(x, Tensor):
            if reads_live_rows(x, self.weight_t, self.bias):
                return live_linear(x, self.weight_t, self.bias)
            return functional.linear(x, self.weight_t.t(), self.bias)
        values, weight, bias = under_autocast(x.values, self.weight_t, self.bias)
        y = x.with_values(values).matmul(weight)
        return y if bias is None else y + bias

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> SparseInputLinear:
        """The layer that computes what `linear` does; keeps device, dtype, mode and `requires_grad`, shares no memory.

        Raises `ValueError` for a layer of another kind.

        >>> linear = nn.Linear(3, 2)
        >>> SparseInputLinear.from_linear(linear)
        SparseInputLinear(in_features=3, out_features=2, bias=True)
        """
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"expected nn.Linear, got {type(linear).__name__}; build an nn.Linear of its weight first")
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", linear.weight.dtype)
        layer.weight_t = _turned(linear.weight)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    def to_linear(self) -> nn.Linear:
        """The `nn.Linear` that computes the same; shares no memory with this layer."""
        dtype = self.weight_t.dtype
        linear = nn.Linear(self.in_features, self.out_features, self.bias is not None, device="meta", dtype=dtype)
        linear.weight = _turned(self.weight_t)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.dim() == 2 and prefix + "weight_t" not in state_dict:  # of nn.Linear
            # torch hands every module its own copy of the dictionary, not of the tensors.
            del state_dict[prefix + "weight"]
            state_dict[prefix + "weight_t"] = weight.t().contiguous()
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _turned(weight: Tensor) -> nn.Parameter:
    turned = weight.detach().t().clone(memory_format=torch.contiguous_format)
    return nn.Parameter(turned, requires_grad=weight.requires_grad)
