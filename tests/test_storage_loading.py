"""`offpath.load`: what comes back is what was saved, and nothing else is ever changed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

import offpath
from offpath import SparseLinear, StorageError, pattern as patterns
from offpath.nn import (
    Int8Embedding,
    Int8SparseLinear,
    SparseAutoencoder,
    SparseConv1d,
    SparseConv2d,
    SparseSparseLinear,
)
from storage_cases import Net, same, seeded, sparse_net

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97, 0.9999])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, sparsity: float, dtype: torch.dtype) -> None:
    model = seeded(
        nn.Sequential(SparseLinear(70, 33, sparsity=sparsity), nn.ReLU(), SparseLinear(33, 9, bias=False), nn.Flatten())
    ).to(dtype)
    offpath.save(model, tmp_path / "m")
    assert same(offpath.load(tmp_path / "m"), model)
    dense = nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 9, bias=False), nn.Flatten())
    assert same(offpath.load(tmp_path / "m", dense), model)
    with torch.device("meta"):
        nowhere = nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 9, bias=False), nn.Flatten())
    assert same(offpath.load(tmp_path / "m", nowhere), model)


def test_a_model_of_ones_own_code_comes_back_with_its_ties_and_shared_modules(tmp_path: Path) -> None:
    net, other = sparse_net(), Net()
    offpath.save(net, tmp_path / "net.safetensors")
    other.requires_grad_(False)
    loaded = offpath.load(tmp_path / "net.safetensors", other)
    assert loaded is other and same(loaded, net)
    assert loaded.head.weight is loaded.embed.weight and loaded.again[0] is loaded.first
    assert loaded.training and loaded.first.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.arange(6)
    assert torch.equal(loaded.eval()(x), net(x))
    assert "head.weight" not in load_file(tmp_path / "net.safetensors")
    with pytest.raises(StorageError, match=r"net\.safetensors: .*pass model="):
        offpath.load(tmp_path / "net.safetensors")


def test_what_the_model_ties_and_the_file_does_not(tmp_path: Path) -> None:
    untied = sparse_net()
    untied.head.weight = nn.Parameter(untied.head.weight.detach().clone())
    other = Net()
    other.head.weight = other.embed.weight
    offpath.save(untied, tmp_path / "alike")
    offpath.load(tmp_path / "alike", other)
    assert other.head.weight is other.embed.weight and torch.equal(other.head.weight, untied.head.weight)
    untied.head.weight.data[0, 0] += 1
    offpath.save(untied, tmp_path / "different")
    before = other.head.weight.clone()
    with pytest.raises(
        StorageError, match=r"one tensor for 'embed\.weight' and 'head\.weight', which the model has tied"
    ):
        offpath.load(tmp_path / "different", other)
    assert other.head.weight is other.embed.weight and torch.equal(other.head.weight, before)


@pytest.mark.parametrize("built_inside", [False, True])
def test_what_is_loaded_in_inference_mode_can_be_trained(tmp_path: Path, built_inside: bool) -> None:
    offpath.save(nn.Sequential(SparseLinear(8, 8), nn.Linear(8, 4)), tmp_path / "m")
    with torch.inference_mode(built_inside):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.inference_mode():
        models = offpath.load(tmp_path / "m"), offpath.load(tmp_path / "m", model)
    for loaded in models:
        loaded(torch.randn(3, 8)).sum().backward()
        torch.optim.SGD(loaded.parameters(), 0.1).step()


def test_a_model_that_is_sparse_already_takes_the_connections_of_the_file(tmp_path: Path) -> None:
    offpath.save(sparse_net(0.9), tmp_path / "m")
    assert same(offpath.load(tmp_path / "m", sparse_net(0.5)), sparse_net(0.9))


def test_every_other_layer_of_offpath_goes_along(tmp_path: Path) -> None:
    model = seeded(nn.ModuleDict({"a": SparseSparseLinear(20, 30), "b": SparseAutoencoder(16, 64, 4)}))
    offpath.save(model, tmp_path / "m")
    twin = nn.ModuleDict({"a": nn.Linear(20, 30), "b": SparseAutoencoder(16, 64, 4)})
    assert same(offpath.load(tmp_path / "m", twin), model)


def test_int8_layers_take_the_places_of_dense_and_of_sparse_ones(tmp_path: Path) -> None:
    def dense() -> nn.Sequential:
        return nn.Sequential(nn.Embedding(60, 24, padding_idx=3), nn.Linear(24, 30), nn.Linear(30, 8, bias=False))

    model = dense().bfloat16()
    offpath.sparsify(model, 0.8, seed=0)
    for name, layer in (
        ("0", Int8Embedding.from_dense(model[0])),
        ("1", Int8SparseLinear.from_sparse(model[1], activations="int8")),
        ("2", Int8SparseLinear.from_sparse(model[2])),
    ):
        setattr(model, name, layer)
    offpath.save(model, tmp_path / "m")
    sparse = dense()
    offpath.sparsify(sparse, 0.5)
    x = torch.arange(6)
    for loaded in (
        offpath.load(tmp_path / "m"),
        offpath.load(tmp_path / "m", dense()),
        offpath.load(tmp_path / "m", sparse),
    ):
        assert same(loaded, model) and str(loaded) == str(model) and loaded[1].activations == "int8"
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(
    ("dense", "shape"),
    [
        (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(0, 2), dilation=2, groups=2), (2, 6, 9, 8)),
        (nn.Conv2d(5, 4, 3, padding="same", bias=False), (1, 5, 6, 6)),
        (nn.Conv1d(4, 6, 5, padding="valid"), (3, 4, 11)),
    ],
    ids=str,
)
def test_convolutions(tmp_path: Path, dense: nn.Conv1d | nn.Conv2d, shape: tuple[int, ...]) -> None:
    kind = SparseConv2d if isinstance(dense, nn.Conv2d) else SparseConv1d
    offpath.prune(nn.Sequential(dense), 0.7)
    model, x = nn.Sequential(kind.from_dense(dense), nn.ReLU()), torch.randn(shape)
    offpath.save(model, tmp_path / "m")
    for loaded in (offpath.load(tmp_path / "m"), offpath.load(tmp_path / "m", nn.Sequential(dense, nn.ReLU()))):
        assert str(loaded) == str(model) and same(loaded, model) and torch.equal(loaded(x), model(x))
    other = type(dense)(dense.in_channels, dense.out_channels, dense.kernel_size, stride=4, groups=dense.groups)
    with pytest.raises(StorageError, match="stride"):
        offpath.load(tmp_path / "m", nn.Sequential(other, nn.ReLU()))


def test_single_layers(tmp_path: Path) -> None:
    for layer, other in (
        (SparseLinear(9, 8), SparseLinear(9, 8)),
        (SparseSparseLinear(9, 8), SparseSparseLinear(9, 8)),
    ):
        offpath.save(layer, tmp_path / "m")
        assert same(offpath.load(tmp_path / "m"), layer)
        assert offpath.load(tmp_path / "m", other) is other and same(other, layer)
    with pytest.raises(StorageError, match="leave model= out"):
        offpath.load(tmp_path / "m", nn.Linear(9, 8))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 1), (7, 1), (1, 70000), (3, 65535), (3, 65536)])
@pytest.mark.parametrize("density", [0.0, 1e-4, 0.3, 1.0])
def test_layers_of_every_shape(tmp_path: Path, shape: tuple[int, int], density: float) -> None:
    rows, columns = shape
    pattern = patterns.random(shape, round(density * rows * columns), torch.Generator().manual_seed(0))
    layer = SparseLinear(columns, rows, pattern=pattern, bias=False)
    offpath.save(layer, tmp_path / "m")
    assert same(offpath.load(tmp_path / "m"), layer)


# --- models of transformers ---------------------------------------------------------------------------------------


def _bert() -> nn.Module:
    return transformers.BertModel(
        transformers.BertConfig(
            vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    )


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=90, n_positions=64, n_embd=32, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0
        )
    )


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
        )
    )


@pytest.mark.parametrize("make", [_bert, _gpt2, _llama])
def test_models_of_transformers_are_built_from_the_file_alone(tmp_path: Path, make) -> None:
    torch.manual_seed(0)
    model = make().eval()
    offpath.sparsify(model, 0.8, method="magnitude", filter_fn=lambda module, name: name != "lm_head")
    offpath.save(model, tmp_path / "model.safetensors")
    state = torch.get_rng_state()
    loaded = offpath.load(tmp_path)
    assert torch.equal(state, torch.get_rng_state())
    assert type(loaded) is type(model) and not loaded.training and same(loaded, model)
    assert not [name for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()) if tensor.is_meta]
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    loaded.train()(tokens)[0].square().sum().backward()
    assert same(offpath.load(tmp_path, make()), model)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert str(tmp_path) not in file.metadata()["offpath"]
    if make is _gpt2:
        assert loaded.lm_head.weight is loaded.transformer.wte.weight


# --- models that do not fit ---------------------------------------------------------------------------------------


def _frozen(model: nn.Module) -> tuple[dict[str, Tensor], list[nn.Module], list[int]]:
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return state, list(model.modules()), [id(p) for p in model.parameters()]


def _wider(net: Net) -> None:
    net.last = nn.Linear(41, 24, bias=False)


def _with_bias(net: Net) -> None:
    net.last = nn.Linear(40, 24)


def _renamed(net: Net) -> None:
    net.first_ = net.first
    del net.first, net.again


def _other_class(net: Net) -> None:
    net.last = nn.Bilinear(40, 40, 24)


def _without_norm(net: Net) -> None:
    net.norm = nn.Identity()


def _with_more(net: Net) -> None:
    net.more = nn.Linear(2, 2)


def _other_vocabulary(net: Net) -> None:
    net.embed = nn.Embedding(51, 24)


def _not_shared(net: Net) -> None:
    net.again = nn.ModuleList([nn.Linear(24, 40)])


def _all_shared(net: Net) -> None:
    net.last = net.first


def _sparse_head(net: Net) -> None:
    net.head = SparseLinear(24, 50)


def _whole_numbers(net: Net) -> None:
    net.embed.weight = nn.Parameter(torch.zeros(50, 24, dtype=torch.int32), requires_grad=False)


def _subclass(net: Net) -> None:
    net.last.__class__ = type("MyLinear", (nn.Linear,), {})


MISFITS = {
    _wider: r"'last' .* in_features=41.* in the model, in_features=40",
    _with_bias: "'last' .* bias=True in the model, bias=False in the file",
    _renamed: "expected a module 'first' in the model",
    _other_class: "'last' .* a Bilinear",
    _without_norm: "only the file has 'norm.bias', .*'norm.weight'",
    _with_more: "only the model has 'more.weight', 'more.bias'",
    _other_vocabulary: r"size mismatch for embed\.weight",
    _not_shared: "shares modules as the file does",
    _all_shared: "'last' .* in the model",
    _sparse_head: "sparse layer 'head' in the file",
    _whole_numbers: r"expected torch\.int32 for 'embed\.weight'",
    _subclass: "'last' .* a MyLinear",
}


@pytest.mark.parametrize("change", MISFITS, ids=lambda change: change.__name__)
def test_a_model_that_does_not_fit_is_left_as_it_was(tmp_path: Path, change) -> None:
    offpath.save(sparse_net(), tmp_path / "m")
    other = Net()
    change(other)
    before = _frozen(other)
    with pytest.raises(StorageError, match=MISFITS[change]) as raised:
        offpath.load(tmp_path / "m", other)
    assert str(tmp_path / "m") in str(raised.value)
    after = _frozen(other)
    assert after[1:] == before[1:] and all(torch.equal(after[0][key], value) for key, value in before[0].items())


def test_masks_that_only_the_file_has_are_named(tmp_path: Path) -> None:
    pruned = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    prune.l1_unstructured(pruned[1], "weight", 0.5)
    offpath.save(pruned, tmp_path / "m")
    plain = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))
    with pytest.raises(StorageError) as raised:
        offpath.load(tmp_path / "m", plain)
    said = str(raised.value)
    assert "only the model has '1.weight', and only the file has '1.weight_mask', '1.weight_orig'" in said
    assert "torch.nn.utils.prune.remove" in said
    prune.remove(pruned[1], "weight")
    offpath.save(pruned, tmp_path / "m")
    assert torch.equal(offpath.load(tmp_path / "m", plain)[1].weight, pruned[1].weight)


def test_ctrl_c_while_loading_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Interrupted(nn.Linear):
        def _load_from_state_dict(self, *arguments: object) -> None:
            raise KeyboardInterrupt

    net = sparse_net()
    net.zz = nn.Linear(2, 2)
    offpath.save(net, tmp_path / "m")
    other = Net()
    other.zz = Interrupted(2, 2)
    before = _frozen(other)
    with pytest.raises(KeyboardInterrupt):
        offpath.load(tmp_path / "m", other)
    after = _frozen(other)
    assert after[1:] == before[1:] and all(torch.equal(after[0][key], value) for key, value in before[0].items())
