"""`compress` on models of Hugging Face transformers, and on what llm-compressor leaves on disk."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import nn

import offpath
from compress_cases import few_rounds as few_rounds
from offpath import SparseLinear
from offpath.nn import Int8Embedding, Int8SparseLinear

transformers = pytest.importorskip("transformers")
WIDTH, VOCABULARY = 96, 60


def _bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4, intermediate_size=192
    )
    return transformers.BertModel(config)


def _gpt2() -> nn.Module:
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=WIDTH, n_layer=2, n_head=4)
    )


def _llama() -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=WIDTH,
            intermediate_size=160,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


# Model, how many layers of a pass are linear, the embeddings that nothing else uses.
MODELS = {
    "bert": (_bert, 2 * 6 + 1, ["embeddings.word_embeddings", "embeddings.position_embeddings"]),
    "gpt2": (_gpt2, 2 * 4, ["transformer.wpe"]),
    "llama": (_llama, 2 * 7, ["model.embed_tokens"]),
}


def _pruned(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    offpath.prune(model, 0.9, filter_fn=lambda _, fqn: fqn != "lm_head")
    return model


def _example() -> dict[str, torch.Tensor]:
    ids = torch.randint(VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _first(output: object) -> torch.Tensor:
    return output[0]  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(MODELS))
def test_a_pruned_model_computes_the_same(name: str, dtype: torch.dtype) -> None:
    model = _pruned(name).to(dtype)
    dense = copy.deepcopy(model)
    report = offpath.compress(model, example=_example(), goal="size")
    assert len(report.swapped) == MODELS[name][1] == sum(type(m) is SparseLinear for m in model.modules())
    assert {layer.kind for layer in report.layers} == {"Conv1D" if name == "gpt2" else "Linear"}
    whole = report.end_to_end
    assert whole is not None and whole.difference <= whole.bound < (0.1 if dtype is torch.bfloat16 else 1e-3)
    with torch.no_grad():
        y, right = (_first(m(**_example())).double() for m in (model, dense))
    assert float((y - right).norm() / right.norm()) <= whole.difference + 1e-12


def test_a_tied_head_stays_with_its_embedding() -> None:
    model = MODELS["gpt2"][0]()
    offpath.prune(model.transformer, 0.9)
    report = offpath.compress(model, goal="size", embeddings="int8")
    assert ("lm_head", "its weight is tied to another module") in report.skipped
    assert ("transformer.wte", "its weight is tied to another module") in report.skipped
    assert model.lm_head.weight is model.transformer.wte.weight


@pytest.mark.parametrize("name", list(MODELS))
def test_int8_layers_and_embeddings(name: str) -> None:
    model = _pruned(name)
    dense = copy.deepcopy(model)
    report = offpath.compress(model, example=_example(), goal="size", precision="int8", embeddings="int8")
    assert len(report.swapped) == sum(type(m) is Int8SparseLinear for m in model.modules()) == MODELS[name][1]
    assert {layer.becomes for layer in report.swapped} == {"Int8SparseLinear"}
    swapped = [e.name for e in report.embeddings]
    assert set(MODELS[name][2]) <= set(swapped)
    assert all(type(model.get_submodule(e)) is Int8Embedding for e in swapped) and "int8 embedding" in str(report)
    assert all(e.bytes_after < 0.3 * e.bytes_before for e in report.embeddings)
    whole = report.end_to_end
    assert whole is not None and 0 < whole.difference <= whole.bound
    with torch.no_grad():
        y, right = (_first(m(**_example())) for m in (model, dense))
    assert 0 < float((y - right).norm() / right.norm()) < 0.05


def test_a_compressed_bert_compiles_in_one_graph() -> None:
    model = _pruned("bert")
    offpath.compress(model, batch=16, goal="size")
    with torch.no_grad():
        right = _first(model(**_example()))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(_first(compiled(**_example())), right, rtol=1e-4, atol=1e-5)


def test_what_a_model_reads_is_left_and_the_rest_computes_the_same() -> None:
    config = transformers.T5Config(
        vocab_size=VOCABULARY, d_model=WIDTH, d_kv=24, d_ff=192, num_layers=1, num_heads=4, dropout_rate=0.0
    )
    model = transformers.T5Model(config).eval()
    offpath.prune(model, 0.9)
    dense, given = copy.deepcopy(model), {**_example(), "decoder_input_ids": _example()["input_ids"]}
    report = offpath.compress(model, example=given, goal="size")
    read = {f"{half}.block.0.layer.{at}.DenseReluDense.wo" for half, at in (("encoder", 1), ("decoder", 2))}
    assert read == {name for name, reason in report.skipped if reason == "a T5DenseActDense reads its weight"}
    assert len(report.swapped) == 3 * 4 + 2
    with torch.no_grad():
        y, right = (_first(m(**given)).double() for m in (model, dense))
    whole = report.end_to_end
    assert whole is not None and float((y - right).norm() / right.norm()) <= whole.difference + 1e-12 <= whole.bound


def test_a_decoder_generates_the_same_tokens() -> None:
    model = _pruned("llama")
    wanted = model.generate(**_example(), max_new_tokens=4, do_sample=False, pad_token_id=0)
    offpath.compress(model, goal="size")
    assert torch.equal(model.generate(**_example(), max_new_tokens=4, do_sample=False, pad_token_id=0), wanted)


def test_what_llm_compressor_exports_by_default_loads_as_zeros(tmp_path: Path) -> None:
    """Its "dense" format: the pruned weights as they are, and a config that names compressed-tensors."""
    pytest.importorskip("compressed_tensors")
    model = _pruned("llama")
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    sparsity = {"format": "dense", "global_sparsity": 0.9, "sparsity_structure": "unstructured", "targets": ["Linear"]}
    quantisation = {"quant_method": "compressed-tensors", "format": "dense", "sparsity_config": sparsity}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": quantisation}))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, local_files_only=True)
    report = offpath.compress(loaded, goal="size")
    assert len(report.swapped) == MODELS["llama"][1]
    first = loaded.model.layers[0].mlp.up_proj
    assert torch.equal(first.to_dense().weight, model.model.layers[0].mlp.up_proj.weight)
