"""Pictures of a real server are drawn again by `fewstep repro`."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
from server.asked import asking, file, packed
from starlette.testclient import TestClient

from fewstep import EMBEDDED, DPMSolverMultistepScheduler, metadata
from fewstep.cli.record import read_record
from fewstep.server.again import bare_name
from fewstep.server.worker import PipelineWorker

Run = Callable[..., tuple[int, str, str]]
BLUEPRINT, EDGES = "fewstep-emoji-blueprint", "fewstep-emoji-edges"


def started(model: Any, **how: Any) -> PipelineWorker:
    worker = PipelineWorker(model, deterministic=True, **how)
    worker.start()
    assert worker.wait_until_ready(60)
    return worker


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> PipelineWorker:
    held = tmp_path_factory.mktemp("private") / "ink.safetensors"
    shutil.copy(next((EMBEDDED.parent / BLUEPRINT).glob("*.safetensors")), held)
    return started(EMBEDDED.name, loras=[("blue", BLUEPRINT), ("ink", str(held))], control=EDGES)


@pytest.fixture(scope="module")
def client(worker: PipelineWorker) -> Iterator[TestClient]:
    with asking(worker) as found:
        yield found


@pytest.fixture
def photo() -> PIL.Image.Image:
    return PIL.Image.effect_noise((60, 90), 90).convert("RGB")


def generated(client: TestClient, **fields: Any) -> dict[str, Any]:
    """Keeps a picture of the native interface as a.png; its record."""
    answer = client.post("/v1/generate", json=fields, headers={"Accept": "image/png"})
    assert answer.status_code == 200, answer.text
    return kept(answer.content)


def kept(data: bytes) -> dict[str, Any]:
    Path("a.png").write_bytes(data)
    with PIL.Image.open(io.BytesIO(data)) as picture:
        found: dict[str, Any] = json.loads(metadata.stored_json(picture) or "")
    return found


IDENTICAL = (0, "identical: a.png\n", "")


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 2**64 - 1},
        {"steps": 3, "guidance_scale": 5.5, "width": 96, "height": 64},
        {"negative_prompt": "red"},  # which this model does not read
        {"loras": [{"id": "blue", "weight": 0.7}]},
    ],
    ids=str,
)
def test_a_picture_of_a_text_is_drawn_again(
    fields: dict[str, Any], client: TestClient, run: Run
) -> None:
    generated(client, prompt="a red apple", **fields)
    assert run("repro", "a.png") == IDENTICAL


def test_a_picture_of_the_web_uis_interface_is_drawn_again_and_names_its_loras(
    client: TestClient, run: Run
) -> None:
    asked = {"prompt": "a cat <lora:blue:0.5>", "negative_prompt": "dogs", "steps": 2, "seed": 3}
    answer = client.post("/sdapi/v1/txt2img", json=asked).json()
    kept(base64.b64decode(answer["images"][0]))
    assert run("repro", "a.png") == IDENTICAL
    (text,) = json.loads(answer["info"])["infotexts"]
    assert text.startswith("a cat <lora:blue:0.5>\nNegative prompt: dogs\nSteps: 2, ")
    told = client.post("/sdapi/v1/png-info", json={"image": answer["images"][0]}).json()
    assert told["parameters"]["Prompt"] == "a cat <lora:blue:0.5>"


def test_a_picture_of_openais_interface_is_drawn_again(client: TestClient, run: Run) -> None:
    asked = {"prompt": "a dog", "seed": 11, "steps": 2}
    answer = client.post("/v1/images/generations", json=asked).json()
    kept(base64.b64decode(answer["data"][0]["b64_json"]))
    assert run("repro", "a.png") == IDENTICAL


@pytest.mark.parametrize("strength", [0.01, 0.5])  # of so low a one fewer steps are taken
def test_a_picture_of_a_picture_is_drawn_again_where_that_is_given(
    strength: float, client: TestClient, run: Run, photo: PIL.Image.Image
) -> None:
    fields = {"image": packed(photo), "strength": strength, "steps": 3, "seed": 4}
    generated(client, prompt="a red apple", **fields)
    code, _, error = run("repro", "a.png")
    assert code == 2 and error.count("\n") == 1
    assert "from a picture that was sent to fewstep serve; give it with --image" in error
    Path("b.png").write_bytes(file(photo))
    assert run("repro", "a.png", "--image", "b.png") == IDENTICAL
    Path("b.png").write_bytes(file(photo.rotate(180)))
    assert "its pixels differ" in run("repro", "a.png", "--image", "b.png")[2]


def test_masks_and_controls_are_refused_in_one_line(
    client: TestClient, run: Run, photo: PIL.Image.Image
) -> None:
    for more in ({"image": packed(photo), "mask": packed(photo)}, {"control": packed(photo)}):
        generated(client, prompt="a pear", **more)
        code, _, error = run("repro", "a.png")
        assert code == 2 and error.count("\n") == 1
        name = "mask" if "mask" in more else "control"
        assert f"was drawn with a {name} that was sent to fewstep serve" in error


def test_a_lora_of_a_file_is_told_by_its_bare_name_and_wanted_beside_the_picture(
    client: TestClient, run: Run
) -> None:
    record = generated(client, prompt="a house", loras=[{"id": "ink"}])
    assert record["loras"] == [{"name": "ink", "weight": 1.0, "source": "ink.safetensors"}]
    assert "private" not in json.dumps(record) and "/src/" not in json.dumps(record)
    code, _, error = run("repro", "a.png")
    assert code == 2 and error.count("\n") == 1
    assert "with the LoRA 'ink.safetensors', of which the server's record tells only" in error
    held = next((EMBEDDED.parent / BLUEPRINT).glob("*.safetensors"))
    shutil.copy(held, "ink.safetensors")
    assert run("repro", "a.png") == IDENTICAL


def test_a_model_of_a_folder_with_another_scheduler_is_drawn_again_where_its_folder_is_given(
    sd_folder: Path, run: Run
) -> None:
    with asking(started(str(sd_folder), scheduler=DPMSolverMultistepScheduler)) as client:
        fields = {"negative_prompt": "red", "guidance_scale": 6.0, "steps": 3}
        record = generated(client, prompt="a cat", **fields)
        assert str(sd_folder.parent) not in json.dumps(record)
        code, _, error = run("repro", "a.png")
        assert code == 2 and error.count("\n") == 1
        assert "only the name; give its folder with --model" in error
        assert run("repro", "a.png", "--model", sd_folder) == IDENTICAL
        assert run("repro", "a.png", "--model", sd_folder, "-o", "b.png")[0] == 0
        # Which is a picture of the command's own, with all that it knows.
        found = read_record(Path("b.png"))
        assert found.model.id == str(sd_folder) and len(found.model.weights) == 64
        assert run("repro", "b.png")[1] == "identical: b.png\n"
        generated(client, prompt="a cat", negative_prompt="red", guidance_scale=1.0, steps=2)
        assert run("repro", "a.png", "--model", sd_folder)[:2] == IDENTICAL[:2]


def test_a_difference_is_told_with_why_it_may_be(client: TestClient, run: Run) -> None:
    record = generated(client, prompt="a cat", steps=1)
    told = metadata.kept(record, "", ".png")
    PIL.Image.new("RGB", (64, 64)).save("a.png", **told)
    code, out, _ = run("repro", "a.png")
    assert code == 1 and "unless --deterministic is on" in out
    asked = {"prompt": "a cat", "steps": 1}
    answer = client.post("/v1/generate", json=asked, headers={"Accept": "image/webp"})
    Path("a.webp").write_bytes(answer.content)
    code, out, _ = run("repro", "a.webp", "--out", "b.png")
    assert code == 1 and "only its PNG files can be compared" in out and Path("b.png").is_file()


@pytest.mark.parametrize("key", ["loras", "scheduler_config", "seed", "threads", "passed"])
@pytest.mark.parametrize("value", [None, "x", [1]], ids=str)
def test_a_damaged_record_ends_in_one_line(
    key: str, value: Any, client: TestClient, run: Run
) -> None:
    record = {**generated(client, prompt="a cat", steps=1, seed=1), key: value}
    PIL.Image.new("RGB", (64, 64)).save("a.png", **metadata.kept(record, "", ".png"))
    code, _, error = run("repro", "a.png")
    assert code == 2 and error.count("\n") == 1 and "a.png" in error


def test_only_names_are_told_of_places(tmp_path: Path) -> None:
    assert bare_name("latent-consistency/lcm-lora-sdv1-5") == "latent-consistency/lcm-lora-sdv1-5"
    for place in (str(tmp_path), f"{tmp_path}/gone/ink.safetensors", "../ink", "a/b/ink"):
        assert bare_name(place) == Path(place).name
