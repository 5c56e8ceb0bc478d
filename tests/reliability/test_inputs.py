"""No command writes over what it reads, whatever the name it is given, nor over what somebody else has
there."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats.nunchaku.modules import FOLDER
from comfyui_nibble.tests.assets import nunchaku as made_for_nunchaku
from comfyui_nibble.tests.reliability.runs import contents, run


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for name in "ab":
        assert run(["calibration", folder / name], folder / "log").code == 0
    shutil.copy(tiny_flux.CHECKPOINT, folder / "m.safetensors")
    assert (
        run(
            [
                "quantize",
                folder / "m.safetensors",
                folder / "n.safetensors",
                "--method",
                "native",
                "--device",
                "cpu",
            ],
            folder / "log",
        ).code
        == 0
    )
    (folder / "log").unlink()
    (folder / "gains.json").write_text("{}")
    transformer = folder / "pipe" / "transformer"
    transformer.mkdir(parents=True)
    shutil.copy(tiny_flux.CHECKPOINT, transformer / "model.safetensors")
    names = dict.fromkeys(load_file(tiny_flux.CHECKPOINT), "model.safetensors")
    index = {"weight_map": names}
    (transformer / "model.safetensors.index.json").write_text(json.dumps(index))
    (transformer / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    (folder / "pipe" / "model_index.json").write_text("{}")
    old = made_for_nunchaku.old_names(made_for_nunchaku.flux().file)
    parts = [
        {k: t for k, t in old.items() if ("transformer_blocks." in k) == first} for first in (True, False)
    ]
    for name, part in zip(FOLDER, parts, strict=True):
        made_for_nunchaku.write(folder / "two", part, None, name)
    return folder


@pytest.fixture
def folder(made, tmp_path):
    return shutil.copytree(made, tmp_path / "f")


COMMANDS = {
    "quantize": ("m.safetensors", lambda f, out: ["quantize", f / "m.safetensors", out, "--method", "rtn"]),
    "allocate": (
        "m.safetensors",
        lambda f, out: ["allocate", f / "m.safetensors", out, "--calibration", f / "a", "--budget", "A3"],
    ),
    "convert": ("n.safetensors", lambda f, out: ["convert", f / "n.safetensors", out, "--to", "native"]),
    "quantize, calibration": (
        "a/pass-000.safetensors",
        lambda f, out: ["quantize", f / "m.safetensors", out, "--calibration", f / "a"],
    ),
    "merge": ("a", lambda f, out: ["merge-calibrations", out, f / "a", f / "b"]),
    "allocate, gains": (
        "gains.json",
        lambda f, out: [
            *("allocate", f / "m.safetensors", out, "--calibration", f / "a", "--budget", "A3"),
            *("--gains", f / "gains.json"),
        ],
    ),
    "configuration": (
        "pipe/transformer/config.json",
        lambda f, out: ["quantize", f / "pipe" / "transformer", out, "--method", "rtn"],
    ),
    "index": (
        "pipe/transformer/model.safetensors.index.json",
        lambda f, out: ["quantize", f / "pipe", out, "--method", "rtn"],
    ),
    "pipeline": (
        "pipe/model_index.json",
        lambda f, out: ["quantize", f / "pipe", out, "--method", "rtn"],
    ),
    "gains, configuration": (
        "pipe/transformer/config.json",
        lambda f, out: ["gains", f / "pipe" / "transformer", f / "a", out],
    ),
    "convert, two files": (
        "two/unquantized_layers.safetensors",
        lambda f, out: ["convert", f / "two" / FOLDER[0], out, "--to", "nibble"],
    ),
}


@pytest.mark.parametrize("alias", ["itself", "symbolic link", "hard link", "through a folder"])
@pytest.mark.parametrize("command", COMMANDS)
def test_an_input_is_never_written_over(command, alias, folder, tmp_path):
    name, arguments = COMMANDS[command]
    source, before = folder / name, contents(folder)
    out = source
    if alias == "symbolic link":
        out = tmp_path / "link.safetensors"
        out.symlink_to(source)
    elif alias == "hard link" and source.is_file():
        out = tmp_path / "hard.safetensors"
        os.link(source, out)
    elif alias == "through a folder":
        (tmp_path / "again").symlink_to(folder, target_is_directory=True)
        out = tmp_path / "again" / name
    ended = run(arguments(folder, out), tmp_path / "log")
    assert ended.code == 1, ended.text
    assert str(out) in ended.text
    assert (
        "would be written over" in ended.text
        or "is there already" in ended.text
        or "Give another name" in ended.text
    )
    assert contents(folder) == before
    assert out.is_symlink() == (alias == "symbolic link")


def test_nothing_beside_the_destination_is_an_input(folder, tmp_path):
    """The plot of `allocate` goes beside the file that it writes, as do the losses of a training."""
    before = contents(folder)
    (folder / "q.png").symlink_to(folder / "m.safetensors")
    asked = [
        "allocate",
        folder / "m.safetensors",
        folder / "q",
        "--calibration",
        folder / "a",
        "--budget",
        "A3",
    ]
    ended = run(asked, tmp_path / "log")
    assert ended.code == 1
    assert "q.png: is read by this command" in ended.text
    (folder / "q.png").unlink()
    assert contents(folder) == before


def test_gains_do_not_replace_those_kept_beside_the_calibration(folder, tmp_path):
    table = folder / "a.gains.json"
    table.write_text("{}")
    ended = run(["gains", folder / "pipe" / "transformer", folder / "a", table], tmp_path / "log")
    assert ended.code == 1
    assert "a.gains.json: is read by this command" in ended.text
    assert table.read_text() == "{}"


REPORTS = {
    "bench": lambda out: ["bench", "--json", out, "--device", "cpu"],
    "bench-fit": lambda out: ["bench-fit", "--json", out, "--device", "cpu"],
    "demo": lambda out: ["demo", "--out", out.parent],
}


@pytest.mark.parametrize("command", REPORTS)
def test_reports_are_refused_before_minutes_of_work(command, tmp_path):
    """A folder or a pipe in the place of what is written at the end."""
    place = {"demo": "report.json"}.get(command, "found.json")
    for make in (Path.mkdir, os.mkfifo):
        out = tmp_path / make.__name__ / place
        out.parent.mkdir()
        make(out)
        ended = run(REPORTS[command](out), tmp_path / "log")
        assert ended.code == 1
        assert ended.text.startswith(f"nibble: {out}: a "), ended.text
        assert [p.name for p in out.parent.iterdir()] == [place]


@pytest.mark.parametrize("suffix", [".txt", ".png"])
def test_figures_are_not_replaced_by_their_own_plot(suffix, tmp_path):
    ended = run(["bench", "--json", tmp_path / f"b{suffix}"], tmp_path / "log")
    assert ended.code == 1
    assert "would take their place. Name another file, such as" in ended.text


def test_a_folder_of_the_users_beside_the_destination_stays(folder, tmp_path):
    mine = tmp_path / "q.safetensors.partial"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years")
    ended = run(
        ["quantize", folder / "m.safetensors", tmp_path / "q.safetensors", "--method", "rtn"],
        tmp_path / "log",
    )
    assert ended.code == 1
    assert "q.safetensors.partial: is in the way of unfinished work, and Nibble has not made it" in ended.text
    assert (mine / "thesis.txt").read_text() == "years"


def test_a_calibration_with_other_options_stays(tmp_path):
    assert run(["calibration", tmp_path / "c", "12"], tmp_path / "log").code == 0
    before = contents(tmp_path / "c")
    ended = run(["calibration", tmp_path / "c", "13"], tmp_path / "log")
    assert ended.code == 1
    assert (
        "c: holds 24 of 24 samples of another calibration (steps: 12 there, 13 here). Name another folder"
        in ended.text
    )
    assert contents(tmp_path / "c") == before


def test_a_source_that_changes_under_a_stopped_run_is_quantized_anew(folder, tmp_path):
    """Only what a fingerprint does not sample has changed: one value of a weight, and a bias."""
    source, out = folder / "m.safetensors", tmp_path / "q.safetensors"
    command = ["quantize", source, out, "--method", "rtn", "--device", "cpu"]
    assert run(command, tmp_path / "log", stop_after=9).code != 0
    pieces = len(list(tmp_path.glob("*.partial/*.nibble.safetensors")))
    assert pieces == 9
    state = load_file(source)
    weight, bias = "double_blocks.0.img_attn.qkv.weight", "double_blocks.0.txt_attn.proj.bias"
    state[weight].view(-1)[1] += 1
    state[bias] += 1
    save_file(state, source)
    assert run(command, tmp_path / "log").code == 0
    resumed = contents(tmp_path)["q.safetensors"]
    assert run([*command[:2], tmp_path / "again" / "q.safetensors", *command[3:]], tmp_path / "log").code == 0
    assert resumed == contents(tmp_path / "again")["q.safetensors"]
    assert torch.equal(load_file(out)[bias], load_file(source)[bias])


def test_leftovers_are_listed_and_removed_where_told(folder, tmp_path):
    source, out = folder / "m.safetensors", tmp_path / "models" / "q.safetensors"
    assert (
        run(
            ["quantize", source, out, "--method", "rtn", "--device", "cpu"], tmp_path / "log", stop_after=9
        ).code
        != 0
    )
    (out.parent / "mine.txt").write_text("mine")
    (out.parent / "thesis.nibble-tmp").mkdir()
    (out.parent / "thesis.nibble-tmp" / "all.txt").write_text("years")
    listed = run(["clean", out.parent], tmp_path / "log")
    assert listed.code == 0
    assert f"{out}.partial  (rtn: 9 finished pieces, begun 20" in listed.text
    assert "the same command with --remove removes them" in listed.text
    assert len(list(tmp_path.glob("models/*.partial/*.nibble.safetensors"))) == 9
    assert "MB removed" in run(["clean", out.parent, "--remove"], tmp_path / "log").text
    assert sorted(p.name for p in out.parent.rglob("*")) == ["all.txt", "mine.txt", "thesis.nibble-tmp"]
    assert run(["clean", out.parent], tmp_path / "log").text == "nothing is left of stopped runs\n"


def test_settings_that_differ_are_named(folder, tmp_path):
    source, out = folder / "m.safetensors", tmp_path / "q.safetensors"
    assert (
        run(
            ["quantize", source, out, "--method", "rtn", "--device", "cpu"], tmp_path / "log", stop_after=3
        ).code
        != 0
    )
    ended = run(["quantize", source, out, "--method", "convrot", "--device", "cpu"], tmp_path / "log")
    assert ended.code == 1
    assert "3 finished pieces of another run, since 20" in ended.text
    assert "(method: rtn there, convrot here" in ended.text
    assert f"nibble clean {out}.partial --remove" in ended.text
    assert (
        json.loads((tmp_path / "q.safetensors.partial" / "nibble-unfinished.json").read_text())["settings"][
            "method"
        ]
        == "rtn"
    )


def test_a_calibration_that_was_not_finished_is_a_leftover(tmp_path):
    import time

    from comfyui_nibble.tests.reliability.runs import Run

    going = Run(["calibration", tmp_path / "c"], tmp_path / "log")
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("c/pass-*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    going.kill()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    assert " of 48 sampling runs)" in run(["clean", tmp_path], tmp_path / "log").text
    run(["clean", tmp_path, "--remove"], tmp_path / "log")
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["c", "log", "mine.txt"]
