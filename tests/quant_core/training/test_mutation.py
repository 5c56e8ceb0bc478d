"""Gradients do not depend on which memory a tensor happens to get."""

import torch

from comfyui_nibble.quant_core.training.mutation import mutation_allowed


def test_a_tensor_in_the_place_of_a_changed_one_is_not_taken_for_it():
    """Six tensors one after the other, each saved for the backward pass, changed in place and let go: the
    next gets its memory and its id. PyTorch's own context gave 20 here."""
    x = torch.full((1000,), 3.0, requires_grad=True)
    outputs = []
    with mutation_allowed():
        for i in range(6):
            a = torch.full((1000,), float(i + 1))
            outputs.append((x * a).sum())
            a.add_(100.0)
            del a
        (gradient,) = torch.autograd.grad(sum(outputs), [x])
    assert torch.equal(gradient, torch.full((1000,), 21.0))
