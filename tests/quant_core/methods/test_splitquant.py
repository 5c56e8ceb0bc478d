"""SplitQuant: slices, factors, the fold, and what each piece is worth on a layer with outliers."""

import dataclasses
from copy import deepcopy

import pytest
import torch

from comfyui_nibble.kernels.dispatch import FUSED, choose
from comfyui_nibble.kernels.operator.spec import LinearSpec
from comfyui_nibble.kernels.operator.text import parse
from comfyui_nibble.kernels.operator.transforms import (
    fold_weight,
    kronecker,
    transform_activation,
    unfold_weight,
)
from comfyui_nibble.kernels.target import Target
from comfyui_nibble.quant_core.evaluation.inputs import heavy_tails
from comfyui_nibble.quant_core.families import Layer, Part
from comfyui_nibble.quant_core.formats.spec_json import from_json, to_json
from comfyui_nibble.quant_core.layer.problem import Problem, output_sqnr
from comfyui_nibble.quant_core.layer.statistics import InputStatistics
from comfyui_nibble.quant_core.methods import by_name, svdquant
from comfyui_nibble.quant_core.methods.factors import (
    NoBalancedFactors,
    balanced,
    hadamard_factor,
    slice_width,
    start_factor,
)
from comfyui_nibble.quant_core.methods.split_rotated import RotatedPart
from comfyui_nibble.quant_core.methods.splitquant import ROTATED, SplitQuantConfig, fit
from comfyui_nibble.quant_core.methods.svdquant import SVDQuantConfig
from comfyui_nibble.tests.support import relative_error, sqnr_db


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def test_factors_of_the_widths_in_use():
    """Those of the paper's table for 3072, 1152 and 12288 channels."""
    widths = {
        3072: (48, 64),
        768: (24, 32),
        192: (12, 16),
        1152: (32, 36),
        288: (16, 18),
        72: (8, 9),
        12288: (96, 128),
    }
    assert {w: balanced(w) for w in widths} == widths
    with pytest.raises(
        NoBalancedFactors,
        match="61 channels a slice have no factors but 1; the nearest that do are 60 and 62",
    ):
        balanced(61)
    with pytest.raises(
        NoBalancedFactors, match="5 slices do not divide 3072 channels; the nearest that do: 4 and 6"
    ):
        slice_width(3072, 5)


@pytest.mark.parametrize("pairs", [1, 4])
def test_fold_is_the_inverse(pairs):
    """To fp64: (W T^-1)(T x) = W x, and unfolding gives W back, with affine factors of a shared pair and of
    one a slice."""
    factors = tuple(
        torch.linalg.qr(randn(pairs, n, n).double())[0] * (1 + randn(pairs, n, 1).double().abs())
        for n in (6, 8)
    )
    w, x, s = randn(10, 192).double(), randn(7, 192).double(), randn(192).double().abs() + 0.5
    folded = fold_weight(w, s, 0, factors)
    assert relative_error(x @ w.T, transform_activation(x, s, 0, factors=factors) @ folded.T) < 1e-13
    assert relative_error(w, unfold_weight(folded, s, 0, factors)) < 1e-13


def test_transform_is_the_kronecker_product_on_each_slice():
    p1, p2, x = randn(1, 4, 4), randn(1, 6, 6), randn(5, 72)
    want = torch.cat([piece @ torch.kron(p1[0], p2[0]) for piece in x.split(24, 1)], 1)
    torch.testing.assert_close(kronecker(x, p1, p2), want, rtol=1e-4, atol=1e-4)


def test_starts_are_orthogonal():
    """Hadamard ones also where a size is no power of two, and no value of 24 = 8 x 3 or of 18 = 2 x 9 above
    what the odd rest spreads."""
    for n in (1, 3, 16, 18, 24, 47):
        for p in (start_factor(n, 0), hadamard_factor(n)):
            torch.testing.assert_close(p @ p.T, torch.eye(n), atol=1e-5, rtol=0)
    assert hadamard_factor(24).abs().max() <= (2 / 24) ** 0.5
    assert hadamard_factor(18).abs().max() <= (2 / 18) ** 0.5


