import json
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from comfyui_nibble.kernels.target import target_of
from comfyui_nibble.quant_core.cli.quantize import quantize_file
from comfyui_nibble.quant_core.convert import convert, writers
from comfyui_nibble.quant_core.convert.inspect import describe, description_text
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.formats import nibble as pack
from comfyui_nibble.quant_core.formats.detect import kind_of, open_quantized
from comfyui_nibble.quant_core.formats.kitchen.read import KitchenFile
from comfyui_nibble.quant_core.formats.nibble import PackError, PackFile
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer, same_bits
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.synthetic import flux_shapes
from comfyui_nibble.tests.support import nibble, relative_error

LINEAR2 = "single_blocks.0.linear2"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A small FLUX in 16 bit."""
    g = torch.Generator().manual_seed(0)
    state = {
        k: (torch.randn(s, generator=g) * s[-1] ** -0.5).bfloat16()
        for k, s in flux_shapes(hidden=128, context=64, pooled=64).items()
    }
    path = tmp_path_factory.mktemp("full") / "flux.safetensors"
    save_file(state, path)
    return path


@pytest.fixture(scope="module")
def packed(source):
    """{method: Nibble file}"""
    made = {}
    for method in ("convrot", "svdquant", "splitquant"):
        made[method] = source.with_name(f"{method}.safetensors")
        nibble("quantize", source, made[method], "--method", method)
    return made


def tensors(path):
    with safe_open(path, "pt") as f:
        return {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118


def same(a, b):
    a, b = tensors(a), tensors(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.quick
def test_nvfp4_there_and_back(source, tmp_path):
    """What the method native makes on the nvfp4 grid is ComfyUI's, and comes back as it was written."""
    own, native, back, again = (tmp_path / f"{n}.safetensors" for n in ("own", "native", "back", "again"))
    chosen = ("--method", "native", "--grid", "nvfp4", "--set", "quality_db=0", "--device", "cpu")
    nibble("quantize", source, own, *chosen)
    said = nibble("convert", own, native, "--to", "native")
    assert "13 of 13 quantized layers are written as they are, nothing is lost" in said
    assert "13 layers read back bit for bit" in said
    assert KitchenFile(native).kind == "ComfyUI quantized model (3 int8_tensorwise, 10 nvfp4)"
    nibble("convert", native, back, "--to", "nibble")
    nibble("convert", back, again, "--to", "native")
    assert same(native, again)
    before, after = PackFile(own), PackFile(back)
    assert before.specs == after.specs
    for name in before.specs:
        assert same_bits(before.layer(name).dequantize(), after.layer(name).dequantize())
    assert describe(native)["stock ComfyUI"] == "loads it with Load Diffusion Model"


@pytest.mark.quick
def test_nvfp4_of_rows_is_no_layer_of_comfyuis(source, tmp_path):
    own = tmp_path / "own.safetensors"
    nibble("quantize", source, own, "--method", "rtn", "--grid", "nvfp4")
    with pytest.raises(convert.LossyConversion, match="nvfp4 activations with scales of tokens or either"):
        nibble("convert", own, tmp_path / "native.safetensors", "--to", "native")


@pytest.mark.quick
def test_there_and_back_is_the_same_file(packed, tmp_path):
    """ConvRot layers are ComfyUI's own but for the modulation, which is weight-only and becomes int8."""
    native, back, again = (tmp_path / f"{n}.safetensors" for n in ("native", "back", "again"))
    said = nibble("convert", packed["convrot"], native, "--to", "native", "--lossy")
    assert "10 of 13 quantized layers are written as they are" in said
    assert "3 as int8 instead, double_blocks.0.img_mod.lin, ..." in said
    assert "10 layers read back bit for bit" in said
    assert kind_of(native) == "kitchen"
    assert "nothing is lost" in nibble("convert", native, back, "--to", "nibble")
    nibble("convert", back, again, "--to", "native")
    assert same(native, again)
    before, after = PackFile(packed["convrot"]), PackFile(back)
    for name, spec in before.specs.items():
        if not spec.weight_only:
            assert after.specs[name] == spec
            assert all(
                torch.equal(after.layer(name).tensors[k], t) for k, t in before.layer(name).tensors.items()
            )
    assert after.provenance == before.provenance


@pytest.mark.quick
def test_what_would_be_lost_is_said_first_and_nothing_is_written(packed, tmp_path):
    out = tmp_path / "out.safetensors"
    with pytest.raises(convert.LossyConversion) as error:
        nibble("convert", packed["svdquant"], out, "--to", "native")
    assert "0 of 13 quantized layers are written as they are" in str(error.value)
    assert "Say that this may be" in str(error.value)
    assert not out.exists()


