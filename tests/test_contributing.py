"""The recipes of CONTRIBUTING.md, each done once with a toy from outside of the pack."""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.kernels.dispatch import PATHS, choose
from comfyui_nibble.kernels.operator.packing import unpack
from comfyui_nibble.kernels.operator.spec import ActivationSpec, LinearSpec, PartSpec, WeightSpec
from comfyui_nibble.kernels.plan import lower
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.kernels.tuning import Problem as Product
from comfyui_nibble.kernels.tuning import candidates
from comfyui_nibble.quant_core import families
from comfyui_nibble.quant_core.convert import convert
from comfyui_nibble.quant_core.evaluation.demo import tiny_flux
from comfyui_nibble.quant_core.families.base import Family, Rule, Stacked
from comfyui_nibble.quant_core.formats import detect
from comfyui_nibble.quant_core.formats.nibble import PackFile
from comfyui_nibble.quant_core.formats.opened import Opened
from comfyui_nibble.quant_core.layer.adapters import LowRank, Side
from comfyui_nibble.quant_core.layer.assemble import FittedPart, assemble, round_part
from comfyui_nibble.quant_core.layer.linear import QuantizedLayer
from comfyui_nibble.quant_core.layer.problem import Fitted, output_sqnr
from comfyui_nibble.quant_core.methods import METHODS, Method, by_name, fit_problem
from comfyui_nibble.quant_core.run.report import left_overs
from comfyui_nibble.quant_core.run.unquantized import kept_rows
from comfyui_nibble.quant_core.store.safe import open_safetensors
from comfyui_nibble.tests.support import nibble, relative_error
from comfyui_nibble.tests.test_floors import FLOORS

ROOT = Path(__file__).resolve().parents[1]
RECIPES = (
    "Add a method",
    "Add a family",
    "Add a checkpoint format",
    "Add a kernel or a card",
    "Mend a LoRA case",
    "Find out why a layer is in 16 bit",
)

pytestmark = pytest.mark.quick


def test_the_page_has_these_recipes():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Recipes")[2]
    assert tuple(re.findall(r"^### (.+)$", text, re.M)) == RECIPES


def test_the_page_names_every_room():
    found = re.findall(
        r"^\| (\d+) \| `(.+?)/?` \|", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.M
    )
    rooms = [(number, room) for number, floor in enumerate(FLOORS, 1) for room in floor]
    assert sorted((int(number), room) for number, room in found) == sorted(rooms)


def test_the_quick_walk_goes_through_every_room():
    """`pytest -m quick`: each folder of tests has a file of it."""
    folders = {ROOT / "tests" / room.replace("nodes/host", "host") for floor in FLOORS for room in floor}
    folders -= {ROOT / "tests" / "nodes"}  # its tests are the host's
    without = [
        str(folder.relative_to(ROOT))
        for folder in folders
        if not any("mark.quick" in file.read_text(encoding="utf-8") for file in folder.rglob("test_*.py"))
    ]
    assert without == []


# A method


@dataclass(frozen=True)
class CoarseConfig:
    """bits: of the weights."""

    bits: int = 4


def coarse(problem, config) -> Fitted:
    """Groups of weights, a scale a token."""
    part = PartSpec(
        0,
        problem.layer.in_features,
        WeightSpec(bits=config.bits, granularity="group"),
        ActivationSpec(granularity="token"),
    )
    codes, scales = round_part(problem.weight, part, None, problem.dtype)
    made = FittedPart(part, codes, scales)
    return Fitted(assemble(problem, [made]), {"bits": config.bits})


@pytest.fixture
def method(monkeypatch):
    monkeypatch.setitem(
        METHODS, "coarse", Method("coarse", "Groups, a scale a token", coarse, CoarseConfig())
    )
    return by_name("coarse")


def test_a_method_fits_a_layer(method, make_problem):
    problem = make_problem(64, 256)
    fitted = fit_problem(problem, method, method.configured(bits=8))
    assert fitted.choices == {"bits": 8}
    rough = fit_problem(problem, method, method.config).layer
    assert output_sqnr(problem, fitted.layer) > output_sqnr(problem, rough) > 0


def test_a_method_is_found_by_its_name_and_quantizes_a_model(method, tmp_path):
    out = tmp_path / "coarse.safetensors"
    nibble("quantize", tiny_flux.CHECKPOINT, out, "--method", "coarse", "--set", "bits=8")
    file = PackFile(out)
    assert file.provenance["method"] == "coarse"
    quantized = [spec for spec in file.specs.values() if not spec.weight_only]
    assert quantized
    assert {spec.parts[0].weight.bits for spec in quantized} == {8}


