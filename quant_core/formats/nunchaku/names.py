"""What nunchaku calls the layers of each model, and which it quantizes how: tables from its own modules to
diffusers' names.

Two vocabularies are about. FLUX.1's files have those of nunchaku's C++ modules (`qkv_proj.lora_down`,
`smooth`), also in one file; later models have those of its Python modules (`attn.to_qkv.proj_down`,
`smooth_factor`); SDXL has new modules with old leaves.
"""

import re
from dataclasses import dataclass

OLD_LEAVES = {
    "lora_down": "proj_down",
    "lora_up": "proj_up",
    "smooth": "smooth_factor",
    "smooth_orig": "smooth_factor_orig",
}


@dataclass(frozen=True)
class Module:
    """A module of nunchaku's, within a block.

    name: in Python; old: in C++, where it differs. sources: diffusers' modules whose rows it stacks.
    unsigned: the activations are shifted codes after GELU. splits: a W4A16 modulation layer of so many
    interleaved shifts, scales and gates; 0 for W4A4. column: which range of in-channels of its source it is;
    -1 for all. bias: whether there is one. plain: never quantized, only renamed.
    """

    name: str
    sources: tuple[str, ...]
    old: str = ""
    unsigned: bool = False
    splits: int = 0
    column: int = -1
    bias: bool = True
    plain: bool = False


