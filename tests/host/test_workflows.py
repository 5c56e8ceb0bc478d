"""The example workflows as files: what the templates say, each with an API twin and a picture, laid out to be
read."""

import re
from itertools import combinations

import pytest

from comfyui_nibble.quant_core.calibration import gains
from comfyui_nibble.quant_core.calibration.plan import HESSIAN_WIDTH, inputs_of, plan_passes
from comfyui_nibble.quant_core.calibration.trajectory import CALLS
from comfyui_nibble.quant_core.families import detect
from comfyui_nibble.quant_core.layer.statistics import InputStatistics
from comfyui_nibble.quant_core.precision.allocate import with_choice
from comfyui_nibble.quant_core.training.reconstruct import WINDOWS
from comfyui_nibble.tests.assets.synthetic import flux_shapes, pixart_shapes, sdxl_shapes, wan_shapes
from comfyui_nibble.tests.host.server import PACK
from comfyui_nibble.tests.host.templates import blueprint
from comfyui_nibble.tests.host.templates.every import TEMPLATES
from comfyui_nibble.tests.host.templates.kinds import API_ONLY
from comfyui_nibble.tests.host.templates.models import FILES
from comfyui_nibble.tests.host.templates.write import texts
from comfyui_nibble.tests.host.workflow_graphs import (
    FOLDER,
    NAMES,
    STAGES,
    note,
    of_kind,
    title,
    twin,
    workflow,
)

# The models that the notes are about.
REAL = {
    "flux_4bit": flux_shapes(19, 38),
    "pixart_4bit": pixart_shapes(28),
    "wan_4bit": wan_shapes(30, 1536, 8960),
    "sdxl_4bit": sdxl_shapes((0, 0, 2, 2, 10, 10), 10, (10, 10, 10, 2, 2, 2, 0, 0, 0), (1, 2, 4)),
}
# What fits a screen of 1920 x 1080 at a zoom where ComfyUI draws text, with a quarter of it left free.
WIDEST, HIGHEST = 1940, 1080

# Only in the UI: what the frontend does with a seed after a run, and notes.
UI_ONLY_WIDGETS, UI_ONLY_NODES = {"control_after_generate", "upload"}, {"MarkdownNote"}


def test_files_are_what_the_templates_say():
    """`python -m comfyui_nibble.tests.host.templates.write` writes them anew."""
    found = {p.name: p for p in FOLDER.glob("*.json")} | {
        f"api/{p.name}": p for p in (FOLDER / "api").iterdir()
    }
    assert {name: path.read_text(encoding="utf-8") for name, path in found.items()} == texts()
    assert blueprint.FILE.read_text(encoding="utf-8") == blueprint.text()


def test_titles_sort_in_reading_order_and_are_names_of_files_everywhere():
    titles = [template.title for template in TEMPLATES]
    assert [name[:3] for name in titles] == [f"{i:02} " for i in range(1, len(titles) + 1)]
    assert all(re.fullmatch(r"[\w .,()+-]+", name) for name in titles)


@pytest.mark.parametrize("name", NAMES)
def test_graph_and_twin_agree(name):
    graph, expected = workflow(name), {}
    links = {link[0]: [str(link[1]), link[2]] for link in graph["links"]}
    for n in graph["nodes"]:
        # Frontends read the values by position; the names beside them must say the same.
        named = n.get("widgets_values_named") or {}
        assert list(named.values()) == (n.get("widgets_values") or [])
        if n["type"] in UI_ONLY_NODES:
            continue
        inputs = {k: v for k, v in named.items() if k not in UI_ONLY_WIDGETS}
        inputs |= {i["name"]: links[i["link"]] for i in n["inputs"] if i["link"] is not None}
        expected[str(n["id"])] = (n["type"], inputs | API_ONLY.get(n["type"], {}))
    assert {key: (n["class_type"], n["inputs"]) for key, n in twin(name).items()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_laid_out_to_be_read(name):
    """Nothing overlaps, the note is first, groups are numbered and hold every node, all fits a screen."""
    graph, title_bar = workflow(name), 30
    boxes = [
        (x, y - title_bar, x + w, y + h) for (x, y), (w, h) in ((n["pos"], n["size"]) for n in graph["nodes"])
    ]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert graph["nodes"][0]["type"] == "MarkdownNote"
    assert boxes[0][:2] == (min(b[0] for b in boxes), min(b[1] for b in boxes))
    titles = [g["title"].split(" ", 1)[0] for g in graph["groups"]]
    assert titles == [str(i) for i in range(1, len(titles) + 1)]
    groups = [(x, y, x + w, y + h) for x, y, w, h in (g["bounding"] for g in graph["groups"])]
    for n, box in zip(graph["nodes"], boxes, strict=True):
        inside = [
            g for g in groups if g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3]
        ]
        assert len(inside) == (n["type"] not in UI_ONLY_NODES), n["type"]
    assert max(g[2] for g in groups) <= WIDEST
    assert max(g[3] for g in groups) <= HIGHEST