@pytest.mark.parametrize(("replacement", "bound"), [("int8", 0.02), ("16 bit", 0.003)])
def test_replacements_keep_the_values(packed, tmp_path, replacement, bound):
    out = tmp_path / "out.safetensors"
    nibble("convert", packed["splitquant"], out, "--to", "native", "--lossy", "--replacement", replacement)
    before, after = (
        PackFile(packed["splitquant"]),
        tensors(out) if replacement != "int8" else KitchenFile(out),
    )
    for name in before.specs:
        found = after[f"{name}.weight"] if replacement != "int8" else after.layer(name).dequantize()
        assert relative_error(before.layer(name).dequantize(), found) < bound


def test_kitchen_takes_svdquant_as_it_is_but_for_two_parts(packed, tmp_path):
    planned = convert.plan(open_quantized(packed["svdquant"]), "kitchen")
    assert LINEAR2 in planned.lossy
    exact = set(planned.source.specs) - set(planned.lossy)
    assert exact == {n for n, s in planned.source.specs.items() if not s.weight_only} - {LINEAR2}
    convert.convert(planned, tmp_path / "k.safetensors", lossy=True)
    read = KitchenFile(tmp_path / "k.safetensors")
    for name in exact:
        assert torch.equal(read.layer(name).tensors["weight"], planned.source.layer(name).tensors["weight"])
    assert read.specs[LINEAR2].parts[0].weight.bits == 8


@pytest.mark.quick
def test_refusals(packed, source, tmp_path):
    with pytest.raises(
        ValueError, match=r"unknown format 'gguf'; choose of native, kitchen, nunchaku, nibble"
    ):
        nibble("convert", packed["convrot"], tmp_path / "x", "--to", "gguf")
    with pytest.raises(PackError, match="not a quantized model that this pack knows"):
        nibble("convert", source, tmp_path / "x", "--to", "native")
    with pytest.raises(ValueError, match="is read by this command .* and would be written over"):
        nibble("convert", packed["convrot"], packed["convrot"], "--to", "nibble")
    with pytest.raises(
        ValueError, match=r"not possible: .* Quantize the full-precision model with the method svdquant"
    ):
        nibble("convert", packed["splitquant"], tmp_path / "x", "--to", "nunchaku")


def test_nunchaku_there_and_back(packed, tmp_path):
    """SVDQuant without data: nothing but the rank is filled up. Modulation with a low rank of its own loses
    it, and that is said."""
    source = PackFile(packed["svdquant"])
    out, back = tmp_path / "n.safetensors", tmp_path / "back.safetensors"
    said = nibble("convert", packed["svdquant"], out, "--to", "nunchaku")
    assert (
        "13 of 13 quantized layers are written as they are, but for biases, which nunchaku has in 16 bit"
        in said
    )
    assert "biases of" in said
    assert "13 layers read back bit for bit" in said
    assert kind_of(out) == "nunchaku"
    nibble("convert", out, back, "--to", "nibble", "--lossy")
    for name, layer in ((n, source.layer(n)) for n in source.specs):
        assert relative_error(layer.dequantize(), PackFile(back).layer(name).dequantize()) < 1e-6

    ranked = tmp_path / "ranked.safetensors"
    mod = "single_blocks.0.modulation.lin"
    layers = {name: source.layer(name) for name in source.specs}
    layers[mod] = with_rank(layers[mod], 4)
    pack.save(ranked, layers, {k: source.tensor(k) for k in source.rest}, "flux", {}, [])
    planned = convert.plan(PackFile(ranked), "nunchaku")
    assert list(planned.lossy) == [mod]
    assert (
        "1 as W4A16 rounded to nearest instead, single_blocks.0.modulation.lin: it has a low-rank branch "
        "of rank 4"
    ) in "\n".join(planned.lines())
    with pytest.raises(convert.LossyConversion):
        convert.convert(planned, tmp_path / "r.safetensors")
    assert (
        "12 layers read back bit for bit"
        in convert.convert(planned, tmp_path / "r.safetensors", lossy=True)[-1]
    )
    written = open_quantized(tmp_path / "r.safetensors").layer(mod).dequantize()
    assert relative_error(layers[mod].dequantize(), written) < 0.2


