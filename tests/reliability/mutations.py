"""Damaged and hostile files, made from sound ones of every kind by a seed: the same seed makes the same
file."""

import json
import random
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

OWN = (
    "nibble",
    "nibble_calibration",
    "nibble_export",
    "_quantization_metadata",
    "quantization_config",
    "provenance",
)
ODD = (
    None, True, False, -1, 0, 1, 2, 3, 7, 63, 65, 1000, 2**31, 2**63, 10**30, 10**400, 0.5, -0.0, 1e308,
    float("nan"), float("inf"), "", "x",
    "4", "1e5", "\x1b[2J\x1b[31m", "a\nb\rc", "../../../etc/passwd", "/etc/passwd", "C:\\x", "nul\0byte",
    "\ud800", "\u202e", "y" * 5000,
    [], {}, [[]], [1, 2], [None], {"a": []}, {"": ""}, {"tensor": 1}, {"tuple": 3}, {"dict": [1]},
    {"dtype": "load"},
)  # fmt: skip
RAW = {
    "deep list": "[" * 2000 + "]" * 2000,
    "very deep list": "[" * 60_000,
    "deep object": '{"a":' * 900 + "1" + "}" * 900,
    "long number": "9" * 6000,
    "infinite": "1e999",
    "no value": "",
    "comment": "/* */ 1",
}


@dataclass(frozen=True)
class Damaged:
    """path: the file, or the folder of shards. kind: of the sound one. what: the damages, in words."""

    path: Path
    kind: str
    what: str


def damaged(kind: str, source: Path, folder: Path, seed: int) -> Damaged:
    """A copy of `source` in `folder`, with one to three damages."""
    draw = random.Random(f"{kind} {seed}")
    path = folder / f"m{seed}{source.suffix}"
    shutil.copytree(source, path) if source.is_dir() else shutil.copy(source, path)
    done = []
    for _ in range(draw.choice((1, 1, 1, 1, 2, 3))):
        target = path if path.is_file() else draw.choice(sorted(p for p in path.iterdir() if p.is_file()))
        change = (
            draw.choice((_index, _index, _cut, _bit)) if target.suffix == ".json" else draw.choice(_CHANGES)
        )
        try:
            done.append(f"{change.__name__.strip('_')}: {change(target, draw)}")
        except Exception:
            done.append(
                f"{change.__name__.strip('_')}: not possible"
            )  # the file is damaged too much by the one before
    return Damaged(path, kind, "; ".join(done))


# -- files of bytes


def _parts(path):
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def _write(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _bit(path, draw):
    raw = bytearray(path.read_bytes())
    at = draw.randrange(len(raw))
    raw[at] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)
    return f"bit of byte {at}"


def _header_bit(path, draw):
    raw = bytearray(path.read_bytes())
    at = draw.randrange(8 + min(len(raw) - 8, struct.unpack("<Q", raw[:8])[0]))
    raw[at] ^= 1 << draw.randrange(8)
    path.write_bytes(raw)
    return f"bit of byte {at}"


def _cut(path, draw):
    raw = path.read_bytes()
    at = draw.choice((0, 1, 7, 8, 9, len(raw) - 1, draw.randrange(len(raw))))
    path.write_bytes(raw[:at])
    return f"at {at} of {len(raw)}"


def _append(path, draw):
    count = draw.choice((1, 8, 4096))
    path.write_bytes(path.read_bytes() + draw.randbytes(count))
    return f"{count} bytes"


def _length(path, draw):
    raw = path.read_bytes()
    length = draw.choice(
        (0, 1, 2, 2**31, 2**63, 2**64 - 1, len(raw), struct.unpack("<Q", raw[:8])[0] + draw.choice((-1, 1)))
    )
    path.write_bytes(struct.pack("<Q", length) + raw[8:])
    return f"{length}"


# -- tensors


def _entry(header, draw):
    return draw.choice(sorted(k for k in header if k != "__metadata__"))


