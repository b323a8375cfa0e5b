"""Stand-ins for an accelerator on a machine without one.

`Traced` is a backend of `Graphs` that records as a CUDA graph does: what ran once, operator by
operator, is run again on the same static inputs, with no Python between. `NoWaiting` watches the
meta device, which like a GPU has no values that the CPU could ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from fewstep.engine.graphs import Function, Recording

META = torch.device("meta")


class Traced:
    """A backend for any device. `warm_ups` counts; with `fails` no recording succeeds."""

    def __init__(self, fails: str = "") -> None:
        self.fails = fails
        self.warm_ups = 0

    def serves(self, device: torch.device) -> bool:
        return True

    def turn(self) -> AbstractContextManager[object]:
        return nullcontext()

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        self.warm_ups += 1
        return call()

    def record(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
        if self.fails:
            raise RuntimeError(self.fails)
        tape = Tape(inputs)
        with tape:
            output = function(*inputs)
        static = output.clone()
        return Recording(lambda: static.copy_(tape.played(output)), static)


class Rerun(Traced):
    """Runs the function again at every replay: for compiled code, which no tape can follow."""

    def record(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
        output = function(*inputs).clone()
        return Recording(lambda: output.copy_(function(*inputs)), output)


class Tape(TorchDispatchMode):
    """The operators that ran within it, to be played again by `played`.

    What the inputs do not change may be asked for its value, as it is the same at every replay.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.inputs = inputs
        self.calls: list[tuple[Any, Any, Any, list[Any]]] = []
        self.follows = {id(x) for x in inputs}  # from the inputs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [id(x) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        follows = not self.follows.isdisjoint(given)
        if follows and "_local_scalar_dense" in func._schema.name:
            raise Waited("a value that follows from the inputs was asked for")
        result = func(*args, **(kwargs or {}))
        made = tree_leaves(result)
        self.calls.append((func, args, kwargs or {}, made))
        if follows:
            self.follows |= {id(x) for x in made}
        return result

    def played(self, output: Tensor) -> Tensor:
        """`output` by the same operators over what the inputs hold now."""
        now: dict[int, Tensor] = {}

        def mapped(x: Any) -> Any:
            return now.get(id(x), x) if isinstance(x, Tensor) else x

        for func, args, kwargs, made in self.calls:
            result = tree_leaves(func(*tree_map(mapped, args), **tree_map(mapped, kwargs)))
            now |= {id(x): y for x, y in zip(made, result, strict=True) if isinstance(x, Tensor)}
        return now[id(output)]


class Waited(Exception):
    """The CPU asked for something of the device."""


class NoWaiting(TorchDispatchMode):
    """Raises `Waited` where a value of the device or a copy to or from it would make the CPU wait.

    `device` stands for a GPU; what is computed among tensors of the CPU alone is free to wait.
    """

    ASKING = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "unique", "masked_select")

    def __init__(self, device: torch.device = META) -> None:
        super().__init__()
        self.device = device
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {x.device for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        name = func._schema.name.removeprefix("aten::")
        if self.device in given and any(part in name for part in self.ASKING):
            raise Waited(f"{name} asks for a value")
        result = func(*args, **kwargs)
        made = {x.device for x in tree_leaves(result) if isinstance(x, Tensor)}
        if name in ("_to_copy", "copy_", "to", "_copy_from") and len(given | made) > 1:
            raise Waited(f"{name} copies from {given} to {made}")
        self.calls += self.device in made
        return result