def test_what_each_piece_is_worth(make_problem):
    """Each against the one before it, in dB of the output on tokens that no fit saw."""
    db = {}
    for name, change in {"rotated": {"gptq": False}, "gptq": {}, "clip": {"clip": True}}.items():
        problem = make_problem(256, 1024)
        db[name] = output_sqnr(problem, fit(problem, dataclasses.replace(SplitQuantConfig(), **change)).layer)
    # 16.7, 18.4 and 19.7 dB. Smoothing takes all outliers of this layer, so that the rotation itself is worth
    # nothing here.
    assert db["gptq"] > db["rotated"] + 1
    assert db["clip"] > db["gptq"] + 0.8


@pytest.mark.parametrize("per_slice", [False, True])
def test_spec_of_a_layer(make_problem, per_slice):
    problem = make_problem(128, 1024 + 512, parts=(Part(0, 512), Part(512, 1536, after_gelu=True)))
    layer = fit(problem, SplitQuantConfig(per_slice=per_slice)).layer
    first, second = layer.spec.parts
    assert (first.kronecker, first.pairs) == ((16, 16), 2 if per_slice else 1)
    assert (second.kronecker, second.pairs) == ((16, 16), 4 if per_slice else 1)
    assert layer.tensors["transform"].shape == (512 * (6 if per_slice else 2),)
    assert layer.spec.describe() == "W4A4 per channel smooth 2 slices 16x16"
    assert from_json(to_json(layer.spec)) == layer.spec == parse(layer.spec.text)
    assert output_sqnr(problem, layer) > 10


@pytest.mark.parametrize("method", ["splitquant", "splitquant_4"])
def test_data_free(make_problem, method):
    problem = make_problem(128, 256, calibrated=False)
    fitted = fit(problem, by_name(method).config)
    assert fitted.choices["data"] == "none"
    assert fitted.layer.spec.rank == 0
    (part,) = fitted.layer.spec.parts
    assert (part.rotation, part.kronecker) == ((256, ()) if method == "splitquant" else (0, (16, 16)))


def test_the_method_and_the_paper_s_four_slices(make_problem):
    """By their names: what a layer is, and what the default gains by its scales and its choices."""
    db, spec = {}, {}
    for name in ("splitquant", "splitquant_4"):
        problem = make_problem(256, 1024)
        layer = fit(problem, by_name(name).config).layer
        db[name], spec[name] = output_sqnr(problem, layer), layer.spec
    assert spec["splitquant_4"].describe() == "W4A4 per channel smooth 4 slices 16x16"
    assert spec["splitquant"].describe() in ("W4A4 g64 smooth H64", "W4A4 g64 smooth H256", "W4A4 g64 smooth")
    assert db["splitquant"] > db["splitquant_4"] + 2
    assert by_name("splitquant_4").config == SplitQuantConfig()


def test_slices_of_a_rotation_are_chosen_for_each_part(make_problem):
    """Tried are none, 64 and 256 channels, or the largest power of two that divides a part; behind a GELU
    that without slices has unsigned codes."""
    problem = make_problem(128, 192 + 512, parts=(Part(0, 192), Part(192, 704, after_gelu=True)))
    parts = [RotatedPart(problem, part, SVDQuantConfig(rank=0)) for part in problem.layer.parts]
    tried = [[(s.rotation, s.activation.unsigned) for s in part._specs()] for part in parts]
    assert tried == [[(0, False), (64, False)], [(0, True), (64, False), (256, False)]]
    layer = fit(problem, ROTATED).layer
    assert [(p.start, p.stop, p.rank, p.kronecker) for p in layer.spec.parts] == [
        (0, 192, 0, ()), (192, 704, 0, ())
    ]  # fmt: skip
    assert {p.weight.granularity for p in layer.spec.parts} == {"group"}


