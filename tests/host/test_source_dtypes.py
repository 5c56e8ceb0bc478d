"""Models that ComfyUI holds in any float dtype, biases and norms too, as sources; and LoRAs on those in 8
bits."""

import pytest
import torch

from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.tests.host.inside import forward
from comfyui_nibble.tests.host.test_adapters import QKV, H, randn, with_lora
from comfyui_nibble.tests.host.test_source import PREFIX, quantize, source_of, weight  # noqa: F401
from comfyui_nibble.tests.support import relative_error

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
REAL = {**dict.fromkeys(FP8, torch.bfloat16), torch.float64: torch.float32}
DTYPES = [*REAL, torch.float32, torch.bfloat16, torch.float16]


def held(state, **options):
    """What UNETLoader makes of the file with a weight_dtype."""
    import comfy.sd

    return comfy.sd.load_diffusion_model_state_dict(dict(state), model_options=options)


def saved(model, monkeypatch, tmp_path) -> PackFile:
    import folder_paths

    from comfyui_nibble.nodes.files import NibbleSaveModel

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return PackFile(NibbleSaveModel.execute(model, "saved").args[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tensor_of_a_source_has_arithmetic(tiny_state, source_of, dtype):  # noqa: F811
    model = held(tiny_state, dtype=dtype)
    source, state = source_of(model), model.model.diffusion_model.state_dict()
    assert state[f"{QKV.removeprefix(PREFIX)}.bias"].dtype == dtype
    for key in source.shapes:
        assert source.get(key).dtype == REAL.get(dtype, dtype)
        assert torch.equal(source.get(key).double(), state[key].double())


@pytest.mark.parametrize(
    "options", [*({"dtype": d} for d in DTYPES), {"dtype": FP8[0], "fp8_optimizations": True}], ids=str
)
def test_a_model_in_any_float_dtype_is_quantized(comfy, tiny_state, monkeypatch, tmp_path, options):
    """To what the model in that dtype draws: 8-bit weights are the source's own, not an error of ours."""
    model, rounded = (
        held(tiny_state, **options),
        {k: t.to(options["dtype"]).float() for k, t in tiny_state.items()},
    )
    made = quantize(model, monkeypatch, tmp_path)
    # 0.247 to 0.255 measured for all of them, of rounding to nearest in 4 bits.
    assert relative_error(forward(held(rounded)), forward(made)) < 0.3
    file, state = saved(made, monkeypatch, tmp_path), model.model.diffusion_model.state_dict()
    assert len(file.specs) == 16
    for key in file.rest:
        assert file.tensor(key).dtype.itemsize > 1
        assert torch.equal(file.tensor(key).float(), state[key].float())
    bias = file.layer(QKV.removeprefix(PREFIX)).tensors["bias"]
    assert torch.equal(bias.float(), state[f"{QKV.removeprefix(PREFIX)}.bias"].float())


def test_whole_numbers_stay_whole_numbers(full, source_of):  # noqa: F811
    network = full.model.diffusion_model
    network.register_buffer("positions", torch.arange(5))
    try:
        assert torch.equal(source_of(full).get("positions"), torch.arange(5))
        assert source_of(full).get("positions").dtype == torch.int64
    finally:
        del network.positions


def small(full):
    """A LoRA of 2.8 % of the norm of the weight that it is for, and its difference."""
    up, down = randn(3 * H, 4), randn(4, H)
    size = full.model.diffusion_model.double_blocks[0].img_attn.qkv.weight.float().norm()
    up *= 0.028 * size / (up @ down).norm()
    return {f"{QKV}.lora_up.weight": up, f"{QKV}.lora_down.weight": down}, up @ down


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lora_on_a_model_in_any_float_dtype_is_not_rounded_away(full, tiny_state, source_of, dtype):  # noqa: F811
    """In 8 bits 0.66 of its difference were lost. Of the weights 2^-9 are in bf16 at most."""
    tensors, difference = small(full)
    model = held(tiny_state, dtype=dtype)
    base, merged = weight(source_of(model), QKV), weight(source_of(with_lora(model, tensors)), QKV)
    assert merged.dtype == base.dtype == REAL.get(dtype, dtype)
    exact = base.double() + difference.double()
    limit = {torch.bfloat16: 2.0**-9, torch.float16: 2.0**-12, torch.float32: 1e-6}[merged.dtype]
    assert relative_error(exact, merged) < limit
    assert relative_error(difference, merged.double() - base.double()) < limit / 0.028


@pytest.mark.parametrize("flag", ["fp8_e4m3fn_unet", "fp8_e5m2_unet"])
def test_comfyuis_flags_for_fp8_leave_packed_models_in_16_bit(comfy, tiny_state, monkeypatch, tmp_path, flag):
    """--fp8_e4m3fn-unet is about weights, and those are packed: what is not is 1 % of the model."""
    from comfy.cli_args import args

    from comfyui_nibble.nodes.host.build import load

    want = saved(quantize(held(tiny_state), monkeypatch, tmp_path), monkeypatch, tmp_path)
    monkeypatch.setattr(args, flag, True)
    source = held(tiny_state)
    assert source.model.diffusion_model.img_in.weight.dtype in FP8
    loaded = load(want.path)
    tensors = loaded.model.diffusion_model.state_dict()
    assert not [key for key, tensor in tensors.items() if tensor.dtype in FP8]
    file = saved(loaded, monkeypatch, tmp_path)
    assert all(torch.equal(file.tensor(key), want.tensor(key)) for key in want.rest)
    made = saved(quantize(source, monkeypatch, tmp_path), monkeypatch, tmp_path)
    assert {made.tensor(key).dtype for key in made.rest} == {torch.bfloat16}
    assert torch.equal(made.tensor("img_in.weight"), source.model.diffusion_model.img_in.weight.bfloat16())
