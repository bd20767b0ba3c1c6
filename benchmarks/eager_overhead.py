"""What a call costs besides the arithmetic: tiny layers of each kind on the CPU, against torch's dense ones.

Run with: .venv/bin/python benchmarks/eager_overhead.py
Prints medians of interleaved runs and their ratios; the bar of `SparseLinear` is 3x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from gpu.autoencoder import dense_loss
from measure import interleaved, machine_line
from offpath import SparseLinear
from offpath.nn import SparseAutoencoder, SparseConv2d, SparseInputLinear, TopK

ROUNDS, SAMPLE_SECONDS = 31, 0.005
Call = Callable[[], object]


def _step(layer: nn.Module, x: Tensor) -> None:
    layer.zero_grad()
    layer(x).sum().backward()


def _step_of_loss(sae: SparseAutoencoder, loss: Callable[[], Tensor]) -> None:
    sae.zero_grad()
    loss().backward()


def _without_gradient(layer: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        layer(x)


def _calls() -> Iterator[tuple[str, Call, Call]]:
    """What is done, by torch, and by us."""
    x, image = torch.randn(16, 64), torch.randn(1, 4, 6, 6)
    for name, dense, sparse, of in (
        ("SparseLinear", nn.Linear(64, 64), SparseLinear(64, 64, sparsity=0.9), x),
        ("SparseConv2d", nn.Conv2d(4, 8, 3), SparseConv2d(4, 8, 3, sparsity=0.9), image),
        ("TopK, SparseInputLinear", nn.Linear(64, 64), nn.Sequential(TopK(8), SparseInputLinear(64, 64)), x),
    ):
        for what, run in (("forward, no grad", _without_gradient), ("forward", nn.Module.__call__), ("step", _step)):
            yield f"{name}: {what}", partial(run, dense, of), partial(run, sparse, of)
    for activation in ("topk", "batch_topk"):
        sae, of = SparseAutoencoder(16, 64, k=4, activation=activation, aux_coefficient=0), torch.randn(16, 16)
        losses = partial(dense_loss, sae, of), lambda sae=sae, of=of: sae.loss(of).total
        yield (f"SparseAutoencoder, {activation}: step", *(partial(_step_of_loss, sae, loss) for loss in losses))


def main() -> None:
    torch.manual_seed(0)
    print(machine_line())
    for name, torchs, ours in _calls():
        times = interleaved({"dense": torchs, "sparse": ours}, ROUNDS, SAMPLE_SECONDS)
        d, s = (times[key].median_seconds * 1e6 for key in ("dense", "sparse"))
        print(f"{name:<41} dense {d:7.1f} us   sparse {s:7.1f} us   ratio {s / d:.2f}")


if __name__ == "__main__":
    main()
