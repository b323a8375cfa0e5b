"""Case 4: a config brings no code and no network, and no more memory than a model has."""

from __future__ import annotations

import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest
from bad_files import changed

from fewstep import DiffusionPipeline, FewstepError, RequestError

Run = Callable[..., tuple[int, str, str]]
INDEX, UNET, TEXT = "model_index.json", "unet/config.json", "text_encoder/config.json"
SCHEDULER, TOKENIZER = "scheduler/scheduler_config.json", "tokenizer/tokenizer_config.json"
VAE = "vae/config.json"
JSON = (INDEX, UNET, TEXT, SCHEDULER, TOKENIZER, VAE)
MODULE = "evil_code_of_a_model"
EVIL = f"{MODULE}.Evil"
BILLION = 10**9


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No test of this file connects, or imports what lies in a model's folder."""
    calls = []

    def connect(*arguments: object) -> NoReturn:
        calls.append(arguments)
        raise OSError("no network here")

    monkeypatch.setattr(socket.socket, "connect", connect)
    yield
    assert calls == []
    assert not any(MODULE in name for name in sys.modules)


def with_code(folder: Path, place: Path, file: str, **entries: Any) -> Path:
    """A model with other entries, and Python files of the name that they give, which say so."""
    changed(folder, place, file, **entries)
    for part in (place, *(f for f in place.iterdir() if f.is_dir())):
        (part / f"{MODULE}.py").write_text(f"open({str(place / 'canary')!r}, 'w')")
    return place


CODE: dict[str, tuple[str, dict[str, Any]]] = {
    "auto_map of the text encoder": (
        TEXT,
        {"auto_map": {"AutoModel": EVIL, "CLIPTextModel": EVIL}},
    ),
    "trust_remote_code of the text encoder": (TEXT, {"trust_remote_code": True}),
    "auto_map of the tokenizer": (
        TOKENIZER,
        {
            "auto_map": {"AutoTokenizer": [EVIL, EVIL]},
            "tokenizer_class": "Evil",
            "trust_remote_code": True,
        },
    ),
    "kernels of the hub": (
        TEXT,
        {
            "_attn_implementation": "evil/kernels",
            "attn_implementation": "evil/kernels",
            "_attn_implementation_internal": "evil/kernels",
        },
    ),
    "a quantization": (TEXT, {"quantization_config": {"quant_method": "bitsandbytes"}}),
    "custom_pipeline": (INDEX, {"custom_pipeline": MODULE, "trust_remote_code": True}),
    "a library of the model's": (INDEX, {"unet": [MODULE, "UNet2DConditionModel"]}),
    "auto_map of the scheduler": (SCHEDULER, {"auto_map": {"AutoScheduler": EVIL}}),
}


@pytest.mark.parametrize("entry", CODE)
def test_entries_that_name_code_are_passed_over(
    entry: str, sd_folder: Path, tmp_path: Path
) -> None:
    """Case 4: `auto_map`, `trust_remote_code`, `custom_pipeline`: the model's own class loads."""
    file, entries = CODE[entry]
    folder = with_code(sd_folder, tmp_path / "model", file, **entries)
    pipe = DiffusionPipeline.from_pretrained(folder)
    parts = (type(pipe), type(pipe.unet), type(pipe.text_encoder))
    assert all(part.__module__.split(".")[0] in ("fewstep", "transformers") for part in parts)
    assert not (folder / "canary").exists()


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "a class of a custom library": (INDEX, {"unet": [MODULE, "Evil"]}),
    "a pipeline of a custom module": (INDEX, {"_class_name": [MODULE, "Evil"]}),
    "an unknown pipeline": (INDEX, {"_class_name": "Evil"}),
    "auto_map of the unet": (UNET, {"auto_map": {"AutoModel": EVIL}}),
    "a component outside the folder": (INDEX, {"../evil": ["diffusers", "AutoencoderKL"]}),
}


@pytest.mark.parametrize("entry", REFUSED)
def test_classes_of_other_code_are_refused(entry: str, sd_folder: Path, tmp_path: Path) -> None:
    """Case 4: a model_index.json with a custom library."""
    file, entries = REFUSED[entry]
    folder = with_code(sd_folder, tmp_path / "model", file, **entries)
    with pytest.raises(FewstepError):
        DiffusionPipeline.from_pretrained(folder)
    assert not (folder / "canary").exists()


def test_a_callers_own_wish_for_remote_code_is_refused(sd_folder: Path) -> None:
    """Case 4: `custom_pipeline` and `trust_remote_code` as arguments."""
    with pytest.raises(RequestError, match="custom_pipeline='x' is not supported"):
        DiffusionPipeline.from_pretrained(sd_folder, custom_pipeline="x")
    with pytest.raises((RequestError, TypeError), match="trust_remote_code"):
        DiffusionPipeline.from_pretrained(sd_folder, trust_remote_code=True)


