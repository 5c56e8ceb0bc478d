"""Too small a disk, too small a limit on files: an error that names the file, what is needed and what is
free, and nothing else changed.

The disk is a tmpfs where this process may mount one (root), else the limit stands for it.
"""

import subprocess

import pytest

from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.tests.reliability.runs import contents, run, small_inputs

OLD = b"what was there before"


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    folder = tmp_path_factory.mktemp("before")
    small_inputs(folder)
    return folder


COMMANDS = {
    "quantize": (
        lambda f, out: ["quantize", tiny_flux.CHECKPOINT, out, "--method", "rtn", "--device", "cpu"],
        "q.safetensors",
    ),
    "convert": (lambda f, out: ["convert", f / "native.safetensors", out, "--to", "native"], "c.safetensors"),
    "calibrate": (lambda f, out: ["calibration", out], "calibration"),
    "merge": (lambda f, out: ["merge-calibrations", out, f / "a", f / "b"], "merged"),
}


@pytest.fixture(params=["disk", "limit"])
def small(request, tmp_path):
    """(a folder, keywords for `run`): 600 kB fit there."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = request.param == "disk" and subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs",
    str(folder)], check=False, capture_output=True).returncode == 0  # fmt: skip
    yield folder, {} if mounted else {"largest": 600_000}
    if mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("command", COMMANDS)
def test_no_room(command, before, small, tmp_path):
    (arguments, name), (folder, options) = COMMANDS[command], small
    out = folder / name
    if "." in name:
        out.write_bytes(OLD)
    ended = run(arguments(before, out), tmp_path / "log", **options)
    assert ended.code == 1, ended.text
    assert "Traceback" not in ended.text
    last = ended.text.strip().splitlines()[-1]
    assert last.startswith("nibble: ")
    assert str(out) in last
    assert "are needed" in last or "are free" in last
    assert "Make room" in last or "Raise the limit" in last
    assert "." not in name or out.read_bytes() == OLD
    assert {p.name for p in folder.iterdir()} <= {name, f"{name}.partial"}
    # With room made, the same command goes on.
    made = run(arguments(before, tmp_path / "large" / name), tmp_path / "log")
    assert made.code == 0
    assert contents(tmp_path / "large")


def test_a_quantization_goes_on_when_room_is_made(tmp_path):
    """The limit is for a layer's file: the largest fails, those before it stay."""
    out, log = tmp_path / "q.safetensors", tmp_path / "log"
    command = ["quantize", tiny_flux.CHECKPOINT, out, "--method", "rtn", "--device", "cpu"]
    ended = run([*command], log, largest=2_500_000, without_check=True)
    assert ended.code == 1
    assert "files may not become that large" in ended.text
    pieces = len(list(tmp_path.glob("*.partial/*.nibble.safetensors")))
    assert pieces == 16
    again = run(command, log)
    assert again.code == 0
    assert f"{pieces} finished pieces" in again.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log", "q.safetensors"]
