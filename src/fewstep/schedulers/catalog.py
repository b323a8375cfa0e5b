"""Schedulers that only carry their config, and the choice of a class by the name in a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoints.config import Config
from ..errors import UnsupportedConfig
from .base import Scheduler
from .ddim import DDIMScheduler
from .ddpm import DDPMScheduler
from .dpm_solver import DPMSolverMultistepScheduler
from .euler import EulerAncestralDiscreteScheduler, EulerDiscreteScheduler
from .lcm import LCMScheduler
from .pndm import PNDMScheduler
from .tcd import TCDScheduler


class ConfigOnlyScheduler(Scheduler):
    """A scheduler of any class name: its config is kept and saved as it is, sampling is refused."""

    def to_dict(self) -> dict[str, Any]:
        """The content of its scheduler_config.json, of the version that it was made for."""
        version = "_diffusers_version"
        stored = {version: self.config[version]} if version in self.config else {}
        return super().to_dict() | stored

    @classmethod
    def own_config(cls, stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
        """The stored config with overrides, which may be any: their meaning is not known here."""
        name = cls.__name__ if cls is not ConfigOnlyScheduler else stored.get("_class_name")
        return cls.config_class.from_dict(stored, **overrides, _class_name=name or cls.__name__)


class DDIMInverseScheduler(ConfigOnlyScheduler): ...


class DEISMultistepScheduler(ConfigOnlyScheduler): ...


class DPMSolverSDEScheduler(ConfigOnlyScheduler): ...


class DPMSolverSinglestepScheduler(ConfigOnlyScheduler): ...


class EDMEulerScheduler(ConfigOnlyScheduler): ...


class HeunDiscreteScheduler(ConfigOnlyScheduler): ...


class KDPM2AncestralDiscreteScheduler(ConfigOnlyScheduler): ...


class KDPM2DiscreteScheduler(ConfigOnlyScheduler): ...


class LMSDiscreteScheduler(ConfigOnlyScheduler): ...


class UniPCMultistepScheduler(ConfigOnlyScheduler): ...


CLASSES: tuple[type[Scheduler], ...] = (
    LCMScheduler,
    TCDScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    *ConfigOnlyScheduler.__subclasses__(),
)
SCHEDULERS: Mapping[str, type[Scheduler]] = {kind.__name__: kind for kind in CLASSES}


def scheduler_from_config(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler that a config is of by its `_class_name`, config-only if it is not known."""
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise UnsupportedConfig(
            "the scheduler config has no _class_name; use LCMScheduler.from_config(config)"
        )
    return SCHEDULERS.get(name, ConfigOnlyScheduler).from_config(config)
