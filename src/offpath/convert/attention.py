"""torch's attention with layers that can be made sparse, and back."""

from __future__ import annotations

import torch
from torch import nn

from offpath.convert.report import ConversionReport, LayerReport
from offpath.convert.swap import attachment, parameter_owners, swap_modules
from offpath.cost import model_bytes
from offpath.nn.attention import PROJECTIONS, UnpackedAttention, packing_problem, unpacking_problem
from offpath.nn.compiled import inside_compiled


@torch.inference_mode(False)  # parameters that are made in inference mode could not be trained
def unpack_attention(model: nn.Module) -> ConversionReport:
    """Swap every `nn.MultiheadAttention` in `model` for an `UnpackedAttention` that computes the same, in place.

    Their projections are `nn.Linear` layers then, which `sparsify`, `compress` and `prune` find. Build the optimizer
    afterwards; the names of parameters change. Modules that cannot be swapped (subclasses, tied or computed weights,
    hooks, `add_bias_kv`, `add_zero_attn`) stay as they are and stand in the report. Raises `ValueError` when the model
    is itself such a module.

    >>> from offpath import sparsify
    >>> model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    >>> len(unpack_attention(model).layers)
    4
    >>> [layer.name for layer in sparsify(model, 0.5).layers][:2]
    ['self_attn.q_proj', 'self_attn.k_proj']
    """
    model = inside_compiled(model)
    if isinstance(model, nn.MultiheadAttention):
        raise ValueError("expected a model that contains attention, got one itself; use UnpackedAttention.from_packed")
    owners = parameter_owners(model)
    replacements: dict[nn.Module, nn.Module] = {}
    layers, skipped = [], []
    for name, module in model.named_modules():
        if not isinstance(module, nn.MultiheadAttention):
            continue
        reason = unpacking_problem(module) or attachment(module, owners) or attachment(module.out_proj, owners)
        if reason:
            skipped.append((name, reason))
            continue
        unpacked = UnpackedAttention.from_packed(module)
        replacements[module] = unpacked
        layers += _reports(name, unpacked)
    swap_modules(model, replacements)
    return ConversionReport(tuple(layers), tuple(skipped))


@torch.inference_mode(False)
def pack_attention(model: nn.Module) -> ConversionReport:
    """Swap every `UnpackedAttention` in `model` whose projections are dense for torch's own, in place.

    The inverse of `unpack_attention`, after `densify`. Those with other projections, tied parameters or hooks stay as
    they are and stand in the report. Raises `ValueError` when the model is itself such a module.

    >>> model = nn.TransformerEncoderLayer(16, 2, 32)
    >>> names = list(model.state_dict())
    >>> _ = unpack_attention(model), pack_attention(model)
    >>> list(model.state_dict()) == names
    True
    """
    model = inside_compiled(model)
    if isinstance(model, UnpackedAttention):
        raise ValueError("expected a model that contains attention, got one itself; use its to_packed()")
    owners = parameter_owners(model)
    replacements: dict[nn.Module, nn.Module] = {}
    layers, skipped = [], []
    for name, module in model.named_modules():
        if not isinstance(module, UnpackedAttention):
            continue
        hanging = (attachment(layer, owners) for layer in (module, *module.projections()))
        reason = packing_problem(module) or next(filter(None, hanging), None)
        if reason:
            skipped.append((name, reason))
            continue
        layers += _reports(name, module)
        replacements[module] = module.to_packed()
    swap_modules(model, replacements)
    return ConversionReport(tuple(layers), tuple(skipped))


def _reports(name: str, attention: UnpackedAttention) -> list[LayerReport]:
    found = []
    for projection, layer in zip(PROJECTIONS, attention.projections(), strict=True):
        size_bytes = model_bytes(layer)
        shape = (layer.out_features, layer.in_features)
        found.append(LayerReport(f"{name}.{projection}", shape, layer.weight.numel(), size_bytes, size_bytes))
    return found