def test_a_lora_hidden_in_a_text_encoder_is_refused(sd_folder: Path, tmp_path: Path) -> None:
    """Case 4: transformers would load what PEFT's config names, unasked."""
    folder = changed(sd_folder, tmp_path / "model", TEXT)
    (folder / "text_encoder" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "base_model_name_or_path": "evil/model"}'
    )
    with pytest.raises(FewstepError, match=r"adapter_config\.json.*remove it"):
        DiffusionPipeline.from_pretrained(folder)


LARGE = [
    (UNET, "block_out_channels", [BILLION, BILLION]),
    (UNET, "layers_per_block", BILLION),
    (UNET, "transformer_layers_per_block", BILLION),
    (UNET, "cross_attention_dim", BILLION),
    (UNET, "time_cond_proj_dim", 10**12),
    (VAE, "block_out_channels", [BILLION] * 4),
    (VAE, "layers_per_block", BILLION),
    (VAE, "latent_channels", BILLION),
    (TEXT, "hidden_size", BILLION),
    (TEXT, "num_hidden_layers", BILLION),
    (TEXT, "vocab_size", BILLION),
    (SCHEDULER, "num_train_timesteps", BILLION),
]


@pytest.mark.parametrize(("file", "key", "value"), LARGE, ids=lambda value: str(value)[:30])
def test_sizes_that_no_model_has_are_refused_at_once(
    file: str, key: str, value: Any, sd_folder: Path, tmp_path: Path
) -> None:
    """Case 4: 10^9 channels, layers and steps; nothing is allocated, no loop is begun."""
    folder = changed(sd_folder, tmp_path / "model", file, **{key: value})
    began = time.monotonic()
    with pytest.raises(FewstepError, match=rf"{key} holds \d+, which is more than"):
        DiffusionPipeline.from_pretrained(folder)
    assert time.monotonic() - began < 5


DEEP = '{"a":' + "[" * 10**6 + "]" * 10**6 + "}"
CONTENTS = {
    "of depth 10^6": DEEP.encode(),
    "of depth 900": DEEP.replace("[" * 10**6, "[" * 900).replace("]" * 10**6, "]" * 900).encode(),
    "a number of 10^4 digits": b'{"a":%s}' % (b"1" * 10**4),
    "a list": b"[1]",
    "cut": b'{"a":',
    "no text": b"\x80\x04\xff",
}


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("file", JSON)
def test_json_that_is_none_of_a_model_is_one_error_of_ours(
    file: str, content: str, sd_folder: Path, tmp_path: Path
) -> None:
    """Case 4: nested 10^6 deep, and everything else that a JSON file may be."""
    folder = changed(sd_folder, tmp_path / "model", file)
    (folder / file).write_bytes(CONTENTS[content])
    with pytest.raises(FewstepError) as refusal:
        DiffusionPipeline.from_pretrained(folder)
    # What parses is known by its keys.
    assert str(folder) in str(refusal.value) or content == "of depth 900"


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (UNET, "block_out_channels", None),
        (UNET, "block_out_channels", [-8, 16]),
        (UNET, "norm_num_groups", 0),
        (UNET, "layers_per_block", "2"),
        (UNET, "down_block_types", 5),
        (TEXT, "hidden_act", "os.system"),
        (TEXT, "dtype", "load"),
        (TEXT, "num_attention_heads", 0),
        (VAE, "norm_num_groups", 0),
        (SCHEDULER, "num_train_timesteps", "a"),
        (SCHEDULER, "num_train_timesteps", 0),
    ],
    ids=lambda value: str(value)[:30],
)
def test_values_of_another_kind_are_one_error_that_names_the_file(
    file: str, key: str, value: Any, sd_folder: Path, tmp_path: Path
) -> None:
    """Case 4: what constructors do not expect."""
    folder = changed(sd_folder, tmp_path / "model", file, **{key: value})
    with pytest.raises(FewstepError, match=str(folder)):
        DiffusionPipeline.from_pretrained(folder)


def test_the_command_line_says_so_in_one_line(run: Run, sd_folder: Path, tmp_path: Path) -> None:
    """Case 4: exit 2 and no traceback."""
    folder = changed(sd_folder, tmp_path / "model", TEXT)
    (folder / TEXT).write_text(DEEP)
    code, out, error = run("generate", "a cat", "-m", folder)
    assert (code, out, error.count("\n")) == (2, "", 1)
    assert "not valid JSON" in error
