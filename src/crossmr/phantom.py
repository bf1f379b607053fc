"""A head with a glioma, made of code: four-contrast brain MRI from tissue fractions and signal equations.

Anatomy is a set of implicit surfaces in head coordinates (mm, RAS+, origin near the anterior commissure),
drawn tissue over tissue with soft edges, so that a voxel holds fractions of tissues as a real one does. The
cortex folds because sulci are the zero-level sheets of a random field that varies along the surface and
hardly in depth; grey matter is whatever lies within a ribbon's thickness of that surface. Everything that
varies between patients (shape, folds, lesion, scanner) comes from the seed, and in millimetres, so that one
seed is one patient at any resolution.

Not anatomy to measure on: it is for tests, demonstrations and training runs that may not use patients' data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from math import cos, exp, log, radians, sin
from pathlib import Path
from typing import Any, NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from crossmr.errors import ConfigError

Array = NDArray[np.float32]
Box = tuple[slice, slice, slice]
Point = tuple[float, float, float]
Station = tuple[float, float, float, float]
"""x, y, z and radius in mm of one point along a tube."""

MODALITIES = ("t1n", "t1c", "t2w", "t2f")
FIELD_OF_VIEW_CENTRE_MM = (0.0, -11.0, 4.0)
SMALLEST_SIDE = 32
LESION_RATE = 0.85
GADOLINIUM_R1 = 4.5
"""Longitudinal relaxivity of a gadolinium chelate in plasma, 1/(mmol/l)/s (Rohrer et al. 2005)."""


Tissue = IntEnum(
    "Tissue",
    "AIR CSF GREY WHITE DEEP_GREY PALLIDUM CHOROID DURA VESSEL BONE MARROW FAT MUSCLE SKIN MUCOSA VITREOUS "
    "LENS GLIOSIS OEDEMA ENHANCING NECROSIS",
    start=0,
)
"""What a voxel can be made of; the values of `Phantom.tissues`."""


class Relaxation(NamedTuple):
    """One tissue at 3 T: T1 and T2 in ms, proton density (water = 1), contrast agent in it in mmol/l."""

    t1: float
    t2: float
    density: float
    gadolinium: float = 0.0


RELAXATION = {
    Tissue.AIR: Relaxation(1000, 10, 0.0),
    Tissue.CSF: Relaxation(4300, 1500, 1.0),
    Tissue.GREY: Relaxation(1400, 108, 0.82, 0.01),
    Tissue.WHITE: Relaxation(850, 72, 0.70),
    Tissue.DEEP_GREY: Relaxation(1250, 84, 0.79, 0.01),
    Tissue.PALLIDUM: Relaxation(1000, 66, 0.74),
    Tissue.CHOROID: Relaxation(1600, 160, 0.90, 0.5),
    Tissue.DURA: Relaxation(1000, 35, 0.55, 0.3),
    Tissue.VESSEL: Relaxation(1900, 14, 0.75, 1.0),
    Tissue.BONE: Relaxation(500, 3, 0.12),
    Tissue.MARROW: Relaxation(550, 60, 0.50),
    Tissue.FAT: Relaxation(370, 110, 0.85),
    Tissue.MUSCLE: Relaxation(1410, 45, 0.75, 0.04),
    Tissue.SKIN: Relaxation(900, 40, 0.60, 0.1),
    Tissue.MUCOSA: Relaxation(1300, 110, 0.80, 0.35),
    Tissue.VITREOUS: Relaxation(4000, 1000, 0.98),
    Tissue.LENS: Relaxation(1100, 25, 0.60),
    Tissue.GLIOSIS: Relaxation(1250, 145, 0.80),
    Tissue.OEDEMA: Relaxation(1550, 170, 0.87),
    Tissue.ENHANCING: Relaxation(1450, 115, 0.85, 0.45),
    Tissue.NECROSIS: Relaxation(2900, 250, 0.94),
}
"""Brain, muscle and blood within Wansapura et al. 1999 and Stanisz et al. 2005, fat as Gold et al. 2004; the
rest (tumour, gadolinium, the short T2 that stands for flow void) set to look as it does in clinical scans."""

BRATS_LABEL = {Tissue.NECROSIS: 1, Tissue.OEDEMA: 2, Tissue.ENHANCING: 3}


@dataclass(frozen=True, eq=False)
class Phantom:
    """One synthetic patient on one grid."""

    images: dict[str, NDArray[np.float32]]
    """t1n, t1c, t2w, t2f: (X, Y, Z), RAS+ axis order, arbitrary MR units, >= 0."""
    labels: NDArray[np.uint8]
    """(X, Y, Z), BraTS >= 2023: 0 none, 1 necrotic core, 2 oedema, 3 enhancing tumour."""
    tissues: NDArray[np.uint8]
    """(X, Y, Z), the `Tissue` that fills most of the voxel (AIR outside a stripped brain)."""
    affine: NDArray[np.float64]
    """(4, 4), voxel index to RAS+ mm."""


# --- Random fields -------------------------------------------------------------------------------------


def _bspline(positions_mm: NDArray[np.float64], grain_mm: float, knots: int) -> Array:
    """Values of the `knots` uniform cubic B-splines, centred on 0 mm, at each position: (N, knots)."""
    at = np.abs(positions_mm[:, None] / grain_mm - (np.arange(knots) - (knots - 1) / 2))
    near, far = 2 / 3 - at**2 + at**3 / 2, np.clip(2 - at, 0, None) ** 3 / 6
    return np.where(at < 1, near, far).astype(np.float32)


def _noise(rng: np.random.Generator, axes: Sequence[NDArray[np.float64]], grain_mm: float) -> Array:
    """A smooth random field with features of about `grain_mm`, mean 0 and deviation about 1: (X, Y, Z).

    The coefficients cover a fixed 260 mm cube, so the field in mm does not depend on the grid.
    """
    knots = int(260 / grain_mm) + 4
    field = rng.standard_normal((knots, knots, knots), dtype=np.float32)
    for axis in axes:  # contracts the first dimension, appends the new one: three turns restore the order
        field = np.tensordot(field, _bspline(axis, grain_mm, knots), axes=(0, 1))
    return field * np.float32(3)


# --- Drawing ---------------------------------------------------------------------------------------------


class _Canvas:
    """Tissue fractions on a grid, painted over one another in head coordinates."""

    def __init__(self, coordinates: Array, axes: Sequence[NDArray[np.float64]], spacing_mm: Point) -> None:
        self.axes = axes
        self.voxel_mm = float(np.cbrt(np.prod(spacing_mm)))
        self.fractions = np.zeros((len(Tissue), *coordinates.shape[1:]), np.float32)
        self.fractions[Tissue.AIR] = 1
        self.place(coordinates)

    def place(self, coordinates: Array) -> None:
        """Set the head coordinates of the voxels, (3, X, Y, Z) in mm; x is kept as distance from midline."""
        self.x, self.y, self.z = coordinates
        self.side = np.abs(self.x)
        others = ((1, 2), (0, 2), (0, 1))
        fields = (self.side, self.y, self.z)
        self.low = [field.min(axis=other) for field, other in zip(fields, others, strict=True)]
        self.high = [field.max(axis=other) for field, other in zip(fields, others, strict=True)]

    def box(self, low: Sequence[float], high: Sequence[float]) -> Box:
        """The smallest block of voxels that holds every voxel between two corners (|x|, y, z) in mm."""
        slices = []
        for k in range(3):
            inside = np.flatnonzero((self.high[k] >= low[k]) & (self.low[k] <= high[k]))
            slices.append(slice(inside[0], inside[-1] + 1) if inside.size else slice(0, 0))
        return slices[0], slices[1], slices[2]

    def within(self, distance: Array) -> Array:
        """Fraction of each voxel on the negative side of a signed distance in mm: the partial volume."""
        return np.asarray(np.clip(0.5 - distance / np.float32(self.voxel_mm), 0, 1), np.float32)

    def sheet(self, distance: Array, half_mm: Array | float) -> Array:
        """Fraction of each voxel within `half_mm` of a thin sheet; `distance` is to its middle, >= 0."""
        width = self.voxel_mm
        overlap = np.minimum(half_mm + width / 2 - distance, 2 * half_mm) / width
        return np.asarray(np.clip(overlap, 0, 1), np.float32)

    def paint(self, tissue: Tissue, amount: Array, box: Box | None = None) -> None:
        """Cover `amount` (0 to 1) of each voxel with a tissue, in place of what was there."""
        region = self.fractions[(slice(None), *box)] if box else self.fractions
        keep = 1 - amount
        for layer in region:
            if layer.any():
                layer *= keep
        region[tissue] += amount

    def ellipsoid(self, tissue: Tissue, centre: Point, radii: Point, opacity: float = 1.0) -> None:
        """Paint an ellipsoid at (|x|, y, z) mm, on both sides of the head."""
        margin = self.voxel_mm
        box = self.box(
            [c - r - margin for c, r in zip(centre, radii, strict=True)],
            [c + r + margin for c, r in zip(centre, radii, strict=True)],
        )
        distance = _ellipsoid(self.side[box], self.y[box], self.z[box], centre, radii)
        self.paint(tissue, self.within(distance) * np.float32(opacity), box)

    def tube(self, tissue: Tissue, *stations: Station) -> None:
        """Paint a tapering tube through (|x|, y, z, radius) mm stations, on both sides of the head."""
        table = np.array(stations)
        reach = table[:, 3].max() + self.voxel_mm
        box = self.box((table[:, :3].min(0) - reach).tolist(), (table[:, :3].max(0) + reach).tolist())
        distance = _tube(self.side[box], self.y[box], self.z[box], stations)
        self.paint(tissue, self.within(distance), box)


def _ellipsoid(x: Array, y: Array, z: Array, centre: Point, radii: Point) -> Array:
    """Signed distance to an ellipsoid in mm, exact to first order at its surface (Quilez)."""
    u, v, w = ((a - np.float32(c)) / np.float32(r) for a, c, r in zip((x, y, z), centre, radii, strict=True))
    norm = np.sqrt(u * u + v * v + w * w)
    slope = np.sqrt((u / radii[0]) ** 2 + (v / radii[1]) ** 2 + (w / radii[2]) ** 2)
    return np.asarray(norm * (norm - 1) / (slope + np.float32(1e-6)), np.float32)


def _tube(x: Array, y: Array, z: Array, stations: Sequence[Station]) -> Array:
    """Signed distance in mm to a polyline whose radius changes linearly along each segment."""
    nearest: Array | None = None
    for (ax, ay, az, ar), (bx, by, bz, br) in pairwise(stations):
        dx, dy, dz = bx - ax, by - ay, bz - az
        px, py, pz = x - np.float32(ax), y - np.float32(ay), z - np.float32(az)
        along = np.clip((px * dx + py * dy + pz * dz) / (dx * dx + dy * dy + dz * dz), 0, 1)
        across = (px - along * dx) ** 2 + (py - along * dy) ** 2 + (pz - along * dz) ** 2
        segment = np.sqrt(across) - (ar + along * (br - ar))
        nearest = segment if nearest is None else np.minimum(nearest, segment)
    return np.asarray(nearest, np.float32)


def _blend(a: Array, b: Array, radius_mm: float) -> Array:
    """Smooth minimum of two signed distances: their union with a fillet of `radius_mm` (Quilez)."""
    overlap = np.clip(radius_mm - np.abs(a - b), 0, None)
    return np.asarray(np.minimum(a, b) - overlap * overlap / np.float32(4 * radius_mm), np.float32)


# --- Anatomy ---------------------------------------------------------------------------------------------


class _Surfaces(NamedTuple):
    """Signed distances in mm, negative inside, each (X, Y, Z)."""

    cerebrum: Array
    cerebellum: Array
    brainstem: Array
    cavity: Array
    """The inside of the skull."""
    head: Array


BRAINSTEM = ((0, -24, -8, 14), (0, -22, -18, 13), (0, -23, -30, 15), (0, -31, -46, 9), (0, -42, -66, 6.5))
CORD = ((0, -42, -66, 6.0), (0, -50, -120, 6.0))


def _surfaces(canvas: _Canvas) -> _Surfaces:
    """The smooth outlines, before folding."""
    s, y, z = canvas.side, canvas.y, canvas.z
    egg = s * (1 + np.float32(0.0016) * (y + 20))  # narrower in front than behind
    body = _ellipsoid(egg, y, z, (0, -17, 14), (66, 86, 60))
    floor = np.interp(y, [-100, -50, -36, 0, 14, 70], [-11, 3, -12, -14, -24, -20]).astype(np.float32)
    tent = np.clip(s - 10, 0, 40) * np.clip((-30 - y) / 30, 0, 1)  # the tentorium slopes to the sides
    floor -= np.float32(0.28) * tent
    body = -_blend(-body, z - floor, 4)
    temporal = _ellipsoid(s, y + 0.25 * (z + 20), z, (40, -14, -20), (28, 40, 21))
    cerebrum = _blend(body, temporal, 9)
    lobes = _ellipsoid(s, y, z, (22, -64, -33), (31, 30, 27))
    cerebellum = _blend(lobes, _ellipsoid(s, y, z, (0, -63, -28), (14, 25, 27)), 4)
    cerebellum = -_blend(-cerebellum, floor - 2.2 - z, 2)
    brainstem = _tube(s, y, z, (*BRAINSTEM, *CORD[1:]))
    fossa = _blend(cerebellum - 2.0, brainstem - 3.0, 14)
    cistern = _ellipsoid(s, y, z, (0, -6, -16), (18, 18, 13))
    cavity = _blend(_blend(cerebrum - 2.2, fossa, 6), cistern, 6)
    nose = _tube(s, y, z, ((0, 82, -28, 8), (0, 97, -55, 12)))
    face = _blend(_ellipsoid(s, y, z, (0, 24, -58), (67, 66, 68)), nose, 14)
    neck = _tube(s, y, z, ((0, -40, -50, 62), (0, -45, -130, 58)))
    head = _blend(_blend(cavity - 12.5, face, 30), neck, 40)
    return _Surfaces(cerebrum, cerebellum, brainstem, cavity, head)


def _sulci(rng: np.random.Generator, canvas: _Canvas, depth: Array, grain_mm: float) -> Array:
    """Distance in mm to the zero sheets of a field that is nearly constant along the way into the brain."""
    grid = [np.arange(-66, 67, 3.0), np.arange(-90, 91, 3.0), np.arange(-90, 91, 3.0)]
    own, shared = _noise(rng, grid, grain_mm), _noise(rng, grid, grain_mm)
    field = 0.75 * own + 0.6 * (shared + shared[::-1])  # the two hemispheres are alike, not equal
    shell = (depth > -8) & (depth < 34)
    x, y, z = canvas.x[shell], canvas.y[shell], canvas.z[shell]
    temporal = np.clip(0.4 - (z + 6 + 0.45 * y) / 12, 0, 1) * np.clip((y + 55) / 20, 0, 1)
    axis = np.stack([np.sign(x) * (28 + 10 * temporal), -14 + 52 * np.tanh((y + 14) / 70), 8 - 28 * temporal])
    reach = np.stack([x, y, z]) - axis
    radius = np.sqrt((reach * reach).sum(0)) + np.float32(1e-3)
    reach *= (34 - 16 * temporal + 0.25 * radius) / radius
    # Seen from the long axis of its hemisphere or temporal lobe, each voxel -> an index of the 3 mm grid.
    at = (axis + reach + np.array([[66], [90], [90]])) / 3
    value = np.full(depth.shape, 9, np.float32)
    value[shell] = ndimage.map_coordinates(field, at, order=1, mode="nearest")
    steps = [float(axis[1] - axis[0]) for axis in canvas.axes]
    slope = np.sqrt(sum(g * g for g in np.gradient(value, *steps)))
    return np.asarray(np.abs(value) / np.maximum(slope, 0.02), np.float32)


def _draw_cerebrum(rng: np.random.Generator, canvas: _Canvas, cerebrum: Array, atrophy: float) -> None:
    """The folded cortex on its white matter; fills the interhemispheric and Sylvian fissures with CSF."""
    s, y, z = canvas.side, canvas.y, canvas.z
    fissure = 0.5 + 0.6 * atrophy
    outline = np.maximum(cerebrum, np.float32(fissure) - s)
    depth = -outline
    patchy = _noise(rng, canvas.axes, 16.0)
    sylvian_plane = np.abs(z - (-6 - 0.45 * y) - 2.5 * patchy + 0.3 * (s - 50)) * np.float32(0.87)
    beyond = np.clip(np.abs(y + 10) - 30, 0, None) + np.clip(37 - s, 0, None)
    around = np.clip(_ellipsoid(s, y, z, (38, 1, 0), (99, 19, 11)), 0, None)
    insula = np.hypot(s - (38 + 0.004 * (y - 2) ** 2), around)
    sheets = (
        (_sulci(rng, canvas, depth, 7.8), 21 + 6 * patchy, 0.45 + 0.45 * atrophy),
        (_sulci(rng, canvas, depth, 5.5), 9 + 5 * patchy, 0.3 + 0.35 * atrophy),
    )
    pial, folds = depth, np.zeros_like(depth)
    for distance, reach, half in sheets:
        distance = np.hypot(distance, np.clip(depth - reach, 0, None))
        folds = np.maximum(folds, canvas.sheet(distance, half))
        pial = np.minimum(pial, distance - half)
    for distance in (np.hypot(sylvian_plane, beyond), insula):
        folds = np.maximum(folds, canvas.sheet(distance, 0.5 + 0.7 * atrophy))
        pial = np.minimum(pial, distance - 1)
    ribbon = 2.9 + 0.3 * patchy
    inside = canvas.within(outline)
    canvas.paint(Tissue.GREY, inside)
    canvas.paint(Tissue.WHITE, inside * canvas.within(ribbon - pial))
    canvas.paint(Tissue.CSF, inside * folds)


# fmt: off
def _draw_deep(canvas: _Canvas, atrophy: float) -> None:
    """Callosum, ventricles and grey nuclei, over the middle of the cerebrum."""
    w = 0.8 + 0.65 * atrophy  # the width of the ventricles
    canvas.ellipsoid(Tissue.WHITE, (0, -4, 8), (30, 32, 15))
    canvas.ellipsoid(Tissue.GREY, (0, 4, -12), (9, 12, 8))
    for x in (0.0, 9.0, 17.0):  # the callosum, a wide arc: three tubes side by side
        up = 0.2 * x
        canvas.tube(Tissue.WHITE, (x, 20, -4 + up, 2.5), (x, 32, 5 + up, 4.5), (x, 24, 20 + up, 3.5),
                    (x, -4, 28 + up, 3.2), (x, -28, 24 + up, 3.5), (x, -40, 12 + up, 5))
    canvas.tube(Tissue.CSF, (18, 36, 4, 1.2 * w), (9, 27, 8, 4.5 * w), (6, 6, 16, 5.2 * w),
                (7, -14, 19, 5.2 * w), (20, -34, 16, 6.5 * w), (27, -46, 8, 6 * w), (26, -66, 6, 2.5 * w))
    canvas.tube(Tissue.CSF, (27, -44, 6, 5 * w), (35, -26, -11, 2.2 * w), (31, -10, -19, 2.2 * w))
    canvas.tube(Tissue.CHOROID, (14, -22, 15, 1.0), (24, -40, 9, 2.2), (29, -38, 2, 1.2))
    canvas.tube(Tissue.WHITE, (0, 24, 9, 0.9), (0, 0, 17, 0.9), (0, -14, 20, 0.8))
    canvas.ellipsoid(Tissue.DEEP_GREY, (12, -18, 6), (10.5, 15, 9.5), opacity=0.7)
    canvas.tube(Tissue.DEEP_GREY, (13, 18, 1, 6.5), (15.5, 4, 13, 5), (19, -16, 21, 2.5), (27, -34, 16, 1.5))
    canvas.ellipsoid(Tissue.DEEP_GREY, (25.5, 4, 1), (5.5, 17, 11))
    canvas.ellipsoid(Tissue.PALLIDUM, (19, -3, -1), (4.5, 9.5, 6.5))
    canvas.tube(Tissue.GREY, (23, -5, -21, 6.5), (25, -20, -15, 5), (22, -36, -3, 3.5))
    canvas.ellipsoid(Tissue.CSF, (0, -12, -3), (2.3 * w, 14, 10))
# fmt: on


def _draw_hindbrain(rng: np.random.Generator, canvas: _Canvas, surfaces: _Surfaces) -> None:
    """Cerebellum with folia fanning out from its peduncles, brainstem, fourth ventricle."""
    s, y, z = canvas.side, canvas.y, canvas.z
    inside = canvas.within(surfaces.cerebellum)
    radius = np.hypot(y + 44, z + 36) + np.float32(6)
    fan = np.arctan2(z + 36 + 0.15 * s, -(y + 38)) + np.float32(0.05) * _noise(rng, canvas.axes, 12.0)
    spacing = np.float32(0.21)  # radians between folia
    folium = np.abs((fan / spacing) % 1 - np.float32(0.5)) * spacing * radius
    beyond = np.clip(-surfaces.cerebellum - 11, 0, None)
    furrow = np.hypot(folium, beyond)
    pial = np.minimum(-surfaces.cerebellum, furrow)
    canvas.paint(Tissue.GREY, inside)
    canvas.paint(Tissue.WHITE, inside * canvas.within(2.6 - pial))
    canvas.paint(Tissue.CSF, inside * canvas.sheet(furrow, 0.35))
    canvas.tube(Tissue.WHITE, *BRAINSTEM, *CORD[1:])
    canvas.tube(Tissue.WHITE, (12, -28, -32, 7), (20, -48, -36, 7))
    canvas.tube(Tissue.WHITE, (10, -14, 0, 7), (8, -18, -14, 6))
    canvas.ellipsoid(Tissue.GREY, (0, -31, -14), (4, 4, 6), opacity=0.6)
    canvas.ellipsoid(Tissue.DEEP_GREY, (16, -54, -35), (7, 5, 4), opacity=0.5)
    canvas.tube(Tissue.CSF, (0, -32, -12, 1.0), (0, -37, -24, 2.2), (0, -43, -34, 5.5), (0, -43, -50, 2))


# fmt: off
VESSELS: tuple[tuple[Station, ...], ...] = (
    ((0, 45, 64, 1), (0, 14, 74, 1.5), (0, -22, 76, 2.5), (0, -55, 67, 3), (0, -82, 48, 3),
     (0, -100, 20, 3.5), (0, -103, -10, 4)),  # superior sagittal sinus
    ((0, -103, -10, 4), (16, -100, -13, 3.5), (32, -90, -17, 3.5), (48, -66, -21, 3.5), (51, -48, -28, 3.5),
     (47, -40, -42, 3.5)),  # transverse and sigmoid sinus
    ((0, -42, 4, 2), (0, -60, 3, 2), (0, -100, -8, 2.5)),  # straight sinus
    ((14, 2, -46, 2.6), (12, 6, -24, 2.2), (13, 2, -14, 1.7), (22, 6, -11, 1.2), (30, 1, -8, 1.1),
     (38, 5, -3, 0.9)),  # internal carotid, middle cerebral artery
    ((0, -4, -40, 1.6), (0, -7, -20, 1.6), (12, -12, -15, 1), (20, -24, -11, 0.9)),  # basilar artery
)
# fmt: on


def _draw_vessels(rng: np.random.Generator, canvas: _Canvas, surfaces: _Surfaces) -> None:
    """Falx, tentorium, dural sinuses, the great arteries, and small vessels wandering through the CSF."""
    s, cavity = canvas.side, surfaces.cavity
    gap = np.minimum(surfaces.cerebellum - surfaces.cerebrum, 9) + np.clip(canvas.y + 40, 0, None)
    tentorium = np.abs(gap) + np.clip(-surfaces.cerebellum - 4, 0, None)
    canvas.paint(Tissue.DURA, canvas.sheet(tentorium, 0.4) * canvas.within(cavity))
    falx = s + np.clip(4 - surfaces.cerebellum, 0, None) + np.clip(30 + cavity, 0, None) * 0.02
    open_space = canvas.fractions[Tissue.CSF]
    canvas.paint(Tissue.DURA, canvas.sheet(falx, 0.5) * open_space)
    canvas.paint(Tissue.DURA, canvas.sheet(np.abs(cavity), 0.5))
    wander = np.hypot(_noise(rng, canvas.axes, 11.0), _noise(rng, canvas.axes, 11.0))
    canvas.paint(Tissue.VESSEL, np.clip(1.2 - wander / 0.16, 0, 1) * open_space * canvas.within(cavity))
    for stations in VESSELS:
        canvas.tube(Tissue.VESSEL, *stations)


MUSCLES: tuple[tuple[Point, Point], ...] = (
    ((62, 26, -12), (9, 28, 34)),  # temporalis
    ((57, 26, -76), (8, 17, 28)),  # masseter
    ((37, 16, -66), (11, 15, 22)),  # pterygoids
    ((0, 44, -96), (22, 34, 16)),  # tongue
    ((56, -42, -86), (9, 13, 32)),  # sternocleidomastoid
    ((12, -84, -84), (10, 12, 34)),  # semispinalis
    ((32, -76, -88), (12, 11, 30)),  # splenius
    ((16, -58, -78), (12, 9, 18)),  # suboccipital
)


def _draw_skull(rng: np.random.Generator, canvas: _Canvas, surfaces: _Surfaces) -> None:
    """Everything outside the brain: skin, fat, muscle, bone with its marrow, orbits, airways; then CSF."""
    z, head, cavity = canvas.z, surfaces.head, surfaces.cavity
    rough, coarse = _noise(rng, canvas.axes, 6.5), _noise(rng, canvas.axes, 26.0)
    canvas.paint(Tissue.SKIN, canvas.within(head))
    canvas.paint(Tissue.FAT, canvas.within(head + 1.8))
    low = np.clip((-18 - z) / 14, 0, 1)  # flesh below the skull base
    marbled = np.clip(0.75 + 0.2 * rough + 0.2 * coarse, 0.35, 0.95)
    canvas.paint(Tissue.MUSCLE, canvas.within(head + 6 + 1.5 * coarse) * low * marbled)
    for centre, radii in MUSCLES:
        canvas.ellipsoid(Tissue.MUSCLE, centre, radii, opacity=0.9)
    thick = 6.2 + 0.7 * coarse
    canvas.paint(Tissue.BONE, canvas.within(cavity - thick))
    diploe = np.abs(cavity - thick / 2 - 0.4)
    canvas.paint(Tissue.MARROW, canvas.sheet(diploe, np.clip(1.0 + 0.5 * coarse, 0.1, 2.2)))
    _draw_face(canvas, rough)
    canvas.paint(Tissue.AIR, 1 - canvas.within(head))
    canvas.paint(Tissue.CSF, canvas.within(cavity))


# fmt: off
SINUSES: tuple[tuple[Point, Point], ...] = (  # maxillary, sphenoid, frontal
    ((28, 44, -56), (14, 16, 15)), ((7, 12, -33), (8, 11, 8)), ((9, 76, 8), (11, 4, 9)),
)
AIR_CELLS: tuple[tuple[Tissue, Point, Point], ...] = (
    (Tissue.MUCOSA, (0, 52, -56), (12, 34, 18)),  # nasal cavity
    (Tissue.MUCOSA, (7, 46, -30), (7, 20, 9)),  # ethmoid
    (Tissue.BONE, (54, -34, -42), (11, 15, 17)),  # mastoid
)


def _draw_face(canvas: _Canvas, rough: Array) -> None:
    """Orbits, sinuses, nasal cavity, jaw and skull base, as seen at the lower edge of a brain scan."""
    canvas.ellipsoid(Tissue.BONE, (0, 40, -44), (42, 36, 30), opacity=0.4)
    canvas.ellipsoid(Tissue.BONE, (0, 52, -78), (27, 34, 3.5))
    canvas.tube(Tissue.MARROW, (0, -2, -36, 5), (0, -20, -58, 4))
    for centre, (rx, ry, rz) in SINUSES:
        canvas.ellipsoid(Tissue.MUCOSA, centre, (rx + 1, ry + 1, rz + 1))
        canvas.ellipsoid(Tissue.AIR, centre, (rx, ry, rz))
    for tissue, centre, radii in AIR_CELLS:
        box = canvas.box(*([c + k * (r + 2) for c, r in zip(centre, radii, strict=True)] for k in (-1, 1)))
        inside = canvas.within(_ellipsoid(canvas.side[box], canvas.y[box], canvas.z[box], centre, radii))
        canvas.paint(tissue, inside, box)
        canvas.paint(Tissue.AIR, inside * np.clip(0.6 - rough[box], 0, 1), box)
    canvas.tube(Tissue.BONE, (32, 64, -29, 17), (15, 20, -24, 8))
    canvas.tube(Tissue.FAT, (32, 66, -29, 15.5), (15, 20, -24, 6))
    for dx, dz in ((9, 0), (-9, 0), (0, 9), (0, -9)):  # the four rectus muscles
        canvas.tube(Tissue.MUSCLE, (31 + dx, 58, -29 + dz, 1.8), (25 + dx * 0.8, 40, -26 + dz * 0.8, 2.2),
                    (16, 22, -24, 1.5))
    canvas.tube(Tissue.WHITE, (31, 56, -29, 2), (24, 38, -26, 2), (12, 14, -21, 2))
    canvas.ellipsoid(Tissue.MUSCLE, (32, 68, -29), (12.5, 12.5, 12.5))
    canvas.ellipsoid(Tissue.VITREOUS, (32, 68, -29), (11.3, 11.3, 11.3))
    canvas.ellipsoid(Tissue.LENS, (32, 76.5, -29), (4.6, 2.2, 4.6))
    canvas.tube(Tissue.BONE, (52, 8, -44, 5), (50, 10, -100, 6))
    canvas.tube(Tissue.MARROW, (52, 8, -46, 2.5), (50, 10, -100, 3.5))
    canvas.tube(Tissue.AIR, (0, 16, -52, 7), (0, 2, -72, 8), (0, -6, -100, 8))
    canvas.tube(Tissue.BONE, (0, -22, -72, 9), (0, -28, -110, 10))
    canvas.tube(Tissue.MARROW, (0, -22, -72, 6.5), (0, -28, -110, 8))
# fmt: on


# --- Lesions ---------------------------------------------------------------------------------------------


class _Glioma(NamedTuple):
    centre: Point
    """(x, y, z) mm in head coordinates; the sign of x is its side."""
    radius_mm: float
    """Of the enhancing rim."""
    lobule: Point
    """Where a second, smaller lobule sits, mm from the centre."""
    oedema_mm: float
    """Reach of the oedema past the rim."""
    rim_mm: float


LOBES: tuple[Point, ...] = ((28, 34, 22), (30, -46, 34), (46, -18, -18), (27, -68, 14), (36, 4, 30))


def _choose_glioma(rng: np.random.Generator) -> _Glioma:
    x, y, z = (np.array(LOBES[rng.integers(len(LOBES))]) + rng.uniform(-6, 6, 3)).tolist()
    side = float(rng.choice([-1.0, 1.0]))
    radius, oedema, rim = rng.uniform([10, 10, 3.0], [18, 24, 7.0]).tolist()
    a, b, c = (rng.uniform(-0.9, 0.9, 3) * radius).tolist()
    return _Glioma((side * x, y, z), radius, (a, b, c), oedema, rim)


def _push(coordinates: Array, cavity: Array, glioma: _Glioma) -> Array:
    """Mass effect: anatomy gives way around the tumour, less and less towards the skull."""
    offset = coordinates - np.array(glioma.centre, np.float32)[:, None, None, None]
    near = np.exp(-(offset * offset).sum(0) / np.float32((2.0 * glioma.radius_mm) ** 2))
    return np.asarray(coordinates - 0.3 * near * np.clip(-cavity / 25, 0, 1) * offset, np.float32)


def _draw_glioma(
    rng: np.random.Generator, canvas: _Canvas, coordinates: Array, cerebrum: Array, glioma: _Glioma
) -> None:
    """Necrotic core in an uneven enhancing rim, in oedema that runs along white matter and spares cortex."""
    offset = coordinates - np.array(glioma.centre, np.float32)[:, None, None, None]
    coarse, fine = _noise(rng, canvas.axes, 15.0), _noise(rng, canvas.axes, 6.0)
    lobule = offset - np.array(glioma.lobule, np.float32)[:, None, None, None]
    distance = _blend(
        np.sqrt((offset * offset).sum(0)) - np.float32(glioma.radius_mm),
        np.sqrt((lobule * lobule).sum(0)) - np.float32(0.6 * glioma.radius_mm),
        0.5 * glioma.radius_mm,
    )
    distance += 2.2 * coarse + 1.1 * fine
    white = canvas.fractions[Tissue.WHITE] + 0.35 * canvas.fractions[Tissue.DEEP_GREY]
    white += 0.12 * canvas.fractions[Tissue.GREY]
    across = np.clip(-canvas.x * np.float32(np.sign(glioma.centre[0])), 0, None)  # past the midline
    spread = 0.5 - (distance + 2 * coarse + 2 * fine + across - glioma.oedema_mm) / 8
    canvas.paint(Tissue.OEDEMA, np.clip(spread, 0, 1) * white * np.clip(0.9 + 0.1 * fine, 0, 1))
    inside = canvas.within(cerebrum + 1.5)
    canvas.paint(Tissue.ENHANCING, canvas.within(distance) * inside)
    rim = np.clip(glioma.rim_mm + 1.8 * fine + 1.2 * coarse, 0.5, None)
    canvas.paint(Tissue.NECROSIS, canvas.within(distance + rim) * inside)


def _draw_hyperintensities(rng: np.random.Generator, canvas: _Canvas) -> None:
    """A few small spots of gliosis in deep white matter, and caps on the frontal horns."""
    for x, y, z in rng.uniform([16, -60, 18], [38, 40, 42], (int(rng.integers(3, 12)), 3)):
        side, radii = rng.choice([-1.0, 1.0]), rng.uniform(1.5, 4.0, 3)
        box = canvas.box([x - 6, y - 6, z - 6], [x + 6, y + 6, z + 6])
        distance = _ellipsoid(side * canvas.x[box], canvas.y[box], canvas.z[box], (x, y, z), tuple(radii))
        canvas.paint(Tissue.GLIOSIS, canvas.within(distance) * canvas.fractions[Tissue.WHITE][box], box)
    canvas.ellipsoid(Tissue.GLIOSIS, (15, 38, 6), (3.5, 4, 5), opacity=0.6)


# --- Signal ----------------------------------------------------------------------------------------------


def spin_echo(tissue: Relaxation, tr: float, te: float) -> float:
    """S = PD (1 - e^(-TR/T1)) e^(-TE/T2), times in ms (Bernstein et al. 2004, ch. 14)."""
    return tissue.density * (1 - exp(-tr / tissue.t1)) * exp(-te / tissue.t2)


def spoiled_gradient_echo(tissue: Relaxation, tr: float, te: float, flip_degrees: float) -> float:
    """S = PD sin a (1 - E1) / (1 - cos a E1) e^(-TE/T2*), E1 = e^(-TR/T1), with T2* taken as T2 (Ernst)."""
    e1, flip = exp(-tr / tissue.t1), radians(flip_degrees)
    return tissue.density * sin(flip) * (1 - e1) / (1 - cos(flip) * e1) * exp(-te / tissue.t2)


def inversion_recovery(tissue: Relaxation, tr: float, te: float, ti: float) -> float:
    """S = PD |1 - 2 e^(-TI/T1) + e^(-TR/T1)| e^(-TE/T2), magnitude image (Hajnal et al. 1992)."""
    recovered = abs(1 - 2 * exp(-ti / tissue.t1) + exp(-tr / tissue.t1))
    return tissue.density * recovered * exp(-te / tissue.t2)


def enhanced(tissue: Relaxation) -> Relaxation:
    """The tissue after contrast agent: 1/T1' = 1/T1 + r1 C."""
    return tissue._replace(t1=1 / (1 / tissue.t1 + GADOLINIUM_R1 * tissue.gadolinium / 1000))


