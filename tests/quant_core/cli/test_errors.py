"""What the command says where something is wrong; nothing of a file reaches the terminal unescaped."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from comfyui_nibble.quant_core.cli import shared
from comfyui_nibble.quant_core.cli.shared import echo, note
from comfyui_nibble.quant_core.convert import convert
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.detect import open_quantized
from comfyui_nibble.quant_core.formats.nibble import PackFile, save
from comfyui_nibble.tests.support import nibble


def command(*args):
    return subprocess.run(
        [
            sys.executable,
            "-c",
            "from comfyui_nibble.quant_core.cli.commands import main; main()",
            *map(str, args),
        ],
        capture_output=True,
        cwd="/",
        text=True,
        check=False,
    )


@pytest.mark.quick
def test_nan_weight_names_the_layer(tmp_path, tiny_state):
    state = {k: v.clone() for k, v in tiny_state.items()}
    state["single_blocks.1.linear2.weight"][3, 5] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    result = command(
        "quantize",
        tmp_path / "nan.safetensors",
        tmp_path / "q.safetensors",
        "--method",
        "rtn",
        "--device",
        "cpu",
    )
    assert result.returncode == 1
    assert "nan.safetensors: layer single_blocks.1.linear2: NaN or Inf in its weight" in result.stderr
    assert not (tmp_path / "q.safetensors").exists()


def test_calibration_of_another_model_names_both(tmp_path, tiny_state, calibration):
    state = {k: v + 1 for k, v in tiny_state.items()}
    save_file(state, tmp_path / "other.safetensors")
    result = command(
        "quantize",
        tmp_path / "other.safetensors",
        tmp_path / "q.safetensors",
        "--calibration",
        calibration,
        "--device",
        "cpu",
    )
    ours, theirs = (
        Checkpoint(tiny_flux.CHECKPOINT).fingerprint(),
        Checkpoint(tmp_path / "other.safetensors").fingerprint(),
    )
    assert result.returncode == 1
    assert f"was made with model {ours}, this one is {theirs}" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("inspect", "nothing.safetensors"), "nothing.safetensors: not found"),
        (("quantize", "nothing.safetensors", "out"), "nothing.safetensors: not found"),
        (("quantize", "a", "b", "--method", "magic"), "unknown method 'magic'"),
        (("quantize", "a", "b", "--training", "long"), "unknown training 'long'"),
        (("quantize", "a", "b", "--training", "best"), "method svdquant_r has no training"),
        (("calibrate", ".", "out"), "not a diffusers pipeline folder"),
        (
            ("allocate", "a", "b", "--calibration", "c", "--budget", "3"),
            "budget '3': expected an average of bits",
        ),
        (
            ("allocate", "a", "b", "--calibration", "c", "--budget", "A3", "--menu", "all"),
            "unknown menu 'all'",
        ),
    ],
)
def test_errors_are_one_line(args, message, tmp_path):
    result = command(*args)
    assert result.returncode == 1
    assert result.stderr.startswith("nibble: ")
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_what_a_file_says_reaches_the_terminal_without_control_characters(tmp_path):
    state = load_file(tiny_flux.CHECKPOINT)
    save_file(state | {"\x1b[2J\nnibble: all is well": torch.zeros(3, 3)}, tmp_path / "m.safetensors")
    found = command("inspect", tmp_path / "m.safetensors")
    assert found.returncode == 0
    assert found.stdout.replace("\n", "").isprintable()
    save_file({"\x1b[2J" + "x" * 100_000: torch.zeros(1)}, tmp_path / "m.safetensors")
    found = command("inspect", tmp_path / "m.safetensors")
    assert found.returncode == 1
    assert found.stderr.startswith(f"nibble: {tmp_path / 'm.safetensors'}: the names of all 1 tensors begin")
    assert "\\x1b[2Jxxx" in found.stderr
    assert found.stderr.removesuffix("\n").isprintable()
    assert len(found.stderr) < 1000


def test_all_that_commands_print_is_without_control_characters(capsys):
    """One function prints; errors have a bounded length beside."""
    echo("\x1b[2J\x07\x9b\u202ename\nnext")
    note("\x07")
    assert capsys.readouterr() == ("\\x1b[2J\\x07\\x9b\\u202ename\nnext\n", "\\x07\n")
    folder = Path(shared.__file__).parent
    used = [(p.name, line.strip()) for p in folder.glob("*.py") for line in p.read_text().splitlines()]
    printed = [found for found in used if "typer.echo" in found[1] or re.search(r"\bprint\(", found[1])]
    assert [name for name, _ in printed] == ["commands.py", "shared.py"]
    assert "sentence(" in printed[0][1]


def test_converting_prints_names_without_control_characters(tmp_path):
    bell = "a\x07\x1b[31m"
    layers = {f"blocks.{i}.{bell}.weight": torch.randn(128, 128) for i in range(2)}
    save_file(layers | {"norm_out.weight": torch.ones(128)}, tmp_path / "m.safetensors")
    nibble("quantize", tmp_path / "m.safetensors", tmp_path / "q.safetensors", "--method", "rtn")
    planned = convert.plan(open_quantized(tmp_path / "q.safetensors"), "nunchaku")
    assert bell not in "".join(planned.lines())
    assert r"a\x07\x1b[31m" in "".join(planned.lines())


def test_a_report_with_a_name_of_control_characters_is_shown_without_them(tmp_path):
    nibble("quantize", tiny_flux.CHECKPOINT, tmp_path / "q.safetensors", "--method", "rtn")
    opened = PackFile(tmp_path / "q.safetensors")
    report = [*opened.report, opened.report[0] | {"name": "\x1b[31mred", "note": "\x07", "nbytes": 0}]
    layers = {name: opened.layer(name) for name in opened.specs}
    save(
        tmp_path / "r.safetensors",
        layers,
        {k: opened.tensor(k) for k in opened.rest},
        "flux",
        {"by": "\x1b"},
        report,
    )
    text = nibble("inspect", tmp_path / "r.safetensors")
    assert r"\x1b[31mred" in text
    assert text.replace("\n", "").isprintable()
