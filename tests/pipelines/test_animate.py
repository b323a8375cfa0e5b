"""AnimateDiff's call: what it makes of its arguments; and the files that videos are written to."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from torch import Tensor

from fewstep import (
    AnimateDiffPipeline,
    AutoPipelineForText2Image,
    DiffusionPipeline,
    LCMScheduler,
    MotionAdapter,
    RequestError,
    StableDiffusionPipeline,
    UnsupportedConfig,
)
from fewstep.pipelines.animate import travelled
from fewstep.pipelines.windows import Windows, triangle, windows
from fewstep.utils import (
    export_to_apng,
    export_to_gif,
    export_to_video,
    export_to_webp,
)


def adapter(**changes: Any) -> MotionAdapter:
    torch.manual_seed(3)
    config = {
        "block_out_channels": (8, 16),
        "motion_layers_per_block": 1,
        "motion_norm_num_groups": 2,
        "motion_num_attention_heads": 2,
        "motion_max_seq_length": 6,
    }
    return MotionAdapter(**config | changes).eval()


@pytest.fixture(scope="module")
def pipe(sd_folder: Path) -> AnimateDiffPipeline:
    """An AnimateDiff whose motion modules know 6 frames, made of a Stable Diffusion."""
    pipe = AnimateDiffPipeline.from_pretrained(sd_folder, motion_adapter=adapter())
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def frames_of(pipe: AnimateDiffPipeline, **changes: Any) -> Any:
    base: dict[str, Any] = {
        "prompt": "a cat",
        "num_frames": 4,
        "height": 32,
        "width": 40,
        "num_inference_steps": 2,
        "guidance_scale": 1.0,
        "generator": seeded(0),
        "output_type": "latent",
    }
    return pipe(**base | changes).frames


def assert_equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def test_frames_come_in_every_kind(pipe: AnimateDiffPipeline) -> None:
    arguments = {"prompt": ["a cat", "a dog"], "decode_chunk_size": 3}
    videos = frames_of(pipe, **arguments, output_type="pil")
    assert [len(video) for video in videos] == [4, 4] and videos[0][0].size == (40, 32)
    arrays = frames_of(pipe, **arguments, output_type="np")
    tensors = frames_of(pipe, **arguments, output_type="pt")
    assert arrays.shape == (2, 4, 32, 40, 3) and tensors.shape == (2, 4, 3, 32, 40)
    assert np.abs(arrays - tensors.permute(0, 1, 3, 4, 2).numpy()).max() < 1e-5
    assert np.abs(np.asarray(videos[1][2]) / 255 - arrays[1, 2]).max() < 0.01
    assert frames_of(pipe, **arguments).shape == (2, 4, 4, 4, 5)
    (plain,) = pipe("a cat", 2, 32, 32, num_inference_steps=1, guidance_scale=1, return_dict=False)
    assert len(plain[0]) == 2
    whole = frames_of(pipe, **arguments | {"decode_chunk_size": 16}, output_type="pt")
    assert_equal(whole, tensors)


def test_a_video_does_not_depend_on_who_shares_its_batch(pipe: AnimateDiffPipeline) -> None:
    together = frames_of(pipe, num_videos_per_prompt=2, generator=[seeded(1), seeded(2)])
    for video, seed in zip(together, (1, 2), strict=True):
        assert_equal(video[None], frames_of(pipe, generator=seeded(seed)))
    assert difference(together[0], together[1]) > 1e-2


def test_prompts_turn_into_each_other(pipe: AnimateDiffPipeline) -> None:
    plain = frames_of(pipe, guidance_scale=2.0, negative_prompt="red")
    one = frames_of(pipe, prompt={0: "a cat"}, guidance_scale=2.0, negative_prompt="red")
    assert_equal(one, plain)
    seen: list[Tensor] = []

    def look(_: Any, __: int, ___: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        seen.append(tensors["prompt_embeds"])
        return {}

    turned = frames_of(
        pipe,
        prompt={3: "a red dog", 1: "a cat"},
        num_videos_per_prompt=2,
        callback_on_step_end=look,
        callback_on_step_end_tensor_inputs=["prompt_embeds"],
    )
    assert turned.shape[0] == 2
    cat, dog = (
        pipe.encode_prompt(text, do_classifier_free_guidance=False)[0][0]
        for text in ("a cat", "a red dog")
    )
    path = torch.stack([cat, cat, (cat + dog) / 2, dog])
    assert_equal(seen[0], path.expand(2, -1, -1, -1))
    other = frames_of(pipe, prompt={0: "a cat", 3: "a red dog"})
    assert difference(other, frames_of(pipe)) > 1e-3


def test_texts_stay_outside_their_key_frames() -> None:
    texts = torch.tensor([[[0.0]], [[4.0]], [[0.0]]])
    path = travelled([1, 5, 6], texts, 9).flatten().tolist()
    assert path == [0, 0, 1, 2, 3, 4, 0, 0, 0]


def test_windows_cover_all_frames_and_overlap() -> None:
    assert windows(16, 16, 4) == [(0, 16)] == windows(16, 24, 4)
    assert windows(20, 16, 4) == [(0, 16), (4, 20)]
    assert windows(30, 16, 4) == [(0, 16), (12, 28), (14, 30)]
    assert windows(5, 1, 0) == [(i, i + 1) for i in range(5)]
    for frames in range(1, 40):
        spans = windows(frames, 6, 2)
        assert {f for start, stop in spans for f in range(start, stop)} == set(range(frames))
        assert len(set(spans)) == len(spans)
        for (_, stop), (start, _) in itertools.pairwise(spans):
            assert stop - start >= 2
    assert triangle(5).tolist() == [1, 2, 3, 2, 1] and triangle(4).tolist() == [1, 2, 2, 1]


def test_window_outputs_are_blended_by_their_weights() -> None:
    calls: list[tuple[int, int]] = []

    def network(sample: Tensor, t: Tensor, text: Tensor, **_: Any) -> tuple[Tensor]:
        calls.append((sample.shape[2], text.shape[1]))
        return (sample + len(calls) - 1,)  # 0 in the first window, 1 in the second

    frames = torch.arange(7.0).reshape(1, 1, 7, 1, 1).expand(2, 3, 7, 4, 4)
    blended = Windows(network, 5, 3)(frames, torch.zeros(2), torch.zeros(2, 7, 8, 9))  # type: ignore[arg-type]
    assert calls == [(5, 5), (5, 5)]
    # Weights 1 2 3 2 1 from frame 0 and from frame 2.
    shares = torch.tensor([0, 0, 1 / 4, 2 / 4, 3 / 4, 1, 1])
    assert_equal(blended[0][1, 2, :, 0, 0], torch.arange(7.0) + shares)


def test_windows_change_nothing_where_one_is_enough(pipe: AnimateDiffPipeline) -> None:
    plain = frames_of(pipe)
    assert_equal(frames_of(pipe, context_length=4, context_overlap=2), plain)
    narrow = frames_of(pipe, context_length=3, context_overlap=2)
    assert difference(narrow, plain) > 1e-4


def test_videos_may_be_longer_than_the_motion_modules_know(pipe: AnimateDiffPipeline) -> None:
    arguments: dict[str, Any] = {"num_frames": 11, "prompt": {0: "a cat", 10: "a dog"}}
    long = frames_of(pipe, **arguments, guidance_scale=1.5)
    assert long.shape == (1, 4, 11, 4, 5) and long.isfinite().all()
    other = frames_of(pipe, **arguments, guidance_scale=1.5, context_overlap=2)
    assert difference(long, other) > 1e-4


def test_it_is_saved_loaded_and_shares_components(
    pipe: AnimateDiffPipeline, sd_folder: Path, tmp_path: Path
) -> None:
    pipe.save_pretrained(tmp_path)
    loaded: Any = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(loaded) is AnimateDiffPipeline
    loaded.set_progress_bar_config(disable=True)
    assert_equal(frames_of(loaded), frames_of(pipe))
    still = StableDiffusionPipeline.from_pretrained(sd_folder)
    moving = AnimateDiffPipeline.from_pipe(still, motion_adapter=adapter())
    assert moving.vae is still.vae and moving.components.keys() == pipe.components.keys()
    again = AnimateDiffPipeline.from_pipe(moving)
    assert again.unet is moving.unet
    with pytest.raises(UnsupportedConfig, match="in the family AnimateDiff"):
        AutoPipelineForText2Image.from_pipe(moving)
    with pytest.raises(RequestError, match="has no motion_adapter; pass motion_adapter="):
        AnimateDiffPipeline.from_pretrained(sd_folder)
    parts = still.components | {"unet": still.unet, "motion_adapter": None}
    with pytest.raises(RequestError, match="this UNet has no motion modules; load one with"):
        AnimateDiffPipeline(**parts)
    with pytest.raises(RequestError, match=r"must be a fewstep MotionAdapter, got builtins\.str"):
        AnimateDiffPipeline(**parts | {"motion_adapter": "guoyww/animatediff"})


def test_motion_loras_steer_and_come_off_again(sd_folder: Path) -> None:
    still = StableDiffusionPipeline.from_pretrained(sd_folder)
    still.scheduler = LCMScheduler.from_config(still.scheduler.config)
    modules = adapter()
    kept = {k: v.clone() for k, v in (still.unet.state_dict() | modules.state_dict()).items()}
    pipe = AnimateDiffPipeline.from_pipe(still, motion_adapter=modules)
    pipe.set_progress_bar_config(disable=True)
    before = frames_of(pipe)
    attention = "unet.down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.processor"
    lora = {
        f"{attention}.to_{place}_lora.{part}.weight": torch.randn(shape, generator=seeded(1)) * 3
        for place in ("v", "out")
        for part, shape in (("down", (2, 8)), ("up", (8, 2)))
    }
    pipe.load_lora_weights(lora, adapter_name="zoom")
    assert difference(frames_of(pipe), before) > 1e-3
    assert_equal(frames_of(pipe, cross_attention_kwargs={"scale": 0}), before)
    for name, value in (still.unet.state_dict() | modules.state_dict()).items():
        assert torch.equal(value, kept[name]), name
    pipe.unload_lora_weights()
    assert_equal(frames_of(pipe), before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 0}, "num_frames must be an integer from 1 up, got 0"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt must be an integer from 1 up"),
        ({"decode_chunk_size": 1.5}, r"decode_chunk_size must be an integer from 1 up, got 1\.5"),
        ({"context_length": 0}, "context_length must be an integer from 1 up, got 0"),
        ({"context_length": 7}, "context_length=7 is more than the 6 frames"),
        ({"context_overlap": -1}, "context_overlap must be an integer from 0 up, got -1"),
        ({"num_frames": 7, "context_overlap": 6}, "must be less than context_length, 6"),
        ({"prompt": {}}, "prompt is missing"),
        ({"prompt": {4: "a cat"}}, "names frame 4, but with num_frames=4 the last is 3"),
        ({"prompt": {"0": "a cat"}}, "a frame of prompt must be an integer from 0 up"),
        ({"prompt": {0: "a cat", 1: 7}}, r"prompt\[1\] must be a string"),
        ({"latents": torch.zeros(1, 4, 4, 5)}, r"latents must have shape \(1, 4, 4, 4, 5\)"),
        ({"output_type": "gif"}, "output_type must be one of"),
        ({"eta": 0.5}, "eta=0.5 is an argument of the DDIMScheduler"),
    ],
)
def test_what_cannot_be_served_says_so(
    pipe: AnimateDiffPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        frames_of(pipe, **arguments)


def test_the_call_explains_its_arguments() -> None:
    text = AnimateDiffPipeline.__call__.__doc__ or ""
    assert "context_overlap: Frames that one such window shares" in text
    assert 'prompt={0: "dawn", 8: "night"}' in text


# ── files ──

VIDEO = np.random.default_rng(0).random((3, 32, 48, 3))


@pytest.mark.parametrize("kind", ["pil", "np", "pt", "bytes", "byte tensor"])
def test_animations_hold_the_frames(kind: str, tmp_path: Path) -> None:
    pixels = (VIDEO * 255).round().astype(np.uint8)
    frames: Any = {
        "pil": [PIL.Image.fromarray(frame) for frame in pixels],
        "np": VIDEO,
        "pt": torch.from_numpy(VIDEO).permute(0, 3, 1, 2),
        "bytes": list(pixels),
        "byte tensor": torch.from_numpy(pixels).permute(0, 3, 1, 2),
    }[kind]
    exact = [
        export_to_apng(frames, tmp_path / "a.png", fps=8),
        export_to_webp(frames, tmp_path / "a.webp", fps=8, lossless=True),
    ]
    for path in exact:
        with PIL.Image.open(path) as video:
            assert (video.n_frames, video.info["loop"]) == (3, 0)
            for index in range(3):
                video.seek(index)
                assert np.array_equal(np.asarray(video.convert("RGB")), pixels[index])
            assert int(video.info["duration"]) == 125
    with PIL.Image.open(export_to_gif(frames, tmp_path / "a.gif")) as video:
        assert video.n_frames == 3


def test_frames_that_are_none_are_refused() -> None:
    with pytest.raises(RequestError, match=r"frames must be those of one video.*frames\[0\]"):
        export_to_webp([[PIL.Image.new("RGB", (4, 4))]])  # type: ignore[list-item]
    with pytest.raises(RequestError, match=r"frames must be those of one video"):
        export_to_webp(torch.zeros(2, 3, 3, 8, 8))
    sizes = [PIL.Image.new("RGB", (4, 4)), PIL.Image.new("RGB", (4, 5))]
    with pytest.raises(RequestError, match="frames must have one size"):
        export_to_apng(sizes)
    with pytest.raises(RequestError, match="fps must be positive, got 0"):
        export_to_webp(VIDEO, fps=0)


def test_a_missing_encoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(RequestError, match="pip install imageio imageio-ffmpeg; or write an"):
        export_to_video(VIDEO)


# imageio's reader closes its pipes late.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_videos_are_written(tmp_path: Path) -> None:
    pytest.importorskip("imageio_ffmpeg")
    imageio = pytest.importorskip("imageio")
    grey = np.full((5, 32, 48, 3), 0.5)
    path = export_to_video(grey, tmp_path / "a.mp4", fps=8)
    assert Path(path).read_bytes()[4:8] == b"ftyp"
    read = imageio.mimread(path)
    assert len(read) == 5 and read[0].shape == (32, 48, 3)
    assert abs(int(read[0].mean()) - 128) <= 3
