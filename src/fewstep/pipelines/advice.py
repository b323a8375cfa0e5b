"""What is said of settings that spoil the picture of an LCM, and what to use instead."""

from __future__ import annotations

from typing import Any

from ..schedulers import LCMScheduler
from .notices import warn_caller
from .request import Request

# Above these an LCM's picture burns, or takes longer and looks no better. The guides paint into
# masks at guidance 4.
MOST_GUIDANCE = 5.0
MOST_STEPS = 16


def advise(pipe: Any, request: Request, steps: int) -> None:
    """Warn of a guidance scale, a number of steps or a scheduler that does not suit an LCM."""
    is_lcm = isinstance(pipe.scheduler, LCMScheduler)
    if is_lcm and not pipe.is_embedded and request.guidance_scale > MOST_GUIDANCE:
        warn_caller(
            f"guidance_scale={request.guidance_scale} burns pictures of an LCM-LoRA, which has its "
            "guidance inside; use 1 to 2"
        )
    if is_lcm and steps > MOST_STEPS:
        warn_caller(f"{steps} steps are more than an LCM needs; use num_inference_steps=4 to 8")
    if not is_lcm and any(is_lcm_lora(lora) for lora in pipe.active_lora_record()):
        warn_caller(
            f"an LCM-LoRA is loaded, but the scheduler is a {type(pipe.scheduler).__name__}, which "
            "leaves noise; set pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)"
        )


def is_lcm_lora(lora: dict[str, Any]) -> bool:
    """Whether the source of an active LoRA is called an LCM-LoRA."""
    return "lcm-lora" in str(lora.get("source") or "").lower()
