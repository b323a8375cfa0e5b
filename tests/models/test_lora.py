"""What an adapter adds to a weight, and that the weights come back bit by bit."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import pytest
import torch
from conftest import UNET
from torch import Tensor, nn
from torch.nn import functional as F

from fewstep import RequestError, UNet2DConditionModel
from fewstep.checkpoints.lora_formats import Change
from fewstep.models import lora
from fewstep.models.lora import (
    Adapter,
    Adapters,
    adapters_of,
    block_weights,
    misfit,
    weight_delta,
    weight_of,
    write,
)

OUT, IN, RANK = 6, 4, 2


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def delta(
    base: Tensor, alpha: float | None = None, rooted: bool = False, **parts: Tensor
) -> Tensor:
    return weight_delta(Change(parts, alpha, rooted), base)


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


LINEAR, CONV = torch.zeros(OUT, IN), torch.zeros(OUT, IN, 3, 3)
UP, DOWN = randn(OUT, RANK), randn(RANK, IN)


def test_lora_is_alpha_by_rank_times_up_down() -> None:
    close(delta(LINEAR, up=UP, down=DOWN), UP @ DOWN)
    close(delta(LINEAR, 0.5, up=UP, down=DOWN), UP @ DOWN / 4)
    close(delta(LINEAR, 2.0, True, up=UP, down=DOWN), UP @ DOWN * 2**0.5)


def test_a_linear_layer_and_a_1x1_convolution_take_each_others_files() -> None:
    conv = {"up": UP[..., None, None], "down": DOWN[..., None, None]}
    close(delta(LINEAR, **conv), UP @ DOWN)
    close(delta(torch.zeros(OUT, IN, 1, 1), up=UP, down=DOWN)[..., 0, 0], UP @ DOWN)


@pytest.mark.parametrize("tucker", [False, True])
def test_a_convolution_lora_is_two_or_three_convolutions(tucker: bool) -> None:
    x = randn(1, IN, 5, 5)
    up, down = randn(OUT, RANK, 1, 1), randn(RANK, IN, 1 if tucker else 3, 1 if tucker else 3)
    parts = {"up": up, "down": down}
    h = F.conv2d(x, down, padding=0 if tucker else 1)
    if tucker:
        parts["mid"] = randn(RANK, RANK, 3, 3)
        h = F.conv2d(h, parts["mid"], padding=1)
    close(F.conv2d(x, delta(CONV, **parts), padding=1), F.conv2d(h, up))


def test_loha_is_a_product_by_element_of_two_loras() -> None:
    a, b = randn(OUT, RANK, seed=1), randn(RANK, IN, seed=1)
    hada = {"hada_w1_a": UP, "hada_w1_b": DOWN, "hada_w2_a": a, "hada_w2_b": b}
    close(delta(LINEAR, 1.0, **hada), (UP @ DOWN) * (a @ b) / 2)
    flat = hada | {"hada_w1_b": randn(RANK, IN * 9), "hada_w2_b": randn(RANK, IN * 9, seed=1)}
    expected = (UP @ flat["hada_w1_b"]) * (a @ flat["hada_w2_b"])
    close(delta(CONV, **flat), expected.reshape(CONV.shape))


def test_loha_with_cores_is_two_tucker_decompositions() -> None:
    parts, product = {}, torch.ones(())
    for index in (1, 2):
        core = randn(RANK, RANK, 3, 3, seed=index)
        a, b = randn(RANK, OUT, seed=index), randn(RANK, IN, seed=index)
        parts |= {f"hada_t{index}": core, f"hada_w{index}_a": a, f"hada_w{index}_b": b}
        whole = torch.zeros(CONV.shape)
        for i in range(RANK):
            for j in range(RANK):
                whole += a[i, :, None, None, None] * b[j, None, :, None, None] * core[i, j]
        product = product * whole
    close(delta(CONV, **parts), product)


def test_lokr_is_a_kronecker_product() -> None:
    small, large = randn(2, 2), randn(3, 2)
    close(delta(LINEAR, 7.0, lokr_w1=small, lokr_w2=large), torch.kron(small, large))
    a, b = randn(3, RANK), randn(RANK, 2)
    parts = {"lokr_w1": small, "lokr_w2_a": a, "lokr_w2_b": b}
    close(delta(LINEAR, 1.0, **parts), torch.kron(small, a @ b) / 2)
    kernel = randn(3, 2, 3, 3)
    blocks = torch.cat(
        [torch.cat([small[i, j] * kernel for j in range(2)], dim=1) for i in range(2)]
    )
    close(delta(CONV, lokr_w1=small, lokr_w2=kernel), blocks)
    flat = {"lokr_w1": small, "lokr_w2_a": torch.eye(3), "lokr_w2_b": kernel.reshape(3, -1)}
    close(delta(CONV, **flat), blocks)


def test_dora_sets_the_norms_of_outputs_or_of_inputs() -> None:
    for base, up, down in (
        (randn(OUT, IN), UP, DOWN),
        (randn(OUT, IN, 3, 3), UP[..., None, None], randn(RANK, IN, 3, 3)),
    ):
        plain = base + delta(base, up=up, down=down)
        for kept, count in ((0, OUT), (1, IN)):
            shape = [1] * base.ndim
            shape[kept] = count
            magnitude = randn(count).abs().reshape(shape)
            changed = base + delta(base, up=up, down=down, dora_scale=magnitude)
            rows, before = (
                changed.transpose(0, kept).flatten(1),
                plain.transpose(0, kept).flatten(1),
            )
            close(rows.norm(dim=1), magnitude.flatten())
            close(F.cosine_similarity(rows, before), torch.ones(count))


@pytest.mark.parametrize(
    ("module", "parts", "reason"),
    [
        (nn.Linear(IN, OUT), {"up": UP, "down": DOWN}, None),
        (nn.Linear(IN, OUT), {"diff": LINEAR, "diff_b": torch.zeros(OUT)}, None),
        (nn.LayerNorm(IN), {"diff": torch.zeros(IN)}, None),
        (nn.Linear(OUT, IN), {"up": UP, "down": DOWN}, r"\(6, 4\), not \(4, 6\)"),
        (nn.Linear(IN, OUT), {"up": UP, "down": UP}, "."),
        (nn.Conv2d(IN, OUT, 1), {"up": UP, "down": torch.zeros(RANK, IN, 3, 3)}, "not"),
        (nn.Linear(IN, OUT, bias=False), {"diff_b": torch.zeros(OUT)}, "no bias"),
        (nn.Linear(IN, OUT), {"diff_b": torch.zeros(IN)}, "not"),
    ],
)
def test_a_change_that_does_not_fit_says_why(
    module: nn.Module, parts: Mapping[str, Tensor], reason: str | None
) -> None:
    found = misfit(Change(parts), module)
    if reason is None:
        assert found is None
    else:
        import re

        assert found is not None
        assert re.search(reason, found)


# ── the registry ──


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(IN, OUT), nn.Conv2d(IN, OUT, 3)).to(dtype)


def adapter(seed: int) -> Adapter:
    linear = Change({"up": randn(OUT, RANK, seed=seed), "down": randn(RANK, IN, seed=seed)})
    both = {"diff": randn(*CONV.shape, seed=seed), "diff_b": randn(OUT, seed=seed)}
    return Adapter({"0": linear, "1": Change(both)})


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_merging_starts_from_the_originals_and_ends_there_bit_by_bit(dtype: torch.dtype) -> None:
    module = network(dtype)
    before = state(module)
    registry = adapters_of(module)
    registry.loaded = {"a": adapter(1), "b": adapter(2)}
    for weights in ({"a": 1.0}, {"a": 0.3, "b": -0.7}, {"b": 2.0}):
        registry.weights = weights
        registry.merge(module)
    merged = state(module)
    expected = before["0.weight"].float()
    expected = expected + 2 * weight_delta(registry.loaded["b"].changes["0"], expected)
    assert torch.equal(merged["0.weight"], expected.to(dtype))
    assert not equal(before, merged)
    registry.weights = {}
    registry.merge(module)
    assert equal(before, state(module))
    assert not registry._originals and not registry._merged


@pytest.mark.parametrize("call", range(6))
def test_a_merge_that_breaks_off_anywhere_is_made_good_by_the_next(
    call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = network()
    before, calls = state(module), itertools.count()
    registry = adapters_of(module)
    registry.loaded = {"a": adapter(1)}

    def breaks(parameter: Tensor, value: Tensor) -> None:
        if next(calls) == call:
            raise MemoryError
        write(parameter, value)

    with monkeypatch.context() as patch:
        patch.setattr(lora, "write", breaks)
        for weights in ({"a": 1.0}, {}):  # three writes each
            registry.weights = weights
            with suppress(MemoryError):
                registry.merge(module)
    assert next(calls) > call
    registry.weights = {}
    registry.merge(module)
    assert equal(before, state(module))
    assert not registry._originals and not registry._merged


def test_a_merge_that_changes_nothing_leaves_the_tensors_alone() -> None:
    module = network()
    registry = adapters_of(module)
    registry.loaded, registry.weights = {"a": adapter(1)}, {"a": 1.0}
    registry.merge(module)
    place = module[0].weight.data_ptr()  # type: ignore[index,union-attr]
    registry.merge(module)
    assert module[0].weight.data_ptr() == place  # type: ignore[index,union-attr]


def test_originals_follow_a_network_to_another_dtype() -> None:
    module, plain = network(), network().half()
    registry = adapters_of(module)
    registry.loaded, registry.weights = {"a": adapter(1)}, {"a": 1.0}
    registry.merge(module)
    module.half()
    registry.weights = {}
    registry.merge(module)
    assert equal(plain.state_dict(), module.state_dict())


def test_a_fused_adapter_stays_whatever_becomes_of_the_others() -> None:
    module = network()
    before = state(module)
    registry = adapters_of(module)
    registry.loaded, registry.weights = {"a": adapter(1), "b": adapter(2)}, {"a": 0.5}
    registry.fuse("a", 0.5)
    registry.merge(module)
    fused = state(module)
    registry.remove("a")
    registry.scale = 0.1
    registry.merge(module)
    assert equal(fused, state(module))
    assert not equal(before, fused)
    registry.fused.clear()
    registry.merge(module)
    assert equal(before, state(module))


def test_a_copied_network_has_its_own_adapters() -> None:
    module = network()
    before = state(module)
    registry = adapters_of(module)
    registry.loaded, registry.weights = {"a": adapter(1)}, {"a": 1.0}
    registry.merge(module)
    other = copy.deepcopy(module)
    adapters_of(other).weights = {}
    adapters_of(other).merge(other)
    assert equal(before, state(other))
    assert not equal(before, state(module))
    assert isinstance(adapters_of(other), Adapters)


# ── weights by block ──

MODULES = [
    *(f"down_blocks.1.attentions.{i}" for i in range(2)),
    "mid_block.attentions.0",
    *(f"up_blocks.0.attentions.{i}" for i in range(3)),
]


def test_weights_by_block_reach_the_modules_as_in_diffusers() -> None:
    given = {"down": 0.1, "mid": 0.2, "up": {"block_0": [0.3, 0.4, 0.5]}}
    weight = block_weights(given, MODULES)
    for module, expected in {
        "down_blocks.1.attentions.1.proj_in": 0.1,
        "down_blocks.1.resnets.0.conv1": 0.1,
        "down_blocks.0.resnets.0.conv1": 1.0,
        "mid_block.attentions.0.proj_in": 0.2,
        "mid_block.resnets.0.conv1": 1.0,
        "up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q": 0.4,
        "up_blocks.0.resnets.2.conv1": 0.5,
        "conv_in": 1.0,
    }.items():
        assert weight_of(weight, module) == expected
        assert weight_of(0.7, module) == 0.7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"top": 1}, "'top'; the blocks of the unet are: down, mid, up"),
        ({"down": {"block_0": 1}}, "'block_0'; the down blocks with attention are: block_1"),
        ({"up": {"block_0": [1, 2]}}, "up.block_0 holds 2 numbers, but there are 3"),
        ({"mid": "much"}, "mid must be a finite number, got 'much'"),
    ],
)
def test_weights_of_blocks_that_are_not_there_are_refused(
    given: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        block_weights(given, MODULES)


def test_blocks_are_counted_on_the_network_itself() -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**UNET)
    weights = block_weights({"up": [0.5, 0.25]}, [name for name, _ in unet.named_modules()])
    assert weights["up_blocks.0.attentions.1"] == 0.25
    assert weights["down_blocks.1.attentions.0"] == 1.0
