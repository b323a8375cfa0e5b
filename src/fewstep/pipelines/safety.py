"""The safety checker that Stable Diffusion 1.x brings: it blackens pictures near some concepts.

Shapes: B pictures, D channels of the joint space of CLIP.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpoints.config import write_json
from ..checkpoints.locate import Source
from ..checkpoints.weights import read_tensors, save_weights
from ..errors import CheckpointError
from .images import to_pil
from .loading import image_processor
from .notices import warn_caller

CONCEPTS, SPECIAL = 17, 3  # how many the published checker knows
CARE = 0.01  # how much nearer a picture counts once it is near a special concept


class StableDiffusionSafetyChecker(nn.Module):
    """CLIP's vision tower and the concepts that it is compared with; names as in checkpoints.

    Concepts are vectors (N, D) with a threshold (N,) each on the cosine of picture and concept.
    """

    def __init__(self, config: Any) -> None:
        from transformers import CLIPVisionModel

        super().__init__()
        self.config = config
        self.vision_model = CLIPVisionModel(config.vision_config)
        width = config.projection_dim
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.concept_embeds = nn.Parameter(torch.ones(CONCEPTS, width))
        self.special_care_embeds = nn.Parameter(torch.ones(SPECIAL, width))
        self.concept_embeds_weights = nn.Parameter(torch.ones(CONCEPTS))
        self.special_care_embeds_weights = nn.Parameter(torch.ones(SPECIAL))

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights."""
        return self.concept_embeds.dtype

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> list[bool]:
        """Whether each picture (B, 3, H, W), as CLIP's image processor made it, is flagged."""
        pooled = self.vision_model(pixel_values.to(self.concept_embeds)).pooler_output
        embedded = F.normalize(self.visual_projection(pooled).float(), dim=1)  # (B, D)

        def excess(concepts: Tensor, thresholds: Tensor) -> Tensor:
            cosines = embedded @ F.normalize(concepts.float(), dim=1).T
            # Three digits, as the published checker compares.
            return ((cosines - thresholds.float()) * 1000).round() / 1000

        special = excess(self.special_care_embeds, self.special_care_embeds_weights)
        nearer = CARE * (special > 0).any(dim=1, keepdim=True)
        concepts = self.concept_embeds_weights - nearer
        cleared = excess(self.concept_embeds, concepts) <= 0  # never where it is no number
        return (~cleared.all(dim=1)).tolist()

    # ── files ──

    @classmethod
    def from_pretrained(
        cls, source: Source, dtype: torch.dtype | None = None
    ) -> StableDiffusionSafetyChecker:
        """The checker of a component's folder. Raises CheckpointError for weights that differ."""
        from transformers import CLIPConfig

        checker = cls(CLIPConfig.from_dict(source.read_json("config.json")))
        named = {plain(name): name for name in checker.state_dict()}
        state = {
            named.get(plain(name), name): value
            for name, value in read_tensors(source.weights("model"))
            if not name.endswith("position_ids")  # older files hold these numbers
        }
        if different := sorted(set(state) ^ set(named.values())):
            raise CheckpointError(
                f"the weights in {source.path} do not fit the safety checker: {len(different)} "
                f"missing or surplus, the first {different[0]}"
            )
        checker.load_state_dict(state, assign=True)
        return (checker if dtype is None else checker.to(dtype)).eval().requires_grad_(False)

    def save_pretrained(
        self,
        save_directory: str | Path,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write config.json and model.safetensors, as diffusers reads them."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        stored = self.config.to_dict() | {"architectures": [type(self).__name__]}
        write_json(stored, folder / "config.json")
        state = {published(name): value for name, value in self.state_dict().items()}
        save_weights(state, folder, "model", variant, max_shard_size)


def plain(name: str) -> str:
    """The name of a weight without the inner `vision_model`, which transformers 5 has no more."""
    return name.replace("vision_model.vision_model.", "vision_model.")


def published(name: str) -> str:
    """The name of a weight as published checkpoints have it."""
    return plain(name).replace("vision_model.", "vision_model.vision_model.", 1)


def extractor(checker: StableDiffusionSafetyChecker) -> Any:
    """What makes the checker's input of pictures."""
    side = checker.config.vision_config.image_size
    return image_processor()(size=side, crop_size=side)


def checked(pipe: Any, pictures: Any) -> tuple[Any, list[bool] | None]:
    """(the pictures with flagged ones black, the flags), or (the pictures, None) without a checker.

    Pictures are what `postprocess` gives: a list of PIL, an array (B, H, W, 3) or a tensor
    (B, 3, H, W).
    """
    flags = flagged(pipe, pictures)
    if flags is None or not any(flags):
        return pictures, flags
    warn_caller(
        f"the safety checker flagged {sum(flags)} of {len(flags)} pictures, which are black now; "
        "try another prompt or seed"
    )
    return blackened(pictures, flags), flags


def flagged(pipe: Any, pictures: Any) -> list[bool] | None:
    """Whether the checker objects to each picture; None without a checker.

    Raises ValueError if it does not tell of each: what it has not seen is not shown.
    """
    checker = pipe.safety_checker
    if checker is None:
        return None
    seen = shown(pictures)
    flags = checker(pipe.feature_extractor(seen, return_tensors="pt").pixel_values)
    if not isinstance(flags, list) or [flag in (True, False) for flag in flags] != [True] * len(
        seen
    ):
        raise ValueError(f"the safety checker answered {flags!r} for {len(seen)} pictures")
    return flags


def shown(pictures: Any) -> list[PIL.Image.Image]:
    """The pictures as PIL ones."""
    if isinstance(pictures, list):
        return pictures
    if isinstance(pictures, Tensor):
        pictures = pictures.permute(0, 2, 3, 1).float().cpu().numpy()
    return to_pil(pictures)


def blackened(pictures: Any, flags: Sequence[bool]) -> Any:
    """The pictures, black where flagged."""
    if isinstance(pictures, list):
        return [
            PIL.Image.new(picture.mode, picture.size) if flag else picture
            for picture, flag in zip(pictures, flags, strict=True)
        ]
    keep = [not flag for flag in flags]
    if isinstance(pictures, Tensor):
        return pictures * torch.tensor(keep, device=pictures.device).view(-1, 1, 1, 1)
    return pictures * np.array(keep, dtype=pictures.dtype)[:, None, None, None]
