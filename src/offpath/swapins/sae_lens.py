"""Sparse rows in SAELens (`sae-lens`): its sparse products on the CPU, and a TopK class that encodes sparsely."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from offpath.kernels.operands import row_numbers
from offpath.nn.autocast import under_autocast
from offpath.ops import SparseRows, encode_topk, topk_rows
from offpath.ops.library import is_differentiating
from offpath.swapins.encoder import LazyPreActivations, activations_at, few_live, of_latents, pre_activations
from offpath.swapins.patching import Patch, SwapInError

try:
    import sae_lens.saes.matryoshka_batchtopk_sae as _matryoshka
    import sae_lens.saes.topk_sae as _topk
    from sae_lens import JumpReLUSAE, TopKSAEConfig, register_sae_training_class
    from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
except ImportError as error:
    raise ImportError(f"expected the package sae-lens ({error}); pip install 'offpath[sae-lens]'") from error

__all__ = ["Patch", "SwapInError", "TopKTrainingSAE", "TopKTrainingSAEConfig", "patch"]

ARCHITECTURE = "offpath_topk"


def patch() -> Patch:
    """Let SAELens multiply sparse activations with offpath, until `undo()` or the end of a `with` block.

    That is the decoder of TopK autoencoders trained with `use_sparse_activations=True`; of all TopK and JumpReLU ones
    where few activations live and want no gradient; and the auxiliary loss for dead latents. Tensors on other devices
    than the CPU go to SAELens' own products, as before. Raises `SwapInError` for a version without the functions to
    replace.

    >>> from sae_lens import JumpReLUSAE, JumpReLUSAEConfig
    >>> sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=8, d_sae=64))
    >>> with patch():
    ...     sae(torch.randn(5, 8)).shape
    torch.Size([5, 8])
    """
    return Patch(
        [
            (_topk, "act_times_W_dec", _act_times_W_dec),
            (_topk, "_sparse_matmul_nd", _sparse_matmul_nd),
            (_topk, "calculate_topk_aux_acts", _calculate_topk_aux_acts),
            (_matryoshka, "act_times_W_dec", _act_times_W_dec),
            (_matryoshka, "_sparse_matmul_nd", _sparse_matmul_nd),
            (_matryoshka, "calculate_topk_aux_acts", _calculate_topk_aux_acts),
            (_topk.TopK, "forward", _topk_forward),
            (JumpReLUSAE, "decode", _decode_jumprelu),
        ]
    )


@dataclass
class TopKTrainingSAEConfig(_topk.TopKTrainingSAEConfig):
    """`sae_lens.TopKTrainingSAEConfig` for a `TopKTrainingSAE` that encodes and decodes with sparse rows.

    >>> TopKTrainingSAEConfig(d_in=8, d_sae=64, k=4).architecture()
    'offpath_topk'
    """

    use_sparse_activations: bool = True

    @classmethod
    def architecture(cls) -> str:
        """The name under which SAELens finds the class."""
        return ARCHITECTURE

    def get_inference_config_class(self) -> type[TopKSAEConfig]:
        """What is saved for inference is SAELens' own TopK autoencoder."""
        return TopKSAEConfig


