"""Times of a sparse autoencoder's whole step - encoder, selection, decoder, loss, every gradient - beside a dense one.

Both have the same weights and compute the same function; the dense one writes all latents out. There is no optimizer,
which would be the same for both. The auxiliary loss is off: no latent is dead in a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional

from gpu.check import sums
from gpu.jobs import Job, Raced, Sides, Wanted, require
from gpu.timing import Effort, captured
from measure import WrongResult
from offpath import ops
from offpath.cost.bounds import Expected
from offpath.nn import SparseAutoencoder
from verdicts import Figure

SECTION, GRAPH_SECTION = "Autoencoder, whole training step", "Autoencoder, whole training step in a CUDA graph"
DENSE, OURS, OVER_DENSE = "dense bf16", "offpath", "over dense bf16"
DTYPE = torch.bfloat16
Size = tuple[int, int, int, int]  # latents, k, width, tokens
SIZE, QUICK_SIZE = (65536, 64, 4096, 4096), (8192, 32, 512, 512)
CHECKED = 16  # rows and latents that are compared with float64
KERNELS = "encode_topk", "batch_topk", "gather_sum", "gather_dot", "encoder_gradients", "row_gradients"


@dataclass(frozen=True)
class Step:
    """An autoencoder, a batch of it, and both ways to a loss and its gradients."""

    sae: SparseAutoencoder
    x: Tensor

    def ours(self) -> tuple[Tensor, ...]:
        return self._gradients(self.sae.loss(self.x).total)

    def dense(self) -> tuple[Tensor, ...]:
        return self._gradients(dense_loss(self.sae, self.x))

    def without_loss(self) -> tuple[Tensor, ...]:
        """The encoder, the decoder and their gradients."""
        return self._gradients(self.sae.decode(self.sae.encode(self.x)).sum())

    def _gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return (loss.detach(), *torch.autograd.grad(loss, list(self.sae.parameters())))


def jobs(quick: bool, effort: Effort, device: torch.device) -> Iterator[Job]:
    size = QUICK_SIZE if quick else SIZE
    latents, k, width, tokens = size
    name = f"{latents} latents, k={k}, width {width}, {tokens} tokens"
    for section, row, activation, measure in (
        (SECTION, "TopK", "topk", _eager),
        (GRAPH_SECTION, "TopK", "topk", _in_graphs),
        (SECTION, "BatchTopK", "batch_topk", _eager),
    ):
        wanted = Wanted(Figure(section, f"{row}, {name}", OVER_DENSE), OURS, (DENSE,))
        yield Job((wanted,), KERNELS, partial(measure, activation, size, effort, device))


def dense_loss(sae: SparseAutoencoder, x: Tensor) -> Tensor:
    """The loss of `sae` in plain torch, which counts what fired like the other; of equal scores, any are chosen."""
    scores = functional.linear(x - sae.decoder_bias, sae.encoder_weight, sae.encoder_bias)
    rows = scores if sae.activation == "topk" else scores.view(1, -1)
    best = rows.topk(sae.k * (scores.shape[0] // rows.shape[0]), sorted=False)
    latents = torch.zeros_like(rows).scatter(1, best.indices, best.values.relu()).view_as(scores)
    with torch.no_grad():
        sae.tokens_since_fired += x.shape[0]
        sae.tokens_since_fired.masked_fill_((latents > 0).any(0), 0)
    residual = x - functional.linear(latents, sae.decoder_weight.t(), sae.decoder_bias)
    return residual.square().sum() / (x - x.mean(0)).square().sum()


@lru_cache(maxsize=1)
def drawn(size: Size, activation: str, device: torch.device) -> Step:
    latents, k, width, tokens = size
    options = {"aux_coefficient": 0.0, "dtype": DTYPE}
    # What it draws itself comes from the CPU, and would take longer than all that is measured.
    sae = SparseAutoencoder(width, latents, k, activation, device="meta", **options).to_empty(device=device)
    with torch.no_grad():
        sae.tokens_since_fired.zero_()
        if activation == "batch_topk":
            sae.threshold.fill_(torch.nan)
        for weight in (sae.encoder_weight, sae.decoder_weight):
            weight.normal_(std=width**-0.5)
        for bias in (sae.encoder_bias, sae.decoder_bias):
            bias.normal_(std=0.01)
    return Step(sae, torch.randn(tokens, width, dtype=DTYPE, device=device))


def _eager(activation: str, size: Size, effort: Effort, device: torch.device) -> Raced:
    step = drawn(size, activation, device)
    check(step)
    return Sides({DENSE: [step.dense], OURS: [step.ours]}).race(effort, graphs=False)


def _in_graphs(activation: str, size: Size, effort: Effort, device: torch.device) -> Raced:
    """Both from a graph of one step: where one cannot be captured, there is an error and no other comparison."""
    step = drawn(size, activation, device)
    check(step)
    raced = Sides({DENSE: [captured(step.dense)], OURS: [captured(step.ours)]}).race(effort, graphs=False)
    return replace(raced, replayed=frozenset(raced.times))  # captured here, not by the race


def check(step: Step) -> None:
    """Raises `WrongResult` for a selection, a product or a gradient that is off, `RuntimeError` for a wait."""
    step.ours()  # what the kernels cost is measured once, and that waits
    sae, x = step.sae, step.x
    with waits_refused():
        if sae.activation == "topk":
            step.without_loss()
        else:  # the encoder has to know in the end how many are positive
            ops.batch_topk(x, x.shape[0])
    rows = sae.encode(x)
    y = sae.decode(rows)
    loss = (x - y).square().sum() / x.numel()
    weights = sae.decoder_weight, sae.encoder_weight
    dy, dvalues, *gradients = torch.autograd.grad(loss, (y, rows.values, *weights))
    with torch.no_grad():
        rows = rows.detach()
        latents, dlatents = rows.to_dense(), rows.with_values(dvalues).to_dense()
        some = torch.randperm(x.shape[0], device=x.device)[:CHECKED]
        check_selection(step, latents, some)
        right = _product(latents[some], sae.decoder_weight)
        product = rows.matmul(sae.decoder_weight)
        require("the reconstruction", product, Expected(right.exact, right.bound, (some,), tuple(x.shape)))
        some = torch.randperm(sae.latents, device=x.device)[:CHECKED]
        for name, gradient, of, by in (
            ("decoder", gradients[0], latents, dy),
            ("encoder", gradients[1], dlatents, x - sae.decoder_bias),
        ):
            right = _product(of[:, some].t(), by)
            whole = Expected(right.exact, right.bound, (some,), tuple(gradient.shape))
            require(f"the gradient of the {name}", gradient, whole)


def check_selection(step: Step, latents: Tensor, some: Tensor) -> None:
    """Raises `WrongResult` unless the latents of some rows are their scores, and none of the others is larger."""
    sae, live = step.sae, latents != 0
    if int(live.sum()) != sae.k * latents.shape[0]:
        raise WrongResult(f"{int(live.sum())} latents live, {sae.k} a row were wanted")
    least = latents.where(live, torch.inf)
    least = least.amin(1, keepdim=True)[some] if sae.activation == "topk" else least.min()
    latents, live = latents[some], live[some]
    centered, bias = step.x[some] - sae.decoder_bias, sae.encoder_bias
    right = _product(centered, sae.encoder_weight.t(), bias)
    off = live & ~((latents - right.exact).abs() <= right.bound) | ~live & ~(right.exact - right.bound <= least)
    if bool(off.any()):
        raise WrongResult(f"the selection is off at {int(off.sum())} of {off.numel()} places")


def _product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Expected:
    """left @ right + bias; zeros on the left are no terms."""
    one, other = left.double(), right.double()
    exact, size, terms = one @ other, one.abs() @ other.abs(), (one != 0).sum(1, keepdim=True)
    if bias is not None:
        exact, size, terms = exact + bias.double(), size + bias.double().abs(), terms + 1
    return sums(exact, size, terms, left.dtype)


@contextmanager
def waits_refused() -> Iterator[None]:
    """Whatever waits for the device raises `RuntimeError`."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
