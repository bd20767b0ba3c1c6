"""`ProductKeyMemory` against all keys * keys scores written out."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from offpath.nn import ProductKeyMemory


def _memory(**options) -> ProductKeyMemory:
    torch.manual_seed(0)
    sizes = {"keys": 6, "k": 3, "heads": 2, "key_features": 8, "dtype": torch.float64} | options
    return ProductKeyMemory(5, 4, **sizes)


def written_out(memory: ProductKeyMemory, x: Tensor) -> Tensor:
    """Every key is a pair of sub-keys, every head a softmax over its k best of all of them."""
    y = 0
    queries = memory.query(x).unflatten(-1, (memory.heads, -1))
    for head in range(memory.heads):
        first, second = memory.sub_keys[head]
        keys = torch.cat([first.repeat_interleave(memory.keys, 0), second.repeat(memory.keys, 1)], 1)
        best = (queries[..., head, :] @ keys.t()).topk(memory.k)
        y = y + (best.values.softmax(-1)[..., None] * memory.values[best.indices]).sum(-2)
    return y


@pytest.mark.parametrize(("k", "heads"), [(1, 1), (3, 2), (6, 3)])
def test_is_the_search_among_all_keys(k: int, heads: int) -> None:
    memory = _memory(k=k, heads=heads)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    results = []
    for run in (memory, lambda x: written_out(memory, x)):
        memory.zero_grad()
        z = x.clone().requires_grad_()
        y = run(z)
        y.square().sum().backward()
        results.append([y, z.grad, *(parameter.grad.clone() for parameter in memory.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_only_rows_that_were_read_get_a_gradient() -> None:
    memory = _memory()
    x = torch.randn(2, 5, dtype=torch.float64)
    read = set(memory.lookup(x).indices.tolist())
    memory(x).sum().backward()
    live = memory.values.grad.any(1).nonzero().flatten().tolist()
    assert set(live) == read and len(read) < memory.values.shape[0]


def test_weights_of_a_head_sum_to_one() -> None:
    rows = _memory().lookup(torch.randn(9, 5, dtype=torch.float64))
    assert rows.shape == (9, 36) and rows.nnz == 9 * 2 * 3
    sums = rows.values.view(9, 2, 3).sum(2)
    torch.testing.assert_close(sums, torch.ones_like(sums))


def test_gradcheck() -> None:
    memory = _memory(keys=3, k=2, key_features=4)
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    parameters = dict(memory.named_parameters())

    def run(x: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(memory, dict(zip(parameters, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


def test_never_stores_the_chosen_rows() -> None:
    """Nothing that the forward pass saves is as large as [samples, heads * k, out_features] or [samples, keys^2]."""
    memory = ProductKeyMemory(16, 64, keys=32, k=8, heads=4, key_features=16)
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel() if tensor.data_ptr() != memory.values.data_ptr() else 0)
        return tensor

    samples = 50
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        memory(torch.randn(samples, 16))
    assert 0 < max(saved) < samples * min(4 * 8 * 64, 32**2) == samples * 32**2


def test_another_query_network() -> None:
    memory = _memory()
    memory.query = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    torch.testing.assert_close(memory.eval()(x), written_out(memory, x))


def test_a_query_network_that_looks_across_samples_sees_them_one_by_one() -> None:
    memory = _memory()
    memory.query = nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16)).double()
    again = copy.deepcopy(memory)
    x = torch.randn(3, 16, 5, dtype=torch.float64)  # as many tokens as query features
    torch.testing.assert_close(memory(x), again(x.flatten(0, 1)).view(3, 16, 4), rtol=0, atol=0)
    assert torch.equal(memory.query[1].running_mean, again.query[1].running_mean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes_and_autocast(dtype: torch.dtype) -> None:
    memory, x = _memory(dtype=dtype), torch.randn(3, 5, dtype=dtype)
    assert memory(x).dtype is dtype
    with torch.autocast("cpu", torch.bfloat16):
        y = memory(x)
    y.sum().backward()
    assert y.dtype is dtype, "the table is not cast"
    assert all(parameter.grad.dtype is dtype for parameter in memory.parameters())


def test_state_dict_deepcopy_and_edges() -> None:
    memory = _memory()
    x = torch.randn(3, 5, dtype=torch.float64)
    loaded = _memory()
    loaded.reset_parameters()
    assert not torch.equal(loaded(x), memory(x))
    loaded.load_state_dict(memory.state_dict())
    for other in (loaded, copy.deepcopy(memory)):
        assert torch.equal(other(x), memory(x))
    assert memory(x[:0]).shape == (0, 4)
    assert memory(x[0]).shape == (4,)
    assert not _memory(k=0)(x).any()
    x[1] = torch.nan
    y = memory(x)
    assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 7}, "expected k from 0 to the 6 sub-keys"),
        ({"k": -1}, "expected k to be an int of at least 0"),
        ({"k": 2.5}, "expected k to be an int of at least 0"),
        ({"k": True}, "expected k to be an int of at least 0"),
        ({"key_features": 7}, "even key_features"),
        ({"heads": 0}, "heads >= 1"),
        ({"keys": 50000, "device": "meta"}, r"2\^31 - 1 value rows"),
    ],
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _memory(**options)


def test_refuses_other_widths() -> None:
    with pytest.raises(ValueError, match=r"expected \[\.\.\., 5\]"):
        _memory()(torch.ones(2, 4, dtype=torch.float64))