def _relaxation_at(rng: np.random.Generator, field_t: float) -> list[Relaxation]:
    """The tissue table at another field strength (T1 ~ B0^0.38 but for fluids; Rooney 2007), jittered."""
    factor = (field_t / 3) ** 0.38
    jitter = np.exp(rng.normal(0, [0.03, 0.05, 0.015, 0.2], (len(Tissue), 4)))
    return [
        Relaxation(t1 * (1 if t1 >= 4000 else factor) * a, t2 * b, density * c, gadolinium * d)
        for (t1, t2, density, gadolinium), (a, b, c, d) in zip(
            (RELAXATION[tissue] for tissue in Tissue), jitter.tolist(), strict=True
        )
    ]


def _signals(rng: np.random.Generator) -> dict[str, list[float]]:
    """One scanner and protocol: for every contrast, the signal of every tissue."""
    table = _relaxation_at(rng, float(rng.choice([1.5, 3.0])))
    gradient_echo = rng.random() < 0.6
    tr, te, flip = rng.uniform([18, 2.5, 22], [28, 5, 30])
    tr_se, te_se = rng.uniform([450, 9], [600, 14])
    tr_t2, te_t2 = rng.uniform([4200, 85], [6000, 105])
    tr_ir, te_ir, miss = rng.uniform([8500, 95, 0.98], [10500, 130, 1.02])
    csf = table[Tissue.CSF].t1
    null = csf * log(2 / (1 + exp(-tr_ir / csf)))  # the TI at which the CSF's magnetisation crosses zero

    def t1_weighted(tissue: Relaxation) -> float:
        if gradient_echo:
            return spoiled_gradient_echo(tissue, tr, te, flip)
        return spin_echo(tissue, tr_se, te_se)

    return {
        "t1n": [t1_weighted(tissue) for tissue in table],
        "t1c": [t1_weighted(enhanced(tissue)) for tissue in table],
        "t2w": [spin_echo(tissue, tr_t2, te_t2) for tissue in table],
        "t2f": [inversion_recovery(tissue, tr_ir, te_ir, miss * null) for tissue in table],
    }


