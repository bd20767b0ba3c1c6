"""A sparse autoencoder as the papers write it: every latent of every row, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.nn import SparseAutoencoder


def dense_loss(sae: SparseAutoencoder, x: Tensor, dead: Tensor) -> dict[str, Tensor]:
    """What `sae.loss(x)` is in training, given which latents are dead (bool [latents]) after this batch."""
    scores = (x - sae.decoder_bias) @ sae.encoder_weight.T + sae.encoder_bias
    latents, l0_loss = _activated(sae, scores)
    reconstruction = latents @ sae.decoder_weight + sae.decoder_bias
    error = (x - reconstruction).detach()
    aux = torch.zeros((), dtype=x.dtype)
    if dead.any():
        of_dead = scores.masked_fill(~dead, -torch.inf)
        top = of_dead.topk(min(sae.k_aux, int(dead.sum())))
        explained = torch.zeros_like(scores).scatter(1, top.indices, top.values.relu()) @ sae.decoder_weight
        aux = torch.nn.functional.mse_loss(explained, error) / (error - error.mean(0)).square().mean()
    fvu = torch.nn.functional.mse_loss(reconstruction, x) / (x - x.mean(0)).square().mean()
    return {
        "total": fvu + sae.aux_coefficient * aux + sae.l0_coefficient * l0_loss,
        "fvu": fvu,
        "aux": aux,
        "l0_loss": l0_loss,
        "mse": error.square().mean(),
        "l0": (latents > 0).to(x.dtype).sum(1).mean(),
    }


def _activated(sae: SparseAutoencoder, scores: Tensor) -> tuple[Tensor, Tensor]:
    zero = torch.zeros((), dtype=scores.dtype)
    if sae.activation == "jumprelu":
        threshold = sae.log_threshold.exp()
        live = (scores > threshold).to(scores.dtype)
        near = ((scores - threshold).abs() < sae.bandwidth / 2).to(scores.dtype)
        # 0 in value; in the backward pass, -near / bandwidth for each threshold.
        estimate = near.detach() / sae.bandwidth * (threshold.detach() - threshold)
        latents = scores * live + threshold.detach() * estimate
        return latents, ((live + estimate).sum(1).mean() / sae.k - 1) ** 2
    if sae.activation == "topk":
        chosen = torch.zeros_like(scores).scatter(1, scores.topk(sae.k).indices, 1.0)
    else:
        best = scores.flatten().topk(sae.k * len(scores)).indices
        chosen = torch.zeros_like(scores).flatten().index_fill(0, best, 1.0).view(scores.shape)
    return (scores * chosen).relu(), zero
