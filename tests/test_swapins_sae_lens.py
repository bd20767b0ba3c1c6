"""`offpath.swapins.sae_lens` in the real package: its own trainer trains the same, and where its sparse path fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import sae_lens.saes.topk_sae as topk
import torch
from sae_lens import SAE, JumpReLUSAE, JumpReLUSAEConfig, SAETrainer, TopKSAE, TopKSAEConfig, TrainingSAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.sae import TrainStepInput
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from checkers import gamma, unit_roundoff
from offpath.swapins import sae_lens as swapin
from offpath.swapins.encoder import LazyPreActivations
from offpath.swapins.sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

WIDTH, LATENTS, ROWS, K = 12, 96, 32, 4
pytestmark = pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")  # by SAELens

# Two computations of float64 that differ in the order of their sums are the same in the eyes of float32.
FLOAT = unit_roundoff(torch.float32)

# What trains: (class, config class, patched, use_sparse_activations); the first is the definition.
WAYS = {
    "theirs": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, False, False),
    "patched": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, True, False),
    "patched-sparse": (sae_lens.TopKTrainingSAE, sae_lens.TopKTrainingSAEConfig, True, True),
    "ours": (TopKTrainingSAE, TopKTrainingSAEConfig, False, True),
    "ours-dense": (TopKTrainingSAE, TopKTrainingSAEConfig, False, False),
    "ours-patched": (TopKTrainingSAE, TopKTrainingSAEConfig, True, True),
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On so little data, threads only wait for one another."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _activations(dtype: torch.dtype = torch.float64) -> Iterator[Tensor]:
    """What a model would give: sums of a few of 40 directions."""
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(40, WIDTH, generator=generator, dtype=torch.float64)
    while True:
        strength = torch.rand(ROWS, 40, generator=generator, dtype=torch.float64)
        live = torch.rand(ROWS, 40, generator=generator) < 0.1
        yield (strength * live @ directions + 0.1).to(dtype)


def _sae(way: str, **options: Any) -> Any:
    make, config, _, sparse = WAYS[way]
    torch.manual_seed(0)
    options = {"dtype": "float64", "d_in": WIDTH, "d_sae": LATENTS, "k": K} | options
    return make(config(use_sparse_activations=sparse, **options))


def _patched(way: str) -> Any:
    return swapin.patch() if WAYS[way][2] else nullcontext()


def _train(way: str, steps: int = 8, **options: Any) -> tuple[Any, SAETrainer]:
    trainer_options = {name: options.pop(name) for name in ("dead_feature_window", "autocast") if name in options}
    sae = _sae(way, **options)
    cfg = SAETrainerConfig(steps * ROWS, ROWS, lr=1e-2, lr_end=1e-2, **trainer_options)
    trainer = SAETrainer(cfg, sae, _activations(sae.dtype))
    with _patched(way):
        trainer.fit()
    return sae, trainer


def _close(one: Tensor, other: Tensor) -> bool:
    return bool(((one - other).abs() <= FLOAT * other.abs().max()).all())


def _pass(way: str, sae: Any, x: Tensor, dead: Tensor | None = None) -> Any:
    step = TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    with _patched(way):
        return sae.training_forward_pass(step)


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("window", [1000, 1], ids=["all-live", "dead-latents"])
def test_their_trainer_trains_the_same(rescale: bool, window: int) -> None:
    """Eight steps of SAELens' `SAETrainer`, Adam and clipped gradients included, in float64."""
    options = {"rescale_acts_by_decoder_norm": rescale, "dead_feature_window": window}
    reference, trainer_of_theirs = _train("theirs", **options)
    assert bool(trainer_of_theirs.dead_neurons.any()) == (window == 1)
    for way in list(WAYS)[1:]:
        sae, trainer = _train(way, **options)
        for name, parameter in reference.named_parameters():
            assert _close(sae.get_parameter(name), parameter), (way, name)
        assert torch.equal(trainer.act_freq_scores, trainer_of_theirs.act_freq_scores), way
        assert torch.equal(trainer.dead_neurons, trainer_of_theirs.dead_neurons), way


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("dead", [True, False], ids=["dead-latents", "all-live"])
def test_losses_and_gradients_are_theirs(rescale: bool, dead: bool) -> None:
    x, mask = next(_activations()), torch.arange(LATENTS) % 3 == 0 if dead else None
    expected: dict[str, Tensor] = {}
    for way in WAYS:
        sae = _sae(way, rescale_acts_by_decoder_norm=rescale, apply_b_dec_to_input=True)
        with torch.no_grad():
            sae.b_enc.sub_(0.2)  # so that the ReLU of some of the chosen is shut
        out = _pass(way, sae, x, mask)
        out.loss.backward()
        found = out.losses | {"acts": out.feature_acts.to_dense(), "hidden_pre": out.hidden_pre + 0, "out": out.sae_out}
        found |= {f"gradient of {name}": parameter.grad for name, parameter in sae.named_parameters()}
        expected = expected or found
        assert (expected["acts"] > 0).sum(1).min() < K
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            assert _close(found[name], value), (way, name)


