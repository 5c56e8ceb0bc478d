"""Rows of a report as FLUX.1 has them."""

import pytest

from comfyui_nibble.quant_core.layer.row import Row

DOUBLE = ("img_mod.lin", "img_attn.qkv", "txt_attn.qkv", "img_mlp.0", "img_mlp.2")
SINGLE = ("modulation.lin", "linear1", "linear2")


@pytest.fixture(scope="session")
def rows():
    """19 double and 38 single blocks, errors from 15 dB upwards, one layer in 16 bit, one not measured, one
    in 8 bit, and an embedder."""
    out = []
    for stem, count, kinds in (("double_blocks", 19, DOUBLE), ("single_blocks", 38, SINGLE)):
        for i in range(count):
            for k, kind in enumerate(kinds):
                what = "W4A16 g64" if "mod" in kind else "W4A4 g64 smooth H256 r32"
                db = 15 + 0.25 * i + 2 * k
                out.append(Row(f"{stem}.{i}.{kind}", f"{stem}.{i}", 3072, 3072, what, db, 5_400_000, 1.0))
    out[0] = Row(out[0].name, out[0].block, 3072, 3072, "16 bit", note="8.1 dB")
    out[1].sqnr_db = None
    out[2].what, out[2].nbytes = "W8A8 per channel", 9_400_000
    return [*out, Row("img_in", "", 64, 3072, "16 bit", note="embedder")]
