"""Launches of Hopper's Gluon kernel, without a card: what they pass, carried out step by step in torch, is
the product.

Its code is compiled by test_compile_gate; its output is compared by `nibble bench` before it is timed.
"""

import warnings
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from comfyui_nibble.kernels import tuning
from comfyui_nibble.kernels.operator.packing import pack
from comfyui_nibble.kernels.plan import CHANNEL, SLICE
from comfyui_nibble.kernels.quant_linear import hopper, launch
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.quant_core.evaluation.bench.tune import save

HOPPER = Target("cuda", 90, (3, 6))
NAMES = hopper.gemm_wgmma.arg_names
M, N, R = 131, 80, 32


def box(tensor, row, column, shape):
    """A block of an int8 tensor as TMA reads it: zeros past its end."""
    out = torch.zeros(*shape, dtype=torch.int8)
    part = tensor[row : row + shape[0], column : column + shape[1]]
    out[: part.shape[0], : part.shape[1]] = part
    return out


def view(desc):
    """The tensor that a descriptor describes, from its base, shape and strides alone."""
    assert desc.layout == hopper.tile_layout(desc.block_shape[1])
    return desc.base.as_strided(desc.shape, desc.strides)


class Kernel:
    """Takes launches in place of `gemm_wgmma` and does what it does."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.run(grid, dict(zip(NAMES, args, strict=False)), kwargs)

    def run(self, grid, a, c):
        assert set(a) | set(c) == {*NAMES, "num_warps"}
        assert not set(a) & set(c)
        assert c["num_warps"] == c["WARPS"]
        x, w, planes = view(a["x_desc"]), view(a["w_desc"]), c["PLANES"]
        (bm, bk), (bn, _) = a["x_desc"].block_shape, a["w_desc"].block_shape
        assert grid == (-(-a["M"] // bm) * -(-a["N"] // bn),)
        ends = [e for e in a["ends"] if e > 0] if c["SCALES"] == SLICE else [a["KB"]]
        y, sx, sw = a["y_ptr"], a["sx_ptr"].flatten(), a["sw_ptr"].flatten().float()
        out, first = torch.zeros(a["M"], a["N"]), 0
        for segment, last in enumerate(-(-e // bk) for e in ends):
            total = torch.zeros(a["M"], a["N"])
            for step in range(first, last):
                for m0 in range(0, a["M"], bm):
                    for n0 in range(0, a["N"], bn):
                        packed = box(w, n0, step * bk, (bn, bk))
                        nibbles = (packed << 4, packed & -16) if planes == 2 else (packed,)
                        for p, weights in enumerate(nibbles):
                            tile = box(x, m0, p * a["plane"] + step * bk, (bm, bk))
                            part = total[m0 : m0 + bm, n0 : n0 + bn]
                            part += (tile.float() @ weights.float().T)[: part.shape[0], : part.shape[1]]
            gain = 0.0625 if planes == 2 else 1.0
            scale_x, scale_w = (
                sx[segment * a["ld_sx"] :][: a["M"]],
                sw[segment * a["ld_sw"] :][: a["N"]] * gain,
            )
            out += total * scale_w * scale_x[:, None]
            first = last
        if c["BR"]:
            low = a["low_ptr"].as_strided((a["M"], a["R"]), (a["ld_low"], 1)).float()
            out += low @ a["up_ptr"].as_strided((a["N"], a["R"]), (a["ld_up"], 1)).float().T
        if c["HAS_BIAS"]:
            out += a["bias_ptr"].float()
        target = y.as_strided((a["M"], a["N"]), (a["ldy"], 1))
        target.copy_(out + target.float() if c["ACCUMULATE"] else out)


@pytest.fixture
def hopper_launch(monkeypatch):
    """A function (planes, ends, accumulate, offset) -> (what the launch wrote, what is right), for a tile in
    Gluon."""
    monkeypatch.setattr(launch, "kernel_target", lambda device: HOPPER)
    monkeypatch.setattr(hopper, "gemm_wgmma", Kernel())
    monkeypatch.setattr(launch, "_chosen", launch._chosen.__wrapped__)  # not kept for other tests

    def run(planes, ends, accumulate=False, offset=0):
        scales, row_bytes = SLICE if len(ends) > 1 else CHANNEL, ends[-1]
        block = min(b - a for a, b in zip((0, *ends), ends, strict=False)) if scales == SLICE else 0
        problem = tuning.Problem("gemm_int8", planes, scales, planes == 2, M, N, row_bytes, block)
        tile = next(t for t in tuning.candidates(HOPPER, problem) if t.gluon)
        monkeypatch.setattr(launch, "gemm_tile", lambda target, problem: tile)
        g = torch.Generator().manual_seed(planes)
        top = 8 if planes == 2 else 128
        w, x = (torch.randint(-top, top, (rows, planes * row_bytes), generator=g) for rows in (N, M))
        weight = torch.full((N, row_bytes + 64), 77, dtype=torch.int8)[
            :, 32 + offset : 32 + offset + row_bytes
        ]  # a part of a wider layer
        weight.copy_(pack(w, 8 // planes))
        codes = torch.cat([x[:, p::planes] for p in range(planes)], 1).to(torch.int8)
        segments = len(ends) if scales == SLICE else 1
        scale, weight_scale = (torch.rand(segments, n, generator=g) + 0.5 for n in (M, N))
        low, up, bias = (torch.randn(*shape, generator=g) for shape in ((M, R), (N, R), (N,)))
        y = torch.randn(M, N, generator=g)
        want = y.double() if accumulate else torch.zeros(M, N, dtype=torch.float64)
        for s, (start, stop) in enumerate(
            zip((0, *ends), ends, strict=False) if scales == SLICE else [(0, row_bytes)]
        ):
            part = slice(planes * start, planes * stop)
            want += (
                x[:, part].double()
                @ w[:, part].double().T
                * weight_scale[s].double()
                * scale[s].double()[:, None]
            )
        want += low.double() @ up.double().T + bias.double()
        launch.gemm(
            codes,
            scale,
            weight,
            weight_scale,
            low,
            up,
            bias,
            y,
            "gemm_int8",
            planes,
            scales,
            planes == 2,
            block,
            ends,
            False,
            accumulate,
        )
        return y, want

    return run


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("planes", "ends"), [(2, (160,)), (2, (64, 128, 320, 384)), (1, (208,)), (1, (128, 384))]
)
def test_arguments_of_a_launch_give_the_product(hopper_launch, planes, ends, accumulate):
    y, want = hopper_launch(planes, ends, accumulate)
    assert ((y - want).norm() / want.norm()) < 1e-6


def test_weights_that_tma_cannot_read_take_the_default_kernel(hopper_launch, monkeypatch):
    taken = []
    monkeypatch.setattr(launch, "constants", lambda target, problem, tile, *rest: taken.append(tile) or {})
    monkeypatch.setattr(launch.kernels, "gemm_int8", defaultdict(lambda: lambda *args, **kwargs: None))
    hopper_launch(2, (160,), offset=8)
    (tile,) = taken
    assert not tile.gluon


def test_candidates_in_gluon_come_last_and_only_for_hopper():
    problem = tuning.Problem("gemm_int8", 2, CHANNEL, True, 4608, 3072, 1536)
    kinds = [t.gluon for t in tuning.candidates(HOPPER, problem)]
    assert kinds == sorted(kinds)
    assert any(kinds)
    assert not kinds[0]
    for other in (
        replace(HOPPER, triton=(3, 5)),
        replace(HOPPER, triton=None),
        *(replace(HOPPER, arch=a) for a in (80, 89, 100, 120)),
    ):
        assert not any(t.gluon for t in tuning.candidates(other, problem))
    for change in ({"planes": 4}, {"scales": 2, "block": 32}, {"tokens": 64}, {"row_bytes": 1528}):
        assert not any(t.gluon for t in tuning.candidates(HOPPER, replace(problem, **change)))
    slices = replace(problem, scales=SLICE)
    assert any(t.gluon for t in tuning.candidates(HOPPER, replace(slices, block=192)))
    assert not any(t.gluon for t in tuning.candidates(HOPPER, replace(slices, block=96)))


def test_cache_keeps_the_flag_and_reads_files_from_before_it(tmp_path):
    path = tmp_path / "tiles.json"
    old = (
        '{"fields": ["bm", "bn", "bk", "warps", "stages", "group_m", "rank_block"], "tiles": {"k": [128, '
        "256, 64, 8, 6, 8, 32]}}"
    )
    path.write_text(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = tuning.TileCache(path).get("k")
        save(tuning.TileCache(path), {"g": replace(plain, gluon=True)})
        assert tuning.TileCache(path).tiles == {"k": plain, "g": replace(plain, gluon=True)}
    assert not plain.gluon
    assert replace(plain, gluon=True) in tuning.candidates(
        HOPPER, tuning.Problem("gemm_int8", 2, CHANNEL, True, 4608, 3072, 1536)
    )
