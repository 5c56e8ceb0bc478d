"""ComfyUI's own code in the test process, on the CPU, for what HTTP cannot reach: patchers, partial loads,
hundreds of adapters."""

import hashlib
import sys
from contextlib import contextmanager

import pytest
import torch

from comfyui_nibble.kernels.operator.spec import TENSOR_NAMES
from comfyui_nibble.quant_core.families import detect
from comfyui_nibble.quant_core.formats.origin import Origin
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.methods import by_name
from comfyui_nibble.quant_core.run.layers import quantize_layers
from comfyui_nibble.quant_core.run.source import Tensors
from comfyui_nibble.tests.host.server import find_comfyui
from comfyui_nibble.tests.support import single_thread


@pytest.fixture(scope="session")
def comfy():
    """The package `comfy`, with the modules that the tests use. ComfyUI's folder goes last on the path."""
    sys.path.append(str(find_comfyui()))
    from comfy.cli_args import args

    args.cpu = True
    import comfy
    import comfy.hooks
    import comfy.lora
    import comfy.model_management
    import comfy.sd
    import comfy.utils

    return comfy


@pytest.fixture(scope="module")
def one_thread():
    """The small model's layers take longer to share out than to compute: on busy cores two threads are ten
    times slower than one."""
    with single_thread():
        yield


@pytest.fixture(scope="session")
def packed(comfy):
    """A function of (tensors of a diffusion model, method, its options) that returns one that makes it
    quantized without data."""

    def quantize(state, method="svdquant", **options):
        shapes = {k: tuple(v.shape) for k, v in state.items()}
        family, chosen, layers = detect(shapes), by_name(method), {}
        for layer, _ in quantize_layers(
            family.layers(shapes), Tensors(state), chosen, chosen.configured(**options)
        ):
            layers[layer.name] = layer
        rest = {k: v for k, v in state.items() if k.rpartition(".")[0] not in layers}
        return lambda: patcher_of(layers, rest, family.name)

    return quantize


@pytest.fixture(scope="session")
def tiny_packed(packed, tiny_state):
    """A function that makes the small FLUX as a NibblePatcher: SVDQuant without data, rank 8, group scales,
    shifted codes after GELU."""
    return packed(tiny_state, rank=8, gptq=False, iterations=0)


def patcher_of(layers, rest, family="flux"):
    """A NibblePatcher of {name: QuantizedLayer} and {key: tensor}, as of a file without a record of its
    model."""
    from comfyui_nibble.nodes.host.build import build, frame_of_file

    specs = {name: layer.spec for name, layer in layers.items()}
    info = {"family": family, "provenance": {}, "report": [], "source": "test"}
    return build(layers.get, specs, rest, info, frame_of_file(Origin(), specs, rest, "test", family))


@pytest.fixture(scope="module")
def base(tiny_packed, one_thread):
    """The small packed FLUX, one for the tests of a file."""
    return tiny_packed()


@pytest.fixture(scope="module")
def full(comfy, tiny_state):
    """The same model in full precision, as ComfyUI loads it."""
    return comfy.sd.load_diffusion_model_state_dict(dict(tiny_state))


@pytest.fixture
def outputs(comfy, tmp_path, monkeypatch):
    """ComfyUI's output folder, an empty one."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path))
    return tmp_path


def random_state(network) -> dict[str, torch.Tensor]:
    """Seeded random weights, bf16, for a network made with ComfyUI's operations: outputs of each layer about
    as large as its inputs."""
    torch.manual_seed(0)
    for name, p in network.named_parameters():
        if p.ndim == 1:
            torch.nn.init.ones_(p) if name.endswith("weight") else torch.nn.init.zeros_(p)
        else:
            torch.nn.init.normal_(p, std=p[0].numel() ** -0.5)
    return {k: v.detach().bfloat16() for k, v in network.state_dict().items()}


def module(patcher, key):
    """The module of a weight's key."""
    import comfy.utils

    return comfy.utils.get_attr(patcher.model, key.removesuffix(".weight"))


def attached_weight(m) -> torch.Tensor:
    """The weight (N, K), fp32, that a packed module applies with all that stands beside it."""
    tensors = {k: p.data for k in TENSOR_NAMES if (p := getattr(m, k, None)) is not None}
    weight = QuantizedLayer("", m.spec, tensors).dequantize()
    for i, first in enumerate(m.attached.rows):
        matrix = torch.kron(getattr(m, f"kronecker{i}_left"), getattr(m, f"kronecker{i}_right"))
        weight[first : first + len(matrix)] += matrix
    return weight + m.dense if "dense" in m.attached.loose else weight


def packed_hash(patcher) -> str:
    """Of the codes of all packed layers."""
    digest = hashlib.sha256()
    for _, m in patcher.packed_layers():
        digest.update(m.weight.detach().cpu().numpy().tobytes())
    return digest.hexdigest()


def load(patcher):
    """As before a sampling run."""
    import comfy.model_management

    comfy.model_management.load_models_gpu([patcher])
    return patcher


def forward(patcher, seed=0, batch=1) -> torch.Tensor:
    """The network's output on seeded inputs, after a load."""
    g = torch.Generator().manual_seed(seed)
    x, context, pooled = (torch.randn(batch, *s, generator=g) for s in ((16, 16, 16), (8, 128), (128,)))
    with torch.no_grad():
        return load(patcher).model.diffusion_model(
            x, torch.full((batch,), 0.7), context, pooled, guidance=torch.full((batch,), 3.5)
        )


def sample(patcher, steps=2, hooks=None, callback=None) -> torch.Tensor:
    """Latents of ComfyUI's own sampler on seeded inputs; hooks: a HookGroup of the conditioning."""
    import comfy.sample

    g = torch.Generator().manual_seed(0)
    noise, context, pooled = (torch.randn(1, *s, generator=g) for s in ((16, 16, 16), (8, 128), (128,)))
    prompt = [[context, {"pooled_output": pooled, "guidance": 3.5} | ({"hooks": hooks} if hooks else {})]]
    latent = torch.zeros(1, 16, 16, 16)
    return comfy.sample.sample(
        patcher,
        noise,
        steps,
        1.0,
        "euler",
        "simple",
        prompt,
        prompt,
        latent,
        callback=callback,
        disable_pbar=True,
        seed=0,
    )


@contextmanager
def nodes_in(folder):
    """ComfyUI's output folder within `folder`, for nodes that are called in this process."""
    import folder_paths

    before = folder_paths.get_output_directory()
    (folder / "output").mkdir()
    folder_paths.set_output_directory(str(folder / "output"))
    try:
        yield
    finally:
        folder_paths.set_output_directory(before)
