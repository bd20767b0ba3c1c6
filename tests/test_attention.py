"""Attention whose projections are layers, against torch's own."""

from __future__ import annotations

import itertools
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import offpath
from offpath import SparseLinear, densify, pack_attention, sparsify, unpack_attention
from offpath.nn import UnpackedAttention
from offpath.storage import StorageError

WIDTH, HEADS, BATCH, QUERIES, KEYS = 12, 3, 2, 4, 5
MASKS = ("none", "bool", "float", "each", "padding", "both", "causal", "causal and padding")


def _packed(**arguments: Any) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(WIDTH, HEADS, dtype=torch.float64, **arguments)
    for parameter in attention.parameters():  # torch's biases are zero
        nn.init.normal_(parameter)
    return attention


def _inputs(kdim: int, vdim: int, layout: str) -> list[Tensor]:
    """Query, key and value for "batch", "sequence" (first) or "single"."""
    sizes = ((QUERIES, WIDTH), (KEYS, kdim), (KEYS, vdim))
    found = [torch.randn(BATCH, *size, dtype=torch.float64) for size in sizes]
    if layout == "single":
        found = [x[0] for x in found]
    elif layout == "sequence":
        found = [x.transpose(0, 1).contiguous() for x in found]
    return [x.requires_grad_() for x in found]


def _masks(kind: str, single: bool, queries: int = QUERIES, keys: int = KEYS) -> dict[str, Any]:
    hidden = torch.rand(queries, keys) < 0.4
    hidden[:, 0] = False  # what sees nothing is NaN
    padding = torch.zeros(BATCH, keys, dtype=torch.bool)
    padding[1, -2:] = padding[0, -1:] = True
    padding = padding[0] if single else padding
    causal = torch.ones(queries, keys, dtype=torch.bool).triu(1)
    return {
        "none": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": torch.randn(queries, keys, dtype=torch.float64)},
        "each": {"attn_mask": torch.randn((1 if single else BATCH) * HEADS, queries, keys, dtype=torch.float64)},
        "padding": {"key_padding_mask": padding},
        "both": {"key_padding_mask": padding, "attn_mask": hidden},
        "causal": {"attn_mask": causal, "is_causal": True},
        "causal and padding": {"attn_mask": causal, "is_causal": True, "key_padding_mask": padding},
    }[kind]


def _outcome(attention: nn.Module, inputs: list[Tensor], arguments: dict[str, Any]) -> list[Tensor]:
    """Output, weights if there are any, and the gradients of the inputs."""
    outputs = [out for out in attention(*inputs, **arguments) if out is not None]
    weight = torch.linspace(0.5, 1.5, outputs[0].numel(), dtype=torch.float64).view_as(outputs[0])
    return outputs + list(torch.autograd.grad((outputs[0] * weight).sum(), inputs))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", ["batch", "sequence", "single"])
@pytest.mark.parametrize("mask", MASKS)
def test_it_computes_what_torchs_does(mask: str, layout: str, training: bool) -> None:
    for bias, sizes in itertools.product((True, False), ((WIDTH, WIDTH), (7, 10))):
        packed = _packed(bias=bias, kdim=sizes[0], vdim=sizes[1], batch_first=layout == "batch").train(training)
        unpacked = UnpackedAttention.from_packed(packed)
        assert unpacked.training == training
        inputs, masks = _inputs(*sizes, layout), _masks(mask, layout == "single")
        for need_weights, average in ((True, True), (True, False), (False, True)):
            arguments = {**masks, "need_weights": need_weights, "average_attn_weights": average}
            found, right = (_outcome(module, inputs, arguments) for module in (unpacked, packed))
            assert len(found) == 4 + need_weights
            for one, other in zip(found, right, strict=True):
                torch.testing.assert_close(one, other)


@pytest.mark.parametrize("layout", ["batch", "sequence", "single"])
def test_self_attention_in_inference(layout: str) -> None:
    """There torch computes fused."""
    packed = _packed(batch_first=layout == "batch").eval()
    unpacked, x = UnpackedAttention.from_packed(packed), _inputs(WIDTH, WIDTH, layout)[1].detach()
    masks = _masks("padding", layout == "single", KEYS)
    with torch.no_grad():
        for found, right in zip(unpacked(x, x, x, **masks), packed(x, x, x, **masks), strict=True):
            torch.testing.assert_close(found, right)