def _acquire(rng: np.random.Generator, signal: Array, white: float, coil: Array, own_bias: Array) -> Array:
    """What the scanner stores of an ideal signal: point spread, bias field, Rician noise, arbitrary scale."""
    image = ndimage.gaussian_filter(signal, rng.uniform(0.25, 0.5))
    image *= np.exp(rng.uniform(0.05, 0.14) * coil + 0.05 * own_bias)
    sigma = np.float32(white * rng.uniform(0.012, 0.035))
    real, imaginary = sigma * rng.standard_normal((2, *signal.shape), dtype=np.float32)
    scale = np.exp(rng.uniform(log(150), log(2500))) / white
    return np.asarray(np.hypot(image + real, imaginary) * scale, np.float32)


# --- Patients --------------------------------------------------------------------------------------------


def _axes(shape: Sequence[int], spacing_mm: Sequence[float]) -> list[NDArray[np.float64]]:
    """Voxel centres in mm along each axis."""
    return [
        np.asarray(centre + step * (np.arange(size) - (size - 1) / 2), np.float64)
        for size, step, centre in zip(shape, spacing_mm, FIELD_OF_VIEW_CENTRE_MM, strict=True)
    ]


def _pose(rng: np.random.Generator, axes: Sequence[NDArray[np.float64]]) -> Array:
    """Head coordinates of every voxel: this patient's size, tilt and smooth deviation from the template."""
    scale = rng.normal(0.97, 0.025) * np.exp(rng.normal(0, 0.02, 3))
    pitch, yaw, roll = rng.normal(0, 0.035, 3)
    tilt = np.array([[1, -yaw, roll], [yaw, 1, -pitch], [-roll, pitch, 1]])  # small angles
    matrix = (tilt / scale).astype(np.float32)
    x, y, z = (axis.astype(np.float32) for axis in axes)
    bend = np.stack([_noise(rng, axes, grain) for grain in (45.0, 45.0, 45.0)]) * np.float32(1.6)
    grid = matrix[:, 0, None, None, None] * x[:, None, None] + matrix[:, 1, None, None, None] * y[:, None]
    return np.asarray(grid + matrix[:, 2, None, None, None] * z + bend, np.float32)


