"""Anatomy: of which tissues every voxel of a head is made.

Structures are implicit surfaces in head coordinates (mm, RAS+, origin near the anterior commissure), drawn
tissue over tissue with soft edges, so that a voxel holds fractions of tissues as a real one does. The small
ones are rows of tables. The cortex folds because sulci are the zero-level sheets of a random field that varies
along the surface and hardly in depth; grey matter is whatever lies within a ribbon's thickness of that
surface. All is in mm, so that one seed is one patient at any resolution.
"""

from enum import IntEnum
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from crossmr.phantom.canvas import Array, Axes, Canvas, Row, blend, distance_to, noise

Tissue = IntEnum(
    "Tissue",
    "AIR CSF GREY WHITE DEEP_GREY PALLIDUM CHOROID DURA VESSEL BONE MARROW FAT MUSCLE SKIN MUCOSA GLIOSIS "
    "OEDEMA ENHANCING NECROSIS",
    start=0,
)
"""What a voxel can be made of; an eye's vitreous counts as CSF."""

BRATS_LABEL = {Tissue.NECROSIS: 1, Tissue.OEDEMA: 2, Tissue.ENHANCING: 3}
"""The segmentation of BraTS >= 2023; 0 is everything else."""


# --- Outlines ------------------------------------------------------------------------------------------------

BRAINSTEM = ((0, -24, -8, 14), (0, -22, -18, 13), (0, -23, -30, 15), (0, -31, -46, 9), (0, -42, -66, 6.5))
CORD = (0, -50, -120, 6)


class _Outlines(NamedTuple):
    """Signed distances in mm, negative inside, each (X, Y, Z); before folding."""

    cerebrum: Array
    cerebellum: Array
    cavity: Array
    """The inside of the skull."""
    head: Array


def _outlines(s: Array, y: Array, z: Array) -> _Outlines:
    egg = s * (1 + np.float32(0.0016) * (y + 20))  # narrower in front than behind
    body = distance_to(((0, -17, 14), (66, 86, 60)), egg, y, z)
    front = y + 0.9 * np.clip(s - 3, 0, 18) * (y > -20)  # the cistern above the sella comes to a point
    floor = np.interp(front, [-100, -50, -36, 4, 22, 70], [-16, 3, -12, -14, -24, -20]).astype(np.float32)
    floor -= np.float32(0.28) * np.clip(s - 10, 0, 40) * np.clip((-30 - y) / 30, 0, 1)  # the tentorium slopes
    temporal = distance_to(((40, -14, -20), (28, 40, 21)), s, y + 0.25 * (z + 20), z)
    uncus = distance_to(((17, 0, -18), (8, 8, 9)), s, y, z)
    cerebrum = blend(-blend(-body, z - floor, 4), blend(temporal, uncus, 6), 9)
    lobes = distance_to(((22, -64, -33), (31, 30, 27)), s, y, z)
    cerebellum = blend(lobes, distance_to(((0, -63, -28), (14, 25, 27)), s, y, z), 4)
    cerebellum = -blend(-cerebellum, floor - 2.2 - z, 2)
    fossa = blend(cerebellum - 2, distance_to((*BRAINSTEM, CORD), s, y, z) - 3, 14)
    suprasellar = distance_to(((0, -2, -16), (18, 22, 13)), s, y, z)
    quadrigeminal = distance_to(((0, -54, -6), (24, 18, 9)), s, y, z)
    cavity = blend(blend(cerebrum - 2.2, fossa, 10), np.minimum(suprasellar, quadrigeminal), 6)
    nose = distance_to(((0, 82, -28, 8), (0, 97, -55, 12)), s, y, z)
    face = blend(distance_to(((0, 24, -58), (67, 66, 68)), s, y, z), nose, 14)
    neck = distance_to(((0, -40, -50, 62), (0, -45, -130, 58)), s, y, z)
    return _Outlines(cerebrum, cerebellum, cavity, blend(blend(cavity - 12.5, face, 30), neck, 40))


# --- Structures ----------------------------------------------------------------------------------------------

