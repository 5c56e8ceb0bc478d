"""1x1 convolutions are linear layers over the channels: in ComfyUI's operations, and in SD 1.5 and ACE-Step,
small and random."""

from dataclasses import replace

import pytest
import torch

from comfyui_nibble.quant_core.calibration.observe import rows_of
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.methods import METHODS, fit_problem
from comfyui_nibble.tests.codes import assert_repeats, record
from comfyui_nibble.tests.host.inside import (
    attached_weight,
    load,
    module,
    nodes_in,
    packed_hash,
    random_state,
)
from comfyui_nibble.tests.host.test_adapters import randn, with_lora
from comfyui_nibble.tests.support import relative_error

# -- operations


@pytest.fixture
def ops(comfy):
    """(operations that have a quantized layer for each name in the dict, the dict)."""
    from comfyui_nibble.nodes.host.operations import operations_for

    layers = {}
    return operations_for(layers.get, lambda layer: layer), layers


def quantized(make_problem, n, k, spatial):
    problem = make_problem(n, k, fit_tokens=512)
    problem = replace(problem, layer=replace(problem.layer, spatial=spatial)).filled()
    return fit_problem(problem, METHODS["svdquant"], METHODS["svdquant"].configured(rank=8, gptq=False)).layer


@pytest.mark.parametrize(("spatial", "sizes"), [(1, (7,)), (2, (3, 5))], ids=["1d", "2d"])
@pytest.mark.parametrize("k", [128, 72])
def test_a_packed_convolution_is_the_layer_on_channels_last(ops, make_problem, spatial, sizes, k):
    """With in-channels that fill a group and such that do not; a batch, and without one."""
    operations, layers = ops
    layers["conv"] = quantized(make_problem, 96, k, spatial)
    made = torch.nn.Module()
    made.conv = [operations.Conv1d, operations.Conv2d][spatial - 1](
        k, 96, kernel_size=1, dtype=torch.bfloat16
    )
    assert made.conv.weight is None  # no float weight is allocated
    made.load_state_dict(
        {
            "conv.weight": torch.empty(96, k, *(1,) * spatial, device="meta"),
            "conv.bias": torch.empty(96, device="meta"),
        }
    )
    assert (made.conv.weight.shape, made.conv.weight.dtype) == ((96, k, *(1,) * spatial), torch.bfloat16)
    assert made.conv.real_weight(torch.empty(())).shape == made.conv.weight.shape
    x = randn(2, k, *sizes)
    want = layers["conv"](x.movedim(1, -1)).movedim(-1, 1)
    assert torch.equal(made.conv(x), want)
    assert torch.equal(made.conv(x[1]), layers["conv"](x[1].movedim(0, -1)).movedim(-1, 0))
    stock = [torch.nn.functional.conv1d, torch.nn.functional.conv2d][spatial - 1]
    real = stock(
        x, layers["conv"].dequantize().view(made.conv.weight.shape), layers["conv"].tensors["bias"].float()
    )
    assert relative_error(real, want) < 0.15  # of activations at 4 bits


@pytest.mark.parametrize(("k", "spatial", "file"), [(96, 2, "96 x 96 x 1 x 1"), (128, 1, "96 x 128 x 1")])
def test_a_layer_of_another_shape_is_refused(ops, make_problem, k, spatial, file):
    operations, layers = ops
    layers["conv"] = quantized(make_problem, 96, k, spatial)
    made = torch.nn.Module()
    made.conv = operations.Conv2d(128, 96, 1)
    with pytest.raises(RuntimeError, match=f"the model has 96 x 128 x 1 x 1, the file {file}"):
        made.load_state_dict({"conv.weight": torch.empty(0)}, strict=False)


