"""A JumpReLU autoencoder's gradients beside the same computed densely: with half of the latents live, and with k.

Run with: .venv/bin/python benchmarks/jumprelu.py [--out FILE] [--rounds N]
Takes half a minute. It begins with thresholds of 0.001, above which half of all latents live; `calibrate_threshold_`
makes that k. Losses and gradients are compared with the dense ones before any time is reported. A ratio above 1 says
how many times faster offpath is.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from measure import at_least_one, dtype_name, interleaved, machine_line, print_and_write, speedup
from offpath.cost.bounds import gamma
from offpath.nn import SparseAutoencoder

BATCH, LATENTS, WIDTH, K = 512, 8192, 512, 32


class _Jump(torch.autograd.Function):
    """JumpReLU and its estimated gradient over a whole matrix, as trainers of autoencoders write it."""

    @staticmethod
    def forward(ctx, scores, threshold, bandwidth):
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return scores * (scores > threshold)

    @staticmethod
    def backward(ctx, gradient):
        scores, threshold = ctx.saved_tensors
        near = (scores - threshold).abs() < ctx.bandwidth / 2
        return gradient * (scores > threshold), (near * (-threshold / ctx.bandwidth) * gradient).sum(0), None


class _Step(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, threshold, bandwidth):
        ctx.save_for_backward(scores, threshold)
        ctx.bandwidth = bandwidth
        return (scores > threshold).to(scores.dtype)

    @staticmethod
    def backward(ctx, gradient):
        scores, threshold = ctx.saved_tensors
        near = (scores - threshold).abs() < ctx.bandwidth / 2
        return None, (near * (-1 / ctx.bandwidth) * gradient).sum(0), None


class _Dense(nn.Module):
    def __init__(self, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.bandwidth = sae.bandwidth
        for name, parameter in sae.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def loss(self, x: Tensor) -> Tensor:
        scores = linear(x - self.decoder_bias, self.encoder_weight, self.encoder_bias)
        threshold = self.log_threshold.exp()
        residual = x - _Jump.apply(scores, threshold, self.bandwidth) @ self.decoder_weight - self.decoder_bias
        l0 = _Step.apply(scores, threshold, self.bandwidth).sum(dtype=torch.float32) / x.shape[0]
        centred = (x - x.mean(0)).float()
        return residual.float().square().sum() / centred.square().sum() + (l0 / K - 1).square()


def _backward(model: nn.Module, x: Tensor) -> Tensor:
    model.zero_grad()
    loss = model.loss(x)
    loss = loss if isinstance(loss, Tensor) else loss.total
    loss.backward()
    return loss.detach()


def steps(rounds: int) -> Iterator[str]:
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
        for live in ("half", "k"):
            sae = SparseAutoencoder(
                WIDTH, LATENTS, K, "jumprelu", dtype=dtype, generator=torch.Generator().manual_seed(0)
            )
            if live == "k":
                sae.calibrate_threshold_(x)
            dense = _Dense(sae)
            _check(sae, dense, x)
            found = interleaved({m: partial(_backward, m, x) for m in (sae, dense)}, rounds, sample_seconds=0)
            ratio = speedup(found[dense], found[sae])
            yield (
                f"B={BATCH} N={LATENTS} D={WIDTH} {dtype_name(dtype)}, {live} of the latents live: "
                f"{ratio.ratio:5.2f} (+-{ratio.spread:4.0%})"
            )


def _check(sae: SparseAutoencoder, dense: nn.Module, x: Tensor) -> None:
    losses = [_backward(model, x) for model in (sae, dense)]
    # The scores are the same bits, so the same latents live. From them to a gradient, numbers are rounded to the dtype
    # up to eight times (reconstruction, residual, its square, and backwards), and sums of up to all latents are in
    # another order.
    roundings = 8 * torch.finfo(x.dtype).eps / 2
    tolerance = roundings + float(gamma(torch.tensor(LATENTS), torch.float32))
    torch.testing.assert_close(losses[0], losses[1], rtol=tolerance, atol=0, check_dtype=False)
    for (name, ours), theirs in zip(sae.named_parameters(), dense.parameters(), strict=True):
        scale = theirs.grad.abs().max()
        torch.testing.assert_close(
            ours.grad / scale, theirs.grad / scale, rtol=0, atol=tolerance, msg=f"{name}: another gradient"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/jumprelu.txt"), help="default: %(default)s")
    parser.add_argument("--rounds", type=at_least_one, default=15, help="default: %(default)s")
    options = parser.parse_args()
    print_and_write(chain([machine_line()], steps(options.rounds)), options.out)


if __name__ == "__main__":
    main()