# A family

_SIGNATURE = ("layers.0.mix.weight", "stem.weight", "toy_head.weight")
TOY = Family(
    name="toy",
    title="Toy",
    block=r"layers\.\d+",
    rules=(Rule("gate", weight_only=True), Rule("mix"), Rule("out", split="gelu")),
    signature=_SIGNATURE,
    diffusers_signature=_SIGNATURE,
    diffusers=lambda shapes: {key: Stacked((key,)) for key in shapes},
    diffusers_class="ToyModel",
    comfyui=False,
    kept=((r"layers\.\d+\.router", "a toy's router chooses by a hair"),),
)


def toy_shapes(blocks=2, width=128):
    shapes = {"stem.weight": (width, 64), "toy_head.weight": (64, width)}
    for i in range(blocks):
        shapes |= {f"layers.{i}.{name}.weight": (width, width) for name in ("gate", "mix", "router", "out")}
    return shapes


@pytest.fixture
def family(monkeypatch):
    monkeypatch.setattr(families, "FAMILIES", (TOY, *families.FAMILIES))


def toy_state():
    g = torch.Generator().manual_seed(0)
    return {k: (torch.randn(s, generator=g) * s[-1] ** -0.5).bfloat16() for k, s in toy_shapes().items()}


def test_a_family_is_detected_by_its_shapes(family):
    assert families.detect(toy_shapes()) is families.by_name("toy") is TOY
    assert families.known(toy_shapes())
    layers = {layer.name: layer for layer in TOY.layers(toy_shapes())}
    assert list(layers) == [f"layers.{i}.{name}" for i in range(2) for name in ("gate", "mix", "out")]
    assert layers["layers.1.gate"].weight_only
    assert layers["layers.1.out"].parts[0].after_gelu


def test_a_model_of_a_family_is_quantized(family, tmp_path):
    source, out = tmp_path / "toy.safetensors", tmp_path / "q.safetensors"
    save_file(toy_state(), source)
    assert "family: Toy" in nibble("inspect", source)
    nibble("quantize", source, out, "--method", "rtn")
    assert PackFile(out).family == "toy"
    assert len(PackFile(out).specs) == 6


# A format


class ByRows(Opened):
    """Layers of int8 codes with a scale a row, as `<layer>.row_codes` and `<layer>.row_scale`."""

    kind, family = "by_rows", "toy"

    def __init__(self, path):
        self.path, self.provenance, self.report = Path(path), {}, []
        self._file = open_safetensors(self.path)
        keys = list(self._file.keys())
        found = [key.removesuffix(".row_codes") for key in keys if key.endswith(".row_codes")]
        self.specs = {name: self._spec(self.shape(f"{name}.row_codes")) for name in found}
        self.rest = [key for key in keys if key.rpartition(".")[0] not in self.specs]

    @staticmethod
    def _spec(shape):
        part = PartSpec(
            0,
            shape[1],
            WeightSpec(bits=8, granularity="channel"),
            ActivationSpec(bits=8, granularity="token"),
        )
        return LinearSpec(shape[1], shape[0], (part,), False)

    def layer(self, name):
        codes, scale = self.tensor(f"{name}.row_codes"), self.tensor(f"{name}.row_scale")
        return QuantizedLayer(name, self.specs[name], {"weight": codes, "weight_scale": scale[None]})

    def tensor(self, key):
        return self._file.get_tensor(key)

    def shape(self, key):
        return tuple(self._file.get_slice(key).get_shape())


@pytest.fixture
def by_rows(family, monkeypatch, tmp_path):
    """A file of the format, whose reader is in the table."""
    is_by_rows = lambda path, file, keys, metadata: any(key.endswith(".row_codes") for key in keys)
    monkeypatch.setitem(detect.FORMATS, "by_rows", detect.Format(is_by_rows, ByRows))
    state = toy_state()
    for name in ("layers.0.mix", "layers.1.mix"):
        weight = state.pop(f"{name}.weight").float()
        scale = weight.abs().amax(1) / 127
        state[f"{name}.row_codes"] = (weight / scale[:, None]).round().to(torch.int8)
        state[f"{name}.row_scale"] = scale
    path = tmp_path / "by_rows.safetensors"
    save_file(state, path)
    return path


def test_a_format_is_detected_and_described(by_rows):
    assert detect.kind_of(by_rows) == "by_rows"
    assert isinstance(detect.open_quantized(by_rows), ByRows)
    said = nibble("inspect", by_rows)
    assert "kind: by_rows" in said
    assert "layers.1.mix: W8A8" in said


