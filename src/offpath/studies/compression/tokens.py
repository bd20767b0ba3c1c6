"""Texts as the inputs of a transformer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from offpath.studies.compression.pretrained import Pretrained
from offpath.studies.config import RunError
from offpath.studies.data.errors import DataError

MAX_TOKENS = 128
BATCH_TEXTS = 64
Inputs = dict[str, Tensor]


def read_lines(path: Path) -> list[str]:
    """The lines of a text that are not empty. Raises `DataError` for a file that is no text, or an empty one."""
    try:
        lines = [line.strip() for line in path.expanduser().read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a text in {path}", str(error), "name a file of plain text with --data FILE") from error
    lines = [line for line in lines if line]
    if not lines:
        raise DataError(f"lines of text in {path}", "none", "name a file of plain text with --data FILE")
    return lines


def calibration_inputs(pretrained: Pretrained, lines: Sequence[str], batches: int, batch_size: int) -> list[Inputs]:
    """What a model is pruned with: `batches` of `batch_size` lines, spread evenly over the text; of a decoder, windows.

    Lines of a batch are of similar length, so that little of it is padding.
    """
    if pretrained.decoder:
        windows = text_windows(pretrained, lines)
        chosen = windows[_spread(len(windows), batches * batch_size)]
        return [{"input_ids": some} for some in chosen.split(batch_size)]
    ids = token_ids(pretrained, [lines[place] for place in _spread(len(lines), batches * batch_size)])
    return [padded(pretrained, [ids[place] for place in places]) for places in by_length(ids, batch_size)]


def _spread(count: int, wanted: int) -> list[int]:
    wanted = min(count, wanted)
    return [place * count // wanted for place in range(wanted)]


def token_ids(pretrained: Pretrained, texts: Sequence[str], max_tokens: int = MAX_TOKENS) -> list[list[int]]:
    """The tokens of each text with the marks of its ends, at most `max_tokens` and no more than the model reads."""
    most = min(max_tokens, longest(pretrained))
    found: list[list[int]] = pretrained.tokenizer(list(texts), truncation=True, max_length=most)["input_ids"]
    return found


def by_length(ids: Sequence[Sequence[int]], batch_size: int) -> Iterator[list[int]]:
    """Places in `ids`, in batches of similar length.

    >>> list(by_length([[1, 2, 3], [1], [1, 2]], 2))
    [[1, 2], [0]]
    """
    order = sorted(range(len(ids)), key=lambda place: len(ids[place]))
    return (order[start : start + batch_size] for start in range(0, len(order), batch_size))


def padded(pretrained: Pretrained, ids: Sequence[Sequence[int]]) -> Inputs:
    """One batch: `input_ids` and `attention_mask` [texts, longest], filled up at the end."""
    longest = max(map(len, ids))
    filler = pretrained.tokenizer.pad_token_id or 0
    tokens = torch.full((len(ids), longest), filler)
    mask = torch.zeros(len(ids), longest, dtype=torch.long)
    for row, text in enumerate(ids):
        tokens[row, : len(text)] = torch.tensor(text)
        mask[row, : len(text)] = 1
    return {"input_ids": tokens, "attention_mask": mask}


def text_windows(pretrained: Pretrained, lines: Sequence[str], length: int = MAX_TOKENS) -> Tensor:
    """The lines as one text, cut into windows of `length` tokens: int64 [windows, length], the rest left out.

    Raises `RunError` for a text of fewer tokens.
    """
    length = min(length, longest(pretrained))
    tokenizer = pretrained.tokenizer
    ids = torch.tensor(tokenizer("\n".join(lines), add_special_tokens=False, verbose=False)["input_ids"])
    if len(ids) < length:
        raise RunError(f"expected a text of at least {length} tokens in --data, got {len(ids)}; name a longer one")
    return ids[: len(ids) // length * length].view(-1, length)


def random_tokens(pretrained: Pretrained, texts: int, tokens: int) -> Inputs:
    """An input to time a model with: `texts` of `tokens` random tokens each, none of them padding.

    Raises `RunError` for more tokens than the model has places for.
    """
    if tokens > longest(pretrained):
        raise RunError(
            f"expected at most the {longest(pretrained)} tokens that the model reads, got {tokens}; name fewer with "
            "--tokens"
        )
    generator = torch.Generator().manual_seed(0)
    vocabulary = int(pretrained.model.config.vocab_size)  # type: ignore[union-attr, arg-type]
    ids = torch.randint(vocabulary // 2, vocabulary, (texts, tokens), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def longest(pretrained: Pretrained) -> int:
    """How many tokens the model has places for."""
    config = getattr(pretrained.model, "config", None)
    return int(getattr(config, "max_position_embeddings", None) or MAX_TOKENS)
