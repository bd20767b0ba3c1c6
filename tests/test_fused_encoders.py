"""torch's encoders, which compute fused in inference and read the weights of their layers for it."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offpath
from compress_cases import COMPRESS, few_rounds as few_rounds
from offpath import SparseLinear, compress, densify, sparsify
from offpath.convert import fuse_only_dense_encoders
from offpath.convert.compress.example import Example
from offpath.convert.fused_encoders import called_by_encoders, fused_layers
from offpath.storage import StorageError

# What torch says of the nested tensors that its encoders make of padded input.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
WIDTH, HIDDEN = 16, 32


def _encoder(**arguments: Any) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, dropout=0.0, batch_first=True, **arguments)
    return nn.TransformerEncoder(layer, 2).double().eval()


def _input() -> tuple[Tensor, Tensor]:
    """Three sequences, and where they are padded at their ends."""
    lengths = torch.tensor([[7], [4], [5]])
    return torch.randn(3, 7, WIDTH, dtype=torch.float64), torch.arange(7) >= lengths


def _switches(model: nn.TransformerEncoder) -> list[object]:
    return [model.use_nested_tensor, *(layer.activation_relu_or_gelu for layer in model.layers)]


def _attributes(model: nn.Module) -> list[set[str]]:
    return [set(vars(module)) for module in model.modules()]


def _sparse_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


LINEARS = [f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)]


@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_sparsified_encoder_computes_what_its_dense_twin_does_and_is_fused_again(activation: str) -> None:
    model, (x, padding) = _encoder(activation=activation), _input()
    before, attributes = _switches(model), _attributes(model)
    sparsify(model, 0.5, method="magnitude")
    assert _sparse_layers(model) == LINEARS and _switches(model) == [False, 0, 0]
    masked = deepcopy(model)
    densify(masked)
    assert _switches(masked) == before and _attributes(masked) == attributes
    with torch.no_grad():
        torch.testing.assert_close(model(x), masked(x))
        # Fused, a padded position is zero, and it is what comes out of the layers elsewhere, as in training.
        padded = masked(x, src_key_padding_mask=padding)
        assert (padded[padding] == 0).all()
        torch.testing.assert_close(model(x, src_key_padding_mask=padding)[~padding], padded[~padding])
    torch.testing.assert_close(model.train()(x), model.eval()(x))


@pytest.mark.parametrize("duplicate", [deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_as_sparse_and_can_be_made_dense(duplicate: Callable[[nn.Module], Any]) -> None:
    model, (x, padding) = _encoder(), _input()
    before = _switches(model)
    sparsify(model, 0.5)
    copy = duplicate(model)
    with torch.no_grad():
        assert torch.equal(copy(x, src_key_padding_mask=padding), model(x, src_key_padding_mask=padding))
    densify(copy)
    assert _switches(copy) == before and _switches(model) == [False, 0, 0]


def test_one_sparse_layer_ends_the_fused_path_of_its_own_encoder_layer_only() -> None:
    model, (x, padding) = _encoder(), _input()
    sparsify(model, 0.5, filter_fn=lambda _, name: name == "layers.1.linear1")
    assert _switches(model) == [False, 1, 0]  # without nested tensors, which the sparse layer could not take
    with torch.no_grad():
        model(x, src_key_padding_mask=padding)


def test_what_somebody_turned_off_stays_off() -> None:
    model = _encoder()
    model.use_nested_tensor, model.layers[0].activation_relu_or_gelu = False, 0
    sparsify(model, 0.5)
    densify(model)
    assert _switches(model) == [False, 0, 1]


def test_what_was_swapped_inside_of_an_encoder_is_an_error_that_says_what_to_do() -> None:
    model, (x, padding) = _encoder(), _input()
    sparsify(model.layers, 0.5)
    with torch.no_grad():
        with pytest.raises(AttributeError, match="fuse_only_dense_encoders"):
            model(x, src_key_padding_mask=padding)
        fuse_only_dense_encoders(model)
        model(x, src_key_padding_mask=padding)


class _OwnPath(nn.TransformerEncoderLayer):
    """Reads a weight itself, in a way that nobody can turn off."""

    def forward(self, src: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(src.to(self.linear2.weight.dtype), *args, **kwargs)


def test_what_a_subclass_reads_stays_dense() -> None:
    model = _OwnPath(WIDTH, 2, HIDDEN, batch_first=True).eval()
    report = sparsify(model, 0.5)
    assert _sparse_layers(model) == ["linear1"] and ("linear2", "a _OwnPath reads its weight") in report.skipped
    with torch.no_grad():
        model(torch.randn(2, 3, WIDTH))


def test_a_whole_transformer_trains_and_compiles() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(WIDTH, 2, 1, 1, HIDDEN, dropout=0.0, batch_first=True)
    sparsify(model, 0.5)
    assert _sparse_layers(model) == [f"{of}.layers.0.linear{j}" for of in ("encoder", "decoder") for j in (1, 2)]
    source, target = torch.randn(2, 5, WIDTH), torch.randn(2, 3, WIDTH)
    run = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(run(source, target), model(source, target))
    model(source, target).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_a_file_of_one_fits_a_dense_one_or_leaves_it_as_it_was(tmp_path: Path) -> None:
    model, (x, padding) = _encoder(), _input()
    sparsify(model, 0.5)
    offpath.save(model, tmp_path / "model.safetensors")
    other = _encoder()
    offpath.load(tmp_path / "model.safetensors", other)
    with torch.no_grad():
        loaded, right = (m(x, src_key_padding_mask=padding) for m in (other, model))
    torch.testing.assert_close(loaded, right)  # torch's own products round by where in memory a weight lies
    unlike = _encoder(layer_norm_eps=1e-3)
    unlike.norm = nn.LayerNorm(WIDTH)
    before, attributes = _switches(unlike), _attributes(unlike)
    with pytest.raises(StorageError, match="only the model has 'norm"):
        offpath.load(tmp_path / "model.safetensors", unlike)
    assert _switches(unlike) == before and _attributes(unlike) == attributes and not _sparse_layers(unlike)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_calibration_sees_the_inputs_behind_padding(method: str) -> None:
    model, (x, padding) = _encoder(), _input()
    before = _switches(model)
    report = offpath.prune(model, 0.5, method, calibration=[{"src": x, "src_key_padding_mask": padding}])
    assert [layer.name for layer in report.layers] == LINEARS and _switches(model) == before


def test_what_an_encoder_is_fed_in_nested_tensors_does_not_hinder_layers_elsewhere() -> None:
    """Attention takes them in its own fused path only, which has to stay on."""
    encoder, (x, padding) = _encoder(), _input()
    model = nn.Sequential(encoder, nn.Flatten(0, 1), nn.Linear(WIDTH, 4).double()).eval()
    model[1].forward = lambda x: x.to_padded_tensor(0.0)
    nested = torch._nested_tensor_from_mask(x, ~padding)
    offpath.prune(model, 0.5, "wanda", [nested], filter_fn=lambda _, name: name == "2")
    assert [layer.name for layer in compress(model, example=nested, goal="size", min_sparsity=0.4).swapped] == ["2"]


def _pruned() -> nn.TransformerEncoder:
    model = _encoder()
    offpath.prune(model, 0.8, filter_fn=lambda _, name: "linear" in name)
    return model


def _examples() -> list[object]:
    x, padding = _input()
    return [None, x, {"src": x, "src_key_padding_mask": padding}]


@pytest.mark.parametrize("example", _examples(), ids=["none", "tensor", "padded"])
@pytest.mark.parametrize("faster", ["sparse", "fused"])
def test_compress_counts_what_the_fused_path_is_worth(
    example: object, faster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each layer alone is faster; the measured encoders around them may be slower."""
    monkeypatch.setattr(COMPRESS, "decide", lambda *_: (True, "alone"))
    seconds = {True: 1.0, False: 2.0 if faster == "fused" else 0.5}
    monkeypatch.setattr(Example, "seconds", lambda self: seconds[not _sparse_layers(self.model)])
    model, (x, padding) = _pruned(), _input()
    dense, before = deepcopy(model), _switches(model)
    report = compress(model, example=example)
    assert [layer.swapped for layer in report.layers] == [faster == "sparse"] * 4
    if faster == "fused":
        both = "2e+03 ms against 4e+03 for all of them with 1 token"
        why = both if example is None else "1e+03 ms against 2e+03 for the whole model"
        assert all(why in layer.reason for layer in report.layers)
        assert _switches(model) == before and not _sparse_layers(model)
    elif example is not None:
        assert report.end_to_end is not None and report.end_to_end.measured_speedup == 2
        # Twice the rounding of 33 terms is 2 * 33 * 2^-53 < 1e-14, which two layers and their norms make some ten
        # times as much at most, and not 1e5 times; the zeros that a fused encoder has for padding are of order one.
        assert report.end_to_end.bound < 1e-9
    with torch.no_grad():
        called, right = (m(x, src_key_padding_mask=padding) for m in (model, dense))
    torch.testing.assert_close(called[~padding], right[~padding])


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.layers[0].self_attn, "batch_first", False),
        offpath.unpack_attention,
        lambda model: sparsify(model, 0.1, filter_fn=lambda _, name: name.endswith("linear1")),
    ],
)
def test_encoders_that_torch_would_call_anyway_are_not_asked_for(change: Callable[[nn.Module], object]) -> None:
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, HIDDEN, batch_first=True), 1)
    layer = model.layers[0]
    assert fused_layers(model, [layer.linear2]) == [layer] and fused_layers(model, [nn.Linear(1, 1)]) == []
    change(model)
    assert fused_layers(model, [layer.linear2]) == []


