"""`offpath.swapins.sparsify` in the real package: the same training where theirs is right, else exact gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import sparsify
import torch
from datasets import Dataset
from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer
from sparsify.fused_encoder import EncoderOutput
from torch import Tensor
from torch.nn import functional as F
from transformers import GPT2Config, GPT2Model

from checkers import gamma, unit_roundoff
from offpath.kernels import KernelError
from offpath.swapins import sparsify as swapin
from offpath.swapins.encoder import LazyPreActivations, activations_at
from offpath.swapins.patching import Patch, SwapInError

WIDTH, LATENTS, ROWS = 12, 64, 40
# Two computations of float64 that differ in the order of their sums are the same in the eyes of float32.
FLOAT = unit_roundoff(torch.float32)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so little data, threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _plain(input: Tensor, weight: Tensor, bias: Tensor, k: int, activation: str) -> EncoderOutput:
    """The formula, for autograd: what both encoders claim to compute."""
    pre_acts = F.relu(F.linear(input, weight, bias))
    if activation == "topk":
        return EncoderOutput(*pre_acts.topk(k), pre_acts)
    values, indices = pre_acts.unflatten(-1, (k, -1)).max(-1)
    return EncoderOutput(values, indices + torch.arange(k) * (weight.shape[0] // k), pre_acts)


def _with(encoder: Callable) -> AbstractContextManager:
    return Patch([(sparsify.sparse_coder, "fused_encoder", encoder)])


WAYS = {"theirs": nullcontext, "ours": swapin.patch, "plain": lambda: _with(_plain)}


def _small_integers(*shape: int, most: int, seed: int) -> Tensor:
    return torch.randint(-most, most + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def _coder(integers: bool = False, shut: bool = False, **options: Any) -> SparseCoder:
    """In float64. `integers`: no two pre-activations of a row are the same; `shut`: many of the chosen are negative."""
    torch.manual_seed(3)
    coder = SparseCoder(WIDTH, SaeConfig(num_latents=LATENTS, **{"k": 4} | options), dtype=torch.float64)
    with torch.no_grad():
        if integers:
            coder.encoder.weight.copy_(_small_integers(LATENTS, WIDTH, most=1, seed=1))
            coder.W_dec.copy_(_small_integers(LATENTS, WIDTH, most=1, seed=2))
            coder.encoder.bias.copy_(torch.arange(LATENTS) / LATENTS)
        if shut:
            coder.encoder.bias.sub_(1.4)
    return coder


def _x(seed: int = 0) -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _dead() -> Tensor:
    return torch.arange(LATENTS) % 3 == 0


def _gradients(way: str, coder: SparseCoder, dead_mask: Tensor | None = None) -> dict[str, Tensor]:
    with WAYS[way]():
        out = coder(_x(), dead_mask=dead_mask)
        (out.fvu + out.auxk_loss + out.multi_topk_fvu / 8).backward()
    return {name: parameter.grad for name, parameter in coder.named_parameters()}


def _close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(bool(((one[n] - other[n]).abs() <= FLOAT * other[n].abs().max()).all()) for n in other)


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_training_is_theirs_bit_for_bit_where_every_sum_is_exact(activation: str) -> None:
    """Small integers in float64, a power of two as variance and learning rate: no sum of the step rounds."""
    runs = []
    for way in ("theirs", "ours"):
        coder = _coder(integers=True, activation=activation)
        optimizer = torch.optim.SGD(coder.parameters(), lr=2.0**-4)
        with WAYS[way]():
            x = _small_integers(ROWS, WIDTH, most=2, seed=10)
            out = coder(x, total_variance=torch.tensor(2.0**12, dtype=torch.float64))
        assert out.latent_acts.min() > 0, "theirs is right only where every ReLU is open"
        out.fvu.backward()
        optimizer.step()
        runs.append([out.fvu.detach(), *coder.parameters()])
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
@pytest.mark.parametrize(
    ("options", "dead", "theirs_is_right"),
    [
        ({}, False, True),
        ({"skip_connection": True}, False, True),
        ({"k": LATENTS}, False, False),  # where k decays, it begins with all of them: most ReLUs are shut
        ({"shut": True}, False, False),
        ({}, True, False),
        ({"multi_topk": True}, False, False),
        ({"multi_topk": True, "shut": True}, True, False),
    ],
    ids=lambda value: "-".join(value) or "usual" if isinstance(value, dict) else None,
)
def test_gradients_are_those_of_the_formula(activation: str, options: dict, dead: bool, theirs_is_right: bool) -> None:
    found = {way: _gradients(way, _coder(activation=activation, **options), _dead() if dead else None) for way in WAYS}
    assert _close(found["ours"], found["plain"])
    assert _close(found["theirs"], found["plain"]) == theirs_is_right


def test_losses_are_theirs() -> None:
    for options in ({}, {"multi_topk": True}, {"activation": "groupmax", "shut": True, "multi_topk": True}):
        for k in (16, 9, 4) if "activation" not in options else (16, 8, 4):  # it changes from step to step
            outs = []
            for way in ("theirs", "ours"):
                coder = _coder(**options)
                coder.cfg.k = k
                with WAYS[way]():
                    outs.append(coder(_x(), dead_mask=_dead()))
            theirs, ours = outs
            for name in ("fvu", "auxk_loss", "multi_topk_fvu", "sae_out"):
                reference = getattr(theirs, name)
                assert (getattr(ours, name) - reference).abs().max() <= FLOAT * reference.abs().max(), name
            assert ours.latent_indices.dtype is theirs.latent_indices.dtype


def _trainer(tmp_path: Any, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = GPT2Model(GPT2Config(n_embd=WIDTH, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    tokens = torch.randint(50, (24, 16), generator=torch.Generator().manual_seed(1))
    data = Dataset.from_dict({"input_ids": tokens}).with_format("torch")
    cfg = TrainConfig(
        SaeConfig(num_latents=LATENTS, k=6, multi_topk=options.pop("multi_topk", False)),
        batch_size=4,
        hookpoints=["h.0"],
        log_to_wandb=False,
        save_dir=str(tmp_path),
        **options,
    )
    trainer = Trainer(cfg, data, model.eval())
    model.double()
    trainer.saes["h.0"].double()
    return trainer


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set")
@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({"optimizer": "signum", "k_decay_steps": 4}, "plain"),
        ({"optimizer": "adam", "lr": 1e-3, "lr_warmup_steps": 0, "micro_acc_steps": 2}, "theirs"),
        ({"optimizer": "adam", "lr": 1e-3, "auxk_alpha": 0.5, "dead_feature_threshold": 64}, "plain"),
        ({"optimizer": "adam", "lr": 1e-3, "multi_topk": True}, "plain"),
    ],
    ids=["signum-k-decays", "adam", "auxk", "multi-topk"],
)
def test_their_trainer_trains_the_same(options: dict, reference: str, tmp_path: Any) -> None:
    """Six steps of sparsify's own `Trainer` on a transformer's activations, in float64."""
    before = torch.get_float32_matmul_precision()
    found = {}
    try:
        for way in (reference, "ours"):
            trainer = _trainer(tmp_path, **options)
            with WAYS[way]():
                trainer.fit()
            found[way] = dict(trainer.saes["h.0"].named_parameters())
    finally:
        torch.set_float32_matmul_precision(before)  # the trainer sets it for the process
    assert _close(found["ours"], found[reference])


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_leading_dimensions_and_pre_acts_on_demand(activation: str) -> None:
    coder, x = _coder(activation=activation, shut=True), _x().view(4, 5, 2, WIDTH)
    plain = _plain(x, coder.encoder.weight, coder.encoder.bias, 4, activation) if activation == "topk" else None
    with swapin.patch():
        out = coder.encode(x)
        flat = coder.encode(x.view(ROWS, WIDTH))
        assert coder.decode(out.top_acts, out.top_indices).shape == x.shape
    assert isinstance(out.pre_acts, LazyPreActivations)
    assert out.top_acts.shape == out.top_indices.shape == (4, 5, 2, 4)
    assert torch.equal(out.top_acts.view(ROWS, 4), flat.top_acts)
    if plain is not None:
        assert _close({"": out.top_acts.sort().values}, {"": plain.top_acts.sort().values})
    assert torch.equal(out.pre_acts.gather(-1, out.top_indices) > 0, out.top_acts > 0)
    weights = torch.randn(4, 5, 2, LATENTS, dtype=torch.float64)
    lazy, eager = (
        torch.autograd.grad((pre * weights).sum(), list(coder.encoder.parameters()))
        for pre in (out.pre_acts, F.relu(coder.encoder(x)))
    )
    assert _close(dict(zip("wb", lazy, strict=True)), dict(zip("wb", eager, strict=True)))


def test_all_pre_activations_are_stored_only_where_they_are_used() -> None:
    def stored(**options: Any) -> bool:
        sizes: list[int] = []
        with (
            swapin.patch(),
            torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.numel()) or t, lambda t: t),
        ):
            _coder(**options)(_x(), dead_mask=torch.zeros(LATENTS, dtype=torch.bool))
        return max(sizes) >= ROWS * LATENTS

    assert not stored() and not stored(activation="groupmax")
    assert stored(multi_topk=True)


@pytest.mark.parametrize("looks", [True, False])
def test_a_look_without_gradients_leaves_the_pre_activations_theirs(looks: bool) -> None:
    with swapin.patch():
        torch.manual_seed(0)
        coder, x = SparseCoder(8, SaeConfig(num_latents=32, k=4)), torch.randn(16, 8)
        out = coder.encode(x)
        if looks:
            with torch.no_grad():
                out.pre_acts.mean()  # a log
        (seen,) = torch.autograd.grad(out.pre_acts.sum(), coder.encoder.weight)
        (expected,) = torch.autograd.grad(F.relu(coder.encoder(x)).sum(), coder.encoder.weight)
        assert _close({"": seen}, {"": expected})
        with torch.no_grad():
            out = coder.encode(x)
        assert not (out.pre_acts + 0).requires_grad


def test_the_gradient_of_a_bias_in_16_bits_is_summed_wide() -> None:
    """A latent that fires in every one of 8192 rows: bfloat16 counts to 256."""
    x, weight = torch.zeros(8192, 4).bfloat16(), torch.zeros(3, 4).bfloat16()
    bias = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    activations_at(torch.ones(8192, 1).int(), x, weight, bias).sum().backward()
    assert bias.grad.tolist() == [0, 8192, 0]


def test_pre_acts_of_an_encoder_that_has_changed_are_refused() -> None:
    coder = _coder()
    with swapin.patch():
        seen, late = coder.encode(_x()), coder.encode(_x())
    before = seen.pre_acts + 0
    with torch.no_grad():
        coder.encoder.weight.mul_(2)
    assert torch.equal(seen.pre_acts + 0, before)
    with pytest.raises(RuntimeError, match="written to since"):
        late.pre_acts.sum()
    with pytest.raises(RuntimeError, match="torch function"), torch._C.DisableTorchFunctionSubclass():
        seen.pre_acts + 0


@pytest.mark.parametrize("activation", ["topk", "groupmax"])
def test_autocast(activation: str) -> None:
    """bfloat16 under autocast, and each rounding of it accounted for: u for each operand, result and bias."""
    coder, x = _coder(activation=activation).float(), _x().float()
    weight, bias = coder.encoder.weight, coder.encoder.bias
    with torch.no_grad():
        bias.normal_()
    with swapin.patch(), torch.autocast("cpu", torch.bfloat16):
        acts, indices, pre_acts = coder.encode(x)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = sparsify.sparse_coder.fused_encoder(x, weight, bias, 4, activation)
    assert acts.dtype is theirs.top_acts.dtype is torch.bfloat16
    assert pre_acts.dtype is theirs.pre_acts.dtype
    acts.sum().backward()
    wide, u = weight.double()[indices], unit_roundoff(torch.bfloat16)
    exact = torch.einsum("bd,bkd->bk", x.double(), wide) + bias.double()[indices]
    size = torch.einsum("bd,bkd->bk", x.double().abs(), wide.abs()) + bias.double()[indices].abs()
    sum_of = gamma(torch.tensor(WIDTH + 1), torch.float32)
    # Operands, the product, and where the bias is added afterwards the sum as well.
    assert ((acts.double() - exact.relu()).abs() <= ((1 + u) ** 4 * (1 + sum_of) - 1) * size).all()
    open_ones = (acts > 0).double()
    hits = torch.zeros(ROWS, LATENTS, dtype=torch.float64).scatter(1, indices, open_ones)
    bound = ((1 + u) ** 2 * (1 + gamma(torch.tensor(ROWS), torch.float32)) - 1) * (hits.T @ x.double().abs())
    assert ((weight.grad.double() - hits.T @ x.double()).abs() <= bound).all()


def test_other_devices_are_theirs() -> None:
    coder = _coder().to("meta")
    with swapin.patch():
        out = coder.encode(_x().to("meta"))
        assert not isinstance(out.pre_acts, LazyPreActivations) and out.pre_acts.is_meta
        assert coder.decode(out.top_acts, out.top_indices).is_meta


def test_bad_input() -> None:
    coder, x = _coder(), _x()
    with swapin.patch():
        for k, activation in ((LATENTS + 1, "topk"), (7, "groupmax"), (0, "groupmax"), (4, "relu")):
            coder.cfg.k, coder.cfg.activation = k, activation
            with pytest.raises(KernelError, match="expected"):
                coder.encode(x)
        with pytest.raises(KernelError, match="indices"):
            coder.decode(torch.ones(1, 1, dtype=torch.float64), torch.tensor([[LATENTS]]))
        coder.cfg.k, coder.cfg.activation = 4, "topk"
        assert coder.encode(x[:0]).top_acts.shape == (0, 4)


@pytest.fixture
def names() -> Iterator[Callable[[], list]]:
    yield lambda: [
        sparsify.sparse_coder.fused_encoder,
        sparsify.sparse_coder.decoder_impl,
        sparsify.utils.decoder_impl,
        SparseCoder.forward,
    ]


def test_switching_on_and_off(names: Callable[[], list], monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = names()
    patch = swapin.patch()
    assert not any(a is b for a, b in zip(names(), theirs, strict=True))
    with swapin.patch():  # the second one leaves all to the first
        pass
    assert names()[0] is swapin.encode
    with _with(_plain), pytest.raises(SwapInError, match="fused_encoder"):
        patch.undo()
    again = swapin.patch()  # as a cell of a notebook does that runs twice
    assert repr(again) == repr(patch)
    again.undo()
    patch.undo()
    assert names() == theirs and repr(again) == repr(patch) == "Patch(undone)"
    later = swapin.patch()
    patch.undo()  # what was undone once is no longer this handle's
    assert names()[0] is swapin.encode
    later.undo()
    with swapin.patch() as patch:
        patch.undo()
        monkeypatch.setattr(sparsify.sparse_coder, "fused_encoder", _plain)  # somebody else's, from now on
    assert names()[0] is _plain


def test_an_unknown_version_is_refused_as_a_whole(names: Callable[[], list], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sparsify.utils, "decoder_impl")
    before = vars(sparsify.sparse_coder).copy()
    with pytest.raises(SwapInError, match=r"sparsify\.utils\.decoder_impl"):
        swapin.patch()
    assert vars(sparsify.sparse_coder) == before
