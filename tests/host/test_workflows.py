"""The example workflows: each graph, its API twin and its picture; run small in a real ComfyUI, opened in its
real frontend."""

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
from comfyui_nibble.tests.assets.synthetic import (
    flux_shapes,
    pixart_shapes,
    sdxl_shapes,
    wan_shapes,
)
from comfyui_nibble.tests.host.workflow_graphs import (
    FOLDER,
    GROUPS,
    NAMES,
    STAGES,
    note,
    of_kind,
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


# Only in the UI: what the frontend does with a seed after a run, and notes.
UI_ONLY_WIDGETS, UI_ONLY_NODES = {"control_after_generate"}, {"MarkdownNote"}


def test_these_are_all():
    assert {p.name for p in FOLDER.glob("*.json")} == {f"{n}.json" for n in NAMES}
    assert {p.name for p in (FOLDER / "api").iterdir()} == {f"{n}.json" for n in NAMES}


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
        expected[str(n["id"])] = (n["type"], inputs)
    assert {key: (n["class_type"], n["inputs"]) for key, n in twin(name).items()} == expected


@pytest.mark.parametrize("name", NAMES)
def test_nothing_overlaps_and_every_node_is_in_a_group(name):
    graph, title_bar = workflow(name), 30
    boxes = [
        (x, y - title_bar, x + w, y + h) for (x, y), (w, h) in ((n["pos"], n["size"]) for n in graph["nodes"])
    ]
    for a, b in combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1], (a, b)
    assert [g["title"] for g in graph["groups"]] == GROUPS[name]
    groups = [(x, y, x + w, y + h) for x, y, w, h in (g["bounding"] for g in graph["groups"])]
    for n, box in zip(graph["nodes"], boxes, strict=True):
        inside = [
            g for g in groups if g[0] <= box[0] and g[1] <= box[1] and box[2] <= g[2] and box[3] <= g[3]
        ]
        assert len(inside) == (n["type"] not in UI_ONLY_NODES), n["type"]


@pytest.mark.parametrize("name", [n for n in NAMES if n.startswith("flux") and "Calibrate" in GROUPS[n]])
@pytest.mark.parametrize(
    "kind",
    [
        "UNETLoader",
        "DualCLIPLoader",
        "NibbleCalibrationPrompts",
        "FluxGuidance",
        "EmptySD3LatentImage",
        "NibbleCalibrate",
    ],
)
def test_calibrates_as_flux_4bit(name, kind):
    """So that a finished calibration serves all; small values hide a difference from the runs below."""
    values = lambda name: [
        {k: v for k, v in n["inputs"].items() if not isinstance(v, list)}
        for n in of_kind(twin(name), kind).values()
    ]
    assert values(name) == values("flux_4bit")


def test_notes_say_how_often_the_network_runs():
    """At FLUX.1's 57 blocks and 228 layers, on 128 recorded inputs of 16 samples."""
    plan = detect(REAL["flux_4bit"]).layers(REAL["flux_4bit"])
    text = note("flux_splitquant_trained")
    for config in STAGES:
        assert f"{config.steps} steps of {config.calls} inputs" in text
    assert (
        f"{sum(config.steps * config.calls for config in STAGES)} of the whole network with gradients" in text
    )
    # Before, after and at the start, after each eighth and at the end; and twice to carry all inputs along.
    judgings = sum(
        3 + config.steps // (config.steps // WINDOWS) + (config.steps % (config.steps // WINDOWS) > 0)
        for config in STAGES
    )
    assert f"{judgings * CALLS // 4 + 2 * CALLS * len(STAGES)} without" in text
    replays = gains.SAMPLES * gains.STEPS
    layers = len(with_choice(plan))
    assert f"each of {layers} layers" in note("flux_robuq_budget")
    assert f"the network {(layers + 2) * replays} times" in note("flux_robuq_budget")


@pytest.mark.parametrize("name", REAL)
def test_notes_say_what_calibration_takes(name):
    """Rounds at the memory that the workflow gives, the memory of a single one, and GB on disk."""
    layers, text = detect(REAL[name]).layers(REAL[name]), note(name)
    rounds = lambda memory_gb: len(plan_passes(inputs_of(layers), int(memory_gb * 2**30)))
    [node] = of_kind(twin(name), "NibbleCalibrate").values()
    values = node["inputs"]
    runs = f"{values['samples']} runs of {values['steps']} steps"
    assert (f"{n} rounds of {runs}" if (n := rounds(values["memory_gb"])) > 1 else f": {runs}") in text
    for single in re.findall(
        r"rounds, ([\d.]+) a single one|\*memory_gb\* of ([\d.]+) makes a single round", text
    ):
        assert rounds(float("".join(single))) == 1
    gigabytes = [
        sum(InputStatistics.nbytes(i.width, i.blocks) for i in inputs_of(layers, width)) / 1e9
        for width in (HESSIAN_WIDTH, 0)
    ]
    said = re.search(r"About ([\d.]+) GB of statistics in \S+, ([\d.]+) GB with \*second_moments\* off", text)
    assert [float(n) for n in said.groups()] == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_thumbnail(name):
    """ComfyUI shows the .jpg of the same name in its list of templates."""
    data = (FOLDER / f"{name}.jpg").read_bytes()
    assert data[:3] == b"\xff\xd8\xff"
    assert len(data) < 100_000
