"""`offpath.save` and `offpath.load`: what comes back is what was saved, and nothing else is ever changed."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import prune

import offpath
from children import numbers_of
from offpath import SparseLinear, StorageError, pattern as patterns
from offpath.nn import (
    Int8Embedding,
    Int8SparseLinear,
    SparseAutoencoder,
    SparseConv1d,
    SparseConv2d,
    SparseSparseLinear,
)

transformers = pytest.importorskip("transformers")


def _same(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return x.keys() == y.keys() and all(torch.equal(x[k], y[k]) and x[k].dtype == y[k].dtype for k in x)


def _seeded(module: nn.Module, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return module


class Net(nn.Module):
    """What only its own code can build: a tied tensor, a shared module, buffers of every kind."""

    def __init__(self, sizes: int = 24) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, sizes)
        self.first = nn.Linear(sizes, 40)
        self.again = nn.ModuleList([self.first])
        self.norm = nn.BatchNorm1d(40)
        self.last = nn.Linear(40, sizes, bias=False)
        self.head = nn.Linear(sizes, 50)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.arange(4), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.norm(self.first(self.embed(x)))))


def _net(sparsity: float = 0.8) -> Net:
    torch.manual_seed(0)
    net = Net().eval()
    offpath.sparsify(net, sparsity, seed=1)
    assert isinstance(net.first, SparseLinear) and net.again[0] is net.first and isinstance(net.head, nn.Linear)
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.97, 0.9999])
def test_a_model_comes_back_bit_for_bit(tmp_path: Path, sparsity: float, dtype: torch.dtype) -> None:
    model = _seeded(
        nn.Sequential(SparseLinear(70, 33, sparsity=sparsity), nn.ReLU(), SparseLinear(33, 9, bias=False), nn.Flatten())
    ).to(dtype)
    offpath.save(model, tmp_path / "m")
    assert _same(offpath.load(tmp_path / "m"), model)
    dense = nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 9, bias=False), nn.Flatten())
    assert _same(offpath.load(tmp_path / "m", dense), model)
    with torch.device("meta"):
        nowhere = nn.Sequential(nn.Linear(70, 33), nn.ReLU(), nn.Linear(33, 9, bias=False), nn.Flatten())
    assert _same(offpath.load(tmp_path / "m", nowhere), model)


def test_a_model_of_ones_own_code_comes_back_with_its_ties_and_shared_modules(tmp_path: Path) -> None:
    net, other = _net(), Net()
    offpath.save(net, tmp_path / "net.safetensors")
    other.requires_grad_(False)
    loaded = offpath.load(tmp_path / "net.safetensors", other)
    assert loaded is other and _same(loaded, net)
    assert loaded.head.weight is loaded.embed.weight and loaded.again[0] is loaded.first
    assert loaded.training and loaded.first.training and not any(p.requires_grad for p in loaded.parameters())
    x = torch.arange(6)
    assert torch.equal(loaded.eval()(x), net(x))
    assert "head.weight" not in load_file(tmp_path / "net.safetensors")
    with pytest.raises(StorageError, match=r"net\.safetensors: .*pass model="):
        offpath.load(tmp_path / "net.safetensors")


def test_a_model_that_is_sparse_already_takes_the_connections_of_the_file(tmp_path: Path) -> None:
    offpath.save(_net(0.9), tmp_path / "m")
    assert _same(offpath.load(tmp_path / "m", _net(0.5)), _net(0.9))


def test_every_other_layer_of_offpath_goes_along(tmp_path: Path) -> None:
    model = _seeded(nn.ModuleDict({"a": SparseSparseLinear(20, 30), "b": SparseAutoencoder(16, 64, 4)}))
    offpath.save(model, tmp_path / "m")
    twin = nn.ModuleDict({"a": nn.Linear(20, 30), "b": SparseAutoencoder(16, 64, 4)})
    assert _same(offpath.load(tmp_path / "m", twin), model)


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
        assert _same(loaded, model) and str(loaded) == str(model) and loaded[1].activations == "int8"
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
        assert str(loaded) == str(model) and _same(loaded, model) and torch.equal(loaded(x), model(x))
    other = type(dense)(dense.in_channels, dense.out_channels, dense.kernel_size, stride=4, groups=dense.groups)
    with pytest.raises(StorageError, match="stride"):
        offpath.load(tmp_path / "m", nn.Sequential(other, nn.ReLU()))


def test_single_layers(tmp_path: Path) -> None:
    for layer, other in (
        (SparseLinear(9, 8), SparseLinear(9, 8)),
        (SparseSparseLinear(9, 8), SparseSparseLinear(9, 8)),
    ):
        offpath.save(layer, tmp_path / "m")
        assert _same(offpath.load(tmp_path / "m"), layer)
        assert offpath.load(tmp_path / "m", other) is other and _same(other, layer)
    with pytest.raises(StorageError, match="leave model= out"):
        offpath.load(tmp_path / "m", nn.Linear(9, 8))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0), (1, 1), (7, 1), (1, 70000), (3, 65535), (3, 65536)])
@pytest.mark.parametrize("density", [0.0, 1e-4, 0.3, 1.0])
def test_layers_of_every_shape(tmp_path: Path, shape: tuple[int, int], density: float) -> None:
    rows, columns = shape
    pattern = patterns.random(shape, round(density * rows * columns), torch.Generator().manual_seed(0))
    layer = SparseLinear(columns, rows, pattern=pattern, bias=False)
    offpath.save(layer, tmp_path / "m")
    assert _same(offpath.load(tmp_path / "m"), layer)


def test_long_bitmaps_are_read_and_written_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offpath.storage.columns._CHUNK_BYTES", 5)
    layer = SparseLinear(37, 29, sparsity=0.6)
    offpath.save(layer, tmp_path / "m")
    assert _same(offpath.load(tmp_path / "m"), layer)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9, 0.95, 0.99, 0.999])
def test_the_file_is_as_large_as_the_formula_says(tmp_path: Path, sparsity: float) -> None:
    """4 bytes a value and a bias; 1 bit a position, or 2 bytes a connection and a row, whichever is less."""
    layer = SparseLinear(300, 200, sparsity=sparsity)
    offpath.save(layer, tmp_path / "m")
    with (tmp_path / "m").open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    tensors_bytes = (tmp_path / "m").stat().st_size - 8 - header_bytes
    assert tensors_bytes == 4 * layer.nnz + 4 * 200 + min(300 * 200 // 8, 2 * (layer.nnz + 200))
    assert header_bytes < 900


def test_other_readers_find_plain_tensors_under_the_keys_of_the_state_dict(tmp_path: Path) -> None:
    net = _net()
    offpath.save(net, tmp_path / "m")
    found, state = load_file(tmp_path / "m"), net.state_dict()
    for key in ("embed.weight", "first.values", "first.bias", "last.values", "norm.running_var", "steps", "mask"):
        assert torch.equal(found[key], state[key]) and found[key].dtype == state[key].dtype
    assert set(found) - set(state) == {"first.bitmap", "last.bitmap"}
    with safe_open(tmp_path / "m", "pt") as file:
        header = json.loads(file.metadata()["offpath"])
    assert header["tied"] == {"head.weight": "embed.weight"} and header["shared"] == {"again.0": "first"}


def test_what_is_written_into_a_loaded_model_stays_out_of_the_file(tmp_path: Path) -> None:
    offpath.save(_net(), tmp_path / "m")
    before = (tmp_path / "m").read_bytes()
    loaded = offpath.load(tmp_path / "m", Net())
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.1)
    loaded(torch.arange(6)).square().sum().backward()
    optimizer.step()
    assert not _same(loaded, _net()) and (tmp_path / "m").read_bytes() == before
    offpath.save(loaded, tmp_path / "m")  # over the file that it is mapped from
    assert _same(offpath.load(tmp_path / "m", Net()), loaded)


def test_tensors_that_are_not_contiguous_are_written_as_they_look(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(3, 4, 3))
    model[0].weight.data = torch.randn(6, 6).t()
    model[1].to(memory_format=torch.channels_last)
    model.register_buffer("row", torch.arange(3.0).expand(2, 3))
    offpath.save(model, tmp_path / "m")
    twin = nn.Sequential(nn.Linear(6, 6), nn.Conv2d(3, 4, 3))
    twin.register_buffer("row", torch.zeros(2, 3))
    assert _same(offpath.load(tmp_path / "m", twin), model)


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
    assert type(loaded) is type(model) and not loaded.training and _same(loaded, model)
    assert not [name for name, tensor in (*loaded.named_parameters(), *loaded.named_buffers()) if tensor.is_meta]
    tokens = torch.arange(12).view(2, 6)
    with torch.no_grad():
        assert torch.equal(loaded(tokens)[0], model(tokens)[0])
    loaded.train()(tokens)[0].square().sum().backward()
    assert _same(offpath.load(tmp_path, make()), model)
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
    offpath.save(_net(), tmp_path / "m")
    other = Net()
    change(other)
    before = _frozen(other)
    with pytest.raises(StorageError, match=MISFITS[change]) as raised:
        offpath.load(tmp_path / "m", other)
    assert str(tmp_path / "m") in str(raised.value)
    after = _frozen(other)
    assert after[1:] == before[1:] and all(torch.equal(after[0][key], value) for key, value in before[0].items())


def test_ctrl_c_while_loading_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    class Interrupted(nn.Linear):
        def _load_from_state_dict(self, *arguments: object) -> None:
            raise KeyboardInterrupt

    net = _net()
    net.zz = nn.Linear(2, 2)
    offpath.save(net, tmp_path / "m")
    other = Net()
    other.zz = Interrupted(2, 2)
    before = _frozen(other)
    with pytest.raises(KeyboardInterrupt):
        offpath.load(tmp_path / "m", other)
    after = _frozen(other)
    assert after[1:] == before[1:] and all(torch.equal(after[0][key], value) for key, value in before[0].items())


# --- what cannot be saved -----------------------------------------------------------------------------------------


def _pruned() -> nn.Module:
    model = nn.Sequential(SparseLinear(8, 8))
    prune.l1_unstructured(model[0], "values", 0.5)
    return model


def _parametrized() -> nn.Module:
    model = nn.Sequential(SparseLinear(8, 8))
    nn.utils.parametrize.register_parametrization(model[0], "bias", nn.Identity())
    return model


def _own_layer() -> nn.Module:
    return nn.Sequential(type("MySparseLinear", (SparseLinear,), {})(8, 8))


def _on_meta() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8, device="meta"))


def _sparse_layer_on_meta() -> nn.Module:
    return nn.Sequential(SparseLinear(8, 8, device="meta"))


def _overlapping() -> nn.Module:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight.data = model[0].weight.data.t()
    return model


def _tied_values() -> nn.Module:
    model = nn.Sequential(SparseLinear(8, 8), SparseLinear(8, 8))
    model[1].values = model[0].values
    return model


def _no_tensor() -> nn.Module:
    return nn.Sequential(type("Stateful", (nn.Module,), {"get_extra_state": lambda self: {"a": 1}})())


def _sparse_tensor() -> nn.Module:
    model = nn.Module()
    model.register_buffer("weight", torch.eye(3).to_sparse())
    return model


def _of_a_rare_dtype() -> nn.Module:
    model = nn.Module()
    model.register_buffer("weight", torch.zeros(3, dtype=torch.complex128))
    return model


REFUSED = {
    _of_a_rare_dtype: r"got torch\.complex128",
    _pruned: "'0': expected values of its own, but they are computed by a mask",
    _parametrized: "'0' is a ParametrizedSparseLinear",
    _own_layer: "'0' is a MySparseLinear",
    _on_meta: "'0.weight' is on the meta device",
    _sparse_layer_on_meta: "'0.* is on the meta device",
    _overlapping: r"'0\.weight' and '1\.weight' overlap",
    _tied_values: "'1.values' is tied to '0.values'",
    _no_tensor: "got a dict as '0._extra_state'",
    _sparse_tensor: "expected plain tensors in the state_dict.*'weight'",
}


@pytest.mark.parametrize("make", REFUSED, ids=lambda make: make.__name__)
def test_what_cannot_be_stored_is_refused_by_name_and_leaves_an_old_file(tmp_path: Path, make) -> None:
    (tmp_path / "m").write_bytes(b"old")
    with pytest.raises(StorageError, match=REFUSED[make]):
        offpath.save(make(), tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
    with pytest.raises(StorageError, match=r"got the folder .* try .*model\.safetensors"):
        offpath.save(nn.Linear(2, 2), tmp_path)


# --- the file on disk ---------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the same calls fail, with another number."""
    (tmp_path / "m").write_bytes(b"old")
    code = f"""
import resource, signal, torch, offpath
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    offpath.save(torch.nn.Linear(100, 100), {str(tmp_path / "m")!r})
except OSError as error:
    print(len(str(error)) > 0 and 1)
"""
    assert numbers_of(code) == [1]
    assert (tmp_path / "m").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("moment", ["save_file", "digest"])
