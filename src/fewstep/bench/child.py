"""The process of one side: it reads jobs from stdin, a JSON object a line, and answers each.

Between two jobs it waits for its stdin, so that only one side of a benchmark works at a time. What
the libraries print goes to stderr. Imports nothing that takes time before a side is loaded.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fewstep.errors import FewstepError

Answer = dict[str, Any]


class Child:
    """The jobs; each takes the asked object's values and returns what is answered."""

    def __init__(self) -> None:
        self.side: Any = None
        self.rested = time.process_time()
        self.waiting = 0.0  # CPU seconds that were used while it should have waited

    def prepare(self, **given: Any) -> Answer:
        """Writes what the work needs; where it is, its size, and its operations."""
        return importlib.import_module("fewstep.bench.limits").prepared(**given)

    def ceilings(self, **given: Any) -> Answer:
        """What the machine can do."""
        return importlib.import_module("fewstep.bench.limits").ceilings(**given)

    def load(self, loader: str, setting: Mapping[str, Any], threads: int) -> Answer:
        """Imports the side's library and loads the model."""
        began = time.perf_counter()
        module, _, name = loader.partition(":")
        load = getattr(importlib.import_module(module), name)
        if threads:
            importlib.import_module("torch").set_num_threads(threads)
        self.side = load(importlib.import_module("fewstep.bench.work").Setting.from_dict(setting))
        self.side.wait()
        return {"seconds": time.perf_counter() - began, **told_of(self.side), **about()}

    def run(self, seed: int) -> Answer:
        """One run, timed: wall and CPU seconds, and how many cores others used meanwhile."""
        others, cpu, began = busy(), time.process_time(), time.perf_counter()
        self.side.run(seed)
        self.side.wait()
        wall, own = time.perf_counter() - began, time.process_time() - cpu
        told = {"seconds": wall, "cpu_seconds": own}
        if others is not None:
            told["others"] = max(0.0, (busy() or 0.0) - others - own) / wall
        return told

    def output(self, seed: int, file: str) -> Answer:
        """One run whose output goes to a file of numpy's."""
        import numpy as np

        found = self.side.output(seed)
        np.save(file, found, allow_pickle=False)
        return {"finite": bool(np.isfinite(found).all()), "shape": list(found.shape)}

    def forget_peak(self) -> Answer:
        """From here on the peak of memory counts anew, where the system can do that."""
        if cuda := on_cuda(self.side):
            cuda.reset_peak_memory_stats()
            return {"reset": True}
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            return {"reset": False}
        return {"reset": True}

    def peak(self) -> Answer:
        """The most bytes that were resident, or on the GPU; CPU seconds used while waiting."""
        if cuda := on_cuda(self.side):
            return {"bytes": cuda.max_memory_allocated(), "waiting": self.waiting}
        return {"bytes": resident_peak(), "waiting": self.waiting}

    def answer(self, job: str, values: Mapping[str, Any]) -> Answer:
        """What is answered to a job, an error included."""
        self.waiting += time.process_time() - self.rested
        try:
            return dict(self.quietly(getattr(self, job), values))
        except Exception as error:
            traceback.print_exc()
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            return {"failed": reason, "on_purpose": isinstance(error, FewstepError)}
        finally:
            self.rested = time.process_time()

    def quietly(self, job: Callable[..., Answer], values: Mapping[str, Any]) -> Answer:
        """A job without gradients, once torch is there."""
        torch = sys.modules.get("torch")
        if torch is None:
            return job(**values)
        with torch.no_grad():
            return job(**values)


def told_of(side: Any) -> Answer:
    """What a side says of itself."""
    return {"draws": side.draws, "converted": side.converted}


def about() -> Answer:
    """Versions and threads of this process."""
    names = ("fewstep", "torch", "diffusers", "transformers", "openvino", "onnxruntime", "numpy")
    modules = {name: sys.modules[name] for name in names if name in sys.modules}
    versions = {n: str(getattr(m, "__version__", "unknown")) for n, m in modules.items()}
    torch = modules.get("torch")
    return {"versions": versions, "threads": torch.get_num_threads() if torch else 1}


def on_cuda(side: Any) -> Any:
    """torch.cuda if the side works on a GPU of its kind, else None."""
    if side is None or not side.device.startswith("cuda"):
        return None
    return importlib.import_module("torch").cuda


def resident_peak() -> int:
    """The most bytes that were in memory at once, those of mapped files included."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss would begin with what the parent had
        (line,) = (x for x in status.read_text().splitlines() if x.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def busy() -> float | None:
    """CPU seconds that the machine has worked since it started, None if it does not tell."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, irq, soft, *_ = map(int, file.readline().split()[1:])
    except (OSError, ValueError):
        return None
    return (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    """Answers the jobs of stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its children
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    child = Child()
    for line in sys.stdin:
        asked = json.loads(line)
        answers.write(json.dumps(child.answer(asked.pop("job"), asked)) + "\n")


if __name__ == "__main__":
    main()