def test_their_sparse_path_cannot_train_by_default() -> None:
    """With the default rescale_acts_by_decoder_norm=True torch has no gradient of a sparse times a dense tensor."""
    sae = sae_lens.TopKTrainingSAE(
        sae_lens.TopKTrainingSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=K, use_sparse_activations=True)
    )
    x = next(_activations(torch.float32))
    out = _pass("theirs", sae, x)
    with pytest.raises(NotImplementedError):
        out.loss.backward()
    _pass("patched-sparse", sae, x).loss.backward()


def test_bfloat16_is_summed_in_float32_and_rounded_once() -> None:
    """Product and both gradients; SAELens' own, which is torch.sparse.mm, adds up in bfloat16."""
    generator, u = torch.Generator().manual_seed(0), unit_roundoff(torch.bfloat16)
    live = torch.rand(ROWS, LATENTS, generator=generator) < 0.2
    dense = (torch.randn(ROWS, LATENTS, generator=generator) * live).bfloat16()
    weight = torch.randn(LATENTS, WIDTH, generator=generator).bfloat16().requires_grad_()
    values = dense[live].requires_grad_()
    acts = torch.sparse_coo_tensor(live.nonzero().T, values, dense.shape, is_coalesced=True, check_invariants=True)
    with swapin.patch():
        y = topk._sparse_matmul_nd(acts, weight)
    ones = torch.ones_like(y)
    y.backward(ones)

    def bounded(found: Tensor, one: Tensor, other: Tensor, where: Any = ...) -> bool:
        """|found - one @ other| within the bound for any order of summation, and a rounding."""
        one, other = one.double(), other.detach().double()
        exact, size = (one @ other)[where], (one.abs() @ other.abs())[where]
        sums = gamma(torch.tensor(one.shape[1]), torch.float32) * size
        return bool(((found.detach().double() - exact).abs() <= sums + u * (exact.abs() + sums)).all())

    assert y.dtype is weight.grad.dtype is values.grad.dtype is torch.bfloat16
    assert bounded(y, dense, weight)
    assert bounded(weight.grad, dense.T, ones)
    assert bounded(values.grad, ones, weight.T, live)
    assert not bounded(topk._sparse_matmul_nd(acts, weight), dense, weight)


@pytest.mark.parametrize("way", ["patched-sparse", "ours", "ours-patched"])
def test_bfloat16_and_autocast_train(way: str) -> None:
    for options in ({"dtype": "bfloat16"}, {"dtype": "float32", "autocast": True}):
        sae, _ = _train(way, **options, dead_feature_window=3)
        untrained, x = _sae(way, dtype=options["dtype"]), next(_activations(sae.dtype))
        assert _pass(way, sae, x).losses["mse_loss"] < _pass(way, untrained, x).losses["mse_loss"]


@pytest.mark.parametrize("way", ["patched-sparse", "ours"])
def test_leading_dimensions_and_hooks(way: str) -> None:
    sae, reference = _sae(way), _sae("theirs")
    x = next(_activations()).view(4, 2, 4, WIDTH)
    with _patched(way):
        assert sae.encode(x).is_sparse
        assert _close(sae(x), reference(x))

    def halve(acts: Tensor, hook: Any) -> Tensor:
        return acts * (torch.arange(acts.shape[-1]) % 2)

    for hook in ("hook_sae_acts_pre", "hook_sae_acts_post"):
        hooks = [(hook, halve)]
        with _patched(way):
            found = sae.run_with_hooks(x, fwd_hooks=hooks)
        assert _close(found, reference.run_with_hooks(x, fwd_hooks=hooks)), hook
        assert not _close(found, reference(x)), hook


