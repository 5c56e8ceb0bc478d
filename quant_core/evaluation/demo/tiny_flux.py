"""The small trained FLUX of the tests: shapes on backgrounds, 64 x 64."""

from . import model, pictures
from .model import ASSETS, SmallFlux

HIDDEN = model.HIDDEN
# With 8 captions alone the figures move by 1 dB from seed to seed.
MODEL = SmallFlux(pictures, ASSETS / "tiny_flux.safetensors", random_judged=16)
CHECKPOINT = MODEL.checkpoint
build, load, sample = MODEL.build, MODEL.load, MODEL.sample
to_diffusers, encode_captions = MODEL.to_diffusers, MODEL.encode_captions
from_diffusers, predict = MODEL.from_diffusers, model.predict
