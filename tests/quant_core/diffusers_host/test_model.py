"""Nibble files in diffusers' own models: DiT from the pipeline to samples, the small FLUX and a small PixArt
by their outputs."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
)
from safetensors.torch import save_file

from comfyui_nibble.quant_core.calibration import Calibration
from comfyui_nibble.quant_core.cli import allocate
from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.diffusers_host import model as diffusers_model
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.families import DIT, detect
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.nibble import PackError, PackFile, save
from comfyui_nibble.quant_core.layer.linear import QuantLinear
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.support import nibble, relative_error, single_thread

SAMPLES, STEPS, DEPTH = 4, 3, 2
TOKENS = 2 * 8 * 8  # with and without the class, 16 x 16 latents in patches of 2
LABELS = {"0": "tench, Tinca tinca", "1": "goldfish", "999": "toilet tissue"}


def dit():
    """diffusers' DiT of width 128, with weights large enough that its blocks change what passes."""
    model = DiTTransformer2DModel(
        num_attention_heads=4, attention_head_dim=32, num_layers=DEPTH, sample_size=16, out_channels=8
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2:
                p.normal_(0, 2 if "embedding_table" in name else p.shape[1] ** -0.5)
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small take longer to share out than to compute."""
    with single_thread():
        yield


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A DiTPipeline's folder."""
    folder = tmp_path_factory.mktemp("dit")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        blocks = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        vae = AutoencoderKL(latent_channels=4, block_out_channels=(4, 4), norm_num_groups=2, **blocks)
        DiTPipeline(dit(), vae, DDIMScheduler()).save_pretrained(folder)
    index = folder / "model_index.json"  # diffusers reads the labels there and does not write them
    index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": LABELS}))
    return folder


@pytest.fixture(scope="module")
def calibrated(pipeline, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibration") / "c"
    text = nibble("calibrate", pipeline, out, "--samples", SAMPLES, "--steps", STEPS, "--device", "cpu")
    return SimpleNamespace(path=out, text=text)


def predictions(model, calibration):
    """Its predictions for the held-out calls of a calibration."""
    t = calibration.trajectory()
    with torch.no_grad():
        return torch.cat([t.run(model, i) for i, c in enumerate(t.calls) if c.held_out])


# -- the map


@pytest.mark.quick
def test_map_of_dit_covers_every_linear_layer():
    with torch.device("meta"):
        model = DiTTransformer2DModel()  # XL/2
    shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    assert detect(shapes) is DIT
    layers = {layer.name: layer for layer in DIT.layers(shapes)}
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    embedders = {
        f"transformer_blocks.{i}.norm1.emb.timestep_embedder.linear_{j}" for i in range(28) for j in (1, 2)
    }
    assert linear - set(layers) == embedders | {"proj_out_1", "proj_out_2"}
    assert set(layers) <= linear
    assert len(DIT.layers(shapes)) == len(layers) == 28 * 7
    assert all(
        (layer.out_features, layer.in_features) == shapes[f"{n}.weight"] for n, layer in layers.items()
    )
    assert {n for n, layer in layers.items() if layer.weight_only} == {
        f"transformer_blocks.{i}.norm1.linear" for i in range(28)
    }
    assert {n for n, layer in layers.items() if layer.parts[0].after_gelu} == {
        f"transformer_blocks.{i}.ff.net.2" for i in range(28)
    }
    assert layers["transformer_blocks.9.attn1.to_v"].input == "transformer_blocks.9.attn1.to_q"
    assert list(dict.fromkeys(layer.block for layer in layers.values())) == [
        f"transformer_blocks.{i}" for i in range(28)
    ]
    mapped = DIT.diffusers(shapes)
    assert {k: s.keys for k, s in mapped.items()} == {k: (k,) for k in shapes}


# -- calibrate -> quantize -> load -> sample


def test_calibration_of_dit(pipeline, calibrated):
    calibration, checkpoint = Calibration(calibrated.path), Checkpoint(pipeline / "transformer")
    assert calibration.meta["model"] == checkpoint.fingerprint()
    assert calibration.meta["family"] == "dit"
    assert calibration.meta["settings"]["size"] == 32
    assert len(calibration.names) == DEPTH * 5  # q, k and v share one
    assert (
        calibration.get("transformer_blocks.1.ff.net.2").count == 3 * STEPS * TOKENS
    )  # the fourth sample is held out
    assert calibration.get("transformer_blocks.1.norm1.linear").count == 3 * STEPS * 2
    t = calibration.trajectory()
    classes = {c.sample: t.arguments(i)[1]["class_labels"].tolist() for i, c in enumerate(t.calls)}
    assert classes == {i: [250 * i, 1000] for i in range(SAMPLES)}


# Measured: 0.41 and 0.33, 0.18 and 0.27, of random weights at a width of 128.
@pytest.mark.parametrize(("method", "output", "sampled"), [("robuq", 0.5, 0.45), ("svdquant_r", 0.23, 0.35)])
def test_quantized_dit_samples(pipeline, calibrated, tmp_path, method, output, sampled):
    file = tmp_path / "q.safetensors"
    text = nibble("quantize", pipeline / "transformer", file, "--method", method, "--calibration",
    calibrated.path, "--rank", 8, "--device", "cpu")  # fmt: skip
    assert f"{DEPTH * 7} layers" in text
    assert PackFile(file).family == "dit"
    model = diffusers_model.load(pipeline / "transformer", file)
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == DEPTH * 7
    full = diffusers_model.full(pipeline / "transformer")
    want, got = (predictions(m, Calibration(calibrated.path)) for m in (full, model))
    assert 0.05 < relative_error(want, got) < output
    pipe = DiTPipeline.from_pretrained(pipeline)
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    for transformer in (full, model):
        pipe.transformer = transformer
        pictures.append(
            torch.from_numpy(
                pipe(
                    [1, 7],
                    num_inference_steps=4,
                    generator=torch.Generator().manual_seed(3),
                    output_type="np",
                ).images
            )
        )
    assert pictures[1].shape == (2, 32, 32, 3)
    assert relative_error(*pictures) < sampled


def test_gains_of_dit(pipeline, calibrated):
    found = allocate.measured_gains(pipeline / "transformer", Calibration(calibrated.path), samples=1)
    assert len(found) == DEPTH * 6
    assert min(found.values()) > 0


@pytest.mark.parametrize(("lines", "ids"), [("goldfish\n 999\n", [1, 999]), ("Tinca tinca", [0])])
def test_classes_by_id_and_label(pipeline, tmp_path, lines, ids):
    (tmp_path / "p.txt").write_text(lines)
    nibble(
        "calibrate",
        pipeline,
        tmp_path / "c",
        "--samples",
        2,
        "--steps",
        1,
        "--prompts",
        tmp_path / "p.txt",
        "--device",
        "cpu",
    )
    t = Calibration(tmp_path / "c").trajectory()
    assert [t.arguments(i)[1]["class_labels"][0] for i in range(2)] == [ids[0], ids[-1]]


def test_what_dit_does_not_have(pipeline, tmp_path):
    (tmp_path / "p.txt").write_text("7\na red circle\n")
    with pytest.raises(
        ValueError,
        match=r"prompt 'a red circle': expected a class id from 0 to 999 or a label of the pipeline, such as "
        r"'toilet tissue'",
    ):
        nibble("calibrate", pipeline, tmp_path / "c", "--prompts", tmp_path / "p.txt", "--device", "cpu")
    with pytest.raises(ValueError, match="DiTPipeline samples at 32 x 32 only, not at 64; leave --size out"):
        nibble("calibrate", pipeline, tmp_path / "c", "--size", 64, "--device", "cpu")


# -- other families


def flux(folder):
    tiny_flux.load().save_pretrained(folder)
    context, pooled = tiny_flux.encode_captions(["large red circle center on plain blue background"])
    x = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    return lambda model: tiny_flux.predict(model, x, torch.tensor([0.6]), context, pooled)


def pixart(folder):
    model = PixArtTransformer2DModel(num_attention_heads=4, attention_head_dim=32, num_layers=2,
    cross_attention_dim=128, caption_channels=32, sample_size=16)  # fmt: skip
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("scale_shift_table"):
                p.normal_()
    model.save_pretrained(folder)
    g = torch.Generator().manual_seed(0)
    x, text = torch.randn(2, 4, 16, 16, generator=g), torch.randn(2, 6, 32, generator=g)
    extra = {"resolution": None, "aspect_ratio": None}
    return lambda model: model(x, text, timestep=torch.tensor([300, 700]), added_cond_kwargs=extra).sample


@pytest.mark.quick
@pytest.mark.parametrize("kind", [flux, pixart])
@torch.no_grad()
def test_file_in_diffusers_model_is_its_quantized_layers(kind, tmp_path):
    folder, file = tmp_path / "transformer", tmp_path / "q.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run = kind(folder)
    rtn = METHODS["rtn"]
    quantize_file(folder, file, rtn, rtn.config)
    pack = PackFile(file)
    model = diffusers_model.load(folder / "config.json", file)
    again = diffusers_model.load(json.loads((folder / "config.json").read_text()), file)
    full = diffusers_model.full(folder)
    want = run(full)
    got = run(model)
    assert torch.equal(run(again), got)
    # ComfyUI's model, from which a node saves, has FLUX's norms under another name than files.
    rest = {re.sub(r"(_norm)\.scale$", r"\1.weight", k): pack.tensor(k) for k in pack.rest}
    save(tmp_path / "node.safetensors", {n: pack.layer(n) for n in pack.specs}, rest, pack.family, {}, [])
    other = dict(diffusers_model.load(folder, tmp_path / "node.safetensors").named_parameters())
    assert all(torch.equal(other.pop(name), p) for name, p in model.named_parameters())
    assert not other
    # The same by writing what the packed layers apply into the full-precision model: activations stay as they
    # are there.
    family = detect(pack.logical_shapes())
    names = diffusers_model.modules_of(family, family.layers(pack.logical_shapes()), full)
    for name in pack.specs:
        targets = names[name]
        rows = [full.get_submodule(t).out_features for t in targets]
        for target, piece in zip(targets, pack.layer(name).dequantize().split(rows), strict=True):
            full.get_submodule(target).weight.copy_(piece)
    for m in model.modules():
        if isinstance(m, QuantLinear):
            m.spec = replace(m.spec, parts=tuple(replace(p, activation=None) for p in m.spec.parts))
    assert relative_error(run(full), run(model)) < 1e-4
    assert 0.01 < relative_error(want, got) < 0.6


def test_files_that_do_not_fit(pipeline, tmp_path):
    folder, file = pipeline / "transformer", tmp_path / "q.safetensors"
    rtn = METHODS["rtn"]
    quantize_file(folder, file, rtn, rtn.config)
    config = json.loads((folder / "config.json").read_text())
    with pytest.raises(
        PackError,
        match=r"q.safetensors: pos_embed.proj.weight: the configuration asks for the shape \(64, 4, 2, 2\), "
        r"found \(128, 4, 2, 2\)",
    ):
        diffusers_model.load(config | {"num_attention_heads": 2}, file)
    with pytest.raises(PackError, match=r"transformer_blocks.2.* found no such tensor"):
        diffusers_model.load(config | {"num_layers": 3}, file)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(PackError, match="not one written by Nibble"):
        diffusers_model.load(folder, tmp_path / "a.safetensors")
