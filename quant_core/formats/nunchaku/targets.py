"""Which layer becomes which module of nunchaku's, and why one cannot."""

from dataclasses import dataclass

from ....kernels.operator.codes import INT
from ....kernels.operator.spec import LinearSpec, PartSpec
from ...families import by_name
from . import layout
from .names import NAMES, Module, Names, by_family
from .variants import Variant, variant_of


@dataclass(frozen=True)
class Target:
    """A module to write: rows start..stop of each of some layers, of one range of in-channels where
    `module.column` is not -1."""

    name: str
    block: str
    module: Module
    rows: tuple[tuple[str, int, int], ...]


def losses(specs: dict[str, LinearSpec], family: str) -> dict[str, str]:
    """{layer: why nunchaku cannot run it}, before anything is written. Layers that it has quantized and
    `specs` does not are among them. The file is of the variant that most layers are of.

    Empty where `save` writes the model; what `save` changes on the way it returns.
    """
    names = by_family(family)
    if names is None or not names.model_class:
        known = ", ".join(by_name(n.family).title for n in NAMES if n.model_class)
        return dict.fromkeys(
            specs, f"is of a {by_name(family).title} model; nunchaku files are written of {known}"
        )
    targets, missing, loose = targets_of(names, specs)
    out = dict.fromkeys(missing, "stays in 16 bits here, and is one of nunchaku's quantized layers")
    out |= {
        name: f"is {specs[name].describe()}, and stays in 16 bits in nunchaku"
        for name in loose
        if not specs[name].weight_only
    }
    variant = variant_of(list(specs.values()))
    for target in targets:
        for name, start, stop in target.rows:
            why = _why_not(target.module, specs[name], stop - start, variant)
            if why:
                out.setdefault(name, why)
    return out


class _AnyKeys(dict):
    """Shapes of a model of which only the number of blocks is known: whatever tensor a family asks for is
    there."""

    def __contains__(self, key):
        return True


def stacks_of(names: Names, keys):
    """{ComfyUI key: Stacked} for these keys of ComfyUI's, without the diffusers model that families map
    from."""
    known = _AnyKeys.fromkeys(keys)
    for ours, theirs in names.stems.items():
        for key in keys:
            if key.startswith(f"{ours}."):
                known[f"{theirs}.{key[len(ours) + 1 :].split('.', 1)[0]}."] = None
    return by_name(names.family).diffusers(known)


def targets_of(names: Names, specs):
    """(targets; layers that would have to be quantized; layers that no module takes)."""
    stacks = stacks_of(names, [f"{name}.weight" for name in specs])
    where: dict[str, tuple[str, int, int]] = {}
    comfy: dict[str, str] = {}
    used: set[str] = set()
    for key, stack in stacks.items():
        name, _, leaf = key.rpartition(".")
        if leaf not in ("weight", "scale"):
            continue
        comfy |= dict.fromkeys((k.rpartition(".")[0] for k in stack.keys), name)
        if name in specs:
            start = 0
            for k, n in zip(
                stack.keys,
                names.rows(stack.keys, specs[name].out_features, specs[name].in_features),
                strict=True,
            ):
                where[k.rpartition(".")[0]] = (name, start, start + n)
                start += n
    blocks = dict.fromkeys(found[0] for module in comfy if (found := names.block_of(f"{module}.")))
    modules = [(block, m) for block in blocks for m in names.modules(block) if not m.plain]
    # All of the optional blocks are quantized, or none.
    optional = any(
        names.is_optional(block) and f"{block}.{source}" in where
        for block, m in modules
        for source in m.sources
    )
    targets, missing = [], []
    for block, module in modules:
        if names.is_optional(block) and not optional:
            continue
        sources = [f"{block}.{source}" for source in module.sources]
        if unknown := [source for source in sources if source not in where]:
            missing += [comfy.get(source, source) for source in unknown]
            continue
        rows: list[tuple[str, int, int]] = []
        for name, start, stop in (where[source] for source in sources):
            if rows and rows[-1][0] == name and rows[-1][2] == start:
                rows[-1] = (name, rows[-1][1], stop)
            else:
                rows.append((name, start, stop))
        used |= {name for name, _, _ in rows}
        targets.append(Target(names.stored(block, module), block, module, tuple(rows)))
    return (
        targets,
        list(dict.fromkeys(missing)),
        [name for name in specs if name not in used and name not in missing],
    )


