"""Nibble Calibrate samples once and runs the blocks again: the statistics of ComfyUI's own models are those
of sampling again for each pass, to the last bit on a CPU."""

from collections import Counter
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

from comfyui_nibble.quant_core.calibration.plan import inputs_of
from comfyui_nibble.quant_core.families import detect
from comfyui_nibble.quant_core.layer.statistics import InputStatistics
from comfyui_nibble.tests.host.sweep.flow import replaced
from comfyui_nibble.tests.host.sweep.registry import ENTRIES
from comfyui_nibble.tests.host.sweep.tiny import make

SAMPLES, STEPS = 4, 2
CHAINS = ["Flux", "Flux2 (Klein 4B)", "Chroma", "QwenImage", "SD3", "PixArtSigma", "WAN21_T2V"]


def memory_of(source):
    """As much as the largest block's statistics take: about a pass a block."""
    shapes = {k: tuple(v.shape) for k, v in source.model.diffusion_model.state_dict().items()}
    sizes = Counter()
    for i in inputs_of(detect(shapes).layers(shapes)):
        sizes[i.block] += InputStatistics.nbytes(i.width, i.blocks)
    return max(sizes.values())


@contextmanager
def counted(network):
    """{block: how often it was computed}, by its first linear layer: a block that something stands for calls
    none."""
    found, handles = {}, []
    blocks = (n for n, _ in network.named_modules() if n.count(".") == 1 and n.rpartition(".")[2].isdigit())
    for name in blocks:
        linear = [m for m in network.get_submodule(name).modules() if isinstance(m, torch.nn.Linear)]
        if linear:
            found[name] = 0

            def before(module, args, _name=name):
                found[_name] += 1

            handles.append(linear[0].register_forward_pre_hook(before))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def calibrate(source, entry, folder, memory, replay, conds=None, cfg=1.0):
    import comfy.nested_tensor  # noqa: F401
    import folder_paths

    from comfyui_nibble.nodes.host import calibrating

    folder_paths.set_output_directory(str(folder))
    rand = entry.rand()
    text = None if entry.text is None else rand(1, *entry.text)
    conds = conds or (lambda c: [c])
    given = conds([text, entry.conds(rand)])
    negative = [[torch.zeros_like(text), entry.conds(rand)]]
    latent = {"samples": torch.zeros(entry.latent)}
    sampling = calibrating.Sampling([[c] for c in given], negative, latent, "euler", "simple", STEPS, cfg, 3)
    chain = calibrating.is_chain if replay else lambda *args: False
    with torch.inference_mode(), patch.object(calibrating, "is_chain", chain):
        return calibrating.calibrate(source, sampling, SAMPLES, memory, True)


def assert_same(a, b):
    assert set(a.names) == set(b.names)
    for name in a.names:
        x, y = a.get(name), b.get(name)
        assert x.count == y.count
        for leaf in ("absmax", "tokens", "keys", "timesteps"):
            assert torch.equal(getattr(x, leaf), getattr(y, leaf)), (name, leaf)
        assert all(torch.equal(x.hessians[k], y.hessians[k]) for k in x.hessians), name


def both(source, entry, tmp_path, caplog, **options):
    """Calibrates each way. Returns the number of passes, the log and how often replay computed each block."""
    memory = memory_of(source)
    caplog.set_level("INFO")
    want = calibrate(source, entry, tmp_path / "want", memory, False, **options)
    caplog.clear()
    with counted(source.model.diffusion_model) as found:
        got = calibrate(source, entry, tmp_path / "got", memory, True, **options)
    assert_same(got, want)
    assert got.hash
    log = "\n".join(r.getMessage() for r in caplog.records)
    assert "cannot be run again" not in log, log
    assert not list((tmp_path / "got").rglob("*.nibble-tmp"))
    return got.meta["passes"], log, found


def entry_of(name):
    return next(e for e in ENTRIES if e.id == name)


