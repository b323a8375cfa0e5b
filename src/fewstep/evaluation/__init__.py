"""How good are the pictures? Metrics on plain arrays, and the benchmarks that join them.

pictures, checks     no network: background colour, number of objects
features             frozen ImageNet networks -> moments (FID), kid (distances of two sets), probe
text_features        frozen sentence embeddings -> open_prompt (retrieval by a ridge map)
clip_score           pictures and prompts, by a CLIP model that the user names
methods              what is compared: a model, and its teacher by other samplers
report, sheet, plot  what is shown: tables, contact sheets, lines over steps, guidance and seconds

benchmark            any model against references, judged by judges, shared by ranks
emoji, compare       the benchmark of emoji generators, with the judges of emoji_judges
stored               sets of features that were made elsewhere

The networks' packages and their one-time export are described in `features`.
"""

from fewstep.evaluation.benchmark import PictureBenchmark
from fewstep.evaluation.checks import background_names, hue_names, object_counts
from fewstep.evaluation.clip_score import ClipScore
from fewstep.evaluation.features import FEATURE_NETS, FeatureNet, load_feature_net
from fewstep.evaluation.judges import Judges
from fewstep.evaluation.kid import Kid, kid
from fewstep.evaluation.methods import Method, methods
from fewstep.evaluation.moments import Moments, frechet_distance
from fewstep.evaluation.open_prompt import RidgeMap, retrieval
from fewstep.evaluation.plot import figures
from fewstep.evaluation.probe import LinearProbe
from fewstep.evaluation.ranks import Ranks
from fewstep.evaluation.references import References
from fewstep.evaluation.report import Column, Report, Row
from fewstep.evaluation.sheet import contact_sheet
from fewstep.evaluation.stored import compare_stored
from fewstep.evaluation.text_features import TextEncoder

__all__ = [
    "FEATURE_NETS",
    "ClipScore",
    "Column",
    "FeatureNet",
    "Judges",
    "Kid",
    "LinearProbe",
    "Method",
    "Moments",
    "PictureBenchmark",
    "Ranks",
    "References",
    "Report",
    "RidgeMap",
    "Row",
    "TextEncoder",
    "background_names",
    "compare_stored",
    "contact_sheet",
    "figures",
    "frechet_distance",
    "hue_names",
    "kid",
    "load_feature_net",
    "methods",
    "object_counts",
    "retrieval",
]