# fmt: off
MUSCLES: tuple[Row, ...] = (
    (Tissue.MUSCLE, 0.9, ((62, 26, -12), (9, 28, 34))),  # temporalis
    (Tissue.MUSCLE, 0.9, ((57, 26, -76), (8, 17, 28))),  # masseter
    (Tissue.MUSCLE, 0.9, ((37, 16, -66), (11, 15, 22))),  # pterygoids
    (Tissue.MUSCLE, 0.9, ((56, -42, -86), (9, 13, 32))),  # sternocleidomastoid
    (Tissue.MUSCLE, 0.9, ((20, -80, -84), (18, 13, 34))),  # neck
)
SINUSES: tuple[Row, ...] = (
    (Tissue.BONE, 0.4, ((0, 40, -44), (42, 36, 30))),
    (Tissue.BONE, 1, ((0, 52, -78), (27, 34, 3.5))),  # palate
    (Tissue.MARROW, 1, ((0, -2, -36, 5), (0, -20, -58, 4))),  # clivus
    (Tissue.MUCOSA, 1, ((28, 44, -56), (15, 17, 16))), (Tissue.AIR, 1, ((28, 44, -56), (14, 16, 15))),  # maxillary
    (Tissue.MUCOSA, 1, ((7, 12, -33), (9, 12, 9))), (Tissue.AIR, 1, ((7, 12, -33), (8, 11, 8))),  # sphenoid
    (Tissue.MUCOSA, 1, ((9, 76, 8), (12, 5, 10))), (Tissue.AIR, 1, ((9, 76, 8), (11, 4, 9))),  # frontal
)
AIR_CELLS: tuple[Row, ...] = (
    (Tissue.MUCOSA, 1, ((0, 52, -56), (12, 34, 18))),  # nasal cavity
    (Tissue.MUCOSA, 1, ((7, 46, -30), (7, 20, 9))),  # ethmoid
    (Tissue.BONE, 1, ((54, -34, -42), (11, 15, 17))),  # mastoid
)
FACE: tuple[Row, ...] = (
    (Tissue.BONE, 1, ((32, 64, -29, 17), (15, 20, -24, 8))),  # orbit
    (Tissue.FAT, 1, ((32, 66, -29, 15.5), (15, 20, -24, 6))),
    (Tissue.MUSCLE, 1, ((40, 58, -29, 1.8), (32, 40, -26, 2.2), (16, 22, -24, 1.5))),  # the rectus muscles
    (Tissue.MUSCLE, 1, ((22, 58, -29, 1.8), (18, 40, -26, 2.2), (16, 22, -24, 1.5))),
    (Tissue.WHITE, 1, ((31, 56, -29, 2), (24, 38, -26, 2), (12, 14, -21, 2))),  # optic nerve
    (Tissue.MUSCLE, 1, ((32, 68, -29), (12.5, 12.5, 12.5))),  # sclera
    (Tissue.CSF, 1, ((32, 68, -29), (11.3, 11.3, 11.3))),
    (Tissue.BONE, 1, ((52, 8, -44, 5), (50, 10, -100, 6))),  # jaw
    (Tissue.MARROW, 1, ((52, 8, -46, 2.5), (50, 10, -100, 3.5))),
    (Tissue.AIR, 1, ((0, 16, -52, 7), (0, 2, -72, 8), (0, -6, -100, 8))),  # pharynx
    (Tissue.BONE, 1, ((0, -22, -72, 9), (0, -28, -110, 10))),  # cervical spine
    (Tissue.MARROW, 1, ((0, -22, -72, 6.5), (0, -28, -110, 8))),
)
HINDBRAIN: tuple[Row, ...] = (
    (Tissue.WHITE, 1, (*BRAINSTEM, CORD)),
    (Tissue.WHITE, 1, ((12, -28, -32, 7), (20, -48, -36, 7))),  # cerebellar peduncle
    (Tissue.WHITE, 1, ((10, -14, 0, 7), (8, -18, -14, 6))),  # cerebral peduncle
    (Tissue.CSF, 1, ((0, -32, -12, 1), (0, -37, -24, 2.2), (0, -43, -34, 5.5), (0, -43, -50, 2))),  # 4th ventricle
)
VESSELS: tuple[Row, ...] = (
    (Tissue.VESSEL, 1, ((0, 45, 64, 1), (0, 14, 74, 1.5), (0, -22, 76, 2.5), (0, -55, 67, 3), (0, -82, 48, 3),
                        (0, -100, 20, 3.5), (0, -103, -10, 4))),  # superior sagittal sinus
    (Tissue.VESSEL, 1, ((0, -103, -10, 4), (16, -100, -13, 3.5), (32, -90, -17, 3.5), (48, -66, -21, 3.5),
                        (51, -48, -28, 3.5), (47, -40, -42, 3.5))),  # transverse and sigmoid sinus
    (Tissue.VESSEL, 1, ((0, -42, 4, 2), (0, -60, 3, 2), (0, -100, -8, 2.5))),  # straight sinus
    (Tissue.VESSEL, 1, ((14, 2, -46, 2.6), (12, 6, -24, 2.2), (13, 2, -14, 1.7), (22, 6, -11, 1.2),
                        (30, 1, -8, 1.1), (38, 5, -3, 0.9))),  # internal carotid, middle cerebral artery
    (Tissue.VESSEL, 1, ((0, -4, -40, 1.6), (0, -7, -20, 1.6), (12, -12, -15, 1), (20, -24, -11, 0.9))),  # basilar
)


