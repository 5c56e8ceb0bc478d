"""A FLUX of random weights, small enough to train in seconds: a two-stream block and two one-stream blocks of
128 channels."""

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from comfyui_nibble.quant_core.calibration import Calibration, calibrate
from comfyui_nibble.quant_core.calibration.plan import inputs_of
from comfyui_nibble.quant_core.diffusers_host import model as diffusers_model
from comfyui_nibble.quant_core.diffusers_host.trainer import trainer_of
from comfyui_nibble.quant_core.families import FLUX, Layer
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.run.stages import finished, quantize_blocks
from comfyui_nibble.quant_core.run.unfinished import Unfinished
from comfyui_nibble.quant_core.store.workers import HERE
from comfyui_nibble.quant_core.training.presets import UNTRAINED
from comfyui_nibble.tests.support import single_thread

SAMPLES, TIMES, SIDE = 3, (1.0, 0.7, 0.3), 4  # the last sample is held out


def inputs(sample, t):
    g = torch.Generator().manual_seed(sample)
    text, pooled = torch.randn(1, 4, 64, generator=g), torch.randn(1, 64, generator=g)
    ids = torch.zeros(SIDE, SIDE, 3)
    ids[..., 1] += torch.arange(SIDE)[:, None]
    ids[..., 2] += torch.arange(SIDE)
    x = torch.randn(1, SIDE * SIDE, 64, generator=torch.Generator().manual_seed(100 + sample)) * (0.5 + t)
    return {
        "hidden_states": x, "encoder_hidden_states": text, "pooled_projections": pooled,
        "timestep": torch.tensor([t]),
        "img_ids": ids.reshape(-1, 3), "txt_ids": torch.zeros(4, 3), "return_dict": False,
    }  # fmt: skip


@dataclass
class Small:
    folder: Path
    plan: list[Layer]
    checkpoint: Checkpoint
    calibration: Calibration

    def trainer(self, folder, check=lambda: None, preset=UNTRAINED):
        made = trainer_of(
            diffusers_model.full(self.folder), FLUX, self.plan, self.calibration, "cpu", Path(folder), preset
        )
        made.check = check
        return made

    def quantize(
        self,
        folder,
        preset,
        name="splitquant_4",
        check=lambda: None,
        progress=lambda items: list(items),
        workers=HERE,
        **options,
    ):
        """({layer: quantized}, rows, trainer)."""
        method = by_name(name)
        store = Unfinished(Path(folder), "flux", {"preset": repr(preset)})
        trainer = self.trainer(store.folder, check, preset)
        config = method.configured(**options)
        work = quantize_blocks(
            self.plan, self.checkpoint, method, config, self.calibration, "cpu", store, preset, trainer,
            workers,
        )  # fmt: skip
        progress(work)
        return *finished(self.plan, preset, store), trainer


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    sizes = {"num_layers": 1, "num_single_layers": 2, "attention_head_dim": 128, "num_attention_heads": 1}
    model = (
        FluxTransformer2DModel(in_channels=64, joint_attention_dim=64, pooled_projection_dim=64, **sizes)
        .eval()
        .requires_grad_(False)
    )
    root = tmp_path_factory.mktemp("small")
    model.save_pretrained(root / "transformer")
    checkpoint = Checkpoint(root / "transformer")
    plan = FLUX.layers(checkpoint.shapes)
    names = diffusers_model.modules_of(FLUX, plan, model)
    needed = inputs_of(plan)
    modules = {i.name: model.get_submodule(names[i.name][0]) for i in needed}

    def run(sample, capture):
        with capture.watched(model, lambda args, kwargs: float(kwargs["timestep"][0])):
            for t in TIMES:
                model(**inputs(sample, t))

    calibration = calibrate(
        run, modules, needed, root / "c", {"model": checkpoint.fingerprint()}, samples=SAMPLES, memory=2**30,
        reservoir=256
    )  # fmt: skip
    return Small(root / "transformer", plan, checkpoint, calibration)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Layers this small take longer to share out than to compute."""
    with single_thread():
        yield