def test_nvfp4_to_nunchaku_and_back(source, tmp_path):
    """SVDQuant on the nvfp4 grid without data, as the file of nunchaku's fp4 variant: every tensor of the
    W4A4 layers comes back as it was."""
    ours, out, back = (tmp_path / f"{n}.safetensors" for n in ("ours", "out", "back"))
    nibble("quantize", source, ours, "--method", "svdquant", "--grid", "nvfp4", "--rank", "16")
    said = " ".join(nibble("convert", ours, out, "--to", "nunchaku").split())
    assert (
        "13 of 13 quantized layers are written as they are, but for biases, which nunchaku has in 16 bit, "
        "and activations, whose scales of 16 channels it rounds without one a token above them"
    ) in said
    assert "13 layers read back bit for bit" in said
    found = describe(out, "cpu")
    assert found["kind"] == "nunchaku SVDQuant NVFP4"
    assert found["layers"]["double_blocks.0.img_mlp.2"].startswith("W4A4 nvfp4 smooth r16")
    assert found["notes"] == []
    nibble("convert", out, back, "--to", "nibble")
    before, after = PackFile(ours), PackFile(back)
    for name, spec in before.specs.items():
        kept = [] if spec.weight_only else ["weight", "weight_scale", "outer_scale", "proj_down", "proj_up"]
        first, second = before.layer(name).tensors, after.sound_layer(name).tensors
        assert [key for key in kept if not same_bits(first[key], second[key])] == [], name


def test_nunchaku_has_one_kind_of_codes(packed, source, tmp_path):
    """A model with a layer on either grid is no file of nunchaku's."""
    ours, mixed, name = (
        tmp_path / "ours.safetensors",
        tmp_path / "mixed.safetensors",
        "double_blocks.0.img_mlp.0",
    )
    nibble("quantize", source, ours, "--method", "svdquant", "--grid", "nvfp4")
    of_grid = PackFile(ours)
    layers = {n: of_grid.layer(n) for n in of_grid.specs} | {name: PackFile(packed["svdquant"]).layer(name)}
    pack.save(mixed, layers, {k: of_grid.tensor(k) for k in of_grid.rest}, "flux", {}, [])
    planned = convert.plan(PackFile(mixed), "nunchaku")
    assert planned.impossible == (
        f"{name} has integer codes, and most layers nvfp4 codes: a nunchaku file has one kind. Quantize the "
        "full-precision model with the method svdquant."
    )


def with_rank(layer, rank):
    spec = replace(layer.spec, parts=(replace(layer.spec.parts[0], rank=rank),))
    g = torch.Generator().manual_seed(1)
    down, up = (
        torch.randn(spec.in_features, rank, generator=g),
        torch.randn(spec.out_features, rank, generator=g),
    )
    return QuantizedLayer(
        layer.name,
        spec,
        layer.tensors | {"proj_down": down.bfloat16() * 0.05, "proj_up": up.bfloat16() * 0.05},
    )


def test_a_copy_that_reads_back_otherwise_is_an_error(packed, tmp_path, monkeypatch):
    real = writers.nibble.save

    def wrong(path, layers, *rest, **more):
        layers["single_blocks.0.linear1"].tensors["weight"] = (
            layers["single_blocks.0.linear1"].tensors["weight"] ^ 1
        )
        real(path, layers, *rest, **more)
        layers["single_blocks.0.linear1"].tensors["weight"] = (
            layers["single_blocks.0.linear1"].tensors["weight"] ^ 1
        )

    monkeypatch.setattr(writers.nibble, "save", wrong)
    (tmp_path / "x.safetensors").write_text("of before")
    with pytest.raises(
        convert.NotReadBack,
        match=r"/x.safetensors: layer single_blocks\.0\.linear1 of .*convrot.safetensors does not read back "
        r"as it was",
    ):
        nibble("convert", packed["convrot"], tmp_path / "x.safetensors", "--to", "nibble")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x.safetensors", "of before")]


@pytest.mark.parametrize(
    ("method", "to"), [("convrot", "native"), ("svdquant", "nunchaku"), ("splitquant", "nibble")]
)
def test_a_nan_of_the_source_reads_back_as_it_was(packed, tmp_path, method, to):
    opened = pack.PackFile(packed[method])
    layers = {name: opened.layer(name) for name in opened.specs}
    name = "double_blocks.0.img_attn.qkv"
    scales = layers[name].tensors["weight_scale"].clone()
    scales[0, 0] = float("nan")
    layers[name] = replace(layers[name], tensors=layers[name].tensors | {"weight_scale": scales})
    pack.save(
        tmp_path / "nan.safetensors",
        layers,
        {k: opened.tensor(k) for k in opened.rest},
        opened.family,
        {},
        [],
    )
    nibble("convert", tmp_path / "nan.safetensors", tmp_path / "out.safetensors", "--to", to, "--lossy")
    assert open_quantized(tmp_path / "out.safetensors").layer(name).dequantize().isnan().any()


