"""Sparse activations against what PyTorch has today: products, selection, an MLP layer, an autoencoder's step.

Run with: .venv/bin/python benchmarks/activations.py [--out FILE] [--rounds N]
Everything of one table is measured in turns, one call at a time: in training, no product finds its weight in the cache
because it has just been computed. Results are compared with float64 (or, where a whole step is timed, with
the dense step) before any time is reported. A ratio above 1 says how many times faster offpath is. GB/s are the bytes
that the product reads and writes if nothing stays in cache, beside the bandwidth of a copy-free read of the weight.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding_bag, linear

from measure import Timing, at_least_one, check_product, interleaved, machine_line, print_and_write, speedup
from offpath.nn import SparseAutoencoder, SparseInputLinear
from offpath.ops import SparseRows, above, topk_rows
from offpath.studies.memory import resident_bytes

K = 32


@dataclass(frozen=True)
class Size:
    """Samples, latents and width of an autoencoder."""

    batch: int
    latents: int
    width: int

    def __str__(self) -> str:
        return f"B={self.batch} N={self.latents} D={self.width} k={K}"


SIZES = (Size(512, 16384, 768), Size(2048, 32768, 576))


def _indices(size: Size, zipf: bool) -> Tensor:
    """K different latents for each sample: equally likely, or the r-th most frequent with weight 1 / r."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.ones(size.latents)
    if zipf:
        weights = 1 / (1 + torch.randperm(size.latents, generator=generator)).float()
    return torch.multinomial(weights.expand(size.batch, -1), K, generator=generator).sort().values


def _ratio(slow: Timing, fast: Timing) -> str:
    found = speedup(slow, fast)
    return f"{found.ratio:5.2f} (+-{found.spread:4.0%})"


def products(rounds: int) -> Iterator[str]:
    yield f"{'':<44}forward          values' gradient weight's gradient  forward, values, weight: GB/s of bandwidth"
    for size in SIZES:
        for dtype in (torch.float32, torch.bfloat16):
            for zipf in (False, True):
                yield _products(size, dtype, zipf, rounds)


def _products(size: Size, dtype: torch.dtype, zipf: bool, rounds: int) -> str:
    indices = _indices(size, zipf)
    values = torch.rand(size.batch, K).to(dtype)
    weight, dy = torch.randn(size.latents, size.width).to(dtype), torch.randn(size.batch, size.width).to(dtype)
    rows = SparseRows.from_topk(values, indices, size.latents)
    theirs = values.clone().requires_grad_(), weight.clone().requires_grad_()
    ours = rows.values.clone().requires_grad_(), weight.clone().requires_grad_()
    bag = [
        embedding_bag(indices, w, per_sample_weights=v, mode="sum")
        for v, w in ((theirs[0], weight), (values, theirs[1]))
    ]
    mine = [rows.with_values(v).matmul(w) for v, w in ((ours[0], weight), (rows.values, ours[1]))]
    _check_products(rows, weight, dy, [mine[0], *(_gradient(y, x, dy) for y, x in zip(mine, ours, strict=True))])
    timings = interleaved(
        {
            "bag": lambda: embedding_bag(indices, weight, per_sample_weights=values, mode="sum"),
            "rows": lambda: rows.matmul(weight),
            "bag values": lambda: _gradient(bag[0], theirs[0], dy),
            "rows values": lambda: _gradient(mine[0], ours[0], dy),
            "bag weight": lambda: _gradient(bag[1], theirs[1], dy),
            "rows weight": lambda: _gradient(mine[1], ours[1], dy),
            "read": weight.view(torch.float32).sum,  # whatever the bits mean
        },
        rounds,
        sample_seconds=0,
    )
    entry_bytes = weight.element_size()
    gathered, written = rows.nnz * size.width * entry_bytes, weight.numel() * entry_bytes
    moved = {"rows": gathered, "rows values": gathered, "rows weight": written}
    speeds = "  ".join(f"{moved[name] / timings[name].median_seconds / 1e9:3.0f}" for name in moved)
    bandwidth = weight.numel() * entry_bytes / timings["read"].median_seconds / 1e9
    name = f"{size} {'bf16' if dtype is torch.bfloat16 else 'fp32'} {'Zipf' if zipf else 'uniform'}"
    ratios = "  ".join(_ratio(timings[f"bag{what}"], timings[f"rows{what}"]) for what in ("", " values", " weight"))
    return f"{name:<44}{ratios}  {speeds} of {bandwidth:.0f}"


def _gradient(y: Tensor, x: Tensor, dy: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, dy, retain_graph=True)[0]


