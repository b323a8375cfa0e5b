"""What single files are recognised as, what is refused and how, and the embedded tokenizer."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNET, VAE
from original_layout import original, original_vae, whole
from safetensors.torch import save_file
from torch import Tensor

import fewstep
from fewstep import (
    AutoencoderKL,
    CheckpointError,
    DiffusionPipeline,
    RequestError,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UnsupportedConfig,
)
from fewstep.checkpoints import single_file
from fewstep.checkpoints.known import FAMILIES, Family
from fewstep.checkpoints.known.clip_tokenizer import clip_tokenizer
from fewstep.checkpoints.known.names import open_clip_name, unet_names

EMPTY = torch.zeros(1)
MAPS = Path("/proc/self/maps")


@pytest.fixture(scope="module")
def tensors(sd_folder: Path) -> dict[str, Tensor]:
    """The single file of the tiny Stable Diffusion, in memory."""
    return whole(StableDiffusionPipeline.from_pretrained(sd_folder))


def write(tensors: dict[str, Tensor], path: Path) -> Path:
    save_file(tensors, path)
    return path


@pytest.fixture
def file(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    return write(tensors, tmp_path / "model.safetensors")


@pytest.fixture
def tiny(sd_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Family:
    """The tiny model among the known families, so that it is recognised."""
    from fewstep.checkpoints.locate import Source
    from fewstep.pipelines.single_file import read_family

    family = read_family(Source(str(sd_folder)))
    monkeypatch.setitem(FAMILIES, "tiny", family)
    return family


def test_the_base_class_gives_the_pipeline_that_fits(file: Path, tiny: Family) -> None:
    pipe = DiffusionPipeline.from_single_file(file)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.dtype == torch.float32
    assert pipe.name_or_path == str(file)
    assert not pipe.unet.training and not pipe.vae.training and not pipe.text_encoder.training


def test_half_precision_comes_as_asked(
    tensors: dict[str, Tensor], tmp_path: Path, sd_folder: Path
) -> None:
    half = {key: value.half() for key, value in tensors.items()}
    file = write(half, tmp_path / "half.safetensors")
    for asked, expected in ((None, torch.float32), ("auto", torch.float16), ("bfloat16",) * 2):
        pipe = StableDiffusionPipeline.from_single_file(file, config=sd_folder, torch_dtype=asked)
        wanted = getattr(torch, expected) if isinstance(expected, str) else expected
        assert {p.dtype for m in pipe.modules for p in m.parameters()} == {wanted}


def test_what_no_network_reads_is_passed_over(
    tensors: dict[str, Tensor], tmp_path: Path, sd_folder: Path
) -> None:
    more = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(16)[None],
        "model_ema.decay": EMPTY.clone(),
        "model_ema.diffusion_modelinput_blocks00weight": torch.zeros(2, 2),
        "alphas_cumprod": torch.zeros(1000),
        "first_stage_model.loss.logvar": EMPTY,
    }
    file = write(tensors | more, tmp_path / "more.safetensors")
    StableDiffusionPipeline.from_single_file(file, config=sd_folder)


def test_names_that_other_programs_write_are_read(
    tensors: dict[str, Tensor], tmp_path: Path, sd_folder: Path
) -> None:
    def renamed(key: str) -> str:
        key = key.replace("attn_1.q.", "attn_1.to_q.").replace(
            "attn_1.proj_out.", "attn_1.to_out.0."
        )
        return key.replace(
            "cond_stage_model.transformer.text_model.", "cond_stage_model.transformer."
        )

    changed = {renamed(key): value for key, value in tensors.items()}
    assert changed.keys() != tensors.keys()
    file = write(changed, tmp_path / "renamed.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(file, config=sd_folder)
    expected = StableDiffusionPipeline.from_pretrained(sd_folder)
    for name in ("vae", "text_encoder"):
        state = getattr(expected, name).state_dict()
        for key, value in getattr(pipe, name).state_dict().items():
            assert torch.equal(value, state[key])


def test_tensors_of_no_component_are_warned_of(
    tensors: dict[str, Tensor], tmp_path: Path, sd_folder: Path
) -> None:
    file = write(tensors | {"strange.weight": torch.zeros(2, 2)}, tmp_path / "s.safetensors")
    with pytest.warns(UserWarning, match=r"1 tensors .* first strange\.weight"):
        StableDiffusionPipeline.from_single_file(file, config=sd_folder)


def test_components_replace_those_of_the_file(
    tensors: dict[str, Tensor], tmp_path: Path, sd_folder: Path
) -> None:
    pruned = {k: v for k, v in tensors.items() if not k.startswith("first_stage_model.")}
    file = write(pruned, tmp_path / "pruned.safetensors")
    with pytest.raises(CheckpointError, match=r"holds no vae; pass vae=.*AutoencoderKL"):
        StableDiffusionPipeline.from_single_file(file, config=sd_folder)
    vae = AutoencoderKL(**VAE)
    scheduler = fewstep.LCMScheduler()
    pipe = StableDiffusionPipeline.from_single_file(
        file, config=sd_folder, vae=vae, scheduler=scheduler, safety_checker=None
    )
    assert pipe.vae is vae and pipe.scheduler is scheduler


def test_a_network_is_read_out_of_a_whole_file_or_one_of_its_own(
    tensors: dict[str, Tensor], tmp_path: Path, sd_folder: Path, file: Path, tiny: Family
) -> None:
    expected = StableDiffusionPipeline.from_pretrained(sd_folder)
    vae = original_vae(expected.vae.state_dict(), expected.vae.config)
    unet = original(expected.unet.state_dict(), unet_names(expected.unet.config))
    alone = [write(t, tmp_path / f"{len(t)}.safetensors") for t in (unet, vae)]
    for kind, name, path in (
        (UNet2DConditionModel, "unet", alone[0]),
        (AutoencoderKL, "vae", alone[1]),
    ):
        for source in (file, path):
            network = kind.from_single_file(source, config=sd_folder, subfolder=name)
            state = getattr(expected, name).state_dict()
            assert all(torch.equal(v, state[k]) for k, v in network.state_dict().items())
    assert UNet2DConditionModel.from_single_file(alone[0]).config == expected.unet.config
    assert AutoencoderKL.from_single_file(file, scaling_factor=0.5).config.scaling_factor == 0.5


def test_a_vae_alone_does_not_say_how_it_is_scaled(tmp_path: Path, tiny: Family) -> None:
    vae = AutoencoderKL(**VAE)
    file = write(original_vae(vae.state_dict(), VAE), tmp_path / "vae.safetensors")
    with (
        pytest.warns(UserWarning, match=r"scaling_factor 0\.18215.*config='sdxl'"),
        pytest.raises(CheckpointError, match="config="),
    ):
        AutoencoderKL.from_single_file(file)  # a full-size config
    assert AutoencoderKL.from_single_file(file, config="tiny").config.scaling_factor == 0.18215


def test_guidance_as_an_input_makes_a_latent_consistency_model(
    sd_folder: Path, tmp_path: Path, tiny: Family
) -> None:
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipe.unet = UNet2DConditionModel(**UNET, time_cond_proj_dim=32)
    found = DiffusionPipeline.from_single_file(write(whole(pipe), tmp_path / "lcm.safetensors"))
    assert type(found) is fewstep.LatentConsistencyModelPipeline
    assert type(found.scheduler) is fewstep.LCMScheduler
    assert found.unet.config.time_cond_proj_dim == 32


def test_a_mark_of_velocities_reaches_the_scheduler(
    tensors: dict[str, Tensor], tmp_path: Path, tiny: Family
) -> None:
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    pipe = DiffusionPipeline.from_single_file(write(tensors | marks, tmp_path / "v.safetensors"))
    assert pipe.scheduler.config["prediction_type"] == "v_prediction"
    assert pipe.scheduler.config["rescale_betas_zero_snr"] is True


def test_stable_diffusion_2_is_told_apart_by_the_caller(
    file: Path, tiny: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(FAMILIES, "tiny")
    monkeypatch.setitem(FAMILIES, "sd2", tiny)
    with pytest.warns(UserWarning, match=r"does not say.*config='sd2-base'"):
        DiffusionPipeline.from_single_file(file)
    DiffusionPipeline.from_single_file(file, config="sd2")
    DiffusionPipeline.from_single_file(file, scheduler=fewstep.LCMScheduler())


def in_open_clip(tensors: dict[str, Tensor], state: dict[str, Tensor], prefix: str) -> Any:
    """A file whose text encoder is OpenCLIP's, with a last layer and a projection more."""
    rest = {k: v for k, v in tensors.items() if not k.startswith("cond_stage_model.")}
    text = original(state, open_clip_name, prefix)
    last = {k: v + 1 for k, v in text.items() if ".resblocks.2." in k}
    text |= {key.replace(".resblocks.2.", ".resblocks.3."): value for key, value in last.items()}
    return rest | text | {f"{prefix}logit_scale": torch.tensor(1.0)}


