"""`offpath::live_linear`: a few tokens, many of whose inputs are zero, on a GPU. For inference: it has no gradient."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from offpath.kernels.gpu.contest import live_pays
from offpath.kernels.gpu.live import MAX_TOKENS, live_matmul
from offpath.ops.library import as_rows, define, direct, is_differentiating


def live_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight + bias for `x` [..., in] of at most 4 tokens and `weight` [in, out] on one GPU, without a gradient.

    Only those rows of the weight are read whose input is not zero in every token. Raises `KernelError` for operands
    that do not fit or kernels that cannot run here.
    """
    return direct.live_linear(x, weight, bias)


def reads_live_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `live_linear` can be asked for this product, and is not slower than a dense one whatever x holds.

    Its first call for a shape measures that, in milliseconds.
    """
    tokens = x.shape[:-1].numel()
    if not x.is_cuda or not 0 < tokens <= MAX_TOKENS or torch.compiler.is_compiling():
        return False
    operands = (x, weight) if bias is None else (x, weight, bias)
    if is_differentiating() or (torch.is_grad_enabled() and any(operand.requires_grad for operand in operands)):
        return False
    alike = all(operand.dtype is x.dtype and operand.device == x.device for operand in operands)
    plain = alike and weight.is_contiguous() and (bias is None or bias.is_contiguous())
    if not plain or torch.is_autocast_enabled(x.device.type):
        return False
    # What only follows shapes has an address that nobody may read.
    fake = any(isinstance(operand, FakeTensor) for operand in operands)
    return not fake and live_pays(tokens, weight, bias)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = live_matmul(as_rows(x).contiguous(), weight, bias)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], weight.shape[1])


def _fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[1])


define("live_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", _forward, _fake)