def _deep(w: float) -> tuple[Row, ...]:
    """Callosum, ventricles `w` times as wide as in the young, grey nuclei: the middle of the cerebrum."""
    callosum = [((x, 20, -4 + x / 5, 2.5), (x, 32, 5 + x / 5, 4.5), (x, 24, 20 + x / 5, 3.5),
                 (x, -4, 28 + x / 5, 3.2), (x, -28, 24 + x / 5, 3.5), (x, -40, 12 + x / 5, 5)) for x in (0, 9, 17)]
    return (
        (Tissue.WHITE, 1, ((0, -4, 8), (30, 32, 15))),
        (Tissue.GREY, 1, ((0, 4, -12), (9, 12, 8))),  # hypothalamus
        *((Tissue.WHITE, 1, tube) for tube in callosum),  # a wide arc: three tubes side by side
        (Tissue.CSF, 1, ((18, 36, 4, 1.2 * w), (9, 27, 8, 4.5 * w), (6, 6, 16, 5.2 * w), (7, -14, 19, 5.2 * w),
                         (20, -34, 16, 6.5 * w), (27, -46, 8, 6 * w), (26, -66, 6, 2.5 * w))),  # lateral ventricle
        (Tissue.CSF, 1, ((27, -44, 6, 5 * w), (35, -26, -11, 2.2 * w), (31, -10, -19, 2.2 * w))),  # temporal horn
        (Tissue.CHOROID, 1, ((14, -22, 15, 1), (24, -40, 9, 2.2), (29, -38, 2, 1.2))),
        (Tissue.WHITE, 1, ((0, 24, 9, 0.9), (0, 0, 17, 0.9), (0, -14, 20, 0.8))),  # septum
        (Tissue.DEEP_GREY, 0.7, ((12, -18, 6), (10.5, 15, 9.5))),  # thalamus
        (Tissue.DEEP_GREY, 1, ((13, 18, 1, 6.5), (15.5, 4, 13, 5), (19, -16, 21, 2.5), (27, -34, 16, 1.5))),  # caudate
        (Tissue.DEEP_GREY, 1, ((25.5, 4, 1), (5.5, 17, 11))),  # putamen
        (Tissue.PALLIDUM, 1, ((19, -3, -1), (4.5, 9.5, 6.5))),
        (Tissue.GREY, 1, ((23, -5, -21, 6.5), (25, -20, -15, 5), (22, -36, -3, 3.5))),  # amygdala, hippocampus
        (Tissue.CSF, 1, ((0, -12, -3), (2.3 * w, 14, 10))),  # third ventricle
    )
# fmt: on


def _draw_skull(rng: np.random.Generator, canvas: Canvas, cavity: Array, head: Array) -> None:
    """Everything outside the brain: skin, fat, muscle, bone with its marrow, orbits, airways; then CSF."""
    rough, coarse = noise(rng, canvas.axes, 6.5), noise(rng, canvas.axes, 26.0)
    canvas.paint(Tissue.SKIN, canvas.within(head))
    canvas.paint(Tissue.FAT, canvas.within(head + 1.8))
    low = np.clip((-18 - canvas.z) / 14, 0, 1)  # flesh below the skull base
    marbled = np.clip(0.75 + 0.2 * rough + 0.2 * coarse, 0.35, 0.95)
    canvas.paint(Tissue.MUSCLE, canvas.within(head + 6 + 1.5 * coarse) * low * marbled)
    canvas.draw(MUSCLES)
    thick = 6.2 + 0.7 * coarse
    canvas.paint(Tissue.BONE, canvas.within(cavity - thick))
    diploe = np.abs(cavity - thick / 2 - 0.4)
    canvas.paint(Tissue.MARROW, canvas.sheet(diploe, np.clip(1.0 + 0.5 * coarse, 0.1, 2.2)))
    canvas.draw((*SINUSES, *AIR_CELLS))
    canvas.draw([(Tissue.AIR, 1, shape) for _, _, shape in AIR_CELLS], np.clip(0.6 - rough, 0, 1))
    canvas.draw(FACE)
    canvas.paint(Tissue.AIR, 1 - canvas.within(head))
    canvas.paint(Tissue.CSF, canvas.within(cavity))


