"""Whole pipelines with ControlNets and T2I-Adapters against diffusers', on tiny random models.

Final latents agree to 1e-4 in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import NOISE, TEXT_CHANNELS, UNET, VAE
from torch import Tensor, nn

import fewstep
import fewstep.pipelines.denoise
from fewstep import RequestError
from fewstep.models.controlnet import ControlNetModel, MultiControlNetModel
from fewstep.models.t2i_adapter import MultiAdapter, T2IAdapter
from fewstep.pipelines.control_images import unit_pictures
from fewstep.pipelines.controls import adapter_controls, controlnet_controls, size_of

diffusers = pytest.importorskip("diffusers")
pytestmark = pytest.mark.filterwarnings("ignore")

SD_UNET = UNET | {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
XL_UNET = SD_UNET | {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": (1, 2, 2),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,  # 6 x 8 + 32
    "cross_attention_dim": 2 * TEXT_CHANNELS,
}
DISTILLED = {"time_cond_proj_dim": 32}
# Family -> (stem, UNet, scheduler).
MODELS: dict[str, tuple[str, dict[str, Any], str]] = {
    "sd": ("StableDiffusion", SD_UNET, "DDIMScheduler"),
    "lcm": ("StableDiffusion", SD_UNET | DISTILLED, "LCMScheduler"),
    "xl": ("StableDiffusionXL", XL_UNET, "DDIMScheduler"),
    "xl lcm": ("StableDiffusionXL", XL_UNET | DISTILLED, "LCMScheduler"),
}
NOT_OF_A_CONTROLNET = ("sample_size", "out_channels", "up_block_types")


def seeded(*seeds: int) -> Any:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return generators[0] if len(generators) == 1 else generators


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(7))


def picture(seed: int = 5, width: int = 64, height: int = 64) -> PIL.Image.Image:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)


def pixels(seed: int = 5) -> Tensor:
    return torch.from_numpy(np.array(picture(seed))).permute(2, 0, 1) / 255


def trained(network: Any, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.1)
    return network.eval()


@pytest.fixture(scope="module")
def folders(
    tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Checkpoints by family, with two ControlNets or adapters of each kind beside them."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(3)
    stored = text_encoder.config.to_dict() | {"projection_dim": 32, "hidden_act": "gelu"}
    second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval()
    found = {}
    for family, (stem, unet, scheduler) in MODELS.items():
        torch.manual_seed(0)
        parts: dict[str, Any] = {
            "vae": diffusers.AutoencoderKL(**VAE, force_upcast=True),
            "text_encoder": text_encoder,
            "tokenizer": tokenizer,
            "unet": diffusers.UNet2DConditionModel(**unet),
            "scheduler": getattr(diffusers, scheduler)(**NOISE),
        }
        if stem == "StableDiffusionXL":
            parts |= {"text_encoder_2": second, "tokenizer_2": tokenizer}
        else:
            parts |= {"safety_checker": None, "feature_extractor": None}
            parts["requires_safety_checker"] = False
        found[family] = tmp_path_factory.mktemp("controls")
        getattr(diffusers, stem + "Pipeline")(**parts).save_pretrained(found[family])
    return found


Nets = Callable[..., tuple[Any, Any]]


@pytest.fixture(scope="module")
def nets(tmp_path_factory: pytest.TempPathFactory) -> Nets:
    """(diffusers' network, ours) of equal weights; a number more than 1 makes it several."""

    @cache
    def make(kind: str, xl: bool, count: int, pooled: bool) -> tuple[Any, Any]:
        unet = XL_UNET if xl else SD_UNET
        config = {k: v for k, v in unet.items() if k not in NOT_OF_A_CONTROLNET}
        config |= {"conditioning_embedding_out_channels": (4, 6, 6, 8)}
        config |= {"global_pool_conditions": pooled}
        ours, several = (ControlNetModel, MultiControlNetModel)
        if kind == "T2IAdapter":
            ours, several = (T2IAdapter, MultiAdapter)
            config = {"channels": (8, 16, 16), "adapter_type": "full_adapter"}
            if xl:
                config = {"channels": (8, 16, 16, 16), "adapter_type": "full_adapter_xl"}
                config |= {"downscale_factor": 16}
        folder = tmp_path_factory.mktemp("nets") / "net"
        many = several([trained(ours(**config), 8 + i) for i in range(max(count, 2))])
        many.save_pretrained(folder)
        theirs = getattr(diffusers, kind if count == 1 else several.__name__)
        return theirs.from_pretrained(str(folder)), many.members[0] if count == 1 else many

    return lambda kind, xl=False, count=1, pooled=False: make(kind, xl, count, pooled)


@pytest.fixture(scope="module")
def plain(folders: dict[str, Path]) -> Callable[[str], tuple[dict[str, Any], Any]]:
    """(the components of diffusers, our pipeline) of a family."""

    @cache
    def load(family: str) -> tuple[dict[str, Any], Any]:
        name = MODELS[family][0] + "Pipeline"
        theirs, ours = (
            getattr(library, name).from_pretrained(folders[family])
            for library in (diffusers, fewstep)
        )
        ours.set_progress_bar_config(disable=True)
        return theirs.components, ours

    return load


class Pair:
    """The same call by diffusers and by us; ours with controls from the builders."""

    def __init__(self, family: str, components: dict[str, Any], ours: Any, networks: Any) -> None:
        self.ours, (net, self.net) = ours, networks
        self.adapter = isinstance(self.net, (T2IAdapter, MultiAdapter))
        kind = "Adapter" if self.adapter else "ControlNet"
        own: dict[str, Any] = {"adapter" if self.adapter else "controlnet": net}
        if MODELS[family][0] == "StableDiffusion":
            own |= {"requires_safety_checker": False}
            own |= {"safety_checker": None, "feature_extractor": None}
        elif not self.adapter:
            own["add_watermarker"] = False
        given = {name: part for name, part in components.items() if part is not None}
        self.theirs = getattr(diffusers, MODELS[family][0] + kind + "Pipeline")(**given, **own)
        self.theirs.set_progress_bar_config(disable=True)

    def expected(self, **arguments: Any) -> Tensor:
        return self.theirs(**self.common() | arguments, output_type="latent").images

    def found(self, **arguments: Any) -> Tensor:
        """Our latents; arguments that are no control's go to the plain pipeline."""
        given = {
            public: arguments.pop(name)
            for name, public in (
                ("image", "images"),
                ("controlnet_conditioning_scale", "scale"),
                ("adapter_conditioning_scale", "scale"),
                ("control_guidance_start", "start"),
                ("control_guidance_end", "end"),
                ("adapter_conditioning_factor", "factor"),
                ("guess_mode", "guess_mode"),
            )
            if name in arguments
        }
        build = adapter_controls if self.adapter else controlnet_controls
        images, ours = given.pop("images"), self.ours

        def controls(request: Any, job: Any) -> Any:
            return build(
                self.net,
                images,
                unet=ours.unet,
                shape=job.shape,
                size=ours.size(request),
                steps=len(job.plan.timesteps),
                **given,
            )

        ours.controls = controls
        return ours(**self.common() | arguments, output_type="latent").images

    def same(self, arguments: Callable[[], dict[str, Any]]) -> Tensor:
        found = self.found(**arguments())
        torch.testing.assert_close(found, self.expected(**arguments()), rtol=0, atol=1e-4)
        return found

    @staticmethod
    def common() -> dict[str, Any]:
        return {"prompt": "a cat", "generator": seeded(3), "num_inference_steps": 4} | {
            "height": 64,
            "width": 64,
        }


MakePair = Callable[..., Pair]


@pytest.fixture
def pair(plain: Any, nets: Nets) -> MakePair:
    def make(family: str, kind: str = "ControlNetModel", count: int = 1, pooled: bool = False):
        networks = nets(kind, family.startswith("xl"), count, pooled)
        return Pair(family, *plain(family), networks)

    return make


Arguments = Callable[[], dict[str, Any]]
CONTROLNET: dict[str, tuple[str, Arguments]] = {
    "defaults": ("sd", lambda: {}),
    "no guidance": ("sd", lambda: {"guidance_scale": 1.0}),
    "weaker": ("sd", lambda: {"controlnet_conditioning_scale": 0.3}),
    "a part of the run": (
        "sd",
        lambda: {"control_guidance_start": 0.25, "control_guidance_end": 0.75},
    ),
    "guess": ("sd", lambda: {"guess_mode": True, "guidance_scale": 3.0}),
    "guess, no guidance": ("sd", lambda: {"guess_mode": True, "guidance_scale": 1.0}),
    "picture of another size": ("sd", lambda: {"image": picture(6, 90, 50)}),
    "tall": ("sd", lambda: {"height": 72, "width": 40}),
    "tensor": ("sd", lambda: {"image": pixels()[None]}),
    "array": ("sd", lambda: {"image": pixels().permute(1, 2, 0).numpy()[None]}),
    "a picture per prompt": (
        "sd",
        lambda: {
            "prompt": ["a cat", "a red dog"],
            "image": [picture(1), picture(2)],
            "num_images_per_prompt": 2,
        },
    ),
    "one picture for all": (
        "lcm",
        lambda: {"prompt": ["a cat", "a red dog"], "num_images_per_prompt": 2},
    ),
    "lcm": ("lcm", lambda: {"guidance_scale": 8.0}),
    "lcm, end": ("lcm", lambda: {"control_guidance_end": 0.5}),
    "xl": ("xl", lambda: {"guidance_scale": 3.0, "negative_prompt": "a dog"}),
    "xl, guess": ("xl", lambda: {"guidance_scale": 3.0, "guess_mode": True}),
    "xl lcm": ("xl lcm", lambda: {"controlnet_conditioning_scale": 0.6}),
}


@pytest.mark.parametrize("case", CONTROLNET)
def test_controlnet_steers_as_in_diffusers(case: str, pair: MakePair) -> None:
    family, arguments = CONTROLNET[case]
    both = pair(family)
    latents = both.same(lambda: {"image": picture()} | arguments())
    without = both.found(
        **{"image": picture()} | arguments() | {"controlnet_conditioning_scale": 0.0}
    )
    assert (latents - without).abs().max() > 1e-2, "the control changed nothing"


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_a_pooled_controlnet_steers_as_in_diffusers(pair: MakePair, guidance: float) -> None:
    both = pair("sd", pooled=True)
    both.same(lambda: {"image": picture(), "guidance_scale": guidance})


SEVERAL: dict[str, Arguments] = {
    "one number for all": lambda: {"controlnet_conditioning_scale": 0.4},
    "lists": lambda: {
        "controlnet_conditioning_scale": [0.9, 0.2],
        "control_guidance_start": [0.0, 0.5],
        "control_guidance_end": [0.5, 1.0],
    },
    "guess": lambda: {"guess_mode": True},
    "a list per prompt": lambda: {
        "prompt": ["a cat", "a red dog"],
        "image": [[picture(1), picture(2)], [picture(3), picture(4)]],
    },
}


@pytest.mark.parametrize("case", SEVERAL)
def test_several_controlnets_steer_as_in_diffusers(case: str, pair: MakePair) -> None:
    pair("sd", count=2).same(lambda: {"image": [picture(1), picture(2)]} | SEVERAL[case]())


ADAPTER: dict[str, tuple[str, int, Arguments]] = {
    "defaults": ("sd", 1, lambda: {}),
    "no guidance": ("sd", 1, lambda: {"guidance_scale": 1.0}),
    "lcm": ("lcm", 1, lambda: {"adapter_conditioning_scale": 0.4}),
    "xl": ("xl", 1, lambda: {"guidance_scale": 3.0}),
    "xl, a part": ("xl", 1, lambda: {"adapter_conditioning_factor": 0.8}),
    "xl lcm": ("xl lcm", 1, lambda: {"num_images_per_prompt": 2}),
    "xl, other size": ("xl lcm", 1, lambda: {"height": 80, "width": 48}),
    "two": (
        "sd",
        2,
        lambda: {
            "image": [picture(1), picture(2)],
            "adapter_conditioning_scale": [0.9, 0.3],
        },
    ),
    "xl, two": (
        "xl",
        2,
        lambda: {
            "image": [picture(1), picture(2)],
            "adapter_conditioning_scale": [0.2, 0.7],
            "adapter_conditioning_factor": 0.5,
        },
    ),
}


@pytest.mark.parametrize("case", ADAPTER)
def test_adapters_steer_as_in_diffusers(case: str, pair: MakePair) -> None:
    family, count, arguments = ADAPTER[case]
    both = pair(family, "T2IAdapter", count)
    latents = both.same(lambda: {"image": picture()} | arguments())
    without = both.found(**{"image": picture()} | arguments() | {"adapter_conditioning_scale": 0})
    assert (latents - without).abs().max() > 1e-2, "the adapter changed nothing"


@pytest.mark.parametrize("kind", ["ControlNetModel", "T2IAdapter"])
def test_a_picture_does_not_depend_on_its_batch(pair: MakePair, kind: str) -> None:
    both = pair("lcm", kind)
    pictures, prompts = [picture(1), picture(2)], ["a cat", "a red dog"]
    together = both.found(
        image=pictures, prompt=prompts, num_images_per_prompt=2, generator=seeded(0, 1, 2, 3)
    )
    for i, seed in enumerate(range(4)):
        alone = both.found(image=pictures[i // 2], prompt=prompts[i // 2], generator=seeded(seed))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4)


def test_a_controlnet_does_not_run_where_it_does_not_steer(
    pair: MakePair, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, calls = pair("lcm"), []
    for name in ("residuals", "embed_hint"):
        method = getattr(both.net, name)

        def counted(*args: Any, _method: Any = method, _name: str = name) -> Any:
            calls.append(_name)
            return _method(*args)

        monkeypatch.setattr(both.net, name, counted)
    both.found(image=picture(), control_guidance_start=0.25, control_guidance_end=0.75)
    assert calls == ["embed_hint", "residuals", "residuals"]
    calls.clear()
    both.found(image=picture(), controlnet_conditioning_scale=0.0)
    assert calls == []


def test_controls_of_both_kinds_add_up(pair: MakePair, monkeypatch: pytest.MonkeyPatch) -> None:
    steered, adapted = pair("sd"), pair("sd", "T2IAdapter")
    one = steered.found(image=picture())
    first = steered.ours.controls
    two = adapted.found(image=picture(2))
    second = adapted.ours.controls
    steered.ours.controls = lambda request, job: first(request, job) + second(request, job)
    both = steered.ours(**Pair.common(), output_type="latent").images
    assert min(float((both - x).abs().max()) for x in (one, two)) > 1e-2


def built(both: Pair, images: Any = None, **changed: Any) -> Any:
    build = adapter_controls if both.adapter else controlnet_controls
    arguments = {"unet": both.ours.unet, "shape": (2, 4, 8, 8), "size": (64, 64), "steps": 4}
    return build(both.net, picture() if images is None else images, **arguments | changed)


def test_a_control_in_half_precision_serves_a_unet_in_another(pair: MakePair, nets: Nets) -> None:
    both = pair("sd")
    (control,) = built(both)
    arguments = (randn(2, 4, 8, 8), torch.tensor([500, 500]))
    cond = fewstep.pipelines.denoise.Conditioning(randn(2, 7, TEXT_CHANNELS))
    whole = control(*arguments, cond, doubled=False, span=(0, 1))
    try:
        both.net.to(torch.bfloat16)
        (control,) = built(both)
        half = control(*arguments, cond, doubled=False, span=(0, 1))
    finally:
        both.net.float()
    assert half.mid.dtype == torch.float32
    assert 0 < (half.mid - whole.mid).abs().max() < 0.1 * whole.mid.abs().max()


@pytest.mark.parametrize(
    ("count", "changed", "message"),
    [
        (1, {"images": "a.png"}, "image must be a picture to steer by.*str"),
        (1, {"images": []}, "an empty list"),
        (1, {"images": [picture(), pixels()]}, "Image, Tensor"),
        (1, {"images": [picture(i) for i in range(3)]}, "holds 3 pictures, but 2 are drawn"),
        (1, {"images": randn(1, 3, 64, 64) * 9}, r"floats in \[0, 1\]"),
        (1, {"images": torch.zeros(1, 2, 64, 64)}, "2 channels, but the network reads 3"),
        (1, {"scale": [0.5, 0.5]}, "controlnet_conditioning_scale holds 2 numbers.*1 networks"),
        (1, {"scale": "much"}, "controlnet_conditioning_scale must be a finite number"),
        (1, {"scale": float("nan")}, "controlnet_conditioning_scale"),
        (1, {"start": 0.5, "end": 0.5}, "control_guidance_start must be less than.*0.5 and 0.5"),
        (1, {"start": -0.1}, "control_guidance_start"),
        (1, {"end": 1.5}, "control_guidance_end"),
        (1, {"shape": (2, 8, 8, 8)}, "in_channels=4.*needs 8"),
        (1, {"shape": (2, 4, 16, 16)}, r"latents are \(16, 16\)"),
        (2, {"images": picture()}, "an entry for each of 2 networks, got Image"),
        (2, {"images": [picture()] * 3}, "an entry for each of 2 networks, got 3"),
        (2, {"images": [[picture()], picture()]}, "mixes lists and pictures"),
        (2, {"images": [picture()] * 2, "end": [1.0]}, "control_guidance_end holds 1 numbers"),
    ],
)
def test_what_does_not_fit_a_controlnet_is_refused(
    count: int, changed: dict[str, Any], message: str, pair: MakePair
) -> None:
    with pytest.raises(RequestError, match=message):
        built(pair("sd", count=count), **changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"factor": 1.5}, r"adapter_conditioning_factor must be in \[0, 1\], got 1.5"),
        ({"size": (64, 60)}, "width must be a multiple of 8.*use 56"),
        ({"scale": [1, 2]}, "adapter_conditioning_scale holds 2"),
        ({"shape": (2, 4, 16, 16)}, "adapter gives features"),
    ],
)
def test_what_does_not_fit_an_adapter_is_refused(
    changed: dict[str, Any], message: str, pair: MakePair
) -> None:
    with pytest.raises(RequestError, match=message):
        built(pair("sd", "T2IAdapter"), **changed)


@pytest.mark.parametrize("kind", ["ControlNetModel", "T2IAdapter"])
def test_networks_for_another_kind_of_model_are_refused(pair: MakePair, kind: str) -> None:
    sd, xl = pair("sd", kind), pair("xl", kind)
    with pytest.raises(RequestError, match="same kind of model"):
        built(xl, unet=sd.ours.unet)
    with pytest.raises(RequestError, match="same kind of model"):
        built(sd, unet=xl.ours.unet)


@pytest.mark.filterwarnings("default")
def test_a_control_that_no_step_is_long_enough_for_warns(pair: MakePair) -> None:
    with pytest.warns(UserWarning, match="none of the 4 steps"):
        built(pair("sd"), start=0.1, end=0.3)
    with pytest.warns(UserWarning, match=r"adapter_conditioning_factor=0.2 .* 4 steps"):
        built(pair("sd", "T2IAdapter"), factor=0.2)
    assert built(pair("sd", "T2IAdapter"), factor=0) == ()


def test_sizes_come_from_the_first_picture() -> None:
    assert size_of(picture(1, 90, 50), 8) == (48, 88)
    assert size_of([[picture(1, 90, 50)], picture()], 16) == (48, 80)
    assert size_of(np.zeros((2, 40, 33, 3)), 8) == size_of(torch.zeros(3, 41, 34), 8) == (40, 32)
    with pytest.raises(RequestError, match=r"control_image must be a picture.*NoneType"):
        size_of(None, 8, "control_image")
    with pytest.raises(RequestError, match="side of 5 pixels"):
        size_of(torch.zeros(3, 41, 5), 8)


def test_pictures_lie_in_the_unit_range_whatever_they_come_as() -> None:
    bytes_ = np.array(picture())
    expected = unit_pictures(picture(), (64, 64), 3, "image")
    assert expected.shape == (1, 3, 64, 64) and 0 <= expected.min() < expected.max() <= 1
    for same in (bytes_, bytes_ / 255.0, torch.from_numpy(bytes_).permute(2, 0, 1), pixels()):
        torch.testing.assert_close(unit_pictures(same, (64, 64), 3, "image"), expected)
    grey = unit_pictures(picture().convert("L"), (64, 64), 1, "image")
    assert grey.shape == (1, 1, 64, 64)
    torch.testing.assert_close(unit_pictures(grey, (64, 64), 3, "image")[:, 2:], grey)
    holes = torch.where(pixels() > 0.5, -1.0, pixels())
    assert unit_pictures(holes, (64, 64), 3, "image").min() == -1
