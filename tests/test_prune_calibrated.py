"""Wanda and SparseGPT: the papers' formulas, the walk through the model, and that it leaves no trace."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import offpath
import prune_oracle as oracle
from offpath.convert.prune import sparsegpt, wanda

U32 = 2.0**-24
CALIBRATED = ["wanda", "sparsegpt"]


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _tokens(columns: int, seed: int = 1) -> Tensor:
    """Inputs that depend on one another and differ in size, as those of real layers do."""
    return _randn(3, 25, columns, seed=seed) @ (_randn(columns, columns, seed=seed + 1) * torch.arange(1, columns + 1))


def _disagrees_with_wanda(kept: int, columns: int = 24) -> bool:
    linear, x = nn.Linear(columns, 7, dtype=torch.float64), _tokens(columns)
    linear.weight.data = _randn(7, columns)
    expected = oracle.wanda(linear.weight.detach().numpy(), x.view(-1, columns).numpy(), kept)
    offpath.prune(linear, 1 - kept / columns, "wanda", calibration=list(x))
    return not np.array_equal(linear.weight.detach().numpy(), expected)


def _disagrees_with_sparsegpt(kept: int, blocksize: int, dampening: float = 0.01, columns: int = 24) -> bool:
    linear, x = nn.Linear(columns, 7, dtype=torch.float64), _tokens(columns)
    x[:, :, 5] = 0  # a dead input
    linear.weight.data = _randn(7, columns)
    weight, rows = linear.weight.detach().numpy().copy(), x.view(-1, columns).numpy()
    expected = oracle.sparsegpt(weight, rows, kept, blocksize, dampening)
    sparsity = 1 - kept / weight.size
    offpath.prune(linear, sparsity, "sparsegpt", calibration=list(x), blocksize=blocksize, dampening=dampening)
    got = linear.weight.detach().numpy()
    far = np.abs(got - expected).max() > oracle.sparsegpt_bound(rows, dampening, expected)
    return far or not np.array_equal(got != 0, expected != 0)


@pytest.mark.parametrize("kept", [1, 8, 23])
def test_wanda_is_the_papers(kept: int) -> None:
    assert not _disagrees_with_wanda(kept)


@pytest.mark.parametrize("dampening", [0.01, 1.0])
@pytest.mark.parametrize("blocksize", [1, 7, 24, 128])
@pytest.mark.parametrize("kept", [17, 84, 150])
def test_sparsegpt_is_the_papers(kept: int, blocksize: int, dampening: float) -> None:
    assert not _disagrees_with_sparsegpt(kept, blocksize, dampening)


def _blocks_for_themselves(weight: Tensor, inverse: sparsegpt.Inverse, nnz: int, blocksize: int) -> Tensor:
    factor = inverse.factor.clone()
    for start in range(0, weight.shape[2], blocksize):
        factor[:, start : start + blocksize, start + blocksize :] = 0
    return _SOLVE(weight, sparsegpt.Inverse(factor, inverse.dead), nnz, blocksize)


def _only_a_mask(weight: Tensor, inverse: sparsegpt.Inverse, nnz: int, blocksize: int) -> Tensor:
    return weight.double() * (_SOLVE(weight, inverse, nnz, blocksize) != 0)


def _diagonal_of_the_whole_inverse(hessian: Tensor, dampening: float) -> sparsegpt.Inverse:
    inverse = _INVERT(hessian, dampening)
    whole = inverse.factor.mT @ inverse.factor
    scale = (whole.diagonal(dim1=1, dim2=2).sqrt() / inverse.factor.diagonal(dim1=1, dim2=2)).unsqueeze(2)
    return sparsegpt.Inverse(inverse.factor * scale, inverse.dead)


_SOLVE, _INVERT, _SCORES = sparsegpt.solve, sparsegpt.invert, wanda.scores


@pytest.mark.parametrize(
    ("module", "name", "wrong"),
    [
        (wanda, "scores", lambda weight, norms: weight.double().abs()),
        (wanda, "scores", lambda weight, norms: _SCORES(weight, norms.square())),
        (wanda, "scores", lambda weight, norms: weight.double() * norms.unsqueeze(1)),
        (wanda, "scores", lambda weight, norms: _SCORES(weight, norms.flip(1))),
        (sparsegpt, "solve", _blocks_for_themselves),
        (sparsegpt, "solve", _only_a_mask),
        (sparsegpt, "solve", lambda w, i, nnz, b: _SOLVE(w, i, nnz + 1, b)),
        (sparsegpt, "solve", lambda w, i, nnz, b: _SOLVE(w, sparsegpt.Inverse(i.factor, i.dead & False), nnz, b)),
        (sparsegpt, "invert", lambda h, dampening: _INVERT(h, 2 * dampening)),
        (sparsegpt, "invert", _diagonal_of_the_whole_inverse),
    ],
)
def test_the_oracles_reject_mistakes(monkeypatch: pytest.MonkeyPatch, module, name: str, wrong: Callable) -> None:
    monkeypatch.setattr(module, name, wrong)
    assert _disagrees_with_wanda(8) if module is wanda else _disagrees_with_sparsegpt(84, 7)


def test_sparsegpt_in_float32_is_the_float64_one_rounded() -> None:
    linear, x = nn.Linear(24, 7), _tokens(24).float()
    double = nn.Linear(24, 7, dtype=torch.float64)
    double.weight.data = linear.weight.detach().double()
    offpath.prune(linear, 0.5, "sparsegpt", calibration=[x])
    offpath.prune(double, 0.5, "sparsegpt", calibration=[x.double()])
    assert bool(((linear.weight - double.weight).abs() <= U32 * double.weight.abs()).all())


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("method", CALIBRATED)
@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 6, 3, padding=1),
        nn.Conv2d(4, 6, (3, 2), stride=(1, 2), dilation=(2, 1), groups=2),
        nn.Conv2d(6, 6, 3, padding="same", groups=6),
        nn.Conv2d(4, 5, 3, padding=(1, 2), padding_mode="circular"),
        nn.Conv1d(4, 6, 3, padding=2, padding_mode="reflect", stride=2),
        nn.Conv1d(4, 6, 2, padding="same", groups=2),
    ],
    ids=str,
)
def test_convolutions_are_pruned_as_linear_layers_of_their_patches(method: str, conv: nn.Module) -> None:
    conv = deepcopy(conv).double()
    conv.weight.data = _randn(*conv.weight.shape)
    x = _randn(3, conv.in_channels, *(9, 8)[: len(conv.kernel_size)])
    met = oracle.patches(conv, x).numpy()
    weight = conv.weight.detach().flatten(1).numpy().copy().reshape(conv.groups, -1, met.shape[2])
    report = offpath.prune(conv, 0.6, method, calibration=[x[0], x[1:]])
    got = conv.weight.detach().numpy().reshape(weight.shape)
    if method == "wanda":
        kept = round(0.4 * met.shape[2])
        for group in range(conv.groups):
            assert np.array_equal(got[group], oracle.wanda(weight[group], met[group], kept))
        return
    assert report.nnz == round(0.4 * weight.size)
    for group in range(conv.groups):  # one block of columns: a group keeps its largest, however many they are
        expected = oracle.sparsegpt(weight[group], met[group], int(np.count_nonzero(got[group])), 128, 0.01)
        bound = oracle.sparsegpt_bound(met[group], 0.01, expected)
        assert np.array_equal(got[group] != 0, expected != 0) and np.abs(got[group] - expected).max() <= bound


def _norms(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).double().square().sum(0).sqrt()


def _wanda_keeps(weight: Tensor, x: Tensor, kept: int) -> Tensor:
    """Which weights, of any layer; by the definition that was checked above."""
    keep = torch.zeros_like(weight, dtype=torch.bool)
    return keep.scatter_(1, (weight.double().abs() * _norms(x)).topk(kept, 1).indices, True)


def _mlp(*widths: int) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Linear(a, b) for a, b in pairwise(widths)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))


def test_a_layer_is_pruned_with_what_the_pruned_ones_before_it_feed_it() -> None:
    model, x = _mlp(16, 32, 8), torch.randn(40, 16)
    first, second = model[0].weight.detach().clone(), model[2].weight.detach().clone()
    with torch.no_grad():
        dense = model[:2](x)
    offpath.prune(model, 0.75, "wanda", calibration=[x])
    with torch.no_grad():
        pruned = model[:2](x)
    assert torch.equal(model[0].weight != 0, _wanda_keeps(first, x, 4))
    assert torch.equal(model[2].weight != 0, _wanda_keeps(second, pruned, 8))
    assert not torch.equal(model[2].weight != 0, _wanda_keeps(second, dense, 8))


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.down(torch.tanh(self.up(x)) * self.gate(x))


def test_blocks_are_pruned_one_after_the_other_each_as_a_whole_and_no_later_one_runs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.ModuleList([_Block(), _Block(), _Block()]), nn.Identity())
    blocks = list(model[0])
    model.forward = lambda x: blocks[2](blocks[1](blocks[0](x)))
    x, seen = torch.randn(50, 8), []
    weights = [block.down.weight.detach().clone() for block in blocks]
    with torch.no_grad():
        inside = torch.tanh(blocks[0].up(x)) * blocks[0].gate(x)
    offpath.prune(model, 0.5, "wanda", calibration=[x[:20], x[20:]], progress=lambda *now: seen.append(now))
    assert torch.equal(blocks[0].down.weight != 0, _wanda_keeps(weights[0], inside, 8))
    # Two batches: the survey runs all three; the passes of the blocks end where the next block's first layer begins.
    assert [block.calls for block in blocks] == [8, 8, 6]
    assert seen == [(done, 8) for done in range(1, 9)]


def test_wanda_over_all_layers_ranks_what_the_dense_model_feeds_them() -> None:
    model, x = _mlp(16, 32, 8), torch.randn(40, 16)
    with torch.no_grad():
        fed = x, model[:2](x)
    scores = [model[i].weight.detach().double().abs() * _norms(a) for i, a in zip((0, 2), fed, strict=True)]
    count = round(0.25 * sum(score.numel() for score in scores))
    threshold = torch.cat([score.flatten() for score in scores]).sort(descending=True).values[count - 1]
    report = offpath.prune(model, 0.75, "wanda", calibration=[x], scope="global")
    assert report.nnz == count
    for i, score in zip((0, 2), scores, strict=True):
        assert torch.equal(model[i].weight != 0, score >= threshold)


@pytest.mark.parametrize("method", CALIBRATED)
def test_erk_and_layer_scope_count_exactly(method: str) -> None:
    model = _mlp(16, 40, 8)
    report = offpath.prune(model, 0.8, method, calibration=[torch.randn(99, 16)], distribution="erk")
    densities = offpath.topology.layer_densities([(40, 16), (8, 40)], 0.8, "erk")
    for layer, density in zip(report.layers, densities, strict=True):
        rows, columns = layer.shape
        per_row = rows * round(density * columns)
        assert layer.nnz == (per_row if method == "wanda" else round(density * rows * columns))
    model = _mlp(16, 40, 8)
    if method == "wanda":
        assert offpath.prune(model, 0.8, method, calibration=[torch.randn(9, 16)], scope="layer").nnz == 128 + 64


def test_a_layer_used_twice_is_pruned_once_with_what_both_uses_feed_it() -> None:
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model, x = nn.Sequential(shared, nn.Tanh(), shared), torch.randn(30, 8)
    weight = shared.weight.detach().clone()
    with torch.no_grad():
        fed = torch.cat([x, model[:2](x)])
    assert len(offpath.prune(model, 0.5, "wanda", calibration=[x]).layers) == 1
    assert torch.equal(shared.weight != 0, _wanda_keeps(weight, fed, 4))


class _Switch(nn.Module):
    """An expert that not every sample reaches, one that none does, and inputs by any name."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.rare, self.unused = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        self.count += 1
        y = self.used(input=x) * scale
        chosen = x[:, 0] > 0
        y[chosen] += self.rare(x[chosen])
        return y


