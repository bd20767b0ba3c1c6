"""What `pytest benchmarks` prints: one table a case, its contenders from fast to slow, with the columns that matter."""

from __future__ import annotations

import pytest

DEFAULTS = {"benchmark_columns": ["median", "iqr", "rounds"], "benchmark_sort": "median", "benchmark_max_time": "0.5"}


def pytest_configure(config: pytest.Config) -> None:
    # Before pytest-benchmark reads them; an option on the command line stands.
    given = " ".join(config.invocation_params.args)
    for option, value in DEFAULTS.items():
        if f"--{option.replace('_', '-')}" not in given:
            setattr(config.option, option, value)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # SparseLab brings an OpenMP runtime of its own; from then on two pools share the cores.
    items.sort(key=lambda item: "sparselab" in item.name)
