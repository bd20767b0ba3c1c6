"""The texts of the study: pairs to test on, and others to calibrate with and to train on."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from offpath.studies.compression.config import StudyConfig
from offpath.studies.compression.tokens import by_length
from offpath.studies.config import RunError
from offpath.studies.data import PAIRS, Pairs, load_pairs

# Batches that are sorted by length together: enough for little padding, few enough to stay random.
SORTED_BATCHES = 32


@dataclass(frozen=True)
class StudyTexts:
    """`tests`: pairs by the name of their set; `train`: texts of which no pair is among these."""

    tests: dict[str, Pairs]
    train: list[str]


def study_texts(config: StudyConfig, data: Path | None) -> StudyTexts:
    """Load and split the sets. Raises `DataError`, and `RunError` where there is too little text."""
    if data is not None and PAIRS[config.pairs] is None:
        raise RunError(f"expected no --data for {config.pairs}, which is always there; leave it out")
    pairs = load_pairs(config.pairs, data)
    generator = torch.Generator().manual_seed(config.seed)
    order = torch.randperm(len(pairs.queries), generator=generator).tolist()
    held_back, rest = order[: config.test_pairs], order[config.test_pairs :]
    other = load_pairs(config.other)
    elsewhere = torch.randperm(len(other.queries), generator=generator).tolist()
    if config.other == config.pairs:  # what is trained on is no other text
        elsewhere = held_back
    tested = {pairs.documents[place] for place in held_back} | {pairs.queries[place] for place in held_back}
    train = [text for place in rest for text in (pairs.queries[place], pairs.documents[place]) if text not in tested]
    if len(held_back) < config.test_pairs or len(train) < config.train_texts:
        raise RunError(
            f"expected {config.test_pairs} pairs and {config.train_texts} other texts in {pairs.name}, got "
            f"{len(held_back)} and {len(train)}"
        )
    chosen = torch.randperm(len(train), generator=generator)[: config.train_texts].tolist()
    tests = {config.pairs: _chosen(pairs, held_back)}
    tests.setdefault(config.other, _chosen(other, elsewhere[: config.other_pairs]))
    return StudyTexts(tests, [train[place] for place in chosen])


def _chosen(pairs: Pairs, places: list[int]) -> Pairs:
    queries, documents = ([texts[place] for place in places] for texts in (pairs.queries, pairs.documents))
    return Pairs(pairs.name, queries, documents, pairs.source)


def shuffled_batches(ids: list[list[int]], batch_size: int, seed: int) -> Iterator[list[int]]:
    """Places in `ids`, batch after batch for ever: texts of similar length together, all of them before any again."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(ids), generator=generator).tolist()
        for start in range(0, len(order), batch_size * SORTED_BATCHES):
            some = order[start : start + batch_size * SORTED_BATCHES]
            batches = list(by_length([ids[place] for place in some], batch_size))
            for number in torch.randperm(len(batches), generator=generator).tolist():
                yield [some[place] for place in batches[number]]
