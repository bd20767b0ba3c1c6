"""What the commands show of an autoencoder."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from offpath.studies.sae import SaeConfig, SaeRaceResult
from offpath.studies.sae.run import SaeRun
from offpath.studies.sae.tables import race_rows
from offpath_cli.display import SHOWN_STEPS, Display, print_whole


class SaeDisplay(Display):
    """Shows how activations are taken; what comes after it has the same columns."""

    def __init__(self) -> None:
        super().__init__("first", "second", "third")

    def on_shard(self, done: int, total: int) -> None:
        if self.task is None:
            self.begin("taking activations", total)
        self._show(done + 1)

    def begin(self, description: str, total: int | None, completed: int = 0) -> None:
        """Put another bar in the place of the one that is there."""
        if self.task is not None:
            self.progress.remove_task(self.task)
        self.task = self.progress.add_task(description, total=total, completed=completed, first="", second="", third="")


class SaeTrainDisplay(SaeDisplay):
    """Watches one run."""

    def on_start(self, run: SaeRun) -> None:
        self.say(f"{_description(run.config)}, seed {run.config.seed}")
        self.say(run.data.source)
        self.begin("training", run.total_steps, run.step)

    def on_step(self, run: SaeRun) -> None:
        meter = run.meter
        self._show(
            run.step,
            first=f"explained {1 - meter.fvu_sum / meter.samples:.1%}",
            second=f"L0 {meter.l0_sum / meter.samples:.1f}",
            third=f"{_tokens_per_second(run):,.0f} tokens/s",
        )

    def on_epoch(self, run: SaeRun, record: dict[str, Any]) -> None:
        self.say(
            f"epoch {record['epoch']:>3}  explained variance {1 - record['train_fvu']:.2%}  test "
            f"{record['explained_variance']:.2%}  L0 {record['test_l0']:.1f}  dead {record['dead']:,}  "
            f"{record['tokens_per_second']:>7,.0f} tokens/s"
        )


class SaeRaceDisplay(SaeDisplay):
    """Watches a dense run and a sparse one."""

    def on_start(self, runs: dict[str, SaeRun]) -> None:
        run = runs["sparse"]
        self.say(f"{_description(run.config)}: dense against sparse, seed {run.config.seed}")
        self.say(run.data.source)
        self.begin("racing", sum(run.total_steps for run in runs.values()), sum(run.step for run in runs.values()))

    def on_chunk(self, runs: dict[str, SaeRun]) -> None:
        rates = {name: _tokens_per_second(run) for name, run in runs.items()}
        speedup = f"sparse {rates['sparse'] / rates['dense']:.1f}x" if all(rates.values()) else ""
        self._show(sum(run.step for run in runs.values()), first=speedup)

    def on_epoch(self, records: dict[str, dict[str, Any]]) -> None:
        dense, sparse = (records[name]["explained_variance"] for name in ("dense", "sparse"))
        assert self.task is not None
        explained = f"explained {dense:.1%} / {sparse:.1%}"
        self.progress.update(self.task, second=explained)
        self._log(f"epoch {records['dense']['epoch']:>3}  {explained}")

    def on_measuring(self) -> None:
        self.begin("measuring peak memory", None)


def print_sae_race(result: SaeRaceResult, display: SaeRaceDisplay) -> None:
    """The table at the end of a race."""
    machine, config = result.machine, SaeConfig.from_json(result.config)
    table = Table("", title=Text(f"{_description(config)} ({result.data_source})"))
    for heading in ("dense", "sparse", "dense / sparse"):
        table.add_column(heading, justify="right")
    for row in race_rows(result):
        table.add_row(*row)
    print_whole(table, display.console)
    display.say(f"{machine['processor']}, {machine['threads']} threads, {machine['backend']}, torch {machine['torch']}")


def _description(config: SaeConfig) -> str:
    return f"{config.model}, {config.k} of {config.latents:,} latents, on {config.data_name}"


def _tokens_per_second(run: SaeRun) -> float:
    seconds = run.meter.step_seconds[-SHOWN_STEPS:]
    return run.samples_per_step * len(seconds) / sum(seconds) if seconds else 0.0
