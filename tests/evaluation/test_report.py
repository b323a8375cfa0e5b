from pathlib import Path

import numpy as np
import pytest

from fewstep.errors import CheckpointError, RequestError
from fewstep.evaluation.report import Column, Report, Row
from fewstep.evaluation.sheet import contact_sheet

REPORT = Report(
    "Emoji, 64 px",
    (Column("recall", "concept recall"), Column("kid", "KID-EffLite0 x1000", 1000.0, 2)),
    (
        Row("real pictures (ceiling)", None, {"recall": 0.9449}),
        Row("LCM", 4, {"recall": 0.5, "kid": 0.01234}),
    ),
    {"prompts": 512},
)


def test_the_table_has_a_line_a_row_and_a_dash_for_what_is_missing() -> None:
    lines = REPORT.markdown().splitlines()
    assert lines[2:6] == [
        "| method | steps | concept recall | KID-EffLite0 x1000 |",
        "| --- | --- | ---: | ---: |",
        "| real pictures (ceiling) | - | 94.5 | - |",
        "| LCM | 4 | 50.0 | 12.34 |",
    ]
    assert lines[-1] == "prompts: 512"


def test_json_round_trip(tmp_path: Path) -> None:
    json_file, table = REPORT.write(tmp_path / "new", "emoji")
    assert Report.from_json(json_file.read_text()) == REPORT
    assert table.read_text() == REPORT.markdown()
    with pytest.raises(CheckpointError, match="not an evaluation report"):
        Report.from_json('{"title": 1}')


def test_a_score_without_a_column_is_refused() -> None:
    with pytest.raises(RequestError, match="'recal', which is in no column"):
        Report("t", REPORT.columns, (Row("x", 1, {"recal": 0.1}),))


def test_the_sheet_shows_each_picture_at_its_place() -> None:
    pictures = np.zeros((2, 3, 16, 16, 3), np.uint8)
    pictures[1, 2] = (255, 0, 0)
    labels = ["a very long prompt about a red apple on a blue background", "an apple"]
    sheet = np.asarray(contact_sheet(pictures, labels, ["1 step", "2 steps", "DDIM, 4"], scale=2))
    reds = np.argwhere((sheet == (255, 0, 0)).all(-1))
    assert len(reds) == 32 * 32
    assert (reds.max(0) - reds.min(0)).tolist() == [31, 31]
    assert reds.max(0).tolist() == [sheet.shape[0] - 5, sheet.shape[1] - 5]
    with pytest.raises(RequestError, match="need as many labels"):
        contact_sheet(pictures, labels, ["1 step"])
