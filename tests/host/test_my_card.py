"""Nibble Quantize for My Card in a real ComfyUI: what a wish makes, finds again, refuses, and keeps of a "
"stop."""

import re
import time
from types import SimpleNamespace

import pytest
import torch

from comfyui_nibble.quant_core.calibration.file import read_meta
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.graphs import FLUX_TINY, load_graph, node
from comfyui_nibble.tests.host.messages import listening
from comfyui_nibble.tests.host.server import GraphError

CARD = "NibbleQuantizeForMyCard"
INPUTS = {
    "wish": "balanced",
    "prompts": "",
    "show_before_and_after": False,
    "before_after_prompt": "large red circle center on plain blue background",
    "file_name": "",
    "sampler_name": "automatic",
    "scheduler": "automatic",
    "cfg": 0.0,
    "steps": 0,
    "seed": 0,
}


def card_graph(leave=(), **options):
    """The graph with the node, its texts in previews; leave: inputs that are not connected."""
    links = {"model": ["load", 0], "conditioning": ["prompts", 0], "latent_image": ["latent", 0]}
    links = {name: link for name, link in links.items() if name not in leave}
    return {
        "load": node("UNETLoader", unet_name=FLUX_TINY["model"], weight_dtype="default"),
        "prompts": FLUX_TINY["calibration"],
        "latent": FLUX_TINY["latent"],
        "card": node(CARD, **(INPUTS | links | options)),
        "report": node("PreviewAny", source=["card", 2]),
    }


@pytest.fixture(scope="module")
def files(server):
    """A function that gives the names of the files there are, and how many calibrations."""
    folder, kept = server.base / "output" / "diffusion_models", server.base / "output" / "nibble_calibration"

    def now():
        names = {p.name for p in folder.glob("*.safetensors")} if folder.is_dir() else set()
        return names, sum(p.is_dir() for p in kept.iterdir()) if kept.is_dir() else 0

    return now


def said(outputs):
    return outputs["card"]["text"][0].splitlines()


def test_balanced_is_saved_by_itself_and_found_again(server, files):
    before, _ = files()
    log = server.base / "server.log"
    start = log.stat().st_size
    graph = card_graph(show_before_and_after=True, seed=5)
    del graph["report"]  # the node runs by itself
    outputs = server.run(graph)
    assert outputs["card"]["nibble_level"] == ["green"]
    verdict, saved, pictures = said(outputs)
    found = re.fullmatch(
        r"Good: Very close to the original: worst layer (\d+) dB \(\d %\s*off\), (\d\.\d) MB instead of "
        r"9.5\.",
        verdict,
    )
    assert found
    assert int(found[1]) >= 24
    assert saved == f"Saved as tiny_flux-balanced-{found[2]}MB.safetensors"
    assert pictures == "Left the original, right the result:"
    assert len(outputs["card"]["images"]) == 2
    (name,) = files()[0] - before
    assert name == saved.removeprefix("Saved as ")
    path = server.base / "output" / "diffusion_models" / name
    assert path.stat().st_size / 1e6 == pytest.approx(float(found[2]), abs=0.1)
    made = PackFile(path).provenance
    assert (made["method"], made["my_card"]["wish"], made["my_card"]["of"]) == (
        "svdquant_p",
        "balanced",
        "tiny_flux.safetensors",
    )
    told = log.read_bytes()[start:].decode()
    assert "Nibble Quantize for My Card: begins: FLUX.1, balanced" in told
    assert "Nibble Quantize for My Card: Method svdquant_p: 4 bits and a small 16-bit part" in told
    assert re.search(r"Nibble Quantize for My Card: done in \d+ (s|min): FLUX.1, balanced", told)

    known = files()
    again = server.run(card_graph(show_before_and_after=True, seed=5))
    assert said(again)[:2] == [verdict, saved]
    assert f"Made before by the same wish, loaded and not made again: {name}" in again["report"]["text"][0]
    assert files() == known


def test_examples_are_used_again_and_names_are_numbered(server, files):
    graph = card_graph(seed=6, steps=2, file_name="mine/tiny.safetensors")
    server.run(graph)
    folder = server.base / "output" / "mine"
    made, known = folder / "tiny.safetensors", files()
    assert list(folder.iterdir()) == [made]
    made.write_bytes(b"of somebody else")
    report = server.run(graph)["report"]["text"][0]
    assert sorted(p.name for p in folder.iterdir()) == ["tiny-2.safetensors", "tiny.safetensors"]
    assert made.read_bytes() == b"of somebody else"
    assert "The example runs were there already, with the same settings: they are used again." in report
    assert files() == known