def test_no_dense_pre_activations_unless_somebody_asks() -> None:
    sae, x = _sae("ours"), next(_activations())
    sizes: list[int] = []

    def note(saved: torch.Tensor) -> torch.Tensor:
        sizes.append(saved.numel() if saved.layout is torch.strided else saved._nnz())
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        out = _pass("ours", sae, x, torch.zeros(LATENTS, dtype=torch.bool))
    assert isinstance(out.hidden_pre, LazyPreActivations)
    # The encoder itself is what is saved at most.
    assert max(sizes) <= LATENTS * WIDTH < ROWS * LATENTS
    dead = _pass("ours", sae, x, torch.ones(LATENTS, dtype=torch.bool))
    assert not isinstance(dead.hidden_pre, LazyPreActivations)


class _Names(TorchDispatchMode):
    """The ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("make", ["jumprelu", "topk"])
def test_inference_decodes_what_lives(make: str) -> None:
    torch.manual_seed(0)
    jumprelu = JumpReLUSAE(JumpReLUSAEConfig(d_in=WIDTH, d_sae=LATENTS, dtype="float64"))
    sae = (
        jumprelu
        if make == "jumprelu"
        else TopKSAE(TopKSAEConfig(d_in=WIDTH, d_sae=LATENTS, k=5, dtype="float64", rescale_acts_by_decoder_norm=True))
    )
    x = next(_activations()).view(2, 16, WIDTH)
    for threshold in (0.0, 4.0):  # half of the latents live, and few
        jumprelu.threshold.data.fill_(threshold)
        with torch.no_grad():
            theirs, few = sae(x), make == "topk" or threshold > 0
            with swapin.patch(), _Names() as ran:
                assert _close(sae(x), theirs)
        assert ("offpath::rows_matmul" in ran.names) == few
        acts = sae.encode(x).detach().requires_grad_()  # an attribution looks at what does not live, too
        with swapin.patch():
            sae.decode(acts).square().sum().backward()
        assert _close(acts.grad, torch.func.grad(lambda a: sae.decode(a).square().sum())(acts.detach()))


@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK", "AbsTopK"])
def test_relatives_of_topk_train_the_same(name: str) -> None:
    found = []
    for way in ("theirs", "patched"):
        torch.manual_seed(0)
        options = {"matryoshka_widths": [24, LATENTS], "use_matryoshka_aux_loss": True} if "Matr" in name else {}
        config = getattr(sae_lens, f"{name}TrainingSAEConfig")
        sae = getattr(sae_lens, f"{name}TrainingSAE")(
            config(d_in=WIDTH, d_sae=LATENTS, k=K, dtype="float64", **options)
        )
        out = _pass(way, sae, next(_activations()), torch.arange(LATENTS) % 3 == 0)
        out.loss.backward()
        found.append({"loss": out.loss} | {name: parameter.grad for name, parameter in sae.named_parameters()})
    for entry, value in found[0].items():
        assert _close(found[1][entry], value), entry


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
def test_checkpoints(rescale: bool, tmp_path: Path) -> None:
    """A training checkpoint comes back as it was, and what is saved for inference is SAELens' own class."""
    sae, _ = _train("ours", steps=2, rescale_acts_by_decoder_norm=rescale)
    x = next(_activations())
    sae.save_model(tmp_path / "training")
    again = TrainingSAE.load_from_disk(tmp_path / "training")
    assert type(again) is TopKTrainingSAE
    assert again.W_enc.T.is_contiguous() and sae.W_enc.T.is_contiguous()
    assert torch.equal(again(x), sae(x))
    sae.save_inference_model(tmp_path / "inference")
    inference = SAE.load_from_disk(tmp_path / "inference")
    assert type(inference) is sae_lens.TopKSAE
    assert _close(inference(x), sae(x))


def test_switching_off() -> None:
    before = topk.act_times_W_dec, topk.TopK.forward, JumpReLUSAE.decode
    with swapin.patch():
        assert topk.act_times_W_dec is not before[0]
    assert (topk.act_times_W_dec, topk.TopK.forward, JumpReLUSAE.decode) == before


def test_other_devices_are_theirs() -> None:
    x = next(_activations(torch.float32)).to("meta")
    sae = _sae("ours-dense", dtype="float32", device="meta")
    with swapin.patch():
        acts, hidden_pre = sae.encode_with_hidden_pre(x)
        assert acts.is_meta and not isinstance(hidden_pre, LazyPreActivations)
        assert sae.decode(acts).is_meta
