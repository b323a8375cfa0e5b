"""Our attention kernel beside PyTorch's, on the CPU: `python benchmarks/kernels.py`.

One thread by default (`--threads`), times of the processor, A B A B: medians with ranges in GFLOP/s
a core, the ratio, and both errors against float64. PyTorch's side has the views and the copy that
its layout needs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fewstep import kernels

SHAPES = {  # heads, queries, keys, numbers of a head
    "SD 512, 64x64": (8, 4096, 4096, 40),
    "SD 512, 32x32": (8, 1024, 1024, 80),
    "SD 512, 16x16": (8, 256, 256, 160),
    "SD 512, 8x8": (8, 64, 64, 160),
    "SD 512, 64x64, text": (8, 4096, 77, 40),
    "SD 512, 32x32, text": (8, 1024, 77, 80),
    "SDXL 1024, 64x64": (10, 4096, 4096, 64),
    "SDXL 1024, 32x32": (20, 1024, 1024, 64),
    "VAE 512": (1, 4096, 4096, 512),
    "tiny, 16x16": (4, 256, 256, 16),
}
Attention = Callable[[Tensor, Tensor, Tensor, int], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """The kernel's answer (B, N, H·D); PyTorch's where the kernel leaves it to PyTorch."""
    out = kernels.attention(q, k, v, heads)
    return pytorch(q, k, v, heads) if out is None else out


def pytorch(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """PyTorch's answer (B, N, H·D)."""
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    return scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def seconds(function: Attention, inputs: tuple[Tensor, Tensor, Tensor], heads: int) -> float:
    """Processor seconds of a call: the mean of as many as make 50 ms or so."""
    operations = 4 * inputs[0].numel() * inputs[1].shape[1]
    calls = max(1, int(5e9 / operations))
    start = time.process_time()
    for _ in range(calls):
        function(*inputs, heads)
    return (time.process_time() - start) / calls


def error(function: Attention, inputs: tuple[Tensor, Tensor, Tensor], heads: int) -> float:
    """Relative L2 error of the first 64 rows."""
    q, k, v = inputs
    q = q[:, :64]
    right = pytorch(q.double(), k.double(), v.double(), heads)
    return float((function(q, k, v, heads).double() - right).norm() / right.norm())


def compare(name: str, dtype: torch.dtype, repeats: int) -> str:
    """A line of the table."""
    heads, n, m, d = SHAPES[name]
    draws = (torch.randn(1, rows, heads * d) for rows in (n, m, m))
    q, k, v = (x.to(dtype) for x in draws)
    times: dict[Attention, list[float]] = {ours: [], pytorch: []}
    for turn in range(repeats + 1):
        for function, taken in times.items():
            measured = seconds(function, (q, k, v), heads)
            if turn:  # the first warms up
                taken.append(measured)
    giga = 4e-9 * heads * n * m * d
    cells = [name, str(dtype).removeprefix("torch.")]
    for function, taken in times.items():
        low, high = giga / max(taken), giga / min(taken)
        median = giga / statistics.median(taken)
        cells.append(
            f"{median:.0f} ({low:.0f}-{high:.0f}), {error(function, (q, k, v), heads):.1e}"
        )
    ratios = [b / a for a, b in zip(times[ours], times[pytorch], strict=True)]
    cells.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """The table on standard output."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--shape", action="append", choices=list(SHAPES), help="default: all")
    parser.add_argument("--dtype", action="append", choices=["bfloat16", "float32"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if not kernels.available():
        raise SystemExit(f"fewstep's kernels are {kernels.status()}")
    print(
        "| work | type | ours, GFLOP/s a core, error | PyTorch's | ratio |\n|---|---|---|---|---|"
    )
    for dtype in arguments.dtype or ["bfloat16", "float32"]:
        for name in arguments.shape or SHAPES:
            print(compare(name, getattr(torch, dtype), arguments.repeats), flush=True)


if __name__ == "__main__":
    main()
