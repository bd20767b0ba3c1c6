"""Sparse autoencoders on the activations of a pretrained transformer."""

from offpath.studies.sae.config import MODELS as MODELS, SaeConfig as SaeConfig
from offpath.studies.sae.race import SaeRaceResult as SaeRaceResult, race as race
from offpath.studies.sae.train import train as train