@pytest.mark.parametrize(
    "options",
    [{"kernel_size": 3}, {"kernel_size": 1, "stride": 2}, {"kernel_size": 1, "padding": 1},
    {"kernel_size": 1, "groups": 2}, {"kernel_size": 1}, {"kernel_size": (1, 1), "padding": "same"}],
    ids=str,
)  # fmt: skip
def test_in_16_bit_it_is_comfyuis_own(comfy, ops, options):
    """What is no linear layer, and what is one and not quantized, computes as without the pack."""
    import comfy.ops

    from comfyui_nibble.nodes.host.operations import is_pointwise, replaceable

    operations, _ = ops
    pair = [o.Conv2d(64, 64, **options, dtype=torch.float32) for o in (operations, comfy.ops.manual_cast)]
    state = {"weight": randn(*pair[1].weight.shape), "bias": randn(64)}
    for conv in pair:
        conv.load_state_dict(state)
    assert torch.equal(pair[0](randn(1, 64, 6, 6)), pair[1](randn(1, 64, 6, 6)))
    linear = (
        options["kernel_size"] in (1, (1, 1))
        and not {"stride", "groups"} & set(options)
        and options.get("padding") != 1
    )
    assert is_pointwise(pair[1]) == replaceable(pair[1]) == linear
    assert not replaceable(
        torch.nn.Conv2d(64, 64, 1)
    )  # not made with ComfyUI's operations, so none of ours takes its place
    with pytest.raises(RuntimeError, match="weight"):
        pair[0].load_state_dict({"bias": randn(64)})


def test_calibration_sees_tokens():
    """Channels last; a linear layer's input as it is."""
    x = randn(2, 8, 3, 5)
    assert torch.equal(rows_of(torch.nn.Conv2d(8, 4, 1), x), x.permute(0, 2, 3, 1))
    assert torch.equal(rows_of(torch.nn.Conv1d(8, 4, 1), x[0, :, 0]), x[0, :, 0].T)
    assert rows_of(torch.nn.Linear(5, 4), x) is x


# -- SD 1.5: proj_in and proj_out of each transformer

PROJ = "diffusion_model.input_blocks.3.1.proj_in"  # (128, 128, 1, 1)


@pytest.fixture(scope="module")
def sd15(comfy, one_thread):
    """Two levels of 64 and 128 channels, a transformer on each."""
    import comfy.supported_models
    from comfy.model_patcher import ModelPatcher

    fixed = {
        "use_checkpoint": False,
        "image_size": 32,
        "use_spatial_transformer": True,
        "legacy": False,
        "adm_in_channels": None,
    }
    fixed |= {
        "in_channels": 4,
        "out_channels": 4,
        "use_linear_in_transformer": False,
        "use_temporal_resblock": False,
        "use_temporal_attention": False,
    }
    small = {
        "model_channels": 64,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "num_heads": 2,
        "context_dim": 64,
    }
    small |= {"transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1}
    config = comfy.supported_models.SD15(fixed | small)
    config.unet_config |= small
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "", device="cpu")
    model.diffusion_model.load_state_dict(
        {k: v.float() for k, v in random_state(model.diffusion_model).items()}
    )
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def predicted(patcher):
    g = torch.Generator().manual_seed(0)
    x, context = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 7, 64, generator=g)
    with torch.no_grad():
        return load(patcher).model.diffusion_model(x, torch.tensor([500.0]), context=context)


@pytest.fixture(scope="module")
def packed(sd15, tmp_path_factory):
    from comfyui_nibble.nodes.calibrate import NibbleCalibrate
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    with nodes_in(tmp_path_factory.mktemp("sd15")):
        prompt = [[randn(1, 7, 64, seed=3) * 10, {}]]
        found = NibbleCalibrate.execute(
            sd15, {"positive0": prompt}, {"samples": torch.zeros(1, 4, 8, 8)}, "euler", "simple", 2, 1.0, 0,
            4, 1.0, True
        ).args[0]  # fmt: skip
        stats = found.get("input_blocks.3.1.proj_in", second_moments=True)
        assert (stats.width, stats.count) == (
            128,
            4 * 4 * 2 * 3,
        )  # 4 x 4 positions, 2 steps, 3 samples for the fit
        return NibbleQuantize.execute(sd15, "svdquant_r", 16, True, found).args


