"""Two models put together from blocks of each, and the report of it."""

import uuid
from collections import Counter

import torch

from ...quant_core.families import UnknownArchitecture, by_name, detect
from ...quant_core.families.fingerprint import fingerprint
from ...quant_core.families.select import Selection, block_lists, modules_of
from ...quant_core.run.provenance import VERSION
from .bare import PREFIX
from .build import build, frame_like
from .contents import Contents
from .inherited import inherit_sampling_patches
from .patcher import NibblePatcher

NAME = "Nibble Swap Blocks"


def swap(a: Contents, b: Contents, chosen: Selection) -> NibblePatcher:
    """The chosen modules of b in a, all of each: packed layers, norms, modulation, and the LoRA patches on
    them.

    Packed layers share their memory with where they come from, and so do the weights of other linear layers
    that have the dtype in which ComfyUI runs the model. Copied are norms and lone parameters, which is
    little, and on Hopper the layers that are requantized at load. A model that ComfyUI moves to a card and
    back has memory of its own from then on.
    """
    of = lambda key: b if chosen.takes(key) else a
    layers = {n: of(n).layers[n] for n in a.layers | b.layers if n in of(n).layers}
    rest = {k: of(k).rest[k] for k in a.rest | b.rest if k in of(k).rest}
    specs = {name: layer.spec for name, layer in layers.items()}
    model = build(
        lambda name: layers.pop(name, None), specs, rest, _info(a, b, chosen), frame_like(a.patcher)
    )
    inherit_sampling_patches(a.patcher, model)
    inside = lambda key: key.startswith(PREFIX) and chosen.takes(key.removeprefix(PREFIX))
    patches = [(k, v) for k, v in a.patcher.patches.items() if not inside(k)] + [
        (k, v) for k, v in b.patcher.patches.items() if inside(k)
    ]
    model.patches, model.patches_uuid = {k: list(v) for k, v in patches}, uuid.uuid4()
    return model


def _info(a, b, chosen):
    family = a.info.get("family") or b.info["family"]

    def origin(contents):
        plan = by_name(family).mapped(contents.shapes)
        return contents.info.get("provenance") or {
            "model": fingerprint(plan, contents.rest.__getitem__),
            "method": "full precision",
        }

    first, second = origin(a), origin(b)
    provenance = {
        "model": first.get("model"),
        "method": "swap",
        "settings": {"blocks": chosen.text},
        "a": first,
        "b": second,
    }
    return {
        "family": family,
        "provenance": provenance | {"nibble": VERSION, "torch": str(torch.__version__)},
        "report": _rows(a, b, chosen),
        "source": f"A with {chosen.text} of B",
    }


def _rows(a, b, chosen):
    """The report row of each packed layer, from the model it comes from; a layer that is packed in the other
    model only is left in 16 bit."""
    rows_a, rows_b = ({row["name"]: row for row in model.info.get("report", ())} for model in (a, b))
    rows = []
    for name, any_row in (rows_a | rows_b).items():
        its_rows, taken_from = (rows_b, b) if chosen.takes(name) else (rows_a, a)
        if name in its_rows:
            rows.append(its_rows[name])
        elif name not in taken_from.layers and any_row["nbytes"]:
            rows.append(
                any_row
                | {
                    "what": "16 bit",
                    "sqnr_db": None,
                    "nbytes": 0,
                    "seconds": 0.0,
                    "choices": {},
                    "note": f"by {NAME}",
                }
            )
    return rows


def require_same_architecture(a: dict, b: dict) -> None:
    """Raises ValueError with what both models are and the first tensors that differ. a, b: {key: logical
    shape}."""
    differing = [k for k in a | b if a.get(k) != b.get(k)]
    if not differing:
        return
    shape = lambda shapes, key: " x ".join(map(str, shapes[key])) if key in shapes else "missing"
    listed = "; ".join(f"{k}: {shape(a, k)} in model_a, {shape(b, k)} in model_b" for k in differing[:3])
    raise ValueError(
        f"{NAME}: the models differ in architecture. model_a is {_signature(a)}; model_b is {_signature(b)}. "
        f"{len(differing)} tensors differ: {listed}. Connect two models of one architecture and size."
    )


def _signature(shapes):
    try:
        title = detect(shapes).title
    except UnknownArchitecture:
        title = "unknown"
    lists = [f"{name} {count}" for name, count in block_lists(modules_of(shapes)).items()]
    # Most linear layers read the hidden width.
    width = Counter(s[1] for s in shapes.values() if len(s) == 2).most_common(1)[0][0]
    return ", ".join([title, *lists, f"hidden width {width}"])


def report_text(a: Contents, b: Contents, chosen: Selection, model: NibblePatcher) -> str:
    """What came from where. Layers are those that are quantized in at least one of the two."""
    what = lambda m, name: m.layers[name].spec.describe() if name in m.layers else "full precision"
    layers = [k.removesuffix(".weight") for k in a.shapes if k.removesuffix(".weight") in a.layers | b.layers]
    state = model.model.diffusion_model.state_dict()
    mib = lambda size: f"{size / 2**20:.1f} MiB"
    lines = [
        f"{by_name(model.attachments['nibble']['family']).title}: A with {chosen.text} of B, "
        f"{mib(sum(t.nbytes for t in state.values()))}",
        *(
            f"{letter}: {m.info.get('source', 'full precision')}, {mib(m.nbytes)}"
            for letter, m in (("A", a), ("B", b))
        ),
    ]
    from_b = [name for name in layers if chosen.takes(name)]
    for letter, m, names in (("A", a, [n for n in layers if n not in from_b]), ("B", b, from_b)):
        counts = Counter(what(m, name) for name in names)
        unquantized = [k for k in m.rest if k.rpartition(".")[0] not in layers]
        others = sum(chosen.takes(k) == (m is b) for k in unquantized)
        kinds = "".join(f", {count} {kind}" for kind, count in counts.most_common())
        lines.append(f"From {letter}: {len(names)} layers{kinds}; {others} other tensors")
    width = max(map(len, from_b), default=0)
    return "\n".join([*lines, "", *(f"{n:{width}}  {what(b, n)} instead of {what(a, n)}" for n in from_b)])
