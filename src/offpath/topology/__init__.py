"""Which connections die and grow while training; for now, how layers share a budget of connections."""

from offpath.topology.distribution import DISTRIBUTIONS as DISTRIBUTIONS, layer_densities as layer_densities
