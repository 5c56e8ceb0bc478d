"""Clocks, power, temperature and driver of the card while it is timed, by NVML (the package nvidia-ml-py).

The card is found by the UUID that PyTorch gives for its device, or by its place on the bus: an index would be
that of another card where CUDA_VISIBLE_DEVICES chooses.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

EVERY_S = 0.05
MISSING = "nvidia-ml-py is not installed: pip install 'nibble-quant[bench]'"


class Sensors:
    """Of a torch device. `reason`: why nothing can be read, "" where it can."""

    def __init__(self, device: torch.device):
        self.reason, self.nvml, self.handle = "", None, None
        if device.type != "cuda":
            self.reason = "no card"
        elif torch.version.hip:
            self.reason = "NVML knows no cards of AMD"
        else:
            self._open(torch.cuda.get_device_properties(device))

    def _open(self, properties):
        try:
            import pynvml
        except ImportError:
            self.reason = MISSING
            return
        try:
            pynvml.nvmlInit()
            self.nvml, self.handle = pynvml, handle_of(pynvml, properties)
        except pynvml.NVMLError as error:
            self.reason = f"NVML: {error}"

    def facts(self) -> dict[str, Any]:
        """The driver's version, the power limit in W and the highest clocks in MHz; "reason" for what is not
        known."""
        if self.nvml is None:
            return {"driver": "", "reason": self.reason}
        n, h = self.nvml, self.handle
        return {
            "driver": _asked(n.nvmlSystemGetDriverVersion),
            "power_limit_w": _asked(lambda: n.nvmlDeviceGetEnforcedPowerLimit(h) / 1000),
            "top_sm_mhz": _asked(lambda: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_SM)),
            "top_memory_mhz": _asked(lambda: n.nvmlDeviceGetMaxClockInfo(h, n.NVML_CLOCK_MEM)),
        }

    def read(self) -> dict[str, Any]:
        """As it is now: MHz, W, degrees Celsius, and the bits of NVML's reasons for lower clocks."""
        n, h = self.nvml, self.handle
        assert n is not None
        return {
            "sm_mhz": _asked(lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_SM)),
            "memory_mhz": _asked(lambda: n.nvmlDeviceGetClockInfo(h, n.NVML_CLOCK_MEM)),
            "power_w": _asked(lambda: n.nvmlDeviceGetPowerUsage(h) / 1000),
            "celsius": _asked(lambda: n.nvmlDeviceGetTemperature(h, n.NVML_TEMPERATURE_GPU)),
            "slowed": _asked(lambda: n.nvmlDeviceGetCurrentClocksThrottleReasons(h)),
        }

    @contextmanager
    def reading(self) -> Iterator[dict[str, Any]]:
        """A dict that is filled when the block ends: of each field the least, the median and the largest
        value while it ran, of `slowed` all bits that were set; or the reason."""
        found: dict[str, Any] = {}
        if self.nvml is None:
            found["reason"] = self.reason
            yield found
            return
        readings, over = [self.read()], threading.Event()

        def watch():
            while not over.wait(EVERY_S):
                readings.append(self.read())

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield found
        finally:
            over.set()
            thread.join()
            found |= summed_up(readings)


def handle_of(nvml, properties):
    """NVML's handle of the card of these `torch.cuda.get_device_properties`."""
    uuid = getattr(properties, "uuid", None)
    if uuid is not None:
        try:
            return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except nvml.NVMLError:  # a part of a card has a UUID of its own; its sensors are the card's
            pass
    domain, bus, number = (getattr(properties, f"pci_{name}_id") for name in ("domain", "bus", "device"))
    return nvml.nvmlDeviceGetHandleByPciBusId(f"{domain:08X}:{bus:02X}:{number:02X}.0")


def summed_up(readings: list[dict[str, Any]]) -> dict[str, Any]:
    """{field: [least, median, largest]} of numbers; of texts, the first; of `slowed`, all bits."""
    out: dict[str, Any] = {"readings": len(readings)}
    for name in readings[0]:
        numbers = sorted(r[name] for r in readings if not isinstance(r[name], str))
        if not numbers:
            out[name] = readings[0][name]
        elif name == "slowed":
            out[name] = 0
            for bits in numbers:
                out[name] |= bits
        else:
            out[name] = [numbers[0], numbers[len(numbers) // 2], numbers[-1]]
    return out


def _asked(call):
    """What NVML answers, or its refusal in words: cards and drivers lack one thing or the other."""
    try:
        found = call()
    except Exception as error:
        return f"not known: {error}"
    return found.decode() if isinstance(found, bytes) else found
