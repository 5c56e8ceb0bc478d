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
    ("RTX 2080 Ti", "group"): (46, 44),
    ("RTX 2080 Ti", "channel"): (86, 57),
    ("A100", "group"): (76, 58),
    ("A100", "channel"): (76, 61),
    ("RTX 3090", "group"): (65, 49),
    ("RTX 3090", "channel"): (90, 62),
    ("RTX 4090", "group"): (65, 26),
    ("RTX 4090", "channel"): (90, 36),
    ("H100", "group"): (66, 47),
    ("H100", "channel"): (63, 45),
    ("B200", "group"): (31, 31),
    ("B200", "channel"): (82, 36),
    ("RTX 5090", "group"): (60, 24),
    ("RTX 5090", "channel"): (91, 29),
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
