import pytest
import torch

from comfyui_nibble.quant_core.formats.nibble import PackError
from comfyui_nibble.quant_core.layer.row import Row
from comfyui_nibble.quant_core.methods import METHODS, fit_problem
from comfyui_nibble.quant_core.run import unfinished
from comfyui_nibble.quant_core.run.source import Remembered, Tensors
from comfyui_nibble.quant_core.run.unfinished import NotOurs, OtherRun, Unfinished, hash_of
from comfyui_nibble.quant_core.store import atomic
from comfyui_nibble.quant_core.store.safe import CheckpointError

pytestmark = pytest.mark.quick

SETTINGS = {"method": "rtn", "settings": {"group": 64}, "torch": "2.11"}


@pytest.fixture
def layer(make_problem):
    rtn = METHODS["rtn"]
    return fit_problem(make_problem(64, 128, calibrated=False), rtn, rtn.config).layer


def row(name):
    return Row(name, "blocks.0", 128, 64, "W4A4")


def test_what_was_saved_is_taken(tmp_path, layer):
    store = Unfinished(tmp_path / "x.partial", "flux", SETTINGS)
    assert store.kept == 0
    store.save("blocks.0.linear", "h1", {layer.name: layer}, [row(layer.name)])
    again = Unfinished(tmp_path / "x.partial", "flux", SETTINGS)
    assert again.kept == 1
    assert again.text.startswith(f"{tmp_path / 'x.partial'}: 1 finished pieces of the run since 20")
    layers, rows = again.take("blocks.0.linear", "h1")
    assert all(torch.equal(layers[layer.name].tensors[k], t) for k, t in layer.tensors.items())
    assert rows == [row(layer.name)]
    assert again.take("blocks.0.linear", "of other weights") is None
    assert again.take("blocks.1.linear", "h1") is None
    again.remove()
    assert not (tmp_path / "x.partial").exists()


def test_a_damaged_piece_is_made_again(tmp_path, layer):
    store = Unfinished(tmp_path / "x.partial", "flux", SETTINGS)
    store.save("a", "h", {layer.name: layer}, [])
    [path] = store.folder.glob("*.nibble.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    assert store.take("a", "h") is None
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        store.load("a")


def test_pieces_of_another_run_are_never_assembled(tmp_path, layer):
    """As two processes once wrote a mixture: the file is there under the right name, made by other options."""
    one, two = (
        Unfinished(tmp_path / f"{m}.partial", "flux", SETTINGS | {"method": m}) for m in ("robuq", "rtn")
    )
    one.save("a", "h", {layer.name: layer}, [])
    [path] = one.folder.glob("*.nibble.safetensors")
    path.rename(two.folder / path.name)
    assert two.take("a", "h") is None
    with pytest.raises(PackError, match="belongs to another run, or to other weights, than a of this one"):
        two.load("a")


def test_other_options_are_refused_by_name(tmp_path, layer):
    store = Unfinished(tmp_path / "x.partial", "flux", SETTINGS)
    store.save("a", "h", {layer.name: layer}, [])
    before = sorted(p.name for p in store.folder.iterdir())
    with pytest.raises(
        OtherRun,
        match=r"x.partial: 1 finished pieces of another run, since 20.* \(settings.group: 64 there, 32 "
        r"here\)\. Go on with",
    ):
        Unfinished(store.folder, "flux", SETTINGS | {"settings": {"group": 32}})
    assert sorted(p.name for p in store.folder.iterdir()) == before


def test_a_folder_of_the_users_is_left_alone(tmp_path):
    (tmp_path / "x.partial").mkdir()
    (tmp_path / "x.partial" / "notes.txt").write_text("mine")
    with pytest.raises(
        NotOurs, match=r"x.partial: is in the way of unfinished work, and Nibble has not made it\. Move it"
    ):
        Unfinished(tmp_path / "x.partial", "flux", SETTINGS)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(NotOurs, match="file: is in the way"):
        Unfinished(tmp_path / "file", "flux", SETTINGS)
    assert (tmp_path / "x.partial" / "notes.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    assert Unfinished(tmp_path / "empty", "flux", SETTINGS).kept == 0


def test_only_own_files_are_removed(tmp_path, layer):
    store = Unfinished(tmp_path / "x.partial", "flux", SETTINGS)
    store.save("a", "h", {layer.name: layer}, [])
    (store.folder / "notes.txt").write_text("mine")
    store.remove()
    assert [p.name for p in store.folder.iterdir()] == ["notes.txt"]


def test_a_folder_of_0_6_is_named_and_can_be_removed(tmp_path, layer):
    folder = tmp_path / "x.partial"
    folder.mkdir()
    (folder / "settings.sha256").write_text("0" * 64)
    unfinished.nibble.save(folder / "double_blocks.0.safetensors", {layer.name: layer}, {}, "flux", {}, [])
    with pytest.raises(OtherRun, match="unfinished work of an earlier version of Nibble"):
        Unfinished(folder, "flux", SETTINGS)
    assert unfinished.remove(folder) > 0
    assert not folder.exists()


@pytest.mark.parametrize(
    "unit", ["../../escaped/blocks.0", "/etc/blocks.0", "a\0b", "x" * 300, "..", "CON", "a/b\\c"]
)
def test_a_name_never_becomes_a_path(tmp_path, layer, unit):
    store = Unfinished(tmp_path / "in" / "x.partial", "flux", SETTINGS)
    store.save(unit, "h", {layer.name: layer}, [])
    assert store.take(unit, "h")
    assert sorted(p.name for p in tmp_path.rglob("*.safetensors")) == [
        f"{atomic.file_name(unit)}.nibble.safetensors"
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_a_hash_sees_every_bit_dtype_and_shape():
    t = torch.arange(64, dtype=torch.float32).view(8, 8)
    flipped = t.clone()
    flipped.view(torch.int32)[7, 7] ^= 1
    assert len({hash_of([x]) for x in (t, flipped, t.view(4, 16), t.view(torch.int32), t.bfloat16())}) == 5
    assert hash_of([t]) == hash_of([t.clone()])
    assert hash_of([torch.zeros(0)]) != hash_of([])


def test_weights_are_read_once_for_the_hash_and_the_fit():
    state = {f"{n}.{leaf}": torch.randn(4, 4) for n in "ab" for leaf in ("weight", "bias")}

    class Read(Tensors):
        seen: list[str] = []

        def get(self, key):
            self.seen.append(key)
            return super().get(key)

    weights = Remembered(Read(state))
    assert weights.hash_of("a") == hash_of([state["a.weight"], state["a.bias"]])
    assert weights.get("a.weight") is state["a.weight"]
    weights.hash_of("b")
    assert Read.seen == ["a.weight", "a.bias", "b.weight", "b.bias"]


def test_the_folder_is_never_there_without_its_marker(tmp_path, monkeypatch):
    """A run that was killed between the two was refused for ever, as a folder of the user's."""

    def killed(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(unfinished, "save_text", killed)
    with pytest.raises(KeyboardInterrupt):
        Unfinished(tmp_path / "x.partial", "flux", SETTINGS)
    assert not list(tmp_path.iterdir())
