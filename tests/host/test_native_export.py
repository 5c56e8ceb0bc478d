"""A native export in a ComfyUI without this pack: Load Diffusion Model takes it, and computes what the pack
does."""

import shutil

import pytest
from torch.nn.functional import gelu

from comfyui_nibble.kernels.operator.codes import NVFP4
from comfyui_nibble.quant_core.convert import replace
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.families import detect
from comfyui_nibble.quant_core.formats.kitchen import native
from comfyui_nibble.quant_core.formats.kitchen.read import KitchenFile
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.tests.codes import assert_apart_by_flips, layer_error
from comfyui_nibble.tests.host.conftest import COMFYUI
from comfyui_nibble.tests.host.graphs import FLUX_TINY, load_graph, node
from comfyui_nibble.tests.host.inside import attached_weight, forward, load, module
from comfyui_nibble.tests.host.server import Server
from comfyui_nibble.tests.host.test_adapters import QKV, adapter, merged, with_lora
from comfyui_nibble.tests.host.test_main_job import run_both
from comfyui_nibble.tests.support import relative_error


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    with Server(COMFYUI, tmp_path_factory.mktemp("stock"), pack=False) as started:
        yield started


def export(source, destination, what=None):
    own = PackFile(source)
    layers, rest = {n: own.layer(n) for n in own.specs}, {k: own.tensor(k) for k in own.rest}
    if what:
        layers, rest = replace.replaced(layers, rest, native.losses(own.specs), what)
    native.save(
        destination, layers, rest, {"family": own.family, "provenance": own.provenance, "report": own.report}
    )
    return layers


def stock_latents(stock, name, steps=8):
    """(latents, what ComfyUI's log says of the load)."""
    log = stock.base / "server.log"
    start = log.stat().st_size
    graph = load_graph(FLUX_TINY, name, steps) | {
        "load": node("UNETLoader", unet_name=name, weight_dtype="default")
    }
    latents = stock.latents(stock.run(graph), "out")
    return latents, log.read_bytes()[start:].decode(errors="replace")


def test_the_pack_is_not_there(stock):
    assert "NibbleQuantize" not in stock.get("/object_info")


def test_method_native_runs_in_stock_comfyui(server, stock):
    """One step, in fp32 on both sides, differs by codes that lie in the middle of two and fall on either
    side: 7e-5 and 2.4e-3 were seen. Over eight steps that grows to the quantization error itself (0.06 and
    0.09 off full precision here), so there only that is bounded."""
    outputs, _, path = run_both(
        server, FLUX_TINY, method="native", samples=8, steps=6, prefix="diffusion_models/native"
    )
    layers = export(path, stock.base / "models" / "diffusion_models" / "native.safetensors")
    formats = {native.format_of(layer.spec)[0] for layer in layers.values()}
    assert formats == {"convrot_w4a4", "int8_tensorwise"}
    one = server.latents(server.run(load_graph(FLUX_TINY, path.name, sample_steps=1)), "out")
    stocks, log = stock_latents(stock, "native.safetensors", steps=1)
    assert "Detected mixed precision quantization" in log
    assert not any(word in log for word in ("unet missing", "unet unexpected", "left over keys", "WARNING"))
    stock_loader = node("UNETLoader", unet_name=FLUX_TINY["model"], weight_dtype="default")
    full = server.latents(
        server.run(load_graph(FLUX_TINY, path.name, sample_steps=1) | {"load": stock_loader}), "out"
    )
    assert_apart_by_flips(full, one, stocks)
    stocks, _ = stock_latents(stock, "native.safetensors")
    assert relative_error(server.latents(outputs, "full_latent"), stocks) < 0.15


def test_svdquant_as_int8_and_16_bit(server, stock):
    """What is not native, replaced: as close to full precision as it was."""
    outputs, error, path = run_both(
        server, FLUX_TINY, method="svdquant", samples=8, steps=6, prefix="diffusion_models/notnative"
    )
    full = server.latents(outputs, "full_latent")
    for what in replace.AS:
        name = f"{what.replace(' ', '')}.safetensors"
        export(path, stock.base / "models" / "diffusion_models" / name, what)
        stocks, log = stock_latents(stock, name)
        assert ("Detected mixed precision quantization" in log) == (what == "int8")
        assert relative_error(full, stocks) < 1.1 * error


