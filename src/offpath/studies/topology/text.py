"""Predicting the next character of a text with a small transformer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from offpath.studies.data import DataError, DataNotFoundError
from offpath.studies.topology.config import TaskConfig
from offpath.studies.topology.task import Score, Task

HELD_BACK_SHARE = 0.1
SCORED_WINDOWS = 600
EMBEDDING_STD = 0.02  # Radford et al., 2019
TINYSHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


class Block(nn.Module):
    """Attention to what stands before, then an MLP; each is added to its input, which is normalised first."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.mix = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        """From [batch, context, width] to the same."""
        batch, context, width = x.shape
        parts = self.query_key_value(self.norm_attention(x)).view(batch, context, 3, self.heads, -1)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.mix(attended.transpose(1, 2).reshape(batch, context, width))
        flat = self.norm_mlp(x).view(-1, width)  # two-dimensional, so that the two layers can hand over untransposed
        return x + self.mlp(flat).view_as(x)


class Transformer(nn.Module):
    """Characters [batch, context] to logits [batch * context, characters]."""

    def __init__(self, characters: int, width: int, heads: int, blocks: int, context: int, hidden: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(characters, width), nn.Embedding(context, width)
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=EMBEDDING_STD)
        self.blocks = nn.Sequential(*(Block(width, heads, hidden) for _ in range(blocks)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the character that follows each."""
        x = self.characters(tokens) + self.places.weight[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)).flatten(0, 1))


class Text(Task):
    """A text, cut into its first 90 % to train on and the rest to score; tuning holds back the last tenth of the first.

    A step reads windows from random places; the score, at most 600 windows spread evenly over its part.
    """

    def __init__(self, config: TaskConfig, data: Path | None) -> None:
        self.config = config
        text, self.source = _read(config.data, data)
        characters = sorted(set(text))
        self.classes = len(characters)
        numbers = {character: number for number, character in enumerate(characters)}
        tokens = torch.tensor([numbers[character] for character in text])
        held_back = int(HELD_BACK_SHARE * len(tokens))
        context = config.sizes[3]
        if held_back <= context + 1:
            raise DataError(
                f"a text of more than {10 * context + 20} characters", f"{len(tokens)}", "name another file"
            )
        self._parts = {
            False: (tokens[:-held_back], tokens[-held_back:]),
            True: (tokens[: -2 * held_back], tokens[-2 * held_back : -held_back]),
        }

    def dense_model(self, sizes: tuple[int, ...]) -> nn.Module:
        width, heads, blocks, context, *hidden = sizes
        return Transformer(self.classes, width, heads, blocks, context, *(hidden or [4 * width]))

    def dense_parameters(self, sizes: tuple[int, ...]) -> int:
        width, _, blocks, context, *given = sizes
        hidden = given[0] if given else 4 * width
        a_block = 4 * width + (3 * width + width) * (width + 1) + hidden * (width + 1) + width * (hidden + 1)
        return (self.classes + context) * width + blocks * a_block + 2 * width + self.classes * (width + 1)

    def narrower(self) -> Iterator[tuple[int, ...]]:
        width, heads, blocks, context = self.config.sizes
        widths, hiddens = range(heads, width, heads), range(1, 4 * width)
        shapes = sorted(product(widths, hiddens), key=lambda shape: abs(shape[1] / (4 * shape[0]) - 1))
        return ((narrow, heads, blocks, context, hidden) for narrow, hidden in shapes)

    def batch(self, seed: int, step: int, tuning: bool) -> tuple[Tensor, Tensor]:
        tokens, context = self._parts[tuning][0], self.config.sizes[3]
        generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
        starts = torch.randint(len(tokens) - context, (self.config.batch_size, 1), generator=generator)
        windows = tokens[starts + torch.arange(context + 1)]
        return windows[:, :-1], windows[:, 1:].flatten()

    @torch.no_grad()
    def score(self, model: nn.Module, tuning: bool) -> Score:
        tokens, context = self._parts[tuning][1], self.config.sizes[3]
        count = min(SCORED_WINDOWS, (len(tokens) - 1) // context)
        starts = torch.linspace(0, len(tokens) - context - 1, count).long()[:, None]
        windows = tokens[starts + torch.arange(context + 1)]
        losses = [
            float(functional.cross_entropy(model(some[:, :-1]), some[:, 1:].flatten(), reduction="sum"))
            for some in windows.split(64)
        ]
        return Score(sum(losses) / (count * context), None)


def _read(name: str, data: Path | None) -> tuple[str, str]:
    """The text and where it came from."""
    if name == "python-source":  # a text that is always there
        path = Path(argparse.__file__)
    elif data is None:
        raise DataNotFoundError(
            "the text tinyshakespeare in one file",
            "no file was named",
            f"download {TINYSHAKESPEARE_URL} and name it with --data tinyshakespeare=FILE",
        )
    else:
        path = data.expanduser()
    try:
        return path.read_text(encoding="utf-8"), str(path)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"a text in {path}", str(error), "name the file with --data tinyshakespeare=FILE") from error
