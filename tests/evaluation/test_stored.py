from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from fewstep.errors import CheckpointError, RequestError
from fewstep.evaluation.moments import Moments, frechet_distance
from fewstep.evaluation.stored import compare_stored

INCEPTION = {"extractor": "Inception"}


def store(folder: Path, name: str, features: np.ndarray, extractor: dict[str, str]) -> None:
    folder.mkdir(exist_ok=True)
    save_file({"features": features}, folder / f"{name}.safetensors", metadata=extractor)


def test_each_file_has_a_row_under_its_extractors_name(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    real, near, far = (random.normal(shift, 1, (60, 8)) for shift in (0.0, 0.1, 2.0))
    for name, features in (("reference", real), ("far", far), ("near", near.astype("f4"))):
        store(tmp_path, name, features, INCEPTION)
    report = compare_stored(tmp_path, subset=20)
    assert [column.label for column in report.columns] == ["FID-Inception", "KID-Inception x1000"]
    assert [row.method for row in report.rows] == ["far (60)", "near (60)"]
    far_row, near_row = (row.scores for row in report.rows)
    expected = frechet_distance(Moments.of(real), Moments.of(far))
    assert far_row["fid/extractor"] == pytest.approx(expected)
    assert far_row["kid/extractor"] > 10 * abs(near_row["kid/extractor"])
    assert report.settings["extractor"] == "Inception"
    assert "FID-Inception" in report.markdown()


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    features = np.zeros((8, 4))
    with pytest.raises(RequestError, match=r"needs reference\.safetensors and a file beside it"):
        compare_stored(tmp_path)
    store(tmp_path, "reference", features, INCEPTION)
    store(tmp_path, "mine", features, {"extractor": "other"})
    with pytest.raises(RequestError, match="4 numbers by other, the reference's 4 by Inception"):
        compare_stored(tmp_path)
    store(tmp_path, "mine", features[:3], INCEPTION)
    with pytest.raises(RequestError, match="KID needs 4 pictures in each set, got 3"):
        compare_stored(tmp_path)
    store(tmp_path, "mine", np.full((8, 4), np.nan), INCEPTION)
    with pytest.raises(CheckpointError, match="must be finite floats"):
        compare_stored(tmp_path)
    (tmp_path / "mine.safetensors").write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="no tensor named 'features'"):
        compare_stored(tmp_path)
