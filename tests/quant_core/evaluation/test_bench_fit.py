import pytest

from comfyui_nibble.quant_core.evaluation import bench_fit
from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.methods import METHODS
from comfyui_nibble.tests.assets.synthetic import flux_shapes


def test_projection_is_in_proportion_to_the_weights():
    """With times in proportion to weights, the projection is that of all of FLUX.1's weights."""
    block = 7 * 3072 * 3072 + 5 * 3072 * 3072 + 3 * 3072 * 3072
    results = [
        {"layer": name, "method": "m", "seconds": n * k / 1e6} for name, (n, k, _) in bench_fit.LAYERS.items()
    ]
    results.append({"block": "single_blocks.0", "method": "m", "seconds": block / 1e6})
    weights = sum(layer.in_features * layer.out_features for layer in FLUX.layers(flux_shapes(19, 38)))
    assert bench_fit.projected(results, "m") == pytest.approx(weights / 1e6)


def test_a_small_block():
    found = bench_fit.fit_block(METHODS["rtn"], hidden=128)
    assert found["block_bytes"] == 2 * 15 * 128 * 128
    assert 4 < found["bits"] < 5
