"""Schedulers that only carry their config, and the choice of a class by the name in a config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..checkpoints.config import Config
from ..errors import UnsupportedConfig
from .base import Scheduler
from .ddim import DDIMScheduler
from .lcm import LCMScheduler


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


class DDPMScheduler(ConfigOnlyScheduler): ...


class DEISMultistepScheduler(ConfigOnlyScheduler): ...


class DPMSolverMultistepScheduler(ConfigOnlyScheduler): ...


class DPMSolverSDEScheduler(ConfigOnlyScheduler): ...


class DPMSolverSinglestepScheduler(ConfigOnlyScheduler): ...


class EDMEulerScheduler(ConfigOnlyScheduler): ...


class EulerAncestralDiscreteScheduler(ConfigOnlyScheduler): ...


class EulerDiscreteScheduler(ConfigOnlyScheduler): ...


class HeunDiscreteScheduler(ConfigOnlyScheduler): ...


class KDPM2AncestralDiscreteScheduler(ConfigOnlyScheduler): ...


class KDPM2DiscreteScheduler(ConfigOnlyScheduler): ...


class LMSDiscreteScheduler(ConfigOnlyScheduler): ...


class PNDMScheduler(ConfigOnlyScheduler): ...


class TCDScheduler(ConfigOnlyScheduler): ...


class UniPCMultistepScheduler(ConfigOnlyScheduler): ...


SCHEDULERS: Mapping[str, type[Scheduler]] = {
    "LCMScheduler": LCMScheduler,
    "DDIMScheduler": DDIMScheduler,
    **{scheduler.__name__: scheduler for scheduler in ConfigOnlyScheduler.__subclasses__()},
}


def scheduler_from_config(config: Mapping[str, Any]) -> Scheduler:
    """The scheduler that a config is of by its `_class_name`, config-only if it is not known."""
    name = config.get("_class_name")
    if not isinstance(name, str):
        raise UnsupportedConfig(
            "the scheduler config has no _class_name; use LCMScheduler.from_config(config)"
        )
    return SCHEDULERS.get(name, ConfigOnlyScheduler).from_config(config)
