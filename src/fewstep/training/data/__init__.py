"""Training data of any kind, encoded once.

sources (folder, hub, shards, emoji) -> survey (kept, dropped) -> pictures (crops) -> encoders ->
store (files) -> encoded (the training set)
"""

from .encoded import EncodedSet, Encoding, cache_folder, encode_share, open_set, prepare
from .survey import Counts

__all__ = [
    "Counts",
    "EncodedSet",
    "Encoding",
    "cache_folder",
    "encode_share",
    "open_set",
    "prepare",
]
