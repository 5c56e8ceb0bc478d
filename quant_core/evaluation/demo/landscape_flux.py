"""The small trained FLUX that `nibble demo` shows: landscapes, 128 x 128."""

from . import landscapes
from .model import ASSETS, SmallFlux

MODEL = SmallFlux(landscapes, ASSETS / "landscape_flux.safetensors", random_judged=0, steps=12)
