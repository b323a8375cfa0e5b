"""Learned words: files in all layouts, against diffusers, and taken back without a trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TEXT_CHANNELS
from safetensors.torch import save_file
from torch import Tensor

import fewstep
from fewstep import CheckpointError, RequestError, StableDiffusionPipeline
from fewstep.pipelines.textual_inversion import TextualInversionLoader, expanded

pytestmark = pytest.mark.filterwarnings("ignore")


def vectors(count: int, seed: int = 0, channels: int = TEXT_CHANNELS) -> Tensor:
    return 0.05 * torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pipe(sd_folder: Path) -> Any:
    return loaded(fewstep, sd_folder)


def loaded(library: Any, folder: Path) -> Any:
    pipe = library.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, prompt: str = "a <cat> dog", **arguments: Any) -> Tensor:
    asked = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0)}
    found: Tensor = pipe(prompt, **(asked | arguments), output_type="latent").images
    return found


LAYOUTS: dict[str, tuple[dict[str, Tensor], str | None]] = {
    "diffusers, one vector": ({"<cat>": vectors(1)[0]}, None),
    "diffusers, three vectors": ({"<cat>": vectors(3)}, None),
    "diffusers, renamed": ({"<other>": vectors(2)}, "<cat>"),
    "a1111": ({"emb_params": vectors(2)}, "<cat>"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pictures_equal_diffusers(layout: str, sd_folder: Path, tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    state, token = LAYOUTS[layout]
    save_file(state, tmp_path / "learned_embeds.safetensors")
    theirs, ours = (loaded(library, sd_folder) for library in (diffusers, fewstep))
    plain = latents(ours)
    for pipe in (theirs, ours):
        pipe.load_textual_inversion(str(tmp_path), token=token)
    for prompt in ("a <cat> dog", "<cat>, red <cat> ", "a dog"):
        found = latents(ours, prompt, negative_prompt="red <cat>")
        expected = latents(theirs, prompt, negative_prompt="red <cat>")
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (latents(ours) - plain).abs().max() > 1e-3


@pytest.fixture(params=["file", "folder", "dict", "tensor"])
def given(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Any, dict[str, Any]]]:
    state = {"emb_params": vectors(2)}
    save_file(state, tmp_path / "<cat>.safetensors")
    yield {
        "file": (tmp_path / "<cat>.safetensors", {}),
        "folder": (tmp_path, {"weight_name": "<cat>.safetensors"}),
        "dict": (state, {"token": "<cat>"}),
        "tensor": (vectors(2), {"token": "<cat>"}),
    }[request.param]


def test_every_place_gives_the_same_word(pipe: Any, given: tuple[Any, dict[str, Any]]) -> None:
    place, arguments = given
    pipe.load_textual_inversion(place, **arguments)
    tokens = pipe.tokenizer.convert_tokens_to_ids(["<cat>", "<cat>_1"])
    rows = pipe.text_encoder.get_input_embeddings().weight[tokens]
    assert torch.equal(rows.detach(), vectors(2))
    assert pipe.text_encoder.config.vocab_size == len(pipe.tokenizer)


def test_unloading_leaves_no_trace(pipe: Any) -> None:
    weight = pipe.text_encoder.get_input_embeddings().weight.detach().clone()
    ids, before = pipe.tokenizer("a <cat> dog").input_ids, latents(pipe)
    pipe.load_textual_inversion({"<cat>": vectors(2)})
    pipe.load_textual_inversion({"<sun>": vectors(1, 1)})
    both = latents(pipe, "<sun>")
    pipe.unload_textual_inversion("<cat>")
    assert torch.equal(latents(pipe), before)
    torch.testing.assert_close(latents(pipe, "<sun>"), both, rtol=0, atol=1e-6)
    pipe.unload_textual_inversion()
    assert pipe.tokenizer("a <cat> dog").input_ids == ids
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, weight)
    assert pipe.text_encoder.config.vocab_size == len(weight)
    assert torch.equal(latents(pipe), before)
    with pytest.raises(RequestError, match="no '<cat>' was loaded; loaded: none"):
        pipe.unload_textual_inversion("<cat>")


def test_rows_without_a_token_come_back(pipe: Any) -> None:
    embedding = pipe.text_encoder.get_input_embeddings()
    embedding.weight = torch.nn.Parameter(torch.cat([embedding.weight.detach(), vectors(2, 9)]))
    before = embedding.weight.detach().clone()
    pipe.load_textual_inversion({"<cat>": vectors(3)})
    assert len(pipe.text_encoder.get_input_embeddings().weight) == len(before) + 1
    pipe.load_textual_inversion({"<sun>": vectors(1, 1)})
    pipe.unload_textual_inversion()
    assert torch.equal(pipe.text_encoder.get_input_embeddings().weight, before)


def test_several_words_at_once(pipe: Any) -> None:
    pipe.load_textual_inversion([{"a1": vectors(1)}, {"b1": vectors(1, 1)}], token=["<a>", "<b>"])
    pipe.load_textual_inversion(vectors(2, 2), token=["<c>", "<d>"])
    known = pipe.tokenizer.get_vocab()
    assert {"<a>", "<b>", "<c>", "<d>"} <= known.keys() and "<c>_1" not in known


def test_a_word_of_several_vectors_takes_as_many_tokens(pipe: Any) -> None:
    pipe.load_textual_inversion({"<Cat>": vectors(3)})
    pipe.load_textual_inversion({"<Cat>s": vectors(1, 1)})
    text = "a <cat>, (<Cat>s) <cat>_1"
    converted = expanded(pipe.tokenizer, text)
    assert converted == "a <Cat> <Cat>_1 <Cat>_2, (<Cat>s) <cat>_1"
    assert pipe.maybe_convert_prompt([text, "a dog"], pipe.tokenizer) == [converted, "a dog"]


def test_weighted_prompts_know_the_words(pipe: Any) -> None:
    pipe.load_textual_inversion({"<cat>": vectors(2)})
    plain = latents(pipe)
    assert torch.equal(latents(pipe, "a (<cat>:1.0) dog", weighted_prompt=True), plain)
    assert not torch.equal(latents(pipe, "a (<cat>:1.4) dog", weighted_prompt=True), plain)


def test_a_saved_pipeline_knows_its_words(pipe: Any, tmp_path: Path) -> None:
    pipe.load_textual_inversion({"<cat>": vectors(2)})
    pipe.save_pretrained(tmp_path)
    assert torch.equal(latents(loaded(fewstep, tmp_path)), latents(pipe))


class Two(TextualInversionLoader):
    """Two text encoders, as SDXL has them, the second one wider."""

    def __init__(self, tokenizer: Any, text_encoder: Any) -> None:
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        config = text_encoder.config.to_dict() | {"hidden_size": 48, "eos_token_id": 2}
        self.tokenizer, self.text_encoder = copy.deepcopy((tokenizer, text_encoder))
        self.tokenizer_2 = copy.deepcopy(tokenizer)
        torch.manual_seed(1)
        second = CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config))
        self.text_encoder_2 = second.eval()


@pytest.fixture
def two(tokenizer: Any, text_encoder: Any) -> Two:
    return Two(tokenizer, text_encoder)


def test_sdxl_files_reach_both_text_encoders(two: Two, tmp_path: Path) -> None:
    state = {"clip_l": vectors(2), "clip_g": vectors(2, 1, 48)}
    save_file(state, tmp_path / "style.safetensors")
    two.load_textual_inversion(tmp_path / "style.safetensors")
    for tokenizer, encoder, key in (
        (two.tokenizer, two.text_encoder, "clip_l"),
        (two.tokenizer_2, two.text_encoder_2, "clip_g"),
    ):
        rows = encoder.get_input_embeddings().weight[
            tokenizer.convert_tokens_to_ids(["style", "style_1"])
        ]
        assert torch.equal(rows.detach(), state[key])
    two.unload_textual_inversion("style")
    assert "style" not in two.tokenizer.get_vocab() | two.tokenizer_2.get_vocab()


def test_one_of_two_text_encoders_is_named(two: Two) -> None:
    with pytest.raises(RequestError, match="for one text encoder, and the pipeline has two"):
        two.load_textual_inversion(vectors(1), token="<cat>")
    second = {"tokenizer": two.tokenizer_2, "text_encoder": two.text_encoder_2}
    two.load_textual_inversion(vectors(1, 0, 48), token="<cat>", **second)
    assert "<cat>" in two.tokenizer_2.get_vocab() and "<cat>" not in two.tokenizer.get_vocab()
    two.unload_textual_inversion(**second)
    assert "<cat>" not in two.tokenizer_2.get_vocab()


@torch.no_grad()
def test_a_text_is_summed_up_at_its_end_whatever_was_learned(two: Two) -> None:
    second = {"tokenizer": two.tokenizer_2, "text_encoder": two.text_encoder_2}

    def pooled(text: str) -> tuple[Tensor, Tensor]:
        ids = two.tokenizer_2(text, return_tensors="pt").input_ids
        found = two.text_encoder_2(ids)
        return found.text_embeds, two.text_encoder_2.text_projection(found.last_hidden_state[:, -1])

    plain = pooled("a red dog")[0]
    two.load_textual_inversion(vectors(1, 0, 48), token="<cat>", **second)
    torch.testing.assert_close(pooled("a red dog")[0], plain)
    torch.testing.assert_close(*pooled("a <cat> dog"))


@pytest.mark.parametrize(
    ("given", "arguments", "error", "message"),
    [
        ({"emb_params": vectors(1)}, {}, RequestError, "token is missing"),
        (vectors(1), {"token": "do"}, RequestError, "token='do' is in the vocabulary"),
        (vectors(1), {"token": "two words"}, RequestError, "one word without spaces"),
        (vectors(1), {"token": ["<a>", "<b>"]}, RequestError, "holds 2 names.*one embedding"),
        ([vectors(1)] * 2, {"token": ["<a>"] * 2}, RequestError, "'<a>' is given twice"),
        (vectors(1, 0, 48), {"token": "<a>"}, CheckpointError, "48 channels, but .* has 32"),
        ({"a": vectors(1), "b": vectors(1)}, {}, CheckpointError, "no textual inversion.* a, b"),
        (
            {"clip_l": vectors(1), "clip_g": vectors(1)},
            {"token": "<a>"},
            RequestError,
            "for text_encoder_2, which the pipeline does not have",
        ),
        ("words.pt", {}, CheckpointError, "not a safetensors file: pickled"),
        ("folder", {"weight_name": "words.bin"}, CheckpointError, "not a safetensors file: pickl"),
        ({"<a>": vectors(1)}, {"tokenizer": 1}, RequestError, "give both, or neither"),
    ],
)
def test_what_cannot_be_learned_is_refused(
    pipe: Any, given: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    count = len(pipe.tokenizer)
    with pytest.raises(error, match=message):
        pipe.load_textual_inversion(given, **arguments)
    assert len(pipe.tokenizer) == count


def test_words_are_taken_once(pipe: Any) -> None:
    pipe.load_textual_inversion({"<cat>": vectors(2)})
    with pytest.raises(RequestError, match=r"token='<cat>' is in the vocabulary already"):
        pipe.load_textual_inversion({"<cat>": vectors(1)})
    with pytest.raises(RequestError, match=r"token='<cat>_1' is in the vocabulary"):
        pipe.load_textual_inversion({"<cat>_1": vectors(1)})
    assert isinstance(pipe, StableDiffusionPipeline)
