"""Configuration: schemas of experiments, and the files that they are read from."""

from nev.config.base import ConfigError
from nev.config.experiment import Experiment
from nev.config.file import load

__all__ = ["ConfigError", "Experiment", "load"]