def test_sd15(sd15, packed, outputs):
    """Projections are quantized, skips between the streams are not; the file loads and gives the same
    bits."""
    from comfyui_nibble.nodes.files import NibbleSaveModel
    from comfyui_nibble.nodes.host.build import load as load_file

    made, report, _ = packed
    names = {n.removeprefix("diffusion_model."): m for n, m in made.packed_layers()}
    projections = {
        f"{block}.1.{proj}"
        for block in ("input_blocks.1", "input_blocks.3", "middle_block", "output_blocks.1")
        for proj in ("proj_in", "proj_out")
    }
    assert {n for n, m in names.items() if m.spec.spatial} >= {
        p for p in projections if not p.startswith("middle")
    }
    assert not [n for n in names if "skip_connection" in n]
    assert "1x1 convolution" in report
    want, got = predicted(sd15), predicted(made)
    assert relative_error(want, got) < 0.4  # 0.33 measured, of Gaussian weights at rank 16 from two steps
    path = NibbleSaveModel.execute(made, "diffusion_models/sd15").args[0]
    assert PackFile(path).logical_shapes()["input_blocks.3.1.proj_in.weight"] == (128, 128, 1, 1)
    assert torch.equal(predicted(load_file(path)), got)


KINDS = {
    "lora": {"lora_up.weight": (128, 4, 1, 1), "lora_down.weight": (4, 128, 1, 1)},
    "lora of a linear layer": {"lora_up.weight": (128, 4), "lora_down.weight": (4, 128)},
    "tucker": {
        "lora_up.weight": (128, 4, 1, 1),
        "lora_down.weight": (4, 128, 1, 1),
        "lora_mid.weight": (4, 4, 1, 1),
    },
    "dora": {
        "lora_up.weight": (128, 4, 1, 1),
        "lora_down.weight": (4, 128, 1, 1),
        "dora_scale": (128, 1, 1, 1),
    },
    "loha": {"hada_w1_a": (128, 4), "hada_w1_b": (4, 128), "hada_w2_a": (128, 3), "hada_w2_b": (3, 128)},
    "lokr": {"lokr_w1": (8, 8), "lokr_w2": (16, 16, 1, 1)},
    "diff": {"diff": (128, 128, 1, 1)},
    "set": {"set_weight": (128, 128, 1, 1)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_of_convolutions(comfy, packed, kind):
    """As ComfyUI merges them into the real weight, in 4 dimensions; beside the packed bytes, which stay."""
    import comfy.lora

    base, before = packed[0], packed_hash(packed[0])
    patched = load(
        with_lora(
            base,
            {
                f"{PROJ}.{leaf}": randn(*shape).abs() if "dora" in leaf else randn(*shape)
                for leaf, shape in KINDS[kind].items()
            },
        )
    )
    layer = module(patched, PROJ)
    real = layer.layer().dequantize().view(128, 128, 1, 1)
    merged = comfy.lora.calculate_weight(patched.patches[f"{PROJ}.weight"], real.clone(), PROJ)
    assert relative_error(merged.flatten(1), attached_weight(layer)) < 1e-6
    assert relative_error(real, merged) > 1e-3
    if kind not in ("dora", "set"):  # they also scale the quantized product
        x = randn(2, 128, 3, 5)
        want = torch.nn.functional.conv2d(x, merged - real)
        load(base)
        plain = layer(x)
        load(patched)
        assert relative_error(want, layer(x) - plain) < 1e-4
    load(base)
    assert packed_hash(base) == before


@pytest.mark.arithmetic
def test_a_bypass_lora_acts_on_a_packed_convolution(comfy, packed):
    """ComfyUI's bypass hook calls the layer and adds a convolution of its own."""
    import comfy.sd

    base = packed[0]
    file = {f"{PROJ}.lora_up.weight": randn(128, 4, 1, 1), f"{PROJ}.lora_down.weight": randn(4, 128, 1, 1)}
    bypassed = comfy.sd.load_bypass_lora_for_models(base, None, dict(file), 1.0, 0)[0]
    plain, recorded = predicted(base), record(predicted, with_lora(base, file))
    assert relative_error(plain, recorded[0]) > 1e-3
    assert_repeats(recorded, predicted, bypassed)
    load(base)
