"""Decoding and encoding in stripes: the whole network's result, in a fraction of its memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import LCM_VAE, VAE
from live_bytes import peak_bytes
from torch import Tensor

from fewstep import AutoencoderKL, AutoencoderTiny, RequestError
from fewstep.models import vae, vae_exact
from fewstep.models.vae_exact import Stripes, moments

BLOCKS = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
SMALL = VAE | {"block_out_channels": (8, 8, 16, 16), "layers_per_block": 2}
FULL = BLOCKS | {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
CONFIGS = {"f8": SMALL, "f4": LCM_VAE, "no attention": SMALL | {"mid_block_add_attention": False}}
TINY: dict[str, Any] = {
    "encoder_block_out_channels": (8, 8, 8, 8),
    "decoder_block_out_channels": (8, 8, 8, 8),
}


def randn(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def network(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    torch.manual_seed(0)
    net = AutoencoderKL(**config)
    for name, parameter in net.named_parameters():
        if "norm" in name:  # so that a group's channels differ in mean and spread
            torch.nn.init.normal_(parameter, mean=0.7, std=0.5)
    return net.to(dtype).eval()


@pytest.fixture
def kl() -> AutoencoderKL:
    return network(SMALL)


@pytest.fixture
def stripes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The calls that went in stripes, by name."""
    calls: list[str] = []

    def spied(name: str) -> Any:
        real = getattr(vae_exact, name)
        return lambda *args: calls.append(name) or real(*args)

    for name in ("decode", "encode"):
        monkeypatch.setattr(vae_exact, name, spied(name))
    yield calls


# ── the result ──


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 6, 16, None])
@pytest.mark.parametrize(("batch", "height", "width"), [(1, 1, 1), (2, 13, 11), (1, 8, 3)])
@pytest.mark.parametrize("config", CONFIGS)
def test_stripes_decode_as_the_whole_does(
    config: str, batch: int, height: int, width: int, size: int | None
) -> None:
    net = network(CONFIGS[config])
    z = randn(batch, net.config.latent_channels, height, width)
    kept = z.clone()
    picture = vae_exact.decode(net.decoder, z, size)
    torch.testing.assert_close(picture, net.decoder(z), rtol=0, atol=1e-5)
    assert torch.equal(z, kept)


@torch.no_grad()
@pytest.mark.parametrize("size", [2, 6, 16, None])
@pytest.mark.parametrize(("batch", "height", "width"), [(2, 32, 40), (1, 45, 51), (1, 8, 9)])
@pytest.mark.parametrize("config", CONFIGS)
def test_stripes_encode_as_the_whole_does(
    config: str, batch: int, height: int, width: int, size: int | None
) -> None:
    net = network(CONFIGS[config])
    pictures = randn(batch, 3, height, width)
    kept = pictures.clone()
    features = vae_exact.encode(net.encoder, pictures, size)
    torch.testing.assert_close(features, net.encoder(pictures), rtol=0, atol=1e-5)
    assert torch.equal(pictures, kept)