def _numbers(path, draw):
    """NaN, Inf or other values in a tensor of floats."""
    header, data = _parts(path)
    formats = {"F32": "f", "F64": "d", "F16": "e", "BF16": None}
    key = draw.choice(
        sorted(
            k
            for k, v in header.items()
            if k != "__metadata__" and v["dtype"] in formats and v["data_offsets"][1]
        )
    )
    start, stop = header[key]["data_offsets"]
    value = draw.choice((float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 60000.0))
    form = formats[header[key]["dtype"]]
    one = struct.pack("<" + form, value) if form else struct.pack("<f", value)[2:]
    count = (stop - start) // len(one)
    which = range(count) if draw.random() < 0.3 else [draw.randrange(count)]
    data = bytearray(data)
    for i in which:
        data[start + i * len(one) : start + (i + 1) * len(one)] = one
    _write(path, header, bytes(data))
    return f"{len(which)} of {key} become {value}"


def _without(path, draw):
    tensors, metadata = load_file(path), _parts(path)[0].get("__metadata__")
    key = draw.choice(sorted(tensors))
    del tensors[key]
    save_file(tensors, path, metadata=metadata)
    return key


def _more(path, draw):
    tensors, metadata = load_file(path), _parts(path)[0].get("__metadata__")
    key = draw.choice(sorted(tensors)).rpartition(".")[0] + draw.choice(
        ("", ".weight", ".x", ".weight_scale", ".comfy_quant", ".qweight")
    )
    key = draw.choice(
        (
            key,
            "../../up",
            "/abs",
            "\x1b[2J",
            "a\nb",
            "z" * 3000,
            "",
            "model.diffusion_model.x",
            "nibble_beside.y",
            "a|b",
        )
    )
    dtype = draw.choice(
        (
            torch.uint8,
            torch.int8,
            torch.float32,
            torch.int64,
            torch.bool,
            torch.float8_e4m3fn,
            torch.complex64,
        )
    )
    tensors[key] = torch.zeros(draw.choice(((), (0,), (1,), (64, 64), (1, 0, 5), (1,) * 70)), dtype=dtype)
    save_file(tensors, path, metadata=metadata)
    return f"{key[:40]!r}"


def _retyped(path, draw):
    """Another dtype of the same size, or another shape of as many values."""
    header, data = _parts(path)
    entry = header[key := _entry(header, draw)]
    same = {"F32": ("I32", "U32"), "BF16": ("F16", "I16", "U16"), "I8": ("U8", "BOOL", "F8_E4M3", "F8_E8M0"),
    "U8": ("I8", "F8_E5M2"),
            "F64": ("I64", "C64"), "I32": ("F32", "U32")}  # fmt: skip
    if draw.random() < 0.5 and entry["dtype"] in same:
        entry["dtype"] = draw.choice(same[entry["dtype"]])
    else:
        total = 1
        for n in entry["shape"]:
            total *= n
        entry["shape"] = draw.choice(
            ([total], [1, total], [total, 1], entry["shape"][::-1], [*entry["shape"], 1])
        )
    _write(path, header, data)
    return f"{key} is {entry['dtype']} {entry['shape'][:6]}"


def _renamed(path, draw):
    header, data = _parts(path)
    key = _entry(header, draw)
    new = draw.choice(
        (
            "../" * 5 + "x.weight",
            "/x",
            key + "\x1b[1m",
            key + "\n",
            "n" * 4000,
            key.upper(),
            key + ".weight",
            "",
            key[1:],
        )
    )
    _write(path, {new if k == key else k: v for k, v in header.items()}, data)
    return f"{key} to {new[:40]!r}"


# -- what the header says


def _places(value, at=()):
    yield at
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from _places(inner, (*at, key))


