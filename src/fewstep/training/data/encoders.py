"""From pictures and captions to rows of a store, by the encoders of a pipeline.

What is stored is float16: the moments of the VAE's posterior before scaling, and the embeddings
that `encode_prompt` gives.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...errors import RequestError
from ...pipelines.families import StableDiffusion
from ...pipelines.xl import StableDiffusionXL
from ..scenes import normalised
from .pictures import Crop
from .sources import Source, digest_of
from .store import Store

PIXELS = 2**22  # at most, of a batch of pictures: 4 of 1024 x 1024
PICTURES = 64  # at most, of a batch of pictures
CAPTIONS = 64  # of a batch of captions
# Entries of an autoencoder's config that do not change what its encoder makes.
UNREAD = {"scaling_factor", "latents_mean", "latents_std", "sample_size", "force_upcast"}

Rows = dict[str, Tensor]

# ── what the results depend on ──


def picture_fingerprint(pipe: StableDiffusion) -> str:
    """The folder name of latents: a digest of the VAE's encoder and of how it computes."""
    vae = pipe.vae
    config = {k: v for k, v in dict(vae.config).items() if k[0] != "_" and k not in UNREAD}
    tile = vae.tile_sample_min_size if vae.use_tiling else None
    parts = [type(vae).__name__, config, tile, in_bfloat16(pipe)]
    return digest_of([parts, weights_digest(vae, ("encoder.", "quant_conv."))])[:32]


def text_fingerprint(pipe: StableDiffusion) -> str:
    """The folder name of embeddings: a digest of text encoders, tokenizers and their use."""
    parts: list[Any] = [isinstance(pipe, StableDiffusionXL)]
    pairs = [(pipe.tokenizer, pipe.text_encoder)]
    if isinstance(pipe, StableDiffusionXL):
        pairs.append((pipe.tokenizer_2, pipe.text_encoder_2))
    for tokenizer, encoder in pairs:
        if encoder is not None:
            config = {k: v for k, v in encoder.config.to_dict().items() if k[0] != "_"}
            for name in ("transformers_version", "dtype", "torch_dtype", "architectures"):
                config.pop(name, None)
            parts += [type(encoder).__name__, config, weights_digest(encoder)]
            parts.append(tokenizer_digest(tokenizer))
    return digest_of(parts)[:32]


def weights_digest(module: nn.Module, prefixes: tuple[str, ...] = ("",)) -> str:
    """sha256 of the names, dtypes and bytes of a network's tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if name.startswith(prefixes):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(plain.view(torch.uint8).numpy())
    return digest.hexdigest()


def tokenizer_digest(tokenizer: Any) -> str:
    """sha256 of a tokenizer's words and rules, without what its last call left behind."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        rules = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.bpe_ranks.items())]
        return digest_of([type(tokenizer).__name__, tokenizer.model_max_length, rules])
    rules = json.loads(backend.to_str())
    rules.pop("truncation", None)
    rules.pop("padding", None)
    return digest_of([tokenizer.model_max_length, rules])


def in_bfloat16(pipe: StableDiffusion) -> bool:
    """Whether the VAE computes in bfloat16: on CUDA, where float32 would take twice as long."""
    upcast = pipe.vae.dtype == torch.float16 and pipe.vae.config.force_upcast
    return pipe.vae.device.type == "cuda" and (pipe.vae.dtype == torch.float32 or upcast)


# ── pictures ──


@contextmanager
def picture_encoder(pipe: StableDiffusion) -> Iterator[Callable[[Tensor], Rows]]:
    """A function from pixels (B, 3, H, W) uint8 to "mean" and "std" (B, C, h, w) float16."""
    device, half = pipe.vae.device, in_bfloat16(pipe)

    def encode(pixels: Tensor) -> Rows:
        x = normalised(pixels, device).to(dtype)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            mean, std = pipe.vae.moments(x)
        rows = {"mean": mean} if std is None else {"mean": mean, "std": std}
        return stored(rows, f"the autoencoder, in {dtype}")

    with pipe.safe_vae() as dtype:
        yield encode


