"""What coats of arms are charged with, as signed distances over a grid: negative inside."""

import numpy as np


def _segment(x, y, ax, ay, bx, by):
    """The distance from the line between two points."""
    dx, dy = bx - ax, by - ay
    t = np.clip(((x - ax) * dx + (y - ay) * dy) / (dx * dx + dy * dy), 0, 1)
    return np.hypot(x - ax - t * dx, y - ay - t * dy)


def polygon(x, y, *points):
    """The signed distance from a polygon, negative inside."""
    inside = np.zeros(x.shape, bool)
    distance = np.full(x.shape, np.inf, np.float32)
    for (ax, ay), (bx, by) in zip(points, (*points[1:], points[0]), strict=True):
        distance = np.minimum(distance, _segment(x, y, ax, ay, bx, by))
        if ay != by:
            crosses = (ay > y) != (by > y)
            inside ^= crosses & (x < (bx - ax) * (y - ay) / (by - ay) + ax)
    return np.where(inside, -distance, distance)


def _rays(x, y, points, inner, turn=0.0):
    corners = []
    for i in range(2 * points):
        r, a = (1.0 if i % 2 == 0 else inner), np.pi * i / points - np.pi / 2 + turn
        corners.append((r * np.cos(a), r * np.sin(a)))
    return polygon(x, y, *corners)


def _star(x, y):
    return _rays(x, y, 5, 0.42)


def _crescent(x, y):
    return np.maximum(np.hypot(x, y) - 0.92, 0.74 - np.hypot(x - 0.36, y + 0.06))


def _tower(x, y):
    body = polygon(
        x,
        y,
        (-0.55, 0.95),
        (-0.5, -0.3),
        (-0.75, -0.42),
        (-0.75, -0.95),
        (-0.42, -0.95),
        (-0.42, -0.66),
        (-0.16, -0.66),
        (-0.16, -0.95),
        (0.16, -0.95),
        (0.16, -0.66),
        (0.42, -0.66),
        (0.42, -0.95),
        (0.75, -0.95),
        (0.75, -0.42),
        (0.5, -0.3),
        (0.55, 0.95),
    )
    door = np.minimum(
        np.hypot(x, y - 0.45) - 0.24,
        np.maximum(np.abs(x) - 0.24, np.abs(y - 0.75) - 0.3),
    )
    return np.maximum(body, -door)


def _heart(x, y):
    lobes = np.minimum(
        np.hypot(x + 0.45, y + 0.32) - 0.5,
        np.hypot(x - 0.45, y + 0.32) - 0.5,
    )
    return np.minimum(
        lobes,
        polygon(x, y, (-0.86, -0.04), (0, -0.5), (0.86, -0.04), (0, 1.0)),
    )


def _sun(x, y):
    return np.minimum(np.hypot(x, y) - 0.5, _rays(x, y, 8, 0.5))


def _tree(x, y):
    crown = np.minimum(
        np.hypot(x + 0.42, y - 0.02) - 0.42,
        np.hypot(x - 0.42, y - 0.02) - 0.42,
    )
    crown = np.minimum(crown, np.hypot(x, y + 0.45) - 0.5)
    return np.minimum(crown, np.maximum(np.abs(x) - 0.15, np.abs(y - 0.5) - 0.48))


def _ship(x, y):
    hull = polygon(
        x,
        y,
        (-1.0, 0.4),
        (1.0, 0.4),
        (0.62, 0.9),
        (-0.62, 0.9),
    )
    sail = polygon(
        x,
        y,
        (-0.08, -0.9),
        (-0.08, 0.22),
        (-0.82, 0.22),
    )
    jib = polygon(
        x,
        y,
        (0.1, -1.0),
        (0.86, 0.22),
        (0.1, 0.22),
    )
    return np.minimum(np.minimum(hull, np.abs(x) - 0.05 + 9 * (np.abs(y) > 0.95)), np.minimum(sail, jib))


# Signed distances of about unit radius at the origin, y down.
CHARGES = {
    "star": _star,
    "crescent": _crescent,
    "tower": _tower,
    "heart": _heart,
    "sun": _sun,
    "tree": _tree,
    "ship": _ship,
}