@pytest.mark.parametrize("name", CHAINS)
def test_models_of_comfyui(comfy, one_thread, outputs, tmp_path, caplog, name):
    entry = entry_of(name)
    with replaced(entry.replace):
        source = make(entry)
        passes, log, found = both(source, entry, tmp_path, caplog)
    assert passes > 1
    assert "that run blocks again" in log
    # Of the first sampling, and once more; one step is watched before by models with layers beside the map.
    assert found
    assert max(found.values()) <= 2 * SAMPLES * STEPS + 1, found


def test_guidance_loras_and_controls_of_some_calls(comfy, one_thread, outputs, tmp_path, caplog):
    """Two prompts of different lengths, one with a ControlNet, both with a negative; a LoRA on the model."""
    import comfy.controlnet

    class Control(comfy.controlnet.ControlBase):
        calls = 0

        def get_control(self, x, t, cond, batched_number, transformer_options):
            type(self).calls += 1
            tokens = x.shape[2] * x.shape[3] // 4
            add = torch.full((x.shape[0], tokens, width), 0.1 * float(t.flatten()[0]))
            return {"input": [add], "output": [None, add]}

    entry = entry_of("Flux")
    source = make(entry)
    network = source.model.diffusion_model
    width = network.hidden_size
    name = "single_blocks.1.linear1.weight"
    delta = 0.02 * torch.randn(network.get_parameter(name).shape, generator=torch.Generator().manual_seed(5))
    lora = source.clone()
    lora.add_patches({f"diffusion_model.{name}": ("diff", (delta,))})
    longer = lambda c: torch.cat([c[0], c[0][:, :3]], 1)
    conds = lambda c: [c, [longer(c), c[1] | {"control": Control(), "control_apply_to_uncond": False}]]
    passes, log, _ = both(lora, entry, tmp_path, caplog, conds=conds, cfg=2.0)
    assert passes > 1
    assert "that run blocks again" in log
    assert Control.calls
    with torch.inference_mode():
        plain = calibrate(source, entry, tmp_path / "plain", 1 << 30, True, conds=conds, cfg=2.0)
    got = calibrate(lora, entry, tmp_path / "lora", 1 << 30, True, conds=conds, cfg=2.0)
    assert plain.meta["model"] != got.meta["model"]


def test_weights_that_change_while_sampling_keep_passes(comfy, one_thread, outputs, tmp_path, caplog):
    """As those of a LoRA that one conditioning has: its blocks are sampled again."""
    import comfy.hooks

    entry = entry_of("Flux")
    source = make(entry)
    hooks = comfy.hooks.HookGroup()
    conds = lambda c: [c, [c[0], c[1] | {"hooks": hooks}]]
    passes, log, _ = both(source, entry, tmp_path, caplog, conds=conds)
    assert passes > 1
    assert f"Nibble: {passes} passes over the samples, {passes} samplings' worth of work" in log


@pytest.mark.parametrize("name", ["SD15", "ZImage"])
def test_blocks_that_are_no_chain_keep_passes(comfy, one_thread, outputs, tmp_path, caplog, name):
    entry = entry_of(name)
    with replaced(entry.replace):
        passes, log, _ = both(make(entry), entry, tmp_path, caplog)
    assert passes > 1
    assert f"{passes} samplings' worth of work" in log


def test_an_interrupted_replay_goes_on(comfy, one_thread, outputs, tmp_path, caplog):
    """Where ComfyUI's queue stops it, in the second pass."""
    import comfy.model_management

    entry = entry_of("SD3")
    source = make(entry)
    memory = memory_of(source)
    want = calibrate(source, entry, tmp_path / "want", memory, False)

    def stop():
        if list((tmp_path / "got").rglob("pass-001.safetensors")):
            raise comfy.model_management.InterruptProcessingException

    place = "throw_exception_if_processing_interrupted"
    with (
        pytest.raises(comfy.model_management.InterruptProcessingException),
        patch.object(comfy.model_management, place, stop),
    ):
        calibrate(source, entry, tmp_path / "got", memory, True)
    caplog.set_level("INFO")
    got = calibrate(source, entry, tmp_path / "got", memory, True)
    assert_same(got, want)
    assert "goes on; 1 of 3 passes are kept, and of the next 1 samples" in caplog.text
