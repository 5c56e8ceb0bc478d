"""What a network that asks a packed layer for its weight's dtype and shape is told, and a model that asks
(Hunyuan3D 2.1, small and random)."""

import copy

import pytest
import torch

from comfyui_nibble.tests.host.inside import forward, load, module, random_state
from comfyui_nibble.tests.host.test_adapters import QKV, adapter, with_lora
from comfyui_nibble.tests.support import relative_error


def test_answers_as_the_weight_it_stands_for(base, full):
    stock = dict(full.model.named_modules())
    for patched in (base, with_lora(base, adapter("dora", QKV))):
        for name, layer in load(patched).packed_layers():
            weight = stock[name].weight
            assert next(layer.parameters()).dtype == layer.weight.dtype == weight.dtype
            assert (layer.weight.shape, layer.weight.device) == (weight.shape, weight.device)
            codes = layer.state_dict()["weight"]
            assert (type(codes), codes.dtype, codes.shape) == (
                torch.Tensor,
                torch.int8,
                dict(layer.spec.weight_shapes)["weight"],
            )
    load(base)


def test_first_parameter_of_a_block_is_a_float_too(base):
    for block in (
        base.model.diffusion_model.double_blocks[0].img_attn,
        base.model.diffusion_model.single_blocks[0],
    ):
        assert next(block.parameters()).dtype.is_floating_point


def test_deep_copies_answer_alike(base):
    layer = module(base, QKV)
    for made in (copy.deepcopy(layer.weight), copy.deepcopy(layer).weight):
        assert (made.dtype, made.shape) == (layer.weight.dtype, layer.weight.shape)
        assert torch.equal(made.detach(), layer.weight.detach())
        assert made.data_ptr() != layer.weight.data_ptr()
    again = copy.deepcopy(layer)
    again.weight_scale.data.mul_(2)  # the copy's real values are the copy's
    assert torch.equal(again.weight.to(torch.float32), again.real_weight(torch.empty(())))
    assert not torch.equal(again.weight.to(torch.float32), layer.weight.to(torch.float32))


def test_moves_keep_the_answers(base):
    before = forward(base)
    layer = module(base, QKV)
    layer.to(torch.bfloat16)  # what custom nodes do to whole networks: codes are no floats, and stay
    assert layer.weight.detach().dtype == torch.int8
    assert layer.weight.shape == (768, 256)
    layer.to(torch.float32)
    assert relative_error(before, forward(base)) < 2e-3


# -- Hunyuan3D 2.1: y.to(next(self.to_k.parameters()).dtype) in each cross-attention


@pytest.fixture(scope="module")
def hunyuan3d(comfy, one_thread):
    """Width 256, 2 blocks with 8 experts each, as ComfyUI loads it."""
    import comfy.ops
    from comfy.ldm.hunyuan3dv2_1.hunyuandit import HunYuanDiTPlain

    network = HunYuanDiTPlain(
        hidden_size=256, depth=2, guidance_cond_proj_dim=None, operations=comfy.ops.disable_weight_init
    )
    return comfy.sd.load_diffusion_model_state_dict(random_state(network))


@pytest.mark.parametrize("method", ["svdquant", "convrot"])
def test_hunyuan3d(hunyuan3d, method):
    """convrot has scales in fp32 and no other float tensor in to_k, svdquant has several in 16 bit. The
    network's own error says little: its experts are chosen by what differs a little."""
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    packed = load(NibbleQuantize.execute(hunyuan3d, method, 8, False).args[0])
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(1, 64, 32, generator=g), torch.randn(1, 16, 1024, generator=g)
    dtype = load(hunyuan3d).model.get_dtype()
    with torch.no_grad():
        assert packed.model.diffusion_model(x.to(dtype), torch.tensor([0.7]), text.to(dtype)).isfinite().all()
        hidden = torch.randn(1, 33, 256, generator=g).to(dtype)
        want, got = (
            p.model.diffusion_model.blocks[0].attn2(hidden, text.double()) for p in (hunyuan3d, packed)
        )
    assert got.dtype == want.dtype
    assert (
        relative_error(want, got) < 0.4
    )  # 0.28 measured: four layers of Gaussian weights and inputs at 4 bits, without data
