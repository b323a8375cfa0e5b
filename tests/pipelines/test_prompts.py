"""Weighted and long prompts: what they are read as, and what they must leave alone."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import NOISE, TEXT_CHANNELS, UNET, VAE
from torch import Tensor

from fewstep import (
    AutoencoderKL,
    DDIMScheduler,
    RequestError,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from fewstep.pipelines.prompts import parse
from fewstep.pipelines.request import Request

UP, DOWN = 1.1, 1 / 1.1


@pytest.mark.parametrize(
    ("text", "sections"),
    [
        ("", [[]]),
        ("a cat", [[("a cat", 1)]]),
        ("a (cat)", [[("a ", 1), ("cat", UP)]]),
        ("((cat))", [[("cat", UP * UP)]]),
        ("[cat]", [[("cat", DOWN)]]),
        ("a (red cat:1.3) b", [[("a ", 1), ("red cat", 1.3), (" b", 1)]]),
        ("(a (b:2) c:0.5)", [[("a ", 0.5), ("b", 1), (" c", 0.5)]]),
        ("([a])", [[("a", UP * DOWN)]]),
        (r"a \(cat\) \[b\]", [[("a (cat) [b]", 1)]]),
        (r"(a \(b\):1.2)", [[("a (b)", 1.2)]]),
        ("a: b :) Bob", [[("a: b :) Bob", 1)]]),
        ("time 10:30)", [[("time 10:30)", 1)]]),
        ("(a: b)", [[("a: b", UP)]]),
        ("a (cat", [[("a ", 1), ("cat", UP)]]),
        ("cat)s", [[("cat)s", 1)]]),
        ("(c:1.0)at", [[("cat", 1)]]),
        ("a BREAK b", [[("a ", 1)], [(" b", 1)]]),
        ("(a BREAK b:2)", [[("a ", 2)], [(" b", 2)]]),
        ("BREAKFAST aBREAK", [[("BREAKFAST aBREAK", 1)]]),
        ("back\\slash", [[("back\\slash", 1)]]),
    ],
)
def test_texts_are_parted_by_weight(text: str, sections: list[list[tuple[str, float]]]) -> None:
    found = parse(text)
    assert [[piece.text for piece in section] for section in found] == [
        [text for text, _ in section] for section in sections
    ]
    weights = [piece.weight for section in found for piece in section]
    assert weights == pytest.approx([weight for section in sections for _, weight in section])


@pytest.fixture(scope="module")
def sd(sd_folder: Path) -> Any:
    pipe = StableDiffusionPipeline.from_pretrained(sd_folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def xl(tokenizer: Any, text_encoder: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    torch.manual_seed(3)
    stored = text_encoder.config.to_dict() | {"projection_dim": 32}
    unet = UNET | {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80,
        "cross_attention_dim": 2 * TEXT_CHANNELS,
    }
    pipe = StableDiffusionXLPipeline(
        vae=AutoencoderKL(**VAE),
        text_encoder=text_encoder,
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig.from_dict(stored)).eval(),
        tokenizer=tokenizer,
        tokenizer_2=copy.deepcopy(tokenizer),
        unet=UNet2DConditionModel(**unet),
        scheduler=DDIMScheduler(**NOISE),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def weighed(pipe: Any, prompt: Any, **arguments: Any) -> Request:
    found: Request = pipe.weighed(Request(prompt=prompt, weighted_prompt=True, **arguments))
    return found


def embeds(pipe: Any, prompt: Any, **arguments: Any) -> Tensor:
    found = weighed(pipe, prompt, **arguments).prompt_embeds
    assert found is not None
    return found


def latents(pipe: Any, prompt: Any, **arguments: Any) -> Tensor:
    asked = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    found: Tensor = pipe(prompt, **(asked | arguments), output_type="latent").images
    return found


@pytest.mark.parametrize("name", ["sd", "xl"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"clip_skip": 1},
        {"guidance_scale": 1.0},
        {"negative_prompt": "a dog"},
        {"num_images_per_prompt": 2},
    ],
)
def test_weights_of_one_change_nothing(
    name: str, arguments: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(name)
    plain = latents(pipe, "a red cat", **arguments)
    for prompt in ("a red cat", "a (red:1) cat", "a red (cat:1.0)"):
        found = latents(pipe, prompt, weighted_prompt=True, **arguments)
        assert torch.equal(found, plain), prompt
    changed = latents(pipe, "a (red:1.5) cat", weighted_prompt=True, **arguments)
    assert (changed - plain).abs().max() > 1e-4


def test_without_the_argument_brackets_are_text(sd: Any) -> None:
    one, other = latents(sd, "a (red:1.5) cat"), latents(sd, "a red cat")
    assert not torch.equal(one, other)
    assert torch.equal(one, latents(sd, r"a \(red:1.5\) cat", weighted_prompt=True))


def test_a_weight_multiplies_its_token_and_the_mean_is_restored(sd: Any) -> None:
    pipe = copy.copy(sd)
    pipe.text_encoder = copy.deepcopy(sd.text_encoder)
    pipe.text_encoder.final_layer_norm.bias.data -= 0.5  # a mean, as trained encoders have one
    plain, found = embeds(pipe, "a red cat")[0], embeds(pipe, "a (red:1.5) cat")[0]
    assert float(found.mean()) == pytest.approx(float(plain.mean()), abs=1e-6)
    ratios = (found / plain).median(dim=1).values
    others = torch.cat([ratios[:2], ratios[3:]])
    torch.testing.assert_close(others, others[:1].expand_as(others))
    assert float(ratios[2] / ratios[0]) == pytest.approx(1.5, rel=1e-4)
    assert 1 / 1.5 < ratios[0] < 0.99


@pytest.mark.parametrize("prompt", ["a (red:1.5) cat", "a (red:0.2) cat", "(a red cat:0)"])
def test_a_mean_of_zero_does_not_blow_up(sd: Any, prompt: str) -> None:
    plain, found = embeds(sd, "a red cat"), embeds(sd, prompt)
    assert plain.mean().abs() < 1e-6  # behind a fresh layer norm
    assert found.isfinite().all() and found[0, 0].norm() < 10.1 * plain[0, 0].norm()


LONG = "a cat a red dog " * 6  # 30 tokens; a chunk holds 14


@pytest.mark.parametrize("name", ["sd", "xl"])
@pytest.mark.parametrize("clip_skip", [None, 1])
def test_the_first_chunk_of_a_long_prompt_equals_the_short_one(
    name: str, clip_skip: int | None, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(name)
    found = embeds(pipe, LONG, clip_skip=clip_skip)
    short = embeds(pipe, " ".join(LONG.split()[:14]), clip_skip=clip_skip)
    assert found.shape[1] == 3 * 16 and short.shape[1] == 16
    torch.testing.assert_close(found[:, :16], short, rtol=0, atol=1e-6)
    second = embeds(pipe, " ".join(LONG.split()[14:28]), clip_skip=clip_skip)
    torch.testing.assert_close(found[:, 16:32], second, rtol=0, atol=1e-6)
    assert (found[:, 16:32] - short).abs().max() > 1e-3


def test_break_begins_a_chunk(sd: Any) -> None:
    found = embeds(sd, "a cat BREAK a dog")
    parts = torch.cat([embeds(sd, "a cat"), embeds(sd, "a dog")], dim=1)
    torch.testing.assert_close(found, parts, rtol=0, atol=1e-6)
    assert embeds(sd, "BREAK a cat BREAK").shape[1] == 16  # empty chunks are left out


def test_a_long_prompt_is_read_to_its_end(sd: Any) -> None:
    whole = latents(sd, LONG, weighted_prompt=True)
    assert not torch.allclose(whole, latents(sd, LONG + "red", weighted_prompt=True), atol=1e-5)
    with pytest.warns(UserWarning, match="cut off"):
        cut = latents(sd, LONG)
    with pytest.warns(UserWarning, match="cut off"):
        assert torch.equal(cut, latents(sd, LONG + "red"))


@pytest.mark.parametrize("name", ["sd", "xl"])
@pytest.mark.parametrize(("prompt", "negative"), [(LONG, "a dog"), ("a cat", LONG), (LONG, None)])
def test_prompt_and_negative_prompt_get_as_many_chunks(
    name: str, prompt: str, negative: str | None, request: pytest.FixtureRequest
) -> None:
    pipe = request.getfixturevalue(name)
    found = weighed(pipe, [prompt, "a cat"], negative_prompt=negative)
    assert found.prompt_embeds is not None and found.prompt_embeds.shape[:2] == (2, 48)
    if found.negative_prompt_embeds is not None:  # SDXL takes zeros for no negative prompt
        assert found.negative_prompt_embeds.shape == found.prompt_embeds.shape
    assert (found.negative_prompt_embeds is None) == (name == "xl" and negative is None)
    empty = embeds(pipe, "")
    rest = embeds(pipe, ["a cat", LONG])[:1, 16:]
    torch.testing.assert_close(rest, torch.cat([empty, empty], dim=1), rtol=0, atol=1e-6)
    latents(pipe, prompt, negative_prompt=negative, weighted_prompt=True)


def test_sdxl_sums_up_the_first_chunk(xl: Any) -> None:
    long, short = weighed(xl, LONG), weighed(xl, " ".join(LONG.split()[:14]))
    assert long.pooled_prompt_embeds is not None
    torch.testing.assert_close(
        long.pooled_prompt_embeds, short.pooled_prompt_embeds, rtol=0, atol=1e-6
    )
    both = weighed(xl, "a cat", prompt_2=LONG)
    assert both.prompt_embeds is not None and both.prompt_embeds.shape[1] == 48
    assert latents(xl, "a cat", prompt_2="a (dog:1.2)", weighted_prompt=True).isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": None, "prompt_embeds": torch.zeros(1, 16, 32)}, "cannot read prompt_embeds"),
        (
            {"negative_prompt_embeds": torch.zeros(1, 16, 32)},
            "cannot read negative_prompt_embeds",
        ),
        ({"weighted_prompt": "yes"}, "weighted_prompt must be True or False"),
        ({"prompt": "a <lora:style:0.8> cat"}, "'<lora:style:0.8>'.*load_lora_weights"),
        ({"prompt": "a [cat:dog:0.5]"}, r"'\[cat:dog:0.5\]', which is not supported"),
        ({"prompt": "a [cat|dog]"}, r"'\[cat\|dog\]', which is not supported"),
    ],
)
def test_what_cannot_be_read_is_refused(sd: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        sd(**({"prompt": "a cat", "weighted_prompt": True} | arguments))
