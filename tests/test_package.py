"""The pack imports anywhere, keeps its imports relative and its layers apart."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for folder in ("nodes", "quant_core", "kernels") for p in (ROOT / folder).rglob("*.py")] + [ROOT / "__init__.py"]


def absolute_imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_inside_the_pack_are_relative(path):
    found = set(absolute_imports(path))
    assert not found & {"comfyui_nibble", "nodes", "kernels", "quant_core", "utils"}
    if ROOT / "nodes" not in path.parents:
        assert not found & {"comfy", "comfy_api", "folder_paths"}


def test_imports_without_comfyui_triton_and_gpu():
    code = """
import sys
for name in ("comfy", "comfy_api", "folder_paths", "triton", "diffusers", "matplotlib"):
    sys.modules[name] = None
import comfyui_nibble, comfyui_nibble.kernels, comfyui_nibble.quant_core.cli
from comfyui_nibble.quant_core import inspect, quantize_file
from comfyui_nibble.quant_core.methods import METHODS
assert comfyui_nibble.WEB_DIRECTORY == "./nodes/web" and METHODS
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_every_module_is_packaged():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    wanted = {".".join(("comfyui_nibble", *p.parent.relative_to(ROOT).parts)) for p in SOURCES if p.name == "__init__.py"}
    assert packages == wanted


def test_version_is_one():
    from comfyui_nibble.quant_core.formats.provenance import VERSION

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


def test_requirements_never_name_torch():
    lines = [line.split("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    names = {line.split(";")[0].split(">")[0].split("=")[0].strip() for line in lines if line}
    assert names == {"numpy", "platformdirs", "safetensors", "tqdm", "triton", "triton-windows"}
    assert not any(p in ("torch", "triton") for p in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def test_every_node_has_a_help_page():
    ids = {line.split('"')[1] for p in (ROOT / "nodes").glob("*.py") for line in p.read_text().splitlines() if "node_id=" in line}
    assert len(ids) == 11
    assert {p.stem for p in (ROOT / "nodes" / "web" / "docs").glob("*.md")} == ids


def test_default_prompts():
    from comfyui_nibble.quant_core.calibration.prompts import default_prompts

    prompts = default_prompts()
    assert len(prompts) == len(set(prompts)) == 64
    assert all(p == p.strip() and len(p.split()) >= 3 for p in prompts)
