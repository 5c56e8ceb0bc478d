"""Files of other makers: what they are and what loads them is said by every reader, before any work."""

import json

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.convert.inspect import describe, description_text
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.detect import open_quantized
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.synthetic import flux_shapes, random_state
from comfyui_nibble.tests.support import nibble

pytestmark = pytest.mark.quick

NAME, N, K = "double_blocks.0.img_mlp.2", 256, 1024
FP8, E5M2 = torch.zeros(N, K, dtype=torch.float8_e4m3fn), torch.zeros(N, K, dtype=torch.float8_e5m2)
BYTES = lambda *shape: torch.zeros(shape, dtype=torch.uint8)
TAKE = "take the model in 16 bit, or in fp8 with a scale a tensor or a row"
# {case: (tensors beside or instead of the layer's weight, declared format or None, what is said)}
CASES = {
    "mxfp8, undeclared": ({"weight": FP8, "weight_scale": BYTES(N, K // 32)}, None,
    "mxfp8, .*does not declare them"),
    "nvfp4, undeclared": ({"weight": BYTES(N, K // 2), "weight_scale": FP8[:, : K // 16],
    "weight_scale_2": torch.ones(())}, None, "nvfp4, .*does not declare them"),
    "asym, undeclared": ({"weight": BYTES(N, K // 2).view(torch.int8), "weight_s_rel": FP8[:, : K // 16]},
    None, "asym_w4a8_int8, .*does not declare them"),
    "DeepSeek": ({"weight": FP8, "weight_scale_inv": torch.ones(N // 128, K // 128)}, None,
    f"block-wise fp8 .*ComfyUI does not; {TAKE}"),
    "DeepSeek, one block": ({"weight": FP8, "weight_scale_inv": torch.ones(1, 1)}, None,
    f"block-wise fp8 .*ComfyUI does not; {TAKE}"),
    "blocks": ({"weight": E5M2, "weight_scale": torch.ones(N // 128, K // 128)}, None,
    f"block-wise fp8 .*ComfyUI does not read it; {TAKE}"),
    "blocks of a row": ({"weight": FP8, "scale_weight": torch.ones(N, K // 128).bfloat16()}, None,
    f"block-wise fp8 .*{TAKE}"),
    "bitsandbytes": ({"weight": BYTES(N * K // 2, 1), "weight.absmax": BYTES(64),
    "weight.quant_map": torch.ones(16)}, None, f"bitsandbytes, .*{TAKE}"),
    "bitsandbytes, 8 bit": ({"weight": BYTES(N, K).view(torch.int8), "SCB": torch.ones(N)}, None,
    f"bitsandbytes, .*{TAKE}"),
    "GPTQ": ({"qweight": torch.zeros(K // 8, N, dtype=torch.int32),
    "qzeros": torch.zeros(8, N // 8, dtype=torch.int32), "scales": torch.ones(8, N)}, None,
    f"GPTQ or AWQ .*{TAKE}"),
    "compressed-tensors": ({"weight_packed": BYTES(N, K // 2), "weight_scale": FP8[:, : K // 16]}, None,
    f"compressed-tensors, .*{TAKE}"),
    "int8 in tiles": ({"weight": BYTES(N, K).view(torch.int8), "weight_scale": torch.ones(N // 128, K // 128),
    "input_scale": torch.ones(())}, "int8_blockwise",
    "format 'int8_blockwise' of convert_to_quant, a scale for each tile"),
    "fp8 in tiles": ({"weight": FP8, "weight_scale": torch.ones(N // 64, K // 64)}, "float8_e4m3fn_blockwise",
    f"block-wise fp8 .*{TAKE}"),
    "int8, undeclared": ({"weight": BYTES(N, K).view(torch.int8), "scale_weight": torch.ones(())}, None,
    "int8 that is not declared .*--convert-int8-scaled"),
    "unknown": ({"weight": FP8, "weight_scale": torch.ones(())}, "fp8_of_tomorrow",
    "unknown format 'fp8_of_tomorrow'"),
    "mixed": ({"weight": FP8, "weight_scale": torch.ones(())}, "int8_tensorwise",
    "declared as int8_tensorwise, found F8_E4M3"),
}  # fmt: skip
READERS = {
    "inspect": describe,
    "quantize": lambda path: nibble("quantize", path, path.with_name("out.safetensors"), "--method", "rtn"),
    "convert": lambda path: nibble("convert", path, path.with_name("out.safetensors"), "--to", "nibble"),
    "load": open_quantized,
}


@pytest.fixture(scope="module")
def state():
    return random_state(flux_shapes(1, 0, 256, 64, 64))


def written(path, state, leaves, declared, in_header=False, prefix=""):
    out = {k: t for k, t in state.items() if k != f"{NAME}.weight"} | {
        f"{NAME}.{leaf}": t.contiguous() for leaf, t in leaves.items()
    }
    conf, metadata = json.dumps({"format": declared}), {}
    if declared and in_header:
        metadata["_quantization_metadata"] = json.dumps({"layers": {f"{prefix}{NAME}": {"format": declared}}})
    elif declared:
        out[f"{NAME}.comfy_quant"] = torch.tensor(list(conf.encode()), dtype=torch.uint8)
    save_file({prefix + k: t for k, t in out.items()}, path, metadata)
    return path


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", CASES)
def test_each_reader_names_the_format(tmp_path, state, case, reader):
    leaves, declared, said = CASES[case]
    path = written(tmp_path / "model.safetensors", state, leaves, declared)
    with pytest.raises(CheckpointError, match=said) as caught:
        READERS[reader](path)
    assert str(caught.value).startswith(f"{path}: ")
    assert not path.with_name("out.safetensors").exists()


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("case", [case for case, (_, declared, _) in CASES.items() if declared])
def test_declared_in_the_header(tmp_path, state, case, prefix):
    leaves, declared, said = CASES[case]
    path = written(tmp_path / "model.safetensors", state, leaves, declared, in_header=True, prefix=prefix)
    for reader in ("inspect", "load"):
        with pytest.raises(CheckpointError, match=said):
            READERS[reader](path)


def test_formats_of_a_text_encoder_beside_the_network_are_its_own(tmp_path, state):
    whole = {f"model.diffusion_model.{k}": t for k, t in state.items()}
    layer, _, _ = CASES["nvfp4, undeclared"]
    whole |= {f"text_encoders.t5.layer.{leaf}": t.contiguous() for leaf, t in layer.items()}
    header = {
        "_quantization_metadata": json.dumps({"layers": {"text_encoders.t5.layer": {"format": "nvfp4"}}})
    }
    save_file(whole, tmp_path / "whole.safetensors", header)
    assert Checkpoint(tmp_path / "whole.safetensors").get("img_in.bias").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("leaves", "said"),
    [
        ({"weight": FP8}, "1 weights in float8_e4m3fn with no scales"),
        ({"weight": E5M2}, "1 weights in float8_e5m2 with no scales"),
        ({"weight": FP8, "scale_weight": torch.ones(())}, "1 weights in float8_e4m3fn with a scale a tensor"),
        (
            {"weight": FP8, "weight_scale": torch.ones(1, 1)},
            "1 weights in float8_e4m3fn with a scale a tensor",
        ),
        ({"weight": E5M2, "weight_scale": torch.ones(N, 1)}, "1 weights in float8_e5m2 with a scale a row"),
        (
            {"weight": FP8, "bias": FP8[:, 0]},
            "1 weights in float8_e4m3fn with no scales, 1 other tensors in fp8",
        ),
    ],
)
def test_inspect_says_fp8(tmp_path, state, leaves, said):
    """And counts a byte a number, as ComfyUI holds it."""
    full, path = tmp_path / "full.safetensors", written(tmp_path / "fp8.safetensors", state, leaves, None)
    save_file(state, full)
    found = describe(path)
    assert (found["kind"], found["below 16 bit"]) == ("checkpoint below 16 bit", said)
    assert f"below 16 bit: {said}" in description_text(found)
    assert "fp8" not in description_text(describe(full)).replace(str(full), "")
    assert describe(full)["kind"] == "full-precision checkpoint"
    assert found["memory"] != describe(full)["memory"]
    assert open_quantized(path).kind == f"checkpoint below 16 bit ({said})"
