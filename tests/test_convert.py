"""`sparsify` and `densify`."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import prune

from offpath import SparseLinear, densify, sparsify
from offpath.topology import layer_densities


def _model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Sequential(nn.Linear(48, 32, bias=False)), nn.Linear(32, 4))


@pytest.mark.parametrize("distribution", ["uniform", "erk"])
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_sparsify_swaps_every_linear_layer_and_reports_it(method: str, distribution: str) -> None:
    model = _model().double()
    before = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    report = sparsify(model, 0.8, distribution, method=method, seed=0)
    assert [layer.name for layer in report.layers] == list(before)
    assert report.sparsity == pytest.approx(0.8, abs=0.001)
    for entry in report.layers:
        layer = model.get_submodule(entry.name)
        assert isinstance(layer, SparseLinear) and layer.nnz == entry.nnz
        assert entry.shape == tuple(before[entry.name].weight.shape)
        assert entry.bytes_before == sum(p.numel() * 8 for p in before[entry.name].parameters())
        indices = (layer.crow_indices.numel() + layer.nnz) * 4 + 8  # and the digest
        assert entry.bytes_after == layer.nnz * 8 + (0 if layer.bias is None else layer.bias.numel() * 8) + indices
    assert model(torch.randn(3, 64).double()).shape == (3, 4)


def test_magnitude_keeps_the_largest_weights_with_their_values() -> None:
    model = _model()
    weight = model[0].weight.detach().clone()
    sparsify(model, 0.75, method="magnitude")
    kept = model[0].to_dense().weight
    threshold = weight.abs().flatten().sort(descending=True).values[weight.numel() // 4 - 1]
    assert torch.equal(kept, weight * (weight.abs() >= threshold))


def test_ties_still_give_exactly_the_asked_count() -> None:
    model = nn.Sequential(nn.Linear(10, 10))
    nn.init.ones_(model[0].weight)
    assert sparsify(model, 0.7, method="magnitude").layers[0].nnz == 30


def test_random_is_seeded_without_touching_the_global_generator() -> None:
    models = [_model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    state = torch.get_rng_state()
    for model in models:
        sparsify(model, 0.9, seed=3)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(*(m.state_dict().values() for m in models), strict=True))


def test_a_layer_that_lost_its_last_connection_is_named() -> None:
    model = nn.Sequential(nn.Linear(64, 48), nn.Linear(8, 1))
    assert "no connection is left: 1 (a lower sparsity" in str(sparsify(model, 0.99, seed=0))
    assert "no connection" not in str(sparsify(nn.Sequential(nn.Linear(64, 48)), 0.99, seed=0))


def test_densify_is_the_inverse() -> None:
    model = _model()
    dense = {name: p.clone() for name, p in model.state_dict().items()}
    sparsify(model, 0.0, method="magnitude")
    report = densify(model)
    assert len(report.layers) == 3
    after = model.state_dict()
    assert after.keys() == dense.keys() and all(torch.equal(after[k], dense[k]) for k in dense)


def test_filter_fn_chooses_by_module_and_name() -> None:
    model = _model()
    report = sparsify(model, 0.9, filter_fn=lambda module, fqn: fqn != "3" and module.in_features > 50)
    assert [layer.name for layer in report.layers] == ["0"]
    assert type(model[3]) is nn.Linear


def test_training_mode_device_and_requires_grad_are_kept() -> None:
    model = _model().eval()
    model[0].weight.requires_grad_(False)
    sparsify(model, 0.5)
    assert not model[0].training and not model[0].values.requires_grad and model[0].bias.requires_grad


def test_a_module_used_twice_stays_shared() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = sparsify(model, 0.5)
    assert len(report.layers) == 1
    assert model["a"] is model["b"][0]


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.head = nn.Linear(8, 20)
        self.head.weight = self.embedding.weight


def test_layers_that_cannot_be_swapped_are_left_and_named() -> None:
    tied = _Tied()
    assert sparsify(tied, 0.5).skipped == (("head", "its weight is tied to another module"),)
    attention = nn.MultiheadAttention(8, 2)
    assert "whose owner may read its weight" in sparsify(attention, 0.5).skipped[0][1]
    assert attention(*[torch.randn(3, 1, 8)] * 3)[0].shape == (3, 1, 8)
    pruned = _model()
    prune.random_unstructured(pruned[0], "weight", 0.5)
    report = sparsify(pruned, 0.5)
    assert report.skipped[0][0] == "0" and "computed by a mask" in report.skipped[0][1]
    assert "left as it was: 0" in str(report)
    hooked = _model()
    hooked[0].register_forward_hook(lambda *_: None)
    assert "hooks" in sparsify(hooked, 0.5).skipped[0][1]


class _Reader(nn.Module):
    """Reads weights as models of transformers do: for their dtype, or in a path of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.called, self.cast, self.inner = nn.Linear(8, 8), nn.Linear(8, 8), nn.ModuleDict({"deep": nn.Linear(8, 8)})
        self.called.weight.requires_grad_(True)

    def reset_parameters(self) -> None:
        self.called.weight.data.zero_()

    @property
    def norm(self) -> torch.Tensor:
        def of(p: float) -> torch.Tensor:
            return self.inner.deep.weight.norm(p)

        return of(2)

    @torch.no_grad()
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner.deep(self.called(self.cast(x.to(self.cast.weight.dtype))))


