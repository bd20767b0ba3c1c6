"""`torch.func` on the models of the swap-ins: what autograd gives, also where the packages themselves refuse."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sae_lens
import torch
from sparsify import SaeConfig, SparseCoder
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, vmap

from checkers import assert_same
from offpath.swapins import sae_lens as of_sae_lens, sparsify as of_sparsify

WIDTH, LATENTS, K = 6, 24, 3
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),  # by SAELens
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # of a scatter in SAELens
]


def _coder(activation: str) -> nn.Module:
    return SparseCoder(WIDTH, SaeConfig(num_latents=LATENTS, k=K, activation=activation), dtype=torch.float64)


def _sae() -> nn.Module:
    options = {"d_in": WIDTH, "d_sae": LATENTS, "k": K, "dtype": "float64"}
    return sae_lens.TopKSAE(sae_lens.TopKSAEConfig(**options)).eval()


# Model, and what of it is looked at. What is decoded is zero everywhere and has tangents there.
LOOKS: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "topk coder": (lambda: _coder("topk"), lambda coder, x: coder(x).sae_out),
    "groupmax coder": (lambda: _coder("groupmax"), lambda coder, x: coder(x).sae_out),
    "pre-activations of a coder": (lambda: _coder("topk"), lambda coder, x: coder.encode(x).pre_acts),
    "topk SAE": (_sae, lambda sae, x: sae(x)),
    "decoder of an SAE": (_sae, lambda sae, x: sae.decode(nn.functional.pad(x - x.detach(), (0, LATENTS - WIDTH)))),
    "latents of an SAE": (_sae, lambda sae, x: sae.encode(x)),
}


@pytest.fixture(autouse=True)
def patched() -> Iterator[None]:
    with of_sparsify.patch(), of_sae_lens.patch():
        yield


@pytest.mark.parametrize("look", LOOKS)
def test_transforms_are_what_autograd_gives(look: str) -> None:
    torch.manual_seed(0)
    make, compute = LOOKS[look]
    model, x = make(), torch.randn(4, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    right = torch.autograd.functional.jacobian(lambda x: compute(model, x), x)
    assert bool(right.any())
    for transform in (jacrev, jacfwd):
        assert_same(transform(lambda x: compute(model, x))(x), right)
    one_by_one = vmap(lambda x: compute(model, x[None])[0])(x)
    assert_same(one_by_one, compute(model, x))
