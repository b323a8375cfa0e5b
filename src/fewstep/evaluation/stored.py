"""Features that were made elsewhere: FID and KID of files with one feature row a picture.

For extractors that fewstep cannot hold, such as the Inception network of FID: extract features with
the tool of your choice, store them as safetensors, compare them here.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from fewstep.errors import CheckpointError, RequestError
from fewstep.evaluation.fingerprints import settings_key
from fewstep.evaluation.judges import KID_SUBSETS, distance_columns, distances, kid_subset
from fewstep.evaluation.moments import Moments
from fewstep.evaluation.report import Report, Row

REFERENCE = "reference"
_EXTRACTOR = "extractor"


def compare_stored(folder: str | Path, *, subset: int | None = None) -> Report:
    """A row for each `<folder>/NAME.safetensors`, compared with `reference.safetensors` there.

    A file holds a tensor `features` [N, D]; the entry `extractor` of its metadata names what made
    them and must agree in all files that have it. `subset` is KID's.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if folder / f"{REFERENCE}.safetensors" not in files or len(files) < 2:
        raise RequestError(
            f"features {folder}: needs {REFERENCE}.safetensors and a file beside it to compare"
        )
    read = {file.stem: _features(file) for file in files}
    real, made_by = read.pop(REFERENCE)
    for name, (features, extractor) in read.items():
        if features.shape[1] != real.shape[1] or extractor != made_by:
            raise RequestError(
                f"features {name}: are {features.shape[1]} numbers by {extractor}, the reference's "
                f"{real.shape[1]} by {made_by}; extract both alike"
            )
    smallest = min(len(features) for features, _ in read.values())
    size = kid_subset(subset, len(real), smallest)
    moments, rows = Moments.of(real), []
    for name, (drawn, _) in read.items():
        scores = distances(_EXTRACTOR, real, drawn, size, (moments, Moments.of(drawn)))
        rows.append(Row(f"{name} ({len(drawn)})", None, scores))
    settings: dict[str, str | int | float] = {
        "extractor": made_by,
        "reference pictures": len(real),
        "reference features": settings_key(sums=[moments.total.tolist(), moments.count]),
        "KID": f"{KID_SUBSETS} subsets of {size}, ± their standard deviation",
    }
    title = f"Stored features, {folder.resolve().name}"
    return Report(title, distance_columns(_EXTRACTOR, made_by), tuple(rows), settings)


def _features(file: Path) -> tuple[np.ndarray, str]:
    """Features [N, D] and the name of their extractor."""
    try:
        with safe_open(file, framework="numpy") as opened:
            features = np.asarray(opened.get_tensor("features"))
            extractor = (opened.metadata() or {}).get(_EXTRACTOR, "unnamed")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"features {file}: hold no tensor named 'features' that can be read ({error})"
        ) from error
    if features.ndim != 2 or features.dtype.kind != "f" or not np.isfinite(features).all():
        raise CheckpointError(
            f"features {file}: must be finite floats [N, D], got {features.dtype} "
            f"{list(features.shape)}"
        )
    return features, extractor
