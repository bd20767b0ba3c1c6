"""A model, its training and its checkpoints, on the GPU's kernels; the tests run it in a process with the interpreter.

The same code checks a real device: `main("cuda")`.
"""

from __future__ import annotations

import copy
import io
from contextlib import nullcontext

import torch
from torch import Tensor, nn

import offpath
from offpath import kernels, ops
from offpath.kernels import KernelError
from offpath.nn import Int8SparseLinear, SparseAutoencoder, SparseConv2d, SparseInputLinear, SparseSparseLinear, TopK


def main(device: str = "cpu") -> None:
    """Raises where something differs from the same on the reference."""
    torch.manual_seed(0)
    for check in (layers, topologies, autoencoders, sparse_activations, checkpoints, convolutions, refusals, digests):
        check(device)
    print(f"all on {kernels.select(device, torch.float32).name}")


def _close(got: Tensor, right: Tensor) -> None:
    torch.testing.assert_close(got.detach().cpu(), right.detach().cpu())


def layers(device: str) -> None:
    """Forward and backward by every method, of few and of many tokens, as the dense layer computes them."""
    for batch, method, sparsity in ((3, "row-wise", 0.5), (18, "row-wise", 0.9), (5, "dense", 0.7)):
        layer = offpath.SparseLinear(40, 24, sparsity=sparsity).to(device)
        dense = layer.to_dense()
        x, dy = torch.randn(batch, 40, device=device), torch.randn(batch, 24, device=device)
        sparse_x, dense_x = x.clone().requires_grad_(), x.clone().requires_grad_()
        with ops.forced_methods(forward=method, dx=method, dvalues=method):
            y = layer(sparse_x)
            y.backward(dy)
        assert y.is_contiguous() and y.device.type == device
        dense(dense_x).backward(dy)
        _close(y, dense(x))
        _close(sparse_x.grad, dense_x.grad)
        pattern = layer.pattern
        _close(layer.values.grad, dense.weight.grad[pattern.row_indices().long(), pattern.col_indices.long()])
        _close(layer.bias.grad, dense.bias.grad)
    assert set(offpath.SparseLinear(40, 24, device=device).explain(64).chosen.values()) <= {"row-wise", "dense"}


def topologies(device: str) -> None:
    """Connections move as they do on the reference: the same ones from the same numbers."""
    for recipe in (offpath.SET, offpath.RigL):
        layers = []
        for backend in (kernels.select(device, torch.float32), "reference"):
            generator = torch.Generator().manual_seed(0)
            model = nn.Sequential(
                offpath.SparseLinear(24, 16, sparsity=0.8, generator=generator), nn.ReLU(), nn.Linear(16, 3)
            )
            with torch.no_grad():
                for parameter in model[2].parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator))
            model.to(device)
            optimizer = torch.optim.Adam(model.parameters())
            topology = recipe(model, optimizer, update_freq=1, end_step=100)
            with kernels.forced(backend):
                for _ in range(2):
                    x = torch.randn(18, 24, generator=generator).to(device)
                    model(x).square().sum().backward()
                    optimizer.step()
                    topology.step()
                    optimizer.zero_grad()
            layers.append(model[0])
        assert layers[0].pattern.equals(layers[1].pattern), recipe
        _close(layers[0].values, layers[1].values)


def autoencoders(device: str) -> None:
    """A step of each activation has the loss and the gradients of the reference."""
    for activation in ("topk", "batch_topk", "jumprelu"):
        sae = SparseAutoencoder(12, 16, k=3, activation=activation, dead_after=1, k_aux=4).to(device)
        other = copy.deepcopy(sae)
        x = torch.randn(9, 12, device=device)
        sae.loss(x)
        loss = sae.loss(x)
        loss.total.backward()
        with kernels.forced("reference"):
            other.loss(x)
            expected = other.loss(x)
            expected.total.backward()
        _close(loss.total, expected.total)
        for (name, parameter), same in zip(sae.named_parameters(), other.parameters(), strict=True):
            assert (parameter.grad is None) == (same.grad is None), name
            if parameter.grad is not None:
                _close(parameter.grad, same.grad)


