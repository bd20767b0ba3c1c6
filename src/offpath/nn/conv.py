"""`SparseConv2d` and `SparseConv1d`: `nn.Conv2d` and `nn.Conv1d` with only the weights that exist."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from offpath import pattern as patterns
from offpath.nn.autocast import under_autocast
from offpath.nn.sparse_weight import CsrWeightModule
from offpath.ops import PREFERENCES, Explanation, explain, explain_conv2d, sparse_conv2d, sparse_linear
from offpath.pattern import Pattern

Ints = int | tuple[int, ...]
_Conv = TypeVar("_Conv", bound="_SparseConv")


class _SparseConv(CsrWeightModule):
    """What convolutions of one and two dimensions share. As a matrix, the weight has a row for each output channel."""

    sides = ("out_channels", "in_channels / groups x kernel")
    from_dense_by = "offpath.sparsify(model, method='magnitude', modules=...) or from_dense of the sparse layer"
    dimensions: ClassVar[int]
    dense_class: ClassVar[Any]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Ints,
        stride: Ints = 1,
        padding: Ints | str = 0,
        dilation: Ints = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        sparsity: float | None = None,
        density: float | None = None,
        pattern: Pattern | None = None,
        generator: torch.Generator | None = None,
        prefer: str = "speed",
    ) -> None:
        if prefer not in PREFERENCES:
            raise ValueError(f"expected prefer to be 'speed' or 'memory', got {prefer!r}")
        if padding_mode != "zeros":
            raise ValueError(f"expected padding_mode='zeros', got {padding_mode!r}; pad with torch.nn.functional.pad")
        whole = all(isinstance(number, Integral) for number in (groups, in_channels, out_channels))
        if not whole or min(groups, in_channels, out_channels) < 1 or in_channels % groups or out_channels % groups:
            raise ValueError(
                f"expected channels, at least one, that groups={groups!r} divides, got in_channels={in_channels!r}, "
                f"out_channels={out_channels!r}"
            )
        in_channels, out_channels, groups = int(in_channels), int(out_channels), int(groups)
        kernel_size = self._sizes("kernel_size", kernel_size, 1)
        super().__init__(
            in_channels // groups * math.prod(kernel_size),
            out_channels,
            bias,
            device,
            dtype,
            sparsity,
            density,
            pattern,
            generator,
        )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size = kernel_size
        self.stride = self._sizes("stride", stride, 1)
        self.dilation = self._sizes("dilation", dilation, 1)
        self.padding = padding if isinstance(padding, str) else self._sizes("padding", padding, 0)
        self._pads = self._zeros_before_and_after()
        self.padding_mode, self.prefer = padding_mode, prefer

    def forward(self, x: Tensor) -> Tensor:
        """The convolution of `x` [..., in_channels, *size] with at most one leading dimension."""
        if x.dim() - self.dimensions not in (1, 2) or x.shape[-1 - self.dimensions] != self.in_channels:
            size = "height, width" if self.dimensions == 2 else "length"
            raise ValueError(
                f"expected an input [images, {self.in_channels}, {size}], with or without images, got shape "
                f"{tuple(x.shape)}"
            )
        if torch.compiler.is_compiling():
            self._check_when_compiled()
        else:
            self._check_digest()
        if x.dim() == self.dimensions + 1:
            return self._convolve(x.unsqueeze(0)).squeeze(0)
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        x, values, bias = under_autocast(x, self.values, self.bias)
        topology = self._connections.crow_indices, self._connections.col_indices
        one_dimensional = self.dimensions == 1
        if one_dimensional:
            x = x.unsqueeze(2)
        if self._is_pointwise and x.stride(1) == 1 and not x.is_contiguous():
            # Channels-last, this is a linear layer: all of its methods are there to choose from.
            y = sparse_linear(x.permute(0, 2, 3, 1), values, bias, *topology, self.prefer).permute(0, 3, 1, 2)
        else:
            kernel, stride, padding, dilation, groups = self._geometry
            y = sparse_conv2d(x, values, bias, *topology, kernel, stride, padding, dilation, groups, self.prefer)
        return y.squeeze(2) if one_dimensional else y

    def explain(self, images: int, size: Ints, channels_last: bool = False) -> Explanation:
        """How this layer computes its products for so many images of `size`, and what the alternatives cost.

        `planes` follows the pattern, `dense` is torch's convolution with the weight written out. A pointwise layer on
        channels-last images is a linear layer of all their pixels and has its methods. The first call for a kind of
        layer and image measures it, which takes a second; costs are of images of about this size. Raises `ValueError`
        for less than one image and `KernelError` for a size that the kernel does not fit into.

        >>> layer = SparseConv2d(16, 32, 3, padding=1, sparsity=0.9)
        >>> layer.explain(2, (8, 8)).chosen["forward"] in ("planes", "dense")
        True
        """
        if images < 1:
            raise ValueError(f"expected at least one image, got {images}")
        size = self._sizes("size", size, 1)
        if self._is_pointwise and channels_last:
            return explain(self.values, self.pattern.shape, images * math.prod(size), self.prefer)
        shape = images, self.in_channels, *_pair(size, 1)
        crow_indices = self._connections.crow_indices
        kernel, stride, padding, dilation, groups = self._geometry
        return explain_conv2d(
            shape, self.values, crow_indices, kernel, stride, padding, dilation, groups, channels_last, self.prefer
        )

    @property
    def dense_shape(self) -> tuple[int, ...]:
        return (self.out_channels, self.in_channels // self.groups, *self.kernel_size)

    @property
    def _geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int, int, int], tuple[int, int], int]:
        """Kernel, stride, zeros around the image, dilation and groups in two dimensions."""
        before, after = (_pair(pads, 0) for pads in self._pads)
        kernel, stride, dilation = (_pair(sizes, 1) for sizes in (self.kernel_size, self.stride, self.dilation))
        return kernel, stride, (*before, *after), dilation, self.groups

    @property
    def _is_pointwise(self) -> bool:
        ones = math.prod((*self.kernel_size, *self.stride, self.groups)) == 1
        return ones and not any((*self._pads[0], *self._pads[1]))

    @classmethod
    def from_dense(cls: type[_Conv], conv: Any, pattern: Pattern | None = None) -> _Conv:
        """The sparse layer that computes what `conv` does with the weights outside `pattern` set to zero.

        The pattern has shape (out_channels, in_channels / groups x kernel); without one, the nonzeros of `conv.weight`
        are the connections. Keeps device, dtype, training mode and `requires_grad`; shares no memory with `conv`.
        Raises `ValueError` for a convolution of another kind.
        """
        if not isinstance(conv, cls.dense_class) or conv.transposed:
            raise ValueError(f"expected {cls.dense_class.__name__}, got {type(conv).__name__}")
        weight = conv.weight.detach().flatten(1)
        pattern = patterns.from_dense(weight) if pattern is None else pattern
        patterns.expect(pattern, tuple(weight.shape))
        pattern = pattern.to(weight.device)
        values = weight[pattern.row_indices().long(), pattern.col_indices.long()]
        layer = cls(**_settings(conv), device="meta", dtype=weight.dtype, density=1)
        return layer._hold(pattern, values, conv.weight.requires_grad, conv)

    def to_dense(self) -> Any:
        """The dense layer that computes the same, zeros written out; shares no memory with this layer.

        Raises `RuntimeError` where the values are not those of the layer's topology.
        """
        self._check_given_away()
        conv = self.dense_class(**_settings(self), device="meta", dtype=self.values.dtype)
        weight = self.pattern.to_dense(self.values.detach()).view(conv.weight.shape)
        conv.weight = nn.Parameter(weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            conv.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return conv.train(self.training)

    def extra_repr(self) -> str:
        shown = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {"padding": (0,) * self.dimensions, "dilation": (1,) * self.dimensions, "groups": 1}
        for name, default in defaults.items():
            if getattr(self, name) != default:
                shown += f", {name}={getattr(self, name)}"
        return f"{shown}, bias={self.bias is not None}, nnz={self.nnz}, sparsity={self.sparsity:.4g}"

    def _sizes(self, name: str, given: Ints, least: int) -> tuple[int, ...]:
        listed = given if isinstance(given, (tuple, list)) else (given,) * self.dimensions
        sizes = tuple(int(n) for n in listed if isinstance(n, Integral) and n >= least)  # NumPy's integers as well
        if len(listed) != self.dimensions or len(sizes) != self.dimensions:
            raise ValueError(f"expected {name} as a number or {self.dimensions} of at least {least}, got {given!r}")
        return sizes

    def _zeros_before_and_after(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        if not isinstance(self.padding, str):
            return self.padding, self.padding
        if self.padding == "valid":
            return (0,) * self.dimensions, (0,) * self.dimensions
        if self.padding != "same" or any(s != 1 for s in self.stride):
            raise ValueError(f"expected padding as numbers, 'valid', or 'same' with stride 1, got {self.padding!r}")
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
        return tuple(n // 2 for n in total), tuple(n - n // 2 for n in total)


class SparseConv2d(_SparseConv):
    """`nn.Conv2d` that stores and computes only the connections of its pattern.

    Input [images, in_channels, height, width] (channels-last or not, as the output then is; `images` may be missing),
    float32, float64 or bfloat16. Stride, zero padding (numbers, "same", "valid"), dilation and groups are those of
    `nn.Conv2d`. Its parameters are `values` [nnz] and `bias` [out_channels]; the connections are those of a matrix of
    shape (out_channels, in_channels / groups x kernel height x kernel width), `weight.flatten(1)` of `nn.Conv2d`. They
    travel with the `state_dict` as `crow_indices` and `col_indices` (int32).

    Nothing is copied once per kernel position. Whether images go over planes, or over the weight written out by torch,
    is measured once for each kind of layer and image and kept on disk; `prefer="memory"` never writes the weight out.
    Which connections there are is given as for `SparseLinear`. `offpath.topology` does not move them. Over planes, an
    infinite pixel may make gradients of `values` NaN, and an infinite value gradients of pixels, that are finite in
    `nn.Conv2d`: padding is multiplied as zeros there.
    Raises `ValueError` for sizes that do not fit.

    >>> import torch
    >>> layer = SparseConv2d(16, 32, 3, padding=1, sparsity=0.9)
    >>> layer
    SparseConv2d(16, 32, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), bias=True, nnz=461, sparsity=0.9)
    >>> layer(torch.randn(2, 16, 8, 8)).shape
    torch.Size([2, 32, 8, 8])
    """

    dimensions = 2
    dense_class = nn.Conv2d


class SparseConv1d(_SparseConv):
    """`nn.Conv1d` that stores and computes only the connections of its pattern; as `SparseConv2d` in all else.

    Input [images, in_channels, length], `images` may be missing.

    >>> import torch
    >>> SparseConv1d(4, 8, 5, stride=2)(torch.randn(2, 4, 33)).shape
    torch.Size([2, 8, 15])
    """

    dimensions = 1
    dense_class = nn.Conv1d


def _settings(conv: Any) -> dict[str, Any]:
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    return {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}


def _pair(sizes: tuple[int, ...], missing: int) -> tuple[int, int]:
    """Height and width, where a missing height is `missing`."""
    return (missing, *sizes) if len(sizes) == 1 else (sizes[0], sizes[1])
