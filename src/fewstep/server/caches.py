"""What is kept to be used again: embeddings of texts, moments of pictures, pictures."""

from __future__ import annotations

import hashlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any, Generic, TypeVar

import PIL.Image
import torch
from torch import Tensor

V = TypeVar("V")


class Cache(Generic[V]):
    """Values by key, `most` bytes of them: the one that was used longest ago goes first."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.size = self.hits = self.misses = 0
        self._kept: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._kept)

    def get(self, key: Hashable) -> V | None:
        """The value of a key, None if it is not kept."""
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                self.misses += 1
                return None
            self.hits += 1
            self._kept.move_to_end(key)
            return found[0]

    def put(self, key: Hashable, value: V, size: int) -> None:
        """Keeps a value of `size` bytes, unless it alone is more than is kept."""
        if size > self.most:
            return
        with self._lock:
            _, before = self._kept.pop(key, (None, 0))
            self._kept[key] = value, size
            self.size += size - before
            while self.size > self.most:
                _, (_, gone) = self._kept.popitem(last=False)
                self.size -= gone


def remembering(
    function: Callable[..., Any], cache: Cache[Any], context: Callable[[], Hashable]
) -> Callable[..., Any]:
    """`function`, which gives tensors, with its results kept by its arguments and the `context`.

    Tensors among the arguments count by their values, lists by their items. What it warned of is
    kept too, and warned of each time.
    """

    def called(*args: Any, **kwargs: Any) -> Any:
        key = (context(), tuple(map(plain, args)), tuple((n, plain(v)) for n, v in kwargs.items()))
        found = cache.get(key)
        if found is None:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                value = function(*args, **kwargs)
            found = value, [w.message for w in caught]
            cache.put(key, found, bytes_of(value))
        value, notices = found
        for notice in notices:
            warnings.warn(notice, stacklevel=2)
        return value

    return called


def plain(value: Any) -> Hashable:
    """An argument as part of a key."""
    if isinstance(value, Tensor):
        return digest_of(value)
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value


def bytes_of(value: Any) -> int:
    """The size of a tensor, or of a tuple of tensors and None."""
    if isinstance(value, tuple):
        return sum(map(bytes_of, value))
    return 0 if value is None else value.numel() * value.element_size()


def digest_of(x: Tensor) -> Hashable:
    """Shape, dtype and a hash of a tensor's values."""
    values = x.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return tuple(x.shape), x.dtype, hashlib.sha256(values).hexdigest()


def digest(picture: PIL.Image.Image | None) -> str | None:
    """sha256 of a picture's size and RGB pixels, as the records of files hold it."""
    if picture is None:
        return None
    size = f"{picture.width}x{picture.height}".encode()
    return hashlib.sha256(size + picture.convert("RGB").tobytes()).hexdigest()
