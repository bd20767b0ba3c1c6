"""Models of `transformers`: named by a class of that package and a config, never by code of anyone else."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from offpath.storage.contents import Contents
from offpath.storage.errors import StorageError
from offpath.storage.fitting import fit
from offpath.storage.layers import LAYERS
from offpath.storage.sequential import same_settings

# Where a model came from is nobody's business; what implements its attention is the reader's choice.
NOT_STORED = ("_name_or_path", "architectures", "transformers_version")
# These make transformers fetch something, run what the package does not hold itself, or count to any number.
REFUSED = (
    "architecture",
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
    "experts_implementation",
    "_experts_implementation",
    "num_labels",
    "quantization_config",
    "backbone",
    "use_pretrained_backbone",
    "use_timm_backbone",
)
# Larger whole numbers in a config are refused: labels and layers are counted with them.
MAX_NUMBER = 2**24
# A constructor may make so many tensors for each that the file holds, and so many bytes besides the parameters.
CALLS_PER_TENSOR = 200
MAX_BYTES = 2**30
# These change no number; resizing the embeddings leaves the old vocab_size in some modules.
NO_SETTINGS = ("training", "gradient_checkpointing", "name_or_path", "vocab_size")
CAST_TO = ("bfloat16", "float16", "float32", "float64")
_DRAWING = {Tensor.uniform_, Tensor.normal_}


def describe(model: nn.Module) -> dict[str, Any] | None:
    """Class and config of a model of `transformers`, or None for others and for those that need more than these.

    So do models whose modules, their settings or the buffers that no file holds were changed after they were built.
    Hooks are not looked for: transformers leaves its own on a model.
    """
    if "transformers.modeling_utils" not in sys.modules:
        return None
    transformers = sys.modules["transformers"]
    name = type(model).__name__
    if not isinstance(model, transformers.PreTrainedModel) or getattr(transformers, name, None) is not type(model):
        return None
    config = _stored(json.loads(model.config.to_json_string(use_diff=False)))
    if _problem(config):
        return None
    try:
        with torch.device("cpu"):
            again = _without_parameters(type(model), config, sys.maxsize)
    except StorageError:
        return None
    own, built = (dict(one.named_modules(remove_duplicate=False)) for one in (model, again))
    if own.keys() != built.keys() or not all(_is_like(built[name], module) for name, module in own.items()):
        return None
    own_buffers, buffers = _unsaved_buffers(model), _unsaved_buffers(again)
    if not all(_is_cast_of(own_buffers.get(path), buffer) for path, buffer in buffers.items()):
        return None
    return {"class": name, "config": config, "cast": _casts(own_buffers, buffers)}


def _is_like(built: nn.Module, module: nn.Module) -> bool:
    """Whether `module` is a layer that the file holds, or computes with its tensors what `built` does."""
    kind = type(module)
    row = LAYERS.get(kind.__name__)
    if row is not None and row.kind is kind:
        return True
    # transformers puts the forward of a module back into its attributes after it has recorded outputs.
    forward = vars(module).get("forward")
    if kind is not type(built) or (forward is not None and getattr(forward, "__func__", None) is not kind.forward):
        return False
    if kind.__module__.startswith("torch.nn."):
        return same_settings(built, module)
    # What else modules of transformers set may be a cache.
    return all(vars(module).get(name) == value for name, value in vars(built).items() if _is_setting(name, value))


def _is_setting(name: str, value: object) -> bool:
    return isinstance(value, (int, float, str)) and name not in NO_SETTINGS and not name.startswith("_")


def _unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that no file holds, by all of their names."""
    return {
        f"{path}.{name}" if path else name: buffer
        for path, module in model.named_modules(remove_duplicate=False)
        for name, buffer in module._buffers.items()
        if buffer is not None and name in module._non_persistent_buffers_set
    }


def _is_cast_of(buffer: Tensor | None, built: Tensor) -> bool:
    return buffer is not None and torch.equal(buffer.cpu(), built.to(buffer.dtype))


def _casts(own: Mapping[str, Tensor], built: Mapping[str, Tensor]) -> dict[str, str]:
    """The dtype of each buffer that has another one than it was built with: `model.to(dtype)` rounds them."""
    return {
        path: str(own[path].dtype).removeprefix("torch.")
        for path, buffer in built.items()
        if own[path].dtype != buffer.dtype
    }


