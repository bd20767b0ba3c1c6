"""Transformers of a few thousand weights and a tokenizer of a few words, as checkpoints in a folder."""

from __future__ import annotations

from pathlib import Path

import torch

COMMON = """
return the a of to is in for and file if from object string list with as this an name value be by that default
function class or not text new data type module number line true false none used all are key set item can given
code argument read write path test use it method time first
"""
WORDS = COMMON.split()
MARKS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES = {"vocab_size": len(MARKS) + len(WORDS)}


def tiny_checkpoint(kind: str, folder: Path, **sizes: int) -> Path:
    """Write a model of `kind` ("bert", "gpt2" or "llama") to `folder`; `sizes` are a BERT's that are to differ."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*MARKS, *WORDS])}, "[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    marks = {"unk_token": "[UNK]"}
    if kind == "bert":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
        )
        marks |= {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    torch.manual_seed(0)
    transformers.utils.logging.disable_progress_bar()
    _model(kind, sizes).save_pretrained(folder)
    transformers.utils.logging.enable_progress_bar()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **marks).save_pretrained(folder)
    return folder


def _model(kind: str, sizes: dict[str, int]) -> torch.nn.Module:
    import transformers

    if kind == "bert":
        # Weights larger than BERT's own, so that texts are far apart.
        config = transformers.BertConfig(**{
            **SIZES, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128,
            "max_position_embeddings": 128, "initializer_range": 0.2, **sizes,
        })  # fmt: skip
        return transformers.BertModel(config)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            **SIZES, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=2, eos_token_id=3
        )
        return transformers.GPT2LMHeadModel(config)
    config = transformers.LlamaConfig(
        **SIZES, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=128, max_position_embeddings=128, bos_token_id=2, eos_token_id=3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)
