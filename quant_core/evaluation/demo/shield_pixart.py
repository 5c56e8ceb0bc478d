"""The small trained PixArt: coats of arms, 68 x 68."""

from . import shields
from .model import ASSETS
from .pixart_model import SmallPixArt

MODEL = SmallPixArt(shields, ASSETS / "shield_pixart.safetensors", random_judged=24)
