"""`nibble calibrate` on whole diffusers pipelines: small random text encoders and VAEs, FLUX's transformer is
the shipped one."""

import json
import shutil
from functools import wraps
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    EulerDiscreteScheduler,
    FluxPipeline,
    PixArtSigmaPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextModelWithProjection,
)
from typer.testing import CliRunner

from comfyui_nibble.kernels.operator.errors import NamedError
from comfyui_nibble.quant_core.calibration import Calibration, CalibrationError
from comfyui_nibble.quant_core.calibration.plan import inputs_of
from comfyui_nibble.quant_core.cli.commands import app
from comfyui_nibble.quant_core.evaluation.demo.pictures import TEXT_DIM
from comfyui_nibble.quant_core.families import FLUX, PIXART, SDXL, UnknownArchitecture
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.pipelines import PROMPTS, clip, flux, pixart, tokenizer, vae
from comfyui_nibble.tests.support import single_thread

SAMPLES, STEPS, SIZE = 3, 2, 64


IMAGE_TOKENS = (SIZE // 8 // 2) ** 2
FITTED = 2  # the last sample of three is held out


def invoke(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def nibble(*args):
    result = invoke(*args)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


KINDS = {
    "flux": SimpleNamespace(
        family=FLUX, build=flux, pipeline=FluxPipeline, layers=16, weight_only=4, inputs=13
    ),
    "pixart": SimpleNamespace(
        family=PIXART, build=pixart, pipeline=PixArtSigmaPipeline, layers=14, weight_only=0, inputs=13
    ),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Layers this small take seconds instead of milliseconds where other processes compete for the cores of a
    thread pool."""
    with single_thread():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_state):
    """kind -> its pipeline's folder."""
    root = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for name, kind in KINDS.items():
            kind.build(tiny_state).save_pretrained(root / name)
    (root / "prompts.txt").write_text("\n".join([*PROMPTS, ""]))
    return root


def calibrate(saved, name, out, *, samples=SAMPLES, steps=STEPS, size=("--size", SIZE)):
    """The arguments of the command. name: of the pipeline, or its path."""
    settings = [
        "--prompts",
        saved / "prompts.txt",
        "--samples",
        samples,
        "--steps",
        steps,
        *size,
        "--device",
        "cpu",
    ]
    return ["calibrate", saved / name, out, *settings]


@pytest.fixture(scope="module", params=KINDS)
def done(request, saved, tmp_path_factory):
    """A finished calibration of each kind."""
    kind, out = KINDS[request.param], tmp_path_factory.mktemp(request.param) / "calibration"
    text = nibble(*calibrate(saved, request.param, out))
    run = {"name": request.param, "folder": saved / request.param, "out": out, "text": text}
    return SimpleNamespace(**run, **vars(kind))


@pytest.fixture
def sampled(done, monkeypatch):
    """The seeds of the sampling runs; a run with the seed put into `dies_at` is interrupted."""
    seeds, real = [], done.pipeline.__call__

    @wraps(real)
    def call(self, *args, **kwargs):
        seeds.append(kwargs["generator"].initial_seed())
        if seeds[-1] == log.dies_at:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    log = SimpleNamespace(seeds=seeds, dies_at=None)
    monkeypatch.setattr(done.pipeline, "__call__", call)
    return log


def _values(file, **values):
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


DAMAGES = {
    "header": ("text_encoder/model.safetensors", lambda f: f.write_bytes(f.read_bytes()[:100])),
    "nested": ("text_encoder/config.json", lambda f: f.write_text('{"a": ' + "[" * 10_000)),
    "cut": ("tokenizer/tokenizer_config.json", lambda f: f.write_text(f.read_text()[:30])),
    "list": ("model_index.json", lambda f: _values(f, scheduler=["diffusers", "X", 3])),
    "class": ("model_index.json", lambda f: _values(f, vae=["\x1b[2J", "y" * 5000])),
    "number": ("vae/config.json", lambda f: _values(f, block_out_channels=["x"])),
    "kind": ("vae/config.json", lambda f: _values(f, act_fn={"tensor": 1})),
    "sizes": ("transformer/config.json", lambda f: _values(f, caption_channels=128)),
    "text": ("text_encoder/config.json", lambda f: _values(f, d_kv=64)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_pipeline_is_an_error_that_names_it(saved, tmp_path, damage):
    """Whatever diffusers and transformers raise of it, which may be of any type."""
    name, change = DAMAGES[damage]
    shutil.copytree(saved / "pixart", tmp_path / "damaged")
    change(tmp_path / "damaged" / name)
    result = invoke(*calibrate(saved, tmp_path / "damaged", tmp_path / "out"))
    assert isinstance(result.exception, NamedError), repr(result.exception)
    text = str(result.exception)
    assert text.startswith(str(tmp_path / "damaged"))
    assert text.isprintable()
    assert len(text) < 2500


def test_prompts_that_are_no_text_are_named(saved, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"\xff\xfe\0")
    result = invoke("calibrate", saved / "pixart", tmp_path / "out", "--prompts", tmp_path / "prompts.txt")
    assert "prompts.txt: not text in UTF-8" in str(result.exception)


def test_observes_every_input_of_the_model(done):
    checkpoint, calibration = Checkpoint(done.folder / "transformer"), Calibration(done.out)
    expected = inputs_of(done.family.mapped(checkpoint.shapes))
    assert calibration.names == [i.name for i in expected]
    assert len(expected) == done.inputs
    assert calibration.meta["model"] == checkpoint.fingerprint()
    assert calibration.meta["family"] == done.family.name
    assert done.text == (
        f"{done.out}: {done.inputs} inputs of model {checkpoint.fingerprint()}, calibration "
        f"{calibration.hash}\n"
    )
    for item in expected:
        stats = calibration.get(item.name)
        assert (stats.width, stats.blocks) == (item.width, item.blocks)
        assert stats.count > 0
        assert (stats.absmax > 0).all()
        assert stats.hessians.keys() == set(item.blocks)
        for (start, stop), hessian in stats.hessians.items():
            assert (hessian.diagonal() <= 1.001 * stats.count * stats.absmax[start:stop].square()).all()


def test_counts_are_those_of_the_tokens(done):
    calibration = Calibration(done.out)
    count = lambda name: calibration.get(name).count
    held_out = lambda name: len(calibration.get(name).tokens)
    if done.name == "flux":
        image, text = IMAGE_TOKENS, 512
        assert count("double_blocks.0.img_attn.qkv") == FITTED * STEPS * image
        assert count("double_blocks.0.txt_mlp.2") == FITTED * STEPS * text
        assert count("single_blocks.1.linear2") == FITTED * STEPS * (image + text)
        assert held_out("double_blocks.0.img_attn.qkv") == STEPS * image
        assert held_out("single_blocks.1.linear2") == 1024  # of STEPS * 528
    else:
        image, words = (
            2 * IMAGE_TOKENS,
            [2 * (len(p.split()) + 1) for p in PROMPTS],
        )  # with and without the prompt
        assert count("blocks.1.attn.qkv") == FITTED * STEPS * image
        assert count("blocks.0.mlp.fc2") == FITTED * STEPS * image
        assert count("blocks.0.cross_attn.kv_linear") == STEPS * sum(
            words[:FITTED]
        )  # and not the padding to 300 tokens
        assert held_out("blocks.0.cross_attn.kv_linear") == STEPS * words[2]
    assert len(calibration.get(calibration.names[0]).timesteps.unique()) == STEPS


def test_quantizes_the_transformer_of_the_pipeline(done, tmp_path):
    transformer, out = done.folder / "transformer", tmp_path / "q.safetensors"
    method = ["--method", "svdquant", "--no-gptq", "--rank", 16, "--device", "cpu"]
    text = nibble("quantize", transformer, out, "--calibration", done.out, *method)
    assert f"{done.layers} layers" in text
    checkpoint, pack = Checkpoint(transformer), PackFile(out)
    layers = {layer.name: layer for layer in done.family.mapped(checkpoint.shapes)}
    assert list(pack.specs) == list(layers)
    assert pack.logical_shapes() == checkpoint.shapes
    assert pack.provenance["model"] == checkpoint.fingerprint()
    assert pack.provenance["calibration"] == {
        "hash": Calibration(done.out).hash,
        "samples": SAMPLES,
        "seed": 0,
    }
    sqnr = {row["name"]: row["sqnr_db"] for row in pack.report if row["nbytes"]}
    assert sum(layer.weight_only for layer in layers.values()) == done.weight_only
    assert min(sqnr.values()) > 15
    found = json.loads(nibble("inspect", out, "--json"))
    assert (found["kind"], found["family"], found["quantized layers"]) == (
        "Nibble model",
        done.family.title,
        done.layers,
    )


def test_inspect_names_the_model_of_both(done):
    model = Checkpoint(done.folder / "transformer").fingerprint()
    found = json.loads(nibble("inspect", done.out, "--json"))
    assert (found["kind"], found["inputs"], found["model"]) == ("calibration", done.inputs, model)
    assert (found["settings"]["steps"], found["settings"]["size"]) == (STEPS, SIZE)
    found = json.loads(nibble("inspect", done.folder / "transformer", "--json"))
    layers = len(
        done.family.layers(Checkpoint(done.folder / "transformer").shapes)
    )  # one more of PixArt's with a calibration in ComfyUI
    assert (found["kind"], found["quantizable layers"], found["model"]) == (
        "full-precision checkpoint",
        layers,
        model,
    )


def test_second_run_samples_nothing_again(done, saved, sampled):
    assert nibble(*calibrate(saved, done.name, done.out)) == done.text
    assert sampled.seeds == []


def test_interrupted_run_goes_on_with_the_same_result(done, saved, sampled, tmp_path):
    sampled.dies_at = 1
    assert invoke(*calibrate(saved, done.name, tmp_path / "cut")).exit_code != 0
    with pytest.raises(CalibrationError, match="stopped after 1 of 3 samples"):
        Calibration(tmp_path / "cut")
    sampled.dies_at = None
    nibble(*calibrate(saved, done.name, tmp_path / "cut"))
    assert sampled.seeds == [0, 1, 1, 2]
    whole, resumed = Calibration(done.out), Calibration(tmp_path / "cut")
    assert whole.names == resumed.names
    for name in whole.names:
        a, b = whole.get(name), resumed.get(name)
        assert a.count == b.count
        assert all(
            torch.equal(getattr(a, leaf), getattr(b, leaf))
            for leaf in ("absmax", "tokens", "keys", "timesteps")
        )
        assert all(torch.equal(a.hessians[k], b.hessians[k]) for k in a.hessians)


def test_size_is_the_model_s_own_unless_given(saved, tmp_path):
    """PixArt's pipeline would round any size to one that it was trained at, 256 here."""
    nibble(*calibrate(saved, "pixart", tmp_path, samples=1, steps=1, size=()))
    calibration = Calibration(tmp_path)
    assert calibration.meta["settings"]["size"] == 256
    assert calibration.get("blocks.0.attn.qkv").count == 2 * (256 // 16) ** 2


def test_kontext_without_a_picture(saved, tmp_path):
    """Its pipeline takes a picture before the prompt, and scales any size to a square of 1024 unless told not
    to."""
    kontext = shutil.copytree(saved / "flux", tmp_path / "kontext")
    index = kontext / "model_index.json"
    index.write_text(index.read_text().replace('"FluxPipeline"', '"FluxKontextPipeline"'))
    nibble(*calibrate(saved, kontext, tmp_path / "calibration", samples=1, steps=1))
    calibration = Calibration(tmp_path / "calibration")
    assert calibration.meta["model"] == Checkpoint(saved / "flux" / "transformer").fingerprint()
    assert calibration.get("double_blocks.0.img_attn.qkv").count == IMAGE_TOKENS


@pytest.mark.quick
def test_other_models_are_refused_before_they_load(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="without a `transformer` or `unet` folder"):
        nibble("calibrate", tmp_path, tmp_path / "out")
    vae(4).save_pretrained(tmp_path / "transformer")
    with pytest.raises(UnknownArchitecture, match="Supported: FLUX.1, .*PixArt-alpha and PixArt-Sigma"):
        nibble("calibrate", tmp_path, tmp_path / "out")


@pytest.mark.parametrize("component", ["vae", "text_encoder_2", "transformer"])
def test_pickled_weights_are_refused_by_name_before_the_work(saved, tmp_path, monkeypatch, component):
    pipe = shutil.copytree(saved / "flux", tmp_path / "pipe")
    [weights] = (pipe / component).glob("*.safetensors")
    pickled = weights.with_suffix(".bin")
    torch.save({"w": torch.zeros(1)}, pickled)
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    calibrated = calibrate(saved, pipe, tmp_path / "out", samples=1, steps=1)
    nibble(*calibrated)  # beside safetensors, nobody looks at it
    weights.unlink()
    with pytest.raises(
        CheckpointError, match=rf"{component}/{pickled.name}: pickled weights, .*safe_serialization=True"
    ):
        nibble(*calibrated[:2], tmp_path / "again", *calibrated[3:])
    assert not (tmp_path / "again").exists()


def test_diffusers_itself_is_told_to_open_no_pickle(saved, tmp_path, monkeypatch):
    """Also where the folder was changed after the check."""
    pipe = shutil.copytree(saved / "flux", tmp_path / "pipe")
    for component in ("vae", "text_encoder"):
        [weights] = (pipe / component).glob("*.safetensors")
        torch.save(
            {"w": torch.zeros(1)},
            weights.with_name({"vae": "diffusion_pytorch_model.bin"}.get(component, "pytorch_model.bin")),
        )
        weights.unlink()
    monkeypatch.setattr(
        "comfyui_nibble.quant_core.diffusers_host.pipeline.require_safetensors", lambda folder: None
    )
    monkeypatch.setattr("torch.load", lambda *args, **kwargs: pytest.fail("a pickle was opened"))
    with pytest.raises(OSError, match="safetensors"):
        nibble(*calibrate(saved, pipe, tmp_path / "out", samples=1, steps=1))


def test_file_without_prompts_is_named(saved, tmp_path):
    (tmp_path / "empty.txt").write_text("\n \n")
    with pytest.raises(ValueError, match="empty.txt: holds no prompts"):
        nibble("calibrate", saved / "flux", tmp_path / "out", "--prompts", tmp_path / "empty.txt")


def sdxl():
    unet = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(64, 128), layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2), attention_head_dim=(1, 2), cross_attention_dim=2 * TEXT_DIM,
        use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + TEXT_DIM,
    )  # fmt: skip
    config = clip(TEXT_DIM).config
    config.projection_dim = TEXT_DIM
    return StableDiffusionXLPipeline(
        vae=vae(4), text_encoder=clip(TEXT_DIM), tokenizer=tokenizer(77),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer_2=tokenizer(77), unet=unet, scheduler=EulerDiscreteScheduler(),
    )  # fmt: skip


def test_a_u_net(tmp_path):
    sdxl().save_pretrained(tmp_path / "pipe")
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    options = (
        "--prompts",
        tmp_path / "prompts.txt",
        "--samples",
        2,
        "--steps",
        2,
        "--size",
        SIZE,
        "--device",
        "cpu",
    )
    nibble("calibrate", tmp_path / "pipe", tmp_path / "c", *options)
    checkpoint, calibration = Checkpoint(tmp_path / "pipe"), Calibration(tmp_path / "c")
    assert checkpoint.family is SDXL
    layers = SDXL.layers(checkpoint.shapes)
    assert set(calibration.names) == {layer.input for layer in layers}
    assert (
        calibration.get("input_blocks.3.1.proj_in").count == 2 * 2 * (SIZE // 8 // 2) ** 2
    )  # 2 steps, both halves of CFG, one sample fitted
    nibble(
        "quantize",
        tmp_path / "pipe",
        tmp_path / "q.safetensors",
        "--calibration",
        tmp_path / "c",
        "--method",
        "rtn",
    )
    assert set(PackFile(tmp_path / "q.safetensors").specs) == {layer.name for layer in layers}