def stored(rows: Rows, who: str) -> Rows:
    """The rows in float16 on the CPU. Raises RequestError if they hold infinity or NaN."""
    halves = {name: tensor.to("cpu", torch.float16).contiguous() for name, tensor in rows.items()}
    if not all(tensor.isfinite().all() for tensor in halves.values()):
        raise RequestError(
            f"{who}, gives numbers that are not finite; load it in float32, or give another one"
        )
    return halves


class Cuttings(Dataset):
    """The pixels (3, h, w) of all wanted crops of each picture, or why it could not be read."""

    def __init__(self, source: Source, todo: Sequence[tuple[int, list[Crop]]]) -> None:
        self.source, self.todo = source, todo

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, position: int) -> list[Tensor] | str:
        index, crops = self.todo[position]
        try:
            picture = self.source.load(index)
        except OSError as error:
            return f"{self.source.keys[index]}: {error}"
        if picture.size != crops[0].original[::-1]:
            return f"{self.source.keys[index]}: its size is now {picture.size}"
        return [crop.apply(picture) for crop in crops]


def first_of(batch: list[Any]) -> Any:
    """The only item of a batch of one; a function of its own so that workers can be sent it."""
    return batch[0]


def encode_pictures(
    pipe: StableDiffusion,
    source: Source,
    todo: Sequence[tuple[int, list[Crop], list[bytes]]],
    store: Store,
    workers: int,
) -> None:
    """Add the latents of all crops in `todo` (picture, crops, ids) to the store."""
    todo = sorted(todo, key=lambda each: (each[1][0].size, each[0]))  # one shape after the other
    cuttings = Cuttings(source, [(index, crops) for index, crops, _ in todo])
    loader = DataLoader(cuttings, 1, collate_fn=first_of, num_workers=workers)
    bar = tqdm(zip(loader, todo, strict=True), "encode pictures", len(todo), unit="picture")
    pixels: list[Tensor] = []
    ids: list[bytes] = []
    with picture_encoder(pipe) as encode, store.filling():

        def encode_waiting() -> None:
            if pixels:
                store.add(ids, encode(torch.stack(pixels)))
                pixels.clear()
                ids.clear()

        for cut, (_, _, names) in bar:
            if isinstance(cut, str):
                raise RequestError(f"a picture changed while it was read, {cut}; start again")
            for each, name in zip(cut, names, strict=True):
                if pixels and pixels[0].shape != each.shape:
                    encode_waiting()
                pixels.append(each)
                ids.append(name)
                if len(pixels) >= min(PICTURES, max(1, PIXELS // each[0].numel())):
                    encode_waiting()
        encode_waiting()


# ── captions ──


def encode_captions(
    pipe: StableDiffusion, captions: Sequence[str], ids: Sequence[bytes], store: Store
) -> None:
    """Add "text" (L, D), and with SDXL "pooled" (P,), of captions to the store."""
    starts = tqdm(range(0, len(captions), CAPTIONS), "encode captions", unit="batch")
    with store.filling():
        for start in starts:
            some = slice(start, start + CAPTIONS)
            store.add(ids[some], text_rows(pipe, captions[some]))


@torch.no_grad()
def text_rows(pipe: StableDiffusion, captions: Sequence[str]) -> Rows:
    """The embeddings of captions, as the pipeline makes them of prompts."""
    with warnings.catch_warnings():
        # Of a caption that is too long the end is not read, in training as in drawing.
        warnings.filterwarnings("ignore", "the prompt is longer than")
        found: Any = pipe.encode_prompt(list(captions), do_classifier_free_guidance=False)
    rows = {"text": found[0]}
    if isinstance(pipe, StableDiffusionXL):
        rows["pooled"] = found[2]
    return stored(rows, "the text encoder")
