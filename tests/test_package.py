"""The pack imports anywhere, keeps its imports relative and its layers apart."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [p for folder in ("nodes", "quant_core", "kernels") for p in (ROOT / folder).rglob("*.py")] + [
    ROOT / "__init__.py"
]


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


UNPICKLED = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def opened_pickles(source: str) -> list[str]:
    """What in a source opens or writes pickles, or may make a library open them."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [alias.name for alias in node.names]
            )
            found += [name for name in names if name.split(".")[0] in UNPICKLED]
            if isinstance(node, ast.ImportFrom) and node.module == "torch":
                found += [f"torch.{alias.name}" for alias in node.names if alias.name in ("load", "save")]
        if (
            isinstance(node, ast.Attribute)
            and node.attr in ("load", "save", "hub", "package")
            and getattr(node.value, "id", "") == "torch"
        ):
            found.append(f"torch.{node.attr}")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            said = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if (
                node.func.attr in ("from_pretrained", "from_single_file")
                and said.get("use_safetensors") is not True
            ):
                found.append(f"{node.func.attr} without use_safetensors=True")
            if said.get("allow_pickle"):
                found.append("allow_pickle")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_opens_or_writes_pickles(path):
    assert opened_pickles(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import torch\ntorch.load(p, weights_only=True)", ["torch.load"]),
        ("from torch import save as s", ["torch.save"]),
        ("import pickle as p", ["pickle"]),
        ("from pickle import loads", ["pickle"]),
        ("numpy.load(p, allow_pickle=True)", ["allow_pickle"]),
        ("Model.from_pretrained(p)", ["from_pretrained without use_safetensors=True"]),
        ("Model.from_pretrained(p, use_safetensors=None)", ["from_pretrained without use_safetensors=True"]),
        ("Model.from_pretrained(p, use_safetensors=True)", []),
        ("state.load(p)\nloaded = load_file(p)", []),
    ],
)
def test_the_search_for_pickles_finds_them(source, found):
    assert opened_pickles(source) == found


def test_imports_without_comfyui_triton_and_gpu():
    code = """
import sys
for name in ("comfy", "comfy_api", "folder_paths", "triton", "diffusers", "matplotlib"):
    sys.modules[name] = None
import comfyui_nibble, comfyui_nibble.kernels, comfyui_nibble.quant_core.cli.commands
from comfyui_nibble.quant_core.cli import quantize
from comfyui_nibble.quant_core.convert import inspect
from comfyui_nibble.quant_core.methods import METHODS
assert comfyui_nibble.WEB_DIRECTORY == "./nodes/web" and METHODS
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_every_module_is_packaged():
    packages = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    wanted = {
        ".".join(("comfyui_nibble", *p.parent.relative_to(ROOT).parts))
        for p in SOURCES
        if p.name == "__init__.py"
    }
    assert packages == wanted


def test_version_is_one():
    from comfyui_nibble.quant_core.run.provenance import VERSION

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == VERSION


def requirements(name):
    """{package: Requirement} of a file, in the words of pip."""
    lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    return {requirement.name: requirement for requirement in found}


def test_requirements_never_name_torch_or_triton():
    """A `triton` from PyPI would overwrite that of a ROCm build of torch, and a triton-windows of another
    torch break torch.compile."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    named = {Requirement(line).name for line in dependencies}
    assert not {"torch", "triton", "triton-windows"} & (named | set(requirements("requirements.txt")))


def test_both_lists_of_requirements_are_the_same():
    """ComfyUI Manager installs requirements.txt, pip and the registry read pyproject.toml."""
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert {str(r) for r in requirements("requirements.txt").values()} == {
        str(Requirement(line)) for line in dependencies
    }


def test_triton_for_windows_is_bounded_and_for_windows_alone():
    (triton,) = requirements("requirements-windows.txt").values()
    assert triton.name == "triton-windows"
    assert [
        str(v) for v in ("3.5.1.post24", "3.6.0.post26", "3.7.0.post26") if triton.specifier.contains(v)
    ] == ["3.6.0.post26"]
    assert [s for s in ("Windows", "Linux", "Darwin") if triton.marker.evaluate({"platform_system": s})] == [
        "Windows"
    ]


