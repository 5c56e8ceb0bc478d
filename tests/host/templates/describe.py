"""The words in which a template is written down: nodes with their values and where these come from, groups of
columns of nodes, and the whole."""

import re
from dataclasses import dataclass, field
from itertools import chain


@dataclass(eq=False)
class Node:
    """A node of a kind, the values of its inputs by name, and its title where it is not the kind's own.

    A value that is a Node is a wire from that node's first output, (Node, name) from the output of that name.
    Inputs that are not named keep the kind's default.
    """

    kind: str
    inputs: dict = field(default_factory=dict)
    title: str | None = None
    fill: bool = False  # takes the height that its column has left
    width: int = 0  # where it needs more than its kind does
    height: int = 0

    def wires(self) -> dict:
        """{input: (Node, name of its output or None)}"""
        both = {k: v if isinstance(v, tuple) else (v, None) for k, v in self.inputs.items()}
        return {k: v for k, v in both.items() if isinstance(v[0], Node)}

    def values(self) -> dict:
        """The inputs that are set to a value."""
        return {k: v for k, v in self.inputs.items() if k not in self.wires()}


@dataclass(eq=False)
class Group:
    """A titled box: columns of nodes from left to right, each from top to bottom."""

    title: str
    columns: list[list[Node]]
    color: str = "#4688bd"


@dataclass(eq=False)
class Template:
    """One example workflow. The note stands at the top left; each row has its groups from left to right."""

    key: str  # what tests and other templates call it
    title: str  # the file's name, which is all that ComfyUI shows in its list
    note: str  # Markdown
    rows: list[list[Group]]
    note_width: int = 330
    stacked: bool = False  # the first group stands below the note
    least_height: int = 0  # of a row

    def __post_init__(self):
        # Indented lines of a note go on with the line before: how Markdown is drawn must not depend on them.
        self.note = re.sub(r"\n +", " ", self.note)

    def groups(self) -> list[Group]:
        """In reading order."""
        return list(chain.from_iterable(self.rows))

    def nodes(self) -> list[Node]:
        """In reading order: this is how they are numbered."""
        return [node for group in self.groups() for column in group.columns for node in column]


def node(kind: str, title=None, *, fill=False, wide=0, tall=0, dotted=None, **inputs) -> Node:
    """A Node. wide, tall: its least size. dotted: the inputs whose names are no names of Python."""
    return Node(kind, inputs | (dotted or {}), title, fill, wide, tall)