def test_the_last_layer_of_open_clip_is_left_out(
    tensors: dict[str, Tensor], tmp_path: Path, sd_folder: Path
) -> None:
    expected = StableDiffusionPipeline.from_pretrained(sd_folder).text_encoder.state_dict()
    prefix = "cond_stage_model.model."
    changed = in_open_clip(tensors, expected, prefix)
    changed[f"{prefix}text_projection"] = torch.zeros(4, 4)
    file = write(changed, tmp_path / "sd2.safetensors")
    pipe = StableDiffusionPipeline.from_single_file(file, config=sd_folder)
    found = pipe.text_encoder.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())


def test_a_refiner_has_the_second_text_encoder_only(
    tensors: dict[str, Tensor], tmp_path: Path, tiny: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    configs = dict(tiny.configs)
    configs["text_encoder_2"] = configs.pop("text_encoder")
    configs["tokenizer_2"] = {"pad_token": "!"}
    del configs["tokenizer"]
    known = FAMILIES["sdxl-refiner"]
    monkeypatch.delitem(FAMILIES, "tiny")
    monkeypatch.setitem(FAMILIES, "sdxl-refiner", Family(known.pipeline, configs, known.options))
    encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(dict(configs["text_encoder_2"])))
    state = encoder.state_dict()
    changed = in_open_clip(tensors, state, "conditioner.embedders.0.model.")
    pipe = DiffusionPipeline.from_single_file(write(changed, tmp_path / "refiner.safetensors"))
    assert type(pipe) is fewstep.StableDiffusionXLImg2ImgPipeline
    assert pipe.text_encoder is None and pipe.requires_aesthetics_score
    found = pipe.text_encoder_2.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in found.items())
    with pytest.raises(UnsupportedConfig, match="has no use for its text_encoder_2"):
        StableDiffusionPipeline.from_single_file(tmp_path / "refiner.safetensors")


