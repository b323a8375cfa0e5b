"""What every scheduler has, whether it samples or not: a config that comes in and goes out."""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar

from torch import Tensor

from ..checkpoints.config import Config, write_json
from ..checkpoints.locate import Source
from ..errors import RequestError

SCHEDULER_CONFIG_NAME = "scheduler_config.json"

SchedulerT = TypeVar("SchedulerT", bound="Scheduler")


@dataclass(frozen=True, eq=False)
class Plan:
    """The times of one run: at step i the latents go from timesteps[i] to next_timesteps[i].

    Unpacks into these two: `for t, t_next in zip(*plan)`.
    """

    timesteps: Tensor  # (N,) descending, int64 or float32: what the network is told
    next_timesteps: Tensor  # (N,) of the same dtype or exact; negative behind the last step
    exact: Tensor | None = None  # (N,) float32: where the latents are, if the network is told less
    begin: int = 0  # the place of the first step in the run that this is a part of
    total: int | None = None  # the steps of that run; None: N

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.timesteps, self.next_timesteps))

    @property
    def start(self) -> Tensor:
        """The time () of the latents that the run starts from."""
        return (self.timesteps if self.exact is None else self.exact)[0]

    def part(self, begin: int, end: int) -> Plan:
        """Steps `begin` to `end` - 1, which still know their places in the whole run."""
        return Plan(
            self.timesteps[begin:end],
            self.next_timesteps[begin:end],
            None if self.exact is None else self.exact[begin:end],
            self.begin + begin,
            len(self.timesteps) if self.total is None else self.total,
        )


@dataclass(frozen=True)
class SchedulerConfig(Config):
    """scheduler_config.json of any class. Keys without a meaning here are carried along."""

    STRICT: ClassVar[bool] = False


class Scheduler:
    """Base of all schedulers, built by the keys of their config: `LCMScheduler(beta_end=0.02)`.

    Sampling is refused here and done by the subclasses of `SamplingScheduler`.
    """

    config_class: ClassVar[type[SchedulerConfig]] = SchedulerConfig
    order = 1
    takes_eta: ClassVar[bool] = False  # whether `update` and `step` have an argument `eta`
    config: Any  # an instance of config_class

    def __init__(self, **config: Any) -> None:
        self.configure(self.own_config({}, config))

    def configure(self, config: Config) -> None:
        """Set up from a config; called once, when the scheduler is made."""
        self.config = config

    @classmethod
    def from_config(
        cls: type[SchedulerT], config: Mapping[str, Any], **overrides: Any
    ) -> SchedulerT:
        """A scheduler of this class from the config of any class; `overrides` win.

        Keys that someone has set are taken over, all others have this class's defaults. Keys that
        this class does not know are kept for the way back.
        """
        if not isinstance(config, Mapping):
            raise RequestError(
                f"config must be a mapping such as pipe.scheduler.config, got {config!r}; "
                "from_pretrained loads a folder"
            )
        scheduler = cls.__new__(cls)
        scheduler.configure(cls.own_config(config, overrides))
        return scheduler

    @classmethod
    def from_pretrained(
        cls: type[SchedulerT],
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
        **overrides: Any,
    ) -> SchedulerT:
        """A scheduler of this class from the scheduler_config.json of a folder or a repository.

        The file may be of another class, as in `from_config`; `overrides` win over it.
        """
        config = cls.load_config(
            pretrained_model_name_or_path,
            subfolder,
            revision=revision,
            cache_dir=cache_dir,
            force_download=force_download,
            local_files_only=local_files_only,
            token=token,
        )
        return cls.from_config(config, **overrides)

    @classmethod
    def load_config(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        subfolder: str | None = None,
        **location: Any,
    ) -> dict[str, Any]:
        """The content of a scheduler_config.json; keywords as in `from_pretrained`."""
        source = Source(os.fspath(pretrained_model_name_or_path), subfolder, **location)
        return source.read_json(SCHEDULER_CONFIG_NAME)

    def save_config(self, save_directory: str | os.PathLike[str]) -> None:
        """Writes scheduler_config.json into a folder."""
        write_json(self.to_dict(), Path(save_directory) / SCHEDULER_CONFIG_NAME)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False
    ) -> None:
        """Writes scheduler_config.json into a folder."""
        if push_to_hub:
            raise RequestError(
                "push_to_hub=True is not supported; upload the folder with `hf upload`"
            )
        self.save_config(save_directory)

    def to_dict(self) -> dict[str, Any]:
        """The content of its scheduler_config.json."""
        return self.config.to_dict(self.config["_class_name"])

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The times of a run."""
        self._refuse()

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """One step: (z at the next time, predicted z_0)."""
        self._refuse()

    def updater(self, plan: Plan) -> Callable[..., tuple[Tensor, Tensor]]:
        """The steps of one run; those of a multistep solver remember the run's last ones."""
        return self.update

    def start_scale(self, plan: Plan) -> float:
        """The deviation of the noise that a run starts from."""
        return 1.0

    @property
    def init_noise_sigma(self) -> float:
        """The same, in the units of `step`."""
        return 1.0

    def diffuse(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t from z_0 and noise (B, ...) at times t (B,), in the units of `update`."""
        self._refuse()

    def set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        """Plan a run for `step`."""
        self._refuse()

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """The next step of the planned run."""
        self._refuse()

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """z_t from z_0 and noise."""
        self._refuse()

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The v_prediction target."""
        self._refuse()

    def scale_model_input(self, sample: Tensor, timestep: Tensor | int | None = None) -> Tensor:
        """What the network is given for the latents `sample`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise RequestError(
            f"{self.config['_class_name']} is not implemented for sampling; use "
            "LCMScheduler.from_config(pipe.scheduler.config) or "
            "DDIMScheduler.from_config(pipe.scheduler.config)"
        )

    def __len__(self) -> int:
        return int(self.config.get("num_train_timesteps", 1000))

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2, default=str)}"

    @classmethod
    def own_config(cls, stored: Mapping[str, Any], overrides: Mapping[str, Any]) -> Config:
        """The config of this class from a stored one. Raises TypeError for unknown overrides."""
        for key in overrides:
            if not cls.config_class.knows(key):
                known = [name for name in cls.config_class() if not name.startswith("_")]
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
                raise TypeError(
                    f"{cls.__name__} got an unknown argument {key!r}; the nearest is {near[0]!r}"
                )
        return cls.config_class.from_dict(stored, **overrides, _class_name=cls.__name__)
