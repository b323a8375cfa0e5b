"""LoRA on one network: what adapters add to its weights, and which of them it is merged with.

Adapters are merged into the parameters, so they cost nothing per step. What a parameter was before
is kept for as long as anything is merged into it: every change of the active set starts from that,
in float32, and taking the last adapter off puts the very tensor back.

    W' = W + sum over adapters of weight * delta,    delta = (alpha / rank) * up @ down

Shapes: O outputs, I inputs, K the kernel (two more dimensions of a convolution), r rank.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoints.lora_formats import Change
from ..errors import RequestError

# ── the mathematics: one module ──


def weight_delta(change: Change, base: Tensor) -> Tensor:
    """What a change adds to the weight `base` (O, I, K...) float32, in its shape, on its device.

    Raises ValueError or RuntimeError if the shapes do not fit.
    """
    parts = {name: part.to(base.device, torch.float32) for name, part in change.parts.items()}
    delta = fitted(product(parts) * scale_of(change), base.shape)
    if "dora_scale" not in parts:
        return delta
    return decomposed(base + delta, parts["dora_scale"]) - base


def bias_delta(change: Change, base: Tensor) -> Tensor:
    """What a change adds to the bias `base` (O,) float32, on its device."""
    return fitted(change.parts["diff_b"].to(base.device, torch.float32), base.shape)


DELTAS: dict[str, Callable[[Change, Tensor], Tensor]] = {
    "weight": weight_delta,
    "bias": bias_delta,
}


def touches(change: Change, parameter: str) -> bool:
    """Whether a change has anything for a module's "weight" or "bias"."""
    return ("diff_b" in change.parts) if parameter == "bias" else set(change.parts) != {"diff_b"}


def product(parts: Mapping[str, Tensor]) -> Tensor:
    """The unscaled delta of any kind of LoRA; all behind its outputs may be flat."""
    if "diff" in parts:
        return parts["diff"]
    if "up" in parts:
        up, down = parts["up"].flatten(1), parts["down"]
        if "mid" in parts:
            return tucker(parts["mid"], up.T, down.flatten(1))
        return (up @ down.flatten(1)).reshape(len(up), *down.shape[1:])
    if "hada_w1_a" in parts:
        return factor(parts, "hada_w1") * factor(parts, "hada_w2")
    left, right = factor(parts, "lokr_w1"), factor(parts, "lokr_w2")
    return torch.kron(left.reshape(*left.shape, *[1] * (right.ndim - left.ndim)), right)


