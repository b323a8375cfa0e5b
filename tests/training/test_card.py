"""Model cards say what was done, and recipes are complete."""

from __future__ import annotations

import re
from typing import Any

import pytest
from tiny_runs import (
    LORA,
    recipe,
)

from fewstep.training.card import card
from fewstep.training.checks import check_settings
from fewstep.training.config import load_recipe, recipe_names


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, ["network: omega = guidance_scale - 1 was 3 to 15", "give `guidance_scale` 4 to 16"]),
        (
            {"endpoint": "phases", "solver_guidance": False, "guidance_dim": 0},
            ["in 4 steps", "PCM"],
        ),
        ({"lora": LORA}, ["tags: [latent-consistency-model, text-to-image, lora]", "rank 3"]),
        (
            {"lora": LORA, "unet": "x/unet"},
            ["unet = UNet2DConditionModel.from_pretrained('x/unet')"],
        ),
        ({"method": "fine_tuning", "target": "stopgrad"}, ["LCF", "target stop-gradient"]),
        (
            {"base": "embedded", "lora": LORA},
            ["EMBEDDED, LCMScheduler", "from_pretrained(EMBEDDED)"],
        ),
        ({"base": "embedded-teacher", "lora": LORA}, ["pipe = embedded_teacher()"]),
        (
            {"base": "{folder}/teacher/pipeline", "vae": "{folder}/vae"},
            ["`runs/tiny/teacher/pipeline`", "autoencoder `runs/tiny/vae`"],
        ),
    ],
)
def test_cards_say_what_was_done(settings: dict[str, Any], words: list[str]) -> None:
    given = recipe("stabilityai/stable-diffusion-xl-base-1.0", **settings)
    text = card(given, name="my-model", embedded=not {"lora", "guidance_dim"} & settings.keys())
    for word in (*words, "7 steps of 4 samples", "# tiny", "guidance_scale="):
        assert word in text
    compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "card", "exec")


def test_the_card_of_a_style_speaks_of_no_consistency_model_and_draws_in_the_sheets_steps() -> None:
    sheet = {"prompts": ["a cat"], "steps": [10, 25]}
    style = {"method": "denoising", "lora": LORA, "target": "stopgrad", "guidance_dim": 0}
    text = card(recipe("a/b", sheet=sheet, **style), name="my-model", embedded=False)
    assert "num_inference_steps=25" in text and "tags: [text-to-image, lora]" in text
    assert not any(word in text for word in ("grid of", "distance", "target"))


def test_a_card_names_licence_base_and_counts() -> None:
    given = recipe("stable-diffusion-v1-5/stable-diffusion-v1-5")
    text = card(given, name="a/b", embedded=True, counts={"kept": 1200, "unreadable": 3}, steps=5)
    assert "license: creativeml-openrail-m\nbase_model: stable-diffusion-v1-5/" in text
    assert "pictures (kept: 1,200, unreadable: 3)." in text
    assert "5 steps of 4 samples" in text
    unknown = card(recipe("/some/folder"), name="a", embedded=True)
    assert "license:" not in unknown and "base_model:" not in unknown


# ── recipes ──

STABLE_DIFFUSION = [name for name in recipe_names() if re.match("(lcm|lcf|pcm|tcd)_", name)]


def test_there_is_a_recipe_for_each_method_and_model() -> None:
    assert len(STABLE_DIFFUSION) >= 12


@pytest.mark.parametrize("name", STABLE_DIFFUSION)
def test_the_recipes_of_stable_diffusion_parse_and_agree_with_their_names(name: str) -> None:
    found = load_recipe(name)
    settings: Any = found.settings
    check_settings(settings)
    assert found.phase == "consistency"
    assert found.folder == f"runs/{name}"
    assert found.run.batch % found.run.accumulate == 0
    assert ("lora" in name) == (settings.lora is not None)
    assert ("sd15" in name) == (found.data.resolution == 512)
    assert name.startswith("lcf") == (settings.method == "fine_tuning")
    assert settings.endpoint == {"pcm": "phases", "tcd": "sampled"}.get(name[:3], "zero")
    text = card(found, name=name, embedded=settings.guidance_dim > 0)
    compile(re.findall(r"```python\n(.*?)```", text, re.DOTALL)[0], "card", "exec")


@pytest.mark.parametrize("name", ["lcm_xl_pokemon_blip", "lcm_xl_lora_pokemon_blip"])
def test_diffengines_recipes_have_its_numbers(name: str) -> None:
    found = load_recipe(name)
    settings: Any = found.settings
    assert found.run.batch * found.run.steps == 50 * 2 * 417  # epochs, batch, batches an epoch
    assert found.optimizer.lr == (1e-5 if settings.lora else 1e-6)
    assert found.data.path == "lambdalabs/pokemon-blip-captions"
    assert settings.vae == "madebyollin/sdxl-vae-fp16-fix"
    assert settings.lora is None or (settings.lora.rank, settings.lora.alpha) == (8, 8.0)
