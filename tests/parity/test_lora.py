"""LoRAs in whole pipelines: every dialect makes the same picture, and it is diffusers' picture.

Final latents agree to 1e-4 with diffusers (where peft is installed), and bit by bit among dialects.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import UNET
from safetensors.torch import save_file
from torch import Tensor

import fewstep
from fewstep.errors import CheckpointError, RequestError

diffusers = pytest.importorskip("diffusers")
needs_peft = pytest.mark.skipif(
    importlib.util.find_spec("peft") is None, reason="diffusers loads LoRAs with peft only"
)

RANK, ALPHA = 4, 2.0  # alpha / rank is a power of two: folding it into a factor loses no bit
BLOCK = "down_blocks.1.attentions.0.transformer_blocks.0"
ATTENTION = {  # UNet modules that all dialects can name
    f"{BLOCK}.attn1.to_q": (16, 16),
    f"{BLOCK}.attn2.to_k": (16, 32),
    f"{BLOCK}.attn2.to_out.0": (16, 16),
    "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v": (16, 16),
}
CONV = {
    "down_blocks.0.resnets.0.conv1": (8, 8, 3, 3),
    "down_blocks.0.downsamplers.0.conv": (8, 8, 3, 3),
    "down_blocks.1.attentions.0.proj_in": (16, 16, 1, 1),
    "up_blocks.1.resnets.0.conv_shortcut": (8, 24, 1, 1),
    "up_blocks.1.resnets.0.time_emb_proj": (8, 32),
}
TEXT = {
    "encoder.layers.0.self_attn.q_proj": (32, 32),
    "encoder.layers.1.self_attn.out_proj": (32, 32),
    "encoder.layers.1.mlp.fc1": (37, 32),
}
Factors = dict[str, tuple[Tensor, Tensor]]  # module -> (up, down)


def factors(modules: dict[str, tuple[int, ...]], seed: int = 0, size: float = 0.5) -> Factors:
    random = torch.Generator().manual_seed(seed)
    made = {}
    for module, (out, *rest) in modules.items():
        kernel = [1] * len(rest[1:])
        up = torch.randn(out, RANK, *kernel, generator=random) * size
        made[module] = (up, torch.randn(RANK, *rest, generator=random) * size)
    return made


def written(
    made: Factors, name: Callable[[str], str], ends: tuple[str, str], alpha: str | None = None
) -> dict[str, Tensor]:
    """The tensors of a file; without a name for alpha it is folded into the first factor."""
    found = {}
    for module, (up, down) in made.items():
        scale = ALPHA / RANK if alpha is None else 1.0
        found[name(module) + ends[0]] = up * scale
        found[name(module) + ends[1]] = down.clone()
        if alpha is not None:
            found[name(module) + alpha] = torch.tensor(ALPHA)
    return found


def kohya(made: Factors, prefix: str = "lora_unet_") -> dict[str, Tensor]:
    return written(
        made,
        lambda module: prefix + module.replace(".", "_"),
        (".lora_up.weight", ".lora_down.weight"),
        ".alpha",
    )


def sgm(module: str) -> str:
    """The name in the original code of the modules above."""
    for ours, theirs in (
        ("down_blocks.1.attentions.0", "input_blocks.3.1"),
        ("up_blocks.0.attentions.1", "output_blocks.1.1"),
        ("down_blocks.0.resnets.0.conv1", "input_blocks.1.0.in_layers.2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks.2.0.op"),
        ("up_blocks.1.resnets.0.conv_shortcut", "output_blocks.2.0.skip_connection"),
        ("up_blocks.1.resnets.0.time_emb_proj", "output_blocks.2.0.emb_layers.1"),
    ):
        module = module.replace(ours, theirs)
    return module


def old_name(module: str) -> str:
    head, _, layer = module.removesuffix(".0").rpartition(".")
    return f"unet.{head}.processor.{layer}_lora"


DIALECTS: dict[str, Callable[[Factors], dict[str, Tensor]]] = {
    "peft": lambda m: written(m, "unet.{}".format, (".lora_B.weight", ".lora_A.weight")),
    "peft, its own names": lambda m: written(
        m, "base_model.model.{}".format, (".lora_B.weight", ".lora_A.weight")
    ),
    "diffusers": lambda m: written(m, "unet.{}".format, (".lora.up.weight", ".lora.down.weight")),
    "diffusers, with alpha": lambda m: written(
        m, "unet.{}".format, (".lora.up.weight", ".lora.down.weight"), ".lora.alpha"
    ),
    "attention processors": lambda m: written(m, old_name, (".up.weight", ".down.weight")),
    "kohya": kohya,
    "kohya, original names": lambda m: kohya({sgm(k): v for k, v in m.items()}),
    "original names": lambda m: written(
        m, lambda k: f"diffusion_model.{sgm(k)}", (".lora_B.weight", ".lora_A.weight")
    ),
}


@pytest.fixture
def pipe(sd_folder: Path) -> Any:
    found = fewstep.StableDiffusionPipeline.from_pretrained(sd_folder)
    found.set_progress_bar_config(disable=True)
    return found


def latents(pipe: Any, **arguments: Any) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    given = {"prompt": "a cat", "guidance_scale": 3.0, "num_inference_steps": 2} | arguments
    return pipe(**given, generator=generator, output_type="latent").images


def weights(pipe: Any) -> dict[str, Tensor]:
    return {
        f"{part}.{name}": value.clone()
        for part in ("unet", "text_encoder")
        for name, value in getattr(pipe, part).state_dict().items()
    }


def is_restored(pipe: Any, before: dict[str, Tensor]) -> bool:
    return all(torch.equal(before[name], value) for name, value in weights(pipe).items())


def quietly_load(pipe: Any, tensors: Any, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that only the new one is active
        pipe.load_lora_weights(tensors, adapter_name=name)


# ── among dialects ──


def test_all_dialects_of_one_lora_make_the_same_picture(pipe: Any) -> None:
    plain, made = latents(pipe), factors(ATTENTION)
    pictures = {}
    for name, dialect in DIALECTS.items():
        pipe.load_lora_weights(dialect(made))
        pictures[name] = latents(pipe)
        pipe.unload_lora_weights()
    first = pictures["kohya"]
    assert (first - plain).abs().max() > 1e-3
    assert [name for name, found in pictures.items() if not torch.equal(found, first)] == []
    pipe.load_lora_weights({k: v for k, v in kohya(made).items() if not k.endswith("alpha")})
    assert not torch.allclose(latents(pipe), first, atol=1e-4)  # alpha matters


def test_convolutions_are_the_same_in_both_ways_of_naming(pipe: Any) -> None:
    made, pictures = factors(CONV), []
    for dialect in ("kohya", "kohya, original names", "peft"):
        pipe.load_lora_weights(DIALECTS[dialect](made))
        pictures.append(latents(pipe))
        pipe.unload_lora_weights()
    assert torch.equal(pictures[0], pictures[1])
    assert torch.equal(pictures[0], pictures[2])
    assert (pictures[0] - latents(pipe)).abs().max() > 1e-3


def test_lycoris_forms_of_one_delta_make_the_picture_of_a_lora(pipe: Any) -> None:
    made = factors(ATTENTION)
    delta = {k: (up * ALPHA / RANK) @ down for k, (up, down) in made.items()}
    forms = {
        "difference": {"diff": lambda d, up, down: d},
        "loha": {
            "hada_w1_a": lambda d, up, down: up,
            "hada_w1_b": lambda d, up, down: down,
            "hada_w2_a": lambda d, up, down: torch.ones(len(up), RANK) / RANK,
            "hada_w2_b": lambda d, up, down: torch.ones_like(down),
            "alpha": lambda d, up, down: torch.tensor(ALPHA),
        },
        "lokr": {
            "lokr_w1": lambda d, up, down: torch.ones(1, 1),
            "lokr_w2": lambda d, up, down: d,
        },
    }
    pipe.load_lora_weights(kohya(made))
    expected = latents(pipe)
    for form in forms.values():
        pipe.unload_lora_weights()
        pipe.load_lora_weights(
            {
                f"lora_unet_{module.replace('.', '_')}.{part}": make(delta[module], *made[module])
                for module in made
                for part, make in form.items()
            }
        )
        torch.testing.assert_close(latents(pipe), expected, rtol=0, atol=1e-4)


def test_the_text_encoder_takes_its_part(pipe: Any) -> None:
    before, plain, made = weights(pipe), latents(pipe), factors(TEXT)
    files = (
        kohya(made, "lora_te_text_model_"),
        written(
            made,
            "text_encoder.text_model.{}".format,
            (".lora_linear_layer.up.weight", ".lora_linear_layer.down.weight"),
        ),
    )
    pictures = []
    for file in files:
        pipe.load_lora_weights(file)
        assert pipe.get_list_adapters() == {"text_encoder": ["default_0"]}
        pictures.append(latents(pipe))
        pipe.unload_lora_weights()
    assert torch.equal(*pictures)
    assert (pictures[0] - plain).abs().max() > 1e-4
    assert is_restored(pipe, before)


def test_merging_is_the_formula(pipe: Any) -> None:
    made, other = factors(ATTENTION | CONV), factors(ATTENTION, seed=1)
    module = f"{BLOCK}.attn2.to_k"
    base = pipe.unet.get_submodule(module).weight.clone()
    quietly_load(pipe, kohya(made), "a")
    quietly_load(pipe, kohya(other), "b")
    pipe.set_adapters(["a", "b"], [0.5, -2.0])
    products = [up @ down for up, down in (made[module], other[module])]
    expected = base + ALPHA / RANK * (0.5 * products[0] - 2.0 * products[1])
    torch.testing.assert_close(pipe.unet.get_submodule(module).weight, expected)


# ── the state of a pipeline ──


def test_the_weights_come_back_bit_by_bit(pipe: Any) -> None:
    before = weights(pipe)
    file = kohya(factors(ATTENTION | CONV)) | kohya(factors(TEXT), "lora_te_text_model_")
    pipe.load_lora_weights(file, "a")
    merged = weights(pipe)
    assert not is_restored(pipe, before)
    pipe.disable_lora()
    assert is_restored(pipe, before)
    pipe.enable_lora()
    assert is_restored(pipe, merged)
    pipe.set_adapters("a", 0.3)
    pipe.set_adapters("a", 0)
    assert is_restored(pipe, before)
    pipe.set_adapters("a")
    pipe.fuse_lora(lora_scale=0.7, safe_fusing=True)
    assert (pipe.num_fused_loras, pipe.fused_loras) == (1, {"a"})
    pipe.unfuse_lora()
    assert is_restored(pipe, merged)
    pipe.delete_adapters("a")
    assert is_restored(pipe, before)
    assert pipe.get_list_adapters() == {}
    pipe.unload_lora_weights()


def test_what_was_fused_outlives_unloading_until_it_is_unfused(pipe: Any) -> None:
    before = weights(pipe)
    pipe.load_lora_weights(kohya(factors(ATTENTION)), "a")
    pipe.fuse_lora()
    fused = weights(pipe)
    pipe.unload_lora_weights()
    assert is_restored(pipe, fused)
    assert pipe.active_lora_record() == [{"name": "a", "weight": 1.0, "source": None}]
    with pytest.raises(RequestError, match=r"'a' is taken.*unfuse_lora"):
        pipe.load_lora_weights(kohya(factors(ATTENTION)), "a")
    pipe.unfuse_lora()
    assert is_restored(pipe, before)


def test_a_second_adapter_is_active_alone_and_a_warning_says_so(pipe: Any) -> None:
    pipe.load_lora_weights(kohya(factors(ATTENTION)))
    with pytest.warns(UserWarning, match=r"set_adapters\(\['default_0', 'b'\]\)"):
        pipe.load_lora_weights(kohya(factors(CONV)), "b")
    assert pipe.get_active_adapters() == ["b"]
    assert pipe.get_list_adapters() == {"unet": ["default_0", "b"]}
    pipe.set_adapters(["default_0", "b"], 0.5)
    assert [entry["weight"] for entry in pipe.active_lora_record()] == [0.5, 0.5]
    pipe.delete_adapters(["b"])
    assert pipe.get_active_adapters() == ["default_0"]


def test_the_scale_of_a_call_multiplies_and_goes(pipe: Any) -> None:
    pipe.load_lora_weights(kohya(factors(ATTENTION)) | kohya(factors(TEXT), "lora_te_text_model_"))
    whole, merged = latents(pipe), weights(pipe)
    pipe.set_adapters("default_0", 0.5)
    half = latents(pipe)
    pipe.set_adapters("default_0")
    assert not torch.allclose(whole, half, atol=1e-4)
    assert torch.equal(latents(pipe, cross_attention_kwargs={"scale": 0.5}), half)
    assert torch.equal(latents(pipe, cross_attention_kwargs={"scale": 1}), whole)
    none = latents(pipe, cross_attention_kwargs={"scale": 0})
    assert is_restored(pipe, merged)
    pipe.unload_lora_weights()
    assert torch.equal(latents(pipe), none)


def test_an_error_within_a_scaled_call_leaves_the_weights_as_they_were(pipe: Any) -> None:
    pipe.load_lora_weights(kohya(factors(ATTENTION)))
    merged = weights(pipe)

    def fail(*arguments: Any) -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        latents(pipe, cross_attention_kwargs={"scale": 0.5}, callback_on_step_end=fail)
    assert is_restored(pipe, merged)


def test_a_scale_without_a_lora_is_warned_of(pipe: Any) -> None:
    with pytest.warns(UserWarning, match="has no effect: no LoRA is active"):
        latents(pipe, cross_attention_kwargs={"scale": 0.5})


@pytest.mark.parametrize("given", [{"gligen": {}}, {"scale": "much"}, {"scale": 1, "mask": 0}, 0.5])
def test_other_cross_attention_kwargs_are_refused(pipe: Any, given: Any) -> None:
    with pytest.raises(RequestError, match="cross_attention_kwargs"):
        latents(pipe, cross_attention_kwargs=given)


def test_pipelines_that_share_networks_share_adapters(pipe: Any) -> None:
    pipe.load_lora_weights(kohya(factors(ATTENTION)), "a")
    other = fewstep.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.get_active_adapters() == ["a"]
    other.unload_lora_weights()
    assert pipe.get_list_adapters() == {}


# ── what is refused ──


def test_a_file_that_does_not_fit_changes_nothing(pipe: Any) -> None:
    before, good = weights(pipe), kohya(factors(ATTENTION))
    surplus = good | {"lora_unet_nowhere.alpha": torch.tensor(1.0)}
    misshaped = good | kohya(factors({f"{BLOCK}.attn1.to_k": (16, 24)}))
    stranger = kohya(factors({f"{BLOCK}.attn2.to_k": (16, 2048)}))
    for file, message in (
        (surplus, "lora_unet_nowhere.alpha fits no module; strict=False"),
        (misshaped, r"attn1.to_k: it makes a change of shape \(16, 24\), not \(16, 16\)"),
        (stranger, r"this LoRA is for SDXL .*; the model is another \(32 text channels\)"),
        ({"unet.conv_in.weight": torch.zeros(1)}, "holds no LoRA for unet, text_encoder"),
    ):
        with pytest.raises(CheckpointError, match=message):
            pipe.load_lora_weights(file)
    assert is_restored(pipe, before)
    assert pipe.get_list_adapters() == {}
    pipe.load_lora_weights(good)
    expected = weights(pipe)
    pipe.unload_lora_weights()
    with pytest.warns(UserWarning, match="left out.*nowhere"):
        pipe.load_lora_weights(surplus, strict=False)
    assert is_restored(pipe, expected)


def test_mistaken_arguments_are_named(pipe: Any) -> None:
    pipe.load_lora_weights(kohya(factors(ATTENTION)), "a")
    for call, message in (
        (lambda: pipe.load_lora_weights(kohya(factors(ATTENTION)), "a"), "'a' is taken"),
        (lambda: pipe.load_lora_weights({"x": 1}), "must hold tensors by name, got a int"),
        (lambda: pipe.load_lora_weights("x", use_safetensors=False), "use_safetensors=False"),
        (lambda: pipe.set_adapters("b"), "no adapter 'b'; loaded: a"),
        (lambda: pipe.set_adapters(["a"], [1, 2]), "2 weights, but adapter_names 1"),
        (lambda: pipe.set_adapters("a", {"down": 1}), "'down'; the networks are: unet"),
        (lambda: pipe.set_adapters("a", {"unet": {"top": 1}}), "'top'"),
        (lambda: pipe.set_adapters("a", float("nan")), "finite number"),
        (lambda: pipe.delete_adapters("b"), "no adapter 'b'"),
        (lambda: pipe.fuse_lora(components=["vae"]), "components must be among"),
        (lambda: pipe.fuse_lora(components=["text_encoder"]), "nothing to fuse"),
        (lambda: pipe.save_lora_weights("x"), "nothing to write"),
    ):
        with pytest.raises(RequestError, match=message):
            call()
    with pytest.warns(UserWarning, match="'text_encoder'.*has no effect"):
        pipe.set_adapters("a", {"text_encoder": 0.5, "unet": 0.5})


def test_fusing_safely_refuses_weights_that_are_not_finite(pipe: Any) -> None:
    before = weights(pipe)
    pipe.load_lora_weights(kohya(factors(ATTENTION, size=1e30)), "a")
    with pytest.raises(RequestError, match="not finite"):
        pipe.fuse_lora(safe_fusing=True)
    pipe.unload_lora_weights()
    assert is_restored(pipe, before)


# ── files ──


def test_a_saved_lora_is_read_back_from_its_folder(pipe: Any, tmp_path: Path) -> None:
    made = factors(ATTENTION)
    layers = written(made, str, (".lora_B.weight", ".lora_A.weight"))
    for name in layers:
        if name.endswith("lora_B.weight"):
            layers[name] = layers[name] * RANK / ALPHA
    pipe.save_lora_weights(
        tmp_path, unet_lora_layers=layers, unet_lora_adapter_metadata={"lora_alpha": ALPHA}
    )
    pipe.load_lora_weights(tmp_path, "a")
    assert pipe.active_lora_record() == [{"name": "a", "weight": 1.0, "source": str(tmp_path)}]
    found = latents(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(kohya(made))
    assert torch.equal(latents(pipe), found)


def test_pefts_own_folder_is_read_with_its_config(pipe: Any, tmp_path: Path) -> None:
    made = factors(ATTENTION)
    layers = DIALECTS["peft, its own names"](
        {k: (u * RANK / ALPHA, d) for k, (u, d) in made.items()}
    )
    save_file(layers, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": ALPHA, "r": RANK}))
    pipe.load_lora_weights(str(tmp_path))
    found = latents(pipe)
    pipe.unload_lora_weights()
    pipe.load_lora_weights(kohya(made))
    assert torch.equal(latents(pipe), found)


def test_guides_find_the_methods_under_their_names() -> None:
    from fewstep import loaders

    for name in loaders.__all__:
        assert issubclass(fewstep.StableDiffusionPipeline, getattr(loaders, name))


# ── with diffusers ──


@pytest.fixture
def theirs(sd_folder: Path) -> Any:
    found = diffusers.StableDiffusionPipeline.from_pretrained(sd_folder, safety_checker=None)
    found.set_progress_bar_config(disable=True)
    return found


def assert_same(theirs: Any, pipe: Any, plain: Tensor, **arguments: Any) -> None:
    expected = latents(theirs, **arguments)
    torch.testing.assert_close(latents(pipe, **arguments), expected, rtol=0, atol=1e-4)
    assert (expected - plain).abs().max() > 1e-3


@needs_peft
@pytest.mark.filterwarnings("ignore")
def test_adapters_their_weights_and_scales_are_diffusers(theirs: Any, pipe: Any) -> None:
    plain = latents(pipe)
    both = (theirs, pipe)
    for found in both:
        quietly_load(found, kohya(factors(ATTENTION | CONV, size=0.4)), "a")
    assert_same(theirs, pipe, plain)
    assert_same(theirs, pipe, plain, cross_attention_kwargs={"scale": 0.5})
    made = DIALECTS["peft"](factors(ATTENTION, seed=1))
    for found in both:
        quietly_load(found, copy.copy(made), "b")
    assert pipe.get_active_adapters() == theirs.get_active_adapters() == ["b"]
    assert pipe.get_list_adapters() == theirs.get_list_adapters()
    assert_same(theirs, pipe, plain)
    by_block = {"unet": {"down": 0.2, "mid": 0.5, "up": {"block_0": [0.5, 2.0]}}}
    for names, given in (
        (["a", "b"], None),
        (["a", "b"], [0.3, -0.8]),
        (["a"], 0.5),
        (["a", "b"], [by_block, 1.0]),
    ):
        for found in both:
            found.set_adapters(names, adapter_weights=given)
        assert_same(theirs, pipe, plain)
    for found in both:
        found.fuse_lora(components=["unet"], lora_scale=0.7, adapter_names=["a"])
    assert pipe.num_fused_loras == theirs.num_fused_loras
    for found in both:
        found.unload_lora_weights()
    assert_same(theirs, pipe, plain)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dialect", ["diffusers", "attention processors", "kohya"])
def test_a_dialects_picture_is_diffusers(theirs: Any, pipe: Any, dialect: str) -> None:
    plain = latents(pipe)
    for found in (theirs, pipe):
        found.load_lora_weights(DIALECTS[dialect](factors(ATTENTION)))
    assert_same(theirs, pipe, plain)


@needs_peft
@pytest.mark.filterwarnings("ignore")
def test_a_saved_lora_is_diffusers_too(theirs: Any, pipe: Any, tmp_path: Path) -> None:
    plain = latents(pipe)
    layers = written(factors(ATTENTION), str, (".lora_B.weight", ".lora_A.weight"))
    config = {"r": RANK, "lora_alpha": 1, "target_modules": sorted(ATTENTION)}
    pipe.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=config)
    for found in (theirs, pipe):
        found.load_lora_weights(tmp_path)
    assert_same(theirs, pipe, plain)


@needs_peft
@pytest.mark.filterwarnings("ignore")
def test_a_text_encoders_lora_is_diffusers(theirs: Any, pipe: Any) -> None:
    plain, made = latents(pipe), factors(TEXT, size=1.0)
    for found in (theirs, pipe):
        quietly_load(found, kohya(made, "lora_te_text_model_") | kohya(factors(ATTENTION)), "a")
    assert theirs.get_list_adapters() == pipe.get_list_adapters()
    assert_same(theirs, pipe, plain)


@needs_peft
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["lora", "rslora", "dora", "loha", "lokr"])
def test_the_kinds_of_adapters_are_pefts(kind: str) -> None:
    import peft

    from fewstep.checkpoints.lora_formats import names_of_modules, parse_lora
    from fewstep.models.lora import Adapter, adapters_of, targets

    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(36, 8),
        torch.nn.Unflatten(1, (8, 1, 1)),
        torch.nn.Conv2d(8, 6, 3, padding=1),
    )
    common: dict[str, Any] = {"r": 2, "target_modules": ["0", "2"]}
    made: Any
    if kind in ("loha", "lokr"):
        config = peft.LoHaConfig if kind == "loha" else peft.LoKrConfig
        made = config(**common, alpha=1, init_weights=False)
    else:
        flags = {} if kind == "lora" else {f"use_{kind}": True}
        made = peft.LoraConfig(**common, lora_alpha=1, init_lora_weights=False, **flags)
    theirs = peft.get_peft_model(copy.deepcopy(network), made)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.5)
    tensors = peft.get_peft_model_state_dict(theirs)
    stored = json.loads(json.dumps(made.to_dict(), default=sorted))
    names = {"unet": names_of_modules(targets(network))}
    changes, surplus = parse_lora(tensors, stored, names)
    assert surplus == []
    assert set(changes["unet"]) == {"0", "2"}
    x = torch.randn(3, 36)
    plain = network(x)
    adapters = adapters_of(network)
    adapters.loaded, adapters.weights = {"a": Adapter(changes["unet"])}, {"a": 1.0}
    adapters.merge(network)
    expected = theirs(x)
    torch.testing.assert_close(network(x), expected, rtol=1e-4, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


def test_a_motion_lora_reaches_the_motion_modules(pipe: Any) -> None:
    module = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"
    own = module.replace("modules.0.", "modules.0.temporal_transformer.").replace(
        "attn1", "attention_blocks.0.processor"
    )
    ends = ("_lora.up.weight", "_lora.down.weight")
    made = factors({module: (8, 8)})
    with pytest.raises(CheckpointError, match="AnimateDiff"):
        pipe.load_lora_weights(written(made, "unet.{}".format, ends))
    motion = torch.nn.Module()
    motion.transformer_blocks = torch.nn.ModuleList([torch.nn.Module()])
    motion.transformer_blocks[0].attn1 = torch.nn.Module()
    motion.transformer_blocks[0].attn1.to_q = torch.nn.Linear(8, 8)
    pipe.unet.down_blocks[0].motion_modules = torch.nn.ModuleList([motion])
    before, merged = pipe.unet.get_submodule(module).weight.clone(), []
    for name in (module.replace(".to_q", ".processor.to_q"), own):
        pipe.load_lora_weights(written(made, lambda _, name=name: f"unet.{name}", ends))
        merged.append(pipe.unet.get_submodule(module).weight.clone())
        pipe.unload_lora_weights()
    up, down = made[module]
    torch.testing.assert_close(merged[0], before + ALPHA / RANK * up @ down)
    assert torch.equal(*merged)


def test_an_sdxl_file_reaches_all_three_networks(pipe: Any) -> None:
    from transformers import CLIPTextModelWithProjection

    from fewstep.pipelines.lora import LoraLoader

    second = CLIPTextModelWithProjection(pipe.text_encoder.config)

    class Networks(LoraLoader):
        components = {  # type: ignore[assignment] # noqa: RUF012
            "unet": fewstep.UNet2DConditionModel(**UNET),
            "text_encoder": pipe.text_encoder,
            "text_encoder_2": second,
        }

    networks = Networks()
    unet = kohya({sgm(k): v for k, v in factors(ATTENTION).items()})
    first = kohya(factors(TEXT), "lora_te1_text_model_")
    other = kohya(factors(TEXT), "lora_te2_text_model_")
    networks.load_lora_weights(unet | first | other, "style")
    networks.set_adapters("style", {"unet": 0.5, "text_encoder": 1.0, "text_encoder_2": 0.25})
    assert networks.get_list_adapters() == {name: ["style"] for name in Networks.components}
    (entry,) = networks.active_lora_record()
    assert entry["weight"] == {"unet": 0.5, "text_encoder": 1.0, "text_encoder_2": 0.25}