def build(description: Mapping[str, Any], contents: Contents) -> nn.Module:
    """The model of that class and config, whose parameters are on the meta device and whose buffers are not.

    It is built on the meta device first, and made to hold all that the file does: what a config asks for costs no
    memory before it is known to fit. Raises `StorageError`.
    """
    name, config, cast = description.get("class"), description.get("config"), description.get("cast", {})
    if not isinstance(name, str) or not isinstance(config, dict) or not isinstance(cast, dict):
        raise StorageError("expected the class and the config of a model of transformers; pass model=")
    problem = _problem(config)
    if problem:
        raise StorageError(f"expected a config that needs nothing but itself, got {problem}; pass model=")
    kind = _model_class(name)
    most_calls = CALLS_PER_TENSOR * (len(contents.tensors) + len(contents.layers) + 10)
    with torch.device("meta"):
        blueprint = _built(kind, config, most_calls)
    fit(blueprint, contents)
    model = _without_parameters(kind, config, most_calls)
    _cast(model, cast)
    return model


def _cast(model: nn.Module, cast: Mapping[str, object]) -> None:
    buffers = _unsaved_buffers(model) if cast else {}
    for path, dtype in cast.items():
        if path not in buffers or dtype not in CAST_TO:
            raise StorageError(f"expected a buffer and one of {', '.join(CAST_TO)}, got {path!r:.60} and {dtype!r:.60}")
        parent, _, name = path.rpartition(".")
        model.get_submodule(parent)._buffers[name] = buffers[path].to(getattr(torch, str(dtype)))


def _model_class(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise StorageError(f"expected transformers to be installed for a {name}; install it, or pass model=") from error
    kind = None if name.startswith("_") else getattr(transformers, name, None)
    if not (
        isinstance(kind, type)
        and issubclass(kind, transformers.PreTrainedModel)
        and getattr(kind, "config_class", None)
    ):
        raise StorageError(f"expected the name of a model in transformers, got {name!r:.60}; update it, or pass model=")
    return kind


def _built(kind: Any, config: Mapping[str, Any], most_calls: int) -> nn.Module:
    try:
        with _Frugally(most_calls):
            return kind(kind.config_class.from_dict(json.loads(json.dumps(config))))
    except Exception as error:  # the constructors of hundreds of classes meet whatever a file says
        raise StorageError(f"expected the config of a {kind.__name__}, got: {error!r:.300}; pass model=") from error


def _without_parameters(kind: Any, config: Mapping[str, Any], most_calls: int) -> nn.Module:
    with _parameters_on_meta(), torch.random.fork_rng(devices=()):
        return _built(kind, config, most_calls)


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules that this thread makes get their parameters on the meta device, where nothing is drawn for them."""
    thread = threading.get_ident()
    on_meta = WeakTensorKeyDictionary()  # one that is registered in two places stays one

    def moved(module: nn.Module, name: str, parameter: nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta or threading.get_ident() != thread:
            return None
        if parameter not in on_meta:
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device="meta")
            on_meta[parameter] = nn.Parameter(empty, parameter.requires_grad)
        return on_meta[parameter]

    handle = register_module_parameter_registration_hook(moved)
    try:
        yield
    finally:
        handle.remove()


class _Frugally(TorchFunctionMode):
    """Draws nothing on the meta device, nor for parameters, and stops what grows beyond the file.

    Elsewhere it draws: torch draws a truncated normal distribution again until all is in its bounds.
    """

    def __init__(self, most_calls: int) -> None:
        super().__init__()
        self.calls_left, self.bytes_left = most_calls, MAX_BYTES

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        in_place = func.__name__.endswith("_") and not func.__name__.endswith("__")
        written = kwargs.get("tensor", args[0] if args else None) if in_place else None
        if isinstance(written, nn.Parameter) or (func in _DRAWING and args[0].is_meta):
            return written
        result = func(*args, **kwargs)
        # Only where tensors are made: torch.no_grad switches by calls that come here as well, and one that raised would
        # never switch back.
        if isinstance(result, Tensor):
            self.calls_left -= 1
            self.bytes_left -= 0 if func is torch.empty else result.nbytes
            if self.calls_left < 0 or self.bytes_left < 0:
                raise StorageError("a model that is larger than the file")
        return result


def _stored(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in NOT_STORED}
    return {key: _stored(value) if isinstance(value, dict) else value for key, value in kept.items()}


def _problem(value: Any, key: str = "") -> str | None:
    """What of a config is refused; None for one that is not."""
    if key in REFUSED and value:
        return f"{key}={value!r:.60}"
    if isinstance(value, (dict, list)):
        entries = value.items() if isinstance(value, dict) else ((key, entry) for entry in value)
        return next((problem for name, entry in entries if (problem := _problem(entry, name))), None)
    if isinstance(value, int) and abs(value) > MAX_NUMBER:
        return f"{key}={value!r:.60}"
    return None
