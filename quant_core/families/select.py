"""A choice of a model's blocks and modules, as text: `double 0-18; single 5,7; *.mlp`."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase


class SelectionError(ValueError):
    """A text that does not say which modules of this model are meant."""


@dataclass(frozen=True)
class Selection:
    """modules: chosen module names, each standing for all below it; "" is the whole model. text: the entries,
    as they were understood."""

    modules: frozenset[str]
    text: str

    def takes(self, key: str) -> bool:
        """Whether a tensor or a module is chosen."""
        return key in self.modules or any(name in self.modules for name in _above(key))


def modules_of(keys: Iterable[str]) -> set[str]:
    """The names of all modules that hold these tensors, their parents and the whole model "" among them."""
    return {name for key in keys for name in _above(key)}


def block_lists(modules: set[str]) -> dict[str, int]:
    """{name of a list of blocks: how many}. Blocks have modules below them and are numbered from 0;
    nn.Sequentials of bare layers are none."""
    indices: dict[str, set[int]] = {}
    for name in modules:
        parent, _, index = name.rpartition(".")
        if index.isdigit() and not any(part.isdigit() for part in parent.split(".")):
            indices.setdefault(parent, set()).add(int(index))
    inner = {name.rpartition(".")[0] for name in modules}
    numbered = {
        name: len(found) for name, found in sorted(indices.items()) if found == set(range(len(found)))
    }
    return {
        name: count for name, count in numbered.items() if all(f"{name}.{i}" in inner for i in range(count))
    }


def select(text: str, modules: Iterable[str]) -> Selection:
    """The modules that the entries of `text` choose, separated by newlines or `;`. Case does not matter.

    An entry is a kind of block with indices (`double 0-18`, `single 5,7,9`, `blocks 2`), a glob over module
    names (`double_blocks.0.img_attn`, `*linear2`; an `img_` or `txt_` may be left out, as in `*.mlp`), or
    `all`. Raises SelectionError for an entry that chooses nothing, quoting it.
    """
    modules = set(modules) | {""}
    lists = block_lists(modules)
    entries = [" ".join(entry.lower().split()) for entry in re.split(r"[;\r\n]", text) if entry.strip()]
    if not entries:
        raise SelectionError(f"no blocks are chosen, the text is empty. {_offer(lists, modules)}")
    chosen = set()
    for entry in entries:
        chosen |= _blocks(entry, lists, modules) if " " in entry else _matches(entry, lists, modules)
    return Selection(frozenset(chosen), "; ".join(entries))


def _above(name):
    while name:
        name = name.rpartition(".")[0]
        yield name


def _blocks(entry, lists, modules):
    kind, indices = entry.split(" ", 1)
    found = [name for name in lists if name.lower() == kind] or [
        name for name in lists if name.lower().startswith(kind)
    ]
    if len(found) != 1:
        what = (
            f"{kind!r} is short for {' and '.join(found)}"
            if found
            else f"there are no blocks called {kind!r}"
        )
        raise SelectionError(f"{entry!r}: {what}. {_offer(lists, modules)}")
    name, chosen = found[0], set()
    for piece in indices.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", piece)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise SelectionError(
                f"{entry!r}: {piece.strip()!r} is neither an index nor a range. Write {kind} and indices "
                "or ranges, lowest first, "
                f"with commas between them, such as '{kind} 0-3,7'."
            )
        if last >= lists[name]:
            raise SelectionError(f"{entry!r}: there is no block {last} in {name}. {_offer(lists, modules)}")
        chosen |= {f"{name}.{i}" for i in range(first, last + 1)}
    return chosen


def _matches(pattern, lists, modules):
    if pattern == "all":
        return {""}
    short = lambda name: re.sub(r"(^|\.)(?:img|txt)_", r"\1", name)
    chosen = {
        name
        for name in modules
        if fnmatchcase(name.lower(), pattern) or fnmatchcase(short(name.lower()), pattern)
    }
    if not chosen:
        raise SelectionError(f"{pattern!r} matches no module of this model. {_offer(lists, modules)}")
    return chosen


def _offer(lists, modules):
    """What can be chosen in this model."""
    kinds = []
    for name, count in lists.items():
        inside = sorted(
            {m.split(".")[len(name.split(".")) + 1] for m in modules if m.startswith(f"{name}.0.")}
        )
        kinds.append(
            f"{name.removesuffix('_blocks')} 0{f'-{count - 1}' * (count > 1)} (in each: {', '.join(inside)})"
        )
    return (
        f"This model has {'; '.join(kinds) or 'no lists of blocks'}. Globs such as '*.attn' and 'all' can "
        "be written too."
    )
