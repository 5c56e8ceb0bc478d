"""Calibration: what the inputs of the layers look like, gathered while the model samples, without keeping
activations."""

from .collect import calibrate
from .file import Calibration, CalibrationError, save
from .plan import plan_passes

__all__ = ["Calibration", "CalibrationError", "calibrate", "plan_passes", "save"]
