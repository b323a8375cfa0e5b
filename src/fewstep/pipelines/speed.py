"""The loop and the decoding as an accelerator runs them fastest: recorded, and compiled.

Neither changes a picture beyond rounding. On a GPU the whole loop becomes one CUDA graph, and the
decoding another, for each shape and plan; prompts, seeds and guidance scales are inputs of it.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Hashable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.compiling import (
    Compilation,
    Turn,
    cache_folder,
    check_version,
    keep_in,
    outermost,
)
from ..engine.graphs import CudaGraphs, Graphs
from ..errors import RequestError
from ..ops.layers import held, is_plain
from .denoise import Job, Network, Step, denoise
from .recorded import (
    Facts,
    count_draws,
    drawn,
    inputs_of,
    is_recordable,
    layout,
    modes,
    numbers_of,
    settings_of,
    state_of,
    timed,
    without_tensors,
)
from .request import Request

PLANS = 256  # whose facts are kept


class Speed:
    """What a pipeline of images has for speed on a GPU."""

    unet: Any
    vae: Any
    scheduler: Any
    _uses_graphs: bool = True
    _graphs: Graphs | None = None
    _compile: Mapping[str, Any] | None = None  # arguments of Compilation
    _compilations: dict[str, Compilation]
    _facts: dict[Hashable, Facts]

    # ── what is asked for ──

    def enable_cuda_graphs(self, enabled: bool = True) -> None:
        """Record the loop and the decoding as CUDA graphs, as is usual on a GPU; False: do not.

        A graph is recorded at the second picture of a shape and a plan, and holds as much memory as
        a picture takes. Calls with a callback or with controls are run step by step. `False` also
        gives that memory back.
        """
        self._uses_graphs = enabled
        self._graphs = self._graphs if enabled else None

    def compile(
        self,
        *,
        background: bool = True,
        backend: str | Callable[..., Any] = "inductor",
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> None:
        """Compile UNet and VAE block by block (torch.compile), for each shape that is drawn.

        The first picture of a shape is drawn eagerly, as are those that come while a thread
        compiles; later ones take the compiled blocks. Without `background` the first call waits
        for that. What is compiled is kept in `cache_dir`, by default in ~/.cache/fewstep/compiled,
        for later processes. Neither a new prompt, seed, guidance scale or number of steps nor a
        LoRA compiles anything again.
        """
        check_version()
        device = self.unet.device
        if device.type == "cpu" and not is_plain():
            raise RequestError(
                "compile is for a GPU, and this pipeline is on the cpu, where fewstep has kernels "
                "of its own; leave it out, or call pipe.to('cuda') first"
            )
        keep_in(cache_folder() if cache_dir is None else Path(cache_dir))
        for compilation in self._compiling.values():
            compilation.remove()
        self._compile = {"background": background, "backend": backend}
        self._compilations = {}

    @property
    def compiled(self) -> bool:
        """Whether all shapes that were drawn are compiled, so that the next picture uses that."""
        return bool(self._compiling) and all(c.compiled for c in self._compiling.values())

    @property
    def compile_progress(self) -> tuple[int, int]:
        """Blocks that are compiled, and blocks that the shapes drawn so far ask for."""
        done, total = zip((0, 0), *(c.progress for c in self._compiling.values()), strict=True)
        return sum(done), sum(total)

    def wait_until_compiled(self, timeout: float | None = None) -> bool:
        """Wait until the thread has compiled all shapes drawn so far; whether it has."""
        return all(c.wait(timeout) for c in self._compiling.values()) and self.compiled

    # ── what families call ──

    def loop(
        self,
        network: Network,
        job: Job,
        request: Request,
        on_step: Callable[[Step], Step],
        advance: Callable[[int], Any],
    ) -> Tensor:
        """z_0 of a job; `advance` is told of steps that `on_step` does not see."""
        assert job.z is not None
        device = job.z.device
        if network is not self.unet or self._is_direct(device):
            return denoise(network, job, on_step)
        lay_out(network, device)
        inputs = inputs_of(job)
        with self._turn("unet", network, (state_of(network), layout(inputs)), device) as turn:
            graphs = None if turn.is_noted else self._graphs_at(device)
            if graphs is None or not is_recordable(network, job, request):
                return denoise(timed(network), job, on_step)
            z = self._recorded(graphs, network, job, request, inputs, turn)
        advance(len(job.plan.timesteps))
        return z

    def decoded(self, z: Tensor, is_settled: bool = True) -> Tensor:
        """Pictures (B, 3, H, W) of the VAE's latents. Settled: its weights are where they stay."""
        vae = self.vae
        lay_out(vae, z.device)

        def decode(z: Tensor) -> Tensor:
            (pictures,) = vae.decode(z, return_dict=False)
            return pictures

        if self._is_direct(z.device):
            return decode(z)
        key = ("decode", settings_of(vae), layout({"z": z}))
        with self._turn("vae", vae, key, z.device) as turn:
            graphs = None if turn.is_noted or not is_settled else self._graphs_at(z.device)
            if graphs is None or torch.is_grad_enabled() or vae.training:
                return decode(z)
            return graphs.run(decode, [z], (key, turn.is_compiled, modes()), [vae])

    # ── how ──

    def _is_direct(self, device: torch.device) -> bool:
        """Whether there is nothing to record or to compile, as on a CPU."""
        return device.type == "cpu" and self._compile is None and self._graphs is None

    @property
    def _compiling(self) -> dict[str, Compilation]:
        return self.__dict__.setdefault("_compilations", {})

    def _turn(
        self, name: str, network: nn.Module, key: Hashable, device: torch.device
    ) -> AbstractContextManager[Turn]:
        """How a run of a network is drawn, which is of the kind `key`."""
        if self._compile is None or next(outermost(network), None) is None:
            return nullcontext(Turn(False))
        found = self._compiling.get(name)
        if found is None or found.network is not network:  # a component was replaced
            if found is not None:
                found.remove()
            found = self._compiling[name] = Compilation(network, **self._compile)
        return found.run((key, modes()), device)

    def _graphs_at(self, device: torch.device) -> Graphs | None:
        """The graphs of a device, None where there are none."""
        if not self._uses_graphs:
            return None
        if self._graphs is None or not self._graphs.backend.serves(device):
            self._graphs = Graphs(CudaGraphs(device)) if device.type == "cuda" else None
        return self._graphs

    def _recorded(
        self,
        graphs: Graphs,
        unet: nn.Module,
        job: Job,
        request: Request,
        inputs: dict[str, Tensor],
        turn: Turn,
    ) -> Tensor:
        """z_0 by a graph of the whole loop."""
        scheduler = (type(self.scheduler), repr(self.scheduler.to_dict()), request.eta)
        how = (*numbers_of(job.plan), scheduler, job.shape, job.dtype, job.guidance_rescale)
        facts = self._facts_of((how, inputs["z"].device), job)
        if facts.draws:  # in the order in which the loop would draw them
            inputs["noise"] = torch.stack([job.draw() for _ in range(facts.draws)])
        names, bare, update = tuple(inputs), without_tensors(job, facts), job.update

        def run(*tensors: Tensor) -> Tensor:
            given = dict(zip(names, tensors, strict=True))
            # A multistep solver's steps remember: each run has its own.
            return denoise(timed(unet), drawn(bare, copy.copy(update), given))

        key = ("loop", names, how, state_of(unet), turn.is_compiled, modes())
        return graphs.run(run, list(inputs.values()), key, [unet])

    def _facts_of(self, key: Hashable, job: Job) -> Facts:
        known = self.__dict__.setdefault("_facts", {})
        if key not in known:
            if len(known) >= PLANS:
                known.clear()
            times = job.plan.timesteps.to(job.cond.text.device)
            known[key] = Facts(count_draws(job), times)
        return known[key]


def lay_out(network: nn.Module, device: torch.device) -> None:
    """Weights of convolutions with their channels last on a GPU, as its tensor cores read them."""
    if device.type != "cuda":
        return
    wide = (p for p in held(network) if p.ndim == 4 and p.shape[1] > 1 and p.shape[-1] > 1)
    first = next(wide, None)
    if first is not None and not first.is_contiguous(memory_format=torch.channels_last):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
