from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from comfyui_nibble.quant_core.calibration.observe import (
    Observation,
    _unlike,
    measured,
    observed,
    why_left_out,
)
from comfyui_nibble.quant_core.families import FLUX, GENERIC, PIXART, Layer, Part, UnknownArchitecture, detect
from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.run.layers import leave_out
from comfyui_nibble.quant_core.run.report import sensitive
from comfyui_nibble.tests.assets.synthetic import flux_shapes, pixart_shapes

pytestmark = pytest.mark.quick


def linear(*names, n=128, k=128):
    return {f"{name}.weight": (n, k) for name in names}


@pytest.mark.parametrize(
    ("family", "shapes"), [(FLUX, flux_shapes(double=2, single=2)), (PIXART, pixart_shapes(depth=2))]
)
def test_the_rules_find_what_a_map_says(family, shapes):
    """Names, blocks and modulation of known models; the halves of linear2 and GELU are what only a map or a
    calibration knows."""
    plain = lambda layers: {(x.name, x.block, x.in_features, x.out_features, x.weight_only) for x in layers}
    assert plain(GENERIC.layers(shapes)) == plain(family.layers(shapes))
    assert {x.rule for x in GENERIC.layers(shapes)} - {"shared"} == {"block"}


def test_qwen_image_2_1_goes_by_the_rules():
    """Named like Qwen-Image, but with one stream and a fused SwiGLU."""
    shapes, h = {}, 256
    for i in range(3):
        shapes |= linear(
            *(f"transformer_blocks.{i}.attn.{x}" for x in ("to_q", "to_k", "to_v", "to_out.0")), n=h, k=h
        )
        shapes |= linear(f"transformer_blocks.{i}.img_mlp.gate_up", n=6 * h, k=h) | linear(
            f"transformer_blocks.{i}.img_mlp.out", n=h, k=3 * h
        )
    shapes |= linear("img_in", n=h, k=64) | linear("txt_in", n=h, k=512) | linear("proj_out", n=64, k=h)
    assert detect(shapes) is GENERIC
    assert {x.name for x in GENERIC.layers(shapes)} == {
        k.removesuffix(".weight") for k in shapes if k.startswith("transformer_blocks")
    }


def test_blocks_in_natural_order_and_what_stays_out():
    rests = (
        "attn.q",
        "attn.k",
        "ff.0",
        "ff.2",
        "adaLN_modulation.1",
        "norm1.linear",
        "pos_embed",
        "time_mod",
    )
    shapes = linear(
        *(f"layers.{i}.{rest}" for i in (0, 1, 2, 10) for rest in rests), "embed", "head.0", "head.2"
    )
    shapes |= {
        "layers.0.tiny.weight": (16, 128),
        "layers.0.conv.weight": (128, 128, 3, 3),
        "layers.0.norm.weight": (128,),
    }
    layers = GENERIC.layers(shapes)
    assert list(dict.fromkeys(x.block for x in layers)) == ["layers.0", "layers.1", "layers.2", "layers.10"]
    assert {x.name.split(".", 2)[2] for x in layers} == {*rests} - {"pos_embed"}
    assert {x.name.split(".", 2)[2] for x in layers if x.weight_only} == {
        "adaLN_modulation.1",
        "norm1.linear",
        "time_mod",
    }


def test_the_outermost_repetition_is_the_block():
    shapes = linear(
        *(f"stages.{i}.experts.{j}.{w}" for i in range(2) for j in range(3) for w in ("w1", "w2", "w3")),
        "stages.0.attn.q",
    )
    assert {x.block for x in GENERIC.layers(shapes)} == {"stages.0", "stages.1"}