def test_every_layer_is_the_packs_own_on_the_same_input(comfy, tiny_state, one_thread, tmp_path):
    """ComfyUI's modules of 4 and of 8 bits with its own loader, in this process."""
    method, shapes = by_name("native"), {k: tuple(v.shape) for k, v in tiny_state.items()}
    made = quantize_layers(
        detect(shapes).layers(shapes),
        Tensors(tiny_state),
        method,
        method.configured(quality_db=16),
    )
    layers = {layer.name: layer for layer, _ in made}
    assert {layer.spec.parts[0].weight.bits for layer in layers.values()} == {4, 8}
    native.save(
        tmp_path / "m.safetensors",
        layers,
        {k: v for k, v in tiny_state.items() if k.rpartition(".")[0] not in layers},
        {},
    )
    patcher, seen = comfy.sd.load_diffusion_model(str(tmp_path / "m.safetensors")), {}
    for name in layers:
        keep = lambda module, args, y, name=name: seen.update({name: (args[0].clone(), y.clone())})
        patcher.model.diffusion_model.get_submodule(name).register_forward_hook(keep)
    forward(patcher)
    assert set(seen) == set(layers)
    for name, (x, y) in seen.items():
        rows, layer = x.flatten(0, -2), layers[name]
        assert layer_error(y.flatten(0, -2), layer(rows), rows, layer.spec, layer.tensors) < 1e-6, name


def outputs_of(patcher, names):
    """{layer: (x, y)} of a forward."""
    seen = {}
    for name in names:
        keep = lambda module, args, y, name=name: seen.update({name: (args[0].clone(), y.clone())})
        patcher.model.diffusion_model.get_submodule(name).register_forward_hook(keep)
    forward(patcher)
    assert set(seen) == set(names)
    return {name: (x.flatten(0, -2), y.flatten(0, -2)) for name, (x, y) in seen.items()}


def nvfp4_export(state, path):
    """The layers that were written: the method native on the nvfp4 grid, 4 bits wherever it may."""
    method, shapes = by_name("native"), {k: tuple(v.shape) for k, v in state.items()}
    options = method.configured(quality_db=0, grid="nvfp4")
    made = quantize_layers(detect(shapes).layers(shapes), Tensors(state), method, options)
    layers = {layer.name: layer for layer, _ in made}
    rest = {k: v for k, v in state.items() if k.rpartition(".")[0] not in layers}
    native.save(path, layers, rest, {})
    return layers


def test_nvfp4_loads_in_stock_comfyui(stock, tiny_state):
    """Without a word of what is missing or left over. A CPU multiplies its weights by 16-bit x."""
    models = stock.base / "models" / "diffusion_models"
    shutil.copy(tiny_flux.CHECKPOINT, models / "full.safetensors")
    nvfp4_export(tiny_state, models / "nvfp4.safetensors")
    (full, _), (found, log) = (stock_latents(stock, f"{name}.safetensors", 1) for name in ("full", "nvfp4"))
    assert "Detected mixed precision quantization" in log
    assert not any(word in log for word in ("unet missing", "unet unexpected", "left over keys", "WARNING"))
    assert 0.01 < relative_error(full, found) < 0.08  # 0.055


def test_nvfp4_is_the_packs_own_on_the_same_input(comfy, tiny_state, one_thread, tmp_path):
    """The export in ComfyUI's own modules, and in the pack's. On a CPU comfy.ops leaves x of nvfp4 alone;
    here it is quantized as on cards that multiply fp4."""
    from comfyui_nibble.nodes.host.build import load as load_file

    layers = nvfp4_export(tiny_state, tmp_path / "m.safetensors")
    formats = KitchenFile(tmp_path / "m.safetensors").formats
    assert set(formats.values()) == {"nvfp4", "int8_tensorwise"}
    four = [name for name, kind in formats.items() if kind == "nvfp4"]
    assert len(four) > len(formats) / 2
    stock = comfy.sd.load_diffusion_model(str(tmp_path / "m.safetensors"))
    for name in four:
        stock.model.diffusion_model.get_submodule(name)._full_precision_mm = False
    for patcher in (stock, load_file(tmp_path / "m.safetensors")):
        for name, (x, y) in outputs_of(patcher, four).items():
            if patcher is not stock and name.endswith("mlp.2"):  # the pack computes the GELU in the layer
                x = gelu(x, approximate="tanh")
            assert relative_error(y, layers[name](x)) < 1e-5, name


def test_a_lora_beside_comfyuis_nvfp4_is_comfyuis_merge(comfy, tiny_state, one_thread, tmp_path):
    from comfyui_nibble.nodes.host.build import load as load_file

    nvfp4_export(tiny_state, tmp_path / "m.safetensors")
    made = load_file(tmp_path / "m.safetensors")
    patched = load(with_lora(made, adapter("lora", QKV)))
    layer = module(patched, QKV)
    assert layer.spec.grid == NVFP4
    want = merged(patched, QKV)
    assert relative_error(want, attached_weight(layer)) < 1e-6
    assert relative_error(want, layer.layer().dequantize()) > 0.01
