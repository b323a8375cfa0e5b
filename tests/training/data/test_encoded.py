"""The training set: equal to what the pipeline encodes, encoded once, and stable."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.errors import RequestError
from fewstep.training.batch import Batch
from fewstep.training.config import Recipe
from fewstep.training.data import Encoding, encode_share, encoders, open_set
from fewstep.training.data import encoded as encoded_module
from fewstep.training.data.encoded import EncodedSet
from fewstep.training.data.store import Store
from fewstep.training.draws import Draws
from fewstep.training.ranks import Ranks

Make = Callable[..., Recipe]


def draws(count: int, step: int = 0) -> Draws:
    return Draws(7, step, range(count))


def every(data: EncodedSet, step: int = 0) -> Batch:
    return data.batch(np.arange(len(data)), draws(len(data), step))


def pixels(path: Path, size: int = 32) -> torch.Tensor:
    """A picture cut at its centre, by hand, in [-1, 1]."""
    with Image.open(path) as picture:
        scale = size / min(picture.size)
        width, height = (round(side * scale) for side in picture.size)
        resized = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size) // 2, (height - size) // 2
    cut = np.asarray(resized.crop((left, top, left + size, top + size)))
    return torch.from_numpy(cut.copy()).permute(2, 0, 1)[None] / 127.5 - 1


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the stores are given: "mean" or "text" for each row."""
    given: list[str] = []
    real = Store.add

    def add(self: Store, ids: Any, rows: Any) -> None:
        given.extend(["text" if "text" in rows else "mean"] * len(ids))
        real(self, ids, rows)

    monkeypatch.setattr(Store, "add", add)
    return given


# ── what a batch holds ──


def test_latents_are_those_of_the_pipeline(pictures: Path, recipe: Make, sd: Any) -> None:
    data = open_set(recipe(pictures, posterior="mean"), sd)
    z = every(data).z
    for row in range(8):
        with torch.no_grad():
            mean = sd.vae.encode(pixels(pictures / f"{row}.png")).latent_dist.mode()
        torch.testing.assert_close(
            z[row : row + 1], mean * sd.vae.config.scaling_factor, rtol=2e-3, atol=1e-4
        )
    assert z.dtype == torch.float32


def test_the_posterior_is_drawn_anew_at_each_use(pictures: Path, recipe: Make, sd: Any) -> None:
    data = open_set(recipe(pictures), sd)
    first, again, other = every(data).z, every(data).z, every(data, step=1).z
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    many = torch.cat([every(data, step).z for step in range(200)]).reshape(200, 8, *first.shape[1:])
    with torch.no_grad():
        posterior = sd.vae.encode(pixels(pictures / "0.png")).latent_dist
    factor = sd.vae.config.scaling_factor
    assert (many[:, 0].mean(0) - posterior.mean[0] * factor).abs().max() < 0.5 * factor
    ratio = many[:, 0].std(0) / (posterior.std[0] * factor)
    assert ratio.min() > 0.7 and ratio.max() < 1.3


