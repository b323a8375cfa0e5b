"""Large libraries, imported for the first time without the garbage collector."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def first_import(library: str) -> Iterator[None]:
    """A block whose imports bring in the module `library`, without collections if it is new.

    The collector would go through each new module's objects again and again, and find nothing, as
    modules stay: a third of the time of starting. What there is after the block is left out of
    later collections, and of the one at the end of the process; so what is garbage is collected
    before it. Once `library` is imported, a block is as any other.
    """
    if library in sys.modules or not gc.isenabled():
        yield
        return
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if library in sys.modules:
            gc.freeze()
        gc.enable()