def test_dropout_is_that_of_training_only() -> None:
    packed = _packed(dropout=0.5, batch_first=True)
    unpacked, inputs = UnpackedAttention.from_packed(packed), _inputs(WIDTH, WIDTH, "batch")
    outputs = []
    for module in (unpacked, packed):
        torch.manual_seed(1)
        outputs.append(module(*inputs)[0])
    torch.testing.assert_close(*outputs)  # torch drops entries in their order, which is the same in both
    torch.manual_seed(1)
    assert not torch.equal(*(unpacked(*inputs, need_weights=False)[0] for _ in range(2)))
    unpacked.eval()
    assert torch.equal(*(unpacked(*inputs, need_weights=False)[0] for _ in range(2)))


@pytest.mark.parametrize(
    "arguments", [{}, {"bias": False}, {"kdim": 7, "vdim": 10, "batch_first": True, "dropout": 0.1}]
)
def test_there_and_back_is_the_same_and_shares_no_memory(arguments: dict[str, Any]) -> None:
    packed = _packed(**arguments).eval()
    packed.out_proj.weight.requires_grad_(False)
    unpacked = UnpackedAttention.from_packed(packed)
    assert not unpacked.out_proj.weight.requires_grad and unpacked.q_proj.weight.requires_grad
    back = unpacked.to_packed()
    state = packed.state_dict()
    assert back.state_dict().keys() == state.keys() and not back.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in back.state_dict().items())
    for name in ("embed_dim", "num_heads", "dropout", "kdim", "vdim", "batch_first", "_qkv_same_embed_dim"):
        assert getattr(back, name) == getattr(packed, name)
    assert [p.requires_grad for p in back.parameters()] == [p.requires_grad for p in packed.parameters()]
    with torch.no_grad():
        for parameter in packed.parameters():
            parameter.zero_()
    assert all(p.any() for p in (*unpacked.parameters(), *back.parameters()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "add_bias_kv"),
        (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "add_zero_attn"),
        (lambda: prune.identity(nn.MultiheadAttention(8, 2), "in_proj_weight"), "computed by a mask"),
        (lambda: prune.identity(nn.MultiheadAttention(8, 2, kdim=4), "k_proj_weight"), "computed by a mask"),
        (lambda: prune.identity(nn.MultiheadAttention(8, 2), "in_proj_bias"), "in_proj_bias is computed by a mask"),
        (lambda: type("Own", (nn.MultiheadAttention,), {})(8, 2), "it is a Own"),
    ],
)
def test_what_cannot_be_unpacked_is_left_and_named(change: Any, reason: str) -> None:
    attention = change()
    model = nn.ModuleList([attention])
    report = unpack_attention(model)
    assert report.layers == () and reason in dict(report.skipped)["0"] and model[0] is attention
    with pytest.raises(ValueError, match=reason):
        UnpackedAttention.from_packed(attention)


def test_hooks_and_ties_are_left_and_named() -> None:
    model = nn.ModuleList([nn.MultiheadAttention(8, 2) for _ in range(5)])
    model[0].register_forward_hook(lambda *_: None)
    prune.identity(model[1].out_proj, "weight")
    model[2].in_proj_bias = model[3].in_proj_bias
    model[4].out_proj.register_forward_hook(lambda *_: None)
    report = unpack_attention(model)
    assert [name for name, _ in report.skipped] == ["0", "1", "2", "3", "4"] and not report.layers
    model = nn.ModuleList([nn.MultiheadAttention(8, 2)] * 2)
    unpack_attention(model)
    assert model[0] is model[1]
    model[0].k_proj.register_forward_hook(lambda *_: None)
    assert "hooks" in pack_attention(model).skipped[0][1]
    prune.identity(model[0].v_proj, "weight")
    assert "v_proj has other parameters" in pack_attention(model).skipped[0][1]


@pytest.mark.parametrize(
    ("sizes", "arguments", "message"),
    [
        (((2, 4, 12), (2, 5, 12), (2, 6, 12)), {}, "as many keys as values"),
        (((2, 4, 12), (1, 5, 12), (1, 5, 12)), {}, "of as many samples as the queries"),
        (((2, 4, 12), (5, 12), (5, 12)), {}, "three dimensions"),
        (((12,), (12,), (12,)), {}, "three dimensions"),
        (((2, 4, 12), (2, 5, 12), (2, 5, 12)), {"is_causal": True}, "attn_mask with is_causal"),
        (((2, 4, 12), (2, 5, 12), (2, 5, 12)), {"attn_mask": torch.zeros(5, 4)}, r"\(4, 5\) or \(6, 4, 5\)"),
        (
            ((2, 4, 12), (2, 5, 12), (2, 5, 12)),
            {"key_padding_mask": torch.zeros(2, 4)},
            r"shape \(2, 5\), got \(2, 4\)",
        ),
        (((2, 4, 12), (2, 5, 12), (2, 5, 12)), {"attn_mask": torch.zeros(4, 5).int()}, "a mask of bool"),
    ],
)
def test_inputs_that_do_not_fit_are_named(sizes: Any, arguments: dict[str, Any], message: str) -> None:
    attention = UnpackedAttention(12, 3, batch_first=True)
    with pytest.raises(ValueError, match=message):
        attention(*(torch.randn(size) for size in sizes), **arguments)


