"""What an evaluation found: rows of scores, as JSON for programs and as a Markdown table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from fewstep.errors import CheckpointError, RequestError


@dataclass(frozen=True)
class Column:
    """One metric: the `key` of its scores, the `label` in the table, `scale` * score is printed."""

    key: str
    label: str
    scale: float = 100.0
    digits: int = 1

    def text(self, score: float | None) -> str:
        return "-" if score is None else f"{self.scale * score:.{self.digits}f}"


@dataclass(frozen=True)
class Row:
    """The scores of one method; `steps` is None for what takes no steps, like the real pictures."""

    method: str
    steps: int | None
    scores: Mapping[str, float]


@dataclass(frozen=True)
class Report:
    """Rows of scores under columns; `settings` says how they came about."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    settings: Mapping[str, str | int | float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        known = {column.key for column in self.columns}
        for row in self.rows:
            if unknown := sorted(set(row.scores) - known):
                raise RequestError(f"row {row.method!r} has {unknown[0]!r}, which is in no column")

    def markdown(self) -> str:
        """A title, a table with one line a row ("-" where a row has no score) and the settings."""
        head = ["method", "steps", *(column.label for column in self.columns)]
        lines = [f"## {self.title}", "", _line(head), _line(["---"] * 2 + ["---:"] * len(head[2:]))]
        for row in self.rows:
            scores = [column.text(row.scores.get(column.key)) for column in self.columns]
            lines.append(_line([row.method, "-" if row.steps is None else str(row.steps), *scores]))
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

    def write(self, folder: str | Path, name: str = "evaluation") -> tuple[Path, Path]:
        """Write `<name>.json` and `<name>.md` into `folder`, which is made if need be."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files = folder / f"{name}.json", folder / f"{name}.md"
        for file, text in zip(files, (self.json(), self.markdown()), strict=True):
            file.write_text(text, encoding="utf-8")
        return files


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
