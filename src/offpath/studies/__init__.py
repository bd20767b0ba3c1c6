"""Runnable experiments on real data."""

from offpath.studies.config import RunConfig as RunConfig, RunError as RunError
from offpath.studies.race import RaceResult as RaceResult, race as race
from offpath.studies.train import train as train