def test_sizes_and_wholes_that_do_not_fit_are_refused() -> None:
    for sizes in ((12, 5), (0, 1), (12, 0)):
        with pytest.raises(ValueError, match="num_heads divides"):
            UnpackedAttention(*sizes)
    with pytest.raises(ValueError, match=r"use UnpackedAttention\.from_packed"):
        unpack_attention(nn.MultiheadAttention(8, 2))
    with pytest.raises(ValueError, match=r"use its to_packed\(\)"):
        pack_attention(UnpackedAttention(8, 2))
    sparse = UnpackedAttention(8, 2)
    sparsify(sparse, 0.5)
    with pytest.raises(ValueError, match="its q_proj is a SparseLinear; densify the model first"):
        sparse.to_packed()
    with pytest.raises(ValueError, match="it is a Linear"):
        UnpackedAttention.from_packed(nn.Linear(8, 8))


def _transformer() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(16, 2, 2, 1, 32, dropout=0.0, batch_first=True, dtype=torch.float64).eval()


def _runs() -> dict[str, Any]:
    padding = torch.arange(7) >= torch.tensor([[7], [4], [5]])
    source, target = torch.randn(3, 7, 16, dtype=torch.float64), torch.randn(3, 4, 16, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    masks = {"src_key_padding_mask": padding, "memory_key_padding_mask": padding, "tgt_mask": causal}
    return {"src": source, "tgt": target, "tgt_is_causal": True, **masks}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_whole_transformer_becomes_sparse_and_dense_again() -> None:
    model, example = _transformer(), _runs()
    dense = deepcopy(model)
    report = unpack_attention(model)
    assert len(report.layers) == 4 * 4 and not report.skipped
    with torch.no_grad():
        right = dense(**example)
        torch.testing.assert_close(model(**example), right)
        report = sparsify(model, 0.5, method="magnitude")
        assert len(report.layers) == 4 * 4 + 3 * 2 and not report.skipped
        assert "its q_proj is a SparseLinear" in str(pack_attention(model))
        sparse = model(**example)
        densify(model)
        torch.testing.assert_close(model(**example), sparse)
        assert not pack_attention(model).skipped
        torch.testing.assert_close(model(**example), sparse)
    assert model.state_dict().keys() == dense.state_dict().keys()
    assert model.encoder.use_nested_tensor and model.encoder.layers[0].activation_relu_or_gelu == 1


def test_it_trains_moves_compiles_and_comes_back_from_a_file(tmp_path: Path) -> None:
    model, example = (
        _transformer().float(),
        {name: x.float() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in _runs().items()},
    )
    unpack_attention(model)
    sparsify(model, 0.7, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    topology = offpath.RigL(model, optimizer, update_freq=2, end_step=8, seed=0)
    losses = []
    for _ in range(6):
        optimizer.zero_grad()
        loss = model.train()(**example).square().mean()
        loss.backward()
        losses.append(loss.item())
        topology.step()
    topology.close()
    assert losses[-1] < losses[0]
    model.eval()
    with torch.no_grad():
        right = model(**example)
        run = torch.compile(model, backend="eager", fullgraph=True)
        torch.testing.assert_close(run(**example), right)
        offpath.save(model, tmp_path / "model.safetensors")
        other = _transformer().float()
        with pytest.raises(StorageError, match=r"q_proj.* call offpath\.unpack_attention"):
            offpath.load(tmp_path / "model.safetensors", other)
        unpack_attention(other)
        offpath.load(tmp_path / "model.safetensors", other)
        torch.testing.assert_close(other(**example), right)


def test_pruning_and_compress_find_the_projections() -> None:
    torch.manual_seed(0)
    model, x = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1), torch.randn(3, 5, 16)
    assert "unpack_attention" in dict(offpath.prune(deepcopy(model), 0.5).skipped)["layers.0.self_attn"]
    assert "unpack_attention" in dict(sparsify(deepcopy(model), 0.5).skipped)["layers.0.self_attn.out_proj"]
    unpack_attention(model)
    assert len(offpath.prune(model, 0.8, "wanda", [x]).layers) == 6
    report = offpath.compress(model, example=x, goal="size")
    assert len(report.swapped) == 6
    assert isinstance(model.layers[0].self_attn.k_proj, SparseLinear)
