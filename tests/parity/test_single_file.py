"""Single files against diffusers: its converter reads the same names, its pipeline draws the same.

Files of the original layout are written here from tiny random models.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import LCM_UNET, NOISE, TEXT_CHANNELS, UNET, VAE, write_tokenizer
from original_layout import original, original_vae, whole
from safetensors.torch import save_file
from torch import Tensor

import fewstep
from fewstep.checkpoints.known import FAMILIES
from fewstep.checkpoints.known.detect import family_of
from fewstep.checkpoints.known.names import clip_name, open_clip_name, unet_names

diffusers = pytest.importorskip("diffusers")
theirs = pytest.importorskip("diffusers.loaders.single_file_utils")

pytestmark = pytest.mark.filterwarnings("ignore")

SDXL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (8, 16, 16),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 2 * TEXT_CHANNELS,
    "attention_head_dim": (1, 2, 4),
    "norm_num_groups": 2,
    "transformer_layers_per_block": (1, 2, 3),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": TEXT_CHANNELS + 48,
}
UNETS: dict[str, dict[str, Any]] = {
    "one layer per block": UNET,
    "sd1": UNET
    | {
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": 2,
        "down_block_types": (*("CrossAttnDownBlock2D",) * 3, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 3),
    },
    "sd2": UNET | {"use_linear_projection": True, "attention_head_dim": (1, 2)},
    "sdxl": SDXL,
    "ssd-1b": SDXL
    | {
        "mid_block_type": "UNetMidBlock2D",
        "transformer_layers_per_block": (0, (2, 2), (1, 1)),
        "reverse_transformer_layers_per_block": ((1, 1, 2), (2, 1, 1), 1),
    },
    "refiner": SDXL
    | {
        "block_out_channels": (8, 8, 16, 16),
        "down_block_types": ("DownBlock2D", *("CrossAttnDownBlock2D",) * 2, "DownBlock2D"),
        "up_block_types": ("UpBlock2D", *("CrossAttnUpBlock2D",) * 2, "UpBlock2D"),
        "transformer_layers_per_block": 2,
        "attention_head_dim": (1, 2, 4, 4),
    },
}
CONVERTER = {
    "class_embed_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
}  # keys that diffusers' converter looks up


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].shape == value.shape, key
        assert value.is_meta or torch.equal(found[key], value), key


@pytest.mark.parametrize("name", UNETS)
def test_the_names_of_a_unet_are_those_that_diffusers_converts(name: str) -> None:
    config = UNETS[name]
    unet = fewstep.UNet2DConditionModel(**config)
    state = unet.state_dict()
    file = original(state, unet_names(unet.config), "model.diffusion_model.")
    converted = theirs.convert_ldm_unet_checkpoint(dict(file), {**CONVERTER, **config})
    assert_equal(converted, state)


CONTROLNET = {k: v for k, v in UNETS["sd1"].items() if k not in ("out_channels", "sample_size")} | {
    "conditioning_embedding_out_channels": (4, 8, 8, 16)
}
CONTROLNET.pop("up_block_types")


def test_the_names_of_a_controlnet_are_those_that_diffusers_converts(tmp_path: Path) -> None:
    state = diffusers.ControlNetModel(**CONTROLNET).state_dict()
    file = original(state, unet_names(CONTROLNET), "control_model.")
    converted = theirs.convert_controlnet_checkpoint(dict(file), {**CONVERTER, **CONTROLNET})
    assert_equal(converted, state)
    from fewstep.models.controlnet import ControlNetModel

    save_file(file, tmp_path / "control.safetensors")
    diffusers.ControlNetModel(**CONTROLNET).save_config(tmp_path)
    ours = ControlNetModel.from_single_file(tmp_path / "control.safetensors", config=tmp_path)
    assert_equal(ours.state_dict(), state)


def test_the_names_of_a_vae_are_those_that_diffusers_converts() -> None:
    state = fewstep.AutoencoderKL(**VAE).state_dict()
    file = original_vae(state, VAE, "first_stage_model.")
    converted = theirs.convert_ldm_vae_checkpoint(dict(file), VAE)
    assert_equal(converted, state)


def bare(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as transformers 5 has them: without the module around the encoder."""
    return {key.removeprefix("text_model."): value for key, value in state.items()}