def _check_grid(shape: Sequence[int], spacing_mm: Sequence[float]) -> None:
    if len(shape) != 3 or min(shape) < SMALLEST_SIDE:
        raise ConfigError(f"phantom shape: got {tuple(shape)}, wanted three sides of >= {SMALLEST_SIDE} voxels.")
    if len(spacing_mm) != 3 or not all(0 < step <= 10 for step in spacing_mm):
        raise ConfigError(f"phantom spacing: got {tuple(spacing_mm)}, wanted three steps of 0 to 10 mm.")


def _check_seed(seed: int) -> None:
    if seed < 0:
        raise ConfigError(f"phantom seed: got {seed}, wanted 0 or more.")


def make_phantom(
    seed: int,
    *,
    shape: tuple[int, int, int] = (96, 112, 80),
    spacing_mm: tuple[float, float, float] = (1.9, 1.9, 2.2),
    skull: bool = True,
    lesion: bool | None = None,
) -> Phantom:
    """One patient: anatomy, lesion and scanner from the seed, on a grid of `shape` voxels.

    The same seed is the same patient on any grid; a grid that is too small for a head (some
    180 x 210 x 175 mm) sees the middle of one.

    Args:
        seed: The patient.
        shape: Voxels along x, y, z; 32 or more each.
        spacing_mm: Voxel size along x, y, z.
        skull: False strips all but the brain, the background being exactly 0.
        lesion: Whether there is a tumour; None leaves it to the seed.

    Raises:
        ConfigError: A seed, shape or spacing that makes no sense.
    """
    _check_grid(shape, spacing_mm)
    _check_seed(seed)
    children = np.random.SeedSequence(seed).spawn(4)
    body, tumour, scanner, receiver = (np.random.default_rng(child) for child in children)
    axes = _axes(shape, spacing_mm)
    atrophy = float(body.uniform(0, 1))
    coordinates = _pose(body, axes)
    canvas = _Canvas(coordinates, axes, spacing_mm)
    surfaces = _surfaces(canvas)
    _draw_skull(body, canvas, surfaces)

    drawn = tumour.random() < LESION_RATE
    glioma = _choose_glioma(tumour) if (drawn if lesion is None else lesion) else None
    if glioma:
        canvas.place(_push(coordinates, surfaces.cavity, glioma))
    _draw_cerebrum(body, canvas, surfaces.cerebrum, atrophy)
    _draw_deep(canvas, atrophy)
    _draw_hindbrain(body, canvas, surfaces)
    _draw_vessels(body, canvas, surfaces)
    if tumour.random() < 0.3 + 0.5 * atrophy:
        _draw_hyperintensities(tumour, canvas)
    if glioma:
        _draw_glioma(tumour, canvas, coordinates, surfaces.cerebrum, glioma)

    tissues = canvas.fractions.argmax(0).astype(np.uint8)
    labels = np.zeros_like(tissues)
    for tissue, label in BRATS_LABEL.items():
        labels[tissues == tissue] = label
    images = _scan(scanner, receiver, canvas)
    if not skull:
        brain = _blend(_blend(surfaces.cerebrum, surfaces.brainstem, 24), surfaces.cerebellum, 24)
        outside = (brain > 1) | (surfaces.cavity > -0.5) | (canvas.z < -66)
        for volume in (*images.values(), labels, tissues):
            volume[outside] = 0
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    return Phantom(images, labels, tissues, affine)