def _why_not(module: Module, spec: LinearSpec, rows: int, variant: Variant) -> str | None:
    """Why `rows` out-channels of a layer are no such module; None where they are."""
    parts = spec.parts
    if spec.order:
        return "has its in-channels in an order of its own, which nunchaku does not know"
    if spec.spatial:
        return "is a 1x1 convolution, which nunchaku has in 16 bits"
    if spec.padding:
        return f"pads its {spec.in_features} in-channels to {spec.width}, which nunchaku does not"
    if len(parts) != (1 if module.column < 0 else 2):
        return (
            f"is quantized in {len(parts)} ranges of in-channels, and is "
            f"{'one' if module.column < 0 else 'two'} in nunchaku"
        )
    part = parts[max(module.column, 0)]
    if part.kronecker:
        return "has a learned transform, which nunchaku does not"
    if part.principal:
        return "takes principal components out of its input, which nunchaku does not"
    if part.rotation:
        return f"rotates its input (Hadamard {part.rotation}), which nunchaku does not"
    if module.splits:
        why, multiples = _no_modulation(spec, part), (layout.AWQ_ROWS * module.splits, layout.GROUP)
    else:
        why, multiples = _no_w4a4(module, part, variant), (layout.TILE, layout.TILE)
    if why:
        return why
    if rows % multiples[0] or part.width % multiples[1]:
        needs = f"multiples of {multiples[0]} and {multiples[1]}"
        return f"has {rows} out- and {part.width} in-channels; nunchaku needs {needs}"
    if spec.bias and not module.bias:
        return "has a bias, and none in nunchaku"
    return None


def _no_modulation(spec: LinearSpec, part: PartSpec) -> str | None:
    """Why a layer cannot be a W4A16 module; None where it can."""
    if part.grid != INT:
        return f"has {part.grid} codes, and nunchaku's modulation layers have integers"
    if why := _other_weight(part, layout.GROUP):
        return why
    groups = spec.in_features // layout.GROUP
    if part.activation is not None or part.smooth:
        return f"is {spec.describe()}, and weight-only without smoothing in nunchaku"
    if part.rank not in (0, groups, 2 * groups):
        has = f"has a low-rank branch of rank {part.rank}"
        return f"{has}, and nunchaku's modulation layers have none: quantize it with rank 0"
    return None


def _no_w4a4(module: Module, part: PartSpec, variant: Variant) -> str | None:
    """Why a part of a layer cannot be a W4A4 module of the variant; None where it can."""
    act, wanted = part.activation, variant.activation(module.unsigned)
    for grid in (part.grid, variant.grid if act is None else act.grid):
        if grid != variant.grid:
            return f"has {_codes(grid)}, and most layers {_codes(variant.grid)}: a nunchaku file has one kind"
    if why := _other_weight(part, variant.group):
        return why
    if act is None:
        return "is weight-only, and has 4-bit activations in nunchaku"
    if (act.bits, act.granularity, act.group, act.clip) != (4, "group", variant.group, 1.0):
        has = f"has {act.bits}-bit activations per {act.granularity}, clip {act.clip:g}"
        return f"{has}; nunchaku has 4 bits, {variant.group} channels, clip 1"
    if (act.unsigned, act.shift) != (wanted.unsigned, wanted.shift):
        theirs = f"unsigned and shifted by {wanted.shift}" if wanted.unsigned else "signed"
        has = f"has {'unsigned' if act.unsigned else 'signed'} activations with a shift of {act.shift:g}"
        return f"{has}; nunchaku's are {theirs} there"
    return None


def _other_weight(part: PartSpec, group: int) -> str | None:
    weight = part.weight
    if (weight.bits, weight.granularity, weight.group) != (4, "group", group):
        has = f"has {weight.bits}-bit weights, one scale per {weight.granularity}"
        return f"{has}; nunchaku has 4 bits, one for {group} channels"
    return None


def _codes(grid: str) -> str:
    return "integer codes" if grid == INT else f"{grid} codes"
