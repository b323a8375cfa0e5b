"""The samples of the reference documents, run with diffusers and with fewstep: the same pictures.

Each runs as it stands there, twice; for fewstep only the name in its imports is changed. What it
asks of the hub is there in miniature: tiny random networks by the names that it uses. Nothing is
fetched.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import NOISE, TEXT_CHANNELS, UNET, VAE
from safetensors.torch import save_file
from torch import Tensor, nn

from fewstep.annotate import canny

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle's are not ours to heed

DOCUMENTS = Path(__file__).parent.parent / "data" / "reference"
BLOCK = re.compile(r"^```(?:py|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SAMPLES = {
    f"{page.stem}-{index}": block
    for page in sorted(DOCUMENTS.glob("*.md"))
    for index, block in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")), 1)
}
HAS_PEFT = importlib.util.find_spec("peft") is not None

# ── the networks: as many levels as the real ones, few channels ──

TINY_VAE = VAE | {"block_out_channels": (4, 4, 4, 4), "mid_block_add_attention": False}
SD_UNET = UNET | {"sample_size": 16}
LCM_UNET = SD_UNET | {"time_cond_proj_dim": 32}
XL_UNET = UNET | {
    "sample_size": 16,
    "block_out_channels": (4, 8, 8),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 1, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + TEXT_CHANNELS,
    "cross_attention_dim": 2 * TEXT_CHANNELS,
}
CONTROLNET = {
    name: SD_UNET[name]
    for name in (
        "block_out_channels",
        "layers_per_block",
        "in_channels",
        "down_block_types",
        "cross_attention_dim",
        "attention_head_dim",
        "norm_num_groups",
    )
}
LCM_XL_UNET = XL_UNET | {"time_cond_proj_dim": 32}
SIGMAS = {name: NOISE[name] for name in ("beta_start", "beta_end", "beta_schedule", "steps_offset")}

# Modules that LCM-LoRAs change, by the ends of their names.
ALL = r"\.(to_[qkv]|to_out\.0|proj_in|proj_out|ff\.net\.0\.proj|ff\.net\.2|conv[12]|conv_shortcut"
ALL += r"|time_emb_proj|(down|up)samplers\.0\.conv)"
MOTION = r"motion_modules\..*\.(to_[qkv]|to_out\.0)"
# Some of those that a style LoRA changes: the original code's name -> diffusers'.
PAPERCUT = {
    "input_blocks_3_1_proj_in": "down_blocks.1.attentions.0.proj_in",
    "input_blocks_5_1_transformer_blocks_0_attn2_to_k": "down_blocks.2.attentions.0"
    ".transformer_blocks.0.attn2.to_k",
    "middle_block_1_transformer_blocks_0_ff_net_2": "mid_block.attentions.0"
    ".transformer_blocks.0.ff.net.2",
    "output_blocks_0_1_transformer_blocks_0_attn1_to_out_0": "up_blocks.0.attentions.0"
    ".transformer_blocks.0.attn1.to_out.0",
    "output_blocks_3_1_transformer_blocks_0_attn1_to_q": "up_blocks.1.attentions.1"
    ".transformer_blocks.0.attn1.to_q",
}


def repository(cache: Path, name: str) -> Path:
    """A new folder that the hub's cache holds as the repository `name`."""
    commit = hashlib.sha1(name.encode()).hexdigest()
    root = cache / f"models--{name.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    (folder := root / "snapshots" / commit).mkdir(parents=True)
    return folder


def random_network(kind: str, **config: Any) -> nn.Module:
    """A network of diffusers' without zeros, since a new one leaves its controls without effect."""
    network: nn.Module = getattr(diffusers, kind)(**config)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    return network


def in_both_precisions(part: Any, folder: Path) -> None:
    """A network or a pipeline in a folder, plain and as the variant fp16."""
    copy.deepcopy(part).to(torch.float16).save_pretrained(folder, variant="fp16")
    part.save_pretrained(folder)


