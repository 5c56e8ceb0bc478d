"""The nodes. With `host/`, the only code that imports comfy."""

from comfy_api.latest import ComfyExtension, io

from .allocate import NibbleAllocateBits
from .bake import NibbleBakeLora
from .calibrate import NibbleCalibrate, NibbleCalibrationPrompts
from .compare import NibbleCompare
from .export import NibbleExportModel
from .files import NibbleLoadDiffusionModel, NibbleSaveModel
from .guard import NibbleGuard
from .inspect import NibbleInspect
from .my_card import NibbleQuantizeForMyCard
from .quantize import NibbleQuantize
from .report import NibbleReport
from .swap import NibbleSwapBlocks


class NibbleExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            NibbleQuantizeForMyCard,
            NibbleCalibrate,
            NibbleCalibrationPrompts,
            NibbleQuantize,
            NibbleAllocateBits,
            NibbleGuard,
            NibbleBakeLora,
            NibbleSaveModel,
            NibbleExportModel,
            NibbleLoadDiffusionModel,
            NibbleInspect,
            NibbleSwapBlocks,
            NibbleReport,
            NibbleCompare,
        ]
