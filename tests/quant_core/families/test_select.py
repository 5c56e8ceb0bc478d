"""What a text selects in FLUX, in PixArt and in models with other layouts; what is refused, and in which
words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from comfyui_nibble.quant_core.families.select import (
    Selection,
    SelectionError,
    block_lists,
    modules_of,
    select,
)
from comfyui_nibble.tests.assets.synthetic import flux_shapes, pixart_shapes

pytestmark = pytest.mark.quick

DOUBLE, SINGLE = 19, 38
FLUX, PIXART = list(flux_shapes(DOUBLE, SINGLE)), list(pixart_shapes())
FLUX_MODULES, PIXART_MODULES = modules_of(FLUX), modules_of(PIXART)
OFFER = (
    r"This model has double 0-18 (in each: img_attn, img_mlp, img_mod, txt_attn, txt_mlp, txt_mod); "
    r"single 0-37 (in each: linear1, linear2, modulation, norm). Globs such as '*.attn' and 'all' can be "
    r"written too."
)


def names(kind, *indices):
    return {f"{kind}_blocks.{i}" for i in indices}


def test_lists_of_blocks():
    """Neither `final_layer.adaLN_modulation.1` nor the layers of an MLP are blocks."""
    assert block_lists(FLUX_MODULES) == {"double_blocks": 19, "single_blocks": 38}
    assert block_lists(PIXART_MODULES) == {"blocks": 1}
    gap = {"blocks.0.a.weight", "blocks.2.a.weight"}
    assert block_lists(modules_of(gap)) == {}


@pytest.mark.parametrize(
    ("text", "modules"),
    [
        ("double 0-2", names("double", 0, 1, 2)),
        ("single 5,7,9", names("single", 5, 7, 9)),
        ("single 0-3,7", names("single", 0, 1, 2, 3, 7)),
        ("double 18; single 37", names("double", 18) | names("single", 37)),
        ("  Double   0 - 2 ,\t5 \r\n\n SINGLE 1;", names("double", 0, 1, 2, 5) | names("single", 1)),
        ("double_blocks 3", names("double", 3)),
        ("d 3", names("double", 3)),
        ("double_blocks.0.img_attn", {"double_blocks.0.img_attn"}),
        ("double_blocks.0.attn", {"double_blocks.0.img_attn", "double_blocks.0.txt_attn"}),
        ("double_blocks.1[78].img_mlp.2", {"double_blocks.17.img_mlp.2", "double_blocks.18.img_mlp.2"}),
        ("*.mlp", {f"double_blocks.{i}.{s}_mlp" for i in range(19) for s in ("img", "txt")}),
        ("*linear2", {f"single_blocks.{i}.linear2" for i in range(38)}),
        ("*.ADALN_modulation", {"final_layer.adaLN_modulation"}),
        ("in", {"img_in", "txt_in"}),
        ("all", {""}),
        ("ALL; double 0", {""} | names("double", 0)),
    ],
)
def test_flux(text, modules):
    assert select(text, FLUX_MODULES).modules == modules


def test_pixart():
    """`blocks 0` takes the block's own table with it; `*` and `all` take tensors that lie in no module."""
    block = select("blocks 0", PIXART_MODULES)
    assert block.modules == {"blocks.0"}
    assert {k for k in PIXART if block.takes(k)} == {k for k in PIXART if k.startswith("blocks.0.")}
    assert block.takes("blocks.0.scale_shift_table")
    for text in ("all", "*"):
        assert all(select(text, PIXART_MODULES).takes(key) for key in [*PIXART, "pos_embed"])


def test_a_module_is_taken_with_all_below_it_and_nothing_beside_it():
    chosen = select("double 1; *.0.img_attn", FLUX_MODULES)
    assert chosen.text == "double 1; *.0.img_attn"
    taken = {key for key in FLUX if chosen.takes(key)}
    assert taken == {k for k in FLUX if k.startswith(("double_blocks.1.", "double_blocks.0.img_attn."))}
    assert "double_blocks.0.img_attn.norm.query_norm.scale" in taken
    assert chosen.takes("double_blocks.1")
    assert not chosen.takes("double_blocks.10.img_mod.lin.weight")
    assert not Selection(frozenset({"double_blocks.1.img_mlp.0"}), "").takes("double_blocks.1.img_mlp")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", f"no blocks are chosen, the text is empty. {OFFER}"),
        (" ;\n ; ", f"no blocks are chosen, the text is empty. {OFFER}"),
        ("double 0-19", f"'double 0-19': there is no block 19 in double_blocks. {OFFER}"),
        ("double 0; single 38", f"'single 38': there is no block 38 in single_blocks. {OFFER}"),
        ("blocks 2", f"'blocks 2': there are no blocks called 'blocks'. {OFFER}"),
        ("triple 2", f"'triple 2': there are no blocks called 'triple'. {OFFER}"),
        ("*.mpl", f"'*.mpl' matches no module of this model. {OFFER}"),
        ("double", f"'double' matches no module of this model. {OFFER}"),
        (
            "double_blocks.0.img_attn.qkv.weight",
            f"'double_blocks.0.img_attn.qkv.weight' matches no module of this model. {OFFER}",
        ),
    ],
)
def test_refusals_say_what_there_is(text, message):
    with pytest.raises(SelectionError) as error:
        select(text, FLUX_MODULES)
    assert str(error.value) == message


@pytest.mark.parametrize("piece", ["3-1", "1-", "-1", "a", "0..3", "", "5 7", "1-2-3", "1.5", "0x3"])
def test_malformed_ranges(piece):
    """`5 7` is not 57."""
    with pytest.raises(
        SelectionError,
        match="is neither an index nor a range. Write single and indices or ranges, lowest first",
    ) as error:
        select(f"single 2,{piece}", FLUX_MODULES)
    assert f"{piece!r} is neither" in str(error.value)


def test_one_block_and_ambiguous_kinds():
    with pytest.raises(
        SelectionError,
        match=r"there is no block 1 in blocks. This model has blocks 0 \(in each: attn, cross_attn, mlp\)",
    ):
        select("blocks 1", PIXART_MODULES)
    refiners = modules_of(["refine_a.0.x.weight", "refine_b.0.x.weight"])
    with pytest.raises(SelectionError, match="'refine' is short for refine_a and refine_b"):
        select("refine 0", refiners)
    exact = modules_of(["blocks.0.x.weight", "blocks_2.0.x.weight"])
    assert select("blocks 0", exact).modules == {"blocks.0"}


def printed(indices):
    """Sorted indices as ranges."""
    runs = []
    for i in sorted(indices):
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs)


indices = lambda count: st.sets(st.integers(0, count - 1), min_size=1)


@given(indices(DOUBLE), indices(SINGLE), st.randoms())
def test_printed_ranges_come_back(double, single, random):
    entries = [f"double {printed(double)}", f"single {printed(single)}"] + [f"single {i}" for i in single]
    random.shuffle(entries)
    assert select(random.choice(["; ", "\n"]).join(entries), FLUX_MODULES).modules == names(
        "double", *double
    ) | names("single", *single)


@given(st.sets(st.sampled_from(sorted(FLUX_MODULES - {""})), min_size=1, max_size=5))
def test_a_full_name_selects_itself_alone(chosen):
    """Names that are left when `img_` is dropped are none of the model's, so nothing else can match."""
    assert select("\n".join(chosen), FLUX_MODULES).modules == chosen
