"""A nunchaku file of the small FLUX in ComfyUI: what was written and read computes what the model it was
written from does."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.kernels.operator.codes import INT, NVFP4
from comfyui_nibble.quant_core.families import detect
from comfyui_nibble.quant_core.formats.nunchaku.read import NunchakuFile
from comfyui_nibble.quant_core.formats.nunchaku.write import save
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.tests.assets import nunchaku as made
from comfyui_nibble.tests.codes import assert_repeats, record
from comfyui_nibble.tests.host.inside import forward, patcher_of
from comfyui_nibble.tests.support import relative_error, sqnr_db

pytestmark = pytest.mark.usefixtures("one_thread")


def written_of(tiny_state, path, grid):
    """({name: layer}, {key: tensor} of the rest, the opened file): SVDQuant without data, rank 16."""
    shapes, method = {k: tuple(v.shape) for k, v in tiny_state.items()}, by_name("svdquant")
    config = method.configured(rank=16, gptq=False, iterations=0, grid=grid)
    found = quantize_layers(detect(shapes).layers(shapes), Tensors(tiny_state), method, config)
    layers = {layer.name: layer for layer, _ in found}
    rest = {k: v for k, v in tiny_state.items() if k.rpartition(".")[0] not in layers}
    (note,) = save(path, layers, rest, "flux", {"method": "svdquant"})
    # On the nvfp4 grid those of modulation alone: nothing is shifted.
    assert note.startswith(f"biases of {8 if grid == INT else 4} of nunchaku's modules are rounded")
    return layers, rest, NunchakuFile(path)


@pytest.fixture(scope="module")
def written(comfy, tiny_state, tmp_path_factory):
    return written_of(tiny_state, tmp_path_factory.mktemp("nunchaku") / "tiny.safetensors", INT)


@pytest.mark.arithmetic
def test_written_and_read_is_the_same_model(written, full):
    layers, rest, opened = written
    again = {name: opened.layer(name) for name in opened.specs}
    patcher = patcher_of(again, {k: opened.tensor(k) for k in opened.rest})
    assert {n.removeprefix("diffusion_model.") for n, _ in patcher.packed_layers()} == set(layers)
    # With the biases as the format rounds them, the two differ by nothing but the sums of branches filled up
    # with zeros.
    rounded = {
        name: QuantizedLayer(name, layer.spec, layer.tensors | {"bias": again[name].tensors["bias"]})
        for name, layer in layers.items()
    }
    recorded = record(forward, patcher)
    assert_repeats(recorded, forward, patcher_of(rounded, rest))
    # The biases' own rounding moves a few 4-bit codes, which costs nothing against full precision.
    exact = forward(full)
    assert sqnr_db(exact, recorded[0]) > sqnr_db(exact, forward(patcher_of(layers, rest))) - 0.2


def test_nvfp4_written_and_read_is_the_same_model(comfy, tiny_state, full, tmp_path):
    """But for the biases, and for Four over Six of the activations, which nunchaku does not have."""
    layers, rest, opened = written_of(tiny_state, tmp_path / "fp4.safetensors", NVFP4)
    again = {name: opened.sound_layer(name) for name in opened.specs}
    patcher = patcher_of(again, {k: opened.tensor(k) for k in opened.rest})
    assert {n.removeprefix("diffusion_model.") for n, _ in patcher.packed_layers()} == set(layers)
    found = forward(patcher)
    plain = {}
    for name, layer in layers.items():
        # The file's bias, and its smoothing by one.
        tensors = again[name].tensors | {k: t for k, t in layer.tensors.items() if k != "bias"}
        plain[name] = QuantizedLayer(name, again[name].spec, tensors)
    assert torch.equal(found, forward(patcher_of(plain, rest)))
    exact = forward(full)
    assert sqnr_db(exact, found) > sqnr_db(exact, forward(patcher_of(layers, rest))) - 1


@pytest.mark.parametrize("fp4", [False, True])
def test_a_file_with_zero_points_and_joined_low_ranks(fp4, comfy, tmp_path):
    """A random file as another maker's: every layer has its place in ComfyUI's model and computes there what
    it does alone."""
    model = made.flux(hidden=256, single=2, context=128, pooled=128, fp4=fp4)
    save_file(
        {k: t.contiguous() for k, t in made.old_names(model.file).items()}, tmp_path / "random.safetensors"
    )
    opened = NunchakuFile(tmp_path / "random.safetensors")
    layers, rest = (
        {name: opened.layer(name) for name in opened.specs},
        {k: opened.tensor(k) for k in opened.rest},
    )
    patcher, g = patcher_of(layers, rest), torch.Generator().manual_seed(0)
    assert forward(patcher).isfinite().all()
    modules = {name.removeprefix("diffusion_model."): module for name, module in patcher.packed_layers()}
    assert set(modules) == set(layers)
    assert {layers[name].spec.rank for name in modules if "mod" in name} == {4}
    for name, module in modules.items():
        x = torch.randn(2, layers[name].spec.in_features, generator=g)
        assert relative_error(layers[name](x), module(x)) < 1e-5, name
