"""Converted models as wholes: compiled, exported, copied, pickled, in low precision, called with other parameters.

What a single layer goes through stands in test_nn.py, what an op does in test_ops.py.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import offpath
from checkers import gamma
from offpath import SparseLinear
from offpath.convert.swap import swap_modules
from offpath.ops import Connections
from offpath.ops.prepared_products import Prepared
from offpath.pattern import Pattern, PatternError

transformers = pytest.importorskip("transformers")

TOKENS = torch.arange(12).view(2, 6)
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}


class Logits(nn.Module):
    """One tensor of all that a model of `transformers` returns: what is compared, and what can be exported."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: Tensor) -> Tensor:
        return self.inner(tokens, use_cache=False)[0]


def _mlp() -> tuple[nn.Module, Tensor]:
    return nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8)), torch.randn(2, 32)


def _cnn() -> tuple[nn.Module, Tensor]:
    head = nn.Linear(128, 32), nn.ReLU(), nn.Linear(32, 5)
    body = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()
    return nn.Sequential(*body, *head), torch.randn(2, 3, 12, 12)


def _bert() -> tuple[nn.Module, Tensor]:
    config = transformers.BertConfig(vocab_size=90, **SIZES)
    return Logits(transformers.BertModel(config, add_pooling_layer=False)), TOKENS


def _gpt2() -> tuple[nn.Module, Tensor]:
    sizes = {"n_positions": 64, "n_embd": 32, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=90, **sizes))
    conv = {m: _linear(m) for m in model.modules() if isinstance(m, transformers.pytorch_utils.Conv1D)}
    swap_modules(model, conv)
    return Logits(model), TOKENS


def _llama() -> tuple[nn.Module, Tensor]:
    return Logits(transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=90, **SIZES))), TOKENS


def _linear(conv: Any) -> nn.Linear:
    linear = nn.Linear(conv.weight.shape[0], conv.weight.shape[1])
    linear.weight.data, linear.bias.data = conv.weight.data.t().contiguous(), conv.bias.data
    return linear


