"""The phases of the emoji model, from sprites to pictures, on twelve concepts and tiny nets."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fewstep import LatentConsistencyModelPipeline, StableDiffusionPipeline
from fewstep.errors import CheckpointError, RequestError
from fewstep.training import load_recipe, train
from fewstep.training.package import package_model
from fewstep.training.phases.text import sentence_embeddings

SPRITES = Path(__file__).parents[1] / "data" / "emoji"
COMMON = [
    f"data.sprites={json.dumps(str(SPRITES))}",
    "data.selection=all",
    "data.size=32",
    "data.scenes=24",
    "run.steps=3",
    "run.batch=4",
    "run.sheet_steps=0",
    "run.precision=fp32",
    "run.device=cpu",
]
TEXT = ["hidden_size=16", "intermediate_size=32", "num_hidden_layers=2", "num_attention_heads=2"]
PHASES = {
    "emoji64_1_autoencoder": [
        "autoencoder.model.block_out_channels=[4, 8, 8]",
        "autoencoder.model.norm_num_groups=4",
    ],
    "emoji64_2_text": ["text.captions=40", "text.model.vocab_size=700"]
    + [f"text.model.{entry}" for entry in TEXT],
    "emoji64_3_teacher": [
        "teacher.model.block_out_channels=[8, 16, 16]",
        "teacher.model.norm_num_groups=4",
        "teacher.model.cross_attention_dim=16",
        "teacher.model.sample_size=8",
    ],
    "emoji64_4_lcm": ["consistency.guidance_dim=16", "data.held_out=4"],
}


@pytest.fixture(scope="module")
def sentence_encoder(tmp_path_factory):
    """A random BERT in the layout of a sentence encoder."""
    from transformers import BertConfig, BertModel, BertTokenizer

    folder = tmp_path_factory.mktemp("sentences")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "apple", "on"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = BertConfig(vocab_size=len(words), num_attention_heads=2, **sizes)
    BertModel(config).save_pretrained(folder)
    return folder


def run(name, folder, *more):
    return train(load_recipe(name, [*COMMON, *PHASES[name], *more]), output=folder)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Encoded scenes go into a folder of this module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWSTEP_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, sentence_encoder):
    folder = tmp_path_factory.mktemp("model")
    for name in PHASES:
        extra = [f"text.sentence_encoder={json.dumps(str(sentence_encoder))}"]
        run(name, folder, *(extra if "text" in name else []))
    return folder


def test_teacher_and_lcm_are_ordinary_checkpoints_that_draw(trained):
    teacher = StableDiffusionPipeline.from_pretrained(trained / "teacher" / "pipeline")
    lcm = LatentConsistencyModelPipeline.from_pretrained(trained / "lcm" / "pipeline")
    for pipe, steps in ((teacher, 3), (lcm, 1)):
        pipe.set_progress_bar_config(disable=True)
        image = pipe("a red apple", num_inference_steps=steps).images[0]
        assert image.size == (32, 32)
    assert teacher.scheduler.config.prediction_type == "v_prediction"
    assert lcm.scheduler.config.prediction_type == "v_prediction"
    assert lcm.unet.config.time_cond_proj_dim == 16


def test_latents_have_about_unit_deviation(trained):
    (latents,) = (trained / "latents").glob("latents-*.npy")
    assert np.load(latents).astype(np.float32).std() == pytest.approx(1, abs=0.3)


def test_a_phase_killed_halfway_and_resumed_gives_the_same_weights(trained, tmp_path, monkeypatch):
    from fewstep.training.phases.teacher import Teacher
    from fewstep.training.report import LossLog

    for part in ("autoencoder", "text", "latents"):
        (tmp_path / part).symlink_to(trained / part)
    monkeypatch.setattr(LossLog, "EVERY", 1)
    whole = trained / "teacher" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    loss = Teacher.loss

    def killed(self, step, part):
        if step == 2:
            raise KeyboardInterrupt
        return loss(self, step, part)

    monkeypatch.setattr(Teacher, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        run("emoji64_3_teacher", tmp_path, "run.checkpoint_minutes=0")
    monkeypatch.setattr(Teacher, "loss", loss)
    run("emoji64_3_teacher", tmp_path)
    resumed = tmp_path / "teacher" / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    assert resumed.read_bytes() == whole.read_bytes()


def test_an_adapter_is_trained_on_the_teacher_and_steers(trained, tmp_path):
    from fewstep import StableDiffusionAdapterPipeline, T2IAdapter

    for part in ("teacher",):
        (tmp_path / part).symlink_to(trained / part)
    changes = [
        "data.held_out=4",
        "adapter.base={folder}/teacher/pipeline",
        "adapter.model.channels=[8, 16, 16]",
        "adapter.sheet.teacher_steps=2",
    ]
    made = load_recipe("emoji64_edges", [*COMMON, *changes, "run.sheet_steps=3"])
    folder = train(made, output=tmp_path)
    assert (folder / "sheet.png").exists()
    adapter = T2IAdapter.from_pretrained(folder / "adapter")
    teacher = StableDiffusionPipeline.from_pretrained(tmp_path / "teacher" / "pipeline")
    pipe = StableDiffusionAdapterPipeline(
        **teacher.components, adapter=adapter, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    drawn = [
        pipe(
            "a red apple",
            image=torch.full((1, 3, 32, 32), value),
            num_inference_steps=2,
            generator=torch.Generator().manual_seed(0),
            output_type="pt",
        ).images
        for value in (0.0, 1.0)
    ]
    assert not torch.equal(*drawn)


def test_other_captions_get_their_own_sentence_embeddings(sentence_encoder, tmp_path):
    one = sentence_embeddings(["a red apple"], str(sentence_encoder), tmp_path)
    other = sentence_embeddings(["on"], str(sentence_encoder), tmp_path)
    assert not np.array_equal(one, other)
    assert np.array_equal(
        one, sentence_embeddings(["a red apple"], str(sentence_encoder), tmp_path)
    )


def test_a_sentence_encoder_without_safetensors_is_refused(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"a pickle")
    with pytest.raises(CheckpointError, match=r"no model\.safetensors in"):
        sentence_embeddings(["a red apple"], str(tmp_path), tmp_path)


def test_missing_sprites_name_the_command(tmp_path):
    recipe = load_recipe("emoji64_1_autoencoder", ["data.sprites=nowhere"])
    with pytest.raises(RequestError, match="fewstep data emoji --output nowhere"):
        train(recipe, output=tmp_path)


def test_a_finished_run_is_packaged_with_card_and_notices(trained, tmp_path):
    folder = package_model(trained, tmp_path / "tiny", figures="| a | b |")
    pipe = LatentConsistencyModelPipeline.from_pretrained(folder)
    assert pipe.unet.dtype == torch.float32
    assert (folder / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size < 2.2 * sum(
        p.numel() for p in pipe.unet.parameters()
    ) + 50_000
    card = (folder / "README.md").read_text()
    assert (folder / "tokenizer" / "vocab.json").exists()
    assert "12 objects" in card
    assert "| a | b |" in card
    assert "Fluent Emoji" in (folder / "NOTICE").read_text()
    with pytest.raises(RequestError, match="exists"):
        package_model(trained, tmp_path / "tiny")
    with pytest.raises(RequestError, match="no finished LCM"):
        package_model(tmp_path, tmp_path / "other")
