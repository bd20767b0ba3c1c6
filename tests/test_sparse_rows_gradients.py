"""The products on sparse rows, differentiated once and twice."""

from __future__ import annotations

import torch

from offpath.ops import SparseRows, topk_rows


def test_matmul_twice_differentiable() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 6, dtype=torch.float64)
    chosen = topk_rows(x, 2)
    values = chosen.values.requires_grad_()
    weight = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)

    def product(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return chosen.with_values(values) @ weight

    assert torch.autograd.gradcheck(product, (values, weight))
    assert torch.autograd.gradgradcheck(product, (values, weight))


def test_matmul_is_the_dense_product() -> None:
    dense = torch.tensor([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0]], requires_grad=True)
    weight = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], requires_grad=True)
    of_rows = torch.autograd.grad((SparseRows.from_dense(dense) @ weight).square().sum(), (dense, weight))
    of_dense = torch.autograd.grad((dense @ weight).square().sum(), (dense, weight))
    assert torch.equal(of_rows[0], of_dense[0] * (dense != 0))
    assert torch.equal(of_rows[1], of_dense[1])
