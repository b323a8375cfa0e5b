"""LoRAs of a pipeline: files in, which are active and how much, fused or not, files out."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from ..checkpoints.config import understood
from ..checkpoints.locate import HOW_TO_CONVERT, Source
from ..checkpoints.lora_formats import (
    CONFIG_KEY,
    WEIGHTS_NAME,
    Changes,
    find_lora,
    names_of_modules,
    parse_lora,
    read_lora,
    refuse_other_family,
)
from ..checkpoints.weights import save_tensors
from ..errors import CheckpointError, RequestError
from ..models.lora import (
    Adapter,
    Adapters,
    Weight,
    adapters_of,
    finite,
    misfit,
    network_weight,
    refuse_unknown,
    targets,
)
from .notices import warn_caller

NETWORKS = ("unet", "text_encoder", "text_encoder_2")

LoraT = TypeVar("LoraT", bound="LoraLoader")
ResultT = TypeVar("ResultT")
P = ParamSpec("P")


class LoraLoader:
    """The LoRA methods of a pipeline, for its UNet and its text encoders.

    Adapters are merged into the weights, so they cost nothing per step; the weights come back bit
    by bit when the adapters go. Networks keep their adapters when pipelines share them.
    """

    if TYPE_CHECKING:

        @property
        def components(self) -> dict[str, Any]: ...

    # ── loading ──

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | os.PathLike[str] | Mapping[str, Tensor],
        adapter_name: str | None = None,
        *,
        weight_name: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool | None = None,
        token: str | bool | None = None,
        use_safetensors: bool | None = None,
        strict: bool = True,
    ) -> None:
        """Load a LoRA as `adapter_name` ("default_0" and so on if None) and make it the active one.

        From a local file, a local folder, a hub repository or a dict of tensors, in any dialect:
        diffusers, PEFT, Kohya; LoRA, LoCon, LoHa, LoKr, DoRA. Without `weight_name` a folder must
        hold pytorch_lora_weights.safetensors or a single candidate. `strict=False` leaves out, with
        a warning, what does not fit.

        Raises CheckpointError for files that are missing, pickled, surplus in parts or made for
        another model, RequestError for a name that is taken; the pipeline then stays as it was.
        """
        if use_safetensors is False:
            raise RequestError(f"use_safetensors=False cannot be served: {HOW_TO_CONVERT}")
        name = self._new_name(adapter_name)
        given = pretrained_model_name_or_path_or_dict
        source: str | None = None
        config: dict[str, Any] = {}
        if isinstance(given, Mapping):
            tensors = checked(given)
        else:
            place = Source(
                os.fspath(given),
                subfolder=subfolder,
                revision=revision,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
                token=token,
            )
            path = find_lora(place, weight_name)
            tensors, config = read_lora(path)
            source = os.fspath(given) if weight_name is None else f"{place.path}/{weight_name}"
        with understood(f"the LoRA {source or 'of tensors'}"):
            changes = self._changes(tensors, config, strict)
        enabled = any(adapters.enabled for adapters in self._registries)
        others = [n for n in self.get_active_adapters() if enabled and n not in self.fused_loras]
        for network, found in changes.items():
            adapters_of(self._networks[network]).loaded[name] = Adapter(found, source)
        self.set_adapters(name)
        if others:
            warn_caller(
                f"the adapter {name!r} is active now, and {', '.join(map(repr, others))} no more; "
                f"to use them together call set_adapters({[*others, name]})"
            )

    def _new_name(self, name: str | None) -> str:
        taken = self._names_of_adapters
        if name is None:
            numbers = (f"default_{number}" for number in range(len(taken) + 1))
            return next(free for free in numbers if free not in taken)
        if not isinstance(name, str) or not name:
            raise RequestError(f"adapter_name must be a text, got {name!r}")
        if name in taken:
            undo = "unfuse_lora()" if name in self.fused_loras else f"delete_adapters({name!r})"
            raise RequestError(
                f"adapter_name={name!r} is taken; choose another, or call {undo} first"
            )
        return name

    def _changes(
        self, tensors: Mapping[str, Tensor], config: Mapping[str, Any], strict: bool
    ) -> dict[str, Changes]:
        """What a file changes, by network. Raises CheckpointError for what does not fit."""
        networks = self._networks
        modules = {network: targets(module) for network, module in networks.items()}
        unet = networks.get("unet")
        unet_config: Any = None if unet is None else unet.config
        known = {n: modules.get(n, {}) for n in NETWORKS if n in self.components}
        refuse_other_family(tensors, known, unet_config)
        names = {
            network: names_of_modules(found, unet_config if network == "unet" else None)
            for network, found in modules.items()
        }
        changes, surplus = parse_lora(tensors, config, names)
        unfit = [f"{key} fits no module" for key in surplus]
        for network, found in changes.items():
            for module in list(found):
                if reason := misfit(found[module], modules[network][module]):
                    unfit.append(f"{network}.{module}: {reason}")
                    del found[module]
        changes = {network: found for network, found in changes.items() if found}
        shown = "; ".join(unfit[:10]) + (f"; and {len(unfit) - 10} more" if unfit[10:] else "")
        if not changes:
            raise CheckpointError(
                f"this file holds no LoRA for {', '.join(networks)}: {shown or 'it is empty'}"
            )
        if unfit and strict:
            raise CheckpointError(
                f"this LoRA does not fit the model in {len(unfit)} places: {shown}; "
                "strict=False leaves them out"
            )
        if unfit:
            warn_caller(f"left out of this LoRA, since it does not fit the model: {shown}")
        return changes

    # ── which are active ──

    def set_adapters(
        self,
        adapter_names: str | Sequence[str],
        adapter_weights: float | Mapping[str, Any] | Sequence[Any] | None = None,
    ) -> None:
        """Make exactly these adapters active, at these weights (1 where None).

        One weight for all, or one per adapter: a number, or a dict by network and block,
        {"unet": {"down": 1, "mid": 0.5, "up": {"block_0": [0.2, 0.4, 0.6]}}, "text_encoder": 0.5}.
        Blocks that are not named have weight 1.
        """
        names = self._known([adapter_names] if isinstance(adapter_names, str) else adapter_names)
        weights = adapter_weights
        listed = list(weights) if isinstance(weights, (list, tuple)) else [weights] * len(names)
        if len(listed) != len(names):
            raise RequestError(
                f"adapter_weights holds {len(listed)} weights, but adapter_names {len(names)} "
                "names; give one per adapter"
            )
        chosen: dict[str, dict[str, Weight]] = {}
        for network, module in self._networks.items():
            loaded = adapters_of(module).loaded
            chosen[network] = {
                name: network_weight(network, module, weight)
                for name, weight in zip(names, listed, strict=True)
                if name in loaded or isinstance(weight, Mapping)  # a dict's errors are seen anyway
            }
        for name, weight in zip(names, listed, strict=True):
            self._warn_of_needless(name, weight)
        for network, module in self._networks.items():
            adapters = adapters_of(module)
            adapters.enabled = True
            adapters.weights = {n: w for n, w in chosen[network].items() if n in adapters.loaded}
        self._merge()

    def _warn_of_needless(self, name: str, weight: Any) -> None:
        if not isinstance(weight, Mapping):
            return
        refuse_unknown("networks", weight, [n for n in NETWORKS if n in self.components])
        lists = self.get_list_adapters()
        for network in weight:
            if name not in lists.get(network, ()):
                warn_caller(
                    f"adapter_weights[{network!r}] has no effect: the adapter {name!r} changes "
                    "nothing there"
                )

    def get_active_adapters(self) -> list[str]:
        """The names of the adapters that `set_adapters` chose."""
        return list({name: None for adapters in self._registries for name in adapters.weights})

    def get_list_adapters(self) -> dict[str, list[str]]:
        """The names of all loaded adapters, by network."""
        loaded = {n: list(adapters_of(module).loaded) for n, module in self._networks.items()}
        return {network: names for network, names in loaded.items() if names}

    def active_lora_record(self) -> list[dict[str, Any]]:
        """What is merged at present: name, weight and source of each adapter.

        The weight is a number, or one per network (or block) where they differ.
        """
        found: dict[str, dict[str, Any]] = {}
        for network, module in self._networks.items():
            for name, (adapter, weight, scale) in adapters_of(module).effective.items():
                entry = found.setdefault(name, {"name": name, "weight": {}, "source": None})
                entry["weight"][network] = times(weight, scale)
                entry["source"] = adapter.source
        for entry in found.values():
            first, *rest = entry["weight"].values()
            if not isinstance(first, dict) and all(weight == first for weight in rest):
                entry["weight"] = first
        return list(found.values())

    def disable_lora(self) -> None:
        """Take all adapters off that are not fused, until `enable_lora`; they stay loaded."""
        self._enable(False)

    def enable_lora(self) -> None:
        """Undo `disable_lora`."""
        self._enable(True)

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Forget adapters; the others stay as they are."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for name in self._known(names):
            for adapters in self._registries:
                adapters.remove(name)
        self._merge()

    def unload_lora_weights(self) -> None:
        """Forget all adapters. What was fused stays in the weights until `unfuse_lora`."""
        for adapters in self._registries:
            for name in list(adapters.loaded):
                adapters.remove(name)
            adapters.enabled = True
        self._merge()

    # ── fusing ──

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: Sequence[str] | None = None,
    ) -> None:
        """Fix adapters (the active ones if None) at their weights times `lora_scale`.

        They no longer heed set_adapters, disable_lora, unload_lora_weights or
        cross_attention_kwargs, until `unfuse_lora`. `safe_fusing` refuses weights that would not be
        finite. `components` are names of networks, all of them by default.
        """
        names = self.get_active_adapters() if adapter_names is None else self._known(adapter_names)
        networks = self._chosen(components)
        scale = finite(lora_scale, "lora_scale")
        todo = [
            (module, name)
            for module in networks.values()
            for name in names
            if name in adapters_of(module).loaded and name not in adapters_of(module).fused
        ]
        if not todo:
            raise RequestError(
                f"fuse_lora has nothing to fuse in {', '.join(networks)}: the adapters "
                f"{names} are fused already, or change nothing there"
            )
        for module, name in todo:
            adapters_of(module).fuse(name, scale)
        self._merge()
        if safe_fusing and not all(
            bool(torch.isfinite(p).all())
            for module in networks.values()
            for p in module.parameters()
        ):
            for module, name in todo:
                del adapters_of(module).fused[name]
            self._merge()
            raise RequestError(f"fusing {names} would make weights that are not finite")

    def unfuse_lora(self, components: Sequence[str] | None = None) -> None:
        """Undo `fuse_lora`; adapters that are still loaded and active go on as before."""
        for module in self._chosen(components).values():
            adapters_of(module).fused.clear()
        self._merge()

    @property
    def fused_loras(self) -> set[str]:
        """The names of the fused adapters."""
        return {name for adapters in self._registries for name in adapters.fused}

    @property
    def num_fused_loras(self) -> int:
        """The number of fused adapters."""
        return len(self.fused_loras)

    # ── one call ──

    @contextmanager
    def lora_scaled(self, cross_attention_kwargs: Mapping[str, Any] | None) -> Iterator[None]:
        """All adapters at `cross_attention_kwargs["scale"]` times their weights, in the block."""
        scale = float((cross_attention_kwargs or {}).get("scale", 1.0))
        if scale == 1:
            yield
            return
        if not any(a.enabled and a.weights.keys() - a.fused.keys() for a in self._registries):
            warn_caller(
                f"cross_attention_kwargs={{'scale': {scale}}} has no effect: no LoRA is "
                "active, or only fused ones"
            )
        try:
            self._scale(scale)
            yield
        finally:
            self._scale(1.0)

    # ── files out ──

    @classmethod
    def save_lora_weights(
        cls,
        save_directory: str | os.PathLike[str],
        unet_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        text_encoder_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        text_encoder_2_lora_layers: Mapping[str, Tensor] | nn.Module | None = None,
        *,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: None = None,
        safe_serialization: bool = True,
        unet_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: Mapping[str, Any] | None = None,
        text_encoder_2_lora_adapter_metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write layers, by names within their network, as a file that diffusers reads too.

        The metadata are PEFT's configs of the layers: with "lora_alpha" other than the rank they
        are needed. Does nothing unless `is_main_process`.
        """
        if not safe_serialization:
            raise RequestError(
                "safe_serialization=False cannot be served: only safetensors are written"
            )
        if save_function is not None:
            raise RequestError(f"save_function={save_function!r} is not supported; leave it out")
        layers = (unet_lora_layers, text_encoder_lora_layers, text_encoder_2_lora_layers)
        configs = (
            unet_lora_adapter_metadata,
            text_encoder_lora_adapter_metadata,
            text_encoder_2_lora_adapter_metadata,
        )
        tensors = dict(prefixed(layers))
        if not tensors:
            raise RequestError("save_lora_weights has nothing to write; give unet_lora_layers")
        if is_main_process:
            metadata = {"format": "pt"}
            if config := dict(prefixed(configs)):
                metadata[CONFIG_KEY] = json.dumps(config, indent=2, sort_keys=True, default=list)
            save_tensors(tensors, Path(save_directory) / (weight_name or WEIGHTS_NAME), metadata)

    # ── the networks ──

    @property
    def _networks(self) -> dict[str, nn.Module]:
        found = {name: self.components.get(name) for name in NETWORKS}
        return {name: c for name, c in found.items() if isinstance(c, nn.Module)}

    @property
    def _registries(self) -> list[Adapters]:
        return [adapters_of(module) for module in self._networks.values()]

    @property
    def _names_of_adapters(self) -> list[str]:
        """Every name that is loaded or fused."""
        return list({n: None for a in self._registries for n in (*a.loaded, *a.fused)})

    def _known(self, names: Sequence[str]) -> list[str]:
        loaded = list({n: None for a in self._registries for n in a.loaded})
        for name in names:
            if name not in loaded:
                raise RequestError(
                    f"there is no adapter {name!r}; loaded: {', '.join(loaded) or 'none'}"
                )
        return list(names)

    def _chosen(self, components: Sequence[str] | None) -> dict[str, nn.Module]:
        listed = list(self._networks if components is None else components)
        for name in listed:
            if name not in NETWORKS:
                raise RequestError(f"components must be among {', '.join(NETWORKS)}, got {name!r}")
        return {name: c for name, c in self._networks.items() if name in listed}

    def _enable(self, enabled: bool) -> None:
        for adapters in self._registries:
            adapters.enabled = enabled
        self._merge()

    def _scale(self, scale: float) -> None:
        for adapters in self._registries:
            adapters.scale = scale
        self._merge()

    def _merge(self) -> None:
        for module in self._networks.values():
            adapters_of(module).merge(module)


def checked(tensors: Mapping[str, Any]) -> dict[str, Tensor]:
    """A caller's tensors. Raises RequestError for any other value."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor):
            raise RequestError(
                f"a LoRA's dict must hold tensors by name, got a {type(value).__name__} "
                f"for {name!r}"
            )
    return {name: value.detach() for name, value in tensors.items()}


def times(weight: Weight, scale: float) -> Any:
    """A weight times a number, as JSON has it."""
    if isinstance(weight, Mapping):
        return {place: number * scale for place, number in weight.items()}
    return weight * scale


def prefixed(given: Sequence[Mapping[str, Any] | nn.Module | None]) -> Iterator[tuple[str, Any]]:
    """The entries of one mapping or module per network, their names after the network's."""
    for network, entries in zip(NETWORKS, given, strict=True):
        if isinstance(entries, nn.Module):
            entries = entries.state_dict()
        for name, value in (entries or {}).items():
            yield f"{network}.{name}", value