def test_two_layers_make_a_block_where_they_come_back_to_their_width():
    """FLUX.2's one-stream blocks do. Embedders widen what they read, and a list of projections is none of a
    sequence of blocks."""
    shapes = {}
    for i in range(3):
        shapes |= {
            f"single_blocks.{i}.linear1.weight": (1152, 128),
            f"single_blocks.{i}.linear2.weight": (128, 512),
        }
        shapes |= {f"heads.{i}.fc1.weight": (512, 256), f"heads.{i}.fc2.weight": (128, 512)}
        shapes |= {
            f"time_embedders.{i}.mlp.0.weight": (128, 128),
            f"time_embedders.{i}.mlp.2.weight": (128, 128),
        }
    shapes |= linear("mlp.0", "mlp.2", "mlp.4", "mlp.6", "label_emb.0.0", "label_emb.0.2")
    found = GENERIC.layers(shapes)
    assert {x.block for x in found} == {f"single_blocks.{i}" for i in range(3)}
    assert [x.name for x in found][:2] == ["single_blocks.0.linear1", "single_blocks.0.linear2"]


@pytest.mark.parametrize(
    ("names", "taken"),
    [
        ([f"caption_projection.{i}.linear" for i in range(4)], True),  # HiDream has 49
        ([f"caption_projection.{i}.linear" for i in range(3)], False),
        ([f"nerf_blocks.{i}.param_generator" for i in range(2)], True),  # by its name
        ([f"label_embedders.{i}.proj" for i in range(9)], False),
        ([f"heads.{i}" for i in range(9)], False),
    ],
)
def test_lists_of_one_layer_each(names, taken):
    blocks = [f"blocks.{i}.{x}" for i in range(2) for x in "qkv"]
    assert {x.name for x in GENERIC.layers(linear(*blocks, *names))} == {*blocks, *(names if taken else ())}


def test_shared_modulation_wants_a_calibration():
    """From the width of the model to a multiple of three of it; a time embedder that widens, a final layer
    and an MLP are something else."""
    shapes = linear(*(f"blocks.{i}.{x}" for i in range(2) for x in "qkv"))
    others = {
        "time_projection.1": (768, 128),
        "t_embedder.0": (768, 256),
        "final_layer.linear": (384, 128),
        "mlp.0": (512, 128),
    }
    layers = GENERIC.layers(shapes | {f"{name}.weight": s for name, s in others.items()})
    found = [x for x in layers if x.rule == "shared"]
    assert [(x.name, x.block, x.weight_only) for x in found] == [("time_projection.1", "blocks.0", True)]
    assert measured(layers, None) == [x for x in layers if x not in found]
    assert (
        why_left_out(found[0], None) == "modulation that all blocks share: quantized with a calibration only"
    )
    # A calibration of an older version: what it has statistics of.
    old = SimpleNamespace(meta={}, names=[x.name for x in layers if x not in found])
    assert measured(layers, old) == measured(layers, None)
    assert why_left_out(found[0], old) == "the calibration holds no statistics of it"
    rows = {x.name: 40 for x in layers} | {"time_projection.1": 2}
    seen = {
        "order": ["time_projection.1", *(x.name for x in layers if x not in found)],
        "shared": {},
        "rows": rows,
    }
    assert [x.name for x in observed(layers, seen)][:2] == ["time_projection.1", "blocks.0.k"]
    assert (
        _unlike(found[0], seen | {"rows": rows | {"time_projection.1": 21}})
        == "modulation of single tokens, 21 rows a call"
    )


@pytest.mark.parametrize(
    ("name", "times", "taken"),
    [("scale_shift_adaln.linear", 4, True), ("mlp.0", 4, False), ("gate_adaln.linear", 2, False)],
)
def test_shared_modulation_of_another_count_goes_by_its_name(name, times, taken):
    """LTX-2's attention between video and sound has two shifts and two scales; its gates are one to a block,
    not worth a kernel."""
    shapes = linear(*(f"blocks.{i}.{x}" for i in range(2) for x in "qkv")) | {
        f"{name}.weight": (times * 128, 128)
    }
    assert (name in {x.name for x in GENERIC.layers(shapes)}) == taken


def test_no_blocks_is_an_unknown_architecture():
    with pytest.raises(UnknownArchitecture, match="repeated blocks of linear layers"):
        detect(linear("encoder", "decoder", "net.0", "net.2"))
    assert detect(linear(*(f"tf_layers.{i}.{x}" for i in range(2) for x in "abc"))) is GENERIC


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.mod, self.q, self.k, self.up, self.down = (torch.nn.Linear(64, 64) for _ in range(5))
        self.unused = torch.nn.Linear(64, 64)

    def forward(self, x, vec):
        x = x + self.mod(vec)[:, None]
        y = self.k(x) * self.q(x)  # k first: the order is that of the calls, not of the names
        return self.down(torch.nn.functional.gelu(self.up(4 * y)))


