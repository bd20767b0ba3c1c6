"""Pruning Hugging Face's models: BERT, GPT-2 with its transposed layers, Llama, and a trained MiniLM on real text."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

import offpath
import prune_oracle as oracle
from offpath.studies.sae import minilm


def _bert() -> nn.Module:
    return BertForMaskedLM(
        BertConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    )


def _gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=2))


def _llama() -> nn.Module:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    )


def _batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(64, (4, 16), generator=generator)} for _ in range(2)]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
@pytest.mark.parametrize(("make", "layers"), [(_bert, 13), (_gpt2, 8), (_llama, 15)])
def test_models_of_hugging_face_are_pruned_whole(make, layers: int, method: str) -> None:
    torch.manual_seed(0)
    model = make().train()
    passes: list[tuple[int, int]] = []
    batches = _batches()
    report = offpath.prune(
        model,
        0.5,
        method,
        calibration=None if method == "magnitude" else batches,
        progress=lambda *now: passes.append(now),
    )
    assert len(report.layers) == layers and report.sparsity == 0.5
    assert all(layer.sparsity == 0.5 for layer in report.layers)
    # Embeddings are tied to the heads of BERT and GPT-2.
    assert [reason for _, reason in report.skipped] == ["its weight is tied to another module"] * (make is not _llama)
    assert model.training and bool(model(**batches[0]).logits.isfinite().all())
    # The survey, two blocks, and the head if it is a layer of its own.
    assert passes[-1][0] == passes[-1][1] == (layers if method == "magnitude" else 2 * (3 + (make is not _gpt2)))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_the_transposed_layer_is_pruned_as_what_it_computes(method: str) -> None:
    torch.manual_seed(0)
    model = _gpt2().double().eval()
    layer = model.transformer.h[0].mlp.c_proj
    fed: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: fed.append(args[0].detach().flatten(0, 1)))
    batches = _batches()
    for batch in batches:
        model(**batch)
    handle.remove()
    weight, x = layer.weight.detach().T.numpy().copy(), torch.cat(fed).numpy()
    offpath.prune(model, 0.5, method, calibration=batches)
    got = layer.weight.detach().T.numpy()
    if method == "wanda":
        assert np.array_equal(got, oracle.wanda(weight, x, weight.shape[1] // 2))
        return
    expected = oracle.sparsegpt(weight, x, weight.size // 2, 128, 0.01)
    assert np.array_equal(got != 0, expected != 0)
    assert np.abs(got - expected).max() <= oracle.sparsegpt_bound(x, 0.01, expected)


def _trained() -> BertModel:
    model = BertModel.from_pretrained(minilm.folder(), add_pooling_layer=False, local_files_only=True).eval()
    model.encoder.layer = model.encoder.layer[:2]
    return model


@pytest.mark.skipif(not minilm.is_installed(), reason="the sae extra, which carries a trained model, is not installed")
def test_calibrated_pruning_of_a_trained_model_loses_less_on_text_it_has_not_seen() -> None:
    encode, _ = minilm.load(1)
    ids = torch.tensor(encode(Path(argparse.__file__).read_text())[: 12 * 64]).view(-1, 64)
    seen, unseen = ids[:8], ids[8:]
    lost = {}
    with torch.no_grad():
        dense = _trained()(unseen).last_hidden_state
        for method in ("magnitude", "wanda", "sparsegpt"):
            model = _trained()
            offpath.prune(model, 0.6, method, calibration=None if method == "magnitude" else [seen])
            lost[method] = float((model(unseen).last_hidden_state - dense).norm() / dense.norm())
    assert max(lost["wanda"], lost["sparsegpt"]) < lost["magnitude"], lost


@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_what_attention_keeps_dense_stands_in_the_report(method: str) -> None:
    """It has three quarters of its weights in a parameter of its own, and calls the layer for its outputs never."""
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    report = offpath.prune(model, 0.5, method, [torch.randn(2, 3, 16)] if method == "wanda" else None)
    reasons = dict(report.skipped)
    assert "parameters of its own and no layers" in reasons["self_attn"]
    assert ("reads its weight instead of calling it" in reasons.get("self_attn.out_proj", "")) == (method == "wanda")
    linears = {layer.name for layer in report.layers} - {"self_attn.out_proj"}
    assert linears == {"linear1", "linear2"} and (model.linear1.weight == 0).any()
