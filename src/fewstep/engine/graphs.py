"""Functions of tensors as CUDA graphs: recorded once for each signature, then replayed.

A signature is the shapes, strides, dtypes and devices of the inputs, and a key for all else that
decides what the function does. Its first call runs as it is and its second once more, then it is
recorded; from then on the inputs are copied to where the graph reads them, and what it leaves is
copied out. Weights that change in place keep a graph valid; ones that move drop it.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

MOST = 16  # graphs that are kept; the one that was used longest ago goes first

Function = Callable[..., Tensor]


@dataclass(frozen=True, eq=False)
class Recording:
    """What a backend recorded: `replay()` makes `output` anew from the static inputs."""

    replay: Callable[[], object]
    output: Tensor


class Backend(Protocol):
    """Where functions are recorded."""

    def serves(self, device: torch.device) -> bool:
        """Whether tensors of a device can be recorded here."""
        ...

    def turn(self) -> AbstractContextManager[object]:
        """A block after all blocks before it, on whatever streams they ran."""
        ...

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        """`call()`, where recordings are made."""
        ...

    def record(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
        """`function(*inputs)` as a recording that reads the `inputs` where they are."""
        ...


class CudaGraphs:
    """The backend of one GPU. All graphs share one pool of memory, since they run in turn."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.pool: Any = None
        self.side: Any = None
        self.last: Any = None  # event behind the turn before

    def serves(self, device: torch.device) -> bool:
        """Whether this is its GPU."""
        return device == self.device

    @contextmanager
    def turn(self) -> Iterator[None]:
        """A block whose work waits for that of the block before it."""
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream()
            if self.last is not None:
                stream.wait_event(self.last)
            try:
                yield
            finally:
                self.last = torch.cuda.current_stream().record_event()

    def warm_up(self, call: Callable[[], Tensor]) -> Tensor:
        """`call()` on a stream at the side, as libraries want their first calls before a record."""
        if self.side is None:
            self.side = torch.cuda.Stream()
        here = torch.cuda.current_stream()
        self.side.wait_stream(here)
        with torch.cuda.stream(self.side):
            output = call()
        here.wait_stream(self.side)
        output.record_stream(here)
        return output

    def record(self, function: Function, inputs: Sequence[Tensor]) -> Recording:
        """`function(*inputs)` as a CUDA graph. Other threads may use the GPU meanwhile."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(
                graph, pool=self.pool, stream=self.side, capture_error_mode="thread_local"
            ):
                output = function(*inputs)
        except Exception:
            self.side = self.pool = None  # a broken-off recording may have left them unusable
            raise
        return Recording(graph.replay, output)


class Watched:
    """Where the weights of networks lie, and which modules these have."""

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        self.tensors: list[tuple[Any, str, tuple[int, torch.dtype]]] = []
        self.modules: list[tuple[Any, tuple[Any, ...]]] = []
        for module in (module for network in networks for module in network.modules()):
            self.modules.append((module._modules, tuple(module._modules.values())))
            for held in (module._parameters, module._buffers):
                self.tensors += [(held, n, place(t)) for n, t in held.items() if t is not None]

    def is_unmoved(self) -> bool:
        """Whether all of it is where it was. Values may have changed."""
        for children, were in self.modules:
            if len(children) != len(were):
                return False
            if any(a is not b for a, b in zip(children.values(), were, strict=True)):
                return False
        return all(
            (t := held.get(name)) is not None and place(t) == was
            for held, name, was in self.tensors
        )


def place(tensor: Tensor) -> tuple[int, torch.dtype]:
    """Address and dtype."""
    return tensor.data_ptr(), tensor.dtype


@dataclass(eq=False)
class Entry:
    """One signature: called once, recorded, or refused."""

    function: Function  # kept, since a graph reads the constants that it closes over
    networks: tuple[nn.Module, ...]  # kept, so that their identities stay theirs
    inputs: tuple[Tensor, ...] = ()
    recording: Recording | None = None
    watched: Watched | None = None
    is_refused: bool = False

    def replayed(self, inputs: Sequence[Tensor]) -> Tensor:
        """The output (a copy) for inputs (copied)."""
        assert self.recording is not None
        for static, given in zip(self.inputs, inputs, strict=True):
            static.copy_(given)
        self.recording.replay()
        return self.recording.output.clone()


class Graphs:
    """Runs functions of tensors, recorded where they can be.

    `recordings` counts those that were made, `replays` the calls that they served.
    """

    def __init__(self, backend: Backend, most: int = MOST) -> None:
        self.backend = backend
        self.most = most
        self.recordings = self.replays = 0
        self._entries: OrderedDict[Hashable, Entry] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(entry.recording is not None for entry in self._entries.values())

    def __deepcopy__(self, memo: Any) -> Graphs:
        return Graphs(self.backend, self.most)  # a graph belongs to the memory it was recorded in

    def drop(self) -> None:
        """Forget all graphs, and so give back their memory."""
        with self._lock:
            self._entries.clear()

    def run(
        self,
        function: Function,
        inputs: Sequence[Tensor],
        key: Hashable,
        networks: Sequence[nn.Module] = (),
    ) -> Tensor:
        """`function(*inputs)`, a new tensor.

        `key` tells all that decides what the function does beside its inputs and the weights of
        `networks`. It may not draw random numbers, nor ask for a value of a tensor.
        """
        signature = (key, tuple(map(id, networks)), tuple(map(signature_of, inputs)))
        with self._lock, self.backend.turn():
            entry = self._known(signature)
            if entry is None:
                self._keep(signature, Entry(function, tuple(networks)))
                return self.backend.warm_up(lambda: function(*inputs))
            if entry.recording is None and not entry.is_refused:
                self._record(entry, function, inputs)
            if entry.is_refused:
                return function(*inputs)
            self.replays += 1
            return entry.replayed(inputs)

    def _known(self, signature: Hashable) -> Entry | None:
        """The entry of a signature, unless its networks' weights have moved."""
        entry = self._entries.get(signature)
        if entry is None:
            return None
        if entry.watched is not None and not entry.watched.is_unmoved():
            # What else was recorded of these networks is as stale.
            stale = [s for s, e in self._entries.items() if set(e.networks) & set(entry.networks)]
            for other in stale:
                del self._entries[other]
            return None
        self._entries.move_to_end(signature)
        return entry

    def _keep(self, signature: Hashable, entry: Entry) -> None:
        self._entries[signature] = entry
        while len(self._entries) > self.most:
            self._entries.popitem(last=False)

    def _record(self, entry: Entry, function: Function, inputs: Sequence[Tensor]) -> None:
        """Make the recording, or refuse it for good with a warning that says why."""
        entry.function = function
        entry.inputs = tuple(torch.empty_like(x).copy_(x) for x in inputs)
        try:
            self.backend.warm_up(lambda: function(*entry.inputs))
            entry.recording = self.backend.record(function, entry.inputs)
        except Exception as error:
            entry.is_refused, entry.inputs = True, ()
            warnings.warn(
                "this work cannot be recorded as a CUDA graph and runs step by step: "
                + in_short(error),
                stacklevel=4,
            )
            return
        entry.watched = Watched(entry.networks)
        self.recordings += 1


def in_short(error: BaseException) -> str:
    """The first two lines of an error, as one: compilers tell the reason in the second."""
    lines = f"{type(error).__name__}: {str(error).strip()}".splitlines()
    return " ".join(line.strip() for line in lines[:2])


def signature_of(x: Tensor) -> tuple[Any, ...]:
    """Shape, strides, dtype and device."""
    return x.shape, x.stride(), x.dtype, x.device
