"""Types of sockets that several nodes share."""

from comfy_api.latest import io

CalibrationType = io.Custom("NIBBLE_CALIBRATION")