def test_the_names_of_text_encoders_are_those_that_diffusers_converts(
    text_encoder: Any, second_text_encoder: Any
) -> None:
    state = text_encoder.state_dict()
    prefix = "conditioner.embedders.0.transformer."
    file = original(state, clip_name, prefix)
    assert_equal(bare(theirs.convert_ldm_clip_checkpoint(file)), bare(state))
    state = second_text_encoder.state_dict()
    prefix = "conditioner.embedders.1.model."
    file = original(state, open_clip_name, prefix)
    converted = theirs.convert_open_clip_checkpoint(second_text_encoder, file, prefix)
    assert_equal(bare(converted), bare(state))


FULL_SIZE = {  # numbers of tensors and of parameters
    "sd1": (686, 859_520_964),
    "sd1-inpainting": (686, 859_520_964 + 5 * 320 * 9),
    "sd2": (686, 865_910_724),
    "sdxl": (1680, 2_567_463_684),
    "sdxl-inpainting": (1680, 2_567_463_684 + 5 * 320 * 9),
    "sdxl-refiner": (1220, 2_259_526_660),
    "ssd-1b": (944, 1_331_334_404),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_a_full_size_unet_has_the_tensors_that_diffusers_converts(name: str) -> None:
    config = dict(FAMILIES[name].configs["unet"])
    with torch.device("meta"):
        unet = fewstep.UNet2DConditionModel(**config)
    state = unet.state_dict()
    assert (len(state), unet.num_parameters()) == FULL_SIZE[name]
    file = original(state, unet_names(unet.config), "model.diffusion_model.")
    converted = theirs.convert_ldm_unet_checkpoint(dict(file), {**CONVERTER, **config})
    assert_equal(converted, state)
    assert family_of({key: tuple(value.shape) for key, value in file.items()}, "file") == name


def test_full_size_text_encoders_and_vae_have_the_tensors_of_the_published_ones() -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def sizes(kind: Any, config: Any) -> tuple[int, int]:
        with torch.device("meta"):
            is_vae = kind is fewstep.AutoencoderKL
            network = kind(**config) if is_vae else kind(CLIPTextConfig(**config))
        state = network.state_dict()
        return len(state), sum(value.numel() for value in state.values())

    configs = FAMILIES["sdxl"].configs
    assert sizes(CLIPTextModel, configs["text_encoder"]) == (196, 123_060_480)
    assert sizes(CLIPTextModelWithProjection, configs["text_encoder_2"]) == (517, 694_659_840)
    assert sizes(CLIPTextModel, FAMILIES["sd2"].configs["text_encoder"]) == (372, 340_387_840)
    assert sizes(fewstep.AutoencoderKL, configs["vae"]) == (248, 83_653_863)


# ── whole pipelines ──


@pytest.fixture(scope="session")
def second_text_encoder(tokenizer: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(3)
    config = CLIPTextConfig(
        hidden_size=TEXT_CHANNELS,
        intermediate_size=37,
        num_hidden_layers=3,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        hidden_act="gelu",
        projection_dim=TEXT_CHANNELS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config).eval()


Written = tuple[Path, Path]


@pytest.fixture(scope="session")
def written(
    text_encoder: Any,
    second_text_encoder: Any,
    tokenizer: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Written]:
    """(single file, folder that diffusers wrote) of a tiny model: "sd", "lcm" or "sdxl"."""
    made: dict[str, Written] = {}

    def write(name: str) -> Written:
        if name in made:
            return made[name]
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(name)
        unet = {"sd": UNET, "lcm": LCM_UNET | {"in_channels": 4, "out_channels": 4}, "sdxl": SDXL}
        kind = {
            "sd": diffusers.StableDiffusionPipeline,
            "lcm": diffusers.LatentConsistencyModelPipeline,
            "sdxl": diffusers.StableDiffusionXLPipeline,
        }[name]
        scheduler = diffusers.LCMScheduler if name == "lcm" else diffusers.DDIMScheduler
        second = {"text_encoder_2": second_text_encoder, "tokenizer_2": tokenizer}
        checker = {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }
        pipe = kind(
            vae=diffusers.AutoencoderKL(**VAE),
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=diffusers.UNet2DConditionModel(**unet[name]),
            scheduler=scheduler(**NOISE),
            **(second if name == "sdxl" else checker),
        )
        pipe.save_pretrained(folder)
        file = tmp_path_factory.mktemp("files") / f"{name}.safetensors"
        save_file(whole(pipe), file)
        made[name] = (file, folder)
        return made[name]

    return write


def draw(pipe: Any, **arguments: Any) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(1)
    (image,) = pipe(
        "a red cat", num_inference_steps=2, generator=generator, output_type="np", **arguments
    ).images
    return image


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("sd", "StableDiffusionPipeline"),
        ("lcm", "LatentConsistencyModelPipeline"),
        ("sdxl", "StableDiffusionXLPipeline"),
    ],
)
def test_a_single_file_draws_what_its_folder_draws(
    written: Callable[[str], Written], name: str, kind: str
) -> None:
    file, folder = written(name)
    ours = fewstep.DiffusionPipeline.from_single_file(file, config=folder)
    assert type(ours).__name__ == kind
    whole_folder = getattr(fewstep, kind).from_pretrained(folder)
    for name, network in whole_folder.components.items():
        if isinstance(network, torch.nn.Module):
            assert_equal(ours.components[name].state_dict(), network.state_dict())
    picture = draw(ours)
    np.testing.assert_allclose(picture, draw(whole_folder), atol=1e-5)
    expected = draw(getattr(diffusers, kind).from_pretrained(folder))
    np.testing.assert_allclose(picture, expected, atol=1e-4)
    assert picture.std() > 0.01