@pytest.mark.parametrize("width", [3072, 12288])
def test_no_card_with_a_kernel_leaves_it_out(width):
    """Each form that a part of the default may take is one kernel's, its transform in the quantizer."""
    cards = [Target("cuda", arch, (3, 6)) for arch in (75, 80, 86, 89, 90, 100, 120)]
    cards += [Target("hip", arch, (3, 6)) for arch in ("gfx942", "gfx1100", "gfx1201")]
    weight = torch.zeros(1, width, dtype=torch.bfloat16)
    for part in (Part(0, width), Part(0, width, after_gelu=True)):
        layer = Layer("layer", "block", width, 1, (part,), "layer")
        for spec in RotatedPart(Problem(layer, weight, None, None), part, SVDQuantConfig(rank=0))._specs():
            for card in cards:
                choice = choose(LinearSpec(width, 3072, (spec,)), card)
                int4 = card.backend == "cuda" and card.arch in (75, 80, 86, 89)
                assert choice.path == f"int{4 if int4 else 8} tensor cores"
                assert FUSED not in dict(choice.refused)


def test_a_rotation_spreads_what_smoothing_cannot():
    """Heavy tails in every channel: 13.8 dB without a rotation, 17.2 with one."""
    x = heavy_tails(5120, 512, torch.Generator().manual_seed(1))
    problem = made(randn(256, 512, seed=7) / 23, x)
    fitted = fit(deepcopy(problem), ROTATED)
    (part,) = fitted.layer.spec.parts
    assert part.rotation in (64, 256)
    plain = SVDQuantConfig(rank=0)
    assert output_sqnr(problem, fitted.layer) > output_sqnr(problem, svdquant.fit(problem, plain).layer) + 2


def test_smoothing_that_balances_energies(make_problem):
    """Behind it x / s and W s have the same rms in each channel, up to one factor for all."""
    problem = make_problem(256, 512)
    part = RotatedPart(problem, problem.layer.parts[0], SVDQuantConfig(rank=0))
    smooth = dict(part.smooths(0.0))["rms of both 0.5/0.5"]
    h, w = problem.statistics.hessians[0, 512], problem.weight.float()
    x = (h.diagonal() / problem.statistics.count).sqrt() / smooth
    ratio = x / (w * smooth).square().mean(0).sqrt()
    assert relative_error(ratio.mean().expand(512), ratio) < 0.01  # s is bf16


def db_of(problem, **options):
    fitted = fit(problem, SplitQuantConfig(**options))
    return output_sqnr(problem, fitted.layer), fitted


def made(weight, tokens, parts=None):
    """A Problem of weight (N, K) and fit and held-out tokens."""
    n, k = weight.shape
    layer = Layer("layer", "block", k, n, parts or (Part(0, k),), "layer")
    statistics = InputStatistics.empty("layer", k, [(p.start, p.stop) for p in layer.parts])
    held = tokens[:1024]
    statistics.update(tokens[1024:])
    statistics.hold_out(
        held, torch.rand(len(held), generator=torch.Generator().manual_seed(3), dtype=torch.float64), 0.5
    )
    return Problem(layer, weight.bfloat16(), None, statistics)


@pytest.fixture(scope="module")
def correlated():
    """Channels mixed by rows and by columns of each slice's (16, 16), which a scale for each channel cannot
    undo, and rows of W, too."""
    mix = lambda seed: (
        randn(16, 16, seed=seed) @ torch.diag(torch.logspace(-1, 1, 16)) @ randn(16, 16, seed=seed + 1) / 16
    )
    x = kronecker(randn(5120, 512), mix(1)[None], mix(3)[None])
    w = kronecker(randn(256, 512, seed=7), mix(11)[None], mix(13)[None])
    scale = randn(
        512, seed=9
    ).exp()  # what smoothing takes: moments that leave it out are balanced for another layer, 1.6 dB worse
    return made(w / w.norm() * 16 / scale, x * scale)


def test_affine_is_worth_it_where_channels_are_correlated(correlated):
    start, affine = db_of(correlated, gptq=False)[0], db_of(correlated, transform="affine", gptq=False)
    assert affine[1].choices["transform"].startswith("affine")
    assert affine[0] > start + 8  # 16.8 and 25.6 dB
    per_slice = db_of(correlated, transform="affine", gptq=False, per_slice=True)[0]
    assert per_slice > start + 8  # 25.6 dB


