"""Odd texts in `comfy_quant`: what ComfyUI takes is taken, and computes the same; what it fails on is refused
by name."""

import json

import pytest
import torch

from comfyui_nibble.quant_core.formats.kitchen.declared import DeclarationError, of_tensor
from comfyui_nibble.quant_core.formats.kitchen.layers import spec_of, tensors_of
from comfyui_nibble.quant_core.formats.kitchen.stored import LayoutError, Stored, gather
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.tests.support import relative_error

N, K = 32, 256
INT8, CONVROT = {"format": "int8_tensorwise"}, {"format": "convrot_w4a4"}
ON = INT8 | {"convrot": True}
ODD = [
    # switches: on where Python calls the value true
    *({**INT8, "convrot": value} for value in (None, False, True, 0, 1, "", "false", "true", [], {}, 0.0)),
    *(
        {**conf, "full_precision_matrix_mult": value}
        for conf in (INT8, CONVROT)
        for value in (None, False, True, 0, 1, "false", "")
    ),
    INT8 | {"params": {"full_precision_matrix_mult": True}},
    # sizes: what int() makes of it
    *(
        {**conf, "convrot_groupsize": value}
        for conf in (ON, CONVROT)
        for value in (4, 16, 64, 256, "64", " 64 ", 64.0, 64.9)
    ),
    *(
        {**conf, "convrot_groupsize": value}
        for conf in (ON, CONVROT)
        for value in (None, "", "big", [64], True, 0, -64, 2, 32, 128, 1024)
    ),
    INT8 | {"convrot": None, "convrot_groupsize": "never looked at"},
    # where options are looked for
    INT8 | {"params": {"convrot": True, "convrot_groupsize": 64}},
    INT8 | {"convrot": None, "params": {"convrot": True}},
    ON | {"convrot_groupsize": 16, "params": {"convrot_groupsize": 64}},
    *({**INT8, "params": value} for value in (None, [], "convrot", 7)),
    *({**CONVROT, "linear_dtype": value} for value in ("int4", "int8", None, "INT8", ["int4"], "", 4)),
    CONVROT | {"params": {"linear_dtype": "int8"}},
    INT8 | {"per_row": None, "unknown": {"a": [1]}},
    # formats
    *({"format": value} for value in (None, "", "int8", "INT8_TENSORWISE", 8, True)),
    {"convrot": True},
    {},
    None,
    [],
    "int8_tensorwise",
]


def tensors(conf):
    g = torch.Generator().manual_seed(0)
    four = isinstance(conf, dict) and conf.get("format") == "convrot_w4a4"
    scale = torch.rand(N, generator=g) * 0.01 + 0.01
    return {
        "weight": torch.randint(-100, 100, (N, K // 2 if four else K), generator=g, dtype=torch.int8),
        "weight_scale": scale if four else scale[:, None],
        "comfy_quant": torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8),
    }


def by_comfyui(ops, held, x):
    layer = ops.mixed_precision_ops(compute_dtype=torch.float32).Linear(K, N, bias=False)
    layer.load_state_dict(dict(held))
    return layer(x)


def by_us(held, x):
    declaration = of_tensor(tuple(held["comfy_quant"].shape), "U8", lambda: held["comfy_quant"])
    names = {torch.int8: "I8", torch.float32: "F32", torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3"}
    stored = gather(
        declaration, {leaf: Stored(leaf, tuple(t.shape), names[t.dtype]) for leaf, t in held.items()}
    )
    spec = spec_of(declaration, stored, held.get)
    return QuantizedLayer("layer", spec, tensors_of(declaration, spec, held.get))(x)


@pytest.mark.parametrize("conf", ODD, ids=json.dumps)
def test_as_comfyui(comfy, conf):
    import comfy.ops

    x = torch.randn(7, K, generator=torch.Generator().manual_seed(1))
    held = tensors(conf)
    try:
        wanted = by_comfyui(comfy.ops, held, x)
    except Exception:  # whatever it is: ComfyUI has no sentences for these
        with pytest.raises((DeclarationError, LayoutError)):
            by_us(held, x)
        return
    # ComfyUI 0.33 on a CPU quantizes x of 4-bit layers to 4 bits whatever the text says; cards and later
    # versions do not.
    four = conf["format"] == "convrot_w4a4" and (
        conf.get("full_precision_matrix_mult") or "int8" in json.dumps(conf)
    )
    assert relative_error(wanted, by_us(held, x)) < (0.15 if four else 0.01)


def test_null_is_false(comfy):
    """Not vacuously: the switch changes what is computed."""
    x = torch.randn(7, K, generator=torch.Generator().manual_seed(1))
    off, null, on = (by_us(tensors(conf), x) for conf in (INT8, INT8 | {"convrot": None}, ON))
    assert torch.equal(off, null)
    assert relative_error(off, on) > 0.5


BLOCKS = {"nvfp4": "TensorCoreNVFP4Layout", "asym_w4a8_int8": "AsymW4A8Int8Layout"}
BESIDE = {
    "nothing": {},
    "input_scale": {"input_scale": torch.tensor(0.9e-3)},  # 0.7 of what the tokens need
    "pre_quant_scale": {"pre_quant_scale": torch.linspace(0.5, 2, K)},
}


CASES = [("nvfp4", beside, whole) for beside in BESIDE for whole in (False, True)]


@pytest.mark.parametrize(("kind", "beside", "whole"), [*CASES, ("asym_w4a8_int8", "nothing", False)])
def test_layers_of_blocks_are_comfyuis(comfy, kind, beside, whole):
    """In its own module, through its own loader. whole: full_precision_matrix_mult, which of integer weights
    that are where x is ComfyUI 0.33 does not follow."""
    import comfy.ops
    from comfy_kitchen.tensor import QuantizedTensor

    g = torch.Generator().manual_seed(1)
    weight, x = torch.randn(N, K, generator=g) / 16, torch.randn(7, K, generator=g)
    conf = {"format": kind, "full_precision_matrix_mult": whole}
    held = QuantizedTensor.from_float(weight, BLOCKS[kind]).state_dict("weight") | BESIDE[beside]
    held["comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
    assert relative_error(by_comfyui(comfy.ops, held, x), by_us(held, x)) < 1e-5
