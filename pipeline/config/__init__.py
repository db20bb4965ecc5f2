"""Every setting of an experiment: its type, bounds and default. Imports no torch.

One YAML file is one experiment. `load` reads it, applies `--set key.sub=value` overrides and returns a frozen
`Experiment`; all problems are reported at once, with a "did you mean" for unknown keys.

Students are named sets of overrides over `train`, so that what differs between two students is what the file says:

    train:    {model: toy/resnet, width: 8, loss: kd, temperature: 5, epochs: 30}
    students:
      kd:     {}
      e2kd:   {explanation_weight: 10}
"""

from pipeline.config.base import Settings
from pipeline.config.data import DataConfig, Files
from pipeline.config.experiment import EvaluateConfig, Experiment, StoreConfig, ViewConfig
from pipeline.config.explain import ExplainConfig
from pipeline.config.grid import Candidate
from pipeline.config.load import dump, load, parse
from pipeline.config.training import (
    DEFAULT_SCORES,
    AugmentConfig,
    GuideConfig,
    ModelConfig,
    PriorConfig,
    Schedule,
    StudentConfig,
    TeachConfig,
    TeacherConfig,
)

__all__ = [
    "DEFAULT_SCORES",
    "AugmentConfig",
    "Candidate",
    "DataConfig",
    "EvaluateConfig",
    "Experiment",
    "ExplainConfig",
    "Files",
    "GuideConfig",
    "ModelConfig",
    "PriorConfig",
    "Schedule",
    "Settings",
    "StoreConfig",
    "StudentConfig",
    "TeachConfig",
    "TeacherConfig",
    "ViewConfig",
    "dump",
    "load",
    "parse",
]
