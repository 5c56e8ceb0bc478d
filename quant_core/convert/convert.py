"""`nibble convert`: a quantized model from one format to another. What is lost is known, and said, before
anything is written."""

import math
from dataclasses import dataclass
from pathlib import Path

from ...kernels.operator.errors import NamedError, naming, plain
from ..formats.detect import open_quantized
from ..formats.kitchen import native
from ..formats.opened import Opened
from ..layer.linear import QuantizedLayer
from ..layer.soundness import largest
from ..store.atomic import NoRoom, replacing, require_output
from ..store.lock import only_run
from ..store.progress import Progress, silent
from .replace import AS, SMALL, becomes, replaced
from .writers import WRITERS, Writer

TARGETS = {name: writer.title for name, writer in WRITERS.items()}


class LossyConversion(ValueError):
    """The conversion would change layers, and nobody said that it may."""


class ImpossibleConversion(ValueError):
    """The format has nothing for what the model is."""


class NotReadBack(NamedError):
    """A written file is not what it was made from: a defect of the pack, or a damaged source."""


@dataclass(frozen=True)
class Plan:
    """What a conversion will do.

    lossy: {layer: why it cannot stay as it is}. impossible: why there is no such file at all, or "".
    awq: whether the ComfyUI that shall read a native or kitchen file has awq_w4a16.
    """

    source: Opened
    to: str
    lossy: dict[str, str]
    impossible: str = ""
    awq: bool = False

    @property
    def writer(self) -> Writer:
        return WRITERS[self.to]

    @property
    def lossless(self) -> bool:
        return not self.lossy and not self.impossible and not self.source.notes

    def becomes(self, replacement: str) -> str:
        """What `lossy` layers become, where `replacement` was asked for: a format may have one way only."""
        return self.writer.replacement or replacement

    def lines(self, replacement: str = AS[0]) -> list[str]:
        """Sentences without control characters: names of layers are the file's."""
        return [plain(line) for line in self._lines(replacement)]

    def _lines(self, replacement) -> list[str]:
        exact = len(self.source.specs) - len(self.lossy)
        out = [f"{self.source.path.name}: {self.source.kind} -> {TARGETS[self.to]}"]
        if self.impossible:
            return [*out, f"not possible: {self.impossible}"]
        whole = self.writer.exact(self.source) or ", nothing is lost" * self.lossless
        out.append(f"{exact} of {len(self.source.specs)} quantized layers are written as they are{whole}")
        out += [f"read with a loss: {note}" for note in self.source.notes]
        reasons: dict = {}
        for name, why in self.lossy.items():
            # What nunchaku has in 4 bits may be in 16 here.
            what = (
                becomes(self.source.specs[name], self.becomes(replacement))
                if name in self.source.specs
                else self.becomes(replacement)
            )
            reasons.setdefault((what, why), []).append(name)
        out += [
            f"{len(names)} as {what} instead, {names[0]}{', ...' * (len(names) > 1)}: it {why}"
            for (what, why), names in reasons.items()
        ]
        return out


def plan(source: Opened, to: str, comfyui: str = native.OLDEST) -> Plan:
    """comfyui: the oldest version that shall read a native or kitchen file; later ones have more formats.
    Raises ValueError for an unknown target or version."""
    if to not in TARGETS:
        raise ValueError(f"unknown format {to!r}; choose of {', '.join(TARGETS)}")
    writer, awq = WRITERS[to], to in ("native", "kitchen") and native.has_awq(comfyui)
    lossy = writer.losses(source, awq)
    if impossible := writer.impossible(source, lossy):
        return Plan(source, to, {}, impossible)
    return Plan(source, to, lossy, awq=awq)