def test_labels_among_the_calibration_data_are_told_how_to_leave() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    loader = DataLoader(TensorDataset(torch.randn(8, 6), torch.zeros(8)), batch_size=4)
    before = deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"got one of 2 parts .* pass calibration=\[inputs for inputs, _ in loader\]"):
        offpath.prune(model, 0.5, method="wanda", calibration=loader)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("method", CALIBRATED)
def test_batches_of_all_kinds_and_layers_that_are_not_reached(method: str) -> None:
    model, x = _Switch(), torch.randn(3, 5, 8)
    x[0, :, 0] = -1  # a batch in which the rare one gets no sample
    unused = model.unused.weight.clone()
    report = offpath.prune(model, 0.5, method, calibration=[x[0], (x[1],), {"x": x[2], "scale": 2.0}])
    assert [layer.name for layer in report.layers] == ["used", "rare"] and report.sparsity == 0.5
    assert report.skipped == (("unused", "the calibration data does not reach it"),)
    assert torch.equal(model.unused.weight, unused) and model.count == 0
    with pytest.raises(ValueError, match="none of them was called"):
        offpath.prune(model, 0.5, method, calibration=[x[0]], filter_fn=lambda _, fqn: fqn == "unused")


def _living() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv1d(3, 4, 3),
        nn.BatchNorm1d(4),
        nn.Flatten(),
        nn.Dropout(),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Linear(16, 4),
    )
    model[1].eval()
    model(torch.randn(5, 3, 8)).sum().backward()
    model[4].register_forward_pre_hook(lambda _, args: (args[0] * 1,))
    return model


