"""The web UI's API: what is honoured, what may be sent idle, and whose jobs are whose."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from typing import Any

import httpx
import PIL.Image
import pytest
from server.asked import asking, error_of, listening, packed, square, unpacked, until
from server.fake import FACTS, FakeWorker, colour

TXT, IMG = "/sdapi/v1/txt2img", "/sdapi/v1/img2img"


def test_pictures_come_with_how_they_were_drawn_as_a_json_string() -> None:
    worker = FakeWorker()
    with asking(worker) as client:
        asked = {"prompt": "a cat", "seed": 5, "batch_size": 2, "n_iter": 2, "cfg_scale": 2.5}
        answer = client.post(TXT, json=asked).json()
    assert len(answer["images"]) == 4
    assert unpacked(answer["images"][0]).getpixel((3, 3)) == colour("a cat")
    info = json.loads(answer["info"])
    assert info["all_seeds"] == [5, 6, 7, 8] and info["seed"] == 5
    assert info["cfg_scale"] == 2.5 and info["steps"] == 4
    assert info["infotexts"][1].startswith("a cat\n") and "Seed: 6" in info["infotexts"][1]
    assert answer["parameters"]["prompt"] == "a cat"


def test_seed_minus_one_is_drawn_and_told() -> None:
    worker = FakeWorker()
    with asking(worker) as client:
        answer = client.post(TXT, json={"prompt": "a", "seed": -1}).json()
    assert json.loads(answer["info"])["seed"] == worker.orders[0].seed >= 0


CLIENTS_SEND = {  # what a client of the web UI sends without being asked
    "prompt": "a",
    "negative_prompt": "",
    "styles": [],
    "seed": -1,
    "subseed": -1,
    "subseed_strength": 0,
    "seed_resize_from_h": -1,
    "seed_resize_from_w": -1,
    "sampler_name": "LCM",
    "scheduler": "Automatic",
    "batch_size": 1,
    "n_iter": 1,
    "steps": 4,
    "cfg_scale": 1,
    "width": 64,
    "height": 64,
    "restore_faces": False,
    "tiling": False,
    "do_not_save_samples": True,
    "do_not_save_grid": True,
    "eta": 0,
    "denoising_strength": 0,
    "s_min_uncond": 0,
    "s_churn": 0,
    "s_tmax": 0,
    "s_tmin": 0,
    "s_noise": 1,
    "override_settings": {},
    "override_settings_restore_afterwards": True,
    "refiner_checkpoint": "",
    "refiner_switch_at": 0.8,
    "disable_extra_networks": False,
    "comments": {},
    "enable_hr": False,
    "hr_scale": 2,
    "hr_upscaler": "Latent",
    "script_name": None,
    "script_args": [],
    "send_images": True,
    "save_images": False,
    "alwayson_scripts": {},
}


def test_everything_that_clients_send_idle_is_taken() -> None:
    worker = FakeWorker()
    with asking(worker) as client:
        assert client.post(TXT, json=CLIENTS_SEND).status_code == 200
    assert worker.orders[0].negative_prompt is None and worker.orders[0].strength is None


@pytest.mark.parametrize(
    "fields",
    [
        {"enable_hr": True},
        {"tiling": True},
        {"restore_faces": True},
        {"styles": ["x"]},
        {"subseed_strength": 0.5},
        {"alwayson_scripts": {"controlnet": {}}},
        {"scheduler": "karras"},
        {"sampler_name": "Euler a"},
        {"save_images": True},
        {"override_settings": {"sd_model_checkpoint": "other"}},
        {"override_settings": {"CLIP_stop_at_last_layers": 2}},
        {"cfg_scal": 2},
        {"seed": -2},
        {"batch_size": 5, "n_iter": 5},
    ],
)
def test_what_would_change_the_picture_and_is_not_there_is_refused(fields: dict[str, Any]) -> None:
    worker = FakeWorker()
    with asking(worker) as client:
        told = error_of(client.post(TXT, json={"prompt": "a", **fields}), 422)
    assert told["param"] and not worker.orders


def test_who_asks_for_a_lora_where_none_is_loaded_is_told_how_to_load_it() -> None:
    worker = FakeWorker()
    worker.facts = replace(FACTS, loras=())
    with asking(worker) as client:
        told = error_of(client.post(TXT, json={"prompt": "a <lora:ink:1>"}), 422)
    assert told["hint"] == "start the server with --lora"


def test_loras_in_the_prompt_are_taken_out_and_used() -> None:
    worker = FakeWorker()
    with asking(worker) as client:
        prompt = "a cat <lora:ink:0.5> <lora:Gold leaf>"
        assert client.post(TXT, json={"prompt": prompt}).status_code == 200
        unknown = {"prompt": "<lora:../../ink:1>"}
        assert "no LoRA" in error_of(client.post(TXT, json=unknown), 422)["message"]
        client.post(TXT, json={"prompt": "(" * 5000 + "<lora:"})
        vast = {"prompt": "<lora:ink:1>" * 1000}  # measured before it is searched
        assert "characters" in error_of(client.post(TXT, json=vast), 422)["message"]
    assert worker.orders[0].prompt == "a cat"
    assert worker.orders[0].loras == (("ink", 0.5), ("gold", 1.0))
    assert worker.orders[1].loras == ()


def test_a_picture_is_drawn_from_another() -> None:
    worker = FakeWorker()
    with asking(worker) as client:
        asked = {"prompt": "a", "init_images": [packed(square("blue"))], "denoising_strength": 0.4}
        assert client.post(IMG, json=asked).status_code == 200
        prefixed = {"prompt": "a", "init_images": ["data:image/png;base64," + packed(square())]}
        assert client.post(IMG, json=prefixed).status_code == 200
    assert [order.strength for order in worker.orders] == [0.4, 0.75]
    assert worker.orders[0].image is not None
    assert worker.orders[0].image.getpixel((0, 0)) == (0, 0, 255)


def half(side: int = 64) -> PIL.Image.Image:
    mask = PIL.Image.new("L", (side, side), 0)
    mask.paste(255, (0, 0, side // 2, side))
    return mask


@pytest.mark.parametrize(("invert", "drawn_at"), [(0, 5), (1, 60)])
def test_the_white_of_a_mask_is_drawn_anew(invert: int, drawn_at: int) -> None:
    asked = {
        "prompt": "a cat",
        "init_images": [packed(square("blue"))],
        "mask": packed(half()),
        "inpainting_mask_invert": invert,
        "inpaint_full_res": False,
        "inpainting_fill": 1,
        "mask_blur": 0,
    }
    with asking() as client:
        picture = unpacked(client.post(IMG, json=asked).json()["images"][0])
    assert picture.getpixel((drawn_at, 5)) == colour("a cat")
    assert picture.getpixel((65 - drawn_at, 5)) == (0, 0, 255)


@pytest.mark.parametrize(
    "fields",
    [{"inpaint_full_res": True}, {"mask_blur": 4}, {"inpainting_fill": 0}],
)
def test_ways_of_masking_that_are_not_there_are_refused(fields: dict[str, Any]) -> None:
    asked = {"prompt": "a", "init_images": [packed(square())], "mask": packed(half()), **fields}
    with asking() as client:
        assert error_of(client.post(IMG, json=asked), 422)["param"] == next(iter(fields))
        # Without a mask they are idle.
        assert client.post(IMG, json={**asked, "mask": None}).status_code == 200


def test_a_picture_is_stretched_to_the_size_or_cropped_to_it() -> None:
    worker = FakeWorker()
    image = PIL.Image.new("RGB", (128, 64), "blue")
    asked = {
        "prompt": "a",
        "init_images": [packed(image)],
        "mask": packed(half()),
        "width": 64,
        "height": 64,
    }
    with asking(worker) as client:
        for mode, size in ((0, (64, 64)), (1, (128, 64))):
            assert client.post(IMG, json={**asked, "resize_mode": mode}).status_code == 200
            order = worker.orders[-1]
            assert order.image is not None and order.image.size == size
        huge = {**asked, "width": 10**9}
        assert error_of(client.post(IMG, json=huge), 422)["param"] == "width"
        wrong = {**asked, "resize_mode": 2}
        assert error_of(client.post(IMG, json=wrong), 422)["param"] == "resize_mode"


@pytest.mark.parametrize(
    ("images", "status"), [([], 422), (["%%%"], 422), (["aaaa"], 415), (["http://a.b/c.png"], 400)]
)
def test_images_that_are_none_are_refused(images: list[str], status: int) -> None:
    with asking() as client:
        told = error_of(client.post(IMG, json={"prompt": "a", "init_images": images}), status)
    assert told["param"] == "init_images"


def test_progress_shows_the_picture_and_interrupt_ends_this_clients_jobs_alone() -> None:
    worker = FakeWorker(delay=0.03)
    answers: dict[str, httpx.Response] = {}
    with listening(worker) as address:

        def draw(name: str) -> None:
            asked = {"prompt": name, "steps": 20}
            headers = {"X-Client-Id": name}
            answers[name] = httpx.post(address + TXT, json=asked, headers=headers, timeout=20)

        threads = [threading.Thread(target=draw, args=(name,)) for name in ("one", "two")]
        for thread in threads:
            thread.start()

        def progress(name: str) -> dict[str, Any]:
            headers = {"X-Client-Id": name}
            found: dict[str, Any] = httpx.get(
                f"{address}/sdapi/v1/progress", headers=headers
            ).json()
            return found

        until(lambda: progress("one")["current_image"] is not None)
        told = progress("one")
        assert 0 < told["progress"] < 1 and told["state"]["sampling_steps"] == 20
        assert unpacked(told["current_image"]).getpixel((1, 1)) == colour("one")
        assert progress("three")["state"]["job_count"] == 0
        httpx.post(f"{address}/sdapi/v1/interrupt", headers={"X-Client-Id": "one"})
        for thread in threads:
            thread.join(10)
        assert progress("one")["progress"] == 0
    assert error_of(answers["one"], 409)["code"] == "cancelled"
    assert answers["two"].status_code == 200


def test_a_query_that_cannot_be_is_named() -> None:
    with asking() as client:
        answer = client.get("/sdapi/v1/progress", params={"skip_current_image": "perhaps"})
        assert error_of(answer, 422)["param"] == "skip_current_image"


def test_options_are_each_clients_own() -> None:
    with asking() as client:
        mine = {"X-Client-Id": "mine"}
        path = "/sdapi/v1/options"
        assert client.get(path).json()["sd_model_checkpoint"] == FACTS.id
        changed = {"samples_format": "jpg", "live_previews_enable": False}
        assert client.post(path, json=changed, headers=mine).status_code == 200
        assert client.get(path, headers=mine).json()["samples_format"] == "jpg"
        assert client.get(path).json()["samples_format"] == "png"
        answer = client.post(TXT, json={"prompt": "a"}, headers=mine).json()
        assert unpacked(answer["images"][0]).format == "JPEG"
        once = {"prompt": "a", "override_settings": {"samples_format": "webp"}}
        for restored, after in ((True, "jpg"), (False, "webp")):
            more = {**once, "override_settings_restore_afterwards": restored}
            answer = client.post(TXT, json=more, headers=mine).json()
            assert unpacked(answer["images"][0]).format == "WEBP"
            assert client.get(path, headers=mine).json()["samples_format"] == after
        wrong = client.post(path, json={"sd_model_checkpoint": "fake/square"})
        assert error_of(wrong, 422)["hint"] == "did you mean 'fake/squares'?"
        told = error_of(client.post(path, json={"sample_format": "png"}), 422)
        assert told["hint"] == "did you mean 'samples_format'?"


def test_lists_name_the_model_its_sampler_and_its_loras_and_no_path() -> None:
    with asking() as client:
        (model,) = client.get("/sdapi/v1/sd-models").json()
        assert model["title"] == model["filename"] == FACTS.id
        assert client.get("/sdapi/v1/samplers").json()[0]["name"] == "LCM"
        loras = client.get("/sdapi/v1/loras").json()
        assert [(lora["name"], lora["alias"]) for lora in loras] == list(FACTS.loras)


def test_the_settings_of_a_picture_are_read_from_its_file() -> None:
    with asking() as client:
        image = client.post(TXT, json={"prompt": "a cat", "seed": 7}).json()["images"][0]
        told = client.post("/sdapi/v1/png-info", json={"image": image}).json()
        assert told["info"].startswith("a cat\nSteps: 4")
        assert told["parameters"]["Seed"] == "7" and told["parameters"]["Prompt"] == "a cat"
        assert json.loads(told["items"]["fewstep"])["seed"] == 7
        bare = client.post("/sdapi/v1/png-info", json={"image": packed(square())}).json()
        assert bare["info"] == "" and bare["items"] == {}
        broken = client.post("/sdapi/v1/png-info", json={"image": "aaaa"})
        assert error_of(broken, 415)["param"] == "image"
