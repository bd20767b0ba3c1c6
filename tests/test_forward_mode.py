"""Forward-mode differentiation: `torch.autograd.forward_ad`, and `torch.func.jvp`, `jacfwd`, `linearize`, `hessian`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

import offpath
from checkers import assert_same
from offpath.nn import (
    JumpReLU,
    KWinners,
    ProductKeyMemory,
    SparseAutoencoder,
    SparseConv1d,
    SparseConv2d,
    SparseInputLinear,
    SparseSparseLinear,
)
from offpath.ops import SparseRows, encode_topk, sparse_linear_gradients as gradient_ops
from offpath.ops.library import direct
from test_direct_ops import CONNECTIONS, OPERANDS, WITHOUT_GRADIENT, drawn
from test_transforms import X, pair

pytestmark = pytest.mark.usefixtures("one_thread")

PLACES = {"dy": drawn(6, 2), "x": drawn(6, 8), "values": drawn(4)}
LINEAR: dict[str, tuple[Callable[..., Any], tuple]] = {
    "sparse_linear": (gradient_ops.linear, (PLACES["x"], PLACES["values"], drawn(2), *CONNECTIONS, "speed")),
    "sparse_linear_dx": (gradient_ops.dx, (PLACES["dy"], PLACES["values"], *CONNECTIONS, 8, "speed")),
    "sparse_linear_dvalues": (gradient_ops.dvalues, (PLACES["dy"], PLACES["x"], *CONNECTIONS, "speed")),
    "sparse_linear_backward": (gradient_ops.backward, (*PLACES.values(), *CONNECTIONS, "speed")),
}
OPS = LINEAR | {name: (getattr(direct, name), make()) for name, make in OPERANDS.items()}


def _of_floats(name: str) -> tuple[Callable[..., list[Tensor]], list[Tensor]]:
    """An op as a function from what can have a tangent to what can have one, and operands for it."""
    op, operands = OPS[name]
    at = [place for place, one in enumerate(operands) if isinstance(one, Tensor) and one.requires_grad]

    def run(*floats: Tensor) -> list[Tensor]:
        given = list(operands)
        for place, one in zip(at, floats, strict=True):
            given[place] = one
        outputs = op(*given)
        return [one for one in ([outputs] if isinstance(outputs, Tensor) else outputs) if one.is_floating_point()]

    return run, [operands[place] for place in at]


@pytest.mark.parametrize("name", OPS)
def test_tangents_of_an_op_are_what_small_steps_give(name: str) -> None:
    run, floats = _of_floats(name)
    # Batches of tangents, which gradcheck makes by vmap, and gradients in forward mode.
    checks = {"check_forward_ad": True, "check_batched_forward_grad": True, "check_undefined_grad": False}
    assert gradcheck(lambda *operands: tuple(run(*operands)), floats, **checks)


@pytest.mark.parametrize("name", OPS)
def test_a_tangent_of_one_operand_is_its_part_of_all(name: str) -> None:
    """Of whole numbers, whose sums are exact; an operand without a tangent is not computed with."""
    run, floats = _of_floats(name)
    whole = [one.detach().mul(4).round() for one in floats]
    tangents = [one.detach().mul(3).round().flip(0) for one in floats]
    together = jvp(run, tuple(whole), tuple(tangents))[1]
    alone = [
        jvp(lambda one, at=at: run(*whole[:at], one, *whole[at + 1 :]), (whole[at],), (tangents[at],))[1]
        for at in range(len(whole))
    ]
    for parts, right in zip(zip(*alone, strict=True), together, strict=True):
        assert bool(right.any()) and torch.equal(sum(parts), right)


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_in_both_orders_are_those_of_reverse_mode(name: str) -> None:
    run, floats = _of_floats(name)
    x, *others = [one.detach() for one in floats]

    def cube(x: Tensor) -> Tensor:
        return torch.stack([one.pow(3).sum() for one in run(x, *others)]).sum()

    right = torch.autograd.functional.hessian(cube, x)
    for transform in (hessian(cube), jacrev(jacfwd(cube)), jacfwd(jacfwd(cube))):
        assert_same(transform(x), right)


OF_X: dict[str, Callable[[nn.Module], Tensor]] = {
    "dual": lambda layer: _dual(layer, X, X.flip(0)),
    "dual without gradients": lambda layer: torch.no_grad()(_dual)(layer, X, X.flip(0)),
    "dual of a gradient": lambda layer: _dual(_gradient_of(layer), X, X.flip(0)),
    "jvp": lambda layer: jvp(layer, (X,), (X.flip(0),))[1],
    "expanded tangent": lambda layer: jvp(layer, (X,), (X[:1].expand(3, 6),))[1],
    "jvp of vmap": lambda layer: jvp(vmap(layer), (X,), (X.flip(0),))[1],
    "vmap of jvp": lambda layer: vmap(lambda x: jvp(layer, (x,), (x.flip(0),))[1])(X),
    "jvp of gradients of samples": lambda layer: jvp(vmap(grad(_cube(layer))), (X,), (X,))[1],
    "jacfwd": lambda layer: jacfwd(layer)(X),
    "linearize": lambda layer: linearize(layer, X)[1](X.flip(0)),
    "hessian": lambda layer: hessian(_cube(layer))(X),
    "third derivative": lambda layer: jacfwd(hessian(_cube(layer)))(X[0]),
    "jacobian": lambda layer: torch.autograd.functional.jacobian(layer, X, vectorize=True, strategy="forward-mode"),
}


def _cube(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x).pow(3).sum()


def _gradient_of(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.autograd.grad(_cube(layer)(x.requires_grad_()), x, create_graph=True)[0]


def _dual(f: Callable[[Tensor], Tensor], x: Tensor, tangent: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x.clone(), tangent.clone()))).tangent


@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")  # torch's own, of linearize
@pytest.mark.parametrize("compute", OF_X)
def test_forward_mode_of_the_input_is_that_of_the_dense_layer(compute: str) -> None:
    sparse, dense = (OF_X[compute](layer) for layer in pair())
    assert bool(sparse.any()) and torch.equal(sparse, dense)


def test_an_infinite_input_is_not_multiplied_by_a_tangent_that_is_not_there() -> None:
    layer, _ = pair()
    x, bias = torch.full((1, 6), torch.inf, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    tangent = jvp(lambda bias: functional_call(layer, {"bias": bias}, (x,)), (bias,), (torch.ones_like(bias),))[1]
    assert torch.equal(tangent, torch.ones(1, 5, dtype=torch.float64))


def _float64(layer: nn.Module) -> nn.Module:
    return layer.double().eval()


def _calibrated(activation: str) -> nn.Module:
    torch.manual_seed(0)
    autoencoder = SparseAutoencoder(6, 16, k=3, activation=activation, bandwidth=0.1)
    autoencoder.calibrate_threshold_(torch.randn(64, 6))
    return _float64(autoencoder)


def _k_winners(**options: Any) -> KWinners:
    return KWinners(6, percent_on=0.5, k_inference_factor=1.0, output="rows", **options)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolution": (lambda: SparseConv2d(2, 3, 3, sparsity=0.5, padding=1), (3, 2, 5, 5)),
    "convolution of sequences": (lambda: SparseConv1d(2, 3, 3, sparsity=0.5, stride=2), (3, 2, 5)),
    "sparse weight and inputs": (lambda: SparseSparseLinear(6, 5, sparsity=0.5), (3, 6)),
    "winners": (lambda: nn.Sequential(_k_winners(break_ties=True), SparseInputLinear(6, 5)), (3, 6)),
    "winners of a sparse weight": (
        lambda: nn.Sequential(_k_winners(break_ties=True), SparseSparseLinear(6, 5, sparsity=0.5)),
        (3, 6),
    ),
    "product-key memory": (lambda: ProductKeyMemory(6, 5, keys=4, k=3, heads=2, key_features=4), (3, 6)),
    "autoencoder": (lambda: SparseAutoencoder(6, 16, k=3), (3, 6)),
    "JumpReLU": (lambda: JumpReLU(6, threshold=0.3, bandwidth=0.5, output="dense"), (3, 6)),
    "autoencoder of a batch": (lambda: _calibrated("batch_topk"), (3, 6)),
    "autoencoder of thresholds": (lambda: _calibrated("jumprelu"), (3, 6)),
}
LINEAR_AND_OTHERS = {"linear": (lambda: offpath.SparseLinear(6, 5, sparsity=0.5), (3, 6))} | LAYERS
OF_ANY_NUMBER = ("JumpReLU", "autoencoder of a batch", "autoencoder of thresholds")


@pytest.mark.parametrize("kind", LAYERS)
def test_other_layers_transform_forwards_to_what_autograd_gives(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(1)
    layer, x = _float64(make()), torch.randn(shape, dtype=torch.float64)
    x[..., 1] = 0.0  # which has no gradient where zeros are left out
    one_by_one = torch.autograd.functional.jacobian(layer, x)
    assert bool(one_by_one.any())
    for transformed in (
        jacfwd(layer)(x),
        jacrev(layer)(x),
        torch.autograd.functional.jacobian(layer, x, vectorize=True),
        torch.autograd.functional.jacobian(layer, x, vectorize=True, strategy="forward-mode"),
    ):
        assert_same(transformed, one_by_one)
    right = torch.autograd.functional.hessian(_cube(layer), x)
    assert_same(hessian(_cube(layer))(x), right)
    if kind not in OF_ANY_NUMBER:
        one = vmap(lambda x: layer(x[None])[0])
        assert_same(one(x), layer(x))
        assert_same(jvp(one, (x,), (x,))[1], jvp(layer, (x,), (x,))[1])


@pytest.mark.parametrize("kind", LAYERS)
def test_tangents_of_parameters_agree_with_their_gradients(kind: str) -> None:
    """<gradient, tangent> is the tangent of the scalar; thresholds have those of the straight-through estimate."""
    make, shape = LAYERS[kind]
    torch.manual_seed(1)
    layer, x = _float64(make()), torch.randn(shape, dtype=torch.float64)
    layer.train(kind == "autoencoder of thresholds")  # or its thresholds have no gradient
    parameters = {name: one.detach() for name, one in layer.named_parameters()}

    def scalar(parameters: dict[str, Tensor]) -> Tensor:
        y = functional_call(layer, parameters, (x,))
        return (y + y.square()).sum()  # a unit just below its threshold is zero, and counts

    tangents = {name: torch.randn_like(one) for name, one in parameters.items()}
    forwards = jvp(torch.no_grad()(scalar), (parameters,), (tangents,))[1]
    backwards = grad(scalar)(parameters)
    assert all(bool(one.any()) for one in backwards.values())
    right = sum((backwards[name] * tangents[name]).sum() for name in parameters)
    assert_same(forwards, right)


def test_thresholds_of_an_autoencoder_have_a_tangent_in_its_loss() -> None:
    """Also without gradients, where a loss that is only looked at leaves them out."""
    autoencoder, x = _calibrated("jumprelu"), torch.randn(32, 6, dtype=torch.float64)
    thresholds = autoencoder.log_threshold.detach()

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.autoencoder = autoencoder

        def forward(self) -> Tensor:
            return self.autoencoder.loss(x).total

    def loss(thresholds: Tensor) -> Tensor:
        return functional_call(Loss(), {"autoencoder.log_threshold": thresholds}, ())

    gradient = grad(loss)(thresholds)
    assert bool(gradient.any())
    with torch.no_grad():
        tangent = jvp(loss, (thresholds,), (thresholds,))[1]
    assert_same(tangent, gradient @ thresholds)


@pytest.mark.parametrize("kind", OF_ANY_NUMBER)
def test_vmap_of_any_number_of_entries_is_refused(kind: str) -> None:
    make, shape = LAYERS[kind]
    torch.manual_seed(1)
    layer = _float64(make())
    x = torch.stack([torch.zeros(shape[1:]), torch.full(shape[1:], 3.0)]).double()
    with pytest.raises(offpath.kernels.KernelError, match="results of one shape for"):
        vmap(lambda x: layer(x[None])[0])(x)


def test_vmap_of_winners_that_tie_is_refused() -> None:
    with pytest.raises(RuntimeError, match="break_ties=True"):
        vmap(grad(lambda x: _k_winners().eval()(x[None]).values.sum()))(torch.randn(3, 6))


def _along(f: Callable[[Any], Tensor], tangents: Any) -> dict[str, Callable[[Any], Tensor]]:
    return {"jvp": lambda at: jvp(f, (at,), (tangents,))[1], "grad": lambda at: _dot(grad(f)(at), tangents)}


def _dot(gradients: dict[str, Tensor], tangents: dict[str, Tensor]) -> Tensor:
    return torch.stack([(gradients[name] * tangents[name]).sum() for name in tangents]).sum()


DEEP: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = LAYERS | {
    "two layers": (
        lambda: nn.Sequential(
            offpath.SparseLinear(6, 4, sparsity=0.5), nn.Tanh(), offpath.SparseLinear(4, 3, sparsity=0.5)
        ),
        (3, 6),
    )
}


@pytest.mark.parametrize("kind", DEEP)
def test_nested_derivatives_of_all_parameters_at_once_agree(kind: str) -> None:
    """Factors that both have tangents in both modes: an inner forward mode must leave an outer one its own."""
    make, shape = DEEP[kind]
    torch.manual_seed(1)
    layer, x = _float64(make()), torch.randn(shape, dtype=torch.float64)
    at = {name: one.detach() for name, one in layer.named_parameters()} | {"x": x}
    tangents = {name: torch.randn_like(one) for name, one in at.items()}

    def scalar(at: dict[str, Tensor]) -> Tensor:
        parameters = {name: one for name, one in at.items() if name != "x"}
        return functional_call(layer, parameters, (at["x"],)).pow(3).sum()

    deeper = {"": scalar}
    for _ in range(3):
        deeper = {f"{way} {ways}": f for ways, g in deeper.items() for way, f in _along(g, tangents).items()}
        found = {ways: f(at) for ways, f in deeper.items()}
        right = found.pop(max(found, key=lambda ways: ways.count("grad")))
        for one in found.values():
            assert_same(one, right)


def test_a_pullback_works_after_its_transform_is_over() -> None:
    torch.manual_seed(0)
    for kind, (make, shape) in LAYERS.items():
        layer, x = _float64(make()), torch.randn(shape, dtype=torch.float64)
        y, pull = vjp(layer, x)
        right = torch.autograd.functional.vjp(layer, x, y)[1]
        assert torch.equal(pull(y)[0], right), kind


def test_tangents_of_16_bits_are_of_16_bits() -> None:
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    layer = JumpReLU(6, threshold=0.3, bandwidth=0.5, output="dense")
    y, tangent = jvp(layer, (x,), (x,))
    assert y.dtype is tangent.dtype is torch.bfloat16 and torch.equal(y, tangent)
    with torch.autocast("cpu", torch.bfloat16):
        autoencoder = _calibrated("jumprelu").float()
        y, tangent = jvp(autoencoder, (x.float(),), (x.float(),))
        assert y.dtype is tangent.dtype and bool(tangent.any())


@pytest.mark.parametrize("name", ["rows_matmul", "topk_rows", "encode_topk", "sparse_conv2d"])
@pytest.mark.parametrize("requires_grad", [True, False])
def test_ops_called_by_their_names_refuse_tangents_instead_of_dropping_them(name: str, requires_grad: bool) -> None:
    """Also where `torch.library` runs them inside of a function that turns forward mode off."""
    operands = [
        one.detach().requires_grad_(requires_grad) if isinstance(one, Tensor) and one.is_floating_point() else one
        for one in OPERANDS[name]()
    ]
    x, *others = operands
    op = getattr(torch.ops.offpath, name)
    with pytest.raises(NotImplementedError, match="use reverse mode"):
        jvp(lambda x: _first(op(x, *others)), (x.detach(),), (x.detach(),))


def _first(outputs: Any) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else next(one for one in outputs if one.is_floating_point())


def test_what_has_no_tangent_is_refused_instead_of_giving_zero() -> None:
    x = torch.ones(2, 8)
    int8 = torch.ones(4, dtype=torch.int8), torch.ones(2), None, *CONNECTIONS
    assert "int8_linear" in WITHOUT_GRADIENT
    with pytest.raises(NotImplementedError, match="use reverse mode"):
        jvp(lambda x: offpath.ops.int8_linear(x, *int8), (x,), (x,))
    rows = SparseRows.from_dense(torch.eye(8))
    operands = rows.values, rows.crow_indices, rows.indices
    with pytest.raises(NotImplementedError, match="use reverse mode"):  # called by its name, past what passes tangents
        jvp(lambda w: torch.ops.offpath.rows_matmul(*operands, w), (torch.ones(8, 2),), (torch.ones(8, 2),))


SURELY = ("linear", "convolution")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", [*SURELY, "winners", "autoencoder", "product-key memory"])
def test_compiled_forward_mode_gives_the_same_tangents_or_says_no(kind: str, backend: str) -> None:
    """The ops of a graph run by their names: torch called their tangents zero."""
    make, shape = LINEAR_AND_OTHERS[kind]
    torch.manual_seed(1)
    layer, x = _float64(make()), torch.randn(shape, dtype=torch.float64)
    right = jvp(layer, (x,), (x,))[1]
    torch.compiler.reset()  # what other tests have compiled counts towards a limit
    inside = torch.compile(lambda x: jvp(layer, (x,), (x,))[1], backend=backend)
    outside = torch.compile(layer, backend=backend)
    for run in (inside, lambda x: jvp(outside, (x,), (x,))[1]):
        try:
            found = run(x)
        except NotImplementedError as error:
            assert "use reverse mode" in str(error) and kind not in SURELY
            continue
        assert_same(found, right)


def test_selected_rows_carry_tangents_into_products() -> None:
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(9, 6, dtype=torch.float64)

    def decode(x: Tensor) -> Tensor:
        return encode_topk(x, weight, None, 2) @ weight

    assert_same(jacfwd(decode)(x), torch.autograd.functional.jacobian(decode, x))


@pytest.fixture(autouse=True)
def no_word_of_a_missing_rule(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    yield
    assert not [warning for warning in recwarn if "performance drop" in str(warning.message)]
