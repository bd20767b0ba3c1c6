"""`offpath train` and `offpath race` with `--model sae`: what the options mean there."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from offpath_cli.asked import absolute, asked_folder, given

if TYPE_CHECKING:
    from offpath.studies.sae import SaeConfig

INTERRUPTED = 130
ONLY_HERE = ("latents", "k", "layer")
QUICK = {"latents": 1024, "k": 16, "epochs": 2, "batch_size": 512}


def is_meant(context: typer.Context) -> bool:
    """Whether the command is about an autoencoder; refuses options that are, where it is not."""
    from offpath.studies import RunError
    from offpath.studies.models import MODELS as OTHER_MODELS
    from offpath.studies.sae import MODELS

    folder, model = asked_folder(context), context.params["model"]
    if context.params["resume"] and folder is not None:
        from offpath.studies.folder import RunFolder

        values = RunFolder(folder).config_values()
        started = values.get("model") if isinstance(values, dict) else None
        started = started if isinstance(started, str) else None
        if "model" not in given(context):
            return started in MODELS
        if (started in MODELS) != (model in MODELS):
            kind = "an sae run" if started in MODELS else "no sae run"
            raise RunError(
                f"expected no other --model than {started}: {folder} holds {kind}, got {model}; leave it out"
            )
    if model in MODELS:
        return True
    if model not in OTHER_MODELS:
        raise RunError(f"expected model to be one of {', '.join((*OTHER_MODELS, *MODELS))}, got {model!r}")
    for name in given(context) & set(ONLY_HERE):
        raise RunError(f"expected --{name} with one of --model {', '.join(MODELS)}, got {model}")
    return False


def train(context: typer.Context) -> None:
    """Train one autoencoder, and write report.html."""
    from offpath.studies.sae import train as train_run
    from offpath.studies.sae.report import write_train_report
    from offpath_cli.sae_display import SaeTrainDisplay

    folder, config = _asked("train", context)
    with SaeTrainDisplay() as display:
        finished = train_run(config, folder, display, context.params["resume"])
    if not finished:
        display.say(f"stopped; go on with: offpath train --out {shlex.quote(str(folder))} --resume")
        raise typer.Exit(INTERRUPTED)
    write_train_report(folder)
    display.say(f"the run is in {folder}")
    display.say(f"plots: {folder / 'report.html'}   numbers: {folder / 'metrics.jsonl'}")


def race(context: typer.Context) -> None:
    """Train an autoencoder computed densely and sparsely, side by side."""
    from offpath.studies.sae import race as run_race
    from offpath.studies.sae.report import write_race_report
    from offpath_cli.sae_display import SaeRaceDisplay, print_sae_race

    folder, config = _asked("race", context)
    with SaeRaceDisplay() as display:
        result = run_race(config, folder, display, context.params["resume"])
    if result is None:
        display.say(f"stopped; go on with: offpath race --out {shlex.quote(str(folder))} --resume")
        raise typer.Exit(INTERRUPTED)
    write_race_report(result, folder / "report.html")
    print_sae_race(result, display)
    display.say(f"plots: {folder / 'report.html'}   numbers: {folder / 'race.json'}")


def _asked(command: str, context: typer.Context) -> tuple[Path, Any]:
    """The folder and the config that the options ask for; with --resume the one in the folder."""
    from offpath.studies import RunError
    from offpath.studies.folder import RunFolder
    from offpath.studies.sae import SaeConfig, minilm

    known = {field.name for field in fields(SaeConfig)}
    options = given(context)
    for name in sorted(options - known - {"out", "resume", "quick"}):
        raise RunError(f"expected no --{name.replace('_', '-')} for an autoencoder; leave it out")
    asked = {name: context.params[name] for name in options & known}
    if "data_dir" in asked:
        asked["data_dir"] = absolute(asked["data_dir"])
    quick, out = context.params["quick"], asked_folder(context)
    if not context.params["resume"]:
        if quick:
            text = {} if "data_dir" in asked else {"data": "python-source" if minilm.is_installed() else "synthetic"}
            asked = text | QUICK | asked
            asked["epochs"] = min(asked["epochs"], QUICK["epochs"])
        config = SaeConfig(**asked)
        _refuse_layer(options, config)
        return out or _default_folder(command, config), config
    if quick:
        raise RunError("expected --quick on a new run only; with --resume, say how many --epochs")
    if out is None:
        raise RunError("expected --out with --resume: the folder of the run to go on with")
    config = SaeConfig.from_json(RunFolder(out).config_values())
    _refuse_layer(options, config)
    for name in sorted(asked.keys() - {"epochs", "data_dir"}):
        if asked[name] != getattr(config, name):
            raise RunError(
                f"expected --resume to go on with {name}={getattr(config, name)!r} as the run was started, "
                f"got {asked[name]!r}; leave the option out, or start a new run"
            )
    if asked.get("epochs", config.epochs) < config.epochs:
        raise RunError(f"expected at least the {config.epochs} epochs that the run has, got {asked['epochs']}")
    return out, replace(config, **{name: asked[name] for name in asked.keys() & {"epochs", "data_dir"}})


def _default_folder(command: str, config: SaeConfig) -> Path:
    from offpath.studies.sae.text import read_text, text_sha256

    if config.data_dir is not None:  # what is in the file says whether it is tinyshakespeare
        text, _ = read_text(config.data, Path(config.data_dir))
        config = replace(config, text_sha256=text_sha256(text))
    return Path("runs") / f"{command}-{config.data_name}-{config.model}-k{config.k}-seed{config.seed}"


def _refuse_layer(options: set[str], config: SaeConfig) -> None:
    from offpath.studies import RunError

    if "layer" in options and config.data == "synthetic":
        raise RunError(
            "expected no --layer with --data synthetic: it says which layer of a transformer reads the text, and this "
            "data comes from neither; leave it out"
        )
