"""Many devices: gradients averaged by DDP, or all parameters spread over the devices by FSDP2.

Either way the phase and its loss stay as they are on one device. What is spread (Rajbhandari et al.
2020, stage 3) is gathered block by block where a forward or backward pass needs it; optimizer,
average and target only ever see this device's share, as DTensors.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import RequestError
from ..models.layers import ResnetBlock, TransformerBlock
from .config import Recipe
from .ranks import Ranks

BLOCKS = (ResnetBlock, TransformerBlock)  # what is gathered at a time


class Networks(Protocol):
    """What this module needs of a phase."""

    trained: Mapping[str, nn.Module]
    kept: Mapping[str, nn.Module]
    frozen: Mapping[str, nn.Module]

    def loss(self, step: int, part: range) -> Tensor: ...


class Loss(nn.Module):
    """The loss of a phase as the output of a module, whose children are the trained networks.

    So DDP sees one forward and one backward pass, however often and in what order a phase calls its
    networks; those calls that need no gradient do not concern it.
    """

    def __init__(self, phase: Networks) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(phase.trained)
        self.loss = phase.loss

    def forward(self, step: int, part: range) -> Tensor:
        return self.loss(step, part)


def together(phase: Networks, ranks: Ranks) -> Callable[[int, range], Tensor]:
    """The loss (step, positions) of a phase, whose backward pass averages gradients over devices.

    It does so bucket by bucket while the pass goes on. Sharded networks do it themselves.
    """
    sharded = any(is_sharded(network) for network in phase.trained.values())
    if ranks.count == 1 or sharded:
        return phase.loss
    return DistributedDataParallel(Loss(phase), gradient_as_bucket_view=True)


def averaging(
    loss: Callable[[int, range], Tensor], last: bool
) -> contextlib.AbstractContextManager[None]:
    """Within this context gradients are averaged if this is a batch's last part, else summed up."""
    if isinstance(loss, DistributedDataParallel) and not last:
        return loss.no_sync()
    return contextlib.nullcontext()


# ── FSDP2 ──


def check_shard(recipe: Recipe) -> None:
    """Raises RequestError if `run.shard` does not go with the rest of a recipe."""
    wrong = {
        f"phase={recipe.phase!r}: its networks are small": recipe.phase != "consistency",
        "run.precision='fp16': use bf16, which needs no scaling": recipe.run.precision == "fp16",
        "optimizer.kind='adamw8bit' keeps no shards: use adamw": recipe.optimizer.kind != "adamw",
    }
    for what, is_wrong in wrong.items():
        if recipe.run.shard and is_wrong:
            raise RequestError(f"run.shard=true cannot go with {what}, or set run.shard=false")


def shard(phase: Networks, recipe: Recipe, ranks: Ranks, device: torch.device) -> None:
    """Spread every network of a phase over the devices, in place; nothing on a single one.

    Adapters, recomputed and compiled blocks must be in place; the optimizer comes after.
    """
    check_shard(recipe)
    if not recipe.run.shard or ranks.count == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy

    mesh = init_device_mesh(device.type, (ranks.count,))
    # Inputs keep their dtype, as under autocast: sizes of pictures are not exact in bfloat16.
    dtype = torch.bfloat16 if recipe.run.precision == "bf16" else None
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for network in networks_of(phase):
        spread(network, mesh=mesh, mp_policy=policy)


def networks_of(phase: Networks) -> list[nn.Module]:
    """Every network of a phase that `shard` spreads, each once: trained, kept and frozen ones."""
    several = [*phase.trained.values(), *phase.kept.values(), *phase.frozen.values()]
    return list({id(network): network for network in several}.values())


def spread(network: nn.Module, **options: Any) -> None:
    """Apply FSDP2 to the blocks of a network, and to what is left of it."""
    from torch.distributed.fsdp import fully_shard

    for module in network.modules():
        if isinstance(module, BLOCKS):
            fully_shard(module, reshard_after_forward=True, **options)
    # The root too is given back after each pass: what stayed would miss the next update.
    fully_shard(network, reshard_after_forward=True, **options)


def is_sharded(network: nn.Module) -> bool:
    """Whether a network is spread over the devices."""
    return any(is_share(parameter) for parameter in network.parameters())


def is_share(tensor: Tensor) -> bool:
    """Whether a tensor is a device's share of a larger one."""
    return hasattr(tensor, "full_tensor")


def shares(tensors: Iterable[Tensor]) -> list[Tensor]:
    """What of some tensors lies on this device, in the same memory; all where nothing is spread."""
    several: Iterable[Any] = (tensor.detach() for tensor in tensors)
    return [each.to_local() if is_share(each) else each for each in several]


def whole(tensor: Tensor) -> Tensor:
    """A tensor in full; of shares, on all devices, which must all ask."""
    several: Any = tensor
    return several.full_tensor() if is_share(tensor) else tensor


@torch.no_grad()
def place(tensor: Tensor, full: Tensor) -> None:
    """Overwrite a tensor, or this device's share of it, by the values of the full one."""
    if is_share(tensor):
        from torch.distributed.tensor import distribute_tensor

        device = tensor.device
        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        full = distribute_tensor(full.to(device), mesh, placements, src_data_rank=None)
    tensor.copy_(full)


@torch.no_grad()
def gather(phase: Networks, keep: bool) -> None:
    """Undo `shard`, at the end of a run: where `keep`, the networks are ordinary ones on the CPU.

    All processes must call it; where not `keep`, the networks are of no use afterwards.
    """
    for network in networks_of(phase):
        if not is_sharded(network):
            continue
        for module in network.modules():
            for name, parameter in module.named_parameters(recurse=False):
                full = whole(parameter.detach())
                if keep:
                    plain = nn.Parameter(full.cpu(), requires_grad=parameter.requires_grad)
                    module._parameters[name] = plain
        if keep:
            unhook(network)


def unhook(network: nn.Module) -> None:
    """Give modules that FSDP2 has taken their own class back, and no hooks."""
    from torch.distributed.fsdp import FSDPModule

    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.__class__ = type(module).__mro__[2]
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