def factor(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """One factor of LoHa or LoKr: whole, as a product, or as a Tucker decomposition."""
    if name in parts:
        return parts[name]
    a, b = parts[f"{name}_a"], parts[f"{name}_b"]
    core = parts.get(name.replace("_w", "_t"))
    return a @ b if core is None else tucker(core, a, b)


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(O, I, K...) of a core (r, r, K...) and factors (r, O) and (r, I)."""
    return torch.einsum("ij...,io,jn->on...", core, a, b)


def scale_of(change: Change) -> float:
    """alpha / rank; 1 without an alpha, and where nothing of low rank is multiplied."""
    names = ("down", "hada_w1_b", "lokr_w2_b", "lokr_w1_b")
    shown = (change.parts[name].shape[0] for name in names if name in change.parts)
    rank = next(shown, change.rank)
    if rank is None or change.alpha is None:
        return 1.0
    return change.alpha / (math.sqrt(rank) if change.rooted else rank)


def fitted(delta: Tensor, shape: Sequence[int]) -> Tensor:
    """`delta` in the `shape` of a weight; one of the two may be flat behind the outputs."""
    if tuple(delta.shape) == tuple(shape):
        return delta
    same = delta.ndim > 1 and len(delta) == shape[0] and delta.numel() == math.prod(shape)
    if not same or 2 not in (delta.ndim, len(shape)):
        raise ValueError(f"it makes a change of shape {tuple(delta.shape)}, not {tuple(shape)}")
    return delta.reshape(tuple(shape))


def decomposed(weight: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: `weight` (O, I, K...) with the norms of its outputs, or of its inputs, replaced."""
    kept = 0 if len(magnitude) == len(weight) else 1
    norm = torch.linalg.vector_norm(
        weight, dim=[d for d in range(weight.ndim) if d != kept], keepdim=True
    )
    tiny = torch.finfo(torch.float32).tiny
    return weight * (magnitude.reshape(norm.shape) / norm.clamp(min=tiny))


def misfit(change: Change, module: nn.Module) -> str | None:
    """Why a change does not fit a module, or None if it does."""
    if reason := damage(change):
        return reason
    parts = {name: torch.empty_like(p, device="meta") for name, p in change.parts.items()}
    for name, delta in DELTAS.items():
        if not touches(change, name):
            continue
        base = getattr(module, name, None)
        if base is None:
            return f"the module has no {name}"
        try:
            delta(replace(change, parts=parts), torch.empty(base.shape, device="meta"))
        except (ValueError, RuntimeError, IndexError) as error:
            return str(error).splitlines()[0]
    return None


def damage(change: Change) -> str | None:
    """Why a change makes no weights for any module, or None if it does."""
    for name, part in change.parts.items():
        if not part.is_floating_point():
            return f"its {name} holds {part.dtype}, which no network computes in"
        if not part.float().isfinite().all():
            return f"its {name} holds numbers that are not finite"
    if change.alpha is not None and not math.isfinite(change.alpha):
        return f"its alpha is {change.alpha}"
    return None


# ── weights: one number for an adapter, or one for each block ──

Weight = float | Mapping[str, float]  # the latter by attention, "down_blocks.1.attentions.0"
ATTENTION = re.compile(r"(down|up)_blocks\.(\d+)\.attentions\.(\d+)")
IN_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.\w+\.(\d+)\..*")
MID_ATTENTION = "mid_block.attentions.0"


def weight_of(weight: Weight, module: str) -> float:
    """The weight of an adapter at a module.

    As in diffusers, a block's n-th resnet goes with its n-th attention, and what belongs to no
    attention has weight 1.
    """
    if not isinstance(weight, Mapping):
        return weight
    if module.startswith(f"{MID_ATTENTION}."):
        return weight[MID_ATTENTION]
    match = IN_BLOCK.fullmatch(module)
    place = match and f"{match[1]}_blocks.{match[2]}.attentions.{match[3]}"
    return weight.get(place or "", 1.0)


def block_weights(given: Mapping[str, Any], modules: Iterable[str]) -> dict[str, float]:
    """The weight of each attention, of diffusers' {"down": 1, "mid": 0.5, "up": {"block_0": [1]}}.

    What is not given is 1. Raises RequestError for a block that is not there or has no attention.
    """
    names = list(modules)
    blocks: dict[str, dict[str, int]] = {"down": {}, "up": {}}  # way -> block -> attentions
    for name in names:
        if match := ATTENTION.fullmatch(name):
            counts = blocks[match[1]]
            counts[f"block_{match[2]}"] = counts.get(f"block_{match[2]}", 0) + 1
    middle = ["mid"] if MID_ATTENTION in names else []
    refuse_unknown("blocks of the unet", given, ["down", *middle, "up"])
    weights = {MID_ATTENTION: per_layer(given.get("mid", 1.0), 1, "mid")[0]}
    for way, counts in blocks.items():
        asked = given.get(way, 1.0)
        if isinstance(asked, Mapping):
            refuse_unknown(f"{way} blocks with attention", asked, counts)
        for block, count in counts.items():
            value = asked.get(block, 1.0) if isinstance(asked, Mapping) else asked
            row = f"{way}_blocks.{block.removeprefix('block_')}.attentions"
            layers = per_layer(value, count, f"{way}.{block}")
            weights |= {f"{row}.{index}": layer for index, layer in enumerate(layers)}
    return weights


def network_weight(network: str, module: nn.Module, weight: Any) -> Weight:
    """What one adapter's weight, as `set_adapters` takes it, says about one network."""
    if isinstance(weight, Mapping):
        weight = weight.get(network)
    if weight is None:
        return 1.0
    if isinstance(weight, Mapping) and network == "unet":
        return block_weights(weight, [name for name, _ in module.named_modules()])
    return finite(weight, network)


def per_layer(value: Any, count: int, place: str) -> list[float]:
    """`count` weights from one number, or from a list of one or of that many."""
    listed = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(listed) not in (1, count):
        raise RequestError(
            f"adapter_weights of {place} holds {len(listed)} numbers, but there are {count} "
            "attentions; give one, or one for each"
        )
    return [finite(number, place) for number in (listed * count if len(listed) == 1 else listed)]


def finite(value: Any, place: str) -> float:
    """`value` as a number. Raises RequestError unless it is a finite one."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise RequestError(f"adapter_weights of {place} must be a finite number, got {value!r}")
    return float(value)


def refuse_unknown(what: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises RequestError for a key that is not `known`."""
    if surplus := [key for key in given if key not in known]:
        raise RequestError(
            f"adapter_weights names {', '.join(map(repr, surplus))}; the {what} are: "
            f"{', '.join(known) or 'none'}"
        )


# ── the registry: one network ──


@dataclass(frozen=True, eq=False)
class Adapter:
    """What one LoRA changes in one network, by module; `source` says where it came from."""

    changes: Mapping[str, Change]
    source: str | None = None


@dataclass(frozen=True, eq=False)
class Fused:
    """An adapter that stays merged at `weight * scale`, whatever becomes of the others."""

    adapter: Adapter
    weight: Weight
    scale: float


class Adapters:
    """The adapters of one network. Nothing changes in the network until `merge`."""

    def __init__(self) -> None:
        self.loaded: dict[str, Adapter] = {}
        self.weights: dict[str, Weight] = {}  # of the active ones
        self.fused: dict[str, Fused] = {}
        self.enabled = True
        self.scale = 1.0  # multiplies the weights of all but the fused ones
        self._originals: dict[str, Tensor] = {}  # parameter -> what it was
        # Module -> its terms; None: unknown, since rewriting it was broken off.
        self._merged: dict[str, tuple[tuple[float, Change], ...] | None] = {}

    @property
    def effective(self) -> dict[str, tuple[Adapter, Weight, float]]:
        """The adapters that the next merge takes, with their weights and a common factor."""
        terms = {name: (f.adapter, f.weight, f.scale) for name, f in self.fused.items()}
        if self.enabled:
            for name, weight in self.weights.items():
                terms.setdefault(name, (self.loaded[name], weight, self.scale))
        return terms

    def remove(self, name: str) -> None:
        """Forget an adapter, if it is there. A fused one keeps its effect until `unfuse`."""
        self.loaded.pop(name, None)
        self.weights.pop(name, None)

    def fuse(self, name: str, scale: float) -> None:
        """Fix an adapter at its present weight (1 if it is not active) times `scale`."""
        self.fused[name] = Fused(self.loaded[name], self.weights.get(name, 1.0), scale)

    def merge(self, network: nn.Module) -> None:
        """Make the network's parameters what the adapters say; touches only what has changed."""
        wanted: dict[str, tuple[tuple[float, Change], ...]] = {}
        for adapter, weight, scale in self.effective.values():
            for module, change in adapter.changes.items():
                if number := weight_of(weight, module) * scale:
                    wanted[module] = (*wanted.get(module, ()), (number, change))
        modules = dict(network.named_modules())
        for name in {**self._merged, **wanted}:
            terms = wanted.get(name, ())
            if terms == self._merged.get(name, ()):
                continue
            self._merged[name] = None
            for parameter in DELTAS:
                self._rewrite(name, modules[name], parameter, terms)
            self._merged[name] = terms
            if not terms:
                del self._merged[name]

    @torch.no_grad()
    def _rewrite(
        self, name: str, module: nn.Module, parameter: str, terms: Sequence[tuple[float, Change]]
    ) -> None:
        key = f"{name}.{parameter}"
        terms = [(number, change) for number, change in terms if touches(change, parameter)]
        if not terms and key not in self._originals:
            return
        target = getattr(module, parameter)
        if not terms:
            write(target, self._originals[key])
            del self._originals[key]
            return
        original = self._originals.setdefault(key, kept(target))
        base = original.to(target.device, torch.float32)
        total = base.clone()
        for number, change in terms:
            total += number * DELTAS[parameter](change, base)
        write(target, total)


def kept(parameter: Tensor) -> Tensor:
    """What a parameter holds, where it takes no memory of an accelerator."""
    return parameter.data.cpu()


def write(parameter: Tensor, value: Tensor) -> None:
    """Let a parameter hold `value`.

    On an accelerator in place, so that compiled code stays valid; on the CPU by reference, since
    what it holds may be mapped from a file.
    """
    if parameter.device.type == "cpu":
        parameter.data = value.to(parameter.dtype)
    else:
        parameter.copy_(value)


def adapters_of(network: nn.Module) -> Adapters:
    """The adapters of a network. They live with it, since pipelines share networks."""
    found = getattr(network, "lora_adapters", None)
    if not isinstance(found, Adapters):
        found = Adapters()
        object.__setattr__(network, "lora_adapters", found)
    return found


def targets(network: nn.Module) -> dict[str, nn.Module]:
    """The modules that a LoRA can change: those with a weight."""
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
    }
