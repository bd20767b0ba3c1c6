"""Layers with sparse weights or sparse activations."""

from offpath.nn.autoencoder import SAELoss as SAELoss, SparseAutoencoder as SparseAutoencoder
from offpath.nn.linear import SparseLinear as SparseLinear
from offpath.nn.rewire import check_rewire as check_rewire, rewire as rewire
