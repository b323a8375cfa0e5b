"""torch.compile of a network's blocks, behind the back of the pictures that are drawn meanwhile.

The first run of a kind (a shape, a dtype) is drawn eagerly, and what its blocks were called with is
written down. A thread compiles each block for that; when all of them are done, the next run of the
kind takes all of them, and never some. Equal blocks share one compilation. Nothing is compiled
while a picture waits: a block that meets what it was not compiled for runs eagerly.
"""

from __future__ import annotations

import copy
import os
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import RequestError
from ..models.layers import Context, ResnetBlock, Time, Transformer2D
from ..models.vae import Level, MidBlock
from ..ops.layers import is_plain
from .graphs import in_short, signature_of

BLOCKS = (ResnetBlock, Transformer2D, Level, MidBlock)
MOST = 16  # kinds of runs that are compiled; others stay eager

Compiled = Callable[..., Any]


class Shift(NamedTuple):
    """What a resnet adds to its channels, known beforehand: stands for a `Time` with a memo."""

    value: Tensor

    def shift(self, projection: nn.Module) -> Tensor:
        """The value, (B, C)."""
        return self.value


@dataclass(frozen=True)
class Like:
    """The place of a tensor among arguments."""

    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True)
class Turn:
    """How a run is drawn."""

    is_compiled: bool
    is_noted: bool = False  # its blocks must be called for themselves, and not be replayed


class Mode(threading.local):
    """What the blocks do in this thread: look up (table), note their arguments, or neither."""

    table: dict[Hashable, Compiled] | None = None
    noted: dict[Hashable, tuple[Switch, Any]] | None = None


class Switch:
    """Stands in front of a block and takes its calls to the compiled or to the eager one."""

    def __init__(self, block: nn.Module, mode: Mode) -> None:
        self.block = block
        self.mode = mode

    def __deepcopy__(self, memo: Any) -> None:
        return None  # a copy of the block has none

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block, mode = self.block, self.mode
        if kwargs or block._forward_hooks or block._forward_pre_hooks:
            return block._call_impl(*args, **kwargs)
        if mode.table is not None:
            plain = without_memo(block, args)
            compiled = mode.table.get((id(block), described(plain)))
            if compiled is not None:
                return compiled(block, *plain)
        elif mode.noted is not None:
            likes = described(without_memo(block, args))
            mode.noted[id(block), likes] = (self, likes)
        return block._call_impl(*args)


