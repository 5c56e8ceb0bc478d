"""Nunchaku's SVDQuant models, INT4 and NVFP4: FLUX.1, Qwen-Image, SDXL and Z-Image, in one file or FLUX.1's
older folder of two.

A W4A4 module of INT4 is the one operator with groups of 64, its tensors in tile order (`layout`): y = Wq
Q((x + shift) / smooth) + (x proj_down) proj_up + bias, with shift 0.171875 and unsigned codes behind GELU,
whose correction is in the file's bias already (deepcompressor's
`convert_to_nunchaku_w4x4y16_linear_state_dict`). One of NVFP4 is the operator on the nvfp4 grid, without a
shift: `variants` says what its activations are, `scales` where its weight's scales are. Modulation layers are
W4A16 with zero points in both (`zero_points`), their rows interleaved and 1 added to the biases of the
scales. `smooth_factor_orig` says nothing that the kernels read.
"""

from dataclasses import replace
from pathlib import Path

import torch

from ....kernels.operator.codes import NVFP4
from ....kernels.operator.spec import LinearSpec, SpecError
from ...families import Family
from ...layer.linear import QuantizedLayer
from ...layer.stack import columns_spec, exact_sum, resmooth, rows_spec, stack_columns, stack_rows
from ...store.safe import CheckpointError
from ..opened import Opened
from ..zero_points import without_zero_points
from . import layout, scales
from .modules import FOLDER, HEADER_LIMIT, Stored, StoredModules
from .targets import losses
from .write import reads_back, save

MINUS_ZERO = 0x80  # as e4m3; the bytes above it are negative


def is_nunchaku(path, keys, metadata) -> bool:
    """Whether a file or folder is, or claims to be, a model quantized by SVDQuant for nunchaku. keys: of its
    tensors; metadata: of its header, or None. True also for what `NunchakuFile` then refuses by name."""
    path = Path(path)
    if path.is_dir():
        return any((path / name).is_file() for name in FOLDER)
    if path.name in FOLDER and (path.parent / FOLDER[0]).is_file():
        return True
    leaves = {key.rpartition(".")[2] for key in keys}
    svdquant = "qweight" in leaves and bool(leaves & {"smooth", "smooth_factor"})
    return svdquant or (
        "qweight" in leaves and "svdquant" in (metadata or {}).get("quantization_config", "")[:HEADER_LIMIT]
    )


