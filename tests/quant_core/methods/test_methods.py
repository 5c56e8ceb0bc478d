import pytest
import torch

from comfyui_nibble.quant_core.families import Part
from comfyui_nibble.quant_core.methods import METHODS, by_name, gptq
from comfyui_nibble.quant_core.methods.lowrank import truncated
from comfyui_nibble.quant_core.methods.parts import fit_weight_only
from comfyui_nibble.quant_core.methods.problem import output_sqnr
from comfyui_nibble.quant_core.methods.rtn import RTNConfig
from comfyui_nibble.tests.support import outlier_tokens, sqnr_db


def fitted(problem, name, **options):
    method = by_name(name)
    return method.fit(problem, method.configured(**options))


def test_order_of_the_methods_under_outliers(make_problem):
    """The planted failure (per tensor) must fail, and each method must beat the one before it by what it is for."""
    db = {}
    for name in ("rtn", "convrot", "svdquant", "svdquant_r"):
        problem = make_problem(384, 512)
        db[name] = output_sqnr(problem, fitted(problem, name).layer)
    problem = make_problem(384, 512)
    db["naive"] = output_sqnr(problem, METHODS["rtn"].fit(problem, RTNConfig(activation="tensor", weight="tensor")).layer)
    assert db["naive"] < 3
    assert db["rtn"] < 10
    assert db["svdquant"] > db["rtn"] + 8
    assert db["svdquant"] > 17
    assert db["svdquant_r"] > db["svdquant"] - 0.5


@pytest.mark.parametrize(
    ("option", "margin"),
    [({"gptq": False}, 0.1), ({"rank": 0}, 0.5), ({"smooth": ((0.0, 0.0),)}, 3.0)],
)
def test_each_ingredient_earns_its_place(make_problem, option, margin):
    full = output_sqnr(p := make_problem(256, 512), fitted(p, "svdquant").layer)
    less = output_sqnr(p := make_problem(256, 512), fitted(p, "svdquant", **option).layer)
    assert full > less + margin


def test_unsigned_codes_help_after_gelu(make_problem):
    parts = (Part(0, 512, after_gelu=True),)
    unsigned = fitted(p := make_problem(256, 512, parts), "svdquant")
    signed = fitted(q := make_problem(256, 512, parts), "svdquant", unsigned_after_gelu=False)
    assert unsigned.layer.spec.parts[0].activation.unsigned
    assert not signed.layer.spec.parts[0].activation.unsigned
    assert output_sqnr(p, unsigned.layer) > output_sqnr(q, signed.layer) + 1


def test_shift_without_a_bias_gets_one(make_problem):
    problem = make_problem(96, 256, (Part(0, 256, after_gelu=True),), bias=False)
    layer = fitted(problem, "svdquant").layer
    assert layer.spec.bias
    assert layer.tensors["bias"].dtype == torch.float32
    assert output_sqnr(problem, layer) > 18


def test_two_halves_have_their_own_quantizers(make_problem):
    problem = make_problem(128, 640, (Part(0, 128), Part(128, 640, after_gelu=True)))
    result = fitted(problem, "svdquant")
    first, second = result.layer.spec.parts
    assert not first.activation.unsigned
    assert second.activation.unsigned
    assert result.layer.tensors["proj_up"].shape == (128, 64)
    assert {k.split(".")[0] for k in result.choices} == {"0", "1"}
    assert output_sqnr(problem, result.layer) > 18


def test_rank_is_at_most_the_narrowest_part(make_problem):
    problem = make_problem(256, 320, (Part(0, 64), Part(64, 320)), fit_tokens=1024)
    assert fitted(problem, "svdquant", rank=128).layer.spec.rank == 64


def test_data_free_works_and_is_not_judged(make_problem):
    problem = make_problem(128, 256, calibrated=False)
    for name in METHODS:
        assert output_sqnr(problem, fitted(problem, name).layer) is None


def test_same_inputs_give_the_same_bytes(make_problem):
    a, b = (fitted(make_problem(128, 256), "svdquant_r").layer.tensors for _ in range(2))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_float16_models_keep_float16(make_problem):
    layer = fitted(make_problem(128, 256, dtype=torch.float16), "svdquant").layer
    assert {layer.tensors[k].dtype for k in ("weight_scale", "smooth_factor", "proj_down", "proj_up", "bias")} == {torch.float16}


def test_unknown_names_are_listed():
    with pytest.raises(ValueError, match="svdquant_r, svdquant, convrot, rtn"):
        by_name("gguf")
    with pytest.raises(ValueError, match=r"no option \['ranks'\]"):
        by_name("svdquant").configured(ranks=3)


def test_weight_only_error(make_problem):
    problem = make_problem(128, 256)
    problem.weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    layer = fit_weight_only(problem)
    assert layer.spec.weight_only
    assert sqnr_db(problem.weight.float(), layer.dequantize()) > 20


# -- the pieces ----------------------------------------------------------------------------------------------------------


def test_truncated_svd_is_the_best_of_its_rank():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(96, 24, generator=g) @ torch.randn(24, 128, generator=g) + 0.1 * torch.randn(96, 128, generator=g)
    v, u = truncated(lambda rows: a[rows], a.shape, 16)
    s = torch.linalg.svdvals(a)
    assert float((a - u @ v.T).norm()) < 1.001 * float(s[16:].norm())


def test_whitened_svd_is_best_in_the_metric_of_the_data():
    g = torch.Generator().manual_seed(0)
    w, x = torch.randn(64, 128, generator=g), outlier_tokens(4096, 128, 1)
    h = x.T @ x / 4096
    factor = {(0, 128): gptq.upper_factor(h.clone(), 1e-6)}
    plain_v, plain_u = truncated(lambda rows: w[rows], w.shape, 16)
    v, u = truncated(lambda rows: w[rows], w.shape, 16, factor)
    error = lambda low: float((x @ (w - low).T).norm())
    assert error(u @ v.T) < 0.8 * error(plain_u @ plain_v.T)


def test_upper_factor():
    x = torch.randn(300, 64, dtype=torch.float64)
    h = (x.T @ x).float()
    c = gptq.upper_factor(h.clone(), 0.0)
    assert torch.equal(c, c.triu())
    assert torch.allclose(c @ c.T, h, rtol=1e-4, atol=1e-2)


def test_dead_input_does_not_stop_gptq():
    factor = {(0, 64): gptq.upper_factor(torch.zeros(64, 64), 0.01)}
    codes, scales = gptq.quantize(torch.randn(64, 8), factor, 4, 64, torch.bfloat16)
    assert codes.abs().max() <= 7
    assert torch.isfinite(scales).all()


def test_gptq_beats_rounding_on_tokens_it_has_not_seen():
    g = torch.Generator().manual_seed(0)
    w, x, y = torch.randn(64, 256, generator=g), outlier_tokens(8192, 256, 1, strength=4), outlier_tokens(512, 256, 2, strength=4)
    from comfyui_nibble.quant_core.quantizers import absmax_scale, dequantize, quantize

    scale = absmax_scale(w, 4, "group")
    rounded = dequantize(quantize(w, scale, 4, "group"), scale, "group")
    factor = {
        (0, 128): gptq.upper_factor((x.T @ x)[:128, :128].clone(), 0.01),
        (128, 256): gptq.upper_factor((x.T @ x)[128:, 128:].clone(), 0.01),
    }
    codes, scales = gptq.quantize(w.T.clone(), factor, 4, 64, torch.float32)
    better = dequantize(codes.T, scales.T, "group")
    assert sqnr_db(y @ w.T, y @ better.T) > sqnr_db(y @ w.T, y @ rounded.T) + 2