@pytest.mark.parametrize(
    ("name", "title"),
    [
        (
            "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight",
            "a LoRA.*load_lora_weights",
        ),
        ("unet.down_blocks.0.attentions.0.to_q.lora_A.weight", "a LoRA"),
        ("control_model.zero_convs.0.0.weight", r"a ControlNet.*controlnet="),
        ("down_blocks.0.resnets.0.conv1.weight", "diffusers' layout.*from_pretrained"),
        ("down_blocks.0.motion_modules.0.norm.weight", "AnimateDiff"),
        ("body.0.block1.weight", "T2I-Adapter"),
        ("ip_adapter.1.to_k_ip.weight", "IP-Adapter"),
        ("emb_params", "textual inversion"),
        ("model.diffusion_model.joint_blocks.0.x_block.weight", "diffusion transformer"),
        ("edm_mean", "Playground"),
        ("decoder.up.0.block.0.conv1.weight", r"a VAE.*vae="),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder"),
        ("foo", "it holds foo"),
    ],
)
def test_another_file_is_refused_by_what_it_is(tmp_path: Path, name: str, title: str) -> None:
    file = write({name: EMPTY}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=title):
        DiffusionPipeline.from_single_file(file)


def test_a_unet_that_is_not_known_asks_for_its_config(
    tensors: dict[str, Tensor], tmp_path: Path, file: Path, tiny: Family
) -> None:
    key = "model.diffusion_model.input_blocks.0.0.weight"
    changed = tensors | {key: torch.zeros(8, 8, 3, 3)}
    with pytest.raises(UnsupportedConfig, match=r"8 input channels.*config="):
        DiffusionPipeline.from_single_file(write(changed, tmp_path / "p2p.safetensors"))
    del FAMILIES["tiny"]
    try:
        with pytest.raises(UnsupportedConfig, match=r"32 text channels.*config="):
            DiffusionPipeline.from_single_file(file)
    finally:
        FAMILIES["tiny"] = tiny
    with pytest.raises(CheckpointError, match=r"config="):
        DiffusionPipeline.from_single_file(file, config="sd1")


