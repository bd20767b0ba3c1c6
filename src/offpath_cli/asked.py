"""What the options of `offpath train` and `offpath race` ask for."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from offpath.studies import RunConfig

QUICK_EPOCHS = 2


def given(context: typer.Context) -> set[str]:
    """The options that the user has typed."""
    return {
        name
        for name in context.params
        if getattr(context.get_parameter_source(name), "name", "DEFAULT") not in ("DEFAULT", "DEFAULT_MAP")
    }


def default_folder(command: str, context: typer.Context) -> Path:
    """Where a run goes without --out."""
    asked = context.params
    method = "" if asked["method"] == "static" else f"-{asked['method']}"
    name = f"{command}-{asked['data']}-{asked['model']}{method}-s{asked['sparsity']:g}-seed{asked['seed']}"
    return Path("runs") / name


def asked_folder(context: typer.Context) -> Path | None:
    """What --out says; before 0.29, Typer leaves paths as text in a context."""
    return None if context.params["out"] is None else Path(context.params["out"])


def absolute(path: Path | str) -> str:
    """For a resumed run, which may start from another folder, and for other processes."""
    return str(Path(path).expanduser().resolve())


def config_of(context: typer.Context, folder: Path, resume: bool, quick: bool) -> RunConfig:
    """The config that the options ask for; with --resume the one in the folder, which options may not contradict."""
    from dataclasses import fields, replace

    from offpath.studies import RunConfig, RunError
    from offpath.studies.folder import RunFolder

    names = [field.name for field in fields(RunConfig) if field.name in context.params]
    asked = {name: context.params[name] for name in names}
    if asked["data_dir"] is not None:
        asked["data_dir"] = absolute(asked["data_dir"])
    options = given(context) & set(names)
    if not resume:
        config = RunConfig(**asked | ({"epochs": min(asked["epochs"], QUICK_EPOCHS)} if quick else {}))
        _refuse_idle(options, config)
        return config
    if quick:
        raise RunError("expected --quick on a new run only; with --resume, say how many --epochs")
    config = RunFolder(folder).config()
    _refuse_idle(options & {"data_dir"}, config)
    for name in sorted(options - {"epochs", "data_dir"}):
        if asked[name] != getattr(config, name):
            raise RunError(
                f"expected --resume to go on with {name}={getattr(config, name)!r} as the run was started, "
                f"got {asked[name]!r}; leave the option out, or start a new run"
            )
    config = replace(config, **{name: asked[name] for name in options & {"epochs", "data_dir"}})
    started_with = RunFolder(folder).config().epochs
    if config.epochs < started_with:
        raise RunError(f"expected at least the {started_with} epochs that the run has, got {config.epochs}")
    return config


def _refuse_idle(options: set[str], config: RunConfig) -> None:
    """Raise `RunError` for an option that would change nothing."""
    from offpath.studies import RunError
    from offpath.studies.data import DATASETS
    from offpath.studies.data.spec import WheelSpec

    still = "gmp removes what is smallest" if config.method == "gmp" else "static moves no connections"
    spec = DATASETS[config.data]
    for name, is_idle, reason in (
        ("drop_fraction", config.method in ("static", "gmp"), f"--method {still}"),
        ("update_freq", config.method == "static", f"--method {still}"),
        ("distribution", config.sparsity == 0, "--sparsity 0 has no connections to share"),
        ("data_dir", isinstance(spec, WheelSpec), f"{config.data} comes inside a Python package"),
    ):
        if name in options and is_idle:
            raise RunError(
                f"expected no --{name.replace('_', '-')}, which would change nothing: {reason}; leave it out"
            )