def test_latents_are_scaled_by_recorded_statistics(
    pictures: Path, recipe: Make, sd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = every(open_set(recipe(pictures, posterior="mean"), sd)).z
    mean, std = torch.full((1, 4, 1, 1), 0.5), torch.full((1, 4, 1, 1), 2.0)
    monkeypatch.setattr(type(sd), "statistics", lambda self, like: (mean, std))
    scaled = every(open_set(recipe(pictures, posterior="mean"), sd)).z
    factor = sd.vae.config.scaling_factor
    torch.testing.assert_close(scaled, (plain / factor - 0.5) * factor / 2)


def test_text_is_what_encode_prompt_gives(pictures: Path, recipe: Make, sd: Any, xl: Any) -> None:
    captions = [f"a cat {i % 4}" for i in range(8)]
    condition = every(open_set(recipe(pictures), sd)).condition
    with torch.no_grad():
        text, _ = sd.encode_prompt(captions, do_classifier_free_guidance=False)
    torch.testing.assert_close(condition.text, text, rtol=1e-3, atol=1e-3)
    assert condition.pooled is None and condition.time_ids is None

    condition = every(open_set(recipe(pictures), xl)).condition
    with torch.no_grad():
        text, _, pooled, _ = xl.encode_prompt(captions, do_classifier_free_guidance=False)
    torch.testing.assert_close(condition.text, text, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(condition.pooled, pooled, rtol=1e-3, atol=1e-3)


def test_sdxl_is_told_sizes_and_crops_of_the_variant_that_is_given(
    tmp_path: Path, recipe: Make, xl: Any
) -> None:
    (tmp_path / "p").mkdir()
    ramp = np.broadcast_to(np.arange(96, dtype=np.uint8)[None, :, None] * 2, (32, 96, 3))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "p" / "a.png")
    (tmp_path / "p" / "a.txt").write_text("a cat")
    wanted = recipe(tmp_path / "p", crop="random", flip=0.5, variants=6, posterior="mean")
    data = open_set(wanted, xl)
    seen = set()
    for step in range(30):
        batch = data.batch(np.array([0]), draws(1, step))
        height, width, top, left, *size = batch.condition.time_ids[0].int().tolist()
        assert (height, width, top, size) == (32, 96, 0, [32, 32])
        # the corner and the pixels belong together, mirrored or not
        cuts = [(ramp[:, left : left + 32], False), (ramp[:, ::-1][:, left : left + 32], True)]
        x = [torch.from_numpy(c.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for c, _ in cuts]
        with torch.no_grad():
            made = [xl.scaled(xl.vae.encode(each).latent_dist.mode()) for each in x]
        errors = [(each - batch.z).abs().max().item() for each in made]
        assert min(errors) < 1e-3
        seen.add((left, int(np.argmin(errors))))
    assert len(seen) > 3
    assert {mirrored for _, mirrored in seen} == {0, 1}


def test_no_text_is_an_encoded_empty_prompt_or_zeros(
    pictures: Path, recipe: Make, sd: Any, xl: Any
) -> None:
    with torch.no_grad():
        text, _ = sd.encode_prompt("", do_classifier_free_guidance=False)
    empty = open_set(recipe(pictures), sd).empty
    torch.testing.assert_close(empty.text, text, rtol=1e-3, atol=1e-3)
    zeros = open_set(recipe(pictures), xl).empty
    assert zeros.text.shape == (1, 16, 64) and zeros.pooled.shape == (1, 24)
    assert not zeros.text.any() and not zeros.pooled.any()
    other = copy.copy(xl)
    other.force_zeros_for_empty_prompt = False
    assert open_set(recipe(pictures), other).empty.pooled.any()


def test_captions_are_dropped_at_the_share_that_is_asked_for(
    pictures: Path, recipe: Make, sd: Any
) -> None:
    data = open_set(recipe(pictures, empty_captions=0.25), sd)
    dropped = [
        (every(data, step).condition.text == data.empty.text).flatten(1).all(1)
        for step in range(40)
    ]
    assert 0.15 < torch.cat(dropped).float().mean() < 0.35
    whole = open_set(recipe(pictures), sd)
    kept = every(whole).condition.text
    rows = ~dropped[0]
    assert torch.equal(every(data).condition.text[rows], kept[rows])


def test_of_several_captions_one_is_drawn(pictures: Path, recipe: Make, sd: Any) -> None:
    line = {"file_name": "0.png", "text": ["a cat", "a dog", "red"]}
    (pictures / "metadata.jsonl").write_text(json.dumps(line))
    data = open_set(recipe(pictures), sd)
    assert len(data) == 1
    texts = torch.cat([every(data, step).condition.text for step in range(30)])
    assert len(texts.unique(dim=0)) == 3


def test_a_sample_does_not_depend_on_how_the_batch_is_parted(
    pictures: Path, recipe: Make, sd: Any
) -> None:
    data = open_set(recipe(pictures, variants=3, crop="random", empty_captions=0.5), sd)
    whole = every(data)
    part = data.batch(np.arange(8)[3:6], Draws(7, 0, range(3, 6)))
    assert torch.equal(part.z, whole.z[3:6])
    assert torch.equal(part.condition.text, whole.condition.text[3:6])


def test_batches_are_read_under_autocast_too(pictures: Path, recipe: Make, sd: Any) -> None:
    data = open_set(recipe(pictures), sd)
    with torch.autocast("cpu", torch.bfloat16):
        batch = every(data)
    assert batch.z.dtype == batch.condition.text.dtype == torch.float32
    assert torch.equal(batch.z, every(data).z)


def test_a_caption_that_is_too_long_is_cut_without_a_warning_each(
    pictures: Path, recipe: Make, sd: Any
) -> None:
    line = {"file_name": "0.png", "text": "cat " * 100}
    (pictures / "metadata.jsonl").write_text(json.dumps(line))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(open_set(recipe(pictures), sd)) == 1


# ── rows ──


def test_batches_have_one_shape_and_held_out_rows_never_come(
    pictures: Path, recipe: Make, sd: Any
) -> None:
    for i in range(6):
        Image.new("RGB", (200, 64), (40 * i, 0, 0)).save(pictures / f"wide{i}.png")
        (pictures / f"wide{i}.txt").write_text("a cat")
    data = open_set(recipe(pictures, resolution=128, buckets=True, held_out=3), sd)
    assert len(data) == 14 and len(data.held_out) == 3
    shapes, rows = set(), set()
    for step in range(40):
        given = data.rows(step, 2)
        shapes.add(tuple(data.batch(given, draws(2, step)).z.shape[2:]))
        rows |= set(given.tolist())
    assert shapes == {(16, 16), (8, 24)}
    assert rows == set(range(14)) - set(data.held_out.tolist())


# ── the cache ──


def test_the_second_time_nothing_is_encoded(
    pictures: Path, recipe: Make, sd: Any, encoded: list[str], capsys: Any
) -> None:
    first = open_set(recipe(pictures), sd)
    assert encoded.count("mean") == 8
    assert encoded.count("text") == 5  # four captions, each once, and ""
    assert "data: kept 8 of 8 pictures" in capsys.readouterr().err
    encoded.clear()
    again = open_set(recipe(pictures, flip=0.0, empty_captions=0.1, held_out=2), sd)
    assert encoded == []
    assert torch.equal(every(first).z, every(again).z)


def test_only_what_is_new_is_encoded(
    pictures: Path, recipe: Make, sd: Any, encoded: list[str]
) -> None:
    open_set(recipe(pictures), sd)
    encoded.clear()
    Image.new("RGB", (40, 40)).save(pictures / "new.png")
    (pictures / "new.txt").write_text("a cat 1")
    (pictures / "copy.png").write_bytes((pictures / "0.png").read_bytes())
    (pictures / "copy.txt").write_text("a dog")
    open_set(recipe(pictures), sd)
    assert encoded == ["text", "mean"]
    encoded.clear()
    (pictures / "0.png").rename(pictures / "renamed.png")  # known by its contents
    (pictures / "renamed.txt").write_text("a dog")
    open_set(recipe(pictures), sd)
    assert encoded == []


@pytest.mark.parametrize(
    ("change", "kinds"),
    [
        (lambda pipe: pipe.vae.encoder.conv_in.bias.data.add_(1e-3), {"mean"}),
        (lambda pipe: pipe.vae.decoder.conv_in.bias.data.add_(1e-3), set()),
        (lambda pipe: pipe.vae.enable_tiling(), {"mean"}),
        (lambda pipe: next(pipe.text_encoder.parameters()).data.add_(1e-3), {"text"}),
        (lambda pipe: setattr(pipe.tokenizer, "model_max_length", 12), {"text"}),
        (lambda pipe: pipe.tokenizer.add_tokens("zzz"), {"text"}),
    ],
    ids=["encoder", "decoder", "tiles", "text encoder", "length", "token"],
)
def test_other_encoders_never_meet_stale_rows(
    change: Any, kinds: set[str], pictures: Path, recipe: Make, sd: Any, encoded: list[str]
) -> None:
    open_set(recipe(pictures), sd)
    encoded.clear()
    other = copy.copy(sd)
    for name in ("vae", "text_encoder", "tokenizer"):
        setattr(other, name, copy.deepcopy(getattr(sd, name)))
    change(other)
    open_set(recipe(pictures), other)
    assert set(encoded) == kinds


def test_an_interrupted_encoding_goes_on(
    pictures: Path,
    recipe: Make,
    sd: Any,
    encoded: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(encoders, "PICTURES", 2)
    real, calls = type(sd.vae).moments, []

    def moments(self: Any, x: torch.Tensor) -> Any:
        calls.append(len(x))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(self, x)

    monkeypatch.setattr(type(sd.vae), "moments", moments)
    with pytest.raises(KeyboardInterrupt):
        open_set(recipe(pictures), sd)
    encoded.clear()
    data = open_set(recipe(pictures), sd)
    assert encoded == ["mean"] * 4
    assert len(data) == 8


def test_a_damaged_shard_is_encoded_again(
    pictures: Path, recipe: Make, sd: Any, encoded: list[str], tmp_path: Path, capsys: Any
) -> None:
    before = every(open_set(recipe(pictures), sd))
    encoded.clear()
    (shard,) = (tmp_path / "cache" / "latents").rglob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-10])
    after = every(open_set(recipe(pictures), sd))
    assert encoded == ["mean"] * 8
    assert str(shard) in capsys.readouterr().err
    assert torch.equal(before.z, after.z)


@pytest.mark.parametrize("limit", [0, 5])
def test_the_shares_of_two_ranks_are_the_whole(
    limit: int, pictures: Path, recipe: Make, sd: Any, encoded: list[str], tmp_path: Path
) -> None:
    whole = every(open_set(recipe(pictures, limit=limit), sd))
    encoded.clear()
    wanted = recipe(pictures, limit=limit, cache=str(tmp_path / "shared"))
    encode_share(wanted, sd, 1, 2)
    part = encoded.count("mean")
    encode_share(wanted, sd, 0, 2)
    assert 0 < part < encoded.count("mean") == (limit or 8)
    encoded.clear()
    both = every(open_set(wanted, sd))
    assert encoded == []
    torch.testing.assert_close(both.z, whole.z, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(both.condition.text, whole.condition.text, rtol=2e-3, atol=2e-3)
    with pytest.raises(RequestError, match="rank=2 must lie in"):
        encode_share(wanted, sd, 2, 2)


def test_the_processes_of_a_run_share_the_encoding_and_wait_for_each_other(
    pictures: Path, recipe: Make, sd: Any, encoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted, mine = recipe(pictures), []

    class Two(Ranks):
        def wait(self) -> None:
            mine.append(len(encoded))
            encode_share(wanted, sd, 1, 2)

    monkeypatch.setattr(encoded_module, "ranks_here", lambda: Two(0, 2))
    assert len(open_set(wanted, sd)) == 8
    assert len(mine) == 1 and 0 < mine[0] < len(encoded) == 13


def test_workers_encode_the_same(pictures: Path, recipe: Make, sd: Any, tmp_path: Path) -> None:
    alone = every(open_set(recipe(pictures), sd))
    other = recipe(pictures, workers=1, cache=str(tmp_path / "other"))
    assert torch.equal(every(open_set(other, sd)).z, alone.z)


def test_the_cache_is_by_default_where_all_of_fewstep_is(
    pictures: Path, recipe: Make, sd: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "home"))
    open_set(recipe(pictures, cache=""), sd)
    assert list((tmp_path / "home" / "encoded" / "latents").rglob("*.safetensors"))


def test_emoji_scenes_are_encoded_once(recipe: Make, sd: Any, encoded: list[str]) -> None:
    data = open_set(recipe("", source="emoji", scenes=6, held_out=1), sd)
    assert len(data) == 6 and encoded.count("mean") == 6
    assert torch.equal(every(data).z, every(data, 1).z)  # the posterior's mean
    encoded.clear()
    open_set(recipe("", source="emoji", scenes=9), sd)
    assert encoded.count("mean") == 3


# ── what is refused ──


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resolution": 30}, "data.resolution=30 must be a multiple of 8 .*; use 32"),
        ({"resolution": 32, "buckets": True}, "multiple of 64 .*; use 64"),
        ({"variants": 0}, "data.variants=0 must be at least 1"),
        ({"flip": 1.5}, "data.flip=1.5 is a share"),
        ({"empty_captions": -0.1}, "data.empty_captions=-0.1 is a share"),
        ({"limit": -1}, "data.limit=-1 must be at least 0"),
        ({"held_out": 8}, r"data.held_out=8 must lie in \[0, 7\]"),
        ({"path": "/nowhere/at/all"}, "data.path='/nowhere/at/all' is not a folder"),
    ],
)
def test_settings_that_cannot_be_served_are_refused_before_any_work(
    change: dict[str, Any],
    message: str,
    pictures: Path,
    recipe: Make,
    sd: Any,
    encoded: list[str],
) -> None:
    with pytest.raises(RequestError, match=message):
        open_set(recipe(**({"path": pictures} | change)), sd)
    assert encoded == []


def test_an_encoder_that_overflows_is_named(
    pictures: Path, recipe: Make, sd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = type(sd.vae).moments
    monkeypatch.setattr(
        type(sd.vae), "moments", lambda self, x: (real(self, x)[0] * 1e9, real(self, x)[1])
    )
    with pytest.raises(RequestError, match=r"autoencoder, in torch.float32, gives numbers"):
        open_set(recipe(pictures), sd)


def test_a_picture_that_changes_while_it_is_read_is_named(
    pictures: Path, recipe: Make, sd: Any
) -> None:
    encoding = Encoding(recipe(pictures), sd)
    Image.new("RGB", (99, 99)).save(pictures / "5.png")
    with pytest.raises(RequestError, match=r"5\.png: its size is now \(99, 99\); start again"):
        encoding.encode()