def lora(modules: dict[str, str], network: nn.Module, ends: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of a LoRA of rank 2. `modules`: name in the file -> module of `network`."""
    random = torch.Generator().manual_seed(5)
    found = {}
    for name, module in modules.items():
        out, *rest = network.get_submodule(module).weight.shape
        shapes = (2, *rest), (out, 2, *[1] * len(rest[1:]))
        for end, shape in zip(ends, shapes, strict=False):
            found[name + end] = torch.randn(shape, generator=random) * 0.3
        if len(ends) == 3:
            found[name + ends[2]] = torch.tensor(1.0)  # alpha
    return found


def modules_like(network: nn.Module, ends: str) -> list[str]:
    return [name for name, _ in network.named_modules() if re.search(f"{ends}$", name)]


KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")


def kohya(network: nn.Module) -> dict[str, Tensor]:
    """A LoRA for all that LCM-LoRAs change, in the file format of theirs."""
    names = {f"lora_unet_{m.replace('.', '_')}": m for m in modules_like(network, ALL)}
    return lora(names, network, KOHYA)


def fill_hub(hub: Path, tokenizer: Any, text_encoder: Any) -> None:
    """All repositories that the documents name."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(0)
    stored = text_encoder.config.to_dict() | {"projection_dim": TEXT_CHANNELS, "hidden_act": "gelu"}
    second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval()
    vae = random_network("AutoencoderKL", **TINY_VAE)
    unet = random_network("UNet2DConditionModel", **SD_UNET)
    xl_unet = random_network("UNet2DConditionModel", **XL_UNET)

    def sd(name: str, unet: nn.Module, scheduler: str, kind: str = "StableDiffusion") -> Path:
        pipe = getattr(diffusers, f"{kind}Pipeline")(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=getattr(diffusers, scheduler)(**NOISE),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        folder = repository(hub, name)
        in_both_precisions(pipe, folder)
        return folder

    sd("Lykon/dreamshaper-7", unet, "DDIMScheduler")
    sd("frankjoshua/toonyou_beta6", unet, "DDIMScheduler")
    inpainting = random_network("UNet2DConditionModel", **SD_UNET | {"in_channels": 9})
    sd("runwayml/stable-diffusion-inpainting", inpainting, "DDIMScheduler")
    lcm = random_network("UNet2DConditionModel", **LCM_UNET)
    place = sd("SimianLuo/LCM_Dreamshaper_v7", lcm, "LCMScheduler", "LatentConsistencyModel")
    for file in place.rglob("*.fp16.safetensors"):
        file.unlink()
    name_a_safety_checker(place)
    place = sd("stable-diffusion-v1-5/stable-diffusion-v1-5", unet, "DDIMScheduler")
    write_pndm(place / "scheduler")
    name_a_safety_checker(place)

    pipe = diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder,
        text_encoder_2=second,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=xl_unet,
        scheduler=diffusers.EulerDiscreteScheduler(**SIGMAS, timestep_spacing="leading"),
    )
    in_both_precisions(pipe, repository(hub, "stabilityai/stable-diffusion-xl-base-1.0"))
    lcm_xl = random_network("UNet2DConditionModel", **LCM_XL_UNET)
    in_both_precisions(lcm_xl, repository(hub, "latent-consistency/lcm-sdxl"))
    in_both_precisions(vae, repository(hub, "madebyollin/sdxl-vae-fp16-fix"))
    random_network("UNet2DConditionModel", **XL_UNET).save_pretrained(
        hub / "work_dirs" / "lcm_xl_pokemon_blip" / "unet"
    )

    hint = {"conditioning_embedding_out_channels": (4, 4, 4, 4)}
    net = random_network("ControlNetModel", **CONTROLNET, **hint)
    for parameter in net.controlnet_cond_embedding.parameters():
        parameter.data *= 2  # so that what it is shown shows
    net.save_pretrained(repository(hub, "lllyasviel/sd-controlnet-canny"))
    adapter = random_network(
        "T2IAdapter",
        channels=[*XL_UNET["block_out_channels"], XL_UNET["block_out_channels"][-1]],
        downscale_factor=16,
        adapter_type="full_adapter_xl",
    )
    in_both_precisions(adapter, repository(hub, "TencentARC/t2i-adapter-canny-sdxl-1.0"))
    motion = random_network(
        "MotionAdapter",
        block_out_channels=UNET["block_out_channels"],
        motion_layers_per_block=UNET["layers_per_block"],
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=24,
    )
    motion.save_pretrained(repository(hub, "guoyww/animatediff-motion-adapter-v1-5"))

    files = {
        ("latent-consistency/lcm-lora-sdv1-5", "pytorch_lora_weights"): kohya(unet),
        ("latent-consistency/lcm-lora-sdxl", "pytorch_lora_weights"): kohya(xl_unet),
        ("TheLastBen/Papercut_SDXL", "papercut"): lora(
            {f"lora_unet_{name}": module for name, module in PAPERCUT.items()}, xl_unet, KOHYA
        ),
        ("guoyww/animatediff-motion-lora-zoom-in", "diffusion_pytorch_model"): lora(
            {f"unet.{module}": module for module in modules_like(motion, MOTION)},
            motion,
            (".lora.down.weight", ".lora.up.weight"),
        ),
    }
    for (name, stem), tensors in files.items():
        save_file(tensors, repository(hub, name) / f"{stem}.safetensors", {"format": "pt"})


def name_a_safety_checker(folder: Path) -> None:
    """Samples leave the safety checkers of these repositories out; they would not load."""
    index = folder / "model_index.json"
    entries = json.loads(index.read_text())
    entries["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index.write_text(json.dumps(entries))


def write_pndm(folder: Path) -> None:
    """Stable Diffusion 1.5's own scheduler config."""
    diffusers.PNDMScheduler(
        **{key: value for key, value in NOISE.items() if key != "clip_sample"},
        skip_prk_steps=True,
    ).save_pretrained(folder)


# ── running a sample ──


def served(url: str, **_: Any) -> io.BytesIO:
    """The picture at an address, as bytes: patches of colour, or a white rectangle for a mask."""
    name = getattr(url, "full_url", url)
    size = (512, 512) if "inpaint" in name else (192, 128)
    if "mask" in name:
        picture = PIL.Image.new("L", size)
        picture.paste(255, (60, 40, 300, 400))
    else:
        seed = list(hashlib.sha1(name.encode()).digest())
        coarse = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), dtype=np.uint8)
        picture = PIL.Image.fromarray(coarse).resize(size, PIL.Image.Resampling.NEAREST)
    stream = io.BytesIO()
    picture.save(stream, "PNG")
    stream.seek(0)
    return stream


