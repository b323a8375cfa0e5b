"""What stands beside a model on the command line: it steers, it is recorded, and repro has it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import TEXT_CHANNELS, UNET
from safetensors.torch import save_file
from torch import nn

import fewstep
from fewstep.cli.additions import named, parts_of
from fewstep.cli.record import Addition, read_record
from fewstep.errors import RequestError
from fewstep.models.t2i_adapter import T2IAdapter

Run = Callable[..., tuple[int, str, str]]
LAYER = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"  # 32 -> 16


def pixels(file: Path | str) -> np.ndarray:
    with PIL.Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


def randomised(network: nn.Module, seed: int = 0) -> Any:
    """A network without zeros, since a new one leaves what it steers as it is."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    return network


@pytest.fixture(scope="module")
def beside(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of everything that can stand beside the model in `sd_folder`, and pictures."""
    folder = tmp_path_factory.mktemp("beside")
    random = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    for name in ("style", "other"):
        lora = {f"unet.{LAYER}.lora_A.weight": randn(2, TEXT_CHANNELS)}
        save_file(
            lora | {f"unet.{LAYER}.lora_B.weight": randn(16, 2)}, folder / f"{name}.safetensors"
        )
    unet = fewstep.UNet2DConditionModel.from_pretrained(sd_folder, subfolder="unet")
    hint = (4, 4, 4, 4)
    control = fewstep.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=hint)
    randomised(control).save_pretrained(folder / "controlnet")
    adapter = T2IAdapter(
        channels=(8, 16), num_res_blocks=1, downscale_factor=8, adapter_type="full_adapter"
    )
    randomised(adapter).save_pretrained(folder / "adapter")
    motion = fewstep.MotionAdapter(
        block_out_channels=UNET["block_out_channels"],
        motion_layers_per_block=1,
        motion_norm_num_groups=2,
        motion_num_attention_heads=2,
    )
    randomised(motion).save_pretrained(folder / "motion")
    write_ip_adapter(folder / "ip" / "models", randn)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(folder / "photo.png")
    PIL.Image.fromarray(noise[::-1].copy()).save(folder / "other.png")
    white = np.zeros((64, 64), dtype=np.uint8)
    white[:, 32:] = 255
    PIL.Image.fromarray(white).save(folder / "mask.png")
    return folder


def write_ip_adapter(folder: Path, randn: Callable[..., torch.Tensor]) -> None:
    """A base IP-Adapter and its image encoder, as they lie in a repository."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=32,
        patch_size=8,
        projection_dim=24,
    )
    randomised(CLIPVisionModelWithProjection(config)).save_pretrained(folder / "image_encoder")
    state = {
        "image_proj.proj.weight": randn(4 * TEXT_CHANNELS, 24),
        "image_proj.proj.bias": randn(4 * TEXT_CHANNELS),
        "image_proj.norm.weight": randn(TEXT_CHANNELS),
        "image_proj.norm.bias": randn(TEXT_CHANNELS),
    }
    for number in (1, 3, 5, 7):
        for letter in "kv":
            state[f"ip_adapter.{number}.to_{letter}_ip.weight"] = randn(16, TEXT_CHANNELS)
    save_file(state, folder / "ip.safetensors")


