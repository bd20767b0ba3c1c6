"""What a `SparseAutoencoder` refuses: options, schedules, latents and inputs that do not fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoencoder_cases import D_MODEL, LATENTS, K, sae_of, x_of
from offpath.nn import SparseAutoencoder
from offpath.nn.autoencoder import ACTIVATIONS
from offpath.ops import SparseRows


@pytest.fixture(params=ACTIVATIONS)
def activation(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 41}, "k to be an int from 1 to 40"),
        ({"k": 0}, "k to be an int from 1 to 40"),
        ({"k": 2.5}, "k to be an int from 1 to 40"),
        ({"k_aux": 2.5}, "k_aux of at least 0"),
        ({"dead_after": float("nan")}, "dead_after of at least 1"),
        ({"aux_coefficient": float("nan")}, "finite coefficients"),
        ({"d_model": 0}, "d_model of at least 1"),
        ({"activation": "relu"}, "topk, batch_topk, jumprelu"),
        ({"k_aux": -1}, "k_aux of at least 0"),
        ({"dead_after": 0}, "dead_after of at least 1"),
        ({"bandwidth": float("nan")}, "positive bandwidth"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparseAutoencoder(**{"d_model": D_MODEL, "latents": LATENTS} | options)


def test_a_schedule_of_k_is_checked_where_it_is_set(activation: str) -> None:
    sae = sae_of(activation)
    for wrong in (5.5, 0, -3, True, LATENTS + 1, "4"):
        with pytest.raises(ValueError, match="expected k to be an int from 1 to 40, got"):
            sae.k = wrong
    sae.k = np.int64(2)
    assert type(sae.k) is int and sae.loss(x_of()).total.isfinite()
    assert SparseAutoencoder(D_MODEL, LATENTS, np.int64(3)).k == 3


def test_latents_that_do_not_fit_are_refused() -> None:
    sae, rows = sae_of(), sae_of().encode(x_of())
    with pytest.raises(ValueError, match=r"expected SparseRows of 40 latents, got Tensor of shape \(24, 40\)"):
        sae.decode(rows.to_dense())
    with pytest.raises(ValueError, match=r"got SparseRows of shape \(24, 41\)"):
        sae.decode(SparseRows(rows.crow_indices, rows.indices, rows.values, 41))


def test_inputs_that_do_not_fit_are_refused(activation: str) -> None:
    sae = sae_of(activation)
    for wrong in (x_of()[:, 1:], torch.tensor(1.0)):
        for method in (sae.forward, sae.encode, sae.loss):
            with pytest.raises(ValueError, match=r"expected an input \[\.\.\., 12\]"):
                method(wrong)
    with pytest.raises(ValueError, match=r"expected an input of torch\.float32, got torch\.float64"):
        SparseAutoencoder(D_MODEL, LATENTS, K, activation).loss(x_of())
    assert int(sae.tokens_since_fired.max()) == 0