def _seen_from_the_axis(rng: np.random.Generator, canvas: Canvas, shell: NDArray[np.bool_]) -> Array:
    """Where the ray to each voxel, from the long axis of its hemisphere or temporal lobe, meets a shell round it.

    Bent a little, so that sulci are not straight: (3, voxels) in mm.
    """
    x, y, z = canvas.x[shell], canvas.y[shell], canvas.z[shell]
    temporal = np.clip(0.4 - (z + 6 + 0.45 * y) / 12, 0, 1) * np.clip((y + 55) / 20, 0, 1)
    axis = np.stack([np.sign(x) * (28 + 10 * temporal), -14 + 52 * np.tanh((y + 14) / 70), 8 - 28 * temporal])
    bend = np.stack([noise(rng, canvas.axes, 13.0)[shell] for _ in range(3)]) * np.float32(2.5)
    reach = np.stack([x, y, z]) - axis + bend
    radius = np.sqrt((reach * reach).sum(0)) + np.float32(1e-3)
    return np.asarray(axis + reach * (34 - 24 * temporal + (0.25 + 0.3 * temporal) * radius) / radius, np.float32)


def _sulci(rng: np.random.Generator, canvas: Canvas, shell: NDArray[np.bool_], at: Array, grain_mm: float) -> Array:
    """Distance in mm to the zero sheets of a random field, taken for each voxel of the shell `at` its place."""
    grid = [np.arange(-66, 67, 3.0), np.arange(-90, 91, 3.0), np.arange(-90, 91, 3.0)]
    own, shared = noise(rng, grid, grain_mm), noise(rng, grid, grain_mm)
    field = 0.75 * own + 0.6 * (shared + shared[::-1])  # the two hemispheres are alike, not equal
    value = np.full(shell.shape, 9, np.float32)
    value[shell] = ndimage.map_coordinates(field, (at + np.array([[66], [90], [90]])) / 3, order=1, mode="nearest")
    slope = np.sqrt(sum(g * g for g in np.gradient(value, *canvas.steps)))
    return np.asarray(np.abs(value) / np.maximum(slope, 0.02), np.float32)


def _draw_cerebrum(rng: np.random.Generator, canvas: Canvas, cerebrum: Array, atrophy: float) -> None:
    """The folded cortex on its white matter; fills the interhemispheric and Sylvian fissures with CSF."""
    s, y, z = canvas.side, canvas.y, canvas.z
    outline = np.maximum(cerebrum, np.float32(0.5 + 0.6 * atrophy) - s)
    depth = -outline
    patchy = noise(rng, canvas.axes, 16.0)
    sylvian_plane = np.abs(z - (-6 - 0.45 * y) - 2.5 * patchy + 0.3 * (s - 50)) * np.float32(0.87)
    sylvian = np.hypot(sylvian_plane, np.clip(np.abs(y + 10) - 30, 0, None) + np.clip(37 - s, 0, None))
    around = np.clip(distance_to(((38, 1, 0), (99, 19, 11)), s, y, z), 0, None)
    insula = np.hypot(s - (38 + 0.004 * (y - 2) ** 2), around)
    shell = (depth > -8) & (depth < 34)
    at = _seen_from_the_axis(rng, canvas, shell)
    coarse = np.hypot(_sulci(rng, canvas, shell, at, 7.8), np.clip(depth - 21 - 6 * patchy, 0, None))
    fine = np.hypot(_sulci(rng, canvas, shell, at, 5.5), np.clip(depth - 9 - 5 * patchy, 0, None))
    pial, folds = depth, np.zeros_like(depth)
    for distance, young, aged in ((coarse, 0.45, 0.45), (fine, 0.3, 0.35), (sylvian, 0.5, 0.7), (insula, 0.5, 0.7)):
        half_mm = young + aged * atrophy
        folds = np.maximum(folds, canvas.sheet(distance, half_mm))
        pial = np.minimum(pial, distance - half_mm)
    inside = canvas.within(outline)
    canvas.paint(Tissue.GREY, inside)
    canvas.paint(Tissue.WHITE, inside * canvas.within(2.9 + 0.3 * patchy - pial))
    canvas.paint(Tissue.CSF, inside * folds)