def test_a_format_is_converted(by_rows, tmp_path):
    out = tmp_path / "out.safetensors"
    assert convert.plan(detect.open_quantized(by_rows), "nibble").lossless
    nibble("convert", by_rows, out, "--to", "nibble")
    made, source = PackFile(out), ByRows(by_rows)
    for name in source.specs:
        layer = made.layer(name)
        assert torch.equal(unpack(layer.tensors["weight"], 8), source.tensor(f"{name}.row_codes"))
        assert relative_error(toy_state()[f"{name}.weight"].float(), layer.dequantize()) < 0.01


# A kernel or a card


W4A4 = LinearSpec(256, 128, (PartSpec(0, 256, WeightSpec(), ActivationSpec()),), False)


@pytest.mark.parametrize(
    ("target", "path", "against"),
    [
        (
            Target("cuda", 999, (3, 6), "a card of tomorrow"),
            "int8 tensor cores",
            "this is a card of tomorrow",
        ),
        (Target("hip", "gfx9999", (3, 6)), "eager", "no int8 matrix cores on gfx9999"),
        (Target("cuda", 999), "eager", "Triton is not installed"),
    ],
    ids=["cuda", "hip", "no Triton"],
)
def test_a_card_that_nobody_named_gets_a_path_and_the_reasons(target, path, against):
    choice = choose(W4A4, target)
    assert choice.path == path
    assert against in str(choice)
    if path != "eager":
        (step,) = lower(W4A4, target)
        problem = Product(
            step.kernel, step.planes, step.scales, step.swap, 4096, 128, step.row_bytes, step.block
        )
        assert candidates(target, problem)


def test_a_kernel_is_a_row_of_the_table():
    asked, before = [], dict(PATHS)

    def never(spec, target):
        asked.append((spec, target))
        return "the toy's kernel is not written yet"

    target = Target("cuda", 998, (3, 6))
    PATHS.clear()
    PATHS.update({"toy kernel": (never,), **before})
    choose.cache_clear()
    try:
        assert choose(W4A4, target).refused[0] == ("toy kernel", "the toy's kernel is not written yet")
        assert asked == [(W4A4, target)]
    finally:
        PATHS.clear()
        PATHS.update(before)  # in their order, which is that of preference
        choose.cache_clear()


# A LoRA case


def test_the_terms_of_an_adapter_stand_beside_the_layer(make_problem):
    """What `nodes/host/adapters.py` makes of a patch; the host's tests ask ComfyUI itself."""
    layer = fit_problem(make_problem(64, 128, calibrated=False), METHODS["rtn"], METHODS["rtn"].config).layer
    g = torch.Generator().manual_seed(0)
    down, up = torch.randn(4, 128, generator=g), torch.randn(64, 4, generator=g)
    side = Side(64, 128)
    side.low_rank.append(LowRank(down, up))
    side.scale_rows(torch.full((64,), 2.0))
    spec, changed = side.merged(layer, torch.float32)
    assert "weight" not in changed
    merged = QuantizedLayer(layer.name, spec, layer.tensors | changed)
    x = torch.randn(5, 128, generator=g)
    without = QuantizedLayer(
        layer.name,
        layer.spec,
        layer.tensors | {"weight_scale": changed["weight_scale"], "bias": 0 * layer.tensors["bias"]},
    )
    want = without(x) + layer.tensors["bias"].float() + 2 * x @ down.T @ up.T
    assert relative_error(want, merged(x)) < 1e-4
    assert side.describe() == "gain, rank 4"


# A layer in 16 bit


def test_every_layer_in_16_bit_has_a_reason_in_one_place(family):
    kept = kept_rows(toy_shapes(), TOY, [], otherwise="left so by who made the file")
    why = {row.name: row.note for row in kept}
    assert why["layers.0.router"] == "kept by the map: a toy's router chooses by a hair"
    assert why["layers.0.mix"] == "left so by who made the file"
    assert why["stem"] == "outside of repeated blocks"
    assert (
        "Left in 16 bit: 2 x layers.N.router (kept by the map: a toy's router chooses by a hair)"
        in left_overs(kept)
    )


def test_inspect_names_them(family, tmp_path):
    source, out = tmp_path / "toy.safetensors", tmp_path / "q.safetensors"
    save_file(toy_state(), source)
    nibble("quantize", source, out, "--method", "rtn")
    assert "2 x layers.N.router (kept by the map: a toy's router chooses by a hair)" in nibble("inspect", out)