def test_ctrl_c_while_saving_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    def interrupted(tensors: object, path: Path, *rest: object) -> None:
        if moment == "save_file":
            Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    (tmp_path / "m").write_bytes(b"old")
    monkeypatch.setattr(f"offpath.storage.saving.{moment}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        offpath.save(nn.Linear(3, 3), tmp_path / "m")
    assert (tmp_path / "m").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    offpath.save(nn.Sequential(nn.Linear(3, 3)), tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    assert isinstance(offpath.load(tmp_path / "real"), nn.Sequential)
    offpath.save(nn.Sequential(nn.Linear(3, 3)), tmp_path / "new")
    (tmp_path / "plain").touch()
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode


def _save_often(path: str, seed: int) -> None:
    torch.set_num_threads(1)
    model = nn.Sequential(SparseLinear(400, 300))
    model[0].values.data.fill_(seed)
    for _ in range(20):
        offpath.save(model, path)


def test_processes_that_save_at_once_leave_a_whole_file(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_save_often, args=(str(tmp_path / "m"), seed)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        if (tmp_path / "m").exists():
            assert len(offpath.load(tmp_path / "m")[0].values.detach().unique()) == 1
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


_PEAK = """
import ctypes, pathlib, torch, offpath
from torch import nn
def built():
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(4096, 16384), nn.ReLU(), nn.Linear(16384, 16))
torch.set_num_threads(1)
offpath.save(nn.Sequential(nn.Linear(4, 4)), PATH + ".small")  # what the code itself takes is there before
offpath.load(PATH + ".small")
ctypes.CDLL(None).malloc_trim(0)
pathlib.Path("/proc/self/clear_refs").write_text("5")
before = peak_bytes()
model = offpath.load(PATH, built())
print(peak_bytes() - before, model[0].nnz)
"""


def test_loading_takes_memory_in_proportion_to_the_file(tmp_path: Path) -> None:
    """The dense weight is 256 MiB. Loading keeps the file's bytes and 4 bytes a connection, and for a while twice
    these indices and one piece of the bitmap, taken apart."""
    pattern = patterns.random((16384, 4096), 1_300_000, torch.Generator().manual_seed(0))
    model = nn.Sequential(SparseLinear(4096, 16384, pattern=pattern), nn.ReLU(), nn.Linear(16384, 16))
    path = tmp_path / "model.safetensors"
    offpath.save(model, path)
    peak, nnz = numbers_of(_PEAK.replace("PATH", repr(str(path))))
    assert nnz == 1_300_000
    assert peak < 8 * path.stat().st_size < 2**28 / 2