def test_affine_without_second_moments_is_the_orthogonal_start(correlated):
    blind = dataclasses.replace(
        correlated, statistics=dataclasses.replace(correlated.statistics, hessians={})
    )
    fitted = [db_of(blind, transform=t)[1] for t in ("affine", "orthogonal")]
    assert fitted[0].choices["transform"] == "orthogonal"
    assert torch.equal(*(f.layer.tensors["weight"] for f in fitted))


def test_affine_factors_and_an_order_fold_away(correlated):
    """To fp64, with the factors and the order as a layer stores them: unfolded and back in raw order the
    weight is W."""
    order = torch.randperm(512, generator=torch.Generator().manual_seed(5))
    layer = db_of(correlated, transform="affine", gptq=False)[1].layer
    (factors,) = (tuple(f.double() for f in pair) for pair in layer.spec.factors(layer.tensors))
    w, x, s = correlated.weight.double(), randn(40, 512).double(), layer.tensors["smooth_factor"].double()
    folded = fold_weight(w[:, order], s, 0, factors)
    assert (
        relative_error(x @ w.T, transform_activation(x[:, order], s, 0, factors=factors) @ folded.T) < 1e-12
    )
    back = torch.empty_like(w).index_copy_(1, order, unfold_weight(folded, s, 0, factors))
    assert relative_error(w, back) < 1e-12


@pytest.mark.parametrize("transform", ["identity", "hadamard", "orthogonal"])
def test_transforms_by_name(make_problem, transform):
    db, fitted = db_of(make_problem(128, 1152), transform=transform, gptq=False)
    assert bool(fitted.layer.spec.parts[0].kronecker) == (transform != "identity")
    assert db > 16  # 16.7 to 17.0: smoothing takes all outliers of this layer


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"transform": "learned"},
            "transform must be one of identity, hadamard, orthogonal, affine, rotation, found 'learned'",
        ),
        ({"scales": "row"}, "scales must be one of token, slice, group, found 'row'"),
        ({"worst": 32}, "worst must be one of 0, 64, 128, found 32"),
        (
            {"scales": "token"},
            "scales must be group with the transform rotation, found 'token'. Take the method splitq",
        ),
        ({"slices": 8}, "slices must be 4 with the transform rotation, found 8"),
        ({"worst": 64}, "worst must be 0 with the transform rotation, found 64"),
    ],
)
def test_unknown_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        by_name("splitquant").configured(**options)  # its transform is the rotation


@pytest.mark.parametrize("per_slice", [False, True])
def test_slice_scales_are_parts(make_problem, per_slice):
    """K parts alike, each with its own scales and with the factors that all share, or its own."""
    problem = make_problem(128, 1024)
    whole, (db, fitted) = db_of(problem)[0], db_of(problem, scales="slice", per_slice=per_slice)
    layer = fitted.layer
    assert [(p.start, p.stop, p.kronecker, p.per_slice) for p in layer.spec.parts] == [
        (i, i + 256, (16, 16), False) for i in (0, 256, 512, 768)
    ]
    assert layer.tensors["weight_scale"].shape == (4, 128)
    assert (layer.spec.order, layer.spec.describe()) == (
        False,
        "W4A4 per channel and slice smooth 4 slices 16x16",
    )
    assert db > whole + 0.7  # 1.06 measured
    folded = [
        fold_weight(problem.weight.float(), layer.tensors["smooth_factor"].float(), 0, f)
        for f in layer.spec.factors(layer.tensors)
    ]
    for i, (got, scale) in enumerate(zip(folded, layer.tensors["weight_scale"], strict=True)):
        torch.testing.assert_close(scale, got[:, 256 * i : 256 * (i + 1)].abs().amax(1) / 7)


def test_group_scales(make_problem):
    problem = make_problem(128, 1024)
    whole, (db, fitted) = db_of(problem)[0], db_of(problem, scales="group")
    (part,) = fitted.layer.spec.parts
    assert (part.weight.granularity, part.activation.granularity, part.weight.group) == ("group", "group", 64)
    assert fitted.layer.tensors["weight_scale"].shape == (16, 128)
    assert db > whole + 1.5  # 2.5 measured


