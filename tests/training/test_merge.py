"""Several LoRAs become one, exactly, or part of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_runs import (
    lora_file,
    output,
    pipelines,
    random_lora,
    unet_of,
    write_xl,
)
from torch import Tensor

import fewstep
from fewstep.checkpoints.lora_formats import CONFIG_KEY, Change
from fewstep.checkpoints.lora_writing import write_lora_file
from fewstep.errors import CheckpointError, RequestError
from fewstep.models.lora import weight_delta
from fewstep.training.export import (
    write_lora,
)
from fewstep.training.merge import Term, merge_into_model, merge_loras

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
pytestmark = pytest.mark.filterwarnings("ignore")  # the oracle's are not ours to heed


@pytest.fixture(scope="module")
def xl_folder(tokenizer: Any, text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_xl(tmp_path_factory.mktemp("xl") / "sdxl", tokenizer, text_encoder)


@pytest.fixture(params=["sd", "xl"])
def model(request: pytest.FixtureRequest, sd_folder: Path, xl_folder: Path) -> Path:
    return sd_folder if request.param == "sd" else xl_folder


def both_merged(folder: Path, files: list[Path], weights: list[float]) -> Tensor:
    pipe = fewstep.DiffusionPipeline.from_pretrained(folder)
    for name, file in zip("ab", files, strict=True):
        pipe.load_lora_weights(file, adapter_name=name)
    pipe.set_adapters(["a", "b"], weights)
    return output(pipe.unet)


def test_the_sum_of_two_loras_is_one_file_exactly(model: Path, tmp_path: Path) -> None:
    files = [
        lora_file(tmp_path / "a.safetensors", model, 1),
        lora_file(tmp_path / "b.safetensors", model, 2, "kohya"),
    ]
    terms = [Term(str(files[0]), 0.8), Term(str(files[1]), -0.5)]
    expected = both_merged(model, files, [0.8, -0.5])
    for form in ("diffusers", "kohya"):
        done = merge_loras(terms, tmp_path / f"{form}.safetensors", form=form, model=str(model))
        assert (done.ranks, done.error) == ((6, 6), 0.0)
        for pipe in pipelines(model):
            pipe.load_lora_weights(tmp_path, weight_name=done.path.name)
            torch.testing.assert_close(output(pipe.unet), expected, rtol=0, atol=1e-5)


def test_uneven_ranks_are_right_in_either_form(sd_folder: Path, tmp_path: Path) -> None:
    both = lora_file(tmp_path / "a.safetensors", sd_folder, 1)
    tensors = load_file(lora_file(tmp_path / "b.safetensors", sd_folder, 2, "kohya"))
    some = {name: value for name, value in tensors.items() if "attn2" in name}
    save_file(some, tmp_path / "b.safetensors")
    files = [both, tmp_path / "b.safetensors"]
    expected = both_merged(sd_folder, files, [1.0, 0.5])
    terms = [Term(str(files[0])), Term(str(files[1]), 0.5)]
    for form in ("diffusers", "kohya"):
        path = tmp_path / f"{form}.safetensors"
        assert merge_loras(terms, path, form=form, model=str(sd_folder)).ranks == (3, 6)
        for pipe in pipelines(sd_folder):
            pipe.load_lora_weights(tmp_path, weight_name=path.name)
            torch.testing.assert_close(output(pipe.unet), expected, rtol=0, atol=1e-5)
    merge_loras(terms, tmp_path / "h.safetensors", model=str(sd_folder), half=True)
    assert {t.dtype for t in load_file(tmp_path / "h.safetensors").values()} == {torch.float16}


def test_a_smaller_rank_is_the_best_one_and_its_error_is_told(
    sd_folder: Path, tmp_path: Path
) -> None:
    terms = [
        Term(str(lora_file(tmp_path / f"{seed}.safetensors", sd_folder, seed))) for seed in (1, 2)
    ]
    full, cut = (
        merge_loras(terms, tmp_path / f"r{rank}.safetensors", rank=rank, model=str(sd_folder))
        for rank in (6, 4)
    )
    assert (full.error, cut.ranks) == (0.0, (4, 4))
    squares = [0.0, 0.0]
    tensors = [load_file(done.path) for done in (full, cut)]
    for key in tensors[0]:
        if key.endswith("lora_A.weight"):
            up = key.replace("lora_A", "lora_B")
            whole, part = (t[up].flatten(1) @ t[key].flatten(1) for t in tensors)
            squares[0] += (whole - part).square().sum().item()
            squares[1] += whole.square().sum().item()
            tail = torch.linalg.svdvals(whole)[4:].square().sum().item()
            assert (whole - part).square().sum().item() == pytest.approx(tail, rel=1e-3)
    assert cut.error == pytest.approx((squares[0] / squares[1]) ** 0.5, rel=1e-3)
    assert 0 < cut.error <= cut.worst < 1


def test_a_tucker_core_counts_as_a_plain_lora(sd_folder: Path, tmp_path: Path) -> None:
    name, random = "down_blocks.0.resnets.0.conv1", torch.Generator().manual_seed(0)
    shapes = {"up": (8, 2, 1, 1), "mid": (2, 3, 3, 3), "down": (3, 8, 1, 1)}
    parts = {part: torch.randn(shape, generator=random) for part, shape in shapes.items()}
    config = unet_of(sd_folder).config
    one = write_lora_file(
        tmp_path / "a.safetensors", {"unet": {name: Change(parts, 1.0)}}, "kohya", config
    )
    done = merge_loras([Term(str(one), 2.0)], tmp_path / "b.safetensors", model=str(sd_folder))
    base = unet_of(sd_folder).get_submodule(name).weight.data
    tensors = load_file(done.path)
    up, down = (tensors[f"unet.{name}.lora_{part}.weight"] for part in "BA")
    expected = 2.0 * weight_delta(Change(parts, 1.0), base)
    torch.testing.assert_close((up.flatten(1) @ down.flatten(1)).reshape(base.shape), expected)


def test_what_cannot_be_one_lora_is_refused(
    sd_folder: Path, xl_folder: Path, tmp_path: Path
) -> None:
    plain = lora_file(tmp_path / "plain.safetensors", sd_folder, 1)
    loha = {
        "hada_w1_a": torch.ones(16, 1),
        "hada_w1_b": torch.ones(1, 16),
        "hada_w2_a": torch.ones(16, 1),
        "hada_w2_b": torch.ones(1, 16),
    }
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    config = unet_of(sd_folder).config
    write_lora_file(tmp_path / "h.safetensors", {"unet": {module: Change(loha)}}, "kohya", config)
    other = lora_file(tmp_path / "xl.safetensors", xl_folder, 1)
    both = [Term(str(plain)), Term(str(tmp_path / "h.safetensors"))]
    out, model = tmp_path / "out.safetensors", str(sd_folder)
    with pytest.raises(RequestError, match=r"h.safetensors: .*hada_w1_a.*\(--model\)"):
        merge_loras(both, out, model=model)
    with pytest.raises(CheckpointError, match=r"xl.safetensors: "):
        merge_loras([Term(str(plain)), Term(str(other))], out, model=model)
    with pytest.raises(RequestError, match="does not say which model"):
        merge_loras([Term(str(plain))], out)
    with pytest.raises(RequestError, match="rank=0"):
        merge_loras([Term(str(plain))], out, rank=0)
    assert not out.exists()
    folder = merge_into_model(both, model, tmp_path / "model", half=True, scheduler="LCMScheduler")
    theirs, ours = pipelines(folder)
    torch.testing.assert_close(output(theirs.unet), output(ours.unet), rtol=0, atol=1e-5)
    assert type(theirs.scheduler).__name__ == "LCMScheduler"
    expected = both_merged(sd_folder, [plain, tmp_path / "h.safetensors"], [1.0, 1.0])
    torch.testing.assert_close(output(ours.unet), expected, rtol=0, atol=1e-5)
    assert list((folder / "text_encoder").glob("*fp16*"))
    with pytest.raises(RequestError, match="exists; give a new folder"):
        merge_into_model(both, model, folder)


def test_loras_of_known_models_need_no_model(tmp_path: Path) -> None:
    """Two dialects of SDXL's, told by the channels of its text."""
    block = "down_blocks.1.attentions.0.transformer_blocks.0"
    sgm = "lora_unet_input_blocks_4_1_transformer_blocks_0"
    a = {f"unet.{block}.attn2.to_k.lora_A.weight": torch.ones(1, 2048)}
    a |= {f"unet.{block}.attn2.to_k.lora_B.weight": torch.ones(640, 1)}
    b = {f"{sgm}_attn2_to_k.lora_down.weight": torch.ones(1, 2048)}
    b |= {f"{sgm}_attn2_to_k.lora_up.weight": torch.ones(640, 1)}
    te = "lora_te2_text_model_encoder_layers_31_mlp_fc1"
    b |= {
        f"{te}.lora_down.weight": torch.ones(1, 1280),
        f"{te}.lora_up.weight": torch.ones(5120, 1),
    }
    for name, tensors in (("a", a), ("b", b)):
        save_file(tensors, tmp_path / f"{name}.safetensors")
    terms = [Term(str(tmp_path / f"{name}.safetensors")) for name in "ab"]
    done = merge_loras(terms, tmp_path / "c.safetensors", form="kohya")
    assert done.ranks == (1, 2)
    assert set(load_file(done.path)) == {
        f"{name}.{part}"
        for name in (f"{sgm}_attn2_to_k", te)
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }


def test_a_file_tells_its_form_in_its_header(sd_folder: Path, tmp_path: Path) -> None:
    unet = unet_of(sd_folder)
    files = write_lora(
        random_lora(unet), 2.0, tmp_path, unet_config=unet.config, metadata={"made.by": "me"}
    )
    headers = []
    for file in files:
        with safe_open(file, "pt") as opened:
            headers.append(opened.metadata())
    assert json.loads(headers[0][CONFIG_KEY])["unet.lora_alpha"] == 2
    assert headers[1]["ss_network_dim"] == "3"
    assert [header["made.by"] for header in headers] == ["me", "me"]
