"""A recipe's data with a pipeline's encoders: encoded where that is missing, then read by rows."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ...errors import RequestError
from ...pipelines.families import StableDiffusion
from ...pipelines.xl import StableDiffusionXL
from ..batch import Batch, Condition, TrainingSet
from ..config import Pictures, Recipe, Scenes
from ..draws import Draws
from ..environment import home
from ..ranks import Ranks
from .emoji import EmojiScenes
from .encoders import encode_captions, encode_pictures, picture_fingerprint, text_fingerprint
from .epochs import Epochs
from .folder import Folder
from .hub import HubSet
from .pictures import Crop, cutting_of
from .shards import Shards
from .sources import Facts, Source
from .store import Store, id_of
from .survey import held_out, survey


def open_set(recipe: Recipe, pipe: StableDiffusion) -> TrainingSet:
    """The encoded data of a recipe; what is not in the cache is encoded first.

    The first process of a run prints what was kept and dropped. Raises RequestError for data that
    cannot be used.
    """
    encoding = prepare(recipe, pipe)
    if ranks_here().is_first:
        print(f"data: {encoding.counts}", file=sys.stderr)
    return EncodedSet(encoding)


def prepare(recipe: Recipe, pipe: StableDiffusion) -> Encoding:
    """A recipe's data, all of it encoded.

    In a torch.distributed run each process encodes a share and waits for the others.
    """
    ranks = ranks_here()
    if ranks.count > 1:
        encode_share(recipe, pipe, ranks.rank, ranks.count)
        ranks.wait()
    encoding = Encoding(recipe, pipe)
    encoding.encode()  # after the shares there is nothing left
    return encoding


def ranks_here() -> Ranks:
    """The processes of this run that are connected."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return Ranks()


def encode_share(recipe: Recipe, pipe: StableDiffusion, rank: int, ranks: int) -> None:
    """Encode what process `rank` of `ranks` has to do; the shares together are everything."""
    if not 0 <= rank < ranks:
        raise RequestError(f"rank={rank} must lie in [0, {ranks - 1}], as there are {ranks} ranks")
    Encoding(recipe, pipe, rank, ranks).encode()


def open_source(recipe: Recipe, memory: Path) -> Source:
    """The pictures of a recipe; `memory` is a folder for what is found out about them."""
    data = recipe.data
    if isinstance(data, Scenes):
        return EmojiScenes(recipe, memory)
    match data.source:
        case "folder":
            return Folder(data)
        case "huggingface":
            return HubSet(data)
        case "webdataset":
            return Shards(data, memory)


def cache_folder(data: Scenes | Pictures) -> Path:
    """Where encoded data are kept: `data.cache`, or `encoded` under $FEWSTEP_CACHE."""
    return Path(data.cache).expanduser() if data.cache else home() / "encoded"


class Encoding:
    """What of a recipe's data is kept, and the stores that hold it or will.

    With several `ranks`, the share of one of them.
    """

    def __init__(
        self, recipe: Recipe, pipe: StableDiffusion, rank: int = 0, ranks: int = 1
    ) -> None:
        pipe.check_text_encoder("prompt")
        self.recipe, self.pipe, self.rank, self.ranks = recipe, pipe, rank, ranks
        self.cutting = cutting_of(recipe, pipe.vae_scale_factor)
        self.folder = cache_folder(recipe.data)
        memory = self.folder / "sources"
        self.source = open_source(recipe, memory)
        found = survey(self.source, recipe.data, memory, rank, ranks)
        self.indices, self.facts, self.counts = found.indices, found.facts, found.counts
        # Of a share nothing is held out; it is not trained on.
        self.held_out = held_out(self.facts, recipe.data.held_out if ranks == 1 else 0)
        variants = [self.crops(facts) for facts in self.facts]
        self.time_ids = np.array(
            [[crop.time_ids for crop in crops] for crops in variants], np.int32
        ).reshape(len(variants), self.cutting.variants, 6)
        self.ids = [
            [picture_id(facts, crop) for crop in crops]
            for facts, crops in zip(self.facts, variants, strict=True)
        ]
        self.pictures = Store(self.folder / "latents" / picture_fingerprint(pipe))
        self.texts = Store(self.folder / "text" / text_fingerprint(pipe))

    def crops(self, facts: Facts) -> list[Crop]:
        """The variants of a picture."""
        return self.cutting.crops(facts.digest, facts.height, facts.width)

    def encode(self) -> None:
        """Encode what is missing; all rows are then in the stores."""
        captions = self.missing_captions()
        if captions:
            encode_captions(self.pipe, list(captions.values()), list(captions), self.texts)
        todo = self.missing_pictures()
        if todo:
            workers = self.recipe.data.workers
            encode_pictures(self.pipe, self.source, todo, self.pictures, workers)

    def missing_captions(self) -> dict[bytes, str]:
        """The captions that are not encoded, each once; "" is always needed."""
        wanted = {"": None} | {c: None for i in self.indices for c in self.source.captions[i]}
        if self.ranks > 1:  # equal captions of two shares must fall to one of them
            wanted = {"": None} | {c: None for several in self.source.captions for c in several}
        ids = ((id_of(caption), caption) for caption in wanted)
        return {
            each: caption
            for each, caption in ids
            if each not in self.texts and int.from_bytes(each, "big") % self.ranks == self.rank
        }

    def missing_pictures(self) -> list[tuple[int, list[Crop], list[bytes]]]:
        """The pictures of which crops are not encoded, with those crops and their ids."""
        todo: list[tuple[int, list[Crop], list[bytes]]] = []
        seen: set[bytes] = set()
        # Under a limit the survey did not part the pictures.
        limited = isinstance(self.recipe.data, Pictures) and self.recipe.data.limit
        share = slice(self.rank, None, self.ranks) if limited else slice(None)
        rows = zip(self.indices[share], self.facts[share], self.ids[share], strict=True)
        for index, facts, ids in rows:
            wanted = {each for each in ids if each not in self.pictures and each not in seen}
            if wanted:
                named = dict(zip(ids, self.crops(facts), strict=True))
                new = {each: crop for each, crop in named.items() if each in wanted}
                todo.append((index, list(new.values()), list(new)))
                seen |= wanted
        return todo


