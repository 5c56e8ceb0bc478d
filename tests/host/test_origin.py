"""What a model is, beside its weights, survives Nibble Quantize, saving, loading, saving again, the command
and the export."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from comfyui_nibble.quant_core.cli.commands import app
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats import nibble
from comfyui_nibble.tests.assets.synthetic import random_state, sdxl_shapes, wan_shapes
from comfyui_nibble.tests.host.inside import nodes_in, sample
from comfyui_nibble.tests.host.sweep.registry import ENTRIES
from comfyui_nibble.tests.host.sweep.tiny import make

EMPTY = torch.empty(0)


@pytest.fixture
def folder(comfy, tmp_path, one_thread):
    with nodes_in(tmp_path):
        yield tmp_path


def quantized(model, method="rtn"):
    from comfyui_nibble.nodes.quantize import NibbleQuantize

    return NibbleQuantize.execute(model, method, 8, False).args[0]


def saved(model, name="model"):
    from comfyui_nibble.nodes.files import NibbleSaveModel

    return NibbleSaveModel.execute(model, f"diffusion_models/{name}").args[0]


def loaded(path):
    from comfyui_nibble.nodes.host.build import load

    return load(path)


def rebuilt(patcher):
    from comfyui_nibble.nodes.host.build import rebuild

    return rebuild(patcher)


def command(*arguments):
    done = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert done.exit_code == 0, done.output


def facts(patcher):
    """All that a sampler reads of a model beside its weights."""
    model, schedule = patcher.model, patcher.model.model_sampling
    network = {
        k: v for k, v in vars(model.diffusion_model).items() if isinstance(v, (bool, int, float, str, tuple))
    }
    return {
        "class": type(model.model_config).__name__,
        "model": type(model).__name__,
        "type": model.model_type.name,
        "latent": type(model.latent_format).__name__,
        "schedule": {k: v for k, v in vars(schedule).items() if isinstance(v, (int, float, bool))},
        "sigmas": float(schedule.sigma_max), 
        "concat": model.concat_keys,
        "network": {k: v for k, v in network.items() if k not in ("training", "dtype")},
    }  # fmt: skip


SDXL = {
    "EPS": {},
    "V_PREDICTION": {"v_pred": EMPTY},
    "V_PREDICTION, zero terminal SNR": {"v_pred": EMPTY, "ztsnr": EMPTY},
    "EDM": {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)},
    "V_PREDICTION_EDM": {
        "edm_vpred.sigma_max": torch.tensor(120.0),
        "edm_vpred.sigma_min": torch.tensor(0.003),
    },
}


@pytest.fixture(scope="module")
def sdxl_state():
    return random_state(sdxl_shapes())


@pytest.mark.parametrize("kind", SDXL)
def test_prediction_of_an_sdxl_checkpoint(comfy, folder, sdxl_state, kind):
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in sdxl_state.items()} | SDXL[kind],
        folder / "sdxl.safetensors",
    )
    model = comfy.sd.load_checkpoint_guess_config(
        str(folder / "sdxl.safetensors"), output_vae=False, output_clip=False
    )[0]
    want = facts(model)
    assert want["type"] == kind.partition(",")[0]
    made = quantized(model)
    first = saved(made)
    again = saved(loaded(first), "again")
    command("quantize", folder / "sdxl.safetensors", folder / "command.safetensors", "--method", "rtn")
    command("convert", folder / "command.safetensors", folder / "copy.safetensors", "--to", "nibble")
    for patcher in (
        made,
        *(loaded(p) for p in (first, again, folder / "command.safetensors", folder / "copy.safetensors")),
    ):
        assert facts(patcher) == want
    for source in (first, folder / "command.safetensors"):
        native = folder / f"native_{len(str(source))}.safetensors"
        command("convert", source, native, "--to", "native", "--lossy")
        assert facts(loaded(native)) == want
        assert facts(comfy.sd.load_diffusion_model(str(native))) == want


@pytest.mark.parametrize("behind", [False, True], ids=["in front", "behind"])
@pytest.mark.parametrize("zsnr", [False, True])
def test_a_prediction_that_a_node_has_set_is_kept(comfy, folder, sdxl_state, caplog, zsnr, behind):
    """As ComfyUI's own save nodes keep it, in the file and in an export; whichever side the node is on."""
    from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete

    patch = lambda model: ModelSamplingDiscrete().patch(model, "v_prediction", zsnr)[0]
    model = comfy.sd.load_diffusion_model_state_dict(dict(sdxl_state))
    made = patch(quantized(model)) if behind else quantized(patch(model))
    path = saved(made)
    command("convert", path, folder / "native.safetensors", "--to", "native", "--lossy")
    want = made.get_model_object("model_sampling")
    for again in (
        loaded(path),
        loaded(saved(loaded(path), "again")),
        comfy.sd.load_diffusion_model(str(folder / "native.safetensors")),
    ):
        assert again.model.model_type.name == "V_PREDICTION"
        assert again.model.model_sampling.zsnr == zsnr
        assert torch.equal(again.model.model_sampling.sigmas, want.sigmas)
    assert "the file is without" not in caplog.text


