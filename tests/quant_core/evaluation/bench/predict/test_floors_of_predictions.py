"""A floor under what each card's default tiles are predicted to reach: a change of a kernel or a tile that
makes them worse is seen without a card. The figures are predictions, no measurements: docs/predictions.md."""

import pytest

from comfyui_nibble.quant_core.evaluation.bench.predict import prediction
from comfyui_nibble.quant_core.evaluation.bench.predict.throughput import card_named
from comfyui_nibble.tests.kernels import gate

N = K = 3072
# (card, scales): per cent of the tensor cores' peak in the main loop at least, and microseconds of the
# quantizer at most.
FLOORS = {
    ("RTX 2080 Ti", "group"): (46, 45),
    ("RTX 2080 Ti", "channel"): (86, 53),
    ("A100", "group"): (77, 59),
    ("A100", "channel"): (77, 61),
    ("RTX 3090", "group"): (66, 48),
    ("RTX 3090", "channel"): (91, 61),
    ("RTX 4090", "group"): (66, 25),
    ("RTX 4090", "channel"): (91, 35),
    ("H100", "group"): (67, 43),
    ("H100", "channel"): (64, 42),
    ("B200", "group"): (31, 26),
    ("B200", "channel"): (83, 31),
    ("RTX 5090", "group"): (60, 23),
    ("RTX 5090", "channel"): (92, 30),
}
DEFAULTS = sorted(FLOORS)


@pytest.fixture(scope="module")
def predicted():
    """{(card, scales): Layer}, compiled outside of the interpreter."""
    with gate.pool() as pool:
        compiler = lambda job: pool.submit(prediction.compiled, job).result()
        yield {
            case: prediction.predict(card_named(case[0]), case[1], N, K, compiler=compiler)
            for case in DEFAULTS
        }


@pytest.mark.parametrize("case", DEFAULTS, ids=" ".join)
def test_no_default_is_predicted_worse_than_before(predicted, case):
    share, microseconds = FLOORS[case]
    layer = predicted[case]
    assert 100 * layer.loop >= share
    assert 1e6 * layer.quantizer <= microseconds
