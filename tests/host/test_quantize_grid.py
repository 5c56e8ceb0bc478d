"""Nibble Quantize on another grid than whole numbers."""

import pytest
import torch

from comfyui_nibble.kernels.operator.codes import INT, NVFP4
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.inside import attached_weight, forward, load, module
from comfyui_nibble.tests.host.test_adapters import MLP, QKV, adapter, merged, with_lora
from comfyui_nibble.tests.support import relative_error


def quantized(full, method, grid):
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    with torch.inference_mode():
        return NibbleQuantize.execute(full, method, 0, False, grid=grid).args


@pytest.fixture
def saved(comfy, monkeypatch, tmp_path):
    """A function of a model that returns the path of its file."""
    import folder_paths

    from comfyui_nibble.nodes.files import NibbleSaveModel

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return lambda model: NibbleSaveModel.execute(model, "saved").args[0]


def test_nvfp4_is_closer_than_rows_of_whole_numbers_and_comes_back_from_its_file(full, saved):
    """Of round to nearest the network's output is off by 25 % with a scale a row, by 8 % on nvfp4."""
    from comfyui_nibble.nodes.host.build import load as load_file

    made, report, _ = quantized(full, "rtn", NVFP4)
    want, got = forward(full), forward(made)
    assert relative_error(want, got) < 0.4 * relative_error(want, forward(quantized(full, "rtn", INT)[0]))
    assert "W4A4 nvfp4" in report
    path = saved(made)
    assert {spec.grid for spec in PackFile(path).specs.values() if not spec.weight_only} == {NVFP4}
    assert torch.equal(forward(load_file(path)), got)


@pytest.mark.parametrize("key", [QKV, MLP])
def test_a_lora_beside_it_is_comfyuis_merge(full, key):
    made = quantized(full, "rtn", NVFP4)[0]
    patched = load(with_lora(made, adapter("lora", key)))
    want = merged(patched, key)
    assert relative_error(want, attached_weight(module(patched, key))) < 1e-6
    assert relative_error(want, module(made, key).layer().dequantize()) > 0.01
    assert torch.equal(forward(made), forward(quantized(full, "rtn", NVFP4)[0]))


def test_a_method_without_the_grid_names_those_that_have_it(full):
    with pytest.raises(ValueError, match="method robuq has no option grid; svdquant_r, .*, convrot, rtn"):
        quantized(full, "robuq", NVFP4)
