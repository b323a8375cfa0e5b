"""What an evaluation found: rows of scores, as JSON for programs and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from PIL import Image

from fewstep.checkpoints.config import replacing
from fewstep.errors import CheckpointError, RequestError


@dataclass(frozen=True)
class Column:
    """One metric: the `key` of its scores, the `label` in the table, `scale` * score is printed.

    `spread` is the key of the scores' uncertainty, which is printed behind them.
    """

    key: str
    label: str
    scale: float = 100.0
    digits: int = 1
    spread: str | None = None

    def text(self, scores: Mapping[str, float]) -> str:
        """What the table says of a row's scores."""
        score, spread = scores.get(self.key), scores.get(self.spread or "")
        if score is None:
            return "-"
        behind = "" if spread is None else f" ± {self.scale * spread:.{self.digits}f}"
        return f"{self.scale * score:.{self.digits}f}{behind}"


@dataclass(frozen=True)
class Row:
    """The scores of one method; `steps` is None for what takes no steps, like the real pictures.

    `guidance` is None where it is told in the method's name, or not known.
    """

    method: str
    steps: int | None
    scores: Mapping[str, float]
    guidance: float | None = None


@dataclass(frozen=True)
class Report:
    """Rows of scores under columns; `settings` says how they came about."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {key for column in self.columns for key in (column.key, column.spread)}
        for row in self.rows:
            if unknown := sorted(set(row.scores) - known):
                raise RequestError(f"row {row.method!r} has {unknown[0]!r}, which is in no column")

    def markdown(self) -> str:
        """A title, a table with one line a row ("-" where a row has no score) and the settings."""
        guided = any(row.guidance is not None for row in self.rows)
        head = ["method", "steps", *(["guidance"] if guided else [])]
        rule = ["---"] * len(head) + ["---:"] * len(self.columns)
        lines = [f"## {self.title}", "", _line([*head, *(c.label for c in self.columns)])]
        lines.append(_line(rule))
        for row in self.rows:
            made = [row.method, _number(row.steps), *([_number(row.guidance)] if guided else [])]
            lines.append(_line([*made, *(column.text(row.scores) for column in self.columns)]))
        if self.settings:
            lines += ["", "; ".join(f"{name}: {value}" for name, value in self.settings.items())]
        return "\n".join(lines) + "\n"

    def json(self) -> str:
        """All of it with unrounded scores; `from_json` reads it back."""
        return json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `json` wrote; CheckpointError when the text is something else."""
        try:
            fields = json.loads(text)
            return cls(
                fields["title"],
                tuple(Column(**column) for column in fields["columns"]),
                tuple(Row(**row) for row in fields["rows"]),
                fields["settings"],
            )
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"not an evaluation report: {error}") from error

    def write(
        self,
        folder: str | Path,
        name: str = "evaluation",
        pictures: Mapping[str, Image.Image] | None = None,
    ) -> tuple[Path, ...]:
        """Write `<name>.json`, `<name>.md` and a PNG file for each picture into `folder`.

        It is made if need be. Returns the files.
        """
        folder = Path(folder)
        texts = {folder / f"{name}.json": self.json(), folder / f"{name}.md": self.markdown()}
        for file, text in texts.items():
            with replacing(file) as beside:
                beside.write_text(text, encoding="utf-8")
        drawn = {folder / f"{stem}.png": picture for stem, picture in (pictures or {}).items()}
        for file, picture in drawn.items():
            with replacing(file) as beside:
                picture.save(beside, format="PNG")
        return (*texts, *drawn)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
