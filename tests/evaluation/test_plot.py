import numpy as np
import pytest

from fewstep.errors import RequestError
from fewstep.evaluation.plot import Axis, Series, figure, figures
from fewstep.evaluation.report import Column, Report, Row

BLUE, ORANGE = (0, 114, 178), (213, 94, 0)
COLUMNS = (
    Column("fid/x", "FID-X", 1.0),
    Column("seconds", "seconds a picture", 1.0),
)


def rows(method: str, guidance: float, *scores: float) -> list[Row]:
    return [
        Row(method, steps, {"fid/x": score, "seconds": 0.1 * steps}, guidance)
        for steps, score in zip((1, 2, 4), scores, strict=True)
    ]


def places(image: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """(row, column) of the pixels of about a colour above the legend."""
    near = (np.abs(image.astype(int) - colour).sum(-1) < 40)[:300]
    return np.argwhere(near)


def test_ticks_are_round_and_inside() -> None:
    assert Axis.of([3.0, 11.0]).ticks == (4.0, 6.0, 8.0, 10.0)
    assert Axis.of([-0.21, 0.2]).ticks == pytest.approx((-0.2, -0.1, 0.0, 0.1, 0.2))
    wide = Axis.of([2.0, 900.0])
    assert wide.is_log and set(wide.ticks) >= {2, 5, 10, 20, 50, 100, 200, 500}
    assert not Axis.of([-1.0, 900.0]).is_log
    assert Axis.of([1, 2, 4, 8], (1, 2, 4, 8)).ticks == (1, 2, 4, 8)
    same = Axis.of([5.0, 5.0])
    assert same.low < 5 < same.high and 0.4 < same.place(5) < 0.6


def test_a_falling_line_falls_and_colours_tell_lines_apart() -> None:
    lines = [Series("down", ((1, 9.0), (2, 5.0), (4, 4.0))), Series("up", ((1, 4.0), (4, 9.0)))]
    image = np.asarray(figure({"FID": lines}, "steps", marked=True))
    for colour, falls in ((BLUE, True), (ORANGE, False)):
        found = places(image, colour)
        first, last = found[found[:, 1].argmin()], found[found[:, 1].argmax()]
        assert (last[0] > first[0]) == falls  # rows count downwards
        assert last[1] - first[1] > 200
    assert (image[:300, :10] == 255).all()  # nothing runs out of the panel


def test_a_report_has_a_figure_for_each_thing_that_varies() -> None:
    one = Report("t", COLUMNS, (*rows("LCM", 8, 9, 7, 6), Row("real", None, {"fid/x": 1.0})))
    assert set(figures(one)) == {"steps", "seconds"}
    sweep = Report("t", COLUMNS, (*rows("LCM", 2, 9, 7, 6), *rows("LCM", 8, 8, 6, 5)))
    drawn = figures(sweep)
    assert set(drawn) == {"steps", "guidance", "seconds"}
    assert all(picture.size[0] == 430 for picture in drawn.values())
    assert figures(Report("t", COLUMNS, (Row("real", None, {"fid/x": 1.0}),))) == {}


def test_a_figure_needs_lines() -> None:
    with pytest.raises(RequestError, match="needs a panel, and each panel a line"):
        figure({}, "steps")
