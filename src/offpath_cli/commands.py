"""The commands. Each imports what it needs inside its function, so that `--help` does not wait for torch."""

from __future__ import annotations

import functools
import os
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from offpath_cli.asked import config_of, default_folder

app = typer.Typer(
    help="Dynamic, unstructured sparsity for PyTorch that pays on the hardware people own.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
INTERRUPTED = 130

Data = Annotated[
    str,
    typer.Option(
        help="digits, mnist-5k, mnist, fashion-mnist or cifar10; for an sae tinyshakespeare (its default), "
        "python-source or synthetic."
    ),
]
Model = Annotated[str, typer.Option(help="mlp-small, mlp, mlp-wide; or sae, sae-batch-topk, sae-jumprelu.")]
Sparsity = Annotated[float, typer.Option(help="Share of the hidden weights that do not exist, in [0, 1).")]
Distribution = Annotated[str, typer.Option(help="How layers share the connections: uniform or erk.")]
Method = Annotated[
    str, typer.Option(help="How connections move: static, set, rigl, gmp (prunes a dense start) or mest.")
]
DropFraction = Annotated[float, typer.Option(help="Share of the connections that move in an update, in (0, 1].")]
UpdateFreq = Annotated[int, typer.Option(help="Steps between updates, which end after 75 % of the first --epochs.")]
Latents = Annotated[int | None, typer.Option(help="Latents of an sae (default: 6144).")]
Live = Annotated[int | None, typer.Option("--k", help="Live latents of a token, on average (default: 32).")]
Layer = Annotated[int | None, typer.Option(help="Transformer layer whose activations an sae reads (default: 3 of 6).")]
Epochs = Annotated[int, typer.Option(help="Passes over the training data.")]
BatchSize = Annotated[int, typer.Option(help="Samples a step, of all processes together.")]
LearningRate = Annotated[float, typer.Option(help="Adam's learning rate.")]
Seed = Annotated[int, typer.Option(help="Seed of the initial weights, the connections and the data order.")]
Device = Annotated[str, typer.Option(help="cpu or cuda; offpath info says what is missing for the latter.")]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder with the data files (default: OFFPATH_DATA and known places); for an sae a text file of your own "
        "(default: OFFPATH_DATA)."
    ),
]
Out = Annotated[
    Path | None, typer.Option(help="Where to write (default: a folder in runs, named by command, options and seed).")
]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run in --out from its checkpoint.")]
Quick = Annotated[
    bool,
    typer.Option(
        "--quick",
        help="Two epochs at most: a first look. For an sae also, unless said otherwise, 1024 latents, k 16, batches of "
        "512, and python-source (synthetic without the sae extra).",
    ),
]
Shapes = Annotated[list[str] | None, typer.Option(help="A layer as INxOUT, such as 768x3072; repeatable.")]
Batches = Annotated[list[int] | None, typer.Option(help="Rows of the input; repeatable.")]
Dtypes = Annotated[list[str] | None, typer.Option(help="float32 or bfloat16; repeatable.")]
Sparsities = Annotated[list[float] | None, typer.Option(help="Share of the weights that do not exist; repeatable.")]
CrossoverSeed = Annotated[int, typer.Option(help="Seed of the connections, the weights and the inputs.")]
CrossoverQuick = Annotated[bool, typer.Option("--quick", help="A small grid in under a minute: a first look.")]
CrossoverOut = Annotated[
    Path | None, typer.Option(help="Where to write (default: runs/crossover[-cuda][-quick]-seedSEED).")
]


def reports_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Show what a user can mend as one line instead of a traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt:
            raise typer.Exit(INTERRUPTED) from None
        except BrokenPipeError:  # whoever read our output has gone: nothing to tell, and nobody to tell it to
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            raise typer.Exit(1) from None
        except ModuleNotFoundError as error:
            raise _shown(f"this command needs {error.name}; install it with: pip install 'offpath[cli]'") from None
        except Exception as error:
            if _is_about_memory(error):
                what = str(error).strip().splitlines()
                raise _shown(
                    f"expected enough memory for what was asked, got: {what[0] if what else 'none left'}; ask for "
                    "smaller layers, batches or texts"
                ) from None
            if not _is_for_the_user(error):
                raise
            raise _shown(str(error)) from None

    return run


def _shown(message: str) -> typer.Exit:
    console = Console(stderr=True, soft_wrap=True, markup=False, emoji=False, highlight=False)
    console.print(Text("error: ", style="red") + message)
    return typer.Exit(1)


def _is_for_the_user(error: Exception) -> bool:
    from offpath.kernels import KernelError
    from offpath.studies import RunError
    from offpath.studies.data import DataError

    return isinstance(error, (KernelError, RunError, DataError, OSError))


def _is_about_memory(error: Exception) -> bool:
    import torch

    # On the CPU, torch has no error of its own for it.
    by_torch = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return by_torch or isinstance(error, (MemoryError, torch.OutOfMemoryError))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(version("offpath"))
        raise typer.Exit


