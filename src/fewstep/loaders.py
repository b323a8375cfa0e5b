"""The names that guides know the loading methods of pipelines by."""

from __future__ import annotations

from .pipelines.ip_adapter import IPAdapterLoader
from .pipelines.lora import LoraLoader
from .pipelines.textual_inversion import TextualInversionLoader

IPAdapterMixin = IPAdapterLoader
StableDiffusionLoraLoaderMixin = LoraLoader
StableDiffusionXLLoraLoaderMixin = LoraLoader
TextualInversionLoaderMixin = TextualInversionLoader
UNet2DConditionLoadersMixin = LoraLoader

__all__ = [
    "IPAdapterMixin",
    "StableDiffusionLoraLoaderMixin",
    "StableDiffusionXLLoraLoaderMixin",
    "TextualInversionLoaderMixin",
    "UNet2DConditionLoadersMixin",
]
