"""A small autoencoder in float64, and inputs for it."""

from __future__ import annotations

import torch
from torch import Tensor

from offpath.nn import SparseAutoencoder

D_MODEL, LATENTS, K, ROWS = 12, 40, 3, 24


def sae_of(activation: str = "topk", seed: int = 0, **options) -> SparseAutoencoder:
    generator = torch.Generator().manual_seed(seed)
    options = {"dtype": torch.float64, "bandwidth": 0.2, "generator": generator} | options
    sae = SparseAutoencoder(D_MODEL, LATENTS, K, activation, **options)
    with torch.no_grad():
        for bias in (sae.encoder_bias, sae.decoder_bias):
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator, dtype=torch.float64))
    if activation != "topk":
        sae.calibrate_threshold_(x_of(dtype=sae.encoder_weight.dtype))
    return sae


def x_of(rows: int = ROWS, seed: int = 7, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, D_MODEL, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
