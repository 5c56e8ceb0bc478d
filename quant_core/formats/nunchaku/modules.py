"""The quantized modules and other tensors of a nunchaku file, from its headers, and every contradiction among
them by name."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from ....kernels.operator.spec import LinearSpec, PartSpec, WeightSpec
from ...families import by_name
from ...store.safe import CheckpointError, open_safetensors
from ..checkpoint import open_files
from ..prefixes import network
from ..zero_points import offset_columns
from . import layout
from .names import NAMES, OLD_LEAVES, Module, names_of
from .scales import OUTER
from .variants import FP4, INT4, UnknownVariant, Variant, declared

FOLDER = ("transformer_blocks.safetensors", "unquantized_layers.safetensors")
HEADER_LIMIT = 1 << 20  # characters of a JSON entry of the header; nunchaku's are below 4000
_QUANTIZED = (
    "qweight",
    "wscales",
    "wzeros",
    "smooth_factor",
    "smooth_factor_orig",
    "proj_down",
    "proj_up",
    *OUTER,
)
_FLOATS = ("BF16", "F16")
_TITLES = ", ".join(by_name(n.family).title for n in NAMES)


@dataclass(frozen=True)
class Stored:
    """A quantized module of the file. keys: {leaf: key}. rank: of its low-rank branch, columns of offsets
    where `module.splits`. variant: of the file's W4A4 layers; modulation is the same in both."""

    name: str
    block: str
    module: Module
    keys: dict[str, str]
    out_features: int
    in_features: int
    rank: int
    variant: Variant

    @property
    def spec(self) -> LinearSpec:
        if self.module.splits:
            weight, act, smooth = WeightSpec(), None, False
        else:
            act, smooth = self.variant.activation(self.module.unsigned), True
            weight = self.variant.weight
        part = PartSpec(0, self.in_features, weight, act, smooth=smooth, rank=self.rank)
        return LinearSpec(self.in_features, self.out_features, (part,), "bias" in self.keys)