@pytest.mark.parametrize("bad", [b"x", None])
def test_a_copy_that_cannot_be_opened_is_not_left(packed, tmp_path, monkeypatch, bad):
    monkeypatch.setattr(
        writers.nibble,
        "save",
        lambda path, *_, **__: path.write_bytes(bad or packed["splitquant"].read_bytes()[:-100]),
    )
    with pytest.raises(
        convert.NotReadBack,
        match=r"x.safetensors: made from .*convrot.safetensors, cannot be read back \(it: not a whole "
        r"safetensors file",
    ):
        nibble("convert", packed["convrot"], tmp_path / "x.safetensors", "--to", "nibble")
    assert list(tmp_path.iterdir()) == []


def test_two_formats_in_one_file(packed, tmp_path):
    with safe_open(packed["convrot"], "pt") as f:
        metadata = f.metadata()
    both = tensors(packed["convrot"]) | {f"{LINEAR2}.comfy_quant": torch.zeros(2, dtype=torch.uint8)}
    save_file(both, tmp_path / "both.safetensors", metadata)
    with pytest.raises(
        CheckpointError, match="declares layers as nibble and as kitchen does; expected one format"
    ):
        open_quantized(tmp_path / "both.safetensors")


def test_declared_fp8_is_a_source(source, tmp_path):
    state = tensors(source)
    state[f"{LINEAR2}.weight"] = state[f"{LINEAR2}.weight"].to(torch.float8_e4m3fn)
    conf = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    save_file(
        state | {f"{LINEAR2}.weight_scale": torch.ones(()), f"{LINEAR2}.comfy_quant": conf},
        tmp_path / "fp8.safetensors",
    )
    assert describe(tmp_path / "fp8.safetensors")["kind"] == "checkpoint below 16 bit"
    assert "13 layers" in nibble(
        "quantize", tmp_path / "fp8.safetensors", tmp_path / "q.safetensors", "--method", "rtn"
    )


@pytest.mark.quick
def test_inspect_of_each_kind(packed, source, tmp_path):
    native = tmp_path / "native.safetensors"
    nibble("convert", packed["convrot"], native, "--to", "native", "--lossy")
    found = {p: describe(p) for p in (source, native, packed["convrot"], packed["svdquant"])}
    assert found[source]["kind"] == "full-precision checkpoint"
    assert found[source]["stock ComfyUI"] == "loads it"
    assert found[native]["stock ComfyUI"] == "loads it with Load Diffusion Model"
    assert (
        found[packed["convrot"]]["stock ComfyUI"]
        == "cannot load it; `nibble convert --to native` keeps 10 of 13 quantized layers as they are"
    )
    assert found[packed["svdquant"]]["stock ComfyUI"].endswith("keeps 0 of 13 quantized layers as they are")
    for path, what in found.items():
        assert what["family"] == "FLUX.1"
        assert what["memory"][0].startswith("on a card: ")
        text = description_text(what)
        assert text == nibble("inspect", path).rstrip("\n")
        assert json.loads(nibble("inspect", path, "--json")) == what
    assert "  double_blocks.0.img_mlp.0: W4A4 per token" not in description_text(
        found[native]
    )  # a scale a row is "per channel"
    path = "int8 products of torch" if target_of("cpu").arch else "eager"  # of this processor
    assert f"  double_blocks.0.img_mlp.0: W4A4 per channel H64, {path}" in description_text(found[native])


def test_a_source_that_is_not_what_was_written_is_refused(tmp_path):
    rtn = METHODS["rtn"]
    quantize_file(tiny_flux.CHECKPOINT, tmp_path / "q.safetensors", rtn, rtn.config)
    data = bytearray((tmp_path / "q.safetensors").read_bytes())
    data[-1000] ^= 4
    (tmp_path / "q.safetensors").write_bytes(data)
    planned = convert.plan(open_quantized(tmp_path / "q.safetensors"), "nibble")
    with pytest.raises(
        CheckpointError,
        match=r"q.safetensors: 1 of \d+ tensors are not what was written: .*Download it or make it again",
    ):
        convert.convert(planned, tmp_path / "c.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["q.safetensors"]