@pytest.fixture(scope="module")
def burdened():
    """A layer of two parts where 40 channels of the second are large in x and in W alike: smoothing cannot
    trade one for the other."""
    x, w = randn(5120, 768), randn(128, 768, seed=2)
    heavy = 256 + torch.randperm(512, generator=torch.Generator().manual_seed(4))[:40]
    x[:, heavy] *= 8
    w[:, heavy] *= 8
    return made(w / 100, x, (Part(0, 256), Part(256, 768))), heavy


def test_worst_channels_go_to_8_bit_where_that_helps(burdened):
    problem, heavy = burdened
    (before, plain), (after, fitted) = db_of(problem), db_of(problem, worst=64, guard_db=99.0)
    assert fitted.choices["worst"].startswith("8 bit 64 channels by ")
    assert after > before + 8  # 26.2 and 36.9 dB
    *first, last = fitted.layer.spec.parts
    assert (last.start, last.stop, last.weight.bits, last.activation.bits, last.kronecker) == (
        704,
        768,
        8,
        8,
        (),
    )
    assert [(p.start, p.stop) for p in first] == [(0, 256), (256, 704)]
    order = fitted.layer.tensors["channel_order"]
    assert set(heavy.tolist()) <= set(order[704:].tolist())
    assert torch.equal(order[:256], torch.arange(256).int())
    assert fitted.layer.spec.describe().endswith("64 channels at 8 bit")
    assert (
        sqnr_db(problem.weight.float(), fitted.layer.dequantize())
        > sqnr_db(problem.weight.float(), plain.layer.dequantize()) + 5
    )


def test_worst_channels_stay_where_nothing_asks_for_it(burdened, make_problem):
    """Above the guard, and where the gain is below the margin: the very layer of the plain fit."""
    problem, _ = burdened
    for p, options in (
        (problem, {"worst": 64, "guard_db": 5.0}),
        (make_problem(128, 1024), {"worst": 64, "guard_db": 99.0}),
    ):
        plain, guarded = db_of(p)[1], db_of(p, **options)[1]
        assert "worst" not in guarded.choices
        assert guarded.layer.spec == plain.layer.spec
        assert all(torch.equal(t, plain.layer.tensors[k]) for k, t in guarded.layer.tensors.items())


def test_channels_are_dealt_out_only_where_that_helps():
    """Where the first slice holds all that is large in x and in W, each slice then gets a quarter of it; not
    where channels are alike."""
    x, w = randn(5120, 1024), randn(128, 1024, seed=2)
    for t in (x, w):
        t[:, :256] *= 6
    problem = made(w / 30, x)
    (before, _), (after, fitted) = db_of(problem), db_of(problem, sort=True)
    assert fitted.choices["order"] == "dealt by magnitude"
    assert after > before + 4  # 14.7 and 21.1 dB
    order = fitted.layer.tensors["channel_order"]
    assert [int((piece < 256).sum()) for piece in order.split(256)] == [64] * 4
    _, fitted = db_of(made(randn(128, 1024), randn(5120, 1024)), sort=True)
    assert "order" not in fitted.choices
    assert not fitted.layer.spec.order


def test_second_moments_in_blocks(make_problem):
    """Blocks narrower than a part or across its slices still serve GPTQ and affine factors: what is between
    blocks counts as 0."""
    problem = make_problem(128, 1024)
    whole = problem.statistics
    ((_, h),) = whole.hessians.items()
    cut = {(a, a + 512): h[a : a + 512, a : a + 512] for a in (0, 512)}
    blocked = dataclasses.replace(
        problem, statistics=dataclasses.replace(whole, hessians=cut, blocks=tuple(cut))
    )
    nearest = db_of(problem, gptq=False)[0]
    for slices in (4, 1):
        db, fitted = db_of(blocked, transform="affine", slices=slices)
        assert fitted.choices["rounding"] == "gptq"
        assert db > nearest + 1