def test_fast_needs_neither_text_nor_calibration(server, files):
    _, calibrations = files()
    outputs = server.run(card_graph(wish="fast", leave=("conditioning", "latent_image")))
    assert outputs["card"]["nibble_level"] == ["amber"]
    lines = said(outputs)
    assert lines[0].startswith("Check: Not measured, nobody knows how close it is: 4.")
    assert "Calibrate first" in lines[1]
    assert files()[1] == calibrations
    name = lines[2].removeprefix("Saved as ")
    assert name.startswith("tiny_flux-fast-")
    # What the loader says of the file, and that the file is the model.
    loaded = server.run(load_graph(FLUX_TINY, name))
    first, what, memory, origin = loaded["load"]["text"][0].splitlines()
    assert first == lines[0]
    assert what == "FLUX.1, SVDQuant with a Hadamard rotation, 6.2 bits a weight, 16 layers quantized"
    assert re.fullmatch(r"VRAM: \d\.\d MB, and \d+\.\d MB to work in; this machine has no GPU", memory)
    assert re.fullmatch(r"From tiny_flux.safetensors, wish fast, Nibble [\d.]+", origin)
    assert loaded["load"]["nibble_level"] == ["amber"]


def test_by_a_text_encoder_with_guidance(server):
    """At cfg 2 the empty prompt is encoded as the negative one; the prompts are those of the input."""
    graph = card_graph(leave=("conditioning",), clip=["clip", 0], steps=2, cfg=2.0)
    graph["card"]["inputs"] |= {
        "prompts": "large red circle\n\n small blue ring ",
        "show_before_and_after": True,
    }
    graph["clip"] = node("TestCaptionEncoder")
    outputs = server.run(graph)
    assert outputs["card"]["nibble_level"] == ["green"]
    assert len(outputs["card"]["images"]) == 2
    assert "8 example runs of 2 steps" in outputs["report"]["text"][0]
    calibrated = [
        read_meta(p) for p in (server.base / "output" / "nibble_calibration").glob("*/pass-000.safetensors")
    ]
    (meta,) = (m for m in calibrated if m["settings"]["cfg"] == 2.0)
    texts = {call["arguments"]["kwargs"]["context"]["tensor"] for call in meta["trajectory"]}
    assert len(texts) == 2  # two prompts, each beside the empty one