def _draw_cerebellum(rng: np.random.Generator, canvas: Canvas, cerebellum: Array) -> None:
    """Folia fanning out from the peduncles."""
    s, y, z = canvas.side, canvas.y, canvas.z
    spacing = np.float32(0.21)  # radians between folia
    fan = np.arctan2(z + 36 + 0.15 * s, -(y + 38)) + np.float32(0.05) * noise(rng, canvas.axes, 12.0)
    folium = np.abs((fan / spacing) % 1 - np.float32(0.5)) * spacing * (np.hypot(y + 44, z + 36) + np.float32(6))
    furrow = np.hypot(folium, np.clip(-cerebellum - 11, 0, None))
    inside = canvas.within(cerebellum)
    canvas.paint(Tissue.GREY, inside)
    canvas.paint(Tissue.WHITE, inside * canvas.within(2.6 - np.minimum(-cerebellum, furrow)))
    canvas.paint(Tissue.CSF, inside * canvas.sheet(furrow, 0.35))


def _draw_vessels(rng: np.random.Generator, canvas: Canvas, outlines: _Outlines) -> None:
    """Falx, tentorium, dural sinuses, the great arteries, and small vessels wandering through the CSF."""
    cerebrum, cerebellum, cavity, _ = outlines
    gap = np.minimum(cerebellum - cerebrum, 9) + np.clip(canvas.y + 40, 0, None)
    tentorium = np.abs(gap) + np.clip(-cerebellum - 4, 0, None)
    canvas.paint(Tissue.DURA, canvas.sheet(tentorium, 0.4) * canvas.within(cavity))
    falx = canvas.side + np.clip(4 - cerebellum, 0, None) + np.clip(30 + cavity, 0, None) * 0.02
    csf = canvas.fractions[Tissue.CSF]
    canvas.paint(Tissue.DURA, canvas.sheet(falx, 0.5) * csf)
    canvas.paint(Tissue.DURA, canvas.sheet(np.abs(cavity), 0.5))
    wander = np.hypot(noise(rng, canvas.axes, 11.0), noise(rng, canvas.axes, 11.0))
    canvas.paint(Tissue.VESSEL, np.clip(1.2 - wander / 0.16, 0, 1) * csf * canvas.within(cavity))
    canvas.draw(VESSELS)


# --- Lesions -------------------------------------------------------------------------------------------------

LOBES = ((28, 34, 22), (30, -46, 34), (46, -18, -18), (27, -68, 14), (36, 4, 30))
"""Where gliomas sit, (|x|, y, z) mm."""


class _Glioma(NamedTuple):
    centre: NDArray[np.float64]
    """(x, y, z) mm in head coordinates; the sign of x is its side."""
    lobule: NDArray[np.float64]
    """Where a second, smaller lobule sits."""
    radius_mm: float
    """Of the enhancing rim."""
    oedema_mm: float
    """Reach of the oedema past the rim."""
    rim_mm: float


def _choose_glioma(rng: np.random.Generator) -> _Glioma:
    centre = (LOBES[rng.integers(len(LOBES))] + rng.uniform(-6, 6, 3)) * [rng.choice([-1, 1]), 1, 1]
    radius, oedema, rim = rng.uniform([10, 10, 3.0], [18, 24, 7.0]).tolist()
    return _Glioma(centre, centre + rng.uniform(-0.9, 0.9, 3) * radius, radius, oedema, rim)


def _push(coordinates: Array, cavity: Array, glioma: _Glioma) -> Array:
    """Mass effect: anatomy gives way around the tumour, less and less towards the skull."""
    offset = coordinates - glioma.centre.astype(np.float32)[:, None, None, None]
    near = np.exp(-(offset * offset).sum(0) / np.float32((2.0 * glioma.radius_mm) ** 2))
    return np.asarray(coordinates - 0.3 * near * np.clip(-cavity / 25, 0, 1) * offset, np.float32)