def sparse_activations(device: str) -> None:
    """Rows of live units meet a dense and a sparse weight."""
    x = torch.randn(6, 20, device=device, requires_grad=True)
    for layer in (SparseInputLinear(20, 8).to(device), SparseSparseLinear(20, 8, sparsity=0.5).to(device)):
        found = []
        for backend in (kernels.select(device, torch.float32), "reference"):
            with kernels.forced(backend):
                y = layer(TopK(4)(x))
                parameters = [x, *layer.parameters()]
                found.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
        for got, right in zip(*found, strict=True):
            _close(got, right)
    rows = ops.topk_rows(x.detach(), 4)
    buffer = torch.ones(20, 5, device=device)
    dy = torch.randn(6, 5, device=device)
    rows.add_weight_gradient(dy, buffer)
    _close(buffer, 1 + rows.to_dense().t() @ dy)
    _close(rows.counts(), (rows.to_dense() != 0).sum(0).int())


def checkpoints(device: str) -> None:
    """A model's state goes to a file, to the CPU, and back, topology included; the optimizer goes on."""
    model = nn.Sequential(offpath.SparseLinear(16, 12, sparsity=0.5)).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    topology = offpath.RigL(model, optimizer, update_freq=1, end_step=100)
    x = torch.randn(18, 16, device=device)

    def step() -> None:
        model(x).square().sum().backward()
        optimizer.step()
        topology.step()
        optimizer.zero_grad()

    step()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "topology": topology.state_dict()}, file)
    file.seek(0)
    state = torch.load(file, map_location="cpu")
    cpu = nn.Sequential(offpath.SparseLinear(16, 12, sparsity=0.25))
    cpu.load_state_dict(state["model"])
    with kernels.forced("reference"):
        _close(cpu(x.cpu()), model(x))
    back = nn.Sequential(offpath.SparseLinear(16, 12, sparsity=0.9)).to(device)
    back.load_state_dict(cpu.state_dict())
    assert back[0].values.device.type == back[0].crow_indices.device.type == device
    assert torch.equal(back(x), model(x))
    topology.load_state_dict(state["topology"])
    step()
    assert cpu.to(device)[0].connections.device.type == device


def convolutions(device: str) -> None:
    """There are no kernels of images: the weight is written out for torch's, in all three products."""
    layer = SparseConv2d(2, 4, 3, padding=1, sparsity=0.5).to(device)
    gradients = {}
    for backend in (None, "reference"):
        with kernels.forced(backend) if backend else nullcontext():
            x = torch.ones(2, 2, 5, 5, device=device, requires_grad=True)
            y = layer(x)
            gradients[backend] = [y, *torch.autograd.grad(y.square().sum(), [x, layer.values])]
    for mine, right in zip(*gradients.values(), strict=True):
        _close(mine, right)


def refusals(device: str) -> None:
    """What has no kernel says so, and what to do."""
    sparse = offpath.SparseLinear(8, 8).to(device)
    convolution = SparseConv2d(2, 2, 3, sparsity=0.5, prefer="memory").to(device)
    image = torch.randn(1, 2, 5, 5, device=device)
    int8 = Int8SparseLinear.from_sparse(sparse, activations="int8")
    for call, words in (
        (lambda: int8(torch.ones(2, 8, device=device)), "int8"),
        (lambda: convolution(image), "prefer='memory', which rules that out"),
        *([(lambda: _forced_bucketed(sparse, device), "a method that backend")] if device == "cpu" else []),
        (lambda: kernels.select(device, torch.float16), "no kernels for"),
    ):
        try:
            call()
        except KernelError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"expected a refusal that speaks of {words}")


def _forced_bucketed(layer: nn.Module, device: str) -> None:
    with ops.forced_methods(forward="bucketed"):
        layer(torch.ones(2, 8, device=device))


def digests(device: str) -> None:
    """Index tensors of the caller's own are looked at in every call: a write into them changes the product."""
    pattern = offpath.SparseLinear(8, 6, sparsity=0.5).to(device).pattern
    crow_indices, col_indices = pattern.crow_indices.clone(), pattern.col_indices.clone()
    x, values = torch.randn(3, 8, device=device), torch.randn(pattern.nnz, device=device)
    find = kernels.select(device, torch.float32).digest
    assert find is not None
    before = find(crow_indices, col_indices)
    assert before == find(crow_indices.clone(), col_indices.clone())
    y = ops.sparse_linear(x, values, None, crow_indices, col_indices)
    row = int((crow_indices.diff() < 8).nonzero()[0])
    free = next(c for c in range(8) if c not in col_indices[crow_indices[row] : crow_indices[row + 1]].tolist())
    place = slice(int(crow_indices[row]), int(crow_indices[row + 1]))
    columns = col_indices[place].tolist()
    columns[-1] = free
    col_indices[place] = torch.tensor(sorted(columns), dtype=torch.int32, device=device)
    assert find(crow_indices, col_indices) != before
    assert not torch.equal(ops.sparse_linear(x, values, None, crow_indices, col_indices), y)
