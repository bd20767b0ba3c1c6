"""Pretrained transformers of this machine: a Hugging Face checkpoint in a folder, or one that a package carries."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from offpath.convert import decompress_bitmasks
from offpath.studies.config import RunError

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "*.bin")
DECODERS = ("ForCausalLM", "LMHeadModel")
# What transformers and torch raise for files that are damaged, or of another kind.
UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    EOFError,
    RuntimeError,
    AttributeError,
    ImportError,
    TypeError,
    SafetensorError,
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Pretrained:
    """A model in evaluation mode with its tokenizer; a `decoder` predicts the next token, another makes embeddings.

    `dtype` is that of the weights in the checkpoint, as `float16`; `model` has them in float32.
    """

    model: nn.Module
    tokenizer: Any
    decoder: bool
    folder: Path
    dtype: str = "float32"


def find(place: str) -> Path:
    """The folder of the checkpoint that `place` means: the folder itself, or the one in an installed package.

    Raises `RunError` for a place that is neither; a name is never looked up on the network.
    """
    folder = Path(place).expanduser()
    if not folder.is_dir():
        try:
            found = distribution(place)
        except (PackageNotFoundError, ValueError):
            raise RunError(
                f"expected the folder of a checkpoint, or an installed Python package that carries one, got {place!r}; "
                "download the checkpoint and name its folder, or install the package"
            ) from None
        files = [Path(str(found.locate_file(file))) for file in found.files or []]
        folders = {file.parent for file in files if file.name == CONFIG and has_weights(file.parent)}
        if len(folders) != 1:
            raise RunError(
                f"expected one checkpoint in the package {place}, a {CONFIG} beside weights, found {len(folders)}; "
                "name the folder"
            )
        (folder,) = folders
    if not (folder / CONFIG).is_file() or not has_weights(folder):
        seen = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
        raise RunError(
            f"expected {CONFIG} and the weights of a Hugging Face checkpoint in {folder}, found "
            f"{', '.join(seen[:8]) or 'nothing'}; name the folder of one"
        )
    return folder.resolve()


def has_weights(folder: Path) -> bool:
    """Whether there is a file of weights in `folder`."""
    return any(next(folder.glob(pattern), None) for pattern in WEIGHTS)


def open_pretrained(place: str) -> Pretrained:
    """Load the model that `find` finds and its tokenizer, from local files alone and never with code of their own.

    Raises `RunError` for what cannot be loaded.
    """
    folder = find(place)
    need_transformers()
    import transformers  # late: it comes with an extra, and takes seconds

    with quiet(), readable(folder):
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        kind = _class(transformers, config, folder)
        state = _bitmask_state(folder)
        if state is not None:
            del config.quantization_config  # that is what the bitmasks were
        model, found = kind.from_pretrained(
            None if state else folder,
            config=config,
            state_dict=state,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
        tokenizer = open_tokenizer(folder)
    # Older versions of transformers load float32 whatever there is; the configuration says what it was saved in.
    # Newer ones warn of the old name.
    own = getattr(config, "dtype" if hasattr(config, "dtype") else "torch_dtype", None) or model.dtype
    dtype = str(own).removeprefix("torch.")
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise RunError(
            f"expected all weights of a {kind.__name__} in {folder}, but {len(missing)} are missing: "
            f"{', '.join(missing[:3])}...; a folder that `offpath compress` made is for `offpath bench`"
        )
    return Pretrained(model.float().eval(), tokenizer, kind.__name__.endswith(DECODERS), folder, dtype)


def _bitmask_state(folder: Path) -> dict[str, Tensor] | None:
    """The weights of a checkpoint of llm-compressor's format "sparse-bitmask", written out; None for any other."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if not tensors and not any(name.endswith(".bitmask") for name in names):
                return None
            tensors |= {name: file.get_tensor(name) for name in names}
    return decompress_bitmasks(tensors) if tensors else None


def _class(transformers: Any, config: Any, folder: Path) -> Any:
    """The class that the checkpoint names, if it is one of transformers' own models."""
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    if not (isinstance(kind, type) and issubclass(kind, transformers.PreTrainedModel)):
        raise RunError(f"expected {folder / CONFIG} to name one of transformers' models, got {names}; mend the file")
    if not hasattr(config, "vocab_size"):
        raise RunError(f"expected a model that reads text in {folder}, got a {names[0]}, which has no vocabulary")
    if config.is_encoder_decoder:
        raise RunError(f"expected an encoder or a decoder in {folder}, got a {names[0]}, which is both")
    return kind


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in `folder`. Raises `RunError` where there is none."""
    from transformers import AutoTokenizer  # late, as above

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up of the model's kind alone
        raise RunError(
            f"expected a tokenizer beside the weights in {folder}, found none with words of its own; copy the files of "
            "the model's tokenizer there (tokenizer.json, tokenizer_config.json)"
        )
    return tokenizer


def need_transformers() -> None:
    """Raise `RunError` where transformers is not installed."""
    if find_spec("transformers") is None:
        raise RunError("expected the Python package transformers; install it with: pip install 'offpath[cli,sae]'")


@contextmanager
def readable(folder: Path) -> Iterator[None]:
    """Raise `RunError` for whatever transformers says of the files in `folder`."""
    try:
        yield
    except UnpicklingError as error:  # whose text tells how to run what is in the file
        raise RunError(
            f"expected weights in {folder} that are tensors and nothing else, got a file that torch does not read as "
            "such; get the checkpoint as safetensors"
        ) from error
    except UNREADABLE as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]
        raise RunError(
            f"expected a checkpoint in {folder} that transformers can load without code of its own, got: "
            f"{' '.join(lines)[:400]}"
        ) from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers' progress bars and reports off the terminal."""
    from transformers import utils  # late, as above

    verbosity = utils.logging.get_verbosity()
    utils.logging.set_verbosity_error()
    utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        utils.logging.set_verbosity(verbosity)
        utils.logging.enable_progress_bar()