def convert(
    planned: Plan,
    destination: Path,
    *,
    lossy: bool = False,
    replacement: str = AS[0],
    progress: Progress = silent,
) -> list[str]:
    """Writes `destination` and reads it back: every layer that is not replaced has the same bytes there.
    Returns lines for a report.

    replacement: "int8", "16 bit" or, where the target has awq_w4a16, "awq": what becomes of `planned.lossy`,
    which `lossy` must allow. The source's hashes are compared first, where it has them. Layers are read one
    by one and stay memory-mapped where they are written as they are. Raises LossyConversion,
    ImpossibleConversion, NotReadBack, OverInput, Busy, and the errors of reading.
    """
    source, destination = planned.source, Path(destination)
    if planned.impossible:
        raise ImpossibleConversion("\n".join(planned.lines()))
    if replacement == SMALL and not planned.awq:
        raise ValueError(
            f"replacement {SMALL}: the file is for a ComfyUI without awq_w4a16. Ask for one of "
            f"{native.AWQ} or newer (--comfyui {native.AWQ}, or "
            "the input of the node), or take int8."
        )
    if not lossy and not planned.lossless:
        raise LossyConversion(
            "\n".join(
                [
                    *planned.lines(replacement),
                    "Say that this may be (--lossy, or the switch of the node) to write it.",
                ]
            )
        )
    require_output(destination, source.inputs)
    with only_run(destination, f"converts {source.path.name}"):
        notes, same = _converted(planned, destination, replacement, progress)
    size = destination.stat().st_size
    return [
        *planned.lines(replacement),
        *notes,
        f"{destination}: {size / 2**20:.1f} MiB; {same} layers read back bit for bit",
    ]


def _converted(planned, destination, replacement, progress) -> tuple[list[str], int]:
    """(what the format changed, how many layers read back)."""
    source = planned.source
    source.verify()
    layers: dict[str, QuantizedLayer] = {}
    rest = {key: source.tensor(key) for key in source.rest}
    for name in progress(list(source.specs), len(source.specs)):
        layer = source.layer(name)
        if name in planned.lossy:
            with naming(source.path):
                one, more = replaced({name: layer}, {}, [name], planned.becomes(replacement))
            layers, rest = layers | one, rest | more
        else:
            layers[name] = layer
    # A file that does not read back never has the name, and what had it stays.
    with replacing(destination) as temporary:
        try:
            with naming(source.path):
                notes = planned.writer.save(temporary, source, layers, rest, planned.awq)
            same = _verify(planned, temporary, destination, layers, notes)
        except NoRoom as error:
            raise NoRoom(error.errno, str(error).replace(str(temporary), str(destination))) from error
    return notes, same


def _verify(planned, written: Path, destination: Path, layers: dict[str, QuantizedLayer], notes) -> int:
    """How many layers of the file `written` are as they were. Raises NotReadBack, which speaks of
    `destination`."""
    kept = {name: layers[name] for name in planned.source.specs if name not in planned.lossy}
    if not kept:
        return 0
    try:
        found = open_quantized(written)
    except NamedError as error:
        why = str(error).replace(str(written), "it")
        raise NotReadBack(
            f"{destination}: made from {planned.source.path}, cannot be read back ({why}). The file is not "
            "written; report this."
        ) from error
    kept = {name: layer for name, layer in kept.items() if planned.writer.stays(name, found, notes)}
    for name, layer in kept.items():
        again = found.layer(name) if name in found.specs else None
        if again is None or not planned.writer.same(again, layer):
            if not all(math.isfinite(largest(t)) for t in layer.tensors.values() if t.is_floating_point()):
                raise NotReadBack(
                    f"{destination}: layer {name} of {planned.source.path} holds NaN or Inf, and the "
                    "format cannot keep it as it is. The "
                    "file is not written; the source is damaged: download or quantize it again."
                )
            became = "nothing" if again is None else again.spec.describe()
            raise NotReadBack(
                f"{destination}: layer {name} of {planned.source.path} does not read back as it was "
                f"({layer.spec.describe()} became "
                f"{became}). The file is not written; report this with the two specifications."
            )
    return len(kept)
