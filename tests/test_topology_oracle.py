"""50 steps of each recipe equal the simulation over dense weights and masks in `topology_oracle.py`."""

from __future__ import annotations

import pytest
import torch

from topology_oracle import RECIPES, check_exact, check_network


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_bit_equals_the_dense_simulation_in_exact_arithmetic(recipe: str) -> None:
    check_exact(recipe)


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.RMSprop])
@pytest.mark.parametrize("recipe", RECIPES)
def test_topology_of_a_network_equals_the_dense_simulation(recipe: str, optimizer: type[torch.optim.Optimizer]) -> None:
    check_network(recipe, optimizer)
