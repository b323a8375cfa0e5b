"""Giving back memory that is no longer read."""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any

from torch import Tensor

LARGE = 1 << 17  # bytes; less is not worth the call
DONT_NEED = 4  # MADV_DONTNEED


def release_pages(tensor: Tensor) -> None:
    """Let go of the pages of a tensor that lies in a mapped file; they can be read again.

    Weights that were packed need not stay in memory as they are on disk, too. Memory of any other
    kind is left alone.
    """
    size = tensor.numel() * tensor.element_size()
    if size < LARGE or not sys.platform.startswith("linux") or not tensor.is_contiguous():
        return
    start, end = tensor.data_ptr(), tensor.data_ptr() + size
    page = mmap.PAGESIZE
    first, last = -(-start // page) * page, end // page * page  # whole pages of this tensor's own
    if first < last and _is_mapped_file(start, end):
        _madvise()(ctypes.c_void_p(first), ctypes.c_size_t(last - first), DONT_NEED)


def _is_mapped_file(start: int, end: int) -> bool:
    """Whether one unwritable or private mapping of a safetensors file covers the addresses."""
    with open("/proc/self/maps", encoding="utf-8", errors="replace") as maps:
        for line in maps:
            fields = line.split(maxsplit=5)
            low, high = (int(address, 16) for address in fields[0].split("-"))
            if low <= start and end <= high:
                return len(fields) > 5 and fields[5].rstrip("\n").endswith(".safetensors")
    return False


@cache
def _madvise() -> Any:
    return ctypes.CDLL(None, use_errno=True).madvise