class TopKTrainingSAE(_topk.TopKTrainingSAE):
    """`sae_lens.TopKTrainingSAE` whose encoder never stores all pre-activations, nor a dense gradient of them.

    They are computed at once only where the auxiliary loss or a hook on them asks, and else at the first look at
    `hidden_pre`. With `use_sparse_activations=True`, the default here, activations are sparse COO tensors, in any dtype
    and under autocast. `W_enc` has the shape that SAELens gives it, but lies in memory one latent after the other.

    >>> sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=8, d_sae=64, k=4))
    >>> sae.encode(torch.randn(5, 8)).values().shape
    torch.Size([20])
    """

    _uses_hidden_pre = False

    def initialize_weights(self) -> None:
        """SAELens' initial weights, in the other order."""
        super().initialize_weights()
        self.W_enc.data = _one_latent_after_the_other(self.W_enc.data)

    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        """Order `W_enc` as the class wants it."""
        super().process_state_dict_for_loading(state_dict)
        state_dict["W_enc"] = _one_latent_after_the_other(state_dict["W_enc"])

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Order `W_enc` as files hold it."""
        super().process_state_dict_for_saving(state_dict)
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens' training step; the auxiliary loss looks at all pre-activations when there are dead latents."""
        dead = step_input.dead_neuron_mask
        self._uses_hidden_pre = dead is not None and bool(dead.any())
        try:
            return super().training_forward_pass(step_input)
        finally:
            self._uses_hidden_pre = False

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The activations [..., d_sae], of which k live, and the pre-activations of all latents."""
        if x.device.type != "cpu":
            return super().encode_with_hidden_pre(x)
        sae_in = self.process_sae_in(x)
        norm = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
        flat, weight, bias = under_autocast(sae_in.reshape(-1, sae_in.shape[-1]), self.W_enc.T, self.b_enc)
        assert bias is not None
        hook = self.hook_sae_acts_pre
        if self._uses_hidden_pre or hook._forward_hooks or hook._backward_hooks:
            hidden_pre = hook(pre_activations(flat, weight, bias).view(*sae_in.shape[:-1], -1))
            hidden_pre = hidden_pre if norm is None else hidden_pre * norm
            rows = topk_rows(hidden_pre.reshape(flat.shape[0], -1), self.cfg.k)
        else:
            scale = () if norm is None else (norm,)
            hidden_pre = LazyPreActivations(_hidden_pre, flat.view(sae_in.shape), weight, bias, *scale)
            rows = _encode(flat, weight, bias, norm, self.cfg.k)
        shape = (*sae_in.shape[:-1], self.cfg.d_sae)
        acts = _to_coo(rows.relu(), shape) if self.cfg.use_sparse_activations else rows.relu().to_dense().view(shape)
        return self.hook_sae_acts_post(acts), hidden_pre

    def decode(self, feature_acts: Tensor) -> Tensor:
        """The reconstruction [..., d_in]."""
        return super().decode(_live(feature_acts))


if ARCHITECTURE not in SAE_TRAINING_CLASS_REGISTRY:
    register_sae_training_class(ARCHITECTURE, TopKTrainingSAE, TopKTrainingSAEConfig)


class _LiveActivations:
    """Activations as SAELens' decoders use them, `acts * scale @ W_dec`, that multiply what lives and nothing else."""

    is_sparse = False

    def __init__(self, rows: SparseRows, leading: torch.Size) -> None:
        self._rows, self._leading = rows, leading

    def __mul__(self, scale: Tensor) -> _LiveActivations:
        values = self._rows.values * of_latents(scale, self._rows.indices)
        return _LiveActivations(self._rows.with_values(values), self._leading)

    def __matmul__(self, weight: Tensor) -> Tensor:
        values, weight, _ = under_autocast(self._rows.values, weight, None)
        return (self._rows.with_values(values) @ weight).view(*self._leading, weight.shape[1])


def _live(acts: Any) -> Any:
    """`acts` [..., d_sae] as its live entries on the CPU; as it is on other devices or where too many live.

    Dense activations that want a gradient or have a tangent stay dense: it has entries where they are zero as well.
    """
    if isinstance(acts, _LiveActivations) or acts.device.type != "cpu":
        return acts
    if acts.is_sparse:
        return _LiveActivations(_from_coo(acts), acts.shape[:-1])
    if acts.requires_grad or is_differentiating():
        return acts
    flat = acts.reshape(-1, acts.shape[-1])
    return _LiveActivations(SparseRows.from_dense(flat), acts.shape[:-1]) if few_live(flat) else acts


