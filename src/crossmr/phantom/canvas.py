"""Canvas: random fields, distances to shapes, and layers of paint that mix in a voxel as tissues do."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Axes = Sequence[NDArray[np.float64]]
"""Voxel centres in mm along x, y, z."""
Shape = tuple[tuple[float, ...], ...]
"""Two triples are an ellipsoid's centre and radii, quadruples (x, y, z, radius) the stations of a tube; mm."""
Row = tuple[int, float, Shape]
"""Which tissue to paint, how opaque (0 to 1), and where in (|x|, y, z): always on both sides of the head."""


def noise(rng: np.random.Generator, axes: Axes, grain_mm: float) -> Array:
    """A smooth random field with features of about `grain_mm`, mean 0 and standard deviation about 1: (X, Y, Z).

    It is a sum of cubic B-splines on knots that cover a fixed 260 mm cube, whatever the grid.
    """
    knots = int(260 / grain_mm) + 4
    field = rng.standard_normal((knots, knots, knots), dtype=np.float32)
    for axis in axes:  # contracts the first dimension, appends the new one: three turns restore the order
        at = np.abs(axis[:, None] / grain_mm - (np.arange(knots) - (knots - 1) / 2))
        basis = np.where(at < 1, 2 / 3 - at**2 + at**3 / 2, np.clip(2 - at, 0, None) ** 3 / 6)
        field = np.tensordot(field, basis.astype(np.float32), axes=(0, 1))
    return field * np.float32(3)


def distance_to(shape: Shape, x: Array, y: Array, z: Array) -> Array:
    """Signed distance in mm, negative inside; to an ellipsoid of first order at its surface (Quilez)."""
    if len(shape[0]) == 4:
        return _distance_to_tube(shape, x, y, z)
    centre, radii = np.array(shape, np.float32)
    u, v, w = ((a - c) / r for a, c, r in zip((x, y, z), centre, radii, strict=True))
    norm = np.sqrt(u * u + v * v + w * w)
    slope = np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (w / radii[2]) ** 2)
    return np.asarray(norm * (norm - 1) / (slope + np.float32(1e-6)), np.float32)


def _distance_to_tube(stations: Shape, x: Array, y: Array, z: Array) -> Array:
    """A polyline whose radius changes linearly along each segment."""
    nearest = np.full(x.shape, np.inf, np.float32)
    for (ax, ay, az, ar), (bx, by, bz, br) in pairwise(stations):
        dx, dy, dz = bx - ax, by - ay, bz - az
        px, py, pz = x - np.float32(ax), y - np.float32(ay), z - np.float32(az)
        along = np.clip((px * dx + py * dy + pz * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
        across = (px - along * dx) ** 2 + (py - along * dy) ** 2 + (pz - along * dz) ** 2
        nearest = np.minimum(nearest, np.sqrt(across) - (ar + along * (br - ar)))
    return np.asarray(nearest, np.float32)


def blend(a: Array, b: Array, radius_mm: float) -> Array:
    """Smooth minimum of two signed distances: their union with a fillet of `radius_mm` (Quilez)."""
    overlap = np.clip(radius_mm - np.abs(a - b), 0, None)
    return np.asarray(np.minimum(a, b) - overlap * overlap / np.float32(4 * radius_mm), np.float32)


class Canvas:
    """Fractions of tissues on a grid, painted over one another in head coordinates; all tissue 0 at first."""

    def __init__(self, tissues: int, coordinates: Array, axes: Axes) -> None:
        self.axes = axes
        self.steps = [float(axis[1] - axis[0]) for axis in axes]
        self.voxel_mm = float(np.cbrt(np.prod(self.steps)))
        self.fractions = np.zeros((tissues, *coordinates.shape[1:]), np.float32)
        self.fractions[0] = 1
        self.place(coordinates)

    def place(self, coordinates: Array) -> None:
        """Set the head coordinates of the voxels, (3, X, Y, Z) in mm; `side` is the distance from midline."""
        self.x, self.y, self.z = coordinates
        self.side = np.abs(self.x)
        fields = ((self.side, (1, 2)), (self.y, (0, 2)), (self.z, (0, 1)))
        self.extent = [(field.min(axis=others), field.max(axis=others)) for field, others in fields]

    def within(self, distance: Array) -> Array:
        """Fraction of each voxel on the negative side of a signed distance in mm: the partial volume."""
        return np.asarray(np.clip(0.5 - distance / np.float32(self.voxel_mm), 0, 1), np.float32)

    def sheet(self, distance: Array, half_mm: Array | float) -> Array:
        """Fraction of each voxel within `half_mm` of a thin sheet; `distance` is to its middle, >= 0."""
        overlap = np.minimum(half_mm + self.voxel_mm / 2 - distance, 2 * half_mm) / self.voxel_mm
        return np.asarray(np.clip(overlap, 0, 1), np.float32)

    def paint(self, tissue: int, amount: Array, box: tuple[slice, ...] = ()) -> None:
        """Cover `amount` (0 to 1) of each voxel of a box with a tissue, in place of what was there."""
        region = self.fractions[(slice(None), *box)]
        keep = 1 - amount
        for layer in region:
            if layer.any():
                layer *= keep
        region[tissue] += amount

    def draw(self, rows: Sequence[Row], texture: Array | None = None) -> None:
        """Paint the rows of a table in turn, each only where its shape can be; `texture` scales the opacity."""
        for tissue, opacity, shape in rows:
            points = np.array(shape)
            middle, reach = (points[:1], points[1:]) if len(shape[0]) == 3 else (points[:, :3], points[:, 3:])
            corners = zip((middle - reach).min(0), (middle + reach).max(0), self.extent, strict=True)
            box = []
            for low, high, (least, most) in corners:
                inside = np.flatnonzero((most >= low - self.voxel_mm) & (least <= high + self.voxel_mm))
                box.append(slice(inside[0], inside[-1] + 1) if inside.size else slice(0))
            where = tuple(box)
            amount = self.within(distance_to(shape, self.side[where], self.y[where], self.z[where]))
            self.paint(tissue, amount * (opacity if texture is None else texture[where]), where)