@dataclass(frozen=True)
class Names:
    """marker: pattern of a key that only such models have. blocks: {pattern of a block's prefix: its
    modules}; group 1 of the pattern is the index. old_modules, old_leaves: which vocabulary its files are in.
    model_class: nunchaku's, for the header; empty where files are only read. stems: {beginning of ComfyUI's
    blocks: of diffusers'}. optional: stems of blocks that may be in 16 bits altogether; optional_renamed:
    their modules that are under nunchaku's names even then.
    """

    family: str
    marker: str
    blocks: dict[str, tuple[Module, ...]]
    stems: dict[str, str]
    model_class: str = ""
    old_modules: bool = False
    old_leaves: bool = False
    optional: tuple[str, ...] = ()
    optional_renamed: tuple[str, ...] = ()

    def is_optional(self, block: str) -> bool:
        return block.rpartition(".")[0] in self.optional

    @staticmethod
    def rows(keys: tuple[str, ...], n: int, k: int) -> list[int]:
        """Out-channels of each of diffusers' tensors that are one layer (n, k) of ComfyUI's: as many each,
        but in FLUX.1's linear1."""
        if keys[-1].endswith(".proj_mlp.weight"):
            return [*([k] * (len(keys) - 1)), n - (len(keys) - 1) * k]
        return [n // len(keys)] * len(keys)

    def find(self, module: str) -> tuple[str, Module] | None:
        """(block, Module) of a module's whole name in either vocabulary, None where it is no such module."""
        for block, modules in self.blocks.items():
            match = re.fullmatch(rf"((?:{block}))\.(.+)", module)
            if match:
                prefix, rest = match[1], match[match.re.groups]
                found = next((m for m in modules if rest in (m.name, m.old)), None)
                return None if found is None else (prefix, found)
        return None

    def block_of(self, key: str) -> tuple[str, int] | None:
        """(prefix of its block, index), None outside of blocks."""
        for block in self.blocks:
            match = re.match(rf"(?:{block})\.", key)
            if match:
                return match[0][:-1], int(match[1])
        return None

    def modules(self, block: str) -> tuple[Module, ...]:
        """Of a block by its prefix."""
        return next(modules for pattern, modules in self.blocks.items() if re.fullmatch(pattern, block))

    def stored(self, block: str, module: Module) -> str:
        """The module's whole name as files have it."""
        return f"{block}.{module.old if self.old_modules and module.old else module.name}"

    def leaf(self, leaf: str) -> str:
        """The name of a leaf as files have it."""
        return {new: old for old, new in OLD_LEAVES.items()}.get(leaf, leaf) if self.old_leaves else leaf


def _qkv(attention="attn", old="", bias=True):
    return Module(f"{attention}.to_qkv", tuple(f"{attention}.to_{x}" for x in "qkv"), old, bias=bias)


def _added_qkv(old=""):
    return Module("attn.add_qkv_proj", tuple(f"attn.add_{x}_proj" for x in "qkv"), old)


def _same(name, old="", **more):
    return Module(name, (name,), old, **more)


_FLUX_DOUBLE = (
    _same("norm1.linear", splits=6),
    _same("norm1_context.linear", splits=6),
    _qkv(old="qkv_proj"),
    _added_qkv("qkv_proj_context"),
    _same("attn.to_out.0", "out_proj"),
    _same("attn.to_add_out", "out_proj_context"),
    _same("ff.net.0.proj", "mlp_fc1"),
    _same("ff.net.2", "mlp_fc2", unsigned=True),
    _same("ff_context.net.0.proj", "mlp_context_fc1"),
    _same("ff_context.net.2", "mlp_context_fc2", unsigned=True),
    *(_same(f"attn.norm_{x}", f"norm_{x}", plain=True) for x in ("q", "k", "added_q", "added_k")),
)
# One quantized layer for each half of what diffusers calls proj_out and ComfyUI linear2.
_FLUX_SINGLE = (
    _same("norm.linear", splits=3),
    _qkv(old="qkv_proj"),
    Module("mlp_fc1", ("proj_mlp",)),
    Module("attn.to_out", ("proj_out",), "out_proj", column=0),
    Module("mlp_fc2", ("proj_out",), column=1, unsigned=True),
    *(_same(f"attn.norm_{x}", f"norm_{x}", plain=True) for x in ("q", "k")),
)
_QWEN = (
    _same("img_mod.1", splits=6),
    _same("txt_mod.1", splits=6),
    _qkv(),
    _added_qkv(),
    _same("attn.to_out.0"),
    _same("attn.to_add_out"),
    _same("img_mlp.net.0.proj"),
    _same("img_mlp.net.2", unsigned=True),
    _same("txt_mlp.net.0.proj"),
    _same("txt_mlp.net.2", unsigned=True),
)
_SDXL = (
    _qkv("attn1", bias=False),
    _same("attn1.to_out.0"),
    _same("attn2.to_q", bias=False),
    _same("attn2.to_out.0"),
    _same("ff.net.0.proj"),
    _same("ff.net.2"),
)
# diffusers' SwiGLU has the value first and the gate second: w3 and w1 of x -> w2 (silu(w1 x) * w3 x).
_Z_IMAGE = (
    _qkv("attention", bias=False),
    _same("attention.to_out.0", bias=False),
    Module("feed_forward.net.0.proj", ("feed_forward.w3", "feed_forward.w1"), bias=False),
    Module("feed_forward.net.2", ("feed_forward.w2",), bias=False),
)

NAMES = (
    Names(
        "flux",
        r"single_transformer_blocks\.0\.",
        {
            r"transformer_blocks\.(\d{1,4})": _FLUX_DOUBLE,
            r"single_transformer_blocks\.(\d{1,4})": _FLUX_SINGLE,
        },
        {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"},
        "NunchakuFluxTransformer2dModel",
        old_modules=True,
        old_leaves=True,
    ),
    Names(
        "qwen_image",
        r"transformer_blocks\.0\.img_mod\.1\.",
        {r"transformer_blocks\.(\d{1,4})": _QWEN},
        {"transformer_blocks": "transformer_blocks"},
        "NunchakuQwenImageTransformer2DModel",
    ),
    Names(
        "sdxl",
        r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.",
        {r"(?:(?:down|up)_blocks\.\d+|mid_block)\.attentions\.\d+\.transformer_blocks\.(\d{1,4})": _SDXL},
        {},
        old_leaves=True,
    ),
    Names(
        "z_image",
        r"layers\.0\.attention\.to_qkv\.",
        {r"(?:layers|noise_refiner|context_refiner)\.(\d{1,4})": _Z_IMAGE},
        {stem: stem for stem in ("layers", "noise_refiner", "context_refiner")},
        "NunchakuZImageTransformer2DModel",
        optional=("noise_refiner", "context_refiner"),
        optional_renamed=("feed_forward.net.0.proj", "feed_forward.net.2"),
    ),
)


def names_of(keys) -> Names | None:
    """The table for a file with these keys; None where none fits."""
    return next((n for n in NAMES if any(re.match(n.marker, key) for key in keys)), None)


def by_family(family: str) -> Names | None:
    return next((n for n in NAMES if n.family == family), None)