@pytest.fixture(scope="module")
def adapted_folder(sd_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the layout that T2I-Adapters of Stable Diffusion are for: attention first."""
    torch.manual_seed(4)
    unet = fewstep.UNet2DConditionModel(
        **UNET
        | {
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        }
    )
    folder = tmp_path_factory.mktemp("adapted")
    fewstep.StableDiffusionPipeline.from_pretrained(sd_folder, unet=unet).save_pretrained(folder)
    return folder


@pytest.fixture
def drawn(
    run: Run, sd_folder: Path, adapted_folder: Path, beside: Path
) -> Callable[..., np.ndarray]:
    """Draws a picture with options, in whose text `@x` is the file x beside the model."""

    def draw(options: str, name: str = "a.png", code: int = 0) -> Any:
        model = adapted_folder if "--adapter" in options else sd_folder
        words = [word.replace("@", f"{beside}/") for word in options.split()]
        common = ("-m", model, "-s", 2, "--seed", 7, "--out", name, "--force")
        done = run("generate", "a cat", *common, *words)
        assert done[0] == code, done[2]
        return done[2] if code else pixels(name)

    return draw


# Options that steer, and the same with one of them changed.
STEERED = {
    "lora": ("--lora @style.safetensors", "--lora @style.safetensors:0.3"),
    "two loras": (
        "--lora @style.safetensors --lora @other.safetensors",
        "--lora @style.safetensors --lora @other.safetensors:-1",
    ),
    "controlnet": (
        "--controlnet @controlnet --control-image @photo.png",
        "--controlnet @controlnet --control-image @other.png",
    ),
    "two controlnets": (
        "--controlnet @controlnet --controlnet @controlnet:0.5 --control-image @photo.png",
        "--controlnet @controlnet --controlnet @controlnet:0.2 --control-image @photo.png",
    ),
    "controlnet on a picture": (
        "--controlnet @controlnet --control-image @photo.png --image @other.png",
        "--controlnet @controlnet --control-image @other.png --image @other.png",
    ),
    "adapter": (
        "--adapter @adapter --control-image @photo.png",
        "--adapter @adapter:0.4 --control-image @photo.png",
    ),
    "ip-adapter": (
        "--ip-adapter @ip/models/ip.safetensors --ip-image @photo.png",
        "--ip-adapter @ip/models/ip.safetensors:0.3 --ip-image @photo.png",
    ),
    "mask": ("--image @photo.png --mask @mask.png", "--image @photo.png --mask @photo.png"),
    "scheduler": ("--scheduler lcm", "--scheduler euler"),
    "motion": ("--motion-adapter @motion --frames 3", "--frames 2 --motion-adapter @motion"),
}


@pytest.mark.parametrize("case", STEERED)
def test_it_steers_and_is_drawn_again_to_the_pixel(
    case: str, drawn: Callable[..., Any], run: Run
) -> None:
    options, changed = STEERED[case]
    picture = drawn(options)
    assert run("repro", "a.png") == (0, "identical: a.png\n", "")
    assert (picture != drawn(changed, "b.png")).any()


def test_what_a_mask_leaves_stays_as_it_was(drawn: Callable[..., Any], beside: Path) -> None:
    picture = drawn("--image @photo.png --mask @mask.png")
    kept = picture[:, :32] == pixels(beside / "photo.png")[:, :32]
    assert kept.all()
    assert (picture[:, 32:] != pixels(beside / "photo.png")[:, 32:]).any()


def test_the_record_tells_what_stood_beside_the_model(
    drawn: Callable[..., Any], beside: Path
) -> None:
    drawn("--lora @style.safetensors:0.8 --controlnet @controlnet --control-image @photo.png")
    record = read_record(Path("a.png"))
    lora, control = record.model.additions
    assert (lora.kind, lora.id, lora.weight) == ("lora", f"{beside}/style.safetensors", 0.8)
    assert (control.kind, control.weight) == ("controlnet", 1.0)
    assert len({lora.weights, control.weights, record.model.weights}) == 3
    assert record.model.pipeline == "StableDiffusionControlNetPipeline"
    assert record.pictures[0].controls[0].path == f"{beside}/photo.png"


def test_an_lcm_scheduler_has_the_defaults_of_lcm_loras(run: Run, sd_folder: Path) -> None:
    run("generate", "a", "-m", sd_folder, "--scheduler", "LCM", "--out", "a.png")
    record = read_record(Path("a.png"))
    assert (record.pictures[0].steps, record.pictures[0].guidance_scale) == (4, 1.0)
    assert record.model.scheduler["_class_name"] == "LCMScheduler"


@pytest.mark.parametrize("suffix", [".png", ".webp", ".gif"])
def test_a_video_is_an_animation_of_all_frames_and_is_drawn_again(
    suffix: str, drawn: Callable[..., Any], run: Run
) -> None:
    drawn("--motion-adapter @motion --frames 3", f"a{suffix}")
    with PIL.Image.open(f"a{suffix}") as video:
        assert (video.n_frames, video.size, video.info["loop"]) == (3, (64, 64), 0)
    assert read_record(Path(f"a{suffix}")).pictures[0].frames == 3
    assert run("repro", f"a{suffix}", "--out", f"b{suffix}")[0] == 0
    assert read_record(Path(f"a{suffix}")) == read_record(Path(f"b{suffix}"))


def test_other_weights_beside_the_model_are_refused_by_repro(
    drawn: Callable[..., Any], run: Run, beside: Path
) -> None:
    lora = Path("moved.safetensors")
    lora.write_bytes((beside / "style.safetensors").read_bytes())
    drawn(f"--lora {lora}")
    lora.write_bytes((beside / "other.safetensors").read_bytes())
    code, _, error = run("repro", "a.png")
    assert code == 2
    assert "--lora moved.safetensors: holds other weights" in error
    lora.unlink()
    code, _, error = run("repro", "a.png")
    assert code == 2
    assert error.startswith("error: --lora moved.safetensors: ")
    assert error.count("\n") == 1


def test_a_changed_control_picture_is_refused_by_repro(
    drawn: Callable[..., Any], run: Run, beside: Path
) -> None:
    control = Path("control.png")
    control.write_bytes((beside / "photo.png").read_bytes())
    drawn("--controlnet @controlnet --control-image control.png")
    control.write_bytes((beside / "other.png").read_bytes())
    code, _, error = run("repro", "a.png")
    assert code == 2
    assert "--control-image control.png: is not the picture that a.png was drawn from" in error


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--mask @mask.png", "--mask @mask.png: has a meaning only with --image"),
        ("--image @photo.png --mask no.png", "--mask no.png: no such file"),
        ("--image @photo.png --mask @small.png", "is 8x8, and --image 64x64; give one of that"),
        ("--control-image @photo.png", "only with --controlnet or --adapter"),
        ("--controlnet @controlnet", "--controlnet: has a meaning only with --control-image FILE"),
        ("--adapter @adapter", "--adapter: has a meaning only with --control-image FILE"),
        (
            "--controlnet @controlnet --adapter @adapter --control-image @photo.png",
            "--controlnet: cannot be used with --adapter",
        ),
        (
            "--adapter @adapter --control-image @photo.png --image @photo.png",
            "--adapter: cannot be used with --image",
        ),
        (
            "--controlnet @controlnet --control-image @photo.png --control-image @other.png",
            "--control-image: was given 2 times for 1 networks",
        ),
        ("--ip-image @photo.png", "--ip-image: has a meaning only with --ip-adapter"),
        ("--ip-adapter x/y --ip-image @photo.png", "--ip-adapter x/y: must name a file, such as"),
        ("--frames 2", "has no motion_adapter; give --motion-adapter"),
        ("--frames 2 --motion-adapter @motion --grid", "--frames: cannot be used with --grid"),
        ("--frames 2 --motion-adapter @motion --image @photo.png", "cannot be used with --image"),
        ("--motion-adapter @controlnet", "--motion-adapter @controlnet: "),
        ("--motion-adapter @motion --out a.mp4", "--out a.mp4: cannot hold a video; give a name"),
        ("--lora @none.safetensors", "--lora @none.safetensors: there is no file"),
        ("--lora @photo.png", "--lora @photo.png: "),
        ("--lora style:nan", "--lora style:nan: must be NAME or NAME:WEIGHT"),
        ("--controlnet @motion --control-image @photo.png", "--controlnet @motion: "),
        ("--scheduler heun", "'heun' is unknown; give one of ddim, ddpm, dpm, euler"),
    ],
)
def test_bad_input_ends_in_one_line(
    options: str, words: str, run: Run, sd_folder: Path, beside: Path
) -> None:
    if not (small := beside / "small.png").exists():
        PIL.Image.new("L", (8, 8)).save(small)
    given = options.replace("@", f"{beside}/").split()
    code, out, error = run("generate", "a", "-m", sd_folder, *given)
    assert (code, out) == (2, "")
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert words.replace("@", f"{beside}/") in error
    assert list(Path().iterdir()) == []


def test_json_tells_of_it_too(run: Run, sd_folder: Path, beside: Path) -> None:
    lora = beside / "style.safetensors"
    code, out, _ = run("generate", "a", "-m", sd_folder, "-s", 1, "--lora", lora, "--json")
    assert code == 0
    (addition,) = json.loads(out)["files"][0]["model"]["additions"]
    assert addition["id"] == str(lora)


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("a", "a", 1.0),
        ("a:0.5", "a", 0.5),
        ("a:-1", "a", -1.0),
        ("o/r/f.safetensors:2", "o/r/f.safetensors", 2.0),
        (r"C:\lora.safetensors", r"C:\lora.safetensors", 1.0),
        ("a:b", "a:b", 1.0),
        ("7", "7", 1.0),
    ],
)
def test_a_weight_stands_behind_the_last_colon(text: str, name: str, weight: float) -> None:
    assert named("lora", text) == Addition("lora", name, weight)


@pytest.mark.parametrize("text", [":0.5", "a:inf", "a:nan"])
def test_a_weight_without_a_name_or_a_bound_is_refused(text: str) -> None:
    with pytest.raises(RequestError, match=r"^--lora "):
        named("lora", text)


def test_a_file_of_a_repository_can_be_named(tmp_path: Path) -> None:
    assert parts_of("owner/repo") == ("owner/repo", None)
    assert parts_of("owner/repo/x.safetensors") == ("owner/repo", "x.safetensors")
    assert parts_of("owner/repo/a/x.safetensors") == ("owner/repo", "a/x.safetensors")
    (tmp_path / "x.safetensors").touch()
    for here in (str(tmp_path / "x.safetensors"), "/no/such/x.safetensors", "./a/b/x.safetensors"):
        assert parts_of(here) == (here, None)
