"""The pack runs wherever it lies: ComfyUI imports a custom node under the path of its folder, with whatever
letters that has."""

import json
import os
import subprocess
import sys

import pytest

from comfyui_nibble.tests.support import copy_of_the_pack

# Each folder is imported as ComfyUI's `load_custom_node` does, then runs one layer through its operators in
# Triton's interpreter.
RUN = """
import importlib.util, json, os, sys
import torch

torch.manual_seed(0)
x, weight = torch.randn(5, 128).half(), torch.randint(-128, 128, (16, 64), dtype=torch.int8)
found = []
for folder in sys.argv[1:]:
    name = folder.replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, os.path.join(folder, "__init__.py"))
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    of = lambda path: importlib.import_module(f"{name}.{path}")
    parts = of("kernels.operator.spec")
    layer = parts.LinearSpec(128, 16, (parts.PartSpec(0, 128, parts.WeightSpec(), parts.ActivationSpec()),), False)
    tensors, target = {"weight": weight, "weight_scale": torch.full((2, 16), 0.01).half()}, of("kernels.target").interpreter()
    y = of("kernels.dispatch").quant_linear(x, layer, tensors, target=target).float()
    naive = of("kernels.quant_linear.naive").quant_linear(x, layer, tensors)
    found.append({
        "namespace": of("kernels.quant_linear.op").NAMESPACE,
        "path": of("kernels.dispatch").choose(layer, target).path,
        "error": float((y - naive).norm() / naive.norm()),
        "output": y.tolist(),
    })
print(json.dumps(found))
"""


FOLDERS = [
    f"{name}/custom_nodes/ComfyUI-Nibble" for name in ("AI绘画", "ü", "Модели и узлы", "1.2 (copy)", "🎨")
]
# In one folder, names that differ in one letter outside of ASCII or in what is no letter at all.
FOLDERS += [f"custom_nodes/Nibble{name}" for name in ("ü", "ö", "_", "-")]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{folder: what its copy of the pack computed}, all in one process."""
    root = tmp_path_factory.mktemp("packs")
    folders = [str(copy_of_the_pack(root / name)) for name in FOLDERS]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": "", "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", RUN, *folders], capture_output=True, encoding="utf-8", env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(zip(FOLDERS, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_layer_runs_in_a_folder_of_any_name(found, folder):
    assert found[folder]["namespace"].isascii()
    assert found[folder]["path"] == "int8 tensor cores"
    assert found[folder]["error"] < 5e-4  # the output's own rounding to fp16
    assert found[folder]["output"] == found[FOLDERS[0]]["output"]


def test_copies_in_one_process_have_operators_of_their_own(found):
    assert len({of["namespace"] for of in found.values()}) == len(FOLDERS)
