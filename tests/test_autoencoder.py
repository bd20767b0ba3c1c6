"""`SparseAutoencoder` against a dense one, and what it goes through besides training."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from autoencoder_cases import D_MODEL, LATENTS, ROWS, K, sae_of, x_of
from children import numbers_of
from dense_autoencoder import dense_loss
from offpath.cost.bounds import gamma
from offpath.nn import SparseAutoencoder, row_blocks
from offpath.nn.autoencoder import ACTIVATIONS
from offpath.nn.autoencoder_loss import expect_variance

EXACT = {"rtol": 1e-9, "atol": 1e-12}  # float64, where both round at 1e-16


@pytest.fixture(params=ACTIVATIONS)
def activation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[1, 10_000], ids=["a row a block", "one block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_blocks, "BLOCK_ENTRIES", request.param)


@pytest.mark.parametrize("dead_share", [0.0, 0.05, 0.5, 1.0])
def test_loss_and_every_gradient_are_those_of_the_dense_one(activation: str, dead_share: float, blocks: None) -> None:
    sae, x = sae_of(activation, dead_after=1000), x_of().requires_grad_()
    # Latents that fire in this batch are not dead, whatever the counters said.
    sae.tokens_since_fired[: round(dead_share * LATENTS)] = 5000
    loss = sae.loss(x)
    dead = sae.tokens_since_fired >= 1000
    assert loss.dead == int(dead.sum()) and bool(dead.any()) == (dead_share > 0)
    expected = dense_loss(sae, x, dead)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(loss, name), value, **EXACT)
    leaves = dict(sae.named_parameters()) | {"x": x}
    got = torch.autograd.grad(loss.total, list(leaves.values()))
    for name, ours, theirs in zip(leaves, got, torch.autograd.grad(expected["total"], leaves.values()), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT, msg=lambda text, name=name: f"{name}: {text}")
        assert theirs.count_nonzero(), f"{name} has no gradient to compare"


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])  # JumpReLU's thresholds have estimates for gradients
def test_gradcheck(activation: str) -> None:
    generator = torch.Generator().manual_seed(3)
    sae = SparseAutoencoder(3, 7, 2, activation, dtype=torch.float64, generator=generator)
    x = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    names, parameters = zip(*sae.named_parameters(), strict=True)

    def loss(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(_Loss(sae), {f"sae.{n}": p for n, p in zip(names, parameters, strict=True)}, (x,))

    operands = [t.detach().clone().requires_grad_() for t in (x, *parameters)]
    assert torch.autograd.gradcheck(loss, operands)
    assert torch.autograd.gradgradcheck(loss, operands, fast_mode=True)


class _Loss(torch.nn.Module):
    def __init__(self, sae: SparseAutoencoder) -> None:
        super().__init__()
        self.sae = sae

    def forward(self, x: Tensor) -> Tensor:
        return self.sae.loss(x).total


def test_auxiliary_loss_reaches_the_encoder_of_dead_latents_alone() -> None:
    sae, x = sae_of(dead_after=1000), x_of()
    sae.tokens_since_fired[:] = 5000
    loss = sae.loss(x)
    loss.aux.backward()
    dead = sae.tokens_since_fired >= 1000
    for parameter in (sae.encoder_weight, sae.encoder_bias, sae.decoder_weight):
        per_latent = parameter.grad.view(LATENTS, -1).abs().sum(1)
        assert (per_latent[~dead] == 0).all() and (per_latent[dead] > 0).any()


def test_chosen_latents_that_are_not_positive_get_no_gradient(activation: str) -> None:
    sae = sae_of(activation, k_aux=0)
    with torch.no_grad():
        sae.encoder_bias.fill_(-100.0)
        sae.encoder_bias[5] = 100.0
    sae.loss(x_of()).total.backward()
    others = torch.arange(LATENTS) != 5
    assert (sae.encoder_weight.grad[others] == 0).all() and (sae.encoder_bias.grad[others] == 0).all()
    assert sae.encoder_bias.grad[5] != 0
    rows = sae.encode(x_of())
    assert rows.to_dense()[:, others].count_nonzero() == 0


def test_dead_counters_count_rows(activation: str) -> None:
    sae = sae_of(activation, dead_after=2 * ROWS)
    loss = sae.loss(x_of())
    fired = (sae.encode(x_of()).to_dense() > 0).any(0)
    assert torch.equal(sae.tokens_since_fired, torch.where(fired, 0, ROWS)) and loss.dead == 0
    sae.eval().loss(x_of())
    assert int(sae.tokens_since_fired.max()) == ROWS  # only training counts
    assert sae.train().loss(x_of()).dead == int((~fired).sum()) > 0


def test_forward_is_decode_of_encode_in_the_shape_of_the_input(activation: str) -> None:
    sae = sae_of(activation).eval()
    x = x_of().view(2, 3, 4, D_MODEL)
    rows = sae.encode(x)
    assert rows.shape == (ROWS, LATENTS)
    torch.testing.assert_close(sae(x), sae.decode(rows).view(x.shape), rtol=0, atol=0)
    torch.testing.assert_close(sae.loss(x).mse, (x - sae(x)).square().mean(), **EXACT)


def test_jumprelu_stores_only_the_live_in_eval() -> None:
    sae = sae_of("jumprelu")
    training, live = sae.encode(x_of()), sae.eval().encode(x_of())
    assert training.nnz > live.nnz and (live.values > 0).all()
    assert torch.equal(training.to_dense(), live.to_dense())


def test_a_threshold_of_jumprelu_has_its_whole_gradient_in_eval_or_none() -> None:
    sae = sae_of("jumprelu")
    gradients = [torch.autograd.grad(one.loss(x_of()).total, one.log_threshold)[0] for one in (sae, sae.eval())]
    assert torch.equal(*gradients) and gradients[0].count_nonzero()
    sae(x_of()).sum().backward()
    assert sae.log_threshold.grad is None and sae.encoder_weight.grad.count_nonzero()


def test_batch_topk_keeps_a_threshold_for_eval() -> None:
    sae = SparseAutoencoder(D_MODEL, LATENTS, K, "batch_topk", dtype=torch.float64)
    with pytest.raises(ValueError, match=r"train with loss\(\), or call calibrate_threshold_"):
        sae.eval().encode(x_of())
    sae.train()
    least = []
    for seed in range(4):
        sae.loss(x_of(seed=seed))
        least.append(sae.encode(x_of(seed=seed)).values.min())
    expected = least[0]
    for value in least[1:]:
        expected = expected + (value - expected) / 100
    torch.testing.assert_close(sae.threshold, expected.detach(), **EXACT)
    scores = (x_of() @ sae.encoder_weight.T).detach()
    assert torch.equal(sae.eval().encode(x_of()).to_dense(), scores.where(scores > sae.threshold, 0.0))
    sae.calibrate_threshold_(x_of())
    assert sae.encode(x_of()).nnz == K * ROWS  # the threshold is just below the least of them


def test_a_threshold_in_16_bits_follows_the_batches() -> None:
    """What one step of 100 adds would be lost in bfloat16."""
    saes = [sae_of("batch_topk", dtype=torch.float32), sae_of("batch_topk", dtype=torch.float32).bfloat16()]
    saes.append(sae_of("batch_topk", dtype=torch.bfloat16))
    for sae in saes:
        with torch.no_grad():
            sae.threshold.fill_(0.5)
            for seed in range(50):
                sae.loss(x_of(seed=seed, dtype=torch.bfloat16).to(sae.encoder_weight.dtype))
    assert [sae.threshold.dtype for sae in saes] == [torch.float32] * 3
    for sae in saes[1:]:
        # Pre-activations of 12 products and two biases in bfloat16, each rounded to 2^-9 of at most 4 or so.
        torch.testing.assert_close(sae.threshold, saes[0].threshold, atol=15 * 4 * 2**-9, rtol=0)
    assert saes[0].threshold > 0.5 + 15 * 4 * 2**-9


def test_rows_that_are_all_the_same_have_no_variance_to_explain(activation: str) -> None:
    sae = sae_of(activation, dtype=torch.float32)
    for rows in (7, 1000):
        with pytest.raises(ValueError, match=f"expected rows that differ, got {rows} that are all the same"):
            sae.loss(torch.full((rows, D_MODEL), 0.1))


def test_a_refused_batch_leaves_everything_as_it_was(activation: str) -> None:
    sae = sae_of(activation)
    before = {name: value.clone() for name, value in sae.state_dict().items()}
    with pytest.raises(ValueError, match="expected rows that differ"):
        sae.loss(torch.full((7, D_MODEL), 0.1, dtype=torch.float64))
    assert all(torch.equal(value, before[name]) for name, value in sae.state_dict().items())


def test_nobody_looks_at_the_variance_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu(torch.Tensor):
        is_cuda = True

    capturing = [True]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", capturing.pop)
    expect_variance(torch.zeros(()).as_subclass(OnGpu), 3)
    capturing.append(False)
    with pytest.raises(ValueError, match="expected rows that differ"):
        expect_variance(torch.zeros(()).as_subclass(OnGpu), 3)


def test_a_threshold_cannot_be_calibrated_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="topk has no threshold"):
        sae_of().calibrate_threshold_(x_of())
    sae = sae_of("jumprelu")
    before = sae.log_threshold.clone()
    sae.encoder_bias.data.fill_(-100.0)
    with pytest.raises(ValueError, match="expected 72 positive pre-activations"):
        sae.calibrate_threshold_(x_of())
    with pytest.raises(ValueError, match="expected rows to calibrate the threshold on"):
        sae.calibrate_threshold_(x_of(0))
    sae.encoder_bias.data.zero_()
    with pytest.raises(ValueError, match="expected finite pre-activations, got one of nan"):
        sae.calibrate_threshold_(torch.cat([x_of(), torch.full_like(x_of(1), torch.nan)]))
    assert torch.equal(sae.log_threshold, before)


def test_decoder_rows_keep_their_norm() -> None:
    sae = sae_of()
    sae.project_decoder_gradient_()  # nothing to project yet
    optimizer = torch.optim.Adam(sae.parameters(), lr=0.1)
    sae.loss(x_of()).total.backward()
    before = sae.decoder_weight.grad.clone()
    sae.project_decoder_gradient_()
    after = sae.decoder_weight.grad
    torch.testing.assert_close((after * sae.decoder_weight).sum(1), torch.zeros(LATENTS).double(), **EXACT)
    removed = before - after
    torch.testing.assert_close(removed, (removed * sae.decoder_weight).sum(1, True) * sae.decoder_weight, **EXACT)
    optimizer.step()
    sae.decoder_weight.data[3] = 0
    sae.normalize_decoder_()
    norms = sae.decoder_weight.norm(dim=1)
    assert norms[3] == 0
    torch.testing.assert_close(norms[4:], torch.ones(LATENTS - 4).double(), **EXACT)


@pytest.mark.parametrize("tied", [True, False])
def test_encoder_starts_as_the_decoder_or_on_its_own(tied: bool) -> None:
    sae = sae_of(tied_init=tied)
    assert torch.equal(sae.encoder_weight, sae.decoder_weight) == tied
    assert sae.encoder_weight.data_ptr() != sae.decoder_weight.data_ptr()
    assert torch.equal(sae.decoder_weight, sae_of(tied_init=tied).decoder_weight)


def test_checkpoints_and_copies(activation: str) -> None:
    sae = sae_of(activation)
    sae.loss(x_of())
    other = sae_of(activation, seed=1)
    other.load_state_dict(sae.state_dict())
    for twin in (other, copy.deepcopy(sae)):
        assert torch.equal(twin.eval()(x_of()), copy.deepcopy(sae).eval()(x_of()))
        assert torch.equal(twin.tokens_since_fired, sae.tokens_since_fired)
    weights = {"encoder_weight", "encoder_bias", "decoder_weight", "decoder_bias", "tokens_since_fired"}
    extra = {"batch_topk": {"threshold"}, "jumprelu": {"log_threshold"}}.get(activation, set())
    assert sae.state_dict().keys() == weights | extra


def test_autocast_computes_in_bfloat16_and_sums_in_float32(activation: str) -> None:
    sae = sae_of(activation, dtype=torch.float32, dead_after=1)
    x = x_of(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        rows, loss = sae.encode(x), sae.loss(x)
        assert rows.dtype is torch.bfloat16
    loss.total.backward()
    assert loss.total.dtype is torch.float32 and loss.dead > 0
    assert all(p.grad.dtype is torch.float32 and p.grad.isfinite().all() for p in sae.parameters())
    scores = ((x - sae.decoder_bias).bfloat16().double() @ sae.encoder_weight.bfloat16().double().T).detach()
    places = rows.to_dense() != 0
    bias = sae.encoder_bias.bfloat16().double().detach().expand_as(scores)[places]
    size = (x - sae.decoder_bias).abs().double() @ sae.encoder_weight.abs().double().T + sae.encoder_bias.abs()
    # The sum is rounded to float32 in each of its steps, and the result to bfloat16 (twice, where the bias is added
    # to a result that already was): the operands are at most 1 + 2^-8 of what `size` has.
    error = (rows.to_dense().double()[places] - scores[places] - bias).abs()
    bound = (2 * 2**-8 + gamma(torch.tensor(D_MODEL + 1), torch.float32)) * (1 + 2**-8) ** 2 * size[places]
    assert (error <= bound).all()


def test_empty_batch_has_no_loss(activation: str) -> None:
    sae = sae_of(activation, dead_after=1)
    sae.tokens_since_fired[:] = 5
    loss = sae.loss(x_of(0))
    loss.total.backward()
    assert loss.total == 0 and loss.l0 == 0 and loss.dead == LATENTS
    assert all(p.grad is None or p.grad.count_nonzero() == 0 for p in sae.parameters())
    assert sae(x_of(0).view(0, 2, D_MODEL)).shape == (0, 2, D_MODEL)


def test_nan_comes_out_as_nan_and_nothing_fires_by_it(activation: str, blocks: None) -> None:
    sae, x = sae_of(activation), x_of()
    x[0] = torch.nan
    before = sae.threshold.clone() if activation == "batch_topk" else None
    loss = sae.loss(x)
    assert loss.total.isnan()
    assert sae(x)[0].isnan().all()
    if activation != "batch_topk":  # there, NaN takes the places of others
        torch.testing.assert_close(sae(x)[1:], sae(x_of())[1:], **EXACT)
        assert torch.equal(sae.tokens_since_fired == 0, (sae.encode(x_of()[1:]).to_dense() > 0).any(0))
    else:
        assert torch.equal(sae.threshold, before)


def test_nothing_left_to_explain_is_no_nan() -> None:
    sae = sae_of(dead_after=1)
    with torch.no_grad():
        sae.encoder_bias.fill_(-100.0)
        sae.decoder_bias.fill_(1.0)
    sae.tokens_since_fired[:] = 5
    x = torch.ones(4, D_MODEL).double()
    x[0, 0] = 2.0
    loss = sae.loss(x)
    loss.total.backward()
    assert loss.fvu.isfinite() and all(p.grad.isfinite().all() for p in sae.parameters() if p.grad is not None)
    with pytest.raises(ValueError, match="expected rows that differ, got 1 that are all the same"):
        sae.loss(x[:1])


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 1.0), (torch.float16, 1e-4), (torch.bfloat16, 1.0)])
def test_activations_kept_in_16_bits_have_the_loss_of_the_same_numbers(
    activation: str, dtype: torch.dtype, scale: float
) -> None:
    """A sum of squares in float16 ends at 65,504, and those of small ones are 0."""
    sae = sae_of(activation, dtype=torch.float32)
    x = (scale * torch.randn(8192, D_MODEL, generator=torch.Generator().manual_seed(0))).to(dtype)
    short, wide = copy.deepcopy(sae).loss(x), sae.loss(x.float())
    assert torch.equal(short.fvu, wide.fvu) and short.fvu > 0


@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu"])
def test_no_matrix_of_all_latents_is_kept(activation: str) -> None:
    """A step on 8192 x 8192 latents, which are 256 MiB, with blocks of 16 MiB, against one on 512 rows."""
    code = f"""
import torch
from offpath.nn import SparseAutoencoder
torch.set_num_threads(1)
torch.manual_seed(0)
sae, x = SparseAutoencoder(16, 8192, 4, "{activation}"), torch.randn(8192, 16)
sae.calibrate_threshold_(x[:64])
sae.loss(x[:512]).total.backward()
before = peak_bytes()
sae.loss(x).total.backward()
print(before, peak_bytes())
"""
    before, after = numbers_of(code)
    assert after - before < 4 * 8192 * 8192 // 2


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["batch_topk", "jumprelu"])
def test_what_the_threshold_was_calibrated_by_lives(activation: str, dtype: torch.dtype) -> None:
    for scale in (1e-3, 1.0, 300.0):
        layer = SparseAutoencoder(4, 4, 1, activation=activation, tied_init=False, dtype=dtype)
        with torch.no_grad():
            layer.encoder_weight.copy_(torch.eye(4))
        x = (scale * torch.eye(4)).repeat(10, 1).to(dtype)
        layer.calibrate_threshold_(x)
        assert layer.eval().encode(x).crow_indices.diff().tolist() == [1] * 40
