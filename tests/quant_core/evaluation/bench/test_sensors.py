"""Clocks, power and temperature are those of the card that is timed, by a made-up NVML."""

import sys
import time
from types import SimpleNamespace

import pytest
import torch

from comfyui_nibble.quant_core.evaluation.bench import sensors
from comfyui_nibble.quant_core.evaluation.bench.sensors import Sensors

CUDA = torch.device("cuda", 0)


class NVML(SimpleNamespace):
    """Two cards, the second of which PyTorch sees as its first one."""

    class NVMLError(Exception):
        pass

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = "sm", "memory", "gpu"
    by_uuid = {"GPU-aa": "first", "GPU-bb": "second"}
    by_place = {"00000000:01:00.0": "first", "00000000:C1:00.0": "second"}
    watts = [100_000]

    def __init__(self):
        super().__init__(begun=0)

    def nvmlInit(self):
        self.begun += 1

    def found(self, table, key):
        if key not in table:
            raise self.NVMLError(f"no {key}")
        return table[key]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        return self.found(self.by_uuid, uuid)

    def nvmlDeviceGetHandleByPciBusId(self, place):
        return self.found(self.by_place, place)

    def nvmlSystemGetDriverVersion(self):
        return b"580.1"

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return {"first": 300_000, "second": 700_000}[handle]

    def nvmlDeviceGetMaxClockInfo(self, handle, clock):
        return {"sm": 1980, "memory": 2619}[clock]

    def nvmlDeviceGetClockInfo(self, handle, clock):
        return {"sm": 1500, "memory": 2619}[clock]

    def nvmlDeviceGetPowerUsage(self, handle):
        assert handle == "second"
        return self.watts.pop(0) if len(self.watts) > 1 else self.watts[0]

    def nvmlDeviceGetTemperature(self, handle, place):
        raise self.NVMLError("Not Supported")

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return 4


@pytest.fixture
def nvml(monkeypatch):
    """The made-up library, and the properties that PyTorch gives for its only device."""
    made = NVML()
    made.properties = SimpleNamespace(uuid="bb", pci_domain_id=0, pci_bus_id=0xC1, pci_device_id=0)
    monkeypatch.setitem(sys.modules, "pynvml", made)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: made.properties)
    monkeypatch.setattr(torch.version, "hip", None)
    return made


def test_the_card_is_found_by_its_uuid_or_its_place(nvml):
    assert Sensors(CUDA).handle == "second"
    nvml.properties.uuid = "a part of a card"
    assert Sensors(CUDA).handle == "second"
    del nvml.properties.uuid
    assert Sensors(CUDA).handle == "second"
    nvml.properties.pci_bus_id = 7
    assert Sensors(CUDA).reason == "NVML: no 00000000:07:00.0"


def test_facts_and_readings(nvml, monkeypatch):
    monkeypatch.setattr(sensors, "EVERY_S", 0.001)
    nvml.watts = [90_000, 500_000, 400_000, 300_000]
    made = Sensors(CUDA)
    assert made.facts() == {
        "driver": "580.1",
        "power_limit_w": 700.0,
        "top_sm_mhz": 1980,
        "top_memory_mhz": 2619,
    }
    with made.reading() as found:
        deadline = time.monotonic() + 10
        while len(nvml.watts) > 1 and time.monotonic() < deadline:
            time.sleep(0.001)
    assert found["readings"] >= 3
    assert (found["power_w"][0], found["power_w"][2]) == (90.0, 500.0)
    assert found["sm_mhz"] == [1500, 1500, 1500]
    assert found["celsius"] == "not known: Not Supported"
    assert found["slowed"] == 4


def test_without_the_library_or_a_card_the_fields_say_so(nvml, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    made = Sensors(CUDA)
    assert made.facts() == {"driver": "", "reason": sensors.MISSING}
    with made.reading() as found:
        pass
    assert found == {"reason": sensors.MISSING}
    assert Sensors(torch.device("cpu")).reason == "no card"
    monkeypatch.setattr(torch.version, "hip", "7")
    assert Sensors(CUDA).reason == "NVML knows no cards of AMD"