def test_a_sampling_without_a_place_in_a_file_is_named(comfy, folder, full, caplog):
    from comfy_extras.nodes_model_advanced import ModelSamplingFlux

    path = saved(ModelSamplingFlux().patch(quantized(full), 1.15, 0.5, 512, 512)[0])
    assert "the file is without the model_sampling (ModelSamplingAdvanced) that a node has set" in caplog.text
    assert facts(loaded(path)) == facts(full)


@pytest.mark.parametrize(("spread", "kind"), [(1.0, "V_PREDICTION"), (0.01, "EPS")])
def test_prediction_of_stable_diffusion_2(comfy, folder, monkeypatch, spread, kind):
    """ComfyUI tells it by the values of one bias of the network; by a file of the command too."""
    import comfy.supported_models

    entry = next(e for e in ENTRIES if e.name == "SD20")
    monkeypatch.setitem(comfy.supported_models.SD20.unet_config, "model_channels", 64)
    whole = replace(entry, narrow={"model_channels": 64, "context_dim": 1024})
    state = {k: v.bfloat16() for k, v in make(whole).model.diffusion_model.state_dict().items()}
    bias = "output_blocks.11.1.transformer_blocks.0.norm1.bias"
    state[bias] = spread * torch.linspace(-1, 1, len(state[bias])).bfloat16()
    save_file(state, folder / "sd2.safetensors")
    model = comfy.sd.load_diffusion_model(str(folder / "sd2.safetensors"))
    want = facts(model)
    assert (want["class"], want["type"]) == ("SD20", kind)
    made = quantized(model)
    command("quantize", folder / "sd2.safetensors", folder / "command.safetensors", "--method", "rtn")
    again = saved(loaded(folder / "command.safetensors"), "again")
    for patcher in (made, *(loaded(p) for p in (saved(made), folder / "command.safetensors", again))):
        assert facts(patcher) == want


WAN = {  # header config: what ComfyUI makes of the same weights with it
    '{"model_type": "flow_rvs"}': ("WAN21_FlowRVS", "IMG_TO_IMG_FLOW"),
    '{"causal_ar": true}': ("WAN21_CausalAR_T2V", "FLOW"),
    "{}": ("WAN21_T2V", "FLOW"),
}


@pytest.mark.parametrize("config", WAN)
def test_a_config_in_the_header_of_wan(comfy, folder, config):
    metadata = {"config": json.dumps({"transformer": json.loads(config)}), "modelspec.title": "Wan of a test"}
    save_file(random_state(wan_shapes()), folder / "wan.safetensors", metadata)
    model = comfy.sd.load_diffusion_model(str(folder / "wan.safetensors"))
    want = facts(model)
    assert (want["class"], want["type"]) == WAN[config]
    path = saved(quantized(model))
    command("quantize", folder / "wan.safetensors", folder / "command.safetensors", "--method", "rtn")
    command("convert", path, folder / "native.safetensors", "--to", "native", "--lossy")
    for file in (path, folder / "command.safetensors", folder / "native.safetensors"):
        assert facts(loaded(file)) == want
    assert facts(comfy.sd.load_diffusion_model(str(folder / "native.safetensors"))) == want
    assert nibble.PackFile(path).origin.metadata == metadata
    with safe_open(folder / "native.safetensors", "pt") as f:
        assert f.metadata()["modelspec.title"] == "Wan of a test"


def test_a_config_without_its_file_reaches_stock_comfyui(comfy, folder):
    """A MODEL of which nobody knows the file: the export's header says what its weights do not."""
    metadata = {"config": json.dumps({"transformer": {"model_type": "flow_rvs"}})}
    model = comfy.sd.load_diffusion_model_state_dict(random_state(wan_shapes()), metadata=metadata)
    command("convert", saved(quantized(model)), folder / "native.safetensors", "--to", "native", "--lossy")
    assert facts(comfy.sd.load_diffusion_model(str(folder / "native.safetensors"))) == facts(model)


def test_settings_that_a_node_has_changed_in_the_config_itself(comfy, folder, tiny_state):
    model = comfy.sd.load_diffusion_model_state_dict(dict(tiny_state))
    model.model.model_config.sampling_settings["shift"] = 2.5
    model.model.model_sampling = comfy.model_base.model_sampling(
        model.model.model_config, model.model.model_type
    )
    made = quantized(model)
    assert facts(made)["schedule"] == facts(loaded(saved(made)))["schedule"] == facts(model)["schedule"]
    assert made.model.model_sampling.shift == 2.5


@pytest.mark.parametrize(
    ("kind", "settings"), [("rtn", ()), ("native", ("--set", "quality_db=35")), ("svdquant", ("--rank", "8"))]
)
def test_the_stock_loaders_stop_with_a_sentence(comfy, folder, kind, settings):
    """8 bits too, whose codes have the full shape under the name `weight`."""
    command("quantize", tiny_flux.CHECKPOINT, folder / "flux.safetensors", "--method", kind, *settings)
    for load in (comfy.sd.load_diffusion_model, comfy.sd.load_checkpoint_guess_config):
        with pytest.raises(KeyError, match="load it with the node Nibble Load Diffusion Model"):
            load(str(folder / "flux.safetensors"))


