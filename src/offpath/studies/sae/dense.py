"""The same autoencoder, every latent of every row computed and kept: what a race is against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from offpath.nn import SAELoss, SparseAutoencoder


class DenseAutoencoder(SparseAutoencoder):
    """A TopK autoencoder in plain torch (linear, topk, scatter, linear), with the parameters of the sparse one."""

    def loss(self, x: Tensor) -> SAELoss:
        """The loss of a batch `x` [rows, d_model], equal to the sparse one's but for rounding."""
        scores = functional.linear(x - self.decoder_bias, self.encoder_weight, self.encoder_bias)
        latents = self._live(scores, self.k)
        if self.training:
            with torch.no_grad():
                self.tokens_since_fired += len(x)
                self.tokens_since_fired.masked_fill_((latents > 0).any(0), 0)
        reconstruction = functional.linear(latents, self.decoder_weight.t(), self.decoder_bias)
        residual = x - reconstruction
        fvu = residual.square().sum() / (x - x.mean(0)).square().sum()
        aux, dead = fvu.new_zeros(()), self.tokens_since_fired >= self.dead_after
        if self.training and dead.any():
            error = residual.detach()
            best = self._live(scores.masked_fill(~dead, -torch.inf), min(self.k_aux, int(dead.sum())))
            explained = functional.linear(best, self.decoder_weight.t())
            aux = (error - explained).square().sum() / (error - error.mean(0)).square().sum()
        return SAELoss(
            total=fvu + self.aux_coefficient * aux,
            fvu=fvu,
            aux=aux,
            l0_loss=fvu.new_zeros(()),
            mse=residual.detach().square().mean(),
            l0=(latents > 0).to(fvu.dtype).sum(1).mean(),
            dead_latents=dead,
        )

    @staticmethod
    def _live(scores: Tensor, k: int) -> Tensor:
        top = scores.topk(k, sorted=False)
        return torch.zeros_like(scores).scatter(1, top.indices, top.values.relu())