@app.callback()
def offpath(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Dynamic, unstructured sparsity for PyTorch that pays on the hardware people own."""


@app.command()
@reports_errors
def info() -> None:
    """Print what is installed, what was chosen to compute with, and why."""
    from offpath.cost import gpu_parts, this_machine
    from offpath_cli.display import print_machine

    print_machine(this_machine(), gpu_parts())


@app.command()
@reports_errors
def train(
    context: typer.Context,
    data: Data = "mnist-5k",
    model: Model = "mlp",
    sparsity: Sparsity = 0.9,
    distribution: Distribution = "uniform",
    method: Method = "static",
    drop_fraction: DropFraction = 0.3,
    update_freq: UpdateFreq = 100,
    epochs: Epochs = 30,
    batch_size: BatchSize = 128,
    learning_rate: LearningRate = 1e-3,
    seed: Seed = 0,
    device: Device = "cpu",
    latents: Latents = None,
    k: Live = None,
    layer: Layer = None,
    data_dir: DataDir = None,
    out: Out = None,
    resume: Resume = False,
    quick: Quick = False,
) -> None:
    """Train one model with sparse hidden layers, and write report.html; --sparsity 0 trains the dense one.

    Under torchrun (torchrun --nproc-per-node 2 --no-python offpath train ...), the processes share out each batch.
    """
    from offpath_cli import sae

    if sae.is_meant(context):
        sae.train(context)
        return

    from offpath.studies import train as train_run
    from offpath.studies.ranks import ranks_of_torchrun
    from offpath.studies.train_report import write_report
    from offpath_cli.display import TrainDisplay

    folder = out or default_folder("train", context)
    with ranks_of_torchrun() as ranks:
        config = ranks.from_first(lambda: config_of(context, folder, resume, quick))
        with TrainDisplay(quiet=not ranks.first) as display:
            finished = train_run(config, folder, display, resume, ranks)
    if not finished:
        display.say(f"stopped; go on with: offpath train --out {shlex.quote(str(folder))} --resume")
        raise typer.Exit(INTERRUPTED)
    if not ranks.first:
        return
    write_report(folder)
    display.say(f"the run is in {folder}")
    display.say(f"plots: {folder / 'report.html'}   numbers: {folder / 'metrics.jsonl'}")


@app.command()
@reports_errors
def race(
    context: typer.Context,
    data: Data = "mnist-5k",
    model: Model = "mlp",
    sparsity: Sparsity = 0.9,
    distribution: Distribution = "uniform",
    method: Method = "static",
    drop_fraction: DropFraction = 0.3,
    update_freq: UpdateFreq = 100,
    epochs: Epochs = 30,
    batch_size: BatchSize = 128,
    learning_rate: LearningRate = 1e-3,
    seed: Seed = 0,
    device: Device = "cpu",
    latents: Latents = None,
    k: Live = None,
    layer: Layer = None,
    data_dir: DataDir = None,
    out: Out = None,
    resume: Resume = False,
    quick: Quick = False,
) -> None:
    """Train a dense model and its sparse twin side by side; write the table, race.json and report.html."""
    from offpath_cli import sae

    if sae.is_meant(context):
        sae.race(context)
        return

    from offpath.studies import race as run_race
    from offpath.studies.report import write_report
    from offpath_cli.display import RaceDisplay, print_race

    out = out or default_folder("race", context)
    config = config_of(context, out, resume, quick)
    with RaceDisplay() as display:
        result = run_race(config, out, display, resume)
    if result is None:
        display.say(f"stopped; go on with: offpath race --out {shlex.quote(str(out))} --resume")
        raise typer.Exit(INTERRUPTED)
    write_report(result, out / "report.html")
    print_race(result, display)
    display.say(f"plots: {out / 'report.html'}   numbers: {out / 'race.json'}")


@app.command()
@reports_errors
def crossover(
    shape: Shapes = None,
    batch: Batches = None,
    dtype: Dtypes = None,
    sparsity: Sparsities = None,
    out: CrossoverOut = None,
    seed: CrossoverSeed = 0,
    device: Device = "cpu",
    quick: CrossoverQuick = False,
) -> None:
    """Measure from which sparsity on a sparse layer is faster than the dense one on this machine."""
    from offpath.cost import keep_freed_memory
    from offpath.studies.crossover import CrossoverConfig, UnwrittenResult, crossover as run_crossover
    from offpath.studies.crossover.config import grid_for, shapes_from
    from offpath.studies.crossover.report import write_report
    from offpath_cli.crossover_display import CrossoverDisplay, print_crossover

    asked = {"shapes": shapes_from(shape or []), "batches": batch, "dtypes": dtype, "sparsities": sparsity}
    given = {name: tuple(values) for name, values in asked.items() if values}
    config = CrossoverConfig(**grid_for(device, quick) | given | {"seed": seed, "device": device})
    on = "" if device == "cpu" else f"-{device}"
    out = out or Path("runs") / f"crossover{on}{'-quick' if quick else ''}-seed{seed}"
    keep_freed_memory()
    with CrossoverDisplay() as display:
        try:
            result = run_crossover(config, out, display, shlex.join(["offpath", *sys.argv[1:]]))
        except UnwrittenResult as unwritten:
            print_crossover(unwritten.result, display)
            raise
    if result.points:
        print_crossover(result, display)
        write_report(result, out)
        display.say(f"plots: {out / 'report.html'}   numbers: {out / 'crossover.json'}")
    if not result.complete:
        held = f"{out} holds what there is" if result.points else "nothing was written"
        display.say(f"stopped after {len(result.points)} of {config.points} measurements; {held}")
        raise typer.Exit(INTERRUPTED)
    if result.wrong:
        raise typer.Exit(1)


@app.command()
@reports_errors
def data(
    name: Annotated[str, typer.Argument(help="mnist, fashion-mnist or cifar10.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where to put it (default: the user's cache).")] = None,
) -> None:
    """Download a data set from its own home and verify it."""
    from offpath.studies.data import download

    print(f"{name} is in {download(name, data_dir, progress=True)}")
