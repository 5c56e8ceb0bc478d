"""The nodes. With `host/`, the only code that imports comfy."""

from comfy_api.latest import ComfyExtension, io

from .calibrate import NibbleCalibrate, NibbleCalibrationPrompts
from .files import NibbleLoadDiffusionModel, NibbleSaveModel
from .quantize import NibbleQuantize


class NibbleExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [NibbleCalibrate, NibbleCalibrationPrompts, NibbleQuantize, NibbleSaveModel, NibbleLoadDiffusionModel]