class StoredModules:
    """What a file or an older folder of two holds. Raises CheckpointError.

    family, provenance: the Family, the header's entry. variant: of its W4A4 layers. source: {diffusers'
    module: the quantized modules that it is in, one for each range of in-channels}. plain: {diffusers' key:
    (key, index, number of equal row ranges)} of all other tensors. shapes: {diffusers' key: shape} of the
    model as if not quantized.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files = self._paths()
        where, metadata = open_files(self.files, self.path)
        names = network(where, str(self.path))
        self._where = {name: (where[key][0], key, where[key][1]) for name, key in names.keys.items()}
        self.variant = self._variant(metadata)
        self.provenance = self._json(metadata, "provenance")
        self._names = names_of(self._where)
        if self._names is None:
            raise CheckpointError(
                f"{self.path}: quantized for nunchaku, but of no model that can be read here ({_TITLES}): "
                "tensors such as "
                f"{', '.join(sorted(self._where)[:2])}"
            )
        self.family = by_name(self._names.family)
        self.source: dict[str, list[Stored]] = {}
        self.plain: dict[str, tuple[str, int, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._read_modules()
        self._check_outer()
        self._check_blocks()

    # -- the file

    def _paths(self):
        if self.path.is_dir():
            folder = self.path
        elif self.path.name in FOLDER and not (open_safetensors(self.path).metadata() or {}).get(
            "quantization_config"
        ):
            folder = self.path.parent
        else:
            return [self.path]
        for name in FOLDER:
            if not (folder / name).is_file():
                raise CheckpointError(
                    f"{folder}: nunchaku's older layout is two files, {' and '.join(FOLDER)}; expected "
                    f"{name}, found none. Download it "
                    "into the same folder, or take the model as one file."
                )
        return [folder / name for name in FOLDER]

    def _json(self, metadata, entry) -> dict:
        text = metadata.get(entry)
        if text is None:
            return {}
        if len(text) > HEADER_LIMIT:
            raise CheckpointError(
                f"{self.path}: header entry {entry!r}: expected at most {HEADER_LIMIT} characters, found "
                f"{len(text)}"
            )
        try:
            found = json.loads(text)
        except (ValueError, RecursionError) as error:  # numbers of thousands of digits, too
            raise CheckpointError(
                f"{self.path}: header entry {entry!r} is not JSON ({error}). Download the file again."
            ) from error
        if not isinstance(found, dict):
            raise CheckpointError(
                f"{self.path}: header entry {entry!r}: expected an object, found {type(found).__name__}"
            )
        return found

    def _variant(self, metadata) -> Variant:
        """By the header, else by the tensors that only NVFP4 has; the two must agree."""
        config = self._json(metadata, "quantization_config").get("weight")
        if config is not None and not isinstance(config, dict):
            raise CheckpointError(
                f"{self.path}: quantization_config.weight: expected an object, found {config!r:.80}"
            )
        sign = next(filter(None, map(self._sign_of_fp4, self._where)), "")
        if config is None:
            return FP4 if sign else INT4
        try:
            said = declared(config)
        except UnknownVariant as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        if said is INT4 and sign:
            raise CheckpointError(
                f"{self.path}: quantization_config.weight.dtype is {said.dtype!r}, but {sign}, as only files "
                f"of {FP4.dtype!r} have it. Download the file again."
            )
        return said

    def _sign_of_fp4(self, key) -> str:
        """What of a tensor says that the file is NVFP4, "" for any other."""
        leaf = key.rpartition(".")[2]
        if leaf in OUTER:
            return f"it has {key}"
        dtype = self._dtype(key) if leaf == "wscales" else ""
        return f"{key} is {dtype}" if dtype.startswith("F8") else ""

    def _piece(self, key):
        handle, name, _ = self._where[key]
        return handle.get_slice(name)

    def _dtype(self, key) -> str:
        return self._piece(key).get_dtype()

    def _shape(self, key) -> tuple[int, ...]:
        return tuple(self._piece(key).get_shape())

    def get(self, key) -> torch.Tensor:
        handle, name, _ = self._where[key]
        return handle.get_tensor(name)

    def fail(self, key, expected, found, advice="Download the file again."):
        file = self._where[key][2] if key in self._where else self.path
        raise CheckpointError(f"{file}: {key}: expected {expected}, found {found}. {advice}")

    # -- what its modules are

    def _read_modules(self):
        grouped: dict[str, dict[str, str]] = {}
        seen = {}  # vocabulary -> a key in it
        for key in self._where:
            module, _, leaf = key.rpartition(".")
            found = self._names.find(module)
            if found is not None and found[1].old:
                seen.setdefault(
                    "old modules" if module == f"{found[0]}.{found[1].old}" else "new modules", key
                )
            if leaf in OLD_LEAVES:
                seen.setdefault("old leaves", key)
            elif leaf in OLD_LEAVES.values():
                seen.setdefault("new leaves", key)
            grouped.setdefault(module, {})[OLD_LEAVES.get(leaf, leaf)] = key
        for kind in ("modules", "leaves"):
            if {f"old {kind}", f"new {kind}"} <= set(seen):
                raise CheckpointError(
                    f"{self.path}: names of two versions of nunchaku in one model: {seen[f'old {kind}']} "
                    f"and {seen[f'new {kind}']}. "
                    "Download the model again, into a folder of its own."
                )
        columns: dict[str, dict[int, Stored]] = {}
        for name, keys in grouped.items():
            found = self._names.find(name)
            if set(keys) & set(_QUANTIZED):
                if found is None or found[1].plain:
                    key = next(keys[leaf] for leaf in _QUANTIZED if leaf in keys)
                    raise CheckpointError(
                        f"{self.path}: {key}: nunchaku has no quantized layer of this name in "
                        f"{self.family.title}"
                    )
                stored = self._stored(name, *found, keys)
                for source in found[1].sources:
                    columns.setdefault(f"{found[0]}.{source}", {})[max(found[1].column, 0)] = stored
            else:
                sources = (
                    (name,) if found is None else tuple(f"{found[0]}.{source}" for source in found[1].sources)
                )
                for leaf, key in keys.items():
                    shape = self._shape(key)
                    if len(sources) > 1 and (not shape or shape[0] % len(sources)):
                        self.fail(key, f"rows of {len(sources)} layers of one size", shape)
                    for i, source in enumerate(sources):
                        whole = f"{source}.{leaf}" if source else leaf
                        self.plain[whole] = (key, i, len(sources))
                        self.shapes[whole] = (
                            (shape[0] // len(sources), *shape[1:]) if len(sources) > 1 else shape
                        )
        for source, by_column in columns.items():
            held = [by_column[i] for i in sorted(by_column)]
            self.source[source] = held
            n = held[0].out_features // len(held[0].module.sources)
            self.shapes[f"{source}.weight"] = (n, sum(s.in_features for s in held))
            if any("bias" in s.keys for s in held):
                self.shapes[f"{source}.bias"] = (n,)

    def _stored(self, name, block, module, keys) -> Stored:
        """A quantized module from its headers. Everything that its shapes and dtypes can contradict is
        checked here."""
        awq = bool(module.splits)
        self._require_leaves(name, keys, awq)
        n, k = self._sizes(module, keys, awq)
        variant = INT4 if awq else self.variant
        groups = (k // variant.group, n)
        self._is(keys["wscales"], variant.micro, groups)
        wanted = {"wzeros": groups, "smooth_factor": (k,), "bias": (n,), "wcscales": (n,)}
        for leaf, shape in wanted.items():
            if leaf in keys:
                self._is(keys[leaf], _FLOATS, shape)
        if "wtscale" in keys:
            self._is(keys["wtscale"], (*_FLOATS, "F32"))
            if self._shape(keys["wtscale"]) not in ((), (1,)):
                self.fail(keys["wtscale"], "one number", self._shape(keys["wtscale"]))
        if awq:
            scale, zero = self.get(keys["wscales"]), self.get(keys["wzeros"])
            rank = groups[0] * offset_columns(scale, zero, scale.dtype)
        else:
            rank = self._rank(keys, n, k)
        return Stored(name, block, module, keys, n, k, rank, variant)

    def _require_leaves(self, name, keys, awq):
        """That the tensors of a quantized module are there, and no others."""
        for leaf in ("qweight", "wscales", "wzeros") if awq else ("qweight", "wscales", "smooth_factor"):
            if leaf not in keys:
                raise CheckpointError(
                    f"{self.path}: {next(iter(keys.values()))}: {name} is a quantized layer, but its tensor "
                    f"{leaf} is missing. Download the file again."
                )
        unknown = sorted(set(keys) - {"qweight", "wscales", "bias"} - set(("wzeros",) if awq else _QUANTIZED))
        if unknown:
            branch = awq and unknown[0].startswith("proj")
            expected = (
                "a modulation layer without a low-rank branch" if branch else f"no such tensor of {name}"
            )
            self.fail(keys[unknown[0]], expected, "one", "It was made by other means than nunchaku's.")

    def _sizes(self, module, keys, awq) -> tuple[int, int]:
        """(out-channels, in-channels) by the packed weight."""
        key, shape = keys["qweight"], self._shape(keys["qweight"])
        self._is(key, ("I32",) if awq else ("I8",))
        if len(shape) != 2 or not all(shape):
            self.fail(key, "two dimensions", shape)
        n, k = shape[0] * (layout.AWQ_ROWS if awq else 1), shape[1] * 2
        rows, columns = (layout.AWQ_ROWS * module.splits, layout.GROUP) if awq else (layout.TILE, layout.TILE)
        if n % len(module.sources):
            self.fail(key, f"rows of {len(module.sources)} layers of one size", n)
        if n % rows or k % columns:
            self.fail(key, f"multiples of {rows} out- and {columns} in-channels", f"{n} and {k}")
        return n, k

    def _rank(self, keys, n, k) -> int:
        """Of the low-rank branch, 0 without one."""
        branch = {leaf: keys[leaf] for leaf in ("proj_down", "proj_up") if leaf in keys}
        if not branch:
            return 0
        if len(branch) == 1:
            ((leaf, key),) = branch.items()
            other = {"proj_down": "proj_up", "proj_up": "proj_down"}[leaf]
            self.fail(key, f"{other} beside {leaf}", "none")
        rank = (self._shape(keys["proj_down"]) or (0,))[-1]
        if rank % layout.RANK:
            self.fail(keys["proj_down"], f"a rank that is a multiple of {layout.RANK}", rank)
        self._is(keys["proj_down"], _FLOATS, (k, rank))
        self._is(keys["proj_up"], _FLOATS, (n, rank))
        return rank

    def _check_outer(self):
        """That all W4A4 modules of NVFP4 have a scale above those of 16 channels, or none has: its absence
        means 1, ten thousand times too much where others have it."""
        held = {s.name: s for found in self.source.values() for s in found if s.variant is FP4}
        without = [s for s in held.values() if not set(OUTER) & set(s.keys)]
        if 0 < len(without) < len(held):
            other = next(s.name for s in held.values() if s not in without)
            self.fail(without[0].keys["wscales"], f"{' or '.join(OUTER)} beside it as {other} has", "neither")

    def _is(self, key, dtypes, shape=None):
        if self._dtype(key) not in dtypes:
            self.fail(key, f"the dtype {' or '.join(dtypes)}", self._dtype(key))
        if shape is not None and self._shape(key) != shape:
            self.fail(key, f"the shape {shape} of its qweight's layer", self._shape(key))

    def _check_blocks(self):
        """That blocks are there without gaps, each with all of its layers, and fused layers with all of their
        parts."""
        indices: dict[str, set[int]] = {}
        blocks = dict.fromkeys(found for key in self._where if (found := self._names.block_of(key)))
        for block, index in blocks:
            indices.setdefault(block.rpartition(".")[0], set()).add(index)
        for stem, found in indices.items():
            if gaps := set(range(max(found) + 1)) - found:
                raise CheckpointError(
                    f"{self.path}: expected the blocks {stem}.0 to {stem}.{max(found)}, found none of "
                    f"{stem}.{min(gaps)}. "
                    "Download the file again."
                )
        for block, _ in blocks:
            for module in self._names.modules(block):
                for source in module.sources:
                    whole = f"{block}.{source}"
                    held = self.source.get(whole)
                    if f"{whole}.weight" not in self.shapes or (
                        held and module.column >= 0 and all(s.module != module for s in held)
                    ):
                        leaf = "weight" if module.plain else "qweight"
                        raise CheckpointError(
                            f"{self.path}: expected {self._names.stored(block, module)}.{leaf}, found "
                            f"none: a part of {block} is missing. "
                            "Download the file again."
                        )
        for source, held in self.source.items():
            if len({s.out_features for s in held}) > 1:
                first, other = held[0], held[1]
                self.fail(
                    other.keys["qweight"],
                    f"{first.out_features} out-channels as {first.name}, its other half {source}",
                    other.out_features,
                )
        if not self.family.matches_diffusers(self.shapes):
            missing = [k for k in self.family.diffusers_signature if k not in self.shapes]
            raise CheckpointError(
                f"{self.path}: not a whole {self.family.title} model: expected {', '.join(missing[:3])}, "
                "found none"
            )

    def part(self, whole: str) -> torch.Tensor:
        """One of `plain`."""
        key, index, count = self.plain[whole]
        tensor = self.get(key)
        return tensor if count == 1 else tensor.chunk(count)[index]
