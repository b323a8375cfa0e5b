"""CLIP score: how well pictures fit their prompts, by a CLIP model that the user names.

Hessel et al., "CLIPScore", 2021, with the weight 100 instead of 2.5: max(100 cos(image, text), 0),
the scale of the tables of few-step papers. Scores of different CLIP models do not compare.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fewstep.errors import CheckpointError, RequestError
from fewstep.evaluation.fingerprints import fingerprint
from fewstep.evaluation.pictures import check_pictures

RESIZE = "PIL BICUBIC, centre crop"
# Of the colours that every published CLIP was trained with.
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)


class ClipScore:
    """A frozen CLIPModel: pictures and as many texts -> a score each, in [0, 100]."""

    def __init__(self, model: Any, tokenizer: Any, name: str, device: str | torch.device = "cpu"):
        self.name = name
        self.origin = fingerprint(model.state_dict())
        self._model = model.eval().requires_grad_(False).to(device)
        self._tokenizer, self._device = tokenizer, torch.device(device)
        self._size = int(model.config.vision_config.image_size)

    @classmethod
    def load(
        cls, path: str, *, revision: str = "main", device: str | torch.device = "cpu"
    ) -> ClipScore:
        """The CLIPModel and its tokenizer of a folder or a hub repository, safetensors only."""
        from transformers import AutoConfig, CLIPModel, CLIPTokenizer

        try:
            config = AutoConfig.from_pretrained(path, revision=revision)
            if config.model_type != "clip":
                raise CheckpointError(f"is a {config.model_type}, not a CLIPModel")
            network: Any = CLIPModel  # transformers' annotations forget what is asked of it below
            model, found = network.from_pretrained(
                path, revision=revision, use_safetensors=True, output_loading_info=True
            )
            if found["missing_keys"]:  # would be left at random
                raise CheckpointError(f"has no {min(found['missing_keys'])}")
            tokenizer = CLIPTokenizer.from_pretrained(path, revision=revision)
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"CLIP model {path}: {error}; give a folder or a hub repository with a CLIPModel "
                "in safetensors, such as openai/clip-vit-large-patch14"
            ) from error
        return cls(model.float(), tokenizer, path, device)

    @property
    def source(self) -> str:
        """What a report says of it."""
        return f"{self.name}, weights {self.origin}, {self._size} px by {RESIZE}"

    @torch.inference_mode()
    def __call__(self, pictures: np.ndarray, texts: Sequence[str]) -> np.ndarray:
        """Scores float32 [N] of pictures uint8 [N, H, W, 3] and their texts.

        A text is cut to the length that the model reads.
        """
        array = check_pictures(pictures)
        if len(array) != len(texts):
            raise RequestError(f"{len(array)} pictures, but {len(texts)} texts; give one for each")
        tokens = self._tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        seen = self._model(pixel_values=self._pixels(array), **tokens.to(self._device))
        cosines = torch.nn.functional.cosine_similarity(seen.image_embeds, seen.text_embeds)
        return (100 * cosines).clamp(min=0).float().cpu().numpy()

    def _pixels(self, pictures: np.ndarray) -> Tensor:
        """(N, 3, size, size): the shorter side scaled to CLIP's size, its middle, normalised."""
        cut = np.stack([_middle(picture, self._size) for picture in pictures])
        x = torch.from_numpy(cut).to(self._device).permute(0, 3, 1, 2) / 255
        mean, std = (torch.tensor(v, device=self._device).view(1, 3, 1, 1) for v in (_MEAN, _STD))
        return (x - mean) / std


def _middle(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 [size, size, 3] of a picture [H, W, 3]."""
    image = Image.fromarray(picture)
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    scaled = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(scaled.crop((left, top, left + size, top + size)))
