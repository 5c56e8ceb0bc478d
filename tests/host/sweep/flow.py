"""The sweep's steps, through the pack's own nodes: calibrate, quantize, forward, save, load, LoRA."""

import builtins
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from unittest.mock import patch

import pytest
import torch

from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.host.sweep.tiny import make
from comfyui_nibble.tests.support import relative_error

RANK = 16
SAMPLES, STEPS = 2, 2
LORA_RANK = 8
SMOOTH = ((0.5, 0.5),)


@dataclass
class Result:
    """What a class gave. layers: how many were quantized, kept: of the plan in 16 bit; effect: of the LoRA on
    full precision."""

    family: str
    layers: int
    kept: int
    error: float
    effect: float
    cosine: float

    def __str__(self):
        return (
            f"{self.family} | {self.layers} + {self.kept} | {self.error:.3f} | {self.effect:.2f} | "
            f"{self.cosine:.3f}"
        )


def sweep(entry) -> Result:
    """Takes a tiny instance of the entry's class through the pack's nodes. Raises AssertionError where a step
    gives something else."""
    import comfy.model_management

    try:
        with _short_search(), replaced(entry.replace):
            return _sweep(entry)
    finally:
        comfy.model_management.unload_all_models()


def _sweep(entry):
    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.nodes.host.build import ATTACHMENT, load
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    source = make(entry)
    with Inputs(source.model.diffusion_model) as inputs:
        calibration = calibrate(entry, source)
    made = NibbleQuantize.execute(source, "svdquant_r", RANK, False, calibration).args[0]
    same_model(made.model, source.model)
    full, packed = inputs.run(source), inputs.run(made)
    path = NibbleSaveModel.execute(made, f"diffusion_models/{entry.name}").args[0]
    loaded = load(path)
    same_model(loaded.model, source.model)
    stock_refuses(path)
    assert torch.equal(inputs.run(loaded), packed), (
        "the saved file gives another output than the model that it was saved from"
    )
    rows = made.attachments[ATTACHMENT]["report"]
    assert {r["name"] for r in rows if r["nbytes"]} == {
        n.removeprefix("diffusion_model.") for n, _ in loaded.packed_layers()
    }
    lora = lora_of([r for r in rows if r["nbytes"]], entry.rand())
    full_effect, effect = (
        inputs.run(with_lora(model, lora)) - plain for model, plain in ((source, full), (loaded, packed))
    )
    return Result(
        family=made.attachments[ATTACHMENT]["family"],
        layers=sum(r["nbytes"] > 0 for r in rows),
        kept=sum(not r["nbytes"] for r in rows),
        error=relative_error(full, packed),
        effect=float(full_effect.norm() / full.norm()),
        cosine=float(torch.nn.functional.cosine_similarity(full_effect, effect, dim=0)),
    )


def calibrate(entry, source):
    """Nibble Calibrate on random conditioning, within inference mode, as ComfyUI runs nodes."""
    import comfy.nested_tensor

    from comfyui_nibble.nodes.calibrate import NibbleCalibrate

    rand = entry.rand()
    text = None if entry.text is None else rand(1, *entry.text)
    conds = [[text, entry.conds(rand)]]
    nested = isinstance(entry.latent[0], tuple)
    latent = (
        comfy.nested_tensor.NestedTensor([torch.zeros(s) for s in entry.latent])
        if nested
        else torch.zeros(entry.latent)
    )
    with torch.inference_mode():
        return NibbleCalibrate.execute(
            source,
            {"positive0": conds},
            {"samples": latent},
            "euler",
            "simple",
            STEPS,
            1.0,
            0,
            SAMPLES,
            1.0,
            True,
        ).args[0]


def stock_refuses(path):
    """ComfyUI's own loader must not take the file for a model of its own, and must say which node does."""
    import comfy.sd

    with pytest.raises(Exception, match="Nibble Load Diffusion Model"):
        comfy.sd.load_diffusion_model(path)


def same_model(model, source):
    """The BaseModel is of the source's kind in all that decides how it is sampled."""
    assert type(model) is type(source), f"{type(model).__name__} instead of {type(source).__name__}"
    assert type(model.model_config) is type(source.model_config)
    assert model.model_type == source.model_type
    assert type(model.latent_format) is type(source.latent_format)
    assert [c.__name__ for c in type(model.model_sampling).__mro__] == [
        c.__name__ for c in type(source.model_sampling).__mro__
    ]
    assert model.model_config.sampling_settings == source.model_config.sampling_settings


def lora_of(rows, rand) -> dict:
    """A LoRA file's tensors for every quantized layer of the last block: there both models read the same
    input but for what the blocks before have cost, so that the effect of the LoRA is compared and not codes
    that it flips in later blocks."""
    rows = [r for r in rows if r["block"] == rows[-1]["block"]]
    out = {}
    for r in rows:
        name = f"diffusion_model.{r['name']}"
        out[f"{name}.lora_A.weight"] = rand(LORA_RANK, r["in_features"]) / r["in_features"] ** 0.5
        out[f"{name}.lora_B.weight"] = rand(r["out_features"], LORA_RANK) / LORA_RANK**0.5
    return out


def with_lora(patcher, tensors):
    """The model as ComfyUI's LoRA loader gives it."""
    import comfy.sd

    return comfy.sd.load_lora_for_models(patcher, None, tensors, 1.0, 0.0)[0]


@contextmanager
def _short_search():
    """svdquant_r with two smoothings and the plain low rank: a class takes seconds, and what is tested is the
    way, not the fit."""
    method = METHODS["svdquant_r"]
    config = replace(
        method.config,
        smooth=SMOOTH,
        smooth_statistics=("absmax",),
        low_rank=("plain",),
        iterations=0,
        finalists=1,
    )
    with patch.dict(METHODS, {"svdquant_r": replace(method, config=config)}):
        yield


@contextmanager
def replaced(replacements):
    """Other objects under names such as "comfy.ldm.ace.model.LyricEncoder" or, within a class,
    "...model_animate:Generator.get_motion"."""
    with ExitStack() as stack:
        for name, make in replacements.items():
            where, _, attribute = name.rpartition(".")
            module, _, owner = where.partition(":")
            target = getattr(import_module(module), owner) if owner else import_module(module)
            former = getattr(target, attribute, None) or getattr(builtins, attribute)
            stack.enter_context(patch.object(target, attribute, make(former), create=True))
        yield


class Inputs:
    """What a network was called with last, to call another one with the same."""

    def __init__(self, network):
        self.call = None
        self._handle = network.register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, module, args, kwargs):
        self.call = _copied((args, kwargs))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._handle.remove()

    def run(self, patcher) -> torch.Tensor:
        """The output of the patcher's network, loaded as before a sampling run; several outputs in one."""
        import comfy.model_management

        comfy.model_management.load_models_gpu([patcher])
        args, kwargs = _copied(self.call)
        network = patcher.model.diffusion_model
        if hasattr(
            network, "clear_kv_cache"
        ):  # HiDream-O1 keeps keys and values of its prompt from call to call
            network.clear_kv_cache()
        with torch.no_grad():
            out = network(*args, **kwargs)
        streams = [out] if torch.is_tensor(out) else [t for t in out if torch.is_tensor(t)]
        return torch.cat([t.detach().float().flatten() for t in streams])


def _copied(value):
    if torch.is_tensor(value):
        with torch.inference_mode(False):
            return torch.empty(value.shape, dtype=value.dtype).copy_(value)
    if isinstance(value, dict):
        return {k: _copied(v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copied(v) for v in value)
    return value