class _Named(nn.Module):
    """Reads weights in methods whose names are almost those of methods that prepare a model."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.set_up = (nn.Linear(8, 8) for _ in range(4))
        self._init_weights()

    def _init_weights(self) -> None:
        self.set_up.weight.data.zero_()

    def tie_weights(self) -> None:
        self.set_up.weight.data.zero_()

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        self.set_up.weight.data.zero_()

    def init_hidden(self, x: torch.Tensor) -> torch.Tensor:
        return self.first.weight.new_zeros(len(x), 8)

    @property
    def properties(self) -> torch.dtype:
        return self.second.weight.dtype

    def load_balance(self) -> torch.device:
        return self.third.weight.device

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(self.init_hidden(x) + x.to(self.load_balance()))
        return self.set_up(self.third(self.second(x.to(self.properties))))


def test_only_what_prepares_a_model_may_read_a_weight_that_is_gone() -> None:
    model = _Named()
    report = sparsify(model, 0.5)
    assert [layer.name for layer in report.layers] == ["set_up"]
    assert [name for name, _ in report.skipped] == ["first", "second", "third"]
    model(torch.randn(2, 8))


def test_layers_whose_weight_is_read_are_left_and_still_run() -> None:
    model = _Reader()
    report = sparsify(model, 0.5)
    assert [layer.name for layer in report.layers] == ["called"]
    assert dict(report.skipped) == dict.fromkeys(("cast", "inner.deep"), "a _Reader reads its weight")
    model(torch.randn(2, 8))
    assert densify(model).layers


def _hook(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.register_forward_pre_hook(_hook),
        lambda m: m.register_full_backward_hook(_hook),
        lambda m: m.register_full_backward_pre_hook(_hook),
        lambda m: next(m.parameters()).register_hook(_hook),
        lambda m: next(m.parameters()).register_post_accumulate_grad_hook(_hook),
        lambda m: setattr(m, "forward", lambda x: x),
    ],
    ids=["forward pre", "backward", "backward pre", "tensor", "post accumulate", "forward"],
)
@pytest.mark.parametrize("convert", [lambda m: sparsify(m, 0.5), densify], ids=["sparsify", "densify"])
def test_layer_with_anything_attached_is_left_alone(convert, change) -> None:
    model = _model()
    if convert is densify:
        sparsify(model, 0.5)
    kind = type(model[0])
    change(model[0])
    report = convert(model)
    assert [name for name, _ in report.skipped] == ["0"] and type(model[0]) is kind
    assert len(report.layers) == 2


def test_tied_bias_and_tied_values_are_left_alone() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].bias = model[1].bias
    assert [reason for _, reason in sparsify(model, 0.5).skipped] == ["its bias is tied to another module"] * 2
    tied = nn.Sequential(SparseLinear(4, 4), SparseLinear(4, 4))
    tied[1].values = tied[0].values
    assert len(densify(tied).skipped) == 2
    one_memory = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    one_memory[0].weight = nn.Parameter(one_memory[2].weight.detach())
    assert [name for name, _ in sparsify(one_memory, 0.5).skipped] == ["0", "2"]


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        (torch.randn(4, 4).half(), "no kernel computes in torch.float16"),
        (torch.randn(4, 4, dtype=torch.complex64), "no kernel computes in torch.complex64"),
        (torch.randn(4, 4).to_sparse(), "of layout torch.sparse_coo, not a plain dense tensor"),
    ],
    ids=["float16", "complex64", "sparse"],
)
@pytest.mark.parametrize("method", ["random", "magnitude"])
def test_weights_that_no_kernel_takes_are_left(weight: torch.Tensor, reason: str, method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight = nn.Parameter(weight)
    assert reason in sparsify(model, 0.5, method=method).skipped[0][1]


@pytest.mark.parametrize("method", ["random", "magnitude"])
@pytest.mark.parametrize("built_inside", [False, True])
def test_what_is_swapped_in_inference_mode_can_be_trained(method: str, built_inside: bool) -> None:
    with torch.inference_mode(built_inside):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.inference_mode():
        sparsify(model, 0.5, method=method)
        copy = deepcopy(model)
        densify(copy)
    for sparse_or_dense in (model, copy):
        sparse_or_dense(torch.randn(3, 8)).sum().backward()
        torch.optim.SGD(sparse_or_dense.parameters(), 0.1).step()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": float("nan")}, r"sparsity in \[0, 1\)"),
        ({"sparsity": 1.0}, r"sparsity in \[0, 1\)"),
        ({"sparsity": -0.1}, r"sparsity in \[0, 1\)"),
        ({"distribution": "equal"}, "uniform, erk"),
        ({"method": "best"}, "'random' or 'magnitude'"),
        ({"filter_fn": "0"}, r"function of \(module, name\), got str '0'"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict, message: str) -> None:
    model = _model()
    with pytest.raises(ValueError, match=message):
        sparsify(model, **arguments)
    assert type(model[0]) is nn.Linear


def test_one_class_in_place_of_several_is_told_how_to_be_written() -> None:
    with pytest.raises(ValueError, match=r"write modules=\(nn\.Conv2d,\)"):
        sparsify(_model(), 0.5, modules=nn.Conv2d)


def test_nan_weights_have_no_magnitude_and_change_nothing() -> None:
    model = _model()
    model[3].weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN in layer '3'"):
        sparsify(model, 0.5, method="magnitude")
    assert type(model[0]) is nn.Linear
    model[3].to("meta")
    with pytest.raises(ValueError, match="'3' on the meta device; load its weights first"):
        sparsify(model, 0.5, method="magnitude")
    assert type(model[0]) is nn.Linear


def test_a_bare_layer_is_refused() -> None:
    with pytest.raises(ValueError, match="from_dense"):
        sparsify(nn.Linear(3, 3), 0.5)
    with pytest.raises(ValueError, match="to_dense"):
        densify(nn.Module.train(SparseLinear(3, 3)))


def test_erk_gives_small_layers_more_and_keeps_the_total() -> None:
    shapes = [(1000, 784), (1000, 1000), (10, 1000)]
    for sparsity in (0.5, 0.9, 0.99):
        densities = layer_densities(shapes, sparsity, "erk")
        total = sum(d * r * c for d, (r, c) in zip(densities, shapes, strict=True))
        assert total == pytest.approx((1 - sparsity) * sum(r * c for r, c in shapes))
        assert all(0 < d <= 1 for d in densities)
        # Layers that are not full share one factor of (in + out) / (in * out).
        factors = [d * r * c / (r + c) for d, (r, c) in zip(densities, shapes, strict=True) if d < 1]
        assert factors == pytest.approx([factors[0]] * len(factors))


def test_erk_at_zero_sparsity_is_dense_and_of_nothing_is_nothing() -> None:
    assert layer_densities([(3, 4), (5, 6)], 0.0, "erk") == pytest.approx([1.0, 1.0])
    assert layer_densities([], 0.9, "erk") == []


def test_a_model_without_linear_layers_gives_an_empty_report() -> None:
    report = sparsify(nn.Sequential(nn.ReLU()), 0.9)
    assert report.layers == () and "total" in str(report)


def test_adapters_of_peft_stay_dense() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    sparsify(model, 0.5, filter_fn=lambda module, name: name == "0")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["2"]))
    x = torch.randn(3, 16)
    before = adapted(x)
    skipped = dict(sparsify(adapted, 0.5).skipped)
    assert skipped["base_model.model.2.lora_A.default"] == "it belongs to an adapter of PEFT, which reads weights"
    assert torch.equal(adapted(x), before)
    merged = adapted.merge_and_unload()
    assert isinstance(merged[0], SparseLinear) and torch.equal(merged(x), before)  # a new adapter adds zero


def test_a_sparse_layer_says_that_it_has_no_weight() -> None:
    layer = SparseLinear(4, 4)
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"SparseLinear has `values` and no `weight`.* Leave this layer dense"):
        _ = layer.weight
    with pytest.raises(AttributeError, match="no attribute 'weights'"):
        _ = layer.weights
    layer.register_buffer("weight", torch.ones(1))
    assert layer.weight == 1  # somebody gave it one
