"""Keys of a LoRA file without a layer: found whatever the log shows, with ComfyUI's own lines as the caller
asked for them."""

import logging
import subprocess
import sys
from collections.abc import Mapping

import pytest
import torch

from comfyui_nibble.tests.host.server import find_comfyui
from comfyui_nibble.tests.host.test_adapters import MLP, QKV, H, adapter, randn, with_lora

STRAY = {"lora_unet_x.lora_down.weight": randn(4, 9), "lora_unet_x.lora_up.weight": randn(9, 4)}
REFUSAL = (
    "2 keys and none has a layer in this model, so the LoRA was made for another one: lora_unet_x.lora_down"
)


@pytest.fixture(
    params=[logging.DEBUG, logging.ERROR, logging.CRITICAL + 1], ids=["debug", "error", "nothing"]
)
def level(request):
    """Whatever the log shows."""
    root = logging.getLogger()
    before = root.level
    root.setLevel(request.param)
    yield request.param
    root.setLevel(before)


@pytest.mark.quick
def test_a_lora_of_another_model_is_refused_at_every_log_level(base, level):
    with pytest.raises(RuntimeError, match=REFUSAL):
        with_lora(base, STRAY)


def test_so_is_a_bypass_lora(comfy, base, level):
    """ComfyUI's loader then calls nothing of the model's that could refuse."""
    with pytest.raises(RuntimeError, match=REFUSAL):
        comfy.sd.load_bypass_lora_for_models(base, None, STRAY, 1.0, 0.0)


def test_a_switched_off_log_changes_nothing_either(base):
    logging.disable(logging.CRITICAL)
    try:
        with pytest.raises(RuntimeError, match=REFUSAL):
            with_lora(base, STRAY)
    finally:
        logging.disable(logging.NOTSET)


def missing_of(comfy, tensors, targets, **options):
    from comfyui_nibble.nodes.host import unmatched

    unmatched.observe()
    loaded = comfy.lora.load_lora(tensors, targets, **options)
    return sorted(unmatched.keys_of(loaded))


@pytest.mark.quick
@pytest.mark.parametrize(
    "kind", ["lora", "lora and bias", "dora", "loha", "lokr, both decomposed", "glora", "oft", "diff", "set"]
)
def test_the_keys_are_those_that_comfyui_logs(comfy, kind, caplog):
    tensors = adapter(kind, QKV) | adapter(kind, MLP) | {f"{QKV}.unknown": randn(1), "w.diff": randn(2)}
    for targets in (
        {QKV: f"{QKV}.weight"},
        {QKV: f"{QKV}.weight", MLP: f"{MLP}.weight"},
        {"other": "other.weight"},
        {},
    ):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            missing = missing_of(comfy, tensors, targets)
        lines = [r.getMessage() for r in caplog.records]
        assert missing == sorted(line.removeprefix("lora key not loaded: ") for line in lines)
        assert set(missing) >= {f"{QKV}.unknown", "w.diff"}


def test_comfyuis_lines_appear_as_the_caller_asks(comfy, caplog):
    with caplog.at_level(logging.WARNING):
        assert missing_of(comfy, STRAY, {}, log_missing=False) == sorted(STRAY)
        assert caplog.records == []
        assert missing_of(comfy, STRAY, {}) == sorted(STRAY)
    assert [r.getMessage() for r in caplog.records] == [f"lora key not loaded: {k}" for k in STRAY]


def test_tensors_that_comfyui_looks_at_in_vain_are_not_used(comfy):
    """OFT blocks of two dimensions: neither of its two adapters for such blocks takes them."""
    assert missing_of(comfy, {f"{QKV}.oft_blocks": randn(4, 4)}, {QKV: f"{QKV}.weight"}) == [
        f"{QKV}.oft_blocks"
    ]


@pytest.mark.quick
def test_any_mapping_is_read_by_its_own_methods(comfy):
    class Lazy(Mapping):
        def __init__(self, held):
            self.held = held

        def __getitem__(self, key):
            return self.held[key]()

        def __iter__(self):
            return iter(self.held)

        def __len__(self):
            return len(self.held)

    lazy = Lazy({k: lambda t=t: t for k, t in (adapter("lora", QKV) | STRAY).items()})
    assert missing_of(comfy, lazy, {QKV: f"{QKV}.weight"}) == sorted(STRAY)


def test_a_newer_loader_is_called_with_what_it_is_given(comfy, monkeypatch):
    """Read off ComfyUI after 0.38: attention preferences are keys ending in `.config`, patches that are no
    tensors. New arguments pass."""
    from comfyui_nibble.nodes.host import unmatched

    def newer(lora, to_load, log_missing=True, *, fast_disk=False):
        assert fast_disk
        loaded = {to_load[k]: ("diff", (lora[f"{k}.diff"],)) for k in to_load}
        configs = {k: ("config", (bytes(lora[k].tolist()),)) for k in lora if k.endswith(".config")}
        return loaded | configs

    monkeypatch.setattr(comfy.lora, "load_lora", newer)
    unmatched.observe()
    tensors = {
        f"{QKV}.diff": randn(3 * H, H),
        "a.comfy_attention.config": torch.zeros(2, dtype=torch.uint8),
    } | STRAY
    assert missing_of(comfy, tensors, {QKV: f"{QKV}.weight"}, fast_disk=True) == sorted(STRAY)


IMPORTED = """
import sys

sys.path.append(sys.argv.pop())
from comfy.cli_args import args

args.cpu = True
import comfy.lora, comfy.sd

before = comfy.lora.load_lora, comfy.sd.load_bypass_lora_for_models
import comfyui_nibble.nodes, comfyui_nibble.nodes.host.patcher

assert before == (comfy.lora.load_lora, comfy.sd.load_bypass_lora_for_models)
"""


def test_importing_the_pack_changes_nothing_of_comfyuis():
    """Its loaders are observed from the first quantized model on."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED, str(find_comfyui())], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
