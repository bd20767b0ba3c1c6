"""What a file says of a model of `transformers`: the model that was saved, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import offpath
from offpath import StorageError
from offpath.ops import forced_methods
from offpath.storage import hugging_face
from offpath.storage.hugging_face import _parameters_on_meta

transformers = pytest.importorskip("transformers")
TOKENS = torch.arange(12).view(2, 6)


def _bert() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16,
    )  # fmt: skip
    model = transformers.BertModel(config).eval()
    offpath.sparsify(model, 0.5, filter_fn=lambda module, name: "intermediate" in name)
    return model


def _llama() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=32, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "activation": lambda model: setattr(model.encoder.layer[0].intermediate, "intermediate_act_fn", nn.ReLU()),
    "setting": lambda model: setattr(model.encoder.layer[0].output.LayerNorm, "eps", 0.1),
    "a module's own setting": lambda model: setattr(model.encoder.layer[0].attention.self, "scaling", 3.0),
    "buffer that no file holds": lambda model: model.embeddings.position_ids.add_(1),
    "forward": lambda model: setattr(model.encoder.layer[0].output, "forward", lambda states, residual: residual),
    "module taken out": lambda model: setattr(model, "pooler", None),
    "layer taken out": lambda model: setattr(model.encoder, "layer", model.encoder.layer[:1]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_model_that_its_config_does_not_build_needs_a_model(tmp_path: Path, change: str) -> None:
    model = _bert()
    CHANGES[change](model)
    offpath.save(model, tmp_path / "m")
    with pytest.raises(StorageError, match="pass model="):
        offpath.load(tmp_path / "m")


@torch.no_grad()
def test_use_and_training_leave_a_model_what_it_is(tmp_path: Path) -> None:
    model = _bert()
    with forced_methods(forward="row-wise"):  # nothing to measure
        model(TOKENS, output_hidden_states=True)
    model.train().to(torch.bfloat16)
    model.embeddings.word_embeddings = offpath.nn.Int8Embedding.from_dense(model.embeddings.word_embeddings)
    offpath.save(model, tmp_path / "m")
    again = offpath.load(tmp_path / "m")
    with forced_methods(forward="row-wise"):
        assert torch.equal(again(TOKENS).last_hidden_state, model.eval()(TOKENS).last_hidden_state)


@torch.no_grad()
def test_a_model_that_was_resized_and_generated_is_described(tmp_path: Path) -> None:
    model = _llama()
    model.resize_token_embeddings(60)
    model.generate(TOKENS, max_new_tokens=40, do_sample=False)  # beyond the positions that it was made for
    offpath.save(model, tmp_path / "m")
    assert torch.equal(offpath.load(tmp_path / "m")(TOKENS).logits, model(TOKENS).logits)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_buffers_that_no_file_holds_are_rounded_as_the_model_was(tmp_path: Path, dtype: torch.dtype) -> None:
    _llama().save_pretrained(tmp_path / "checkpoint")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint").to(dtype)
    model.model.gradient_checkpointing = True  # what the enabling of it sets
    offpath.save(model, tmp_path / "m")
    again = offpath.load(tmp_path / "m")
    assert again.model.rotary_emb.inv_freq.dtype == dtype
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    offpath.save(model.float(), tmp_path / "m")  # its buffers are float32 again, and what they were rounded to
    if dtype == torch.float64:
        assert torch.equal(offpath.load(tmp_path / "m")(TOKENS).logits, model(TOKENS).logits)
    else:
        with pytest.raises(StorageError, match="pass model="):
            offpath.load(tmp_path / "m")


@pytest.mark.parametrize("cast", [[], {"model.rotary_emb.no": "bfloat16"}, {"model.rotary_emb.inv_freq": "Tensor"}])
def test_what_a_file_says_of_buffers_is_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cast: object) -> None:
    monkeypatch.setattr(hugging_face, "_casts", lambda own, built: cast)
    offpath.save(_llama(), tmp_path / "m")
    with pytest.raises(StorageError, match=r"pass model=|expected a buffer"):
        offpath.load(tmp_path / "m")


def test_a_model_that_is_drawn_within_bounds_is_built_and_draws_nothing(tmp_path: Path) -> None:
    config = transformers.ViTConfig(
        hidden_size=96, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, image_size=32, patch_size=8
    )
    model = transformers.ViTModel(config)
    offpath.save(model, tmp_path / "m")
    before = torch.get_rng_state()
    # Memory that is handed out again holds what was in it, which is in no bounds.
    freed = [torch.full_like(parameter, 1e9) for parameter in model.parameters()]
    del freed
    again = offpath.load(tmp_path / "m")
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_parameter_of_two_places_stays_one_where_parameters_are_on_meta() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = self.second = nn.Parameter(torch.ones(3), requires_grad=False)

    with _parameters_on_meta():
        model = Twice()
    assert model.first is model.second and model.first.is_meta and not model.first.requires_grad
    assert not Twice().first.is_meta