@torch.no_grad()
def test_nothing_but_rounding_is_between_them() -> None:
    net = network(SMALL, torch.float64)
    z, x = randn(1, 4, 9, 7, dtype=torch.float64), randn(1, 3, 72, 56, dtype=torch.float64)
    for got, whole in (
        (vae_exact.decode(net.decoder, z, 6), net.decoder(z)),
        (vae_exact.encode(net.encoder, x, 6), net.encoder(x)),
    ):
        torch.testing.assert_close(got, whole, rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_strays_no_further_than_the_whole(dtype: torch.dtype) -> None:
    z = randn(1, 4, 16, 12)
    true = network(SMALL).decoder(z)
    half = network(SMALL, dtype).decoder
    whole, exact = half(z.to(dtype)), vae_exact.decode(half, z.to(dtype), 16)
    assert exact.dtype == dtype
    error = (exact.float() - true).abs()
    assert error.mean() < 1.5 * (whole.float() - true).abs().mean()
    assert error.max() < 2 * (whole.float() - true).abs().max()


@torch.no_grad()
def test_memory_format_does_not_matter(kl: AutoencoderKL) -> None:
    z = randn(1, 4, 9, 7)
    whole = kl.decoder(z)
    last = kl.decoder.to(memory_format=torch.channels_last)
    picture = vae_exact.decode(last, z.contiguous(memory_format=torch.channels_last), 6)
    torch.testing.assert_close(picture, whole, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.full_size
def test_a_full_size_decoder_is_the_same_in_stripes() -> None:
    decoder = network(FULL).decoder
    z = randn(1, 4, 11, 7)
    torch.testing.assert_close(vae_exact.decode(decoder, z, 16), decoder(z), rtol=0, atol=1e-4)


# ── its parts ──


def test_moments_of_stripes_are_those_of_the_map() -> None:
    x = (5 + 3 * randn(1, 12, 23, 9) * torch.arange(1, 13)[:, None, None]).double()
    x[:, :, :4] += 40  # stripes that differ
    mean, variance = moments(x.float().split([4, 1, 11, 7], dim=2), groups=3)
    groups = x.reshape(3, -1)
    expected = (groups.mean(1), groups.var(1, correction=0))
    for got, want in zip((mean, variance), expected, strict=True):
        torch.testing.assert_close(got.double(), want.repeat_interleave(4), rtol=1e-6, atol=0)


def test_rows_that_were_read_are_let_go() -> None:
    x = randn(1, 2, 10, 3)
    stripes = Stripes(part.clone() for part in x.split(4, dim=2))
    assert torch.equal(stripes.rows(3, 9), x[:, :, 3:9])
    stripes.drop(7)
    assert [len(part[0, 0]) for part in stripes.parts] == [4, 2]
    assert torch.equal(stripes.rows(5, 10), x[:, :, 5:])
    assert stripes.height == 10


def test_a_stripe_does_not_hold_what_it_was_cut_from() -> None:
    x = randn(1, 2, 10, 3)
    (part,) = Stripes([x[:, :, 2:4]]).parts
    assert part.untyped_storage().nbytes() == 2 * 2 * 3 * 4


# ── its memory ──


@pytest.mark.parametrize("way", ["decode", "encode"])
def test_stripes_hold_little_more_than_the_largest_map(way: str) -> None:
    with torch.device("meta"):
        # Attention over 128 x 128 tokens is whole either way, and counted as if scores were stored.
        net = AutoencoderKL(**FULL, mid_block_add_attention=False)
        z, x = torch.empty(1, 4, 128, 128), torch.empty(1, 3, 1024, 1024)

    def call() -> Any:
        return net.decode(z) if way == "decode" else net.encode(x)

    whole = peak_bytes(call)
    net.enable_tiling()
    largest = 256 * 1024 * 1024 * 4  # the last level's input, or two maps of its resnets
    assert peak_bytes(call) < min(1.1 * largest, 0.5 * whole)


def test_pictures_of_a_batch_do_not_add_up() -> None:
    with torch.device("meta"):
        net = AutoencoderKL(**FULL, mid_block_add_attention=False)
        one, four = torch.empty(1, 4, 32, 32), torch.empty(4, 4, 32, 32)
    net.enable_tiling()
    pictures = 4 * 3 * 256 * 256 * 4
    bound = peak_bytes(lambda: net.decode(one)) + 2 * pictures
    assert peak_bytes(lambda: net.decode(four)) < bound


# ── when it is taken ──


@torch.no_grad()
def test_tiling_is_exact_unless_blending_is_asked_for(
    kl: AutoencoderKL, stripes: list[str]
) -> None:
    z, x = randn(2, 4, 12, 9), randn(2, 3, 96, 72)
    picture, latents = kl.decode(z).sample, kl.encode(x).latent_dist.mean
    assert stripes == []
    kl.enable_tiling()
    assert (kl.decode(z).sample - picture).abs().max() < 1e-5
    assert (kl.encode(x).latent_dist.mean - latents).abs().max() < 1e-5
    assert stripes == ["decode", "encode"]
    kl.enable_tiling(exact=False)
    assert (kl.decode(z).sample - picture).abs().max() > 1e-2
    assert (kl.encode(x).latent_dist.mean - latents).abs().max() > 1e-2
    kl.disable_tiling()
    assert torch.equal(kl.decode(z).sample, picture)
    assert stripes == ["decode", "encode"]


@torch.no_grad()
def test_large_pictures_go_in_stripes_by_themselves(
    kl: AutoencoderKL, stripes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vae, "LARGE", 64 * 72)
    kl.encode(randn(3, 3, 64, 72))  # a batch is as large as one of its pictures
    kl.decode(randn(1, 4, 8, 9))
    assert stripes == []
    kl.encode(randn(1, 3, 64, 73))
    kl.decode(randn(1, 4, 9, 9))
    assert stripes == ["encode", "decode"]
    kl.enable_tiling(tile_size=64, exact=False)
    kl.decode(randn(1, 4, 9, 9))
    assert stripes == ["encode", "decode"]


@torch.no_grad()
def test_slices_go_in_stripes_too(kl: AutoencoderKL, stripes: list[str]) -> None:
    z = randn(3, 4, 6, 5)
    picture = kl.decode(z).sample
    kl.enable_slicing()
    kl.enable_tiling()
    torch.testing.assert_close(kl.decode(z).sample, picture, rtol=0, atol=1e-5)
    assert stripes == ["decode"] * 3


def test_gradients_take_the_whole_way(kl: AutoencoderKL, stripes: list[str]) -> None:
    kl.enable_tiling()
    z = randn(1, 4, 4, 4)
    kl.decode(z).sample.sum().backward()
    assert kl.decoder.conv_in.weight.grad is not None
    kl.requires_grad_(False)
    wanted = z.clone().requires_grad_()
    kl.decode(wanted).sample.sum().backward()
    assert wanted.grad is not None
    assert stripes == []
    kl.decode(z)
    assert stripes == ["decode"]


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("tile_size", [0, -32, 33])
def test_sizes_that_are_no_tiles_are_refused(
    kl: AutoencoderKL, tile_size: int, exact: bool
) -> None:
    with pytest.raises(RequestError, match=f"multiple of 32, got {tile_size}"):
        kl.enable_tiling(tile_size=tile_size, exact=exact)
    assert not kl.use_tiling


@torch.no_grad()
def test_a_given_size_is_that_of_the_stripes(kl: AutoencoderKL) -> None:
    heights: list[int] = []
    kl.decoder.conv_out.register_forward_pre_hook(lambda _, args: heights.append(args[0].shape[2]))
    kl.enable_tiling(tile_size=32)
    kl.decode(randn(1, 4, 12, 5))
    assert heights == [33, 34, 33]
    heights.clear()
    kl.enable_tiling()
    kl.decode(randn(1, 4, 12, 5))
    assert heights == [96]


# ── the tiny autoencoder, which has no norms ──


@pytest.fixture
def tiny() -> AutoencoderTiny:
    torch.manual_seed(0)
    return AutoencoderTiny(**TINY).eval()


@torch.no_grad()
@pytest.mark.parametrize(("height", "width"), [(13, 5), (16, 16)])
def test_the_tiny_autoencoder_has_no_seams_either(
    tiny: AutoencoderTiny, height: int, width: int
) -> None:
    z, x = randn(2, 4, height, width), randn(2, 3, 8 * height + 5, 8 * width)
    picture, latents = tiny.decode(z).sample, tiny.encode(x).latents
    tiny.enable_tiling(tile_size=32)
    torch.testing.assert_close(tiny.decode(z).sample, picture, rtol=0, atol=1e-6)
    torch.testing.assert_close(tiny.encode(x).latents, latents, rtol=0, atol=1e-6)
    tiny.enable_tiling(tile_size=32, exact=False)
    assert (tiny.decode(z).sample - picture).abs().max() > 1e-4


def test_the_tiny_autoencoder_goes_in_half_the_memory() -> None:
    with torch.device("meta"):
        net, z = AutoencoderTiny(), torch.empty(1, 4, 128, 128)
    whole = peak_bytes(lambda: net.decode(z))
    net.enable_tiling()
    assert peak_bytes(lambda: net.decode(z)) < 0.5 * whole
