"""Layers whose `weight` is read by a module around them: a sparse layer in their place has none."""

from __future__ import annotations

import dis
import inspect
import re
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from types import CodeType
from typing import Any

from torch import nn

from offpath.convert.fused_encoders import SWITCHES

# What reads `weight` of all layers in it, of a package that is not imported for it: module and name of a base class.
PEFT_LAYER = ("peft.tuners.tuners_utils", "BaseTunerLayer")
# Methods of such names prepare a model, and are done with it before anybody computes: `__init__`, `tie_weights`,
# `_init_weights`, `reset_parameters`, `load_state_dict`; but not `init_hidden` or `load_balance`, which are called
# along with the model. Who takes one for the other leaves a layer dense, or breaks a model.
PREPARING = re.compile(
    r"__init__|_*(init|initiali[sz]e|reset|tie|load)(_\w+)?_(weights?|param(eter)?s?|state_dict|pretrained|checkpoint)_*"
)


def read_by_their_owner(model: nn.Module) -> dict[nn.Module, str]:
    """The modules in `model` whose `weight` the code of a module around them reads, and which does.

    Seen are reads of an attribute's weight (`self.name.weight`) in methods of a class or its bases, called or not; but
    for those of torch's encoders, which are turned off.
    """
    found: dict[nn.Module, str] = {}
    for owner in model.modules():
        if any((kind.__module__, kind.__name__) == PEFT_LAYER for kind in type(owner).__mro__):
            reason = "it belongs to an adapter of PEFT, which reads weights"
            found |= {module: reason for module in owner.modules() if module is not owner}
    for owner in model.modules():
        kind: Any = type(owner)
        names = _attributes_whose_weight_is_read(kind)
        for path, module in owner.named_modules() if names else ():
            if module is not owner and path.rpartition(".")[2] in names:
                found.setdefault(module, f"a {kind.__name__} reads its weight")
    return found


@cache
def _attributes_whose_weight_is_read(kind: Any) -> frozenset[str]:
    own = [one for one in kind.__mro__ if issubclass(one, nn.Module) and one not in (nn.Module, *SWITCHES)]
    members = [(name, member) for one in own for name, member in vars(one).items()]
    codes = [code for name, member in members if not PREPARING.fullmatch(name) for code in _codes(member)]
    return frozenset(name for code in codes for name in _reads(code))


def _codes(member: object) -> Iterator[CodeType]:
    """The code of a method or property, without what wraps it, and of the functions in it."""
    function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
    code = getattr(inspect.unwrap(function), "__code__", None) if callable(function) else None
    pending = [code] if isinstance(code, CodeType) else []
    while pending:
        code = pending.pop()
        yield code
        pending += [constant for constant in code.co_consts if isinstance(constant, CodeType)]


def _reads(code: CodeType) -> Iterator[str]:
    if "weight" in code.co_names:
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for first, second in pairwise(steps):
            if first.opname == second.opname == "LOAD_ATTR" and second.argval == "weight":
                yield first.argval