def _converted(make: Callable[[], tuple[nn.Module, Tensor]], dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = make()
    report = offpath.sparsify(model, 0.8, seed=1)
    assert len(report.layers) > 1
    return model.eval().to(dtype), x.to(dtype) if x.is_floating_point() else x


@pytest.fixture(params=[_mlp, _cnn, _bert, _gpt2, _llama], ids=lambda make: make.__name__[1:])
def whole(request: pytest.FixtureRequest) -> tuple[nn.Module, Tensor]:
    """A model and an input, in float64: what is left of a difference is a mistake and no rounding."""
    return _converted(request.param, torch.float64)


def _gradients(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad()
    run(x).square().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def _memory(model: nn.Module) -> set[int]:
    layers = [module for module in model.modules() if isinstance(module, SparseLinear)]
    indices = [t for layer in layers for t in (layer.connections.crow_indices, layer.connections.col_indices)]
    return {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers(), *indices)}


def test_compiles_whole_for_any_batch_and_trains_alike(whole: tuple[nn.Module, Tensor]) -> None:
    model, x = whole
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()  # of tests before this one
    # All of the compiler but the C++ that it would write of everything that is not offpath's.
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (2, 3, 7):
        some = x[:1].repeat(batch, *[1] * (x.dim() - 1))
        torch.testing.assert_close(compiled(some), model(some))
        torch.testing.assert_close(_gradients(model, compiled, some), _gradients(model, model, some))
    assert torch._dynamo.utils.counters["graph_break"] == {}


def test_a_compiled_model_follows_its_optimizer() -> None:
    model, x = _converted(_mlp, torch.float64)
    torch.compiler.reset()
    compiled, twin = torch.compile(model, fullgraph=True), copy.deepcopy(model)
    for one, run in ((model, compiled), (twin, twin)):
        optimizer = torch.optim.Adam(one.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            run(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(compiled(x), twin(x))


def test_exports_saves_and_runs_without_its_code(whole: tuple[nn.Module, Tensor]) -> None:
    model, x = whole
    with torch.no_grad():
        expected = model(x)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch", min=2, max=64)},))
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        assert torch.equal(loaded(x), expected)
        torch.testing.assert_close(loaded(torch.cat([x, x, x])), torch.cat([expected] * 3))


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _from_state_dict(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, SparseLinear):
            module.load_state_dict(SparseLinear(module.in_features, module.out_features).state_dict(), strict=False)
    twin.load_state_dict(torch.load(buffer, weights_only=True))
    return twin


@pytest.mark.parametrize("duplicate", [copy.deepcopy, _pickled, _saved, _from_state_dict])
def test_copies_compute_alike_train_alike_and_share_nothing(whole: tuple[nn.Module, Tensor], duplicate) -> None:
    model, x = whole
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    _gradients(model, model, x)
    optimizer.step()
    twin = duplicate(model)
    assert not _memory(model) & _memory(twin)
    other = torch.optim.Adam(twin.parameters(), lr=0.01)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, of_one in ((model, optimizer), (twin, other)):
        _gradients(one, one, x)
        of_one.step()
    assert torch.equal(model(x), twin(x))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert not torch.equal(model(x), twin(x))


def test_other_parameters_and_inference_mode(whole: tuple[nn.Module, Tensor]) -> None:
    model, x = whole
    expected = model(x)
    doubled = {name: 2 * parameter for name, parameter in model.named_parameters()}
    got = torch.func.functional_call(model, doubled, (x,))
    assert torch.equal(model(x), expected)
    with torch.inference_mode():
        assert torch.equal(model(x), expected)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    assert torch.equal(model(x), got)


@pytest.mark.parametrize("make", [_mlp, _cnn, _bert, _gpt2, _llama], ids=lambda make: make.__name__[1:])
def test_low_precision_and_back(make) -> None:
    model, x = _converted(make, torch.float32)
    low = copy.deepcopy(model).bfloat16()
    y = low(x.bfloat16() if x.is_floating_point() else x)
    assert y.dtype == torch.bfloat16 and bool(y.isfinite().all())
    y.float().square().sum().backward()
    assert {p.grad.dtype for p in low.parameters() if p.grad is not None} == {torch.bfloat16}
    rounded = {name: parameter.bfloat16() for name, parameter in model.named_parameters()}
    low.to(torch.float32)
    for name, parameter in low.named_parameters():
        assert torch.equal(parameter, rounded[name].float())


@pytest.mark.parametrize("make", [_mlp, _cnn, _bert, _gpt2, _llama], ids=lambda make: make.__name__[1:])
def test_trains_under_autocast_with_float32_master_weights(make) -> None:
    model, x = _converted(make, torch.float32)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.003)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().mean()
        loss.backward()
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        optimizer.step()
        losses.append(loss.item())
    assert {p.dtype for p in model.parameters()} == {torch.float32} and losses[-1] < losses[0]


def test_autocast_agrees_with_nn_linear() -> None:
    """Both round their operands alike to bfloat16, sum k products in float32 and round the result once more.

    So each is within gamma_k S of the exact sum, S being that of the absolute products, and the rounding adds 2^-8 of
    the result; `nn.Linear` may round again when it adds the bias.
    """
    generator = torch.Generator().manual_seed(0)
    layer = SparseLinear(300, 200, sparsity=0.8, generator=generator)
    dense = layer.to_dense()
    x, weights = torch.randn(64, 300, generator=generator), torch.randn(64, 200, generator=generator).bfloat16().float()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    results = []
    for module, one in zip((layer, dense), inputs, strict=True):
        with torch.autocast("cpu", torch.bfloat16):
            y = module(one)
        (y.float() * weights).sum().backward()
        results.append(y)
    low_x, low_w = x.bfloat16().double(), dense.weight.detach().bfloat16().double()
    dy, bias = weights.double(), layer.bias.detach().bfloat16().double()
    mask = layer.pattern.to_mask()
    pairs = (
        (*results, low_x.abs() @ low_w.abs().t() + bias.abs(), 301),
        (inputs[0].grad, inputs[1].grad, dy.abs() @ low_w.abs(), 200),
        (layer.values.grad, dense.weight.grad[mask], (dy.abs().t() @ low_x.abs())[mask], 64),
        (layer.bias.grad, dense.bias.grad, dy.abs().sum(0), 64),
    )
    for sparse, linear, size, terms in pairs:
        assert sparse.dtype == linear.dtype
        error = gamma(torch.tensor(terms), torch.float32) * size
        bound = 2 * error + 3 * 2**-8 * (linear.double().abs() + 2 * error)
        assert bool(((sparse.double() - linear.double()).abs() <= bound).all())


def _train_in_another_process(rank: int, model: nn.Module, x: Tensor, seen: Tensor) -> None:
    with torch.no_grad():
        seen.copy_(model(x))
        for parameter in model.parameters():
            parameter.fill_(1)


def test_processes_train_one_model_in_shared_memory() -> None:
    model, x = _converted(_mlp, torch.float32)
    model.share_memory()
    expected, seen = model(x).detach(), torch.zeros(2, 8).share_memory_()
    indices = model[0].col_indices
    torch.multiprocessing.spawn(_train_in_another_process, (model, x, seen), nprocs=1)
    assert torch.equal(seen, expected) and torch.equal(model[0].col_indices, indices)
    assert all(bool((parameter == 1).all()) for parameter in model.parameters())


# --- pickles whose topology is wrong ------------------------------------------------------------------------------


def _tampered(layer: SparseLinear) -> SparseLinear:
    """As a pickle leaves a layer that does not go through any constructor: the columns lead out of the matrix."""
    pattern = object.__new__(Pattern)
    columns = torch.full_like(layer.col_indices, 2**30)
    vars(pattern).update(shape=(8, 8), crow_indices=layer.crow_indices, col_indices=columns)
    connections = object.__new__(Connections)
    prepared = copy.copy(layer.connections._prepared)
    vars(prepared).update(vars(Prepared(pattern)))
    vars(connections).update(
        _prepared=prepared, crow_indices=layer.crow_indices, _col_indices=columns, _handed_out=True, _are_gone=False
    )
    layer._connections = connections
    return layer


def test_a_pickle_of_another_topology_never_reaches_a_kernel() -> None:
    layer = _tampered(SparseLinear(8, 8, sparsity=0.5))
    with pytest.raises(PatternError, match="got 1073741824"):
        layer(torch.randn(3, 8))
    with pytest.raises(PatternError, match="got 1073741824"):
        pickle.loads(pickle.dumps(layer))
    with pytest.raises(PatternError, match="got 1073741824"):
        copy.deepcopy(layer)


class _Pickles:
    """Stands for `Connections` of a pattern that is wrong, in a pickle that somebody wrote."""

    def __init__(self, crow_indices: Tensor, col_indices: Tensor) -> None:
        self.indices = crow_indices, col_indices

    def __reduce__(self) -> tuple:
        return _connections_of, self.indices


def _connections_of(crow_indices: Tensor, col_indices: Tensor) -> Connections:
    return Connections(Pattern((8, 8), crow_indices, col_indices))


@pytest.mark.parametrize("change", [lambda c: c.flip(0), lambda c: c - 8, lambda c: c.long(), lambda c: c[1:]])
def test_what_a_pickle_holds_is_checked_as_if_it_were_new(change) -> None:
    layer = SparseLinear(8, 8, sparsity=0.2)
    data = pickle.dumps(_Pickles(layer.crow_indices, change(layer.col_indices)))
    with pytest.raises(PatternError):
        pickle.loads(data)
