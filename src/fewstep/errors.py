"""The errors that fewstep raises on purpose.

* FewstepError
  - UnsupportedConfig   a config value that is not implemented (also a ValueError)
  - CheckpointError     files that are missing, surplus, broken or refused (also an OSError)
  - RequestError        an argument that cannot be served (also a ValueError)
"""

from __future__ import annotations


class FewstepError(Exception):
    """Base of every error that fewstep raises on purpose."""


class UnsupportedConfig(FewstepError, ValueError):
    """A config value that this version does not implement; the message names it."""


class CheckpointError(FewstepError, OSError):
    """A checkpoint that cannot be loaded or written as it stands."""


class RequestError(FewstepError, ValueError):
    """A request that cannot be served; the message names the argument, its value and the remedy."""
