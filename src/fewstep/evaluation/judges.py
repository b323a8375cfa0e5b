"""What judges the pictures of any model: feature networks for FID and KID, CLIP for the prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fewstep.errors import RequestError
from fewstep.evaluation.clip_score import ClipScore
from fewstep.evaluation.features import FEATURE_NETS, RESIZE, FeatureNet, load_feature_net
from fewstep.evaluation.fingerprints import settings_key
from fewstep.evaluation.kid import kid
from fewstep.evaluation.moments import Moments, frechet_distance
from fewstep.evaluation.report import Column

KID_SUBSETS = 20
_LARGEST_SUBSET = 500


@dataclass(frozen=True, eq=False)
class Judges:
    """Feature networks by name, and a CLIP model if there is one."""

    nets: Mapping[str, FeatureNet]
    clip: ClipScore | None = None

    @classmethod
    def load(
        cls,
        names: Sequence[str] = tuple(FEATURE_NETS),
        *,
        clip: str | None = None,
        folder: str | Path | None = None,
        device: str | torch.device = "cpu",
    ) -> Judges:
        """Networks of FEATURE_NETS from `folder` (see `load_feature_net`), CLIP by folder or id."""
        nets = {name: load_feature_net(name, folder, device=device) for name in names}
        if not nets and clip is None:
            raise RequestError("there is no judge; name a feature network or a CLIP model")
        return cls(nets, None if clip is None else ClipScore.load(clip, device=device))

    def __call__(self, pictures: np.ndarray, texts: Sequence[str]) -> dict[str, np.ndarray]:
        """Feature rows float32 [N, D] under each network's name; the scores [N, 1] under "clip"."""
        found = {name: net(pictures) for name, net in self.nets.items()}
        if self.clip is not None:
            found["clip"] = self.clip(pictures, texts)[:, None]
        return found

    @property
    def key(self) -> str:
        """Names the weights and the preparation of pictures."""
        origins = {name: net.origin for name, net in self.nets.items()}
        return settings_key(nets=origins, resize=RESIZE, clip=self.clip and self.clip.source)

    @property
    def settings(self) -> dict[str, str]:
        """What a report says of them."""
        told = {
            net.label: f"{name}, weights {net.origin}, {RESIZE}" for name, net in self.nets.items()
        }
        return told | ({} if self.clip is None else {"CLIP": self.clip.source})

    def columns(self) -> tuple[Column, ...]:
        """FID and KID by each network, then the CLIP score."""
        found: list[Column] = []
        for name, net in self.nets.items():
            found += distance_columns(name, net.label)
        return (*found, *([] if self.clip is None else [Column("clip", "CLIP score", 1.0, 2)]))


def distance_columns(key: str, label: str) -> tuple[Column, Column]:
    """Columns of `distances`, named after the extractor of the features."""
    return (
        Column(f"fid/{key}", f"FID-{label}", 1.0),
        Column(f"kid/{key}", f"KID-{label} x1000", 1000.0, spread=f"kid_std/{key}"),
    )


def distances(
    key: str,
    real: np.ndarray,
    drawn: np.ndarray,
    subset: int,
    moments: tuple[Moments, Moments] | None = None,
) -> dict[str, float]:
    """FID and KID of features real [M, D] and drawn [N, D]; their `moments` if they are known."""
    of_real, of_drawn = moments or (Moments.of(real), Moments.of(drawn))
    found = kid(drawn, real, subsets=KID_SUBSETS, subset_size=subset)
    return {
        f"fid/{key}": frechet_distance(of_real, of_drawn),
        f"kid/{key}": found.mean,
        f"kid_std/{key}": found.std,
    }


def kid_subset(asked: int | None, real: int, drawn: int) -> int:
    """The size of KID's subsets: `asked`, else half of the smaller set but at most 500.

    RequestError if the sets are too small: subsets must differ for their spread to mean anything.
    """
    smaller = min(real, drawn)
    if smaller < 4:
        raise RequestError(
            f"KID needs 4 pictures in each set, got {drawn} prompts and {real} reference pictures; "
            "give more"
        )
    if asked is not None and not 2 <= asked <= smaller:
        raise RequestError(
            f"kid_subset must be in [2, {smaller}], the smaller set's size, got {asked}; "
            "give a smaller subset or more pictures"
        )
    return min(_LARGEST_SUBSET, smaller // 2) if asked is None else asked