def test_observation_of_a_network():
    torch.manual_seed(0)
    network = torch.nn.ModuleList([Block(), Block()])
    modules = {name: m for name, m in network.named_modules() if isinstance(m, torch.nn.Linear)}
    x, vec = torch.randn(2, 40, 64), torch.randn(2, 64)
    with Observation().watching(modules) as seen:
        for block in network[::-1]:
            x = block(x, vec)
    assert seen.order == [f"{i}.{n}" for i in (1, 0) for n in ("mod", "k", "q", "up", "down")]
    assert seen.shared == {"1.q": "1.k", "0.q": "0.k", "0.mod": "1.mod"}
    assert seen.rows["0.mod"] == 2
    assert seen.rows["0.k"] == 80

    layers = GENERIC.layers({f"blocks.{k}": tuple(v.shape) for k, v in network.state_dict().items()})
    renamed = lambda name: f"blocks.{name}"
    meta = {
        "order": [renamed(n) for n in seen.order],
        "shared": {renamed(a): renamed(b) for a, b in seen.shared.items()},
        "rows": {renamed(n): r for n, r in seen.rows.items()},
    }
    plan = observed(layers, meta)
    assert [x.name for x in plan] == meta["order"]  # without the one that was never called
    assert {x.name for x in plan if x.weight_only} == {"blocks.0.mod", "blocks.1.mod"}
    assert {x.name: x.input for x in plan}["blocks.0.q"] == "blocks.0.k"

    class Statistics:
        def __init__(self, tokens):
            self.tokens = tokens

    class Found:
        names = ("blocks.0.down", "blocks.0.up")

        def __init__(self):
            self.meta = {"observed": meta}

        def get(self, name, second_moments):
            g = torch.nn.functional.gelu(torch.randn(64, 64) * 3)
            return Statistics(g if name.endswith("down") else g - 1)

    halves = {x.name: x.parts[0].after_gelu for x in measured(layers, Found())}
    assert [n for n, after in halves.items() if after] == ["blocks.0.down"]
    assert measured(layers, None) == layers


def test_a_tensor_changed_in_place_is_not_shared():
    a, b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
    x = torch.randn(3, 64)
    with Observation().watching({"a": a, "b": b}) as seen:
        a(x)
        b(x.add_(1))
    assert seen.shared == {}


def test_modulation_of_many_rows_stays_in_16_bit():
    layers = [
        x
        for x in GENERIC.layers(linear(*(f"blocks.{i}.{n}" for i in range(2) for n in ("mod.lin", "q", "k"))))
        if x.block == "blocks.0"
    ]
    seen = {"order": [x.name for x in layers], "shared": {}, "rows": {x.name: 512 for x in layers}}
    assert [x.name for x in observed(layers, seen)] == ["blocks.0.k", "blocks.0.q"]


def test_a_layer_far_below_the_median_goes_back_to_16_bit():
    rows = [Row(f"blocks.{i}.q", f"blocks.{i}", 64, 64, "W4A4", sqnr_db=20.0 + i, nbytes=9) for i in range(7)]
    rows[2] = replace(rows[2], sqnr_db=10.5)
    assert list(sensitive(rows)) == ["blocks.2.q"]
    layers = {row.name: object() for row in rows}
    plan = [Layer(row.name, row.block, 64, 64, (Part(0, 64),), row.name, rule="block") for row in rows]
    leave_out(layers, rows, [replace(layer, rule="") for layer in plan])
    assert len(layers) == 7  # a map's layers stay
    leave_out(layers, rows, plan)
    assert "blocks.2.q" not in layers
    assert len(layers) == 6
    assert rows[2].note == "16 bit: 10.5 dB, the median layer has 23.0"
    assert not rows[2].quantized