def _trace(model: nn.Module) -> list[object]:
    tensors = [t for name, t in model.state_dict().items() if not name.endswith("weight") or name[0] == "1"]
    tensors += [p.grad for p in model.parameters()] + [torch.get_rng_state()]
    hooks = [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()]
    return [[t.tolist() for t in tensors], hooks, [m.training for m in model.modules()], torch.is_grad_enabled()]


@pytest.mark.parametrize("method", CALIBRATED)
def test_nothing_but_weights_is_touched(method: str) -> None:
    model, x = _living(), torch.randn(10, 3, 8)
    before = _trace(model)
    report = offpath.prune(model, 0.5, method, calibration=torch.utils.data.DataLoader(x, batch_size=5, shuffle=True))
    assert _trace(model) == before and len(report.layers) == 3


@pytest.mark.parametrize("method", CALIBRATED)
def test_an_interruption_leaves_each_layer_pruned_or_as_it_was(method: str) -> None:
    model, x = _living(), [torch.randn(5, 3, 8)]
    before, weights = _trace(model), [model[i].weight.detach().clone() for i in (0, 4, 6)]

    def interrupt(done: int, total: int) -> None:
        assert total == 4
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        offpath.prune(model, 0.5, method, calibration=x, progress=interrupt)
    assert _trace(model) == before
    assert int((model[0].weight != 0).sum()) == (4 * round(9 / 2) if method == "wanda" else 18)
    assert torch.equal(model[4].weight, weights[1]) and torch.equal(model[6].weight, weights[2])


