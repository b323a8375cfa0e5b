"""Promises of the compilation in the background: when it is used, and that it is made once.

The backend is "eager": what torch traces is run as it is, so that no compiler is needed.
"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import conftest
import pytest
import torch
from conftest import NOISE, VAE
from quick import SMALL, Quick
from torch import Tensor
from torch._dynamo.utils import counters
from traced import META, Rerun

import fewstep.ops.layers as ops_layers
from fewstep import AutoencoderKL, LCMScheduler, RequestError, UNet2DConditionModel
from fewstep.engine.compiling import Compilation, cache_folder, keep_in, outermost
from fewstep.engine.graphs import Graphs
from fewstep.models.layers import Memo
from fewstep.ops.layers import plain

UNET = conftest.UNET | SMALL
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TORCHINDUCTOR_FX_GRAPH_CACHE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    counters.clear()
    with plain(), torch.no_grad():
        yield


@pytest.fixture(scope="module")
def shared() -> Compilation:
    """Compiled for runs of size 8."""
    torch.manual_seed(0)
    c = Compilation(UNet2DConditionModel(**UNET).eval(), backend="eager", background=False)
    with plain(), torch.no_grad():
        counters.clear()
        within(c, c.network)
        assert 0 < compilations() < len(c.switches), "equal blocks share a compilation"
        assert c.compiled and not counters["graph_break"]
    return c


@pytest.fixture
def unet() -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(**UNET).eval()


def call(unet: Any, seed: int = 0, size: int = 8, steps: int = 2) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z, text = torch.randn(2, 4, size, size, generator=g), torch.randn(2, 7, 32, generator=g)
    memo = Memo(torch.arange(steps) + 5)
    memo.index = steps - 1
    t = memo.times[-1:].expand(2)
    return unet(z, t, text, return_dict=False, memo=memo)[0]


def compilations() -> int:
    return int(counters["stats"]["unique_graphs"])


def within(compilation: Compilation, unet: Any, **how: Any) -> tuple[Tensor, bool]:
    with compilation.run(how.get("size", 8), CPU) as turn:
        return call(unet, **how), turn.is_compiled


def test_the_first_run_is_eager_later_ones_take_every_compiled_block_and_copies_none(
    unet: UNet2DConditionModel,
) -> None:
    expected = [call(unet, seed) for seed in range(3)]
    c = Compilation(unet, backend="eager", background=False)
    found = [within(c, unet, seed=seed) for seed in range(3)]
    assert [compiled for _, compiled in found] == [False, True, True]
    for (z, _), plainly in zip(found, expected, strict=True):
        assert torch.allclose(z, plainly, atol=1e-6)
    assert c.compiled and c.progress == (len(c.switches), len(c.switches)) and c.error is None
    assert not counters["graph_break"]
    twin = copy.deepcopy(unet)
    assert torch.equal(call(twin), expected[0])
    assert all(b._compiled_call_impl is None for b in outermost(twin))
    assert copy.deepcopy(c).network is not unet
    c.remove()
    assert torch.equal(call(unet), expected[0])
    assert all(b._compiled_call_impl is None for b in outermost(unet))


def test_no_seed_number_of_steps_or_merged_weight_compiles_again(shared: Compilation) -> None:
    c, unet = shared, shared.network
    for how in ({"seed": 5}, {"steps": 4}, {"steps": 1}):
        assert within(c, unet, **how)[1]
    for parameter in unet.parameters():  # a LoRA is merged: on a GPU in place, on a CPU by another
        parameter.mul_(1.1)
        parameter.data = parameter.data.clone()
    expected = call(unet)
    found, compiled = within(c, unet)
    assert compiled and torch.allclose(found, expected, atol=1e-6)
    assert compilations() == 0 and not counters["graph_break"]


def test_another_shape_is_drawn_eagerly_first_and_then_compiled_too(shared: Compilation) -> None:
    c, unet = shared, shared.network
    assert [within(c, unet, size=size)[1] for size in (16, 8, 16)] == [False, True, True]


def test_blocks_that_meet_what_they_were_not_compiled_for_run_eagerly(shared: Compilation) -> None:
    c, unet = shared, shared.network
    with c.run(8, CPU) as turn:
        assert turn.is_compiled
        call(unet, size=12)  # a callback may change the shape on the way
    assert compilations() == 0


class Gate:
    """A backend that waits until it is opened."""

    def __init__(self) -> None:
        self.open, self.reached = threading.Event(), threading.Event()
        self.threads: set[str] = set()

    def __call__(self, module: Any, inputs: Any) -> Callable[..., Any]:
        self.threads.add(threading.current_thread().name)
        self.reached.set()
        assert self.open.wait(20)
        return module.forward  # type: ignore[no-any-return]


def test_pictures_are_drawn_eagerly_until_the_last_block_is_done(
    unet: UNet2DConditionModel,
) -> None:
    gate = Gate()
    c = Compilation(unet, backend=gate)
    within(c, unet)
    assert gate.reached.wait(20)
    for seed in range(3):
        assert not within(c, unet, seed=seed)[1]
    assert not c.compiled and c.progress[0] < c.progress[1] == len(c.switches)
    gate.open.set()
    assert c.wait(20) and c.compiled
    assert gate.threads == {"fewstep-compile"}
    assert within(c, unet)[1]
    assert all(thread.name != "fewstep-compile" for thread in threading.enumerate())


def test_a_picture_that_is_being_drawn_is_not_switched_half_way(unet: UNet2DConditionModel) -> None:
    gate = Gate()
    c = Compilation(unet, backend=gate)
    within(c, unet)
    with c.run(8, CPU) as turn:
        gate.open.set()
        assert c.wait(20) and c.compiled
        assert not turn.is_compiled and c._mode.table is None


def test_a_run_in_one_thread_leaves_the_others_as_they_are(shared: Compilation) -> None:
    c = shared
    seen = []
    with c.run(8, CPU):
        other = threading.Thread(target=lambda: seen.append(c._mode.table))
        other.start()
        other.join()
    assert seen == [None]


def broken(module: Any, inputs: Any) -> Any:
    raise RuntimeError("no compiler here")


@pytest.mark.parametrize("background", [False, True])
def test_an_error_leaves_all_eager_and_is_reported_once(
    unet: UNet2DConditionModel, background: bool
) -> None:
    expected = call(unet)
    c = Compilation(unet, backend=broken, background=background)
    within(c, unet)
    assert c.wait(20) and not c.compiled
    with pytest.warns(UserWarning, match="without it: .*no compiler here"):
        assert torch.equal(within(c, unet)[0], expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not within(c, unet)[1]
        assert not within(c, unet, size=16)[1]


def test_blocks_with_hooks_and_networks_in_training_stay_eager(shared: Compilation) -> None:
    c, unet = shared, shared.network
    calls: list[Any] = []
    handle = c.switches[0].block.register_forward_hook(lambda *a: calls.append(a))
    assert within(c, unet)[1] and len(calls) == 1
    handle.remove()
    unet.train()
    assert not within(c, unet)[1]
    unet.eval()
    with torch.enable_grad():
        assert not within(c, unet)[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_off_the_cpu_every_block_compiles_without_a_break(
    unet: UNet2DConditionModel, dtype: torch.dtype
) -> None:
    ops_layers._plain = False  # as users have it; `plain` of these tests sets it back
    vae = AutoencoderKL(**VAE).eval()
    for network in (unet, vae):
        network.to(META, dtype)
    text, z = torch.zeros(2, 7, 32, device=META, dtype=dtype), torch.zeros(2, 4, 8, 8, device=META)
    z = z.to(dtype)
    c, d = (Compilation(n, backend="eager", background=False) for n in (unet, vae))
    for _ in range(2):
        with c.run("k", META) as turn, d.run("k", META):
            unet(z, torch.full((2,), 5, device=META), text, return_dict=False)
            vae.decode(z, return_dict=False)
    assert turn.is_compiled and c.error is None and d.error is None
    assert not counters["graph_break"]


def test_the_outermost_blocks_are_compiled() -> None:
    vae = AutoencoderKL(**VAE)
    assert {type(b).__name__ for b in outermost(vae.decoder)} == {"Level", "MidBlock"}
    assert {type(b).__name__ for b in outermost(UNet2DConditionModel(**UNET))} == {
        "ResnetBlock",
        "Transformer2D",
    }


def test_compilations_are_kept_in_our_folder_unless_the_environment_has_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "ours"))
    assert cache_folder() == tmp_path / "ours" / "compiled"
    keep_in(cache_folder())
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(cache_folder() / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == str(tmp_path / "TRITON_CACHE_DIR")
    assert cache_folder().stat().st_mode & 0o077 == 0


# ── a pipeline ──


def test_a_pipeline_compiles_unet_and_vae_in_the_background_and_draws_the_same() -> None:
    pipe = Quick(LCMScheduler(**NOISE))
    z = torch.randn(2, 4, 4, 4)
    expected = [pipe.draw(pipe.job(seed=7)), pipe.decoded(z)]
    pipe.compile(backend="eager")
    assert not pipe.compiled and pipe.compile_progress == (0, 0)
    pipe.draw(pipe.job()), pipe.decoded(z)
    assert pipe.wait_until_compiled(20) and pipe.compiled
    done, total = pipe.compile_progress
    made = compilations()
    assert done == total > 8
    found = [pipe.draw(pipe.job(seed=7)), pipe.decoded(z)]
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    for job in (pipe.job(seed=9), pipe.job(steps=5), pipe.job(seed=3)):
        pipe.draw(job)
    assert compilations() == made and not counters["graph_break"]


def test_guidance_compiles_for_its_doubled_rows_once_whatever_its_scale() -> None:
    pipe = Quick(LCMScheduler(**NOISE))
    pipe.compile(backend="eager", background=False)
    pipe.draw(pipe.job(guidance=7.5))
    made = compilations()
    for scale in (7.5, 2.0, 4.5):
        pipe.draw(pipe.job(guidance=scale))
    assert compilations() == made and pipe.compiled


def test_graphs_are_recorded_of_the_eager_network_and_then_of_the_compiled_one() -> None:
    pipe = Quick(LCMScheduler(**NOISE), graphs=Graphs(Rerun()))
    assert pipe._graphs is not None
    for _ in range(2):
        pipe.draw(pipe.job())
    expected = pipe.draw(pipe.job())
    pipe.compile(backend="eager", background=False)
    replays = []
    for _ in range(4):
        assert torch.allclose(pipe.draw(pipe.job()), expected, atol=1e-5)
        replays.append(pipe._graphs.replays)
    # By itself, to see what its blocks are called with; compiled; recorded; replayed.
    assert replays == [2, 2, 3, 4] and pipe._graphs.recordings == 2


def test_another_unet_is_compiled_in_its_turn() -> None:
    pipe = Quick(LCMScheduler(**NOISE))
    pipe.compile(backend="eager", background=False)
    pipe.draw(pipe.job())
    old = pipe.unet
    pipe.unet = UNet2DConditionModel(**UNET).eval()
    expected = pipe.plainly(pipe.job())
    assert torch.equal(pipe.draw(pipe.job()), expected)
    assert pipe.compiled and pipe._compilations["unet"].network is pipe.unet
    assert all(b._compiled_call_impl is None for b in outermost(old))


def test_compile_says_that_it_is_not_for_a_cpu() -> None:
    pipe = Quick(LCMScheduler(**NOISE))
    ops_layers._plain = False  # as users have it; `plain` of these tests sets it back
    with pytest.raises(RequestError, match=r"compile is for a GPU.*pipe\.to\('cuda'\)"):
        pipe.compile()