def test_every_bound_on_triton_is_one_that_the_kernels_take():
    """The table in the comment too: a minor version each, from the oldest that the kernels take on."""
    from comfyui_nibble.kernels.target import MIN_TRITON

    bounds = re.findall(
        r"triton-windows>=(\d+)\.(\d+),<(\d+)\.(\d+)", (ROOT / "requirements-windows.txt").read_text()
    )
    assert sorted(bounds) == [("3", str(n), "3", str(n + 1)) for n in range(MIN_TRITON[1], 9)]


def test_runs_without_triton():
    """The eager path, on any card: a layer computes, and the reason is said."""
    code = """
import sys
from importlib import metadata
sys.modules["triton"] = None
version = metadata.version
def without(name):
    if "triton" in name:
        raise metadata.PackageNotFoundError(name)
    return version(name)
metadata.version = without
import torch
from comfyui_nibble.kernels.dispatch import choose, quant_linear
from comfyui_nibble.kernels.quant_linear import naive
from comfyui_nibble.kernels.target import Target, target_of
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
assert target_of("cpu").triton is None
spec = LinearSpec(128, 16, (PartSpec(0, 128, WeightSpec(), ActivationSpec()),), False)
tensors = {"weight": torch.randint(-128, 128, (16, 64), dtype=torch.int8), "weight_scale": torch.full((2, 16), 0.01)}
x = torch.randn(5, 128)
assert torch.allclose(quant_linear(x, spec, tensors), naive.quant_linear(x, spec, tensors), rtol=1e-4, atol=1e-4)
for target in (Target("cuda", 89), Target("hip", "gfx1100")):
    assert str(choose(spec, target)).startswith("eager; "), choose(spec, target)
    assert "Triton is not installed" in str(choose(spec, target)), choose(spec, target)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_required_comfyui_has_three_numbers():
    import comfyui_nibble

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["comfy"]["requires-comfyui"]
    assert wanted == f">={'.'.join(map(str, comfyui_nibble.TESTED))}" == ">=0.31.0"


@pytest.mark.parametrize("version", ["0.31.0", "0.33.0", "v0.46.1", "1.0", "0.38.1-rc2", "unknown", ""])
def test_hosts_that_are_tested_pass(version, caplog):
    import comfyui_nibble

    comfyui_nibble.require_host(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.24.0", "0.24", "0.28.1", "0.30.9"])
def test_hosts_that_only_ran_the_main_job_are_told_so_in_one_line(version, caplog):
    import comfyui_nibble

    comfyui_nibble.require_host(version)
    (record,) = caplog.records
    assert record.getMessage() == (
        f"ComfyUI-Nibble needs ComfyUI 0.31.0 or newer, this is {version}. On 0.24 to 0.30 calibrating, "
        "quantizing, saving, loading and "
        "LoRAs ran; the rest was not tried there. Update ComfyUI where something fails."
    )


@pytest.mark.parametrize("version", ["0.23.9", "0.18.0", "0.3.64", "v0.2.7"])
def test_older_hosts_get_one_line(version):
    """Before anything of the nodes is imported, which would fail with the name of something missing."""
    code = f"""
import asyncio, sys, types
sys.modules["comfyui_version"] = types.SimpleNamespace(__version__="{version}")
import comfyui_nibble
try:
    asyncio.run(comfyui_nibble.comfy_entrypoint())
except RuntimeError as error:
    assert str(error) == "ComfyUI-Nibble needs ComfyUI 0.31.0 or newer, this is {version}. Update ComfyUI.", error
else:
    raise SystemExit("no error")
assert not any(name.startswith("comfyui_nibble.") for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")


def test_every_node_has_a_help_page():
    ids = {
        line.split('"')[1]
        for p in (ROOT / "nodes").glob("*.py")
        for line in p.read_text().splitlines()
        if "node_id=" in line
    }
    assert len(ids) == 14
    assert {p.stem for p in (ROOT / "nodes" / "web" / "docs").glob("*.md")} == ids


def test_default_prompts():
    from comfyui_nibble.quant_core.calibration.prompts import default_prompts

    prompts = default_prompts()
    assert len(prompts) == len(set(prompts)) == 64
    assert all(p == p.strip() and len(p.split()) >= 3 for p in prompts)
