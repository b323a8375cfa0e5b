"""How good are the pictures? Metrics on plain arrays, and the emoji benchmark that joins them.

pictures, checks     no network: background colour, number of objects
features             frozen ImageNet networks -> kid (distance of two sets), probe (concept recall)
text_features        frozen sentence embeddings -> open_prompt (retrieval by a ridge map)
report, sheet        what is shown: tables and contact sheets
emoji                the benchmark of emoji generators, with the judges of emoji_judges

The networks' packages and their one-time export are described in `features`.
"""

from fewstep.evaluation.checks import background_names, hue_names, object_counts
from fewstep.evaluation.features import FEATURE_NETS, FeatureNet, load_feature_net
from fewstep.evaluation.kid import Kid, kid
from fewstep.evaluation.open_prompt import RidgeMap, retrieval
from fewstep.evaluation.probe import LinearProbe
from fewstep.evaluation.report import Column, Report, Row
from fewstep.evaluation.sheet import contact_sheet
from fewstep.evaluation.text_features import TextEncoder

__all__ = [
    "FEATURE_NETS",
    "Column",
    "FeatureNet",
    "Kid",
    "LinearProbe",
    "Report",
    "RidgeMap",
    "Row",
    "TextEncoder",
    "background_names",
    "contact_sheet",
    "hue_names",
    "kid",
    "load_feature_net",
    "object_counts",
    "retrieval",
]
