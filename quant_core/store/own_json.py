"""JSON that Nibble has written into a header or a file, and that anybody may have changed since: parsed with
bounds, checked field by field."""

import json
import math
import re

from ...kernels.operator.errors import shortened

DEPTH = 64  # levels; ours have up to 12, ComfyUI's configs among them
WHOLE = 2**31  # what whole numbers are below
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class NotOurs(ValueError):
    """Text that is no JSON of ours. The text of the error says why, without the file: `prefix: it` is a
    sentence."""


def parse(text: str) -> dict:
    """The object that `text` is. Raises NotOurs for anything else, for a name that one object has twice, more
    than DEPTH levels, and text that is no Unicode; the size is bounded where the file is opened."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise NotOurs(f"nested too deep, expected at most {DEPTH} levels") from error
    except NotOurs:
        raise
    except ValueError as error:  # numbers of thousands of digits, too
        raise NotOurs(f"is not JSON ({shortened(str(error))})") from error
    if not isinstance(value, dict):
        raise NotOurs(f"expected an object, found {type(value).__name__}")
    level: list[dict | list] = [value]
    for _ in range(DEPTH):
        level = [
            v
            for held in level
            for v in (held.values() if isinstance(held, dict) else held)
            if isinstance(v, (dict, list))
        ]
        if not level:
            break
    else:
        raise NotOurs(f"nested too deep, expected at most {DEPTH} levels")
    if _SURROGATE.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise NotOurs("holds half of a surrogate pair, which is no text") from error
    return value


def _unique(pairs):
    made = dict(pairs)
    if len(made) < len(pairs):
        names = set()
        twice = next(name for name, _ in pairs if name in names or names.add(name))
        raise NotOurs(f"has {twice!r} twice in one object")
    return made


def field(data: dict, name: str, kind: type | tuple, low: float | None = None):
    """data[name], of that type; a bool is no number. low: a whole number is from there to WHOLE, another one
    finite and from there on.

    Raises NotOurs naming the field, what was expected and what was found.
    """
    expected = " or ".join(_WORDS[k] for k in (kind if isinstance(kind, tuple) else (kind,)))
    if name not in data:
        raise NotOurs(f"{name}: expected {expected}, found none")
    value = data[name]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise NotOurs(f"{name}: expected {expected}, found {short(value)}")
    if low is not None and not isinstance(value, (str, dict, list, type(None))):
        bounds = f"{name}: expected {expected} from {low} on, found {short(value)}"
        if isinstance(value, int) and not low <= value < WHOLE:
            raise NotOurs(f"{bounds[: bounds.index(' on, ')]} to below {WHOLE}, found {short(value)}")
        if isinstance(value, float) and not (math.isfinite(value) and value >= low):
            raise NotOurs(bounds)
    return value


_WORDS = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


def short(value: object) -> str:
    """A value for a sentence; never all of a large one."""
    if isinstance(value, (dict, list, tuple)):
        return f"{type(value).__name__} of {len(value)}"
    return shortened(repr(value), 80)