def _check_products(rows: SparseRows, weight: Tensor, dy: Tensor, results: list[Tensor]) -> None:
    dense, w, g = rows.to_dense().double(), weight.double(), dy.double()
    samples = torch.arange(rows.shape[0]).repeat_interleave(K)
    k, width = torch.tensor(K), torch.tensor(weight.shape[1])
    check_product("y", results[0].detach(), dense @ w, dense.abs() @ w.abs(), k)
    exact, sizes = (a[samples, rows.indices.long()] for a in (g @ w.t(), g.abs() @ w.abs().t()))
    check_product("gradient of the values", results[1], exact, sizes, width)
    hits = rows.counts()[:, None]
    check_product("gradient of the weight", results[2], dense.t() @ g, dense.abs().t() @ g.abs(), hits)


def selection(rounds: int) -> Iterator[str]:
    for rows, columns, k in ((512, 16384, 32), (256, 2048, 102)):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(rows, columns).to(dtype)
            expected = x.topk(k).values.sort().values
            if not torch.equal(topk_rows(x, k).values.view(rows, k).sort().values, expected):
                raise AssertionError("top-k chose other values than torch.topk")
            timings = interleaved(
                {"torch": lambda x=x, k=k: x.topk(k, sorted=False), "rows": lambda x=x, k=k: topk_rows(x, k)},
                rounds,
                sample_seconds=0,
            )
            yield f"top {k} of {columns}, {rows} rows, {dtype}: {_ratio(timings['torch'], timings['rows'])}"


class _DenseAutoencoder(nn.Module):
    """The same autoencoder in plain torch: every latent computed, the chosen ones scattered among zeros."""

    def __init__(self, sae: SparseAutoencoder) -> None:
        super().__init__()
        for name, parameter in sae.named_parameters():
            self.register_parameter(name, nn.Parameter(parameter.detach().clone()))

    def chosen(self, x: Tensor) -> torch.return_types.topk:
        return linear(x - self.decoder_bias, self.encoder_weight, self.encoder_bias).topk(K, sorted=False)

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        dense = values.new_zeros(values.shape[0], self.encoder_weight.shape[0]).scatter(1, indices, values)
        return dense @ self.decoder_weight

    def loss(self, x: Tensor) -> Tensor:
        values, indices = self.chosen(x)
        residual = x - self.decode(values.relu(), indices) - self.decoder_bias
        return residual.square().sum() / (x - x.mean(0)).square().sum()


class _EagerMix(_DenseAutoencoder):
    """The best of eager torch: top-k, then `embedding_bag` as the decoder."""

    def decode(self, values: Tensor, indices: Tensor) -> Tensor:
        return embedding_bag(indices, self.decoder_weight, per_sample_weights=values, mode="sum")