@pytest.mark.parametrize("name", NAMES)
def test_note_is_short_and_leads_to_help(name):
    text = note(name)
    words = re.sub(r"\]\([^)]*\)", "]", text).split()
    assert len(words) <= 110
    assert "`" not in text  # blue on blue in Nodes 2.0
    pages = re.findall(r"/nodes/web/docs/(\w+\.md)\)", text)
    assert pages
    assert all((PACK / "nodes" / "web" / "docs" / page).is_file() for page in pages)
    steps = [g["title"].split(" ", 1)[0] for g in workflow(name)["groups"]]
    assert re.findall(r"^(\d+)\. ", text, re.MULTILINE) == steps  # a line for each group


@pytest.mark.parametrize("name", NAMES)
def test_models_can_be_downloaded(name):
    """Each file that a node asks for has its public address, by which ComfyUI offers it."""
    for n in workflow(name)["nodes"]:
        values = [
            v for v in n.get("widgets_values") or [] if isinstance(v, str) and v.endswith(".safetensors")
        ]
        found = {m["name"]: m for m in n["properties"].get("models", [])}
        assert found.keys() == set(values)
        for value in values:
            folder, _ = FILES[value]
            assert found[value]["directory"] == folder
            assert re.fullmatch(
                r"https://huggingface\.co/[\w.-]+/[\w.-]+/resolve/main/\S+\.safetensors", found[value]["url"]
            )


def test_help_pages_name_templates_that_there_are():
    pages = [*(PACK / "nodes" / "web" / "docs").glob("*.md"), PACK / "README.md"]
    named = {
        n
        for page in pages
        for n in re.findall(r"(?:workflow|template) \*([^*]+)\*", page.read_text(encoding="utf-8"))
    }
    assert named <= {template.title[3:] for template in TEMPLATES}
    assert named


def test_all_calibrate_flux_alike():
    """So that a finished calibration serves all; small values hide a difference from the runs below."""

    def values(name):
        graph = twin(name)
        [calibrate] = of_kind(graph, "NibbleCalibrate").values()
        before = [
            graph[calibrate["inputs"][k][0]] for k in ("conditioning.positive0", "latent_image", "model")
        ]
        return [
            (n["class_type"], {k: v for k, v in n["inputs"].items() if not isinstance(v, list)})
            for n in (calibrate, *before)
        ]

    flux = [name for name in NAMES if name.startswith("flux") and of_kind(twin(name), "NibbleCalibrate")]
    assert len(flux) > 4
    for name in flux:
        assert values(name) == values("flux_4bit")


def test_notes_say_how_often_the_network_runs():
    """At FLUX.1's 57 blocks and 228 layers, on 128 recorded inputs of 16 samples."""
    plan = detect(REAL["flux_4bit"]).layers(REAL["flux_4bit"])
    text = note("flux_splitquant_trained")
    assert f"as {sum(c.steps * c.calls for c in STAGES)} evaluations of the whole network with" in text
    # Before, after and at the start, after each eighth and at the end; and twice to carry all inputs along.
    judgings = sum(
        3 + config.steps // (config.steps // WINDOWS) + (config.steps % (config.steps // WINDOWS) > 0)
        for config in STAGES
    )
    assert f"{judgings * CALLS // 4 + 2 * CALLS * len(STAGES)} without" in text
    layers = len(with_choice(plan))
    assert f"each of {layers} layers" in note("flux_robuq_budget")
    assert f"the network {(layers + 2) * gains.SAMPLES * gains.STEPS} times" in note("flux_robuq_budget")


@pytest.mark.parametrize("name", REAL)
def test_notes_say_what_calibration_takes(name):
    """Rounds at the memory that the workflow gives, the memory of a single one, and GB on disk."""
    layers, text = detect(REAL[name]).layers(REAL[name]), note(name)
    rounds = lambda memory_gb: len(plan_passes(inputs_of(layers), int(memory_gb * 2**30)))
    [node] = of_kind(twin(name), "NibbleCalibrate").values()
    values = node["inputs"]
    runs = f"{values['samples']} runs of {values['steps']} steps"
    assert (f"{n} rounds of {runs}" if (n := rounds(values["memory_gb"])) > 1 else f": {runs}") in text
    for single in re.findall(r"\*memory_gb\* of ([\d.]+) makes a single round", text):
        assert rounds(float(single)) == 1
    gigabytes = [
        sum(InputStatistics.nbytes(i.width, i.blocks) for i in inputs_of(layers, width)) / 1e9
        for width in (HESSIAN_WIDTH, 0)
    ]
    said = re.search(r"About ([\d.]+) GB of statistics in \S+, ([\d.]+) GB with \*second_moments\* off", text)
    assert [float(n) for n in said.groups()] == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail(name):
    """ComfyUI shows the .jpg of the same name in its list of templates, on square cards."""
    from PIL import Image

    path = FOLDER / f"{title(name)}.jpg"
    assert path.stat().st_size < 60_000
    with Image.open(path) as picture:
        assert (picture.format, picture.size) == ("JPEG", (512, 512))


def test_no_other_thumbnails():
    assert {p.stem for p in FOLDER.glob("*.jpg")} == {template.title for template in TEMPLATES}
