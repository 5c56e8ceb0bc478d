"""A GELU in front of a packed layer is computed in its quantizer where the whole Sequential is called, and
nowhere twice or never."""

import pytest
import torch

from comfyui_nibble.kernels.prologue import Gelu
from comfyui_nibble.tests.host.inside import load, module
from comfyui_nibble.tests.host.test_adapters import MLP, randn
from comfyui_nibble.tests.support import relative_error

SEQUENTIAL = MLP.removesuffix(".2")


@pytest.fixture
def seen(base, monkeypatch):
    """What stands in front of each product of a packed layer, in the order of calls."""
    from comfyui_nibble.nodes.host import packed

    load(base)
    found, inner = [], packed.quant_linear

    def record(x, spec, tensors, prologue=None):
        found.append(prologue)
        return inner(x, spec, tensors, prologue=prologue)

    monkeypatch.setattr(packed, "quant_linear", record)
    return found


def test_called_whole_and_called_one_by_one_is_the_same(comfy, base, seen):
    """The second as ComfyUI's `linear_input_act` calls it, and nodes that cut a feed-forward into chunks."""
    import comfy.ops

    mlp, x = module(base, SEQUENTIAL), randn(1, 9, 256) * 5
    whole = mlp(x)
    assert seen == [None, Gelu()]
    by_hand = mlp[2](torch.nn.functional.gelu(mlp[0](x), approximate="tanh"))
    assert relative_error(whole, by_hand) < 1e-6
    assert relative_error(whole, mlp[2](mlp[1](mlp[0](x)))) < 1e-6
    assert relative_error(whole, comfy.ops.linear_input_act(mlp[2], mlp[0](x), "gelu_tanh")) < 1e-6
    assert seen[2:] == [None] * 6


def test_what_reads_the_layers_input_sees_it_behind_the_gelu(base, seen):
    mlp, x, inputs = module(base, SEQUENTIAL), randn(1, 9, 256) * 5, []
    whole = mlp(x)
    handle = mlp[2].register_forward_pre_hook(lambda layer, args: inputs.append(args[0]))
    hooked = mlp(x)
    handle.remove()
    assert torch.equal(inputs[0], torch.nn.functional.gelu(mlp[0](x), approximate="tanh"))
    assert relative_error(whole, hooked) < 1e-6


def test_names_and_kinds_of_the_modules_stay(base, full):
    fused, plain = module(base, SEQUENTIAL), module(full, SEQUENTIAL)
    assert isinstance(fused, torch.nn.Sequential)
    assert [name for name, _ in fused.named_children()] == [name for name, _ in plain.named_children()]
    assert isinstance(fused[1], torch.nn.GELU)


def test_only_plain_gelus_are_left_to_the_layer_behind(base):
    """One that inherits may read something else than a tensor: TRELLIS.2's feed-forwards hand sparse ones
    from layer to layer."""
    from comfyui_nibble.nodes.host.fused import Fused, fuse_gelu

    class SparseGELU(torch.nn.GELU):
        def forward(self, x):
            return super().forward(x)

    linear = module(base, MLP)
    found = [torch.nn.Sequential(act(approximate="tanh"), linear) for act in (torch.nn.GELU, SparseGELU)]
    for each in found:
        fuse_gelu(each)
    assert [isinstance(each, Fused) for each in found] == [True, False]
