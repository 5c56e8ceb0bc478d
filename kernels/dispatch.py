"""Which implementation of the operator a layer takes, and why each faster one was refused."""

from dataclasses import dataclass

from .quant_linear import eager


@dataclass(frozen=True)
class Choice:
    """`path` runs. `refused` names the faster paths and the reason against each."""

    path: str
    refused: tuple[tuple[str, str], ...] = ()

    def __str__(self):
        return self.path + "".join(f"; {name}: {reason}" for name, reason in self.refused)


def choose(spec, device_type: str = "cpu") -> Choice:
    """The path that `quant_linear` takes for a LinearSpec on a device type ("cpu", "cuda", ...)."""
    if device_type == "cpu":
        return Choice("eager", (("triton", "needs a GPU"),))
    return Choice("eager", (("triton", "this version has no Triton kernels yet"),))


def quant_linear(x, spec, tensors, lora=()):
    """y = operator(x) for x (..., K), any float dtype -> (..., N) in that dtype. See `quant_linear.naive` for the formula."""
    y = eager.quant_linear(x.reshape(-1, spec.in_features), spec, tensors, lora)
    return y.reshape(*x.shape[:-1], spec.out_features)