class NunchakuFile(Opened):
    """An opened nunchaku model, layers and the rest under ComfyUI's names.

    Beside the headers, some side data is read at opening (0.2 of FLUX.1's 6.7 GB): scales and zeros of
    modulation layers and the proj_down of those that become one layer, on which its rank depends, and their
    smoothings, which the notes speak of. Raises CheckpointError.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._file = StoredModules(self.path)
        self.kind = f"nunchaku SVDQuant {self._file.variant.title}"
        self.family, self.provenance, self.report = self._file.family.name, self._file.provenance, []
        self._match(self._file.family)
        self._other_smoothing = self._differing()
        self._decibels: dict[str, float] = {}

    @property
    def files(self) -> list[Path]:
        """Both of the older layout, of which either stands for the two."""
        return self._file.files

    def _match(self, family: Family):
        """ComfyUI's layers and other tensors from diffusers' names."""
        self.specs, self.rest = {}, []
        self._shared: set[str] = set()  # layers of several runs of rows with one proj_down
        self._stacks = family.diffusers(self._file.shapes)
        self._recipes: dict[str, list[tuple[tuple[Stored, ...], int, int]]] = {}
        for key, stack in self._stacks.items():
            if absent := [k for k in stack.keys if k not in self._file.shapes]:
                raise CheckpointError(
                    f"{self.path}: {key} is made of {', '.join(stack.keys)}; {absent[0]} is missing. "
                    "Download the file again."
                )
            name, _, leaf = key.rpartition(".")
            modules = [k.rpartition(".")[0] for k in stack.keys]
            quantized = [m for m in modules if m in self._file.source]
            if not quantized:
                self._check_stack(stack)
                self.rest.append(key)
            elif len(quantized) < len(modules) or stack.swap_halves:
                other = next((m for m in modules if m not in self._file.source), modules[0])
                raise CheckpointError(
                    f"{self.path}: {name} is one layer in ComfyUI, but {quantized[0]} is quantized and "
                    f"{other} is not"
                )
            elif leaf == "weight":
                self._recipes[name] = recipe = self._recipe(modules)
                if self._one_down(recipe):
                    self._shared.add(name)
                self.specs[name] = self._spec(name, recipe)
        self.rest.sort()
        used = {k for stack in self._stacks.values() for k in stack.keys}
        if lone := [
            s for source, held in self._file.source.items() if f"{source}.weight" not in used for s in held
        ]:
            raise CheckpointError(
                f"{self.path}: {lone[0].keys['qweight']}: the {family.title} model has no such layer"
            )
        self._left = sorted(key for whole, (key, _, _) in self._file.plain.items() if whole not in used)

    def _check_stack(self, stack):
        """That the rows of several 16-bit tensors can be one tensor's, and halves change places."""
        first, *others = (self._file.shapes[k] for k in stack.keys)
        if others and (not first or any(o[1:] != first[1:] or not o for o in others)):
            self._file.fail(
                self._file.plain[stack.keys[0]][0],
                f"rows that {stack.keys[1]} can follow",
                f"{first} and {others[0]}",
            )
        if stack.swap_halves and (not first or first[0] % 2):
            self._file.fail(self._file.plain[stack.keys[0]][0], "two halves of rows", first)

    def _recipe(self, modules) -> list[tuple[tuple[Stored, ...], int, int]]:
        """(the modules whose columns stand side by side, first row, last row) of each run of rows."""
        runs: list[tuple[tuple[Stored, ...], int, int]] = []
        for module in modules:
            held = tuple(self._file.source[module])
            n = self._file.shapes[f"{module}.weight"][0]
            at = n * held[0].module.sources.index(module.removeprefix(f"{held[0].block}."))
            if runs and runs[-1][0] == held and runs[-1][2] == at:
                runs[-1] = (held, runs[-1][1], at + n)
            else:
                runs.append((held, at, at + n))
        for held, start, stop in runs:
            if (start, stop) != (0, held[0].out_features) and (start % layout.TILE or stop % layout.TILE):
                self._file.fail(
                    held[0].keys["qweight"],
                    f"parts of multiples of {layout.TILE} out-channels",
                    f"rows {start} to {stop}",
                )
        return runs

    def _one_down(self, recipe) -> bool:
        """Whether several runs of rows have one proj_down, as those of a layer that was cut for nunchaku."""
        keys = [held[0].keys.get("proj_down") for held, _, _ in recipe]
        if len(recipe) == 1 or None in keys or any(len(held) > 1 for held, _, _ in recipe):
            return False
        first = self._file.get(keys[0])
        return all(torch.equal(self._file.get(key), first) for key in keys[1:])

    def _spec(self, name, recipe) -> LinearSpec:
        try:
            rows = []
            for held, start, stop in recipe:
                spec = columns_spec(name, [s.spec for s in held]) if len(held) > 1 else held[0].spec
                rows.append(replace(spec, out_features=stop - start))
            return rows_spec(name, rows, name in self._shared) if len(rows) > 1 else rows[0]
        except SpecError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    # -- what it offers

    @property
    def notes(self) -> tuple[str, ...]:
        out = []
        if self._left:
            out.append(
                f"{len(self._left)} tensors that the model does not have are left out: "
                f"{', '.join(self._left[:3])}"
            )
        for name, others in self._other_smoothing.items():
            heard = f" ({self._decibels[name]:.1f} dB of its weight)" if name in self._decibels else ""
            out.append(
                f"{name}: {', '.join(others)} has a smoothing of its own and is quantized again behind the "
                f"first one's{heard}"
            )
        return tuple(out)

    def _differing(self) -> dict[str, list[str]]:
        """{layer: modules whose smoothing is not that of the layer's first}."""
        out = {}
        for name, recipe in self._recipes.items():
            first, *others = [held[0] for held, _, _ in recipe]
            if not others:
                continue
            smooth = self._file.get(first.keys["smooth_factor"])
            if differ := [
                s.name for s in others if not torch.equal(self._file.get(s.keys["smooth_factor"]), smooth)
            ]:
                out[name] = differ
        return out

    def layer(self, name: str) -> QuantizedLayer:
        try:
            rows = []
            for held, start, stop in self._recipes[name]:
                parts = [self._module(s, start, stop) for s in held]
                rows.append(stack_columns(name, parts) if len(parts) > 1 else parts[0])
            if name in self._other_smoothing:
                rows = self._one_smoothing(name, rows)
            if len(rows) > 1:
                return stack_rows(name, rows, name in self._shared)
            return QuantizedLayer(name, rows[0].spec, rows[0].tensors)
        except SpecError as error:
            raise CheckpointError(f"{self.path}: {error}") from error

    def _one_smoothing(self, name, rows):
        smooth, out = rows[0].tensors["smooth_factor"], [rows[0]]
        for row in rows[1:]:
            if not torch.equal(row.tensors["smooth_factor"], smooth):
                row, decibels = resmooth(row, smooth)
                self._decibels[name] = min(decibels, self._decibels.get(name, decibels))
            out.append(row)
        return out

    def _module(self, stored: Stored, start, stop) -> QuantizedLayer:
        """Rows start..stop of a module; whole tiles of 128 where it is W4A4, all of them where it is
        W4A16."""
        get = lambda leaf: self._file.get(stored.keys[leaf])
        if stored.module.splits:
            return self._modulation(stored, get)
        rows, variant = slice(start, stop), stored.variant
        tensors = {
            "weight": layout.unpack_weight(get("qweight")[rows]),
            "smooth_factor": layout.unpack_vector(get("smooth_factor")),
        }
        tensors |= scales.loaded(
            get,
            stored.keys,
            rows,
            stored.in_features // variant.group,
            variant.grid == NVFP4,
        )
        if variant.grid == NVFP4 and bool((tensors["weight_scale"].view(torch.uint8) > MINUS_ZERO).any()):
            # Tensor cores take these scales as numbers without a sign.
            self._file.fail(stored.keys["wscales"], "scales of 0 or more", "a negative one")
        if stored.rank:
            tensors["proj_down"] = layout.unpack_down(get("proj_down"))
            tensors["proj_up"] = layout.unpack_up(get("proj_up")[rows])
        if "bias" in stored.keys:
            tensors["bias"] = layout.unpack_vector(get("bias")[rows])
        return QuantizedLayer(stored.name, replace(stored.spec, out_features=stop - start), tensors)

    def _modulation(self, stored, get) -> QuantizedLayer:
        natural = lambda rows: layout.deinterleave(rows, stored.module.splits)
        scale, zero = natural(get("wscales").T), natural(get("wzeros").T)
        packed = natural(layout.unpack_awq(get("qweight")))
        weight, weight_scale, down, up = without_zero_points(packed, scale, zero, layout.GROUP, scale.dtype)
        tensors = {"weight": weight, "weight_scale": weight_scale}
        if down is not None:
            tensors |= {"proj_down": down, "proj_up": up}
        if "bias" in stored.keys:
            bias = natural(get("bias"))
            one = torch.zeros_like(bias).view(stored.module.splits, -1)
            one[layout.SCALES] = -1
            tensors["bias"] = exact_sum([bias, one.flatten()])
        return QuantizedLayer(stored.name, stored.spec, tensors)

    def tensor(self, key: str) -> torch.Tensor:
        return self._stacks[key].read(self._file.part)

    def shape(self, key: str) -> tuple[int, ...]:
        first, *others = (self._file.shapes[k] for k in self._stacks[key].keys)
        return (first[0] + sum(o[0] for o in others), *first[1:]) if others else first


__all__ = ["NunchakuFile", "is_nunchaku", "losses", "reads_back", "save"]
