"""What of a source can be trained on: each picture is looked at once, and every drop counted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ...checkpoints.config import replacing
from ...errors import RequestError
from ..config import Pictures, Scenes
from .sources import Facts, Source, digest_of

PIECE = 4096  # pictures after which what was found out is written down
NAMED = 3  # dropped pictures that messages name, of each rule

UNREADABLE = "unreadable"
TOO_SMALL = "too small"
OVER_LIMIT = "over the limit"


class Dropped(NamedTuple):
    """How many pictures a rule dropped, and the first few of them."""

    number: int
    examples: tuple[str, ...]


@dataclass(frozen=True)
class Counts:
    """What was kept of a source's pictures, and what each rule dropped."""

    kept: int
    dropped: Mapping[str, Dropped]

    @property
    def numbers(self) -> dict[str, int]:
        """How many were kept, and how many each rule dropped."""
        return {"kept": self.kept} | {rule: each.number for rule, each in self.dropped.items()}

    def __str__(self) -> str:
        total = self.kept + sum(each.number for each in self.dropped.values())
        drops = (
            f"{each.number} {rule} ({', '.join(each.examples)}{', ...' * more})"
            for rule, each in self.dropped.items()
            for more in [each.number > len(each.examples)]
        )
        listed = "; dropped: " + ", ".join(drops) if self.dropped else ""
        return f"kept {self.kept} of {total} pictures{listed}"


@dataclass(frozen=True, eq=False)
class Survey:
    """The pictures of a source that are kept: their numbers in it, and what is known of them."""

    indices: list[int]
    facts: list[Facts]
    counts: Counts


def survey(
    source: Source, data: Scenes | Pictures, memory: Path, rank: int = 0, ranks: int = 1
) -> Survey:
    """The survey of a source, or with several `ranks` of the share of one of them.

    A limit needs the pictures in order, so then every rank looks at all of them. Raises
    RequestError if nothing is kept, or if more than half of the pictures cannot be read.
    """
    limit, least = (data.limit, data.min_side) if isinstance(data, Pictures) else (0, 0)
    numbers = range(len(source)) if limit else range(rank, len(source), ranks)
    drops: dict[str, list[str]] = {
        "no such file": list(source.absent),
        "no caption": [source.keys[index] for index in numbers if not source.captions[index]],
    }
    drops |= {rule: [] for rule in (UNREADABLE, TOO_SMALL, OVER_LIMIT)}
    kept: dict[int, Facts] = {}
    known = Known(source, memory)
    for block in blocks([index for index in numbers if source.captions[index]], limit):
        full = limit and len(kept) == limit
        looks = [None] * len(block) if full else known.look(block, data.workers)
        for index, facts in zip(block, looks, strict=True):
            if limit and len(kept) == limit:
                drops[OVER_LIMIT].append(source.keys[index])
            elif facts is None:
                drops[UNREADABLE].append(source.keys[index])
            elif min(facts.height, facts.width) < least:
                drops[TOO_SMALL].append(source.keys[index])
            else:
                kept[index] = facts
    check(counts := counted(len(kept), drops), whole=ranks == 1)
    return Survey(list(kept), list(kept.values()), counts)


def counted(kept: int, drops: Mapping[str, list[str]]) -> Counts:
    """The counts of what was kept, and of the names of what each rule dropped."""
    some = {rule: Dropped(len(d), tuple(d[:NAMED])) for rule, d in drops.items() if d}
    return Counts(kept, some)


def check(counts: Counts, whole: bool) -> None:
    """Raises RequestError if there is too little to train on."""
    bad, small = (counts.numbers.get(rule, 0) for rule in (UNREADABLE, TOO_SMALL))
    if bad > (counts.kept + small + bad) / 2:
        raise RequestError(
            f"more than half of the pictures cannot be read ({counts}); is data.path right, and "
            "are they pictures?"
        )
    if whole and not counts.kept:
        raise RequestError(
            f"there is nothing to train on: {counts}; see data.path, data.caption_key and "
            "data.min_side"
        )


def blocks(candidates: list[int], limit: int) -> Iterator[list[int]]:
    """All candidates at once, or so many at a time as the limit asks for."""
    step = limit or len(candidates) or 1
    for start in range(0, len(candidates), step):
        yield candidates[start : start + step]


class Known:
    """The facts of a source's pictures, kept in files; those that are not known are looked up."""

    def __init__(self, source: Source, memory: Path) -> None:
        self.source = source
        self.folder = memory / f"facts-{digest_of(source.name)[:16]}"
        self.facts: dict[str, Facts] = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            for line in path.read_text(encoding="utf-8").splitlines():
                stamp, *facts = json.loads(line)
                self.facts[stamp] = Facts(*facts)

    def look(self, indices: Sequence[int], workers: int) -> list[Facts | None]:
        """The facts of pictures by number; None for those that cannot be read."""
        stamps = [self.source.stamp(index) for index in indices]
        found = {i: self.facts[s] for i, s in zip(indices, stamps, strict=True) if s in self.facts}
        new = [index for index in indices if index not in found]
        looks: dict[int, Facts | None] = {}
        reads = bool(new and stamps[0])  # scenes are known without reading
        with tqdm(
            total=len(new), desc="look at pictures", unit="picture", disable=not reads
        ) as bar:
            for start in range(0, len(new), PIECE):
                piece = new[start : start + PIECE]
                loader = DataLoader(
                    Looks(self.source, piece),
                    batch_size=32,
                    collate_fn=list,
                    num_workers=workers if reads else 0,
                )
                facts = []
                for some in loader:
                    facts += some
                    bar.update(len(some))
                looks.update(zip(piece, facts, strict=True))
                self.keep(piece, facts)
        return [found.get(index) or looks[index] for index in indices]

    def keep(self, indices: Sequence[int], facts: Sequence[Facts | None]) -> None:
        """Write down the facts of the pictures that could be read and that have a stamp."""
        stamped = [(self.source.stamp(i), f) for i, f in zip(indices, facts, strict=True) if f]
        lines = [json.dumps([stamp, *asdict(f).values()]) + "\n" for stamp, f in stamped if stamp]
        if not lines:
            return
        try:
            with replacing(self.folder / f"{uuid4().hex}.jsonl") as beside:
                beside.write_text("".join(lines), encoding="utf-8")
        except OSError:
            pass  # they will be looked at again


class Looks(Dataset):
    """The facts of some pictures of a source."""

    def __init__(self, source: Source, indices: Sequence[int]) -> None:
        self.source, self.indices = source, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, position: int) -> Facts | None:
        return self.source.look(self.indices[position])


def held_out(facts: Sequence[Facts], count: int) -> np.ndarray:
    """The rows of the `count` pictures whose digests come last, sorted.

    So adding pictures moves few rows, and copies of one picture stay on one side.
    """
    if count >= len(facts) > 0 or count < 0:
        raise RequestError(
            f"data.held_out={count} must lie in [0, {len(facts) - 1}], for {len(facts)} pictures"
        )
    order = sorted(range(len(facts)), key=lambda row: facts[row].digest)
    return np.array(sorted(order[len(order) - count :]), dtype=np.int64)
