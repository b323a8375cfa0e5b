"""Files of IP-Adapters, how they hang on a UNet, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from conftest import UNET
from safetensors.torch import save_file
from torch import Tensor

from fewstep import CheckpointError, RequestError, StableDiffusionPipeline, UnsupportedConfig
from fewstep.models.ip_adapter import IPAdapter, Resampler, adapter_of, attach, cross_attentions
from fewstep.models.unet import UNet2DConditionModel

DIM, SEEN = 32, 24
LAYERS = [(32, 16)] * 4  # one down, two up, one in the middle


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET).eval()


def base(layers: int = 4, dim: int = DIM) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    state = {
        "image_proj.proj.weight": random(4 * dim, SEEN),
        "image_proj.proj.bias": random(4 * dim),
        "image_proj.norm.weight": random(dim),
        "image_proj.norm.bias": random(dim),
    }
    for number in range(1, 2 * layers, 2):
        for letter in "kv":
            state[f"ip_adapter.{number}.to_{letter}_ip.weight"] = random(16, dim)
    return state


def nested(state: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    groups: dict[str, dict[str, Tensor]] = {"image_proj": {}, "ip_adapter": {}}
    for key, value in state.items():
        group, _, name = key.partition(".")
        groups[group][name] = value
    return groups


def run(unet: UNet2DConditionModel, *pictures: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    z, text = (torch.randn(*shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 7, DIM)))
    with torch.no_grad():
        return unet(z, 500, text, pictures=pictures).sample


def test_a_file_and_nested_groups_hold_the_same(unet: UNet2DConditionModel) -> None:
    flat, groups = (adapter_of(state, unet, "x") for state in (base(), nested(base())))
    assert list(flat.state_dict()) == list(base())
    for key, value in flat.state_dict().items():
        assert torch.equal(value, groups.state_dict()[key])


def test_diffusers_names_of_a_resampler_are_understood(unet: UNet2DConditionModel) -> None:
    torch.manual_seed(4)
    shape = {"channels": 16, "inner": 128, "mlp": 64, "dim": DIM, "tokens": 5, "depth": 2}
    adapter = IPAdapter(Resampler(SEEN, **shape), LAYERS)
    state = dict(adapter.state_dict())
    renamed: dict[str, Tensor] = {}
    for key, value in state.items():
        for ours, theirs in (
            (".0.norm1.", ".ln0."),
            (".0.norm2.", ".ln1."),
            (".0.to_out.", ".attn.to_out.0."),
            (".0.to_q.", ".attn.to_q."),
            (".0.to_kv.", ".attn.to_kv."),
            (".1.0.", ".ff.0."),
            (".1.1.", ".ff.1.net.0.proj."),
            (".1.3.", ".ff.1.net.2."),
        ):
            if "layers" in key and ours in key:
                key = key.replace(ours, theirs)
                break
        if ".to_kv." in key:
            k, v = value.chunk(2)
            renamed |= {key.replace("to_kv", "to_k"): k, key.replace("to_kv", "to_v"): v}
        else:
            renamed[key] = value
    assert renamed.keys() != state.keys()
    found = adapter_of(renamed, unet, "x").state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_adapters_are_no_part_of_the_unet_but_follow_it(unet: UNet2DConditionModel) -> None:
    names, count = list(unet.state_dict()), unet.num_parameters()
    plain = run(unet)
    adapter = adapter_of(base(), unet, "x")
    attach(unet, [adapter])
    tokens = adapter.tokens(torch.ones(1, 2, SEEN))
    assert tokens.shape == (1, 8, DIM)
    assert list(unet.state_dict()) == names and unet.num_parameters() == count
    UNet2DConditionModel(**UNET).load_state_dict(unet.state_dict(), strict=True)
    assert torch.equal(run(unet), plain)  # without pictures
    assert not torch.allclose(run(unet, tokens), plain, atol=1e-3)
    twin = copy.deepcopy(unet).double()
    assert {p.dtype for p in twin.ip_adapters[0].parameters()} == {torch.float64}
    layer = cross_attentions(twin)[0][1].pictures[0]
    assert layer is twin.ip_adapters[0].ip_adapter["1"]
    assert next(unet.ip_adapters[0].parameters()).dtype == torch.float32
    attach(unet, [])
    assert torch.equal(run(unet), plain)
    with pytest.raises(RequestError, match="tokens for 1 IP-Adapters, but this UNet has 0"):
        run(unet, tokens)


def without(state: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: value for key, value in state.items() if key not in keys}


FACE_ID = {
    "image_proj.proj.0.weight": torch.zeros(64, 32),
    "image_proj.proj.2.weight": torch.zeros(128, 64),
    "image_proj.norm.weight": torch.zeros(32),
}


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        (base(3), CheckpointError, r"ip_adapter\.7\.to_k_ip\.weight is missing.*sd15 or sdxl"),
        (base(5), CheckpointError, r"ip_adapter\.9\.to_k_ip\.weight is surplus"),
        (base(4, 64), CheckpointError, r"has shape \(16, 64\), expected \(16, 32\)"),
        (FACE_ID, UnsupportedConfig, "IP-Adapter FaceID.* not implemented"),
        ({"image_proj.x": torch.zeros(1)}, CheckpointError, "no image projection of a known kind"),
        ({"lora_up.weight": torch.zeros(1)}, CheckpointError, "x is not an IP-Adapter"),
        (
            without(base(), "image_proj.norm.bias"),
            CheckpointError,
            r"image_proj\.norm\.bias is missing",
        ),
    ],
)
def test_files_that_do_not_fit_are_refused(
    unet: UNet2DConditionModel, state: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        adapter_of(state, unet, "x")


# ── pipelines ──


@pytest.fixture(scope="module")
def pipe(sd_folder: Path) -> Any:
    return StableDiffusionPipeline.from_pretrained(sd_folder)


PICTURE = PIL.Image.new("RGB", (32, 32), "red")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"ip_adapter_image": [PICTURE, PICTURE]},
            r"holds 2 pictures, but there are 1 .*\[\[a, b\]\]",
        ),
        ({"ip_adapter_image": "cat.png"}, "must be a PIL picture, an array, or a tensor"),
        ({"ip_adapter_image": PICTURE}, "ip_adapter_image cannot be read: .*image_encoder_folder"),
        (
            {"ip_adapter_image": PICTURE, "ip_adapter_image_embeds": []},
            "ip_adapter_image and ip_adapter_image_embeds were both given",
        ),
        ({"ip_adapter_image_embeds": torch.zeros(2, 1, SEEN)}, "must be a list of tensors"),
        ({"ip_adapter_image_embeds": []}, "holds 0 tensors, but there are 1"),
        (
            {"ip_adapter_image_embeds": [torch.zeros(2, 1, SEEN + 1)]},
            r"must have shape \(rows, pictures, 24\)",
        ),
        (
            {"ip_adapter_image_embeds": [torch.zeros(1, 1, SEEN)]},
            "holds 1 rows, expected 2: the negative half first",
        ),
        (
            {"ip_adapter_image_embeds": [torch.zeros(2, 1, SEEN)], "guidance_scale": 1},
            "holds 2 rows, expected 1: guidance is off",
        ),
    ],
)
def test_picture_prompts_that_cannot_be_read_are_refused(
    pipe: Any, arguments: dict[str, Any], message: str
) -> None:
    pipe.load_ip_adapter(base())
    with pytest.raises(RequestError, match=message):
        pipe("a cat", **arguments)


def test_picture_prompts_need_an_adapter(pipe: Any) -> None:
    pipe.unload_ip_adapter()
    with pytest.raises(RequestError, match="ip_adapter_image needs an IP-Adapter; call load_ip"):
        pipe("a cat", ip_adapter_image=PICTURE)
    with pytest.raises(RequestError, match="call load_ip_adapter first"):
        pipe.set_ip_adapter_scale(1.0)


@pytest.mark.parametrize(
    ("scale", "message"),
    [
        ([1.0, 0.5], "scale holds 2 scales, but there are 1 IP-Adapters"),
        ("much", "scale must be a finite number, got 'much'"),
        ({"left": 1.0}, r"scale names 'left', but the blocks with attention there are: down, up"),
        ({"up": {"block_1": 1.0}}, r"scale\['up'\] names 'block_1', .*: block_0"),
        ({"up": {"block_0": [1.0, 2.0, 3.0]}}, r"holds 3 numbers, but there are 2 attentions"),
        ({"mid": float("nan")}, r"scale\['mid'\] must be a finite number, got nan"),
    ],
)
def test_scales_without_a_meaning_are_refused(pipe: Any, scale: Any, message: str) -> None:
    pipe.load_ip_adapter(base())
    with pytest.raises(RequestError, match=message):
        pipe.set_ip_adapter_scale(scale)


def test_places_without_a_file_are_refused_and_nothing_changes(pipe: Any, tmp_path: Path) -> None:
    pipe.load_ip_adapter(base())
    before = pipe.loaded_ip_adapters
    save_file(base(), tmp_path / "ip.safetensors")
    (tmp_path / "ip.bin").touch()
    for arguments, error, message in (
        ({"weight_name": "ip.bin"}, CheckpointError, "pickled weights run code.*ip.safetensors"),
        ({"weight_name": "no.safetensors"}, CheckpointError, r"there is: ip\.bin, ip\.safetensors"),
        ({}, RequestError, "weight_name is missing"),
        (
            {"weight_name": "ip.safetensors"},
            CheckpointError,
            r"no file model\.safetensors .*'image_encoder'.*image_encoder_folder=None leaves",
        ),
        (
            {"weight_name": ["a", "b"], "subfolder": ["x", "y", "z"]},
            RequestError,
            "weight_name holds 2 entries, expected 1 or 3",
        ),
    ):
        with pytest.raises(error, match=message):
            pipe.load_ip_adapter(tmp_path, **arguments)
    assert pipe.loaded_ip_adapters == before and pipe.image_encoder is None
    pipe.load_ip_adapter(tmp_path, weight_name="ip.safetensors", image_encoder_folder=None)
    assert pipe.loaded_ip_adapters != before and pipe.image_encoder is None