def _edited(value, draw):
    """(text of `value` with one place changed, what). A place is drawn by its depth first, so that lists of
    thousands leave room for others."""
    places = [p for p in _places(value) if p]
    depth = draw.choice(sorted({len(p) for p in places}))
    *outer, last = draw.choice([p for p in places if len(p) == depth])
    holder = value
    for key in outer:
        holder = holder[key]
    where = "/".join(map(str, (*outer, last)))[:120]
    kind = draw.choice(("value", "value", "value", "raw", "delete", "rename", "twice", "more", "swap"))
    raw = ""
    if kind == "value":
        holder[last] = draw.choice(ODD)
        what = f"{where} = {str(holder[last])[:30]!r}"
    elif kind == "delete":
        del holder[last]
        what = f"{where} is gone"
    elif kind in ("raw", "twice"):
        what = draw.choice(sorted(RAW)) if kind == "raw" else "twice"
        raw = (
            RAW[what]
            if kind == "raw"
            else f'{json.dumps(holder[last])}, "{last}": {json.dumps(draw.choice(ODD[:20]))}'
        )
        holder[last] = "@@"
        what = f"{where}: {what}"
    elif kind == "rename" and isinstance(holder, dict):
        new = draw.choice([s for s in ODD if isinstance(s, str)])
        holder[new] = holder.pop(last)
        what = f"{where} becomes {new[:30]!r}"
    elif kind == "more":
        target = holder[last] if isinstance(holder[last], (dict, list)) else holder
        if isinstance(target, dict):
            target[draw.choice(("extra", "../x", "\x1b[7m", "q" * 2000))] = draw.choice(ODD)
        else:
            target.append(draw.choice(ODD))
        what = f"more in {where}"
    else:
        other = draw.choice(list(holder) if isinstance(holder, dict) else range(len(holder)))
        holder[last], holder[other] = holder[other], holder[last]
        what = f"{where} and {other!s:.30} change places"
    return json.dumps(value).replace('"@@"', raw), what


def _said(path, draw):
    """An edit within the JSON of a header entry."""
    header, data = _parts(path)
    metadata = header.get("__metadata__", {})
    names = [k for k in OWN if k in metadata]
    if not names:
        return _table(path, draw)
    name = draw.choice(names)
    metadata[name], what = _edited(json.loads(metadata[name]), draw)
    _write(path, header, data)
    return f"{name}: {what}"


def _table(path, draw):
    """An edit of safetensors' own table."""
    header, data = _parts(path)
    text, what = _edited(header, draw)
    _write(path, text.encode(errors="surrogatepass"), data)
    return what


def _entries(path, draw):
    """Header entries that do not belong there."""
    header, data = _parts(path)
    name = draw.choice((*OWN, "config", "modelspec.title", "\x1b[5m", "k" * 3000))
    text = draw.choice(
        ("", "{}", "[]", "null", "{", "1", '{"layers": {"x": {}}}', "\x1b[2Jx", "t" * 100_000, "[" * 50_000)
    )
    header.setdefault("__metadata__", {})[name] = text
    _write(path, header, data)
    return f"{name[:30]!r} = {text[:30]!r}"


def _declared(path, draw):
    """The JSON in a comfy_quant tensor, kept at its length."""
    header, data = _parts(path)
    keys = sorted(k for k in header if k.endswith(".comfy_quant"))
    if not keys:
        return _said(path, draw)
    start, stop = header[key := draw.choice(keys)]["data_offsets"]
    text, what = _edited(json.loads(data[start:stop]), draw)
    _write(
        path,
        header,
        data[:start] + text.encode(errors="surrogatepass")[: stop - start].ljust(stop - start) + data[stop:],
    )
    return f"{key}: {what}"


def _large(path, draw):
    """A header that is much work."""
    header, data = _parts(path)
    count = draw.choice((20_000, 200_000))
    what = draw.choice(("tensors", "entries", "own", "shape"))
    if what == "tensors":
        header |= {
            f"t{i}": {"dtype": "U8", "shape": [0], "data_offsets": [len(data)] * 2} for i in range(count)
        }
    elif what == "entries":
        header.setdefault("__metadata__", {}).update({f"k{i}": "" for i in range(count)})
    elif what == "shape":
        header["t"] = {"dtype": "U8", "shape": [0] * count, "data_offsets": [len(data)] * 2}
    else:
        metadata = header.setdefault("__metadata__", {})
        name = next((k for k in OWN if k in metadata), draw.choice(OWN))
        metadata[name] = json.dumps({"layers": {f"l{i}": {"format": "x"} for i in range(count)}})
    _write(path, header, data)
    return f"{count} {what}"


def _index(path, draw):
    """An edit of an index of shards."""
    text, what = _edited(json.loads(path.read_text()), draw)
    path.write_bytes(text.encode(errors="surrogatepass"))
    return what


_CHANGES = (
    *(_said,) * 12, *(_table,) * 5, *(_numbers,) * 4, *(_retyped,) * 3, *(_header_bit,) * 3, *(_bit,) * 2,
    *(_declared,) * 2,
    *(_renamed,) * 2, *(_without,) * 2, *(_more,) * 3, _cut, _append, _length, *(_entries,) * 2, _large,
)  # fmt: skip