BOTH = {"clip": ["clip", 0]}
REFUSALS = {
    "both": (BOTH, (), "clip and conditioning are both connected"),
    "neither": (
        {},
        ("conditioning",),
        "neither clip nor conditioning is connected. Connect the model's text",
    ),
    "fits": ({"wish": "fits 8 GB"}, (), "fits 8 GB: this model takes 9.5 MB as it is, .* without being"),
    "cfg": ({"cfg": 3.0}, (), "sampled with cfg 3, which takes a negative prompt, and none is connected"),
    "name": ({"file_name": "../../x"}, (), r"file_name '../../x': expected a name, or a folder and a name"),
    "folder": ({"file_name": "x/"}, (), "file_name 'x/': expected a name"),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_before_the_work(server, files, case):
    options, leave, message = REFUSALS[case]
    graph, before = card_graph(leave=leave, seed=99, **options), files()
    graph["clip"] = node("TestCaptionEncoder")
    with pytest.raises(GraphError, match=message):
        server.run(graph)
    assert files() == before


def test_a_quantized_model_is_refused(server):
    graph = card_graph()
    made = node("NibbleQuantize", model=["load", 0], method="rtn", rank=0, gptq=False)
    graph["made"], graph["card"]["inputs"]["model"] = made, ["made", 0]
    with pytest.raises(GraphError, match="quantized already .* connect the full-precision model"):
        server.run(graph)


def stopped_at(server, graph, pattern):
    with listening(server) as told:
        prompt = server.submit(graph, told.client)
        deadline = time.monotonic() + 120
        while not re.search(pattern, told.of("card")) and time.monotonic() < deadline:
            time.sleep(0.01)
        server.post("/interrupt")
        with pytest.raises(GraphError, match=f"interrupted at {CARD}"):
            server.wait(prompt)
        return told.of("card")


def test_a_stop_keeps_what_was_done(server):
    graph = card_graph(seed=7, steps=16)
    stopped_at(server, graph, r"Calibrating: \d+ of 64 steps, about")
    text = stopped_at(server, graph, r"Quantizing: [1-9]\d* of 16 layers")
    kept = int(re.search(r"(\d+) of 64 steps kept", text)[1])
    assert 0 < kept < 64
    with listening(server) as told:
        server.wait(server.submit(graph, told.client))
        text = told.of("card")
    assert "Calibrating" not in text
    assert 0 < int(re.search(r"(\d+) of 16 layers kept", text)[1]) < 16


def kinds(done):
    """Precisions of the layers in the file."""
    return {row["what"].split()[0] for row in PackFile(done.path).report if row["block"]}


@pytest.fixture
def inside(full, tmp_path, monkeypatch):
    """A function of (wish's Choice options) that runs the node's work in this process: (Done, text of its
    choice)."""
    import folder_paths

    from comfyui_nibble.nodes.host import my_card
    from comfyui_nibble.nodes.host.kinds import Kind
    from comfyui_nibble.quant_core.evaluation.demo import pictures
    from comfyui_nibble.quant_core.precision import wish as wishes
    from comfyui_nibble.quant_core.precision.menu import Entry

    folder_paths.set_output_directory(str(tmp_path))
    quick = (("iterations", 0), ("smooth", ((0.5, 0.5),)), ("low_rank", ("plain",)), ("gptq", False))
    entries = (Entry("robuq A8", "robuq", (("activation_bits", 8), *quick)), wishes.SMALL[1])
    monkeypatch.setattr(my_card, "SMALL", entries)
    context, pooled = pictures.encode_caption("large red circle center on plain blue background")
    conditioning = [[context[None], {"pooled_output": pooled[None], "guidance": 3.5}]]

    def run(choice):
        monkeypatch.setattr(my_card, "choose", lambda wish, facts: choice)
        latent = {"samples": torch.zeros(1, 16, 16, 16)}
        asked = my_card.Request(
            full, choice.wish, Kind(1.0, 2), None, conditioning, None, "", latent, None, False, "", "", 0
        )
        with torch.inference_mode():
            return my_card.quantized_for_card(asked)

    return SimpleNamespace(run=run, wishes=wishes)


def test_room_on_a_card_is_used_up_and_kept(inside):
    room = 4_000_000
    memory = {"guard": "memory", "limit": room, "raised": ("W8A8", "16 bit")}
    done = inside.run(inside.wishes.Choice("fits 6 GB", "convrot", 4, 2, 2**30, room, **memory))
    assert 0.95 * room < done.path.stat().st_size < 1.02 * room
    assert "the least error at" in done.report
    assert {"W4A4", "W8A8"} <= kinds(done)


def test_what_is_far_off_is_raised(inside):
    best = {"guard": "quality", "limit": 24.0}
    done = inside.run(inside.wishes.Choice("best", "convrot", 4, 2, 2**30, 5_000_000, **best))
    assert "every layer at 24 dB or more" in done.report
    assert done.verdict.level == "green"
    assert done.verdict.sentence.startswith("Very close to the original")
    assert kinds(done) & {"W4A8", "W8A8"}


def test_weights_of_three_values_where_4_bits_are_too_large(inside):
    room = 4_100_000
    done = inside.run(inside.wishes.Choice("smallest", "", 4, 2, 2**30, room, budget=f"{room / 1e6:.3f}MB"))
    assert {"W2A8", "W4A4"} <= kinds(done)
    assert done.path.stat().st_size < 1.02 * room
    assert "Precision of each layer\nAsked for: 4.1 MB" in done.report


def test_too_little_disk_is_said_first(inside, monkeypatch):
    import shutil

    from comfyui_nibble.quant_core.store.atomic import NoRoom

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    choice = inside.wishes.Choice("balanced", "svdquant_r", 4, 2, 2**30, 5_000_000)
    with pytest.raises(
        NoRoom, match="GB of measurements and 0.0 GB for the model.* are needed, 0.0 MB are free"
    ):
        inside.run(choice)