class _GatheredGradient(torch.autograd.Function):
    """The encoder whose backward pass gathers: what trainers of autoencoders write by hand."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        values, indices = linear(x, weight, bias).topk(K, sorted=False)
        ctx.save_for_backward(x, weight, indices)
        ctx.mark_non_differentiable(indices)
        return values, indices

    @staticmethod
    def backward(ctx, gradient, _):
        x, weight, indices = ctx.saved_tensors
        dx = embedding_bag(indices, weight, per_sample_weights=gradient, mode="sum")
        products = (gradient[:, :, None] * x[:, None, :]).flatten(0, 1)
        dweight = torch.zeros_like(weight).index_add_(0, indices.flatten(), products)
        dbias = weight.new_zeros(weight.shape[0]).index_add_(0, indices.flatten(), gradient.flatten())
        return dx, dweight, dbias


class _EagerGather(_EagerMix):
    """The same with the encoder's gradients gathered as well."""

    def chosen(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return _GatheredGradient.apply(x - self.decoder_bias, self.encoder_weight, self.encoder_bias)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
    optimizer.zero_grad()
    loss = model.loss(x)
    loss = loss if isinstance(loss, Tensor) else loss.total
    loss.backward()
    optimizer.step()
    return loss.detach()


def _autoencoder(size: Size) -> SparseAutoencoder:
    return SparseAutoencoder(size.width, size.latents, K, generator=torch.Generator().manual_seed(0))


STEPS: dict[str, Callable[[SparseAutoencoder], nn.Module]] = {
    "dense": _DenseAutoencoder,
    "top-k + embedding_bag": _EagerMix,
    "top-k + embedding_bag, gathered": _EagerGather,
    "offpath": lambda sae: sae,
}


def autoencoder_steps(rounds: int) -> Iterator[str]:
    for size in SIZES:
        x = torch.randn(size.batch, size.width, generator=torch.Generator().manual_seed(1))
        calls, losses = {}, {}
        for name, make in STEPS.items():
            model = make(_autoencoder(size))
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
            losses[name] = [_step(model, optimizer, x) for _ in range(3)]
            calls[name] = partial(_step, model, optimizer, x)
        for name, found in losses.items():
            # Sums in another order, and then Adam, which divides small gradients by their size: a part in 10^4.
            torch.testing.assert_close(found, losses["dense"], rtol=1e-4, atol=0, msg=f"{name}: another loss")
        timings = interleaved(calls, rounds, sample_seconds=0)
        for name in STEPS:
            yield f"{size} step, {name:<32} {timings[name].median_seconds * 1e3:7.1f} ms, offpath is " + _ratio(
                timings[name], timings["offpath"]
            )


def autoencoder_memory() -> Iterator[str]:
    for number, size in enumerate(SIZES):
        peaks = {}
        for name in ("dense", "top-k + embedding_bag", "offpath"):
            command = [sys.executable, __file__, "--memory", str(number), name]
            printed = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            peaks[name] = [int(megabytes) for megabytes in printed.split()]
        for name, (whole, beyond) in peaks.items():
            shares = [a / b for a, b in zip(peaks[name], peaks["dense"], strict=True)]
            yield (
                f"{size} memory, {name:<24} {whole:5d} MB ({shares[0]:4.0%} of dense), {beyond:5d} MB beyond weights, "
                f"gradients and moments ({shares[1]:4.0%})"
            )


def _print_memory(size: Size, name: str) -> None:
    x = torch.randn(size.batch, size.width)
    model = STEPS[name](_autoencoder(size))
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    held = resident_bytes("VmRSS")
    for _ in range(3):
        _step(model, optimizer, x)
    peak = resident_bytes("VmHWM")
    print(peak // 10**6, (peak - held) // 10**6)


def mlp_layer(rounds: int, batch: int = 256, width: int = 2048, k: int = 102) -> Iterator[str]:
    """Forward and backward of selection and layer, `k` of `width` units live; dense in bfloat16 and in float32."""
    calls = {}
    layers = {}
    for dtype in (torch.bfloat16, torch.float32):
        dense = nn.Linear(width, width, dtype=dtype)
        layers[dtype] = dense, SparseInputLinear.from_linear(dense)
        live = torch.distributions.Normal(0, 1).icdf(torch.tensor(1 - k / width))
        x = (torch.randn(batch, width) - live).to(dtype).requires_grad_()
        dy = torch.randn(batch, width).to(dtype)

        def run(layer: nn.Module, choose: Callable, x: Tensor = x, dy: Tensor = dy) -> None:
            for leaf in (x, *layer.parameters()):
                leaf.grad = None
            layer(choose(x)).backward(dy)

        for kind, (choose_dense, choose_rows) in {
            "ReLU": (torch.relu, above),
            "k-winners": (lambda x: _scattered_topk(x, k), lambda x: topk_rows(x, k)),
        }.items():
            _check_layer(kind, *layers[dtype], choose_rows(x))
            calls[dtype, kind, "dense"] = lambda run=run, c=choose_dense, d=dtype: run(layers[d][0], c)
            calls[dtype, kind, "rows"] = lambda run=run, c=choose_rows, d=dtype: run(layers[d][1], c)
    timings = interleaved(calls, rounds, sample_seconds=0)
    for dtype in layers:
        for kind in ("ReLU", "k-winners"):
            yield f"{width} x {width}, batch {batch}, {kind} at {k / width:.0%} live, {dtype}: " + _ratio(
                timings[dtype, kind, "dense"], timings[dtype, kind, "rows"]
            )


@torch.no_grad()
def _check_layer(name: str, dense: nn.Linear, layer: SparseInputLinear, rows: SparseRows) -> None:
    weight, bias, x = dense.weight.double(), dense.bias.double(), rows.to_dense().double()
    terms = (x != 0).sum(1, keepdim=True) + 1
    exact, size = linear(x, weight, bias), linear(x.abs(), weight.abs(), bias.abs())
    check_product(name, layer(rows), exact, size, terms, rounded=(exact - bias).abs())  # before the bias is added


def _scattered_topk(x: Tensor, k: int) -> Tensor:
    values, indices = x.topk(k, sorted=False)
    return torch.zeros_like(x).scatter(1, indices, values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/activations.txt"), help="default: %(default)s")
    parser.add_argument("--rounds", type=at_least_one, default=9, help="rounds of each table (default: %(default)s)")
    parser.add_argument("--memory", nargs=2, metavar=("SIZE", "NAME"), help="only print one process's peak, in MB")
    options = parser.parse_args()
    if options.memory:
        _print_memory(SIZES[int(options.memory[0])], options.memory[1])
        return
    tables = (table(options.rounds) for table in (products, selection, mlp_layer, autoencoder_steps))
    lines = chain([machine_line()], chain.from_iterable(tables), autoencoder_memory())
    print_and_write(lines, options.out)


if __name__ == "__main__":
    main()