def _scan(scanner: np.random.Generator, receiver: np.random.Generator, canvas: _Canvas) -> dict[str, Array]:
    """Run the four sequences of one scanner over what the canvas holds."""
    signals = _signals(scanner)
    table = np.array([signals[modality] for modality in MODALITIES], np.float32)
    ideal = np.tensordot(table, canvas.fractions, axes=1)  # (4, X, Y, Z)
    ideal *= 1 + 0.03 * _noise(scanner, canvas.axes, 5.0)  # no tissue is all of one kind
    coil = _noise(scanner, canvas.axes, 75.0)
    return {
        modality: _acquire(receiver, signal, signals[modality][Tissue.WHITE], coil, _noise(scanner, canvas.axes, 75.0))
        for modality, signal in zip(MODALITIES, ideal, strict=True)
    }


def _write_volume(path: Path, volume: NDArray[np.generic], affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(volume, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine, code=1)
    image.header.set_xyzt_units("mm")
    image.header["descrip"] = b"crossmr phantom"
    nib.save(image, path)


def write_cohort(
    folder: Path,
    patients: int,
    *,
    seed: int = 0,
    missing: Mapping[int, Sequence[str]] | None = None,
    **kwargs: Any,
) -> list[str]:
    """Write `patients` studies in the layout of BraTS >= 2023, and return their names.

    Each is PHANTOM-00003-000/PHANTOM-00003-000-{t1n,t1c,t2w,t2f,seg}.nii.gz, images as int16 and the
    segmentation as uint8. Patient i depends on (seed, i) alone, not on how many there are.

    Args:
        folder: Made where it does not exist.
        patients: How many, 1 or more.
        seed: The cohort.
        missing: Modalities to leave out, by patient index.
        **kwargs: The options of `make_phantom`.

    Raises:
        ConfigError: Fewer than one patient, or a missing modality or patient that there is not.
    """
    missing = missing or {}
    _check_seed(seed)
    if patients < 1:
        raise ConfigError(f"phantom patients: got {patients}, wanted 1 or more.")
    for index, modalities in missing.items():
        unknown = sorted(set(modalities) - set(MODALITIES))
        if unknown:
            raise ConfigError(f"phantom missing: got {unknown} for patient {index}, wanted some of {MODALITIES}.")
        if not 0 <= index < patients:
            raise ConfigError(f"phantom missing: got patient {index}, wanted 0 to {patients - 1}.")
    names = []
    for index in range(patients):
        name = f"PHANTOM-{index:05d}-000"
        own_seed = np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0]
        phantom = make_phantom(int(own_seed), **kwargs)
        (folder / name).mkdir(parents=True, exist_ok=True)
        for modality, image in phantom.images.items():
            if modality not in missing.get(index, ()):
                stored = np.rint(np.clip(image, 0, 32767)).astype(np.int16)
                _write_volume(folder / name / f"{name}-{modality}.nii.gz", stored, phantom.affine)
        _write_volume(folder / name / f"{name}-seg.nii.gz", phantom.labels, phantom.affine)
        names.append(name)
    return names
