"""The command line: `fewstep generate`, `repro`, `train`, ...; one function, `main`."""

from .app import main

__all__ = ["main"]