def test_a_single_file_draws_what_diffusers_draws_from_it(
    written: Callable[[str], Written],
) -> None:
    file, folder = written("sd")
    their_pipe = diffusers.StableDiffusionPipeline.from_single_file(
        str(file), config=str(folder), local_files_only=True, safety_checker=None
    )
    our_pipe = fewstep.StableDiffusionPipeline.from_single_file(file, config=folder)
    np.testing.assert_allclose(draw(our_pipe), draw(their_pipe), atol=1e-4)


def test_image_to_image_reads_single_files_too(written: Callable[[str], Written]) -> None:
    import PIL.Image

    file, folder = written("sd")
    pipe = fewstep.StableDiffusionImg2ImgPipeline.from_single_file(file, config=folder)
    start = PIL.Image.new("RGB", (64, 64), "red")
    assert draw(pipe, image=start, strength=1.0).shape == (64, 64, 3)


def test_a_saved_pipeline_of_a_single_file_is_read_by_diffusers(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    file, folder = written("sdxl")
    pipe = fewstep.StableDiffusionXLPipeline.from_single_file(file, config=folder)
    pipe.save_pretrained(tmp_path / "saved")
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "saved")
    np.testing.assert_allclose(draw(pipe), draw(again), atol=1e-4)


def test_a_changed_tensor_changes_the_picture(
    written: Callable[[str], Written], tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    file, folder = written("sd")
    tensors = load_file(file)
    key = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    tensors[key] = tensors[key] * 1.5
    save_file(tensors, tmp_path / "changed.safetensors")
    pictures = [
        draw(fewstep.StableDiffusionPipeline.from_single_file(path, config=folder))
        for path in (file, tmp_path / "changed.safetensors")
    ]
    assert np.abs(pictures[0] - pictures[1]).max() > 1e-3


def test_the_embedded_tokenizer_reads_as_a_folder_of_its_files_does(tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    from fewstep.checkpoints.known.clip_tokenizer import clip_tokenizer

    ours = clip_tokenizer()
    ours.save_pretrained(tmp_path / "saved")
    again = CLIPTokenizer.from_pretrained(tmp_path / "saved")
    texts = ["a photo of an astronaut riding a horse on mars", "Größe 42, naïve café!", ""]
    assert again(texts).input_ids == ours(texts).input_ids
    small = CLIPTokenizer.from_pretrained(write_tokenizer(tmp_path / "small"))
    assert small(texts).input_ids != ours(texts).input_ids
