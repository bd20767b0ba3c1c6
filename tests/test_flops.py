"""What torch's FLOP counter counts: products of ones sum to the number of their multiply-adds."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from lightning.fabric.utilities.throughput import measure_flops
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import offpath
from children import environment
from offpath.nn import SparseAutoencoder, SparseConv2d, SparseInputLinear, SparseSparseLinear
from offpath.ops import forced_methods
from offpath.ops.flops import MULTIPLY_ADDS
from offpath.ops.packed_linear import pack, packed_linear
from test_direct_ops import CONNECTIONS, ROWS, WEIGHT

CHOOSE_ONLY = {"topk_rows", "batch_topk", "above"}  # comparisons, which torch counts for nothing as well
INSIDE = (2, 2), (1, 1), (0, 0, 0, 0), (1, 1), 1, "speed"  # torch counts products with padding, which ones do not show


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.float64)


PRODUCTS = {
    "sparse_linear": lambda: (_ones(2, 3, 8), _ones(4), None, *CONNECTIONS),
    "sparse_linear_dx": lambda: (_ones(2, 3, 2), _ones(4), *CONNECTIONS, 8),
    "sparse_linear_dvalues": lambda: (_ones(2, 3, 2), _ones(2, 3, 8), *CONNECTIONS),
    "rows_matmul": lambda: (_ones(5), *ROWS, _ones(4, 2)),
    "rows_dots": lambda: (_ones(3, 2), *ROWS, _ones(4, 2)),
    "rows_weight_gradient": lambda: (_ones(5), *ROWS, _ones(3, 2), 4),
    "rows_gradients": lambda: (_ones(3, 2), _ones(5), *ROWS, _ones(4, 2)),
    "rows_sparse_matmul": lambda: (_ones(5), *ROWS, _ones(4), *WEIGHT, 3),
    "rows_sparse_dots": lambda: (_ones(3, 3), *ROWS, _ones(4), *WEIGHT),
    "rows_sparse_weight_gradient": lambda: (_ones(5), *ROWS, _ones(3, 3), *WEIGHT),
    "sparse_conv2d": lambda: (_ones(3, 2, 4, 5), _ones(4), None, *CONNECTIONS, *INSIDE),
    "sparse_conv2d_dx": lambda: (_ones(3, 2, 3, 4), _ones(4), *CONNECTIONS, [3, 2, 4, 5], False, *INSIDE),
    "sparse_conv2d_dvalues": lambda: (_ones(3, 2, 3, 4), _ones(3, 2, 4, 5), *CONNECTIONS, *INSIDE),
    "int8_linear": lambda: (_ones(3, 8), _ones(4).to(torch.int8), torch.ones(2), None, *CONNECTIONS),
    "encode_topk": lambda: (_ones(3, 4), _ones(6, 4), None, 6),
}
# Also: the sum of what comes in, a product with ones, is left out.
WITH_SUMS: dict[str, tuple[Callable[[], tuple], int]] = {
    "rows_encoder_gradients": (lambda: (_ones(5), *ROWS, _ones(3, 2), 4), 1),
    "sparse_linear_backward": (lambda: (_ones(6, 2), _ones(6, 8), _ones(4), *CONNECTIONS), 2),
}


def _counted(compute: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops()


def test_every_op_has_a_formula_or_multiplies_nothing() -> None:
    schemas = torch._C._jit_get_all_schemas()
    ops = {schema.name.removeprefix("offpath::") for schema in schemas if schema.name.startswith("offpath::")}
    assert ops - CHOOSE_ONLY == set(MULTIPLY_ADDS)
    tried = {*PRODUCTS, *WITH_SUMS, "packed_linear", "live_linear", "add_rows_weight_gradient"}
    assert tried == set(MULTIPLY_ADDS)


@pytest.mark.parametrize("name", [*PRODUCTS, *WITH_SUMS])
def test_a_product_of_ones_sums_to_what_is_counted(name: str) -> None:
    make, sums_from = WITH_SUMS[name] if name in WITH_SUMS else (PRODUCTS[name], 2)
    op = getattr(torch.ops.offpath, name)
    outputs = op(*make())
    outputs = [outputs] if isinstance(outputs, Tensor) else outputs[:sums_from]
    multiply_adds = sum(float(one.sum()) for one in outputs if one.is_floating_point())
    assert multiply_adds > 0 and _counted(lambda: op(*make())) == 2 * multiply_adds


def test_what_is_added_to_a_buffer_is_counted() -> None:
    buffer = torch.zeros(4, 2, dtype=torch.float64)
    counted = _counted(lambda: torch.ops.offpath.add_rows_weight_gradient(buffer, _ones(5), *ROWS, _ones(3, 2)))
    assert counted == 2 * float(buffer.sum()) > 0


def test_padding_of_a_packed_weight_is_not_counted() -> None:
    crow_indices, col_indices = CONNECTIONS
    packed = pack(crow_indices, col_indices, torch.ones(4), 8)
    assert packed.values.numel() > 4
    assert _counted(lambda: packed_linear(torch.ones(3, 8), packed, None, tokens=0)) == 2 * 3 * 4


def test_live_inputs_of_a_dense_weight_count_as_all_do() -> None:
    with FakeTensorMode():
        x, weight = torch.empty(3, 8), torch.empty(8, 5)
        assert _counted(lambda: torch.ops.offpath.live_linear(x, weight, None)) == _counted(lambda: x @ weight) > 0


def _step(layer: nn.Module, shape: tuple[int, ...]) -> Callable[[], None]:
    return lambda: layer(torch.ones(shape, requires_grad=True)).sum().backward()


@pytest.mark.parametrize("forward", ["bucketed", "dense"])
def test_a_training_step_counts_its_share_of_the_dense_one_however_it_is_computed(forward: str) -> None:
    layer = offpath.SparseLinear(16, 8, sparsity=0.75)
    with forced_methods(forward=forward):
        assert _counted(_step(layer, (5, 16))) == _counted(_step(layer.to_dense(), (5, 16))) // 4 > 0


def test_a_step_of_a_convolution_counts_its_share_of_the_dense_one() -> None:
    layer = SparseConv2d(4, 8, 3, padding=1, stride=2, sparsity=0.75)
    assert _counted(_step(layer, (2, 4, 9, 9))) == _counted(_step(layer.to_dense(), (2, 4, 9, 9))) // 4 > 0


def test_an_autoencoder_counts_what_its_few_latents_take() -> None:
    autoencoder, x = SparseAutoencoder(16, 64, k=4), torch.randn(8, 16)
    encoder, few = 2 * 8 * 16 * 64, 2 * 8 * 4 * 16

    def step() -> None:
        autoencoder.loss(x).total.backward()

    # Of the decoder, the product and both gradients; of the encoder both, since the decoder's bias is taken off x.
    assert _counted(step) == encoder + 5 * few


@pytest.mark.parametrize("live", [0.1, 1.0])
def test_a_sparse_weight_counts_the_inputs_that_live(live: float) -> None:
    """Whether or not looking for them pays: without a counter, no op is called where it does not."""
    layer, x = SparseSparseLinear(64, 32, sparsity=0.5), (torch.rand(8, 64) < live).float()
    pairs = int((x.T != 0).float().sum(1) @ layer.ccol_indices.diff().float())
    assert _counted(lambda: layer(x).sum().backward()) == 2 * 2 * pairs > 0


def test_rows_of_unknown_places_count_as_many_as_meet_at_random() -> None:
    values, crow_indices, indices, w_values, *weight = (
        torch.empty(size, dtype=dtype, device="meta")
        for size, dtype in (
            (64, None),
            (9, torch.int32),
            (64, torch.int32),
            (100, None),
            (17, torch.int32),
            (100, torch.int32),
        )
    )
    op = torch.ops.offpath.rows_sparse_matmul
    assert _counted(lambda: op(values, crow_indices, indices, w_values, *weight, 32)) == 2 * 64 * 100 // 16


LAYERS = {
    "linear": (lambda: offpath.SparseLinear(16, 8, sparsity=0.75), (5, 16)),
    "convolution": (lambda: SparseConv2d(4, 8, 3, sparsity=0.75), (2, 4, 9, 9)),
    "sparse inputs": (lambda: SparseInputLinear(16, 8), (5, 16)),
    "autoencoder": (lambda: SparseAutoencoder(16, 64, k=4), (5, 16)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_shapes_alone_are_counted_too(kind: str) -> None:
    """By Lightning with a model on meta, by others with fake inputs."""
    make, shape = LAYERS[kind]
    layer = make()
    right = _counted(lambda: layer(torch.ones(shape)))
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert _counted(lambda: layer(torch.ones(shape))) == right > 0
    with torch.device("meta"):
        on_meta, x = make(), torch.ones(shape)
    assert measure_flops(on_meta, lambda: on_meta(x)) == right


def test_a_sparse_weight_counts_no_gradient_that_nobody_wants() -> None:
    layer = SparseSparseLinear(64, 32, sparsity=0.5)
    with FakeTensorMode(allow_non_fake_inputs=True):
        counted = _counted(lambda: layer(torch.ones(8, 64)).sum().backward())
    assert counted == 2 * 2 * 8 * layer.nnz


@pytest.mark.parametrize("imports", ["import torch.utils.flop_counter, offpath", "import offpath"])
def test_formulas_are_there_whoever_is_imported_first(imports: str) -> None:
    script = (
        f"{imports}\n"
        "import sys, torch\n"
        "print('torch.utils.flop_counter' in sys.modules)\n"
        "from torch.utils.flop_counter import FlopCounterMode, flop_registry\n"
        "print(torch.ops.offpath.sparse_linear in flop_registry)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment())
    assert run.stdout.split() == [str("flop_counter" in imports), "True"]