class Compilation:
    """The blocks of one network, compiled for the kinds of runs that it is used for.

    `compiled`: every kind that was drawn is done. `progress`: blocks done, and of how many.
    `error`: why it ended; what was not compiled by then stays eager.
    """

    def __init__(
        self, network: nn.Module, *, backend: str | Compiled = "inductor", background: bool = True
    ) -> None:
        check_version()
        self.network = network
        self.backend = backend
        self.background = background
        self.error: str | None = None
        self.done = self.total = 0
        self._mode = Mode()
        self._ready: dict[Hashable, dict[Hashable, Compiled]] = {}
        self._asked: set[Hashable] = set()
        self._waiting: deque[tuple[Hashable, list[tuple[Switch, Any]]]] = deque()
        self._kinds: dict[Hashable, Compiled] = {}
        self._lock = threading.Lock()
        self._working = threading.Lock()
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()
        weakref.finalize(self, self._stop.set)  # at exit, too
        self.switches = [Switch(block, self._mode) for block in outermost(network)]
        for switch in self.switches:
            switch.block._compiled_call_impl = switch

    def __deepcopy__(self, memo: Any) -> Compilation:
        network = copy.deepcopy(self.network, memo)
        return Compilation(network, backend=self.backend, background=self.background)

    @property
    def compiled(self) -> bool:
        """Whether all that was drawn so far is compiled from now on."""
        return bool(self._asked) and self._asked == set(self._ready)

    @property
    def progress(self) -> tuple[int, int]:
        """Blocks that are compiled, and blocks that are to be, of all kinds of runs."""
        return self.done, self.total

    def serves(self, device: torch.device) -> bool:
        """Whether runs on a device are compiled: on a CPU our own kernels take that place."""
        usual = not torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        return usual and not self.network.training and (device.type != "cpu" or is_plain())

    @contextmanager
    def run(self, key: Hashable, device: torch.device) -> Iterator[Turn]:
        """A block that runs the network, for a kind of runs: of one `key` are equal shapes."""
        self._report()
        table = self._ready.get(key) if self.serves(device) else None
        if table is not None:
            self._mode.table = table
            try:
                yield Turn(True)
            finally:
                self._mode.table = None
        elif self._is_known(key) or not self.serves(device):
            yield Turn(False)
        else:
            noted = self._mode.noted = {}
            try:
                yield Turn(False, is_noted=True)
            finally:
                self._mode.noted = None
            self._ask(key, list(noted.values()))

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing is left to compile, `timeout` seconds at most; whether that is so."""
        thread = self._thread
        if thread is not None:
            thread.join(timeout)
        return thread is None or not thread.is_alive()

    def remove(self) -> None:
        """Take the switches away, so that the network is as before."""
        self._stop.set()
        for switch in self.switches:
            if switch.block._compiled_call_impl is switch:
                switch.block._compiled_call_impl = None

    # ── the work ──

    def _is_known(self, key: Hashable) -> bool:
        return key in self._asked or self.error is not None or len(self._asked) >= MOST

    def _ask(self, key: Hashable, calls: list[tuple[Switch, Any]]) -> None:
        with self._lock:
            if self._is_known(key):
                return  # another thread was first
            self._asked.add(key)
            self.total += len(calls)
            self._waiting.append((key, calls))
            if self.background and self._thread is None:
                work = threading.Thread(target=self._work, name="fewstep-compile", daemon=True)
                self._thread = work
                work.start()
        if not self.background:
            self._finish()

    def _work(self) -> None:
        while True:
            self._finish()
            with self._lock:
                if not self._waiting or self._stop.is_set():
                    self._thread = None
                    return

    def _finish(self) -> None:
        """Compile all that waits."""
        with self._working:
            try:
                while self._waiting and not self._stop.is_set():
                    key, calls = self._waiting.popleft()
                    table = self._table(calls)
                    if len(table) == len(calls):
                        self._ready[key] = table  # the switch
            except Exception as error:
                self.error = in_short(error)
                self._waiting.clear()

    @torch.no_grad()
    def _table(self, calls: Sequence[tuple[Switch, Any]]) -> dict[Hashable, Compiled]:
        table: dict[Hashable, Compiled] = {}
        for switch, likes in calls:
            if self._stop.is_set():
                break
            compiled = self._kind(switch.block, likes)
            compiled(switch.block, *examples(likes))
            table[id(switch.block), likes] = compiled
            self.done += 1
        return table

    def _kind(self, block: nn.Module, likes: Any) -> Compiled:
        """The function that is compiled for blocks like this one and arguments like these."""
        shapes = tuple((name, p.shape, p.dtype) for name, p in held_by(block))
        kind = (type(block), shapes, likes)
        if kind not in self._kinds:
            self._kinds[kind] = torch.compile(
                cloned(call), fullgraph=True, dynamic=False, backend=self.backend
            )
        return self._kinds[kind]

    def _report(self) -> None:
        if self.error is not None and not self._stop.is_set():
            self._stop.set()
            warnings.warn(
                f"compiling ended, and pictures are drawn without it: {self.error}", stacklevel=5
            )


def call(block: Any, *args: Any) -> Any:
    """What is compiled."""
    return block.forward(*args)


def cloned(function: Any) -> Any:
    """A copy of a function with code of its own, for which compilations are kept apart."""
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)


def outermost(network: nn.Module) -> Iterator[nn.Module]:
    """The blocks of a network that are compiled, none of which lies in another."""
    for child in network.children():
        if isinstance(child, BLOCKS):
            yield child
        else:
            yield from outermost(child)


def held_by(block: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of a block by name, none of them asked for its value."""
    for name, module in block.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{name}.{key}", parameter


def without_memo(block: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments in which a memo, whose look-ups would be compiled in, has given its answers."""
    return tuple(answered(block, value) for value in args)


def answered(block: Any, value: Any) -> Any:
    if isinstance(value, Time) and value.memo is not None:
        return Shift(value.shift(block.time_emb_proj))
    if isinstance(value, Context) and value.memo is not None:
        return value._replace(memo=None)
    return value


def described(value: Any) -> Any:
    """Arguments with a `Like` for each tensor: hashable, and what a compilation is for."""
    if isinstance(value, Tensor):
        return Like(*signature_of(value))
    if isinstance(value, tuple):
        return (type(value), *map(described, value))
    return value


def examples(likes: Any) -> Any:
    """Arguments like those that were described."""
    if isinstance(likes, Like):
        empty = torch.empty_strided(
            likes.shape, likes.stride, dtype=likes.dtype, device=likes.device
        )
        return empty.zero_()
    if isinstance(likes, tuple):
        kind, *parts = likes
        values = [examples(part) for part in parts]
        return tuple(values) if kind is tuple else kind(*values)
    return likes


# ── what compilations are kept in ──


def check_version() -> None:
    """Raises RequestError unless this PyTorch compiles equal blocks once."""
    major, minor = (int(part) for part in torch.__version__.split(".")[:2])
    if (major, minor) < (2, 5):
        raise RequestError(f"compile needs PyTorch 2.5 or later, and this is {torch.__version__}")


def keep_in(folder: Path) -> None:
    """Let torch keep what it compiles in a folder, for later processes, unless told another."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder / "inductor"))
    os.environ.setdefault("TRITON_CACHE_DIR", str(folder / "triton"))
    os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")


def cache_folder() -> Path:
    """Where compilations are kept: `compiled` under $FEWSTEP_CACHE or ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE") or "~/.cache/fewstep").expanduser() / "compiled"
