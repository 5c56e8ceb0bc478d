"""The rewrite of int8 instructions to 4-bit ones, and its hook in Triton's compiler."""

import hashlib
from pathlib import Path

import pytest
from triton import knobs

from comfyui_nibble.kernels import native_int4

INT8 = "mma.sync.aligned.m16n8k32.row.col.satfinite.s32.s8.s8.s32"
S4 = "mma.sync.aligned.m16n8k64.row.col.satfinite.s32.s4.s4.s32"
U4 = "mma.sync.aligned.m16n8k64.row.col.satfinite.s32.u4.s4.s32"
OPERANDS = "{ %r1, %r2, %r3, %r4 }, { %r5, %r6, %r7, %r8 }, { %r9, %r10 }, { %r1, %r2, %r3, %r4 };"
PTX = (
    f"\tldmatrix.sync.aligned.m8n8.x4.shared.b16 {{%r5}}, [%r0];\n\t{INT8} {OPERANDS}\n\t{INT8} "
    f"{OPERANDS}\n\tret;\n"
)


@pytest.mark.parametrize(("name", "instruction"), [("gemm_s4s4", S4), ("gemm_u4s4", U4)])
def test_every_product_is_rewritten_and_nothing_else(name, instruction):
    assert native_int4.rewrite(PTX, name) == PTX.replace(INT8, instruction)
    assert native_int4.rewrite(PTX, name).count(instruction) == 2


@pytest.mark.parametrize("name", ["gemm_int8", "gemm_s4s4_reference", "s4s4", "add_one"])
def test_other_kernels_are_left_alone(name):
    assert native_int4.rewrite(PTX, name) is PTX
    assert native_int4.rewrite("ret;", name) == "ret;"


@pytest.mark.parametrize("ptx", ["ret;", PTX.replace("m16n8k32", "m16n8k16"), PTX.replace("s8.s8", "u8.s8")])
def test_a_kernel_without_the_instruction_is_refused(ptx):
    with pytest.raises(
        native_int4.NoInt4Error, match=f"gemm_s4s4: expected {INT8} in the PTX of this Triton, found none"
    ):
        native_int4.rewrite(ptx, "gemm_s4s4")


@pytest.fixture
def hook(monkeypatch):
    """A function that puts `previous` in Triton's place for a hook and ours in front of it."""

    def install(previous):
        monkeypatch.setattr(knobs.runtime, "add_stages_inspection_hook", previous)
        native_int4.install()
        return knobs.runtime.add_stages_inspection_hook

    return install


def compile_with(hook, name):
    """What a compilation of kernel `name` to PTX gives with the hook in place."""
    stages = {"ttir": lambda source, metadata: source, "ptx": lambda source, metadata: source + PTX}
    hook("backend", stages, "options", "language", 89)
    assert set(stages) == {"ttir", "ptx"}
    return stages["ptx"]("//", {"name": name})


def test_hook_rewrites_the_ptx_stage(hook):
    ours = hook(None)
    assert compile_with(ours, "gemm_s4s4") == "//" + PTX.replace(INT8, S4)
    assert compile_with(ours, "gemm_int8") == "//" + PTX
    stages = {"ttir": None, "amdgcn": None}
    ours("backend", stages, "options", "language", None)
    assert stages == {"ttir": None, "amdgcn": None}


def test_install_is_idempotent(hook):
    ours = hook(None)
    assert hook(ours) is ours
    native_int4.install()
    assert knobs.runtime.add_stages_inspection_hook is ours


def test_hook_is_installed_by_the_kernels():
    import comfyui_nibble.kernels.quant_linear.triton  # noqa: F401

    assert knobs.runtime.add_stages_inspection_hook.nibble_int4


def test_an_existing_hook_runs_first(hook):
    calls = []

    def previous(backend, stages, *rest):
        calls.append((backend, *rest))
        inner = stages["ptx"]
        stages["ptx"] = lambda source, metadata: inner(source, metadata) + "// seen"

    assert compile_with(hook(previous), "gemm_u4s4") == "//" + PTX.replace(INT8, U4) + "// seen"
    assert calls == [("backend", "options", "language", 89)]


def test_key_and_hash_for_the_compilation_cache(hook):
    """Triton 3.9 asks the hook for both by a call without arguments. They follow our source and the other
    hook's."""
    key, digest = hook(None)()
    assert key == Path(native_int4.__file__).read_text()
    assert digest == hashlib.sha256(key.encode()).hexdigest()
    assert hook(lambda: ("other", "abc"))() == (
        key + "other",
        hashlib.sha256((digest + "abc").encode()).hexdigest(),
    )
