"""A model that ComfyUI-GGUF holds, as a source. Its tensors and layers are played by the ones below, which
have the traits that count: bytes that say what they stand for, copies that are none, a made-up state dict."""

import gguf
import pytest
import torch

from comfyui_nibble.tests.host.inside import forward
from comfyui_nibble.tests.host.test_adapters import QKV, adapter, with_lora
from comfyui_nibble.tests.host.test_source import PREFIX, quantize, source_of  # noqa: F401
from comfyui_nibble.tests.support import relative_error

Q4, F32 = gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.F32
NAME = QKV.removeprefix(PREFIX)


class Held(torch.Tensor):
    """Bytes of ggml with the shape of the values that they stand for."""

    def detach(self):
        return self

    def clone(self):
        return self

    @property
    def shape(self):
        return self.tensor_shape


def held(values, kind) -> Held:
    found = torch.from_numpy(gguf.quantize(values.float().numpy(), kind)).as_subclass(Held)
    found.tensor_type, found.tensor_shape = kind, values.size()
    return found


def real(tensor) -> torch.Tensor:
    data = tensor.as_subclass(torch.Tensor).numpy()
    return torch.from_numpy(gguf.dequantize(data, tensor.tensor_type)).view(tensor.tensor_shape)


def operations():
    import comfy.ops

    class Operations(comfy.ops.manual_cast):
        class Linear(comfy.ops.manual_cast.Linear):
            def __init__(self, n, k, bias=True, **options):
                torch.nn.Module.__init__(self)
                self.in_features, self.out_features = n, k
                self.register_parameter("weight", None)
                self.register_parameter("bias", None)

            def _load_from_state_dict(self, state, prefix, *args):
                for leaf in ("weight", "bias"):
                    if (tensor := state.get(prefix + leaf)) is not None:
                        self._parameters[leaf] = tensor

            def _save_to_state_dict(self, destination, prefix, keep_vars):
                if self.weight is None or self.weight.tensor_type == F32:
                    super()._save_to_state_dict(destination, prefix, keep_vars)
                    return
                for leaf, tensor in self._parameters.items():
                    if tensor is not None:
                        destination[prefix + leaf] = torch.zeros(tensor.size(), device="meta")
                destination[f"{prefix}temp.weight"] = torch.zeros(1, device="meta")

            def forward(self, x):
                weight, bias = real(self.weight), self.bias
                return torch.nn.functional.linear(x, weight, None if bias is None else real(bias))

    return Operations


@pytest.fixture
def of_ggml(comfy, tiny_state):
    """The small FLUX with the weights of its blocks in Q4_0 and all other of its layers in fp32."""
    inner = lambda key, t: t.ndim == 2 and "_blocks." in key
    linear = {key.rpartition(".")[0] for key, t in tiny_state.items() if t.ndim == 2}
    state = {
        key: held(t, Q4 if inner(key, t) else F32) if key.rpartition(".")[0] in linear else t.float()
        for key, t in tiny_state.items()
    }
    return comfy.sd.load_diffusion_model_state_dict(
        dict(state), model_options={"custom_operations": operations(), "dtype": torch.float32}
    ), state


def test_values_and_kinds(of_ggml, full, source_of):  # noqa: F811
    model, state = of_ggml
    source = source_of(model)
    assert source.kinds == {"Q4_0": 16}
    assert source.shapes == source_of(full).shapes
    for key in source.shapes.keys() & state.keys():
        tensor = state[key]
        found, want = source.get(key), real(tensor) if isinstance(tensor, Held) else tensor
        assert type(found) is torch.Tensor
        assert torch.equal(
            found.float(), want.bfloat16().float() if "_blocks." in key and want.ndim == 2 else want
        )


def test_a_lora_on_it_is_merged(of_ggml, source_of):  # noqa: F811
    model, state = of_ggml
    tensors = adapter("lora", QKV)
    found = source_of(with_lora(model, tensors, 0.5)).get(f"{NAME}.weight")
    base = real(state[f"{NAME}.weight"]).bfloat16().float()
    up, down = (tensors[f"{QKV}.lora_{end}.weight"] for end in ("up", "down"))
    merged = base + 0.5 * tensors[f"{QKV}.alpha"] / len(down) * (up @ down)
    assert torch.equal(found, merged.bfloat16())
    assert torch.equal(source_of(model).get(f"{NAME}.weight").float(), base)


def test_it_is_quantized_to_what_it_draws(of_ggml, monkeypatch, tmp_path):
    """0.25 measured of rounding to nearest in 4 bits."""
    made = quantize(of_ggml[0], monkeypatch, tmp_path)
    assert len(made.packed_layers()) == 16
    assert relative_error(forward(of_ggml[0]), forward(made)) < 0.3


def test_blocks_of_it_are_swapped_in(of_ggml, comfy):
    from comfyui_nibble.nodes.host.contents import take_apart

    rest = take_apart(of_ggml[0]).rest
    assert torch.equal(rest[f"{NAME}.weight"], real(of_ggml[1][f"{NAME}.weight"]).bfloat16())


def test_training_on_it_is_refused_before_the_work(of_ggml):
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    with pytest.raises(
        RuntimeError, match=f"{NAME.split('.')[0]}.*ComfyUI-GGUF holds this model, .*training to none"
    ):
        NibbleQuantize.execute(of_ggml[0], "splitquant_4", 0, False, training="standard")
