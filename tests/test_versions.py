"""What the metadata promises of other packages' versions, and the constraints with which that is tried out."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _promises() -> dict[str, Version]:
    """The lowest version of each package that the metadata gives one of."""
    asked = [*PROJECT["dependencies"], *(one for extra in PROJECT["optional-dependencies"].values() for one in extra)]
    lowest = {}
    for requirement in map(Requirement, asked):
        for specifier in requirement.specifier:
            if specifier.operator == ">=":
                lowest[canonicalize_name(requirement.name)] = Version(specifier.version)
    return lowest


def _pins(name: str) -> dict[str, Version]:
    lines = [line for line in (ROOT / name).read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(package): Version(version) for package, version in (line.split("==") for line in lines)}


def test_the_oldest_constraints_are_what_is_promised() -> None:
    """Of a release: 13.0 is met by the first of its patches that was ever published."""
    pins = _pins("constraints-oldest.txt")
    for package, lowest in _promises().items():
        assert pins[package].release[: len(lowest.release)] == lowest.release, package


@pytest.mark.parametrize("name", ["constraints.txt", "constraints-oldest.txt"])
def test_every_pin_is_allowed(name: str) -> None:
    pins = _pins(name)
    assert not {package for package, lowest in _promises().items() if package in pins and pins[package] < lowest}


def test_both_constraints_pin_the_same_tools() -> None:
    assert _pins("constraints.txt").keys() <= _pins("constraints-oldest.txt").keys()