def edges(picture: np.ndarray, low: float, high: float) -> np.ndarray:
    """cv2.Canny's array (H, W) of a picture's."""
    return np.asarray(canny(picture, low, high))[:, :, 0]


def siblings(hub: Path, name: str) -> SimpleNamespace:
    """What the hub answers about a repository, as far as diffusers asks for a LoRA's file."""
    (snapshot,) = (hub / f"models--{name.replace('/', '--')}" / "snapshots").iterdir()
    return SimpleNamespace(
        siblings=[SimpleNamespace(rfilename=file.name) for file in snapshot.iterdir()]
    )


Frames = list[np.ndarray]
Draw = Callable[..., Frames]


@pytest.fixture(scope="module")
def draw(
    tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Draw]:
    """Runs a sample with a library, parts of its text replaced: its `image` or `frames`."""
    hub = tmp_path_factory.mktemp("hub")
    fill_hub(hub, tokenizer, text_encoder)

    @cache
    def run(sample: str, library: str, *changes: tuple[str, str]) -> Frames:
        text = SAMPLES[sample].replace("torch.float16", "torch.float32")
        for old, new in (('"cuda"', '"cpu"'), ("'cuda'", "'cpu'"), *changes):
            text = text.replace(old, new)
        text = re.sub(r"^from diffusers\b", f"from {library}", text, flags=re.MULTILINE)
        for old, _ in changes:
            assert old in SAMPLES[sample], f"{old!r} is not in the sample"
        torch.manual_seed(0)  # for samples that give no generator
        names: dict[str, Any] = {"__name__": "__main__"}
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(text, sample, "exec"), names)
        pictures = names["frames"] if "frames" in names else [names["image"]]
        return [np.asarray(picture, dtype=int) for picture in pictures]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(hub)  # some write beside them
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(hub))
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr("diffusers.loaders.lora_base.HF_HUB_OFFLINE", False)
        patch.setattr("diffusers.loaders.lora_base.model_info", lambda name: siblings(hub, name))
        patch.setattr("requests.get", lambda url, **_: SimpleNamespace(raw=served(url)))
        patch.setattr("urllib.request.urlopen", served)
        patch.setitem(sys.modules, "cv2", SimpleNamespace(Canny=edges))
        yield run


def largest_difference(a: Frames, b: Frames) -> int:
    assert [x.shape for x in a] == [x.shape for x in b]
    return max(int(np.abs(x - y).max()) for x, y in zip(a, b, strict=True))


def test_every_sample_was_found() -> None:
    pages = [name.rpartition("-")[0] for name in SAMPLES]
    assert {page: pages.count(page) for page in pages} == {
        "diffengine_lcm": 1,
        "lcm_guide_2023": 5,
        "lcm_guide_2024": 12,
    }


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_sample_draws_what_diffusers_draws(sample: str, draw: Draw) -> None:
    ours = draw(sample, "fewstep")
    assert all(frame.std() > 5 for frame in ours), "a plain picture proves nothing"
    if HAS_PEFT or "load_lora_weights" not in SAMPLES[sample]:  # diffusers needs it for LoRAs
        assert largest_difference(ours, draw(sample, "diffusers")) <= 1


@pytest.mark.parametrize(
    ("sample", "old", "new"),
    [
        ("diffengine_lcm-1", "    unet=unet,\n", ""),
        ("lcm_guide_2024-1", "guidance_scale=8.0", "guidance_scale=3.0"),
        ("lcm_guide_2024-2", 'pipe.load_lora_weights("latent-consistency/lcm-lora-sdxl")', ""),
        ("lcm_guide_2024-3", "strength=0.5", "strength=0.8"),
        ("lcm_guide_2024-5", "mask_image=mask_image", "mask_image=init_image"),
        ("lcm_guide_2024-7", "adapter_weights=[1.0, 0.8]", "adapter_weights=[1.0, 0.3]"),
        ("lcm_guide_2024-8", "image=canny_image", "image=canny_image.rotate(90)"),
        ("lcm_guide_2024-9", "conditioning_scale=0.8", "conditioning_scale=0.3"),
        ("lcm_guide_2024-9", '{"scale": 1}', '{"scale": 0.3}'),
        ("lcm_guide_2024-11", "conditioning_scale=0.8", "conditioning_scale=0.3"),
        ("lcm_guide_2024-12", "adapter_weights=[0.55, 1.2]", "adapter_weights=[0.55, 0.2]"),
    ],
)
def test_a_changed_line_changes_the_picture(sample: str, old: str, new: str, draw: Draw) -> None:
    assert largest_difference(draw(sample, "fewstep"), draw(sample, "fewstep", (old, new))) > 2
