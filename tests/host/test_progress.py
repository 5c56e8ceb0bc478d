"""What a page shows while Nibble Calibrate and Nibble Quantize work, and after a stop: over the websocket of
a real ComfyUI."""

import re
import time

import pytest

from comfyui_nibble.tests.host import test_replay
from comfyui_nibble.tests.host.graphs import FLUX_TINY, quantize_graph
from comfyui_nibble.tests.host.messages import listening
from comfyui_nibble.tests.host.server import GraphError
from comfyui_nibble.tests.host.sweep.registry import ENTRIES
from comfyui_nibble.tests.host.sweep.tiny import make

SAMPLES, STEPS = 12, 8
ALL = SAMPLES * STEPS


@pytest.fixture(scope="module")
def graph():
    graph = quantize_graph(FLUX_TINY, method="svdquant", samples=SAMPLES, steps=STEPS, seed=41)
    return {k: graph[k] for k in ("load", "prompts", "latent", "calibrate", "quantize", "report")}


def stopped(server, graph, node, pattern):
    """The Messages up to a stop as soon as a text of `node` matches."""
    with listening(server) as told:
        prompt = server.submit(graph, told.client, preview_method="latent2rgb")
        deadline = time.monotonic() + 120
        while not re.search(pattern, told.of(node)) and time.monotonic() < deadline:
            time.sleep(0.01)
        server.post("/interrupt")
        with pytest.raises(GraphError, match="interrupted at"):
            server.wait(prompt)
        return told


def finished(server, graph):
    log = server.base / "server.log"
    start = log.stat().st_size
    with listening(server) as told:
        server.wait(server.submit(graph, told.client, preview_method="latent2rgb"))
        return told, log.read_bytes()[start:].decode()


def bar_of(told, node):
    """(value, max) of a node's bar, without ComfyUI's own 0 of 1 at the start of each node."""
    return [(value, most) for name, value, most in told.bars if name == node and most > 1]


def test_previews_texts_and_what_was_kept(server, graph):
    first = stopped(server, graph, "calibrate", f"of {ALL} steps, about")
    assert first.texts[0] == ("calibrate", f"Calibrating: 0 of {ALL} steps")
    assert first.pictures > STEPS
    assert bar_of(first, "calibrate")[0] == (0, ALL)

    second = stopped(server, graph, "quantize", r"Quantizing: [1-9]\d* of 16 layers")
    kept, most = bar_of(second, "calibrate")[0]
    assert 0 < kept < most == ALL
    assert kept % STEPS == 0
    assert second.texts[0] == ("calibrate", f"Calibrating: {kept} of {ALL} steps\n{kept} of {ALL} steps kept")
    assert f"Calibrating: {ALL} of {ALL} steps\n" in second.of("calibrate")
    assert second.pictures == ALL - kept

    third, log = finished(server, graph)
    assert not bar_of(third, "calibrate")
    assert third.pictures == 0
    kept, most = bar_of(third, "quantize")[0]
    assert 0 < kept < most == 16
    assert f"Quantizing: {kept} of 16 layers\n{kept} of 16 layers kept" in third.of("quantize")
    assert "Quantizing: 16 of 16 layers\n" in third.of("quantize")
    told = f"FLUX.1, {SAMPLES} runs of {STEPS} steps"
    assert f"Nibble Calibrate: begins: {told}" in log
    assert "Nibble Calibrate: was there already, with the same settings: " in log
    assert "Nibble Quantize: begins: FLUX.1, SVDQuant, 16 layers" in log
    assert re.search(r"Nibble Quantize: done in \d+ s: FLUX.1, SVDQuant, 16 layers", log)
    assert f"Nibble: quantizing goes on: {kept} of 16 layers kept" in log


def test_a_replay_shows_the_last_picture_of_each_sample(comfy, tmp_path, monkeypatch):
    """Passes that run blocks again sample nothing: what they are at is shown as it came out."""
    entry = next(e for e in ENTRIES if e.name == "Flux")
    source, shown = make(entry), []
    import latent_preview

    monkeypatch.setattr(latent_preview.args, "preview_method", latent_preview.LatentPreviewMethod.Latent2RGB)
    hook = lambda value, total, preview, node_id=None: shown.append((value, total, preview))
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    found = test_replay.calibrate(source, entry, tmp_path, test_replay.memory_of(source), replay=True)
    passes, samples, steps = len(found.files), test_replay.SAMPLES, test_replay.STEPS
    assert passes > 1
    total = passes * samples * steps
    assert shown[0] == (0, total, None)
    pictures = [(value, preview[1]) for value, _, preview in shown if preview]
    first = samples * steps
    assert [value for value, _ in pictures] == [*range(1, first + 1), *range(first + steps, total + 1, steps)]
    last = [picture for value, picture in pictures[:first] if value % steps == 0]
    assert [picture for _, picture in pictures[first:]] == last * (passes - 1)