def _from_coo(acts: Tensor) -> SparseRows:
    acts = acts.coalesce()
    *leading, latents = acts.indices()
    row = torch.zeros_like(latents)
    for index, size in zip(leading, acts.shape[:-1], strict=True):
        row = row * size + index
    crow_indices = torch.zeros(acts.shape[:-1].numel() + 1, dtype=torch.int32, device=acts.device)
    crow_indices[1:] = torch.bincount(row, minlength=crow_indices.numel() - 1).cumsum(0)
    return SparseRows(crow_indices, latents.int(), acts.values(), acts.shape[-1])


def _to_coo(rows: SparseRows, shape: tuple[int, ...]) -> Tensor:
    row = row_numbers(rows.crow_indices, rows.nnz)
    indices = torch.stack([*torch.unravel_index(row, shape[:-1]), rows.indices.long()])
    return torch.sparse_coo_tensor(indices, rows.values, shape, is_coalesced=True, check_invariants=False)


def _encode(x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor | None, k: int) -> SparseRows:
    """The k largest of (x @ weight.T + bias) * norm in each row."""
    if norm is None:
        return encode_topk(x, weight, bias, k)
    with torch.no_grad():
        scale = norm.to(x.dtype)
        chosen = encode_topk(x, weight * scale[:, None], bias * scale, k).indices.view(x.shape[0], k)
    values = activations_at(chosen, x, weight, bias) * of_latents(norm, chosen.flatten()).view(chosen.shape)
    return SparseRows.from_topk(values, chosen, weight.shape[0])


def _hidden_pre(x: Tensor, weight: Tensor, bias: Tensor, norm: Tensor | None = None) -> Tensor:
    all_of_them = pre_activations(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], -1)
    return all_of_them if norm is None else all_of_them * norm


def _one_latent_after_the_other(W_enc: Tensor) -> Tensor:
    return W_enc.T.contiguous().T


_act_times_W_dec_of_sae_lens = _topk.act_times_W_dec
_sparse_matmul_nd_of_sae_lens = _topk._sparse_matmul_nd
_calculate_topk_aux_acts_of_sae_lens = _topk.calculate_topk_aux_acts
_topk_forward_of_sae_lens = _topk.TopK.forward
_decode_jumprelu_of_sae_lens = JumpReLUSAE.decode


def _act_times_W_dec(feature_acts: Tensor, W_dec: Tensor, rescale_acts_by_decoder_norm: bool) -> Tensor:
    return _act_times_W_dec_of_sae_lens(_live(feature_acts), W_dec, rescale_acts_by_decoder_norm)


def _sparse_matmul_nd(sparse_tensor: Tensor, dense_matrix: Tensor) -> Tensor:
    if sparse_tensor.device.type != "cpu":
        return _sparse_matmul_nd_of_sae_lens(sparse_tensor, dense_matrix)
    return _live(sparse_tensor) @ dense_matrix


def _decode_jumprelu(self: JumpReLUSAE, feature_acts: Tensor) -> Tensor:
    return _decode_jumprelu_of_sae_lens(self, _live(feature_acts))


def _topk_forward(self: _topk.TopK, x: Tensor) -> Tensor:
    if x.device.type != "cpu" or not self.use_sparse_activations:
        return _topk_forward_of_sae_lens(self, x)
    return _to_coo(topk_rows(x.reshape(-1, x.shape[-1]), self.k).relu(), tuple(x.shape))


def _calculate_topk_aux_acts(k_aux: int, hidden_pre: Tensor, dead_neuron_mask: Tensor) -> Tensor:
    """The k_aux largest of the dead latents of each row, looked for among these alone."""
    if hidden_pre.device.type != "cpu":
        return _calculate_topk_aux_acts_of_sae_lens(k_aux, hidden_pre, dead_neuron_mask)
    dead = dead_neuron_mask.nonzero()[:, 0]
    rows = topk_rows(hidden_pre.reshape(-1, hidden_pre.shape[-1]).index_select(1, dead), k_aux)
    chosen = SparseRows(rows.crow_indices, dead[rows.indices].int(), rows.values, hidden_pre.shape[-1])
    return _to_coo(chosen, tuple(hidden_pre.shape))