def test_the_prediction_is_over_a_model_that_calls_its_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(example: Example) -> float:
        return (
            0.5
            if _sparse_layers(example.model)
            else 1.0
            if fused_layers(example.model, set(example.model.modules()))
            else 4.0
        )

    monkeypatch.setattr(COMPRESS, "decide", lambda *_: (True, "alone"))
    monkeypatch.setattr(COMPRESS, "_predicted_share", lambda *_: 0.25)
    monkeypatch.setattr(Example, "seconds", seconds)
    whole = compress(_pruned(), example=_input()[0]).end_to_end
    assert whole is not None
    assert (whole.dense_seconds, whole.predicted_seconds, whole.measured_seconds) == (1.0, 1.0, 0.5)


def test_only_encoders_that_hold_a_layer_call_theirs_meanwhile() -> None:
    model = nn.ModuleList([_encoder(), _encoder()])
    before = _switches(model[0])
    with called_by_encoders(model, [model[1].layers[0].linear2]):
        assert [_switches(encoder) for encoder in model] == [before, [False, 0, 1]]
    assert [_switches(encoder) for encoder in model] == [before, before]


def test_compress_for_size_asks_for_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(COMPRESS, "faster_fused", lambda *_: pytest.fail("nobody asked"))
    model = _pruned()
    assert len(compress(model, goal="size").swapped) == 4 and _switches(model) == [False, 0, 0]
