from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_tokenizer
from PIL import Image

from fewstep.errors import CheckpointError, RequestError
from fewstep.evaluation.clip_score import ClipScore
from fewstep.evaluation.judges import Judges

SIZE = 16
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIPModel for pictures of 16 pixels."""
    from transformers import CLIPConfig, CLIPModel

    folder = write_tokenizer(tmp_path_factory.mktemp("clip") / "model")
    tower = {"hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2}
    tower["num_attention_heads"] = 4
    config = CLIPConfig(
        text_config=tower
        | {
            "vocab_size": 300,
            "max_position_embeddings": 16,
            "eos_token_id": 195,
            "bos_token_id": 194,
        },
        vision_config=tower | {"image_size": SIZE, "patch_size": 8},
        projection_dim=24,
    )
    torch.manual_seed(5)
    CLIPModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def score(folder: Path) -> ClipScore:
    return ClipScore.load(str(folder))


def test_the_score_is_the_cosine_that_the_model_gives(score: ClipScore, folder: Path) -> None:
    from transformers import CLIPModel, CLIPTokenizer

    pictures = np.random.default_rng(0).integers(0, 256, (3, SIZE, SIZE, 3)).astype(np.uint8)
    texts = ["a red cat", "dog", "a " * 40]
    model, tokenizer = (k.from_pretrained(folder) for k in (CLIPModel, CLIPTokenizer))
    mean, std = torch.tensor([MEAN, STD])
    pixels = ((torch.tensor(pictures) / 255 - mean) / std).permute(0, 3, 1, 2)
    for row, text in enumerate(texts):
        tokens = tokenizer([text], truncation=True, return_tensors="pt")
        with torch.no_grad():
            said = model(pixel_values=pixels[row : row + 1], **tokens)
        cosine = torch.nn.functional.cosine_similarity(said.image_embeds, said.text_embeds)
        expected = max(100 * float(cosine), 0.0)
        assert score(pictures, texts)[row] == pytest.approx(expected, abs=1e-3)
    assert len(set(score(pictures, texts).tolist())) == 3


def test_pictures_are_scaled_by_their_shorter_side_and_cut(score: ClipScore) -> None:
    wide = np.zeros((1, 2 * SIZE, 4 * SIZE, 3), np.uint8)
    wide[:, :, SIZE : 3 * SIZE] = 200  # the middle square
    image = Image.fromarray(wide[0]).resize((2 * SIZE, SIZE), Image.Resampling.BICUBIC)
    cut = np.asarray(image.crop((SIZE // 2, 0, SIZE // 2 + SIZE, SIZE)))[None]
    assert score(wide, ["dog"]) == pytest.approx(score(cut, ["dog"]), abs=1e-4)


def test_it_names_its_weights(score: ClipScore, folder: Path) -> None:
    assert score.source == f"{folder}, weights {score.origin}, 16 px by PIL BICUBIC, centre crop"
    assert len(score.origin) == 12


def test_what_is_no_clip_model_is_refused(folder: Path, lcm_folder: Path, tmp_path: Path) -> None:
    from transformers import CLIPModel

    with pytest.raises(CheckpointError, match=r"CLIP model .*none: .*; give a folder or a hub"):
        ClipScore.load(str(tmp_path / "none"))
    with pytest.raises(CheckpointError, match="is a clip_text_model, not a CLIPModel"):
        ClipScore.load(str(lcm_folder / "text_encoder"))
    cut: Any = CLIPModel.from_pretrained(folder)
    state = {k: v for k, v in cut.state_dict().items() if k != "text_projection.weight"}
    cut.save_pretrained(tmp_path / "cut", state_dict=state)
    with pytest.raises(CheckpointError, match=r"has no text_projection\.weight"):
        ClipScore.load(str(tmp_path / "cut"))


def test_texts_and_pictures_must_pair_up(score: ClipScore) -> None:
    with pytest.raises(RequestError, match="1 pictures, but 2 texts"):
        score(np.zeros((1, 8, 8, 3), np.uint8), ["a", "b"])


def test_it_judges_alone(folder: Path) -> None:
    judges = Judges.load((), clip=str(folder))
    found = judges(np.zeros((2, 8, 8, 3), np.uint8), ["dog", "a cat"])
    assert list(found) == ["clip"] and found["clip"].shape == (2, 1)
    assert [column.label for column in judges.columns()] == ["CLIP score"]
    assert judges.settings["CLIP"].startswith(str(folder))
