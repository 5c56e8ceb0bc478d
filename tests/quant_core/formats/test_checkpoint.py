import json
import tracemalloc

import pytest
import torch
from safetensors.torch import save_file

from comfyui_nibble.quant_core.families import FLUX
from comfyui_nibble.quant_core.formats.checkpoint import Checkpoint
from comfyui_nibble.quant_core.formats.shards import files_of
from comfyui_nibble.quant_core.store.safe import CheckpointError
from comfyui_nibble.tests.assets.synthetic import flux_shapes

pytestmark = pytest.mark.quick

LAYER = "double_blocks.0.img_attn.qkv.weight"


@pytest.fixture
def state():
    g = torch.Generator().manual_seed(0)
    return {k: torch.randn(s, generator=g).bfloat16() for k, s in flux_shapes(hidden=128, context=64).items()}


def shards(folder, state, count=3, index=True, stem="diffusion_pytorch_model"):
    folder.mkdir(parents=True, exist_ok=True)
    names, keys = [f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)], sorted(state)
    where = {}
    for i, name in enumerate(names):
        save_file({k: state[k] for k in keys[i::count]}, folder / name)
        where |= dict.fromkeys(keys[i::count], name)
    if index:
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    return [folder / name for name in names]


def same(checkpoint, state):
    assert checkpoint.family is FLUX
    assert checkpoint.shapes == {k: tuple(v.shape) for k, v in state.items()}
    assert all(torch.equal(checkpoint.get(k), v) for k, v in state.items())


@pytest.mark.parametrize("index", [True, False])
def test_shards_by_folder_by_any_of_them_and_in_a_pipeline(tmp_path, state, index):
    files = shards(tmp_path / "pipe" / "transformer", state, index=index)
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    for path in (files[0].parent, files[1], tmp_path / "pipe"):
        assert files_of(path) == files
        same(Checkpoint(path), state)


@pytest.mark.parametrize("index", [True, False])
def test_a_missing_shard(tmp_path, state, index):
    files = shards(tmp_path, state, index=index)
    files[1].unlink()
    for path in (tmp_path, files[0]):
        with pytest.raises(
            CheckpointError, match="1 of 3 files are missing, first diffusion_pytorch_model-00002-of-00003"
        ):
            files_of(path)


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "model.bin", 3]
)
def test_an_index_may_only_name_files_beside_it(tmp_path, state, name):
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": name}}))
    with pytest.raises(CheckpointError, match=r"weight_map: expected names of \.safetensors files beside it"):
        files_of(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', "[" * 100_000, '{"metadata": {}}'])
def test_an_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match="expected JSON with a weight_map"):
        files_of(tmp_path)


def test_an_index_that_takes_much_memory(tmp_path):
    """A dictionary of a million names takes ten times its text."""
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {' + ",".join(f'"{i}":"m"' for i in range(10**6)) + "}}")
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"index.json: its JSON of \d+ bytes would take \d+ MB"):
            Checkpoint(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 2 * index.stat().st_size
    finally:
        tracemalloc.stop()


def test_an_index_that_names_no_file(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(
        CheckpointError,
        match=r"model.safetensors.index.json: weight_map: expected names of .safetensors files, found none",
    ):
        files_of(tmp_path)


def test_the_plain_variant_is_preferred_and_doubles_are_refused(tmp_path, state):
    plain = shards(tmp_path / "a", state, stem="model")
    shards(tmp_path / "a", state, stem="model.fp16")
    assert files_of(tmp_path / "a") == plain
    (tmp_path / "b").mkdir()
    for name in ("model", "model.fp16"):
        save_file(state, tmp_path / "b" / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"is in model\.fp16\.safetensors and in model\.safetensors"):
        Checkpoint(tmp_path / "b")


@pytest.mark.parametrize(("old", "shape"), [(True, ()), (False, ()), (False, (384, 1))])
def test_scaled_fp8_has_its_real_values(tmp_path, state, old, shape):
    scale = torch.rand(shape) + 0.5
    state[LAYER] = (torch.randn(384, 128) * 20).to(torch.float8_e4m3fn)
    beside = {
        f"{LAYER[:-7]}.{'scale_weight' if old else 'weight_scale'}": scale,
        f"{LAYER[:-7]}.input_scale": torch.ones(()),
    }
    beside |= (
        {"scaled_fp8": torch.empty(0)}
        if old
        else {f"{LAYER[:-7]}.comfy_quant": torch.zeros(4, dtype=torch.uint8)}
    )
    save_file(
        {f"model.diffusion_model.{k}": v for k, v in (state | beside).items()} | {"vae.x": torch.ones(2)},
        tmp_path / "m.safetensors",
    )
    expected = (state[LAYER].float() * scale).bfloat16()
    same(Checkpoint(tmp_path / "m.safetensors"), state | {LAYER: expected})


@pytest.mark.parametrize(
    ("dtype", "becomes"),
    [
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.float8_e5m2, torch.bfloat16),
        (torch.float64, torch.float32),
        (torch.float32, torch.float32),
        (torch.float16, torch.float16),
        (torch.bfloat16, torch.bfloat16),
        (torch.int64, torch.int64),
    ],
)
def test_every_tensor_gets_a_dtype_that_has_arithmetic(tmp_path, state, dtype, becomes):
    """Not only weights: fp8 files of FLUX have their biases and norms in fp8 too. Whole numbers stay."""
    change = {
        k: state[k].to(dtype)
        for k in ((LAYER, f"{LAYER[:-6]}bias") if dtype.is_floating_point else ("img_in.bias",))
    }
    save_file(state | change, tmp_path / "m.safetensors")
    checkpoint = Checkpoint(tmp_path / "m.safetensors")
    for key, tensor in change.items():
        assert checkpoint.get(key).dtype == becomes
        assert torch.equal(checkpoint.get(key).double(), tensor.double())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({LAYER: torch.zeros(384, 64, dtype=torch.int8)}, "is of dtype I8: quantized already"),
        ({f"{LAYER[:-7]}.weight_scale": torch.ones(())}, "is BF16, not fp8"),
        ({LAYER: torch.zeros(384, 128, dtype=torch.float8_e4m3fn),
        f"{LAYER[:-7]}.weight_scale": torch.ones(5)}, r"expected one float, or 384, found F32 \[5\]"),
        ({LAYER: torch.zeros(384, 128, dtype=torch.float8_e4m3fn),
        f"{LAYER[:-7]}.weight_scale": torch.ones((), dtype=torch.int64)},
        "expected one float, or 384, found I64"),
    ],
)  # fmt: skip
def test_what_is_no_full_precision_checkpoint(tmp_path, state, change, message):
    save_file(state | change, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=message):
        Checkpoint(tmp_path / "m.safetensors")