def test_the_stock_loader_stops_where_detection_knows_no_such_shapes(comfy, folder, sdxl_state):
    save_file(sdxl_state, folder / "sdxl.safetensors")
    command("quantize", folder / "sdxl.safetensors", folder / "q.safetensors", "--method", "rtn")
    with pytest.raises(KeyError, match="Nibble Load Diffusion Model"):
        comfy.sd.load_diffusion_model(str(folder / "q.safetensors"))


def rewritten(path, out, tensors=lambda t: None, header=lambda h: None):
    with safe_open(path, "pt") as f:
        found = json.loads(f.metadata()["nibble"])
    held = load_file(path)
    tensors(held)
    header(found)
    save_file(held, out, {"nibble": json.dumps(found)})
    return out


@pytest.fixture
def flux_file(folder, full):
    return saved(quantized(full))


@pytest.mark.parametrize(
    "key",
    ["img_in.bias", "txt_in.weight", "single_blocks.0.norm.query_norm.weight", "final_layer.linear.bias"],
)
@pytest.mark.parametrize("record", [True, False])
def test_missing_tensors_are_listed(folder, flux_file, key, record):
    """With the record and without it, as files of 0.5 are."""
    from comfyui_nibble.nodes.host.frame import IncompleteModel

    out = rewritten(
        flux_file,
        folder / "x.safetensors",
        lambda t: t.pop(key),
        lambda h: None if record else h.update(version=1, origin={}),
    )
    if not record:
        out = rewritten(
            out,
            folder / "y.safetensors",
            lambda t: [t.pop(k) for k in list(t) if k.startswith("model.diffusion_model.")],
        )
    with pytest.raises(IncompleteModel, match=f"1 tensors of the model .Flux.*. are missing: {key}"):
        loaded(out)


@pytest.mark.parametrize(("name", "key"), [("SD3", "pos_embed"), ("SeedVR2", "positive_conditioning")])
def test_a_missing_table_that_the_network_leaves_empty_is_listed(folder, name, key):
    """A buffer, which no module computes: it would be whatever was in memory."""
    from comfyui_nibble.nodes.host.frame import IncompleteModel

    path = saved(quantized(make(next(e for e in ENTRIES if e.name == name))))
    assert loaded(path)
    out = rewritten(path, folder / "x.safetensors", lambda t: t.pop(key))
    with pytest.raises(IncompleteModel, match=f"1 tensors of the model .{name}. are missing: {key}"):
        loaded(out)


def test_unexpected_tensors_are_named(folder, flux_file, caplog):
    loaded(
        rewritten(
            flux_file,
            folder / "x.safetensors",
            lambda t: t.update({"nobody.weight": torch.ones(2), "img_in.extra": torch.ones(2)}),
        )
    )
    assert "2 tensors have no place in the model and are not used: img_in.extra, nobody.weight" in caplog.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"class": "Flux9"},
            r"x\.safetensors: a Flux9 model, and this ComfyUI has no class of that name\. Update ComfyUI",
        ),
        ({"model_type": "NEW"}, r"lacks or has an unknown 'NEW'"),
        ({"latent_format": "Flux9"}, r"its latent format is Flux9, which this ComfyUI does not have"),
        ({"model": "Other"}, r"a Other with prediction \w+; this ComfyUI makes a Flux"),
        (
            {"unet_config": {"image_model": "flux", "unheard_of": 1}},
            r"class Flux\w* could not make the model \(TypeError",
        ),
    ],
)
def test_what_this_comfyui_does_not_have_is_said_by_name(folder, flux_file, change, message):
    from comfyui_nibble.nodes.host.frame import DetectionError

    with pytest.raises(DetectionError, match=message):
        loaded(
            rewritten(
                flux_file, folder / "x.safetensors", header=lambda h: h["origin"]["host"].update(change)
            )
        )


def test_files_of_earlier_versions_load_as_before(folder, flux_file):
    def bare(t):
        for key in [k for k in t if k.startswith("model.diffusion_model.")]:
            del t[key]

    def old(h):
        h["version"] = 1
        del h["origin"]

    path = rewritten(flux_file, folder / "old.safetensors", bare, old)
    assert torch.equal(sample(loaded(path)), sample(loaded(flux_file)))


def test_a_model_is_freed_with_its_last_reference(comfy, folder, flux_file):
    """Without waiting for the garbage collector: a second model of 12 GB would not fit beside a first that
    nobody uses."""
    import gc
    import weakref

    gc.collect()
    gc.disable()
    try:
        source = comfy.sd.load_diffusion_model(str(tiny_flux.CHECKPOINT))
        made, file = quantized(source), loaded(flux_file)
        again = rebuilt(file)
        assert again.model is not file.model
        networks = [weakref.ref(p.model.diffusion_model) for p in (source, file)]
        del source, file
        assert [n() for n in networks] == [None, None]
        assert made.model.model_type == again.model.model_type  # which live on without them
    finally:
        gc.enable()
