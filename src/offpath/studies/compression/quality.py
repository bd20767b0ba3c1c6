"""How good a model is: by its embeddings, or by how well it predicts a text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from offpath.studies.compression.pretrained import Pretrained
from offpath.studies.compression.tokens import BATCH_TEXTS, Inputs, by_length, padded


@dataclass(frozen=True)
class EmbeddingQuality:
    """`rank_correlation` of all pairwise similarities of the documents with those of the dense model (Spearman's rho);
    `retrieval`: the share of queries whose nearest document is theirs."""

    rank_correlation: float
    retrieval: float


@torch.no_grad()
def embed(
    pretrained: Pretrained,
    ids: Sequence[Sequence[int]],
    on_batch: Callable[[int, int], object] = lambda done, total: None,
) -> Tensor:
    """Embeddings of texts, given as tokens: float32 [texts, features], of unit length.

    `on_batch(done, total)` is called after every batch, with numbers of texts.
    """
    order, rows, done = [], [], 0
    for places in by_length(ids, BATCH_TEXTS):
        rows.append(mean_embedding(pretrained.model, padded(pretrained, [ids[place] for place in places])))
        order += places
        done += len(places)
        on_batch(done, len(ids))
    return torch.cat(rows)[torch.tensor(order).argsort()]


def mean_embedding(model: torch.nn.Module, inputs: Inputs) -> Tensor:
    """Embeddings of a batch, with gradients: the mean of the last hidden states over a text's tokens, normalised."""
    states = getattr(model, "base_model", model)(**inputs).last_hidden_state.float()
    mask = inputs["attention_mask"].unsqueeze(-1)
    return functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)


def embedding_quality(queries: Tensor, documents: Tensor, dense_documents: Tensor) -> EmbeddingQuality:
    """Compare embeddings of pairs of texts with each other, and with those of the dense model."""
    return EmbeddingQuality(similarity_correlation(documents, dense_documents), retrieval_at_1(queries, documents))


def similarity_correlation(embeddings: Tensor, others: Tensor) -> float:
    """Spearman's rank correlation of the inner products of all pairs of rows, of one matrix against another."""
    from scipy.stats import spearmanr  # late: it takes a second

    pairs = torch.triu_indices(len(embeddings), len(embeddings), 1)
    first, second = ((e @ e.T)[pairs[0], pairs[1]].numpy() for e in (embeddings, others))
    return float(spearmanr(first, second).statistic)


def retrieval_at_1(queries: Tensor, documents: Tensor) -> float:
    """The share of rows of `queries` whose largest inner product is with the same row of `documents`.

    >>> retrieval_at_1(torch.eye(3), torch.eye(3)[[0, 2, 1]])
    0.3333333432674408
    """
    nearest = (queries @ documents.T).argmax(1)
    return float((nearest == torch.arange(len(queries))).float().mean())


@torch.no_grad()
def perplexity(pretrained: Pretrained, windows: Tensor, batch_size: int = 8) -> float:
    """exp of the mean loss, in nats, of each token of `windows` [n, length] after those before it in its window."""
    total = 0.0
    for some in windows.split(batch_size):
        logits = pretrained.model(input_ids=some, use_cache=False).logits[:, :-1].float()
        total += float(functional.cross_entropy(logits.flatten(0, 1), some[:, 1:].flatten(), reduction="sum"))
    return math.exp(total / (len(windows) * (windows.shape[1] - 1)))
