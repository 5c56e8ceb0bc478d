"""`nibble inspect` reads headers: what only computing needs is not imported for it."""

import json
import subprocess
import sys

import pytest

from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.assets.synthetic import flux_shapes, save_random

# Triton and all that launches its kernels, and the parts of torch that the pack's decorators once brought in:
# these were 1.6 of 2.9 s.
HEAVY = (
    "triton",
    "torch._dynamo",
    "torch._inductor",
    "sympy",
    "diffusers",
    "comfyui_nibble.kernels.quant_activation",
    "comfyui_nibble.kernels.quant_linear.fused",
    "comfyui_nibble.kernels.quant_linear.launch",
    "comfyui_nibble.kernels.quant_linear.triton",
    "comfyui_nibble.kernels.weight_only",
    "comfyui_nibble.kernels.fp4.launch",
    "comfyui_nibble.kernels.fp4.triton",
    "comfyui_nibble.kernels.quant_linear.fp4",
    "comfyui_nibble.quant_core.methods",
    "comfyui_nibble.quant_core.training",
    "comfyui_nibble.quant_core.evaluation",
)
CODE = """
import json, sys
sys.argv = ["nibble", "inspect", "--json", sys.argv[1]]
from comfyui_nibble.quant_core.cli.commands import main
try:
    main()
finally:
    print(json.dumps(sorted(sys.modules)), file=sys.stderr)
"""


def imported(path):
    """(what the command prints, the modules that its process holds in the end)."""
    done = subprocess.run([sys.executable, "-c", CODE, str(path)], capture_output=True, text=True, check=True)
    return json.loads(done.stdout), json.loads(done.stderr.splitlines()[-1])


@pytest.mark.parametrize("quantized", [False, True])
def test_a_header_is_read_without_kernels(tmp_path, quantized):
    from comfyui_nibble.quant_core.cli.quantize import quantize_file

    path = tmp_path / "model.safetensors"
    save_random(path, flux_shapes(hidden=128, context=64, pooled=64))
    if quantized:
        source, path = path, tmp_path / "quantized.safetensors"
        method = METHODS["convrot"]
        quantize_file(source, path, method, method.configured(), None, "cpu")
    found, modules = imported(path)
    assert found["family"]
    assert [m for m in modules if any(m == heavy or m.startswith(f"{heavy}.") for heavy in HEAVY)] == []


def test_compiled_functions_are_marked_as_torch_marks_them():
    import torch

    from comfyui_nibble.kernels.operator.compiling import constant_when_compiled

    ours, theirs = (lambda: 1), (lambda: 1)
    assert vars(constant_when_compiled(ours)) == vars(torch.compiler.assume_constant_result(theirs))
