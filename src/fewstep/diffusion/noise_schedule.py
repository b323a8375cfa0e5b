"""The variance-preserving noise schedule, z_t = alpha_t z_0 + sigma_t eps (Ho et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from ..errors import RequestError, UnsupportedConfig

PredictionType = Literal["epsilon", "v_prediction", "sample"]
BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2"]


def expand(per_row: Tensor, like: Tensor) -> Tensor:
    """`per_row` (B,) shaped so that it multiplies `like` (B, ...) row by row; () as it is."""
    return per_row if per_row.ndim == 0 else per_row.reshape(-1, *[1] * (like.ndim - 1))


def at_rows(t: Tensor, like: Tensor) -> Tensor:
    """Times `t` (B,) where `like` (B, ...) is.

    One time of all rows that the CPU knows stays there, as (): what follows from it are numbers
    then, which a device takes along with its work. Nothing is copied and nothing waits.
    """
    if t.device.type == "cpu" and (t.ndim == 0 or len(t) == 1 or t.stride(0) == 0):
        return t.reshape(-1)[0]
    return t.to(like.device)


def chosen(is_first: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """The rows of `first` where `is_first` (B,) holds, else those of `second`; () is for all."""
    if is_first.ndim == 0:
        return first if is_first else second
    return torch.where(expand(is_first, first), first, second)


def betas_for(
    schedule: BetaSchedule = "scaled_linear",
    num_train_timesteps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
) -> Tensor:
    """The betas (T,) float32 of a named schedule.

    `scaled_linear` is linear in sqrt(beta) (Stable Diffusion); `squaredcos_cap_v2` is the cosine
    schedule of Nichol and Dhariwal (2021, eq. 17) with beta capped at 0.999.
    """
    steps = num_train_timesteps
    match schedule:
        case "linear":
            return torch.linspace(beta_start, beta_end, steps, dtype=torch.float32)
        case "scaled_linear":
            return torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float32) ** 2
        case "squaredcos_cap_v2":
            remaining = [
                math.cos((i / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(steps + 1)
            ]
            pairs = zip(remaining[1:], remaining[:-1], strict=True)
            return torch.tensor([min(1 - b / a, 0.999) for b, a in pairs], dtype=torch.float32)
    raise UnsupportedConfig(
        f"beta_schedule={schedule!r} is not implemented (supported: {get_args(BetaSchedule)})"
    )


def rescale_to_zero_snr(betas: Tensor) -> Tensor:
    """Betas (T,) rescaled to hold no signal at the last step (Lin et al. 2024, Alg. 1)."""
    signal = torch.cumprod(1 - betas, 0).sqrt()
    signal = (signal - signal[-1]) * signal[0] / (signal[0] - signal[-1])
    alphas_cumprod = signal**2
    alphas = torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])
    return 1 - alphas


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """alpha_t and sigma_t at times in [0, T - 1], and what a network's output means there.

    The table stays float32 whatever the dtype of the latents; results have the latents' dtype. At
    times between integers sigma_t / alpha_t is interpolated.
    """

    alphas_cumprod: Tensor  # (T,) float32, alpha_t squared
    prediction_type: PredictionType = "epsilon"
    log_interpolation: bool = False  # interpolate the logarithm of sigma_t / alpha_t
    _tables: dict[torch.device, Tensor] = field(default_factory=dict, init=False, repr=False)
    _numbers: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.prediction_type not in get_args(PredictionType):
            raise UnsupportedConfig(
                f"prediction_type={self.prediction_type!r} is not implemented "
                f"(supported: {get_args(PredictionType)})"
            )
        if self.prediction_type == "epsilon" and self.alphas_cumprod[-1] == 0:
            raise UnsupportedConfig(
                "prediction_type='epsilon' cannot be used with a schedule of zero terminal SNR: "
                "z_0 is not determined by the noise at the last step; use 'v_prediction' or "
                "set rescale_betas_zero_snr=False"
            )

    @classmethod
    def from_betas(
        cls,
        betas: Tensor | Sequence[float],
        prediction_type: PredictionType = "epsilon",
    ) -> NoiseSchedule:
        """The schedule of given betas (T,)."""
        betas = torch.as_tensor(betas, dtype=torch.float32)
        return cls(torch.cumprod(1 - betas, 0), prediction_type)

    def __len__(self) -> int:
        return len(self.alphas_cumprod)

    def to(self, device: torch.device | str) -> NoiseSchedule:
        """The same schedule with its table on `device`."""
        return replace(self, alphas_cumprod=self.alphas_cumprod.to(device))

    def table(self, device: torch.device) -> Tensor:
        """`alphas_cumprod` on a device, copied there once."""
        found = self._tables.get(device)
        if found is None:
            found = self._tables[device] = self.alphas_cumprod.to(device)
        return found

    def alpha_sigma(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for `t` (B,), shaped to multiply `like` and in its dtype.

        A negative time stands behind the last step: alpha 1, sigma 0. Of one time () they are
        numbers () where it is.
        """
        device = t.device if t.ndim == 0 else like.device
        if t.ndim == 0 and device.type == "cpu" and not t.is_floating_point():
            return self.numbers(int(t), like.dtype)
        if t.is_floating_point():
            ratio = torch.where(t < 0, 0.0, self.ratio(t))
            alpha = (1 + ratio**2).rsqrt()
            alpha, sigma = (expand(v, like).to(device, like.dtype) for v in (alpha, ratio * alpha))
            return alpha, sigma
        alpha_squared = self.table(device)[t.clamp(min=0)]
        alpha_squared = torch.where(t < 0, torch.ones_like(alpha_squared), alpha_squared)
        alpha, sigma = alpha_squared.sqrt(), (1 - alpha_squared).sqrt()
        return expand(alpha, like).to(like.dtype), expand(sigma, like).to(like.dtype)

    def numbers(self, t: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t () on the CPU, of one whole time; made once, for they recur."""
        found = self._numbers.get((t, dtype))
        if found is None:
            with torch.inference_mode(False):  # others may need gradients of what they scale
                squared = torch.tensor(1.0) if t < 0 else self.table(torch.device("cpu"))[t]
                found = squared.sqrt().to(dtype), (1 - squared).sqrt().to(dtype)
            self._numbers[t, dtype] = found
        return found

    def ratio(self, t: Tensor) -> Tensor:
        """sigma_t / alpha_t (B,) at times `t` (B,), which may lie between integers."""
        table = self.table(t.device)
        table = ((1 - table) / table).sqrt()
        low = t.long().clamp(0, len(self) - 2)
        if self.log_interpolation:
            table = table.log()
        between = torch.lerp(table[low], table[low + 1], (t - low).to(table.dtype))
        return between.exp() if self.log_interpolation else between

    def add_noise(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t from z_0 and noise of the same shape (B, ...)."""
        alpha, sigma = self.alpha_sigma(t, z0)
        return alpha * z0 + sigma * noise

    def velocity(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """v_t = alpha_t eps - sigma_t z_0 (Salimans and Ho 2022)."""
        alpha, sigma = self.alpha_sigma(t, z0)
        return alpha * noise - sigma * z0

    def to_z0(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The prediction of z_0 that a network's `output` at (z, t) stands for."""
        if self.prediction_type == "sample":
            return output
        alpha, sigma = self.alpha_sigma(t, z)
        if self.prediction_type == "v_prediction":
            return alpha * z - sigma * output
        return (z - sigma * output) / alpha

    def to_noise(self, output: Tensor, z: Tensor, t: Tensor) -> Tensor:
        """The prediction of the noise that a network's `output` at (z, t) stands for."""
        if self.prediction_type == "epsilon":
            return output
        alpha, sigma = self.alpha_sigma(t, z)
        if self.prediction_type == "v_prediction":
            return sigma * z + alpha * output
        return (z - alpha * output) / sigma

    def target(self, z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a network of this prediction type should put out at (z_t, t)."""
        match self.prediction_type:
            case "epsilon":
                return noise
            case "v_prediction":
                return self.velocity(z0, noise, t)
            case "sample":
                return z0

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t² / sigma_t², (B,) float32."""
        alpha_squared = self.table(t.device)[t]
        return alpha_squared / (1 - alpha_squared)

    def check_time(self, t: int, name: str = "timesteps") -> None:
        """Raises RequestError unless 0 <= t < T."""
        if not 0 <= t < len(self):
            raise RequestError(f"{name} must lie in [0, {len(self) - 1}], got {t}")
