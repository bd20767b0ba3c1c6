"""What the study trains: its tasks, the arms of each, and the trials that these make with the seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from offpath.studies.config import RunError

DENSE, SMALL_DENSE, STATIC, SET_, RIGL, GMP_ = METHODS = ("dense", "small-dense", "static", "set", "rigl", "gmp")
# The same with new connections that begin with the mean second moment of their layer, in place of Adam's zero.
SET_MEAN, RIGL_MEAN = MEAN_METHODS = ("set-mean", "rigl-mean")
MOVING = {SET_, RIGL, GMP_, *MEAN_METHODS}


@dataclass(frozen=True)
class Arm:
    """A way to spend the parameters; the dense net's sparsity is 0.

    "small-dense" is a narrower dense net with as many parameters as the sparse ones of this sparsity have.
    """

    method: str
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        """Method and sparsity in one word.

        >>> Arm("rigl", 0.95).name, Arm("dense").name
        ('rigl-0.95', 'dense')
        """
        return f"{self.method}-{self.sparsity:g}" if self.sparsity else self.method

    @property
    def tuned_as(self) -> Arm:
        """The arm whose learning rate this one takes over: that of fixed connections, or the dense net for GMP."""
        if self.method == GMP_:
            return Arm(DENSE)
        return Arm(STATIC, self.sparsity) if self.method in MOVING else self


@dataclass(frozen=True)
class TaskConfig:
    """How the arms of one task are trained: all with the same steps, batches and schedule.

    The learning rate of an arm is the one of `learning_rates` that does best after `tuning_steps` on training data held
    back for that. `sizes` are those of the dense net: the hidden layers of an MLP; or width, heads, blocks and context
    of a transformer.
    """

    name: str
    title: str
    data: str
    kind: str
    sizes: tuple[int, ...]
    arms: tuple[Arm, ...]
    steps: int
    tuning_steps: int
    evaluate_every: int
    batch_size: int
    learning_rates: tuple[float, ...]
    update_freq: int = 100
    drop_fraction: float = 0.3


@dataclass(frozen=True)
class Trial:
    """One training run; while tuning, with a given learning rate on a part of the training data."""

    task: str
    arm: Arm
    seed: int
    tuning_rate: float | None = None

    @property
    def name(self) -> str:
        """The name of its file.

        >>> Trial("cifar10", Arm("set", 0.9), 2).name, Trial("cifar10", Arm("dense"), 0, 1e-3).name
        ('cifar10_set-0.9_seed2', 'tune_cifar10_dense_0.001')
        """
        if self.tuning_rate is not None:
            return f"tune_{self.task}_{self.arm.name}_{self.tuning_rate:g}"
        return f"{self.task}_{self.arm.name}_seed{self.seed}"


@dataclass(frozen=True)
class StudyConfig:
    """The whole study. Raises `RunError` for seeds that make no spread."""

    tasks: tuple[TaskConfig, ...]
    seeds: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self) -> None:
        if len(set(self.seeds)) < 2 or not all(0 <= seed < 2**32 for seed in self.seeds):
            raise RunError(f"expected two different seeds or more in [0, 2^32), for a spread, got {self.seeds}")

    def task(self, name: str) -> TaskConfig:
        """The task of this name."""
        return next(task for task in self.tasks if task.name == name)

    def tuning(self) -> Iterator[Trial]:
        """The short trials that choose the learning rates."""
        for task in self.tasks:
            for arm in dict.fromkeys(arm.tuned_as for arm in task.arms):
                for rate in task.learning_rates:
                    yield Trial(task.name, arm, self.seeds[0], rate)

    def trials(self) -> Iterator[Trial]:
        """The trials that count, a whole seed after the other, so that whatever is there can be compared."""
        for seed in self.seeds:
            for task in self.tasks:
                for arm in task.arms:
                    yield Trial(task.name, arm, seed)

    def to_json(self) -> dict[str, Any]:
        """The config as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> StudyConfig:
        """The config that `to_json` gave."""

        def task(entry: dict[str, Any]) -> TaskConfig:
            lists = {name: tuple(entry[name]) for name in ("sizes", "learning_rates")}
            return TaskConfig(**entry | lists | {"arms": tuple(Arm(**arm) for arm in entry["arms"])})

        return cls(tuple(task(entry) for entry in values["tasks"]), tuple(values["seeds"]))


def _arms(sparsities: tuple[float, ...], methods: tuple[str, ...], extreme: tuple[Arm, ...] = ()) -> tuple[Arm, ...]:
    return (Arm(DENSE), *(Arm(method, sparsity) for sparsity in sparsities for method in methods[1:]), *extreme)


_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
_EXTREME = (Arm(SMALL_DENSE, 0.99), Arm(STATIC, 0.99), Arm(SET_, 0.99), Arm(RIGL, 0.99))
_SOME = (DENSE, SMALL_DENSE, STATIC, RIGL)
_MEAN = tuple(Arm(method, sparsity) for sparsity in (0.9, 0.99) for method in MEAN_METHODS)
# fmt: off
FULL = StudyConfig((
    TaskConfig(
        name="fashion-mnist", title="Fashion-MNIST", data="fashion-mnist", kind="images", sizes=(512, 512),
        arms=_arms((0.9, 0.95, 0.98), METHODS, _EXTREME + _MEAN),
        steps=20 * 469, tuning_steps=7 * 422, evaluate_every=469, batch_size=128, learning_rates=_RATES,
    ),
    TaskConfig(
        name="cifar10", title="CIFAR-10", data="cifar10", kind="images", sizes=(512, 512),
        arms=_arms((0.9, 0.95, 0.98), METHODS, _EXTREME + _MEAN),
        steps=20 * 391, tuning_steps=7 * 352, evaluate_every=391, batch_size=128, learning_rates=_RATES,
    ),
    TaskConfig(
        name="shakespeare", title="tinyshakespeare", data="tinyshakespeare", kind="text", sizes=(256, 4, 2, 64),
        arms=_arms((0.8, 0.9), (*_SOME, RIGL_MEAN)),
        steps=2000, tuning_steps=700, evaluate_every=100, batch_size=8, learning_rates=_RATES,
    ),
))
# Data that comes with the installed packages; a look at whether everything works, and no more.
QUICK = StudyConfig((
    TaskConfig(
        name="digits", title="digits", data="digits", kind="images", sizes=(64, 64),
        arms=_arms((0.9,), METHODS + MEAN_METHODS),
        steps=120, tuning_steps=30, evaluate_every=40, batch_size=64, learning_rates=(1e-3, 1e-2), update_freq=20,
    ),
    TaskConfig(
        name="text", title="Python source", data="python-source", kind="text", sizes=(32, 2, 1, 16),
        arms=_arms((0.8,), _SOME),
        steps=60, tuning_steps=20, evaluate_every=20, batch_size=8, learning_rates=(3e-3, 1e-2), update_freq=15,
    ),
), seeds=(0, 1))
# fmt: on
