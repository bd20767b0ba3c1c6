"""The packed layer on a machine without a GPU: its way there and back, and who computes what."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from offpath import SparseLinear
from offpath.kernels import KernelError
from offpath.kernels.gpu import contest, formats
from offpath.kernels.gpu.tiles import Tiles, unpack_tiles
from offpath.nn import PackedSparseLinear, SparseConv1d
from offpath.ops import live_linear, packed_linear as ops
from offpath.pattern import Pattern


def _layer(sparsity: float = 0.8, dtype: torch.dtype = torch.float32, in_features: int = 70) -> SparseLinear:
    generator = torch.Generator().manual_seed(0)
    return SparseLinear(in_features, 33, dtype=dtype, sparsity=sparsity, generator=generator)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The definitions of the kernels in their places; the list has the tokens of each call, below zero for tiles."""
    asked: list[int] = []

    def decode(packed: formats.Packed, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        asked.append(x.shape[0])
        assert x.is_contiguous()
        return torch.nn.functional.linear(x, ops.written_out(packed), bias)

    def multiply_tiles(tiles: Tiles, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        asked.append(-x.shape[0])
        assert x.is_contiguous()
        crow_indices, col_indices, values = unpack_tiles(tiles)
        weight = Pattern(tiles.shape, crow_indices, col_indices).to_dense(values)
        return torch.nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(ops, "decode", decode)
    monkeypatch.setattr(ops, "multiply_tiles", multiply_tiles)
    monkeypatch.setattr(ops, "_expect_gpu", lambda x: None)
    monkeypatch.setattr(contest, "decode", decode)
    return asked


@pytest.mark.parametrize("prefer", ["speed", "memory"])
@pytest.mark.parametrize(("sparsity", "n", "kind"), [(0.2, 1024, "n4"), (0.97, 700, "c16")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_tokens_are_decoded_and_many_are_dense(
    prefer: str, sparsity: float, n: int, kind: str, dtype: torch.dtype, decoded: list[int]
) -> None:
    sparse = _layer(sparsity, dtype, n)
    layer = PackedSparseLinear.from_sparse(sparse, tokens=4, prefer=prefer)
    assert layer.packed.kind == kind and (layer.weight is None) == (prefer == "memory")
    dense = sparse.to_dense()
    with torch.inference_mode():
        for shape in ((n,), (4, n), (2, 2, n), (5, n), (0, n)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
            assert torch.equal(layer(x), dense(x))
        layer(torch.randn(n, 3).to(dtype).t())
    assert decoded == [1, 4, 4, 3]


def test_some_more_are_multiplied_by_tiles(decoded: list[int]) -> None:
    sparse = _layer(0.7, torch.bfloat16, 300)
    layer = PackedSparseLinear.from_sparse(sparse, tokens=40)
    assert (layer.tokens, layer.tiled_tokens) == (8, 40) and "tiled_tokens=40" in repr(layer)
    dense, other = sparse.to_dense(), PackedSparseLinear.from_sparse(_layer(0.9, torch.bfloat16, 300), tokens=40)
    with torch.inference_mode():
        for shape in ((8, 300), (9, 300), (4, 10, 300), (41, 300)):
            x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
            assert torch.equal(layer(x), dense(x)) and torch.equal(copy.deepcopy(layer)(x), dense(x))
        layer(torch.randn(300, 9).to(torch.bfloat16).t())
    assert decoded == [8, 8, -9, -9, -40, -40, -9]
    with pytest.raises(RuntimeError, match="size mismatch for tile_values"):
        other.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="tile_values"):
        PackedSparseLinear.from_sparse(sparse, tokens=4).load_state_dict(layer.state_dict())


def test_a_way_back_has_the_same_bits() -> None:
    sparse = _layer()
    with torch.no_grad():
        sparse.values[::5] = 0.0
        sparse.values[1::5] = -0.0
    back = PackedSparseLinear.from_sparse(sparse, tokens=0).to_sparse()
    assert back.pattern.equals(sparse.pattern)
    assert torch.equal(back.values, sparse.values) and torch.equal(back.bias, sparse.bias)
    assert back.values.data_ptr() != sparse.values.data_ptr() and back.values.requires_grad


def test_gradients_are_refused() -> None:
    layer = PackedSparseLinear.from_sparse(_layer(), tokens=0)
    with pytest.raises(RuntimeError, match="for inference only"):
        layer(torch.ones(2, 70, requires_grad=True))
    with torch.no_grad():
        layer(torch.ones(2, 70, requires_grad=True))
    assert list(layer.parameters()) == []


def test_what_cannot_run_here_says_so() -> None:
    with pytest.raises(KernelError, match=r"expected a weight on an NVIDIA GPU, .* got one on cpu; move the layer"):
        PackedSparseLinear.from_sparse(_layer())
    layer = PackedSparseLinear.from_sparse(_layer(), tokens=2)
    with pytest.raises(KernelError, match=r"expected tensors on an NVIDIA GPU, .* got cpu; move"), torch.no_grad():
        layer(torch.ones(1, 70))
    with pytest.raises(ValueError, match="expected a SparseLinear, got SparseConv1d"):
        PackedSparseLinear.from_sparse(SparseConv1d(3, 4, 2))
    with pytest.raises(ValueError, match="tokens from 0 to 64, got 65"):
        PackedSparseLinear.from_sparse(_layer(dtype=torch.bfloat16), tokens=65)
    for tokens, tiles in ((9, False), (None, True)):
        with pytest.raises(ValueError, match="prefer='speed' with tiles"):
            PackedSparseLinear.from_sparse(_layer(dtype=torch.bfloat16), tokens, prefer="memory", tiles=tiles)
        with pytest.raises(KernelError, match=r"values of bfloat16, .* got torch\.float32"):
            PackedSparseLinear.from_sparse(_layer(), tokens, tiles=tiles)
    layer = PackedSparseLinear.from_sparse(_layer(dtype=torch.bfloat16), tokens=64)
    with pytest.raises(KernelError, match=r"expected tensors on an NVIDIA GPU, .* got cpu; move"), torch.no_grad():
        layer(torch.ones(9, 70, dtype=torch.bfloat16))
    layer = PackedSparseLinear.from_sparse(_layer(), tokens=2)
    with pytest.raises(ValueError, match="'speed' or 'memory', got 'fast'"):
        PackedSparseLinear.from_sparse(_layer(), tokens=0, prefer="fast")
    with pytest.raises(KernelError, match=r"float32 or bfloat16, got torch.float64"):
        PackedSparseLinear.from_sparse(_layer().double(), tokens=0)
    with pytest.raises(KernelError, match=r"expected x of 70 features in torch.float32"):
        layer(torch.ones(9, 70, dtype=torch.bfloat16))
    with pytest.raises(KernelError, match="expected x of 70 features"):
        layer(torch.ones(9, 71))


class OnGpu(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([(4, 1)] * 4, (8, 0)),
        ([(4, 1), (4, 3.9)], (1, 0)),
        ([(4, 1), (4, 1), (4, 5)], (2, 0)),
        ([(4, 3.95)], (0, 0)),
    ],
)
def test_tokens_are_those_up_to_which_decoding_wins(monkeypatch: pytest.MonkeyPatch, seconds, expected) -> None:
    """Of 1, 2, 4 and 8; a win behind a loss does not count, nor one within the margin."""
    packed = PackedSparseLinear.from_sparse(_layer(), tokens=0).packed
    times = iter(seconds)
    monkeypatch.setattr(contest, "cold_seconds", lambda calls, device: _expecting(next(times), calls))
    weight = ops.written_out(packed).as_subclass(OnGpu)
    assert contest.tokens_that_pay(packed, None, weight, None) == expected
    assert next(times, None) is None


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([(4, 1, 2), (4, 1, 1), (4, 2, 1), (4, 1), (4, 1), (4, 1), (4, 1)], (2, 64)),
        ([(4, 1, 2)] * 4 + [(4, 3)] * 2 + [(4, 3.9)], (8, 32)),
        ([(4, 1, 2), (4, 1, 2), (4, 1, 2), (4, 5, 5)], (4, 0)),
        ([(4, 5, 1), (4, 5)], (0, 1)),
    ],
)
def test_tiles_follow_where_they_win(monkeypatch: pytest.MonkeyPatch, seconds, expected) -> None:
    """Once they do, decoding is not asked again: each has its run of tokens, and none is computed by a loser."""
    layer = PackedSparseLinear.from_sparse(_layer(dtype=torch.bfloat16), tokens=64)
    times = iter(seconds)
    monkeypatch.setattr(contest, "cold_seconds", lambda calls, device: _expecting(next(times), calls))
    weight = ops.written_out(layer.packed).as_subclass(OnGpu)
    assert contest.tokens_that_pay(layer.packed, layer.tiles, weight, None) == expected
    assert next(times, None) is None


def _expecting(seconds: tuple[float, ...], calls: list[object]) -> list[float]:
    assert len(seconds) == len(calls)
    return list(seconds)


def test_what_never_won_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    for won, kept in (((4, 0), False), ((4, 16), True)):
        monkeypatch.setattr("offpath.nn.packed_linear.tokens_that_pay", lambda *_, won=won: won)
        layer = PackedSparseLinear.from_sparse(_layer(dtype=torch.bfloat16), tiles=True)
        assert (layer.tokens, layer.tiled_tokens) == won and (layer.tiles is not None) == kept


def test_checkpoints_and_copies(decoded: list[int]) -> None:
    layer, file = PackedSparseLinear.from_sparse(_layer(), tokens=1, prefer="memory"), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = PackedSparseLinear.from_sparse(_layer(), tokens=1, prefer="memory")
    other.values.zero_()
    other.load_state_dict(torch.load(file))
    x = torch.ones(3, 70)
    assert torch.equal(other(x), layer(x)) and torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_the_dense_weight_follows_a_checkpoint(decoded: list[int]) -> None:
    sparse, x = _layer(), torch.randn(5, 70)
    layer, other = (PackedSparseLinear.from_sparse(sparse, tokens=2) for _ in range(2))
    with torch.no_grad():
        sparse.values.mul_(-3.0)
    changed = PackedSparseLinear.from_sparse(sparse, tokens=2)
    address = layer.weight.data_ptr()
    layer.load_state_dict(changed.state_dict())
    assert layer.weight.data_ptr() == address
    empty = other.to_empty(device="meta")
    empty.load_state_dict(changed.state_dict(), assign=True)
    with torch.no_grad():
        for one in (layer, empty):
            assert torch.equal(one(x), changed(x)) and torch.equal(one(x[:2]), changed(x[:2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32], ids=str)
def test_a_weight_that_was_cast_is_not_read_as_another_dtype(dtype: torch.dtype, monkeypatch) -> None:
    monkeypatch.setattr(ops, "_expect_gpu", lambda x: None)
    sparse = _layer(dtype=torch.bfloat16)
    layer = PackedSparseLinear.from_sparse(sparse, tokens=16).to(dtype)
    assert torch.equal(layer.to_sparse().values, sparse.values.to(dtype))
    x = torch.ones(17, 70, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), sparse.to_dense().to(dtype)(x))
        with pytest.raises(KernelError, match=r"packed in torch\.bfloat16, aligned to 16 bytes, got values"):
            layer(x[:16])
        if dtype is not torch.float32:
            with pytest.raises(
                KernelError, match=r"packed in torch\.float32 or torch\.bfloat16, aligned .* got values"
            ):
                layer(x[:1])


def test_autocast_leaves_the_layer_its_dtype() -> None:
    layer, x = PackedSparseLinear.from_sparse(_layer(), tokens=0), torch.randn(3, 70)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        y = layer(x)
    assert torch.equal(y, layer(x))


def test_opcheck_and_compile(one_thread: None) -> None:
    layer, x = PackedSparseLinear.from_sparse(_layer(), tokens=0), torch.ones(3, 70)
    packed = layer.packed
    parts = packed.values, packed.columns, packed.gaps, packed.group_offsets, packed.slots
    none = (None,) * 4
    torch.library.opcheck(torch.ops.offpath.packed_linear.default, (x, *parts, *none, layer.bias, None, 70, 0, 0))
    with torch.inference_mode():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), layer(x))
        assert torch.equal(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize(
    ("error", "remembered"), [(torch.OutOfMemoryError("no room"), False), (KernelError("an old driver"), True)]
)
def test_what_cannot_be_measured_does_not_pay(
    error: Exception, remembered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fails(*_: object) -> bool:
        asked.append(1)
        raise error

    monkeypatch.setattr(contest, "_pays", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(contest, "problem", lambda part: None)
    monkeypatch.setattr(contest, "facts", lambda device: [])
    monkeypatch.setattr(contest, "_live_wins", fails)
    weight = torch.ones(20, 8)
    assert not contest.live_pays(2, weight, None) and not contest.live_pays(2, weight, None)
    assert len(asked) == (1 if remembered else 2)


def test_later_processes_read_live_rows_where_the_first_one_did(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Near a tie each would measure something else, and compute other bits."""
    monkeypatch.setenv("OFFPATH_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(contest, "problem", lambda part: None)
    monkeypatch.setattr(contest, "facts", lambda device: [])
    times = iter([(1.0, 1.02), (1.0, 1.04)])  # of two shapes: live_matmul takes 2 % longer, and 4 %
    monkeypatch.setattr(contest, "cold_seconds", lambda calls, device: next(times))
    first, second = torch.ones(20, 8), torch.ones(24, 8)
    for _ in range(2):  # processes
        monkeypatch.setattr(contest, "_pays", {})
        assert contest.live_pays(3, first, None) and contest.live_pays(4, first, None)
        assert not contest.live_pays(3, second, None)


def test_what_only_follows_shapes_is_not_asked_for_live_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its address is none: a kernel that read from there would take the whole process's context with it."""
    monkeypatch.setattr(live_linear, "live_pays", lambda *_: True)
    with FakeTensorMode(), torch.no_grad():
        x, weight = (torch.empty(shape, device="cuda") for shape in ((2, 20), (20, 8)))
        assert x.is_cuda and not live_linear.reads_live_rows(x, weight, None)


def test_a_dense_input_of_few_tokens_reads_only_live_rows_where_that_never_loses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which products go to the kernel of live inputs; what it computes has tests of its own."""
    from offpath.nn import SparseInputLinear, sparse_input_linear

    asked: list[tuple[int, ...]] = []

    def kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        asked.append(tuple(x.shape))
        return torch.nn.functional.linear(x, weight.t(), bias)

    monkeypatch.setattr(live_linear, "live_pays", lambda tokens, weight, bias: weight.shape[0] == 20)
    monkeypatch.setattr(sparse_input_linear, "live_linear", kernel)
    layer, other = SparseInputLinear(20, 8), SparseInputLinear(10, 8)
    x = torch.ones(4, 20).as_subclass(OnGpu)
    with torch.no_grad():
        layer(x), layer(x[0]), layer(x.view(2, 2, 20))
        assert asked == [(4, 20), (20,), (2, 2, 20)]
        layer(torch.ones(4, 20)), layer(torch.ones(5, 20).as_subclass(OnGpu)), layer(x[:0])
        other(torch.ones(4, 10).as_subclass(OnGpu))
        with torch.autocast("cpu", torch.bfloat16):
            layer(x)
    layer(x)
    assert len(asked) == 3
    layer.requires_grad_(False)
    layer(x)
    assert len(asked) == 4
    layer.bias = torch.nn.Parameter(torch.zeros(8, 3)[:, 0], requires_grad=False)  # not as the kernel reads it
    layer(x)
    assert len(asked) == 4
    with pytest.raises(KernelError, match="expected tensors on an NVIDIA GPU, got cpu"):
        live_linear.live_linear(torch.ones(2, 20), layer.weight_t, None)