def picture_id(facts: Facts, crop: Crop) -> bytes:
    """The id of the latents of one crop of a picture."""
    return id_of(f"{facts.digest} {crop.name}")


class EncodedSet:
    """A recipe's rows, read from mapped files (see `TrainingSet`); holds no network."""

    empty: Condition
    held_out: np.ndarray

    def __init__(self, encoding: Encoding) -> None:
        recipe, pipe, source = encoding.recipe, encoding.pipe, encoding.source
        self.counts = encoding.counts
        self.latents, self.texts = encoding.pictures, encoding.texts
        ids = [each for several in encoding.ids for each in several]
        self.places = self.latents.find(ids).reshape(len(encoding.ids), -1)  # (N, variants)
        is_xl = isinstance(pipe, StableDiffusionXL)
        self.time_ids = encoding.time_ids if is_xl else None  # (N, variants, 6)
        captions = [source.captions[index] for index in encoding.indices]
        self.first = np.cumsum([0, *map(len, captions)])  # of each row's captions, in `said`
        self.said = self.texts.find([id_of(each) for several in captions for each in several])
        self.held_out = encoding.held_out
        self.epochs = Epochs(self.groups(encoding.time_ids[:, 0, 4:]), recipe.seed)
        data = recipe.data
        self.samples_posterior = isinstance(data, Pictures) and data.posterior == "sample"
        self.samples_posterior &= self.latents.has("std")
        self.empty_captions = data.empty_captions
        self.scaling_factor = pipe.vae.config.scaling_factor
        self.statistics = pipe.statistics(torch.zeros(1))
        self.empty = self.no_text(pipe)
        self.latents.places, self.texts.places = {}, {}  # may be millions, and are found now

    def groups(self, sizes: np.ndarray) -> list[np.ndarray]:
        """The rows that are trained on, those of one size (N, 2) together."""
        kept = np.ones(len(sizes), bool)
        kept[self.held_out] = False
        return [np.flatnonzero(kept & (sizes == size).all(1)) for size in np.unique(sizes, axis=0)]

    def no_text(self, pipe: StableDiffusion) -> Condition:
        """What the pipeline takes for a missing negative prompt: "", or zeros."""
        empty = self.text(self.texts.find([id_of("")]), pipe.unet.device)
        if isinstance(pipe, StableDiffusionXL) and pipe.force_zeros_for_empty_prompt:
            assert empty.pooled is not None
            return Condition(torch.zeros_like(empty.text), torch.zeros_like(empty.pooled))
        return empty

    def __len__(self) -> int:
        return len(self.places)

    def rows(self, step: int, batch: int) -> np.ndarray:
        """The rows (batch,) of the batch of this step (see `Epochs`)."""
        return self.epochs.rows(step, batch)

    def batch(self, rows: np.ndarray, draws: Draws) -> Batch:
        """The samples of rows: latents in the UNet's units and their condition, float32.

        From each sample's stream come variant, caption, dropout and the posterior's noise.
        """
        here = copy.copy(draws)  # the same streams; choices that are made here wait for no GPU
        here.device = torch.device("cpu")
        variant, caption, dropped = (here.uniform().numpy() for _ in range(3))
        column = chosen(variant, np.full(len(rows), self.places.shape[1]))
        z = self.z(self.places[rows, column], draws)
        first, last = self.first[rows], self.first[rows + 1]
        condition = self.text(self.said[first + chosen(caption, last - first)], draws.device)
        if self.empty_captions:
            keeps = torch.from_numpy(dropped >= self.empty_captions).to(draws.device)
            condition = mixed(keeps, condition, self.empty)
        if self.time_ids is not None:
            ids = torch.from_numpy(self.time_ids[rows, column]).float().to(draws.device)
            condition = Condition(condition.text, condition.pooled, ids)
        return Batch(z, condition)

    def z(self, places: np.ndarray, draws: Draws) -> Tensor:
        """Latents (B, C, h, w), scaled as the pipeline scales them."""
        z = self.latents.read(places, "mean").to(draws.device).float()
        if self.samples_posterior:
            std = self.latents.read(places, "std").to(draws.device).float()
            z = z + std * draws.normal(z.shape[1:])
        shift, deviation = (
            v.to(z) if isinstance(v, Tensor) else z.new_tensor(v) for v in self.statistics
        )
        return (z - shift) * self.scaling_factor / deviation

    def text(self, places: np.ndarray, device: torch.device) -> Condition:
        """The embeddings of captions, float32."""
        names = ("text", "pooled") if self.texts.has("pooled") else ("text",)
        return Condition(*(self.texts.read(places, name).to(device).float() for name in names))


def chosen(uniform: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Numbers from 0 to each count - 1, by numbers in [0, 1)."""
    return np.minimum((uniform * counts).astype(np.int64), counts - 1)


def mixed(keeps: Tensor, condition: Condition, empty: Condition) -> Condition:
    """The rows of a condition where `keeps` (B,), those of `empty` elsewhere."""
    text = torch.where(keeps[:, None, None], condition.text, empty.text.to(keeps.device))
    if condition.pooled is None or empty.pooled is None:
        return Condition(text)
    return Condition(
        text, torch.where(keeps[:, None], condition.pooled, empty.pooled.to(keeps.device))
    )
