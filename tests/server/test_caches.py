"""Promises of the caches: bounded in bytes, by values and not by names."""

from __future__ import annotations

from typing import Any

import PIL.Image
import torch

from fewstep.server.caches import Cache, bytes_of, digest, remembering


def test_what_was_used_longest_ago_goes_first_and_the_bytes_stay_below_the_bound() -> None:
    cache: Cache[str] = Cache(100)
    cache.put("a", "A", 40)
    cache.put("b", "B", 40)
    assert cache.get("a") == "A"
    cache.put("c", "C", 40)
    assert cache.get("b") is None
    assert (cache.get("a"), cache.get("c")) == ("A", "C")
    assert cache.size == 80
    cache.put("a", "AA", 100)
    assert (cache.size, len(cache)) == (100, 1)
    assert cache.get("a") == "AA"


def test_what_is_larger_than_the_cache_is_not_kept_and_drives_nothing_out() -> None:
    cache: Cache[str] = Cache(100)
    cache.put("a", "A", 60)
    cache.put("b", "B", 101)
    assert cache.get("b") is None
    assert cache.get("a") == "A"
    nothing: Cache[str] = Cache(0)
    nothing.put("a", "A", 1)
    assert nothing.get("a") is None


def test_a_function_is_called_once_for_equal_values_and_again_in_another_context() -> None:
    calls: list[Any] = []
    context = ["plain"]

    def double(x: torch.Tensor, names: list[str], scale: int = 2) -> torch.Tensor:
        calls.append(names)
        return x * scale

    kept: Cache[Any] = Cache(1000)
    remembered = remembering(double, kept, lambda: context[0])
    x = torch.arange(3.0)
    assert torch.equal(remembered(x, ["a"]), x * 2)
    assert torch.equal(remembered(x.clone(), ["a"]), x * 2)
    assert len(calls) == 1
    remembered(x + 1, ["a"])
    remembered(x, ["b"])
    remembered(x, ["a"], scale=3)
    remembered(x.reshape(3, 1), ["a"])
    context[0] = "with a LoRA"
    remembered(x, ["a"])
    assert len(calls) == 6
    assert kept.size == 6 * 12


def test_the_size_of_tensors_is_that_of_their_numbers() -> None:
    half = torch.zeros(2, 3, dtype=torch.float16)
    assert bytes_of((half, None, torch.zeros(5))) == 12 + 20


def test_a_digest_is_of_the_pixels_and_of_the_shape() -> None:
    red = PIL.Image.new("RGB", (4, 2), "red")
    assert digest(red) == digest(red.copy())
    assert digest(red) != digest(PIL.Image.new("RGB", (2, 4), "red"))
    assert digest(red) != digest(PIL.Image.new("RGB", (4, 2), "blue"))
    assert digest(None) is None