@pytest.mark.parametrize("method", CALIBRATED)
def test_a_model_that_fails_in_the_survey_is_as_it_was(method: str) -> None:
    model, x = _living(), [torch.randn(5, 3, 8), torch.randn(5, 3, 9)]
    before, weight = _trace(model), model[0].weight.detach().clone()
    with pytest.raises(RuntimeError):
        offpath.prune(model, 0.5, method, calibration=x)
    assert _trace(model) == before and torch.equal(model[0].weight, weight)


def test_activations_that_overflow_after_pruning_are_an_error_that_says_how_far_it_came() -> None:
    class Guarded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(self.first(x) / bool((self.first.weight != 0).all()))

    model = Guarded()
    second = model.second.weight.detach().clone()
    with pytest.raises(ValueError, match=r"'second'.*1 of 2 layers are pruned by now"):
        offpath.prune(model, 0.5, "wanda", calibration=[torch.randn(9, 4)])
    assert torch.equal(model.second.weight, second) and not model.first._forward_pre_hooks


def test_few_tokens_and_dead_inputs_make_no_nan() -> None:
    model = nn.Sequential(nn.Linear(16, 8))
    x = torch.randn(2, 16)
    x[:, 3:] = 0
    offpath.prune(model, 0.1, "sparsegpt", calibration=[x])
    assert bool(model[0].weight.isfinite().all()) and not model[0].weight[:, 3:].any()
    offpath.prune(model, 0.1, "sparsegpt", calibration=[torch.zeros(2, 16)])
    assert not model[0].weight.any()
    model = nn.Sequential(nn.Linear(16, 8))
    weight = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"singular one at the input of '0' from 2 tokens with dampening 1e-300"):
        offpath.prune(model, 0.5, "sparsegpt", calibration=[torch.randn(2, 16)], dampening=1e-300)
    assert torch.equal(model[0].weight, weight)


def test_adapted_weights_that_overflow_are_refused() -> None:
    model = nn.Sequential(nn.Linear(16, 2, dtype=torch.float16))
    model[0].weight.data.fill_(60000)
    x = torch.full((8, 16), 1e-3) + 1e-7 * torch.randn(8, 16)
    weight = model[0].weight.clone()
    with pytest.raises(ValueError, match=r"'0' that torch\.float16 can hold"):
        offpath.prune(model, 0.5, "sparsegpt", calibration=[x.half()])
    assert torch.equal(model[0].weight, weight)


def test_compiled_models_are_calibrated_uncompiled() -> None:
    model, x = _mlp(16, 32, 8), torch.randn(40, 16)
    twin = _mlp(16, 32, 8)
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    report = offpath.prune(compiled, 0.5, "wanda", calibration=[x])
    assert report.layers[0].name == "0" == offpath.compress(deepcopy(compiled), goal="size").layers[0].name
    offpath.prune(twin, 0.5, "wanda", calibration=[x])
    with torch.no_grad():
        assert torch.equal(model[0].weight, twin[0].weight) and torch.equal(compiled(x), twin(x))