def test_missing_and_surplus_tensors_are_errors(
    tensors: dict[str, Tensor], tmp_path: Path, sd_folder: Path
) -> None:
    key = "model.diffusion_model.out.2.bias"
    fewer = {k: v for k, v in tensors.items() if k != key}
    with pytest.raises(CheckpointError, match=r"1 tensors missing \(out\.2\.bias\)"):
        StableDiffusionPipeline.from_single_file(
            write(fewer, tmp_path / "fewer.safetensors"), config=sd_folder
        )
    more = tensors | {"model.diffusion_model.out.3.bias": EMPTY}
    with pytest.raises(CheckpointError, match=r"1 tensors surplus \(out\.3\.bias\)"):
        StableDiffusionPipeline.from_single_file(
            write(more, tmp_path / "more.safetensors"), config=sd_folder
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"original_config": "v1.yaml"}, "original_config='v1.yaml'.*config="),
        ({"use_safetensors": False}, "use_safetensors=False"),
        ({"prediction_type": "v_prediction"}, r"prediction_type.*scheduler="),
        ({"dtype": "float16", "torch_dtype": "float16"}, "only one"),
    ],
)
def test_arguments_that_cannot_be_served_are_refused(
    file: Path, sd_folder: Path, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        StableDiffusionPipeline.from_single_file(file, config=sd_folder, **arguments)


def test_unknown_arguments_are_type_errors(file: Path, sd_folder: Path) -> None:
    with pytest.raises(TypeError, match="did you mean 'scheduler'"):
        StableDiffusionPipeline.from_single_file(file, config=sd_folder, schedulr=None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.ckpt", "pickled.*convert"),
        ("model.gguf", "must be the name of a .safetensors"),
        ("/nowhere/model.safetensors", "there is no file"),
        ("https://example.org/model.safetensors", "download it first"),
    ],
)
def test_files_of_other_kinds_and_places_are_refused(name: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        DiffusionPipeline.from_single_file(name)


def test_a_folder_and_a_torn_file_are_refused(sd_folder: Path, file: Path) -> None:
    with pytest.raises(CheckpointError, match="from_pretrained"):
        DiffusionPipeline.from_single_file(sd_folder)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="whole safetensors"):
        DiffusionPipeline.from_single_file(file)


@pytest.mark.parametrize(
    ("given", "revision"),
    [
        ("owner/repo/sub/x.safetensors", None),
        ("https://huggingface.co/owner/repo/blob/main/sub/x.safetensors", "main"),
        ("hf.co/owner/repo/resolve/v2/sub/x.safetensors?download=true", "v2"),
    ],
)
def test_files_of_the_hub_are_found_by_name_and_address(
    monkeypatch: pytest.MonkeyPatch, given: str, revision: str | None
) -> None:
    asked: list[Any] = []

    def fetch(source: Any, name: str) -> Path:
        asked.append((source.path, source.revision, name))
        return Path(name)

    monkeypatch.setattr(single_file.Source, "fetch", fetch)
    single_file.find_file(given)
    assert asked == [("owner/repo", revision, "sub/x.safetensors")]
    if revision:
        with pytest.raises(RequestError, match="contradicts"):
            single_file.find_file(given, revision="other")


@pytest.mark.skipif(not MAPS.exists(), reason="only Linux lists what is mapped")
def test_the_tensors_stay_in_the_file(file: Path, sd_folder: Path) -> None:
    pipe = StableDiffusionPipeline.from_single_file(file, config=sd_folder)
    assert str(file) in MAPS.read_text()
    del pipe
    gc.collect()
    assert str(file) not in MAPS.read_text()


# ── the tokenizer ──


def test_clips_words_have_their_published_ids() -> None:
    tokenizer = clip_tokenizer()
    assert len(tokenizer) == 49_408
    ids = tokenizer("A photo of an astronaut  riding a horse on mars").input_ids
    assert ids == [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407]
    assert tokenizer("hello world!").input_ids == [49406, 3306, 1002, 256, 49407]


@pytest.mark.parametrize(("pad", "expected"), [("<|endoftext|>", 49407), ("!", 0)])
def test_tokenizers_pad_to_77(pad: str, expected: int) -> None:
    ids = clip_tokenizer(pad)("a cat", padding="max_length", truncation=True).input_ids
    assert ids == [49406, 320, 2368, 49407] + [expected] * 73
