"""A run that the user stops leaves nothing behind: the next one gives the latents of an undisturbed run."""

import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.assets.synthetic import pixart_shapes, save_random
from comfyui_nibble.tests.host.graphs import node
from comfyui_nibble.tests.host.inside import packed_hash, sample
from comfyui_nibble.tests.host.server import GraphError
from comfyui_nibble.tests.host.test_adapters import LINEAR2, MLP, QKV, adapter, with_lora
from comfyui_nibble.tests.support import relative_error


@pytest.mark.parametrize("kind", ["lora", "hook", "hook beside a LoRA", "bypass"])
def test_sampling_again_after_an_interrupt(comfy, base, kind):
    tensors = adapter("lora and bias", QKV) | adapter("dora", MLP)
    group = comfy.hooks.create_hook_lora(tensors, 0.8, 0.0) if "hook" in kind else None
    patched = {
        "lora": lambda: with_lora(base, tensors, 0.8),
        "hook": lambda: base,
        "hook beside a LoRA": lambda: with_lora(base, adapter("lora", LINEAR2)),
        "bypass": lambda: comfy.sd.load_bypass_lora_for_models(base, None, adapter("lora", QKV), 0.8, 0)[0],
    }[kind]()
    plain, before, want = sample(base), packed_hash(base), sample(patched, hooks=group)
    assert relative_error(plain, want) > 0.01
    seen = []

    def stop(step, *_):
        seen.append(step)
        comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, steps=8, hooks=group, callback=stop)
    assert seen == [0]
    assert packed_hash(base) == before
    assert torch.equal(sample(patched, hooks=group), want)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(patched, steps=8, hooks=group, callback=stop)
    assert torch.equal(sample(base), plain)
    assert not any(m.attached.key or m.wrapped for _, m in base.packed_layers())
    assert packed_hash(base) == before


def mark(path):
    """Changes every weight of a finished layer in its file, and takes out the hashes, which would tell."""
    with safe_open(path, "pt") as f:
        tensors, metadata = {k: f.get_tensor(k) for k in f.keys()}, f.metadata()  # noqa: SIM118
    metadata.pop("nibble_xxh3", None)
    save_file(
        {k: t ^ 17 if k.endswith(".weight") and not t.is_floating_point() else t for k, t in tensors.items()},
        path,
        metadata,
    )


def test_quantizing_again_after_an_interrupt(server):
    """The file of a run that goes on where a stopped one was, against one before it; the stopped one wrote
    none."""
    save_random(server.base / "models" / "diffusion_models" / "pixart_4.safetensors", pixart_shapes(depth=4))
    graph = {
        "load": node("UNETLoader", unet_name="pixart_4.safetensors", weight_dtype="default"),
        "quantize": node("NibbleQuantize", model=["load", 0], method="svdquant", rank=32, gptq=False),
        "save": node("NibbleSaveModel", model=["quantize", 0], filename_prefix="diffusion_models/stopped"),
    }
    folder, log = server.base / "output" / "diffusion_models", server.base / "server.log"

    def started():
        """Queues the graph; returns its prompt id once the loader has written its line, after which there is
        only quantizing to do."""
        start, prompt = log.stat().st_size, server.submit(graph)
        deadline = time.monotonic() + 60
        while b"model_type" not in log.read_bytes()[start:] and time.monotonic() < deadline:
            time.sleep(0.02)
        return prompt

    prompt, start = started(), time.monotonic()
    server.wait(prompt)
    seconds = time.monotonic() - start
    prompt = started()
    time.sleep(seconds / 2)
    server.post("/interrupt")
    with pytest.raises(GraphError, match="interrupted at NibbleQuantize"):
        server.wait(prompt)
    assert [p.name for p in folder.glob("stopped_*")] == ["stopped_00001_.safetensors"]
    partial = lambda: list((server.base / "output" / "nibble_calibration").glob("pixart.*.partial"))
    [left] = partial()
    finished = list(left.glob("*.nibble.safetensors"))
    assert 0 < len(finished) < 4 * 8
    [marked] = PackFile(finished[0]).specs
    mark(finished[0])
    start = log.stat().st_size
    server.run(graph)
    assert f"{left}: {len(finished)} finished pieces of the run since" in log.read_bytes()[start:].decode()
    assert not partial()
    before, after = (PackFile(folder / f"stopped_0000{i}_.safetensors") for i in (1, 2))
    assert before.specs == after.specs
    for name in before.specs:
        same = all(
            torch.equal(t, after.layer(name).tensors[key]) for key, t in before.layer(name).tensors.items()
        )
        assert same == (name != marked)  # which was read, not made again