def _draw_glioma(
    rng: np.random.Generator, canvas: Canvas, coordinates: Array, cerebrum: Array, glioma: _Glioma
) -> None:
    """Necrotic core in an uneven enhancing rim, in oedema that runs along white matter and spares cortex."""
    coarse, fine = noise(rng, canvas.axes, 15.0), noise(rng, canvas.axes, 6.0)
    radius = glioma.radius_mm
    mass, lobule = (
        distance_to((tuple(centre), (size, size, size)), *coordinates)
        for centre, size in ((glioma.centre, radius), (glioma.lobule, 0.6 * radius))
    )
    distance = blend(mass, lobule, 0.5 * radius) + 2.2 * coarse + 1.1 * fine
    fractions = canvas.fractions
    white = fractions[Tissue.WHITE] + 0.35 * fractions[Tissue.DEEP_GREY] + 0.12 * fractions[Tissue.GREY]
    across = np.clip(-canvas.x * np.float32(np.sign(glioma.centre[0])), 0, None)  # past the midline
    spread = 0.5 - (distance + 2 * coarse + 2 * fine + across - glioma.oedema_mm) / 8
    canvas.paint(Tissue.OEDEMA, np.clip(spread, 0, 1) * white * np.clip(0.9 + 0.1 * fine, 0, 1))
    inside = canvas.within(cerebrum + 1.5)
    canvas.paint(Tissue.ENHANCING, canvas.within(distance) * inside)
    rim = np.clip(glioma.rim_mm + 1.8 * fine + 1.2 * coarse, 0.5, None)
    canvas.paint(Tissue.NECROSIS, canvas.within(distance + rim) * inside)


def _draw_gliosis(rng: np.random.Generator, canvas: Canvas, cerebrum: Array) -> None:
    """A few small spots in deep white matter, and caps on the frontal horns: what age leaves."""
    spots = np.clip(2 * noise(rng, canvas.axes, 7.0) - 5, 0, 1) * np.clip(-cerebrum / 6 - 2, 0, 1)
    canvas.paint(Tissue.GLIOSIS, spots * canvas.fractions[Tissue.WHITE])
    canvas.draw([(Tissue.GLIOSIS, 0.6, ((15, 38, 6), (3.5, 4, 5)))])


# --- The whole -----------------------------------------------------------------------------------------------


def _pose(rng: np.random.Generator, axes: Axes) -> Array:
    """Head coordinates of every voxel: this patient's size, tilt and smooth deformation of the template."""
    scale = rng.normal(0.97, 0.025) * np.exp(rng.normal(0, 0.02, 3))
    pitch, yaw, roll = rng.normal(0, 0.035, 3)
    tilt = np.array([[1, -yaw, roll], [yaw, 1, -pitch], [-roll, pitch, 1]])  # small angles
    a, b, c = (tilt / scale).astype(np.float32).T[..., None, None, None]
    x, y, z = np.ix_(*(axis.astype(np.float32) for axis in axes))
    bend = np.stack([noise(rng, axes, 45.0) for _ in range(3)]) * np.float32(1.6)
    return np.asarray(a * x + b * y + c * z + bend, np.float32)


def draw(
    body: np.random.Generator, tumour: np.random.Generator, axes: Axes, lesion: bool
) -> tuple[Array, NDArray[np.bool_]]:
    """Draw a head on a grid: fractions (tissues, X, Y, Z), and where the brain is, bool (X, Y, Z).

    The glioma has a random generator of its own: `lesion` changes no anatomy but what it pushes aside. The spots and
    caps of age are drawn by the same generator after it, so with a glioma they lie elsewhere, or there are none; some
    patients have them with it alone. The brain is what skull stripping leaves: the inside of the skull, down to the
    foramen magnum.
    """
    atrophy = float(body.uniform(0, 1))
    coordinates = _pose(body, axes)
    canvas = Canvas(len(Tissue), coordinates, axes)
    outlines = _outlines(canvas.side, canvas.y, canvas.z)
    _draw_skull(body, canvas, outlines.cavity, outlines.head)
    glioma = _choose_glioma(tumour) if lesion else None
    if glioma:
        canvas.place(_push(coordinates, outlines.cavity, glioma))
    _draw_cerebrum(body, canvas, outlines.cerebrum, atrophy)
    canvas.draw(_deep(0.8 + 0.65 * atrophy))
    _draw_cerebellum(body, canvas, outlines.cerebellum)
    canvas.draw(HINDBRAIN)
    _draw_vessels(body, canvas, outlines)
    if tumour.random() < 0.3 + 0.5 * atrophy:
        _draw_gliosis(tumour, canvas, outlines.cerebrum)
    if glioma:
        _draw_glioma(tumour, canvas, coordinates, outlines.cerebrum, glioma)
    return canvas.fractions, (outlines.cavity < -1) & (canvas.z > -66)
