"""Where a template's nodes and groups lie: rows of groups, groups of columns, columns of nodes, with the
sizes that both node styles need."""

from dataclasses import dataclass

from comfyui_nibble.tests.host.templates.describe import Group, Node, Template
from comfyui_nibble.tests.host.templates.kinds import TITLE_BAR
from comfyui_nibble.tests.host.templates.models import models_of

COLUMN = 270  # the least width of a column
GAP = 22  # between nodes of a column
ERROR_BAR = 14  # what does not fit the gap
ASIDE = 34  # between columns
PAD, FOOT = 18, 28  # of a group, beside and below its nodes
HEADER = 40  # of a group, for its title
NOTE = 270  # the least height of a note above a group
BETWEEN = 24  # between groups, and between rows


@dataclass
class Placed:
    """Positions and sizes, without the title bar, by node; bounds by group; the note's box."""

    nodes: dict[Node, tuple[float, float, float, float]]
    groups: dict[Group, tuple[float, float, float, float]]
    note: tuple[float, float, float, float]


def least(node: Node, kinds: dict) -> tuple[float, float]:
    """The size that a node needs, without its title bar."""
    width, height = kinds[node.kind]["size"]
    return max(width, node.width), max(height, node.height)


def column_width(column: list[Node], kinds: dict) -> float:
    """As wide as its widest node needs."""
    return max(COLUMN, *(least(n, kinds)[0] for n in column))


def column_height(column: list[Node], kinds: dict) -> float:
    """With the title bars and the gaps between."""
    return sum(least(n, kinds)[1] + TITLE_BAR for n in column) + sum(map(gap_below, column[:-1]))


def gap_below(node: Node) -> float:
    """To the next node of a column. Nodes 2.0 hang a bar below a node whose file is missing."""
    return GAP + (ERROR_BAR if models_of(node.values().values()) else 0)


def place(template: Template, kinds: dict) -> Placed:
    """The layout of a template: each row as high as its highest column, each as wide as the widest one."""
    placed, top = Placed({}, {}, (0, 0, 0, 0)), 0.0
    natural = [row_width(template, i, kinds) for i in range(len(template.rows))]
    for i, row in enumerate(template.rows):
        count = sum(len(group.columns) for group in row) + (i == 0 and not template.stacked)
        spare = (max(natural) - natural[i]) / count
        height = row_height(template, i, kinds)
        left, groups = 0.0, list(row)
        if i == 0:
            width = template.note_width + spare
            below = stacked_height(groups.pop(0), kinds) if template.stacked else 0
            placed.note = (0, TITLE_BAR, width, height + HEADER + FOOT - TITLE_BAR - below)
            if template.stacked:
                y = height + HEADER + FOOT + BETWEEN - below
                put(placed, row[0], 0, y, below - BETWEEN - HEADER - FOOT, width - 2 * PAD - COLUMN, kinds)
            left = width + BETWEEN
        for group in groups:
            left = put(placed, group, left, top, height, spare, kinds) + BETWEEN
        top += height + HEADER + FOOT + BETWEEN
    return placed


def group_height(group: Group, kinds: dict) -> float:
    """Of a group's highest column."""
    return max(column_height(column, kinds) for column in group.columns)


def stacked_height(group: Group, kinds: dict) -> float:
    """What a group under the note takes of the row's height."""
    return group_height(group, kinds) + HEADER + FOOT + BETWEEN


def row_height(template: Template, i: int, kinds: dict) -> float:
    """Of the nodes of a row."""
    groups = list(template.rows[i])
    least = template.least_height
    if i == 0 and template.stacked:
        least = max(least, NOTE + stacked_height(groups.pop(0), kinds) - HEADER - FOOT)
    return max(least, *(group_height(group, kinds) for group in groups))


def row_width(template: Template, i: int, kinds: dict) -> float:
    """Of a row at the least widths of its columns."""
    groups = template.rows[i][1 if i == 0 and template.stacked else 0 :]
    boxes = [
        sum(column_width(c, kinds) for c in g.columns) + ASIDE * (len(g.columns) - 1) + 2 * PAD
        for g in groups
    ] + [template.note_width] * (i == 0)
    return sum(boxes) + BETWEEN * (len(boxes) - 1)


def put(placed, group, left, top, height, spare, kinds) -> float:
    """Puts a group and its nodes down; returns its right edge."""
    x = left + PAD
    for column in group.columns:
        width, y = column_width(column, kinds) + spare, top + HEADER
        rest = height - column_height(column, kinds)
        filling = [n for n in column if n.fill]
        for n in column:
            h = least(n, kinds)[1] + (rest / len(filling) if n.fill else 0)
            placed.nodes[n] = tuple(round(v) for v in (x, y + TITLE_BAR, width, h))
            y += TITLE_BAR + h + gap_below(n)
        x += width + ASIDE
    right = x - ASIDE + PAD
    placed.groups[group] = tuple(round(v) for v in (left, top, right - left, height + HEADER + FOOT))
    return right
