"""Bad input over HTTP: what a user reads."""

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.tests.host.graphs import FLUX_TINY, PIXART, load_graph, node, quantize_graph
from comfyui_nibble.tests.host.server import GraphError


@pytest.fixture(scope="module")
def quantized(server):
    """A ConvRot file of the small FLUX."""
    graph = quantize_graph(FLUX_TINY, method="convrot", prefix="diffusion_models/refusals")
    for name in ("calibrate", "prompts", "full", "full_latent", "quantized", "quantized_latent"):
        del graph[name]
    del graph["quantize"]["inputs"]["calibration"]
    server.run(graph)
    return "refusals_00001_.safetensors"


def models(server):
    return server.base / "models" / "diffusion_models"


def test_calibration_of_another_model(server, tiny_state):
    other = {k: (v.float() * 1.01).bfloat16() for k, v in tiny_state.items()}
    save_file(other, models(server) / "other.safetensors")
    graph = quantize_graph(FLUX_TINY, method="svdquant", samples=2, steps=1)
    graph["other"] = node("UNETLoader", unet_name="other.safetensors", weight_dtype="default")
    graph["quantize"]["inputs"]["model"] = ["other", 0]
    ours = Checkpoint(models(server) / "tiny_flux.safetensors").fingerprint()
    theirs = Checkpoint(models(server) / "other.safetensors").fingerprint()
    with pytest.raises(
        GraphError, match=f"NibbleQuantize: .*was made with model {ours}, this one is {theirs}"
    ):
        server.run(graph)


def test_nan_weight_names_the_layer(server, tiny_state):
    state = {k: v.clone() for k, v in tiny_state.items()}
    state["double_blocks.0.txt_mlp.0.weight"][0, 0] = float("inf")
    save_file(state, models(server) / "inf.safetensors")
    graph = quantize_graph(FLUX_TINY | {"model": "inf.safetensors"}, method="rtn", samples=1, steps=1)
    with pytest.raises(
        GraphError, match=r"NaN or Inf at the input of layer double_blocks.0.*sample 0, step 0"
    ):
        server.run(graph)
    del graph["quantize"]["inputs"]["calibration"], graph["calibrate"]
    with pytest.raises(GraphError, match=r"layer double_blocks.0.txt_mlp.0: NaN or Inf in its weight"):
        server.run(graph)


def test_quantized_model_is_not_quantized_again(server, quantized):
    graph = load_graph(FLUX_TINY, quantized)
    graph["again"] = node("NibbleQuantize", model=["load", 0], method="convrot", rank=32, gptq=True)
    graph["report"] = node("PreviewAny", source=["again", 1])
    with pytest.raises(GraphError, match="this model is quantized already"):
        server.run(graph)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda whole: whole[: len(whole) // 3], "broken.safetensors: not a whole safetensors file"),
        (lambda whole: b"\x80\x04" + bytes(100), "broken.safetensors: a pickled PyTorch file"),
    ],
)
def test_broken_file_is_named(server, quantized, content, message):
    whole = (server.base / "output" / "diffusion_models" / quantized).read_bytes()
    (models(server) / "broken.safetensors").write_bytes(content(whole))
    with pytest.raises(GraphError, match=message):
        server.run(load_graph(FLUX_TINY, "broken.safetensors"))


def test_full_precision_file_in_the_nibble_loader(server):
    with pytest.raises(
        GraphError, match=r"tiny_flux.safetensors: not a quantized model that this pack knows"
    ):
        server.run(load_graph(FLUX_TINY, "tiny_flux.safetensors"))


def test_full_precision_model_in_the_nibble_saver(server):
    graph = {
        "load": node("UNETLoader", unet_name="tiny_flux.safetensors", weight_dtype="default"),
        "save": node("NibbleSaveModel", model=["load", 0], filename_prefix="diffusion_models/no"),
    }
    with pytest.raises(GraphError, match="was not quantized by Nibble"):
        server.run(graph)


def test_stock_saver_refuses_a_quantized_model(server, quantized):
    graph = {
        "load": node("NibbleLoadDiffusionModel", model_name=quantized),
        "save": node("ModelSave", model=["load", 0], filename_prefix="diffusion_models/stock"),
    }
    with pytest.raises(GraphError, match="save it with Nibble Save Model"):
        server.run(graph)


def test_guidance_without_a_negative(server):
    graph = quantize_graph(PIXART, method="rtn", samples=1, steps=1, cfg=4.0)
    with pytest.raises(GraphError, match="cfg is 4 and no negative conditioning"):
        server.run({k: graph[k] for k in ("load", "prompts", "latent", "calibrate", "quantize", "report")})


def test_stock_loader_says_what_it_can_of_a_nibble_file(server, quantized):
    """Not ours to word, but it must not load silently as something else."""
    graph = load_graph(FLUX_TINY, quantized)
    graph["load"] = node("UNETLoader", unet_name=quantized, weight_dtype="default")
    with pytest.raises(GraphError):
        server.run(graph)


def test_lora_that_fits_nothing(server, quantized):
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    save_file(
        {f"{key}.lora_A.weight": torch.randn(4, 512), f"{key}.lora_B.weight": torch.randn(768, 4)},
        server.base / "models" / "loras" / "wide.safetensors",
    )
    graph = load_graph(
        FLUX_TINY,
        quantized,
        model=node(
            "LoraLoaderModelOnly", model=["load", 0], lora_name="wide.safetensors", strength_model=1.0
        ),
    )
    with pytest.raises(
        GraphError,
        match=r"double_blocks.0.img_attn.qkv.weight: a LoRA of 768 x 512 on 768 x 256 weights, made for "
        r"another model",
    ):
        server.run(graph)


def test_dit_is_for_diffusers(comfy, tmp_path):
    """ComfyUI has no such model: said before its detection sees the file."""
    from diffusers import DiTTransformer2DModel

    from comfyui_nibble.nodes.host.build import DetectionError, load
    from comfyui_nibble.quant_core.cli.quantize import quantize_file
    from comfyui_nibble.quant_core.methods import METHODS

    DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=32, num_layers=1, sample_size=8
    ).save_pretrained(tmp_path / "dit")
    quantize_file(tmp_path / "dit", tmp_path / "q.safetensors", METHODS["rtn"], METHODS["rtn"].config)
    with pytest.raises(
        DetectionError,
        match=r"q.safetensors: a DiT model, which ComfyUI does not have. It runs in a diffusers pipeline",
    ):
        load(tmp_path / "q.safetensors")
