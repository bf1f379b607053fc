"""Pictures for people: labelled rows of slices as PNG, and volumes cut in three as WebP, which reports label."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from crossmr.files import write_atomically

Array = npt.NDArray[np.float32]
Kind = Literal["acquired", "synthetic", "unguided twin", "truth", "error", "deviation"]
TILE = 192
"""Pixels of a tile's longer side."""
WHITE = 0.6
"""What is shown white: half of a head lies below .25."""
RESAMPLING = Image.Resampling.BILINEAR
BAND = 16
"""Pixels of the band above a tile that names it."""

COLUMN = 200
"""Pixels of a column of planes."""
GAP = 4
"""Pixels between planes."""
MAPS: tuple[Kind, ...] = ("error", "deviation")
"""What is shown in colours, not in greys."""
BRIGHTEST = 0.3
"""What is shown in the last of these."""
COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""From nothing to `BRIGHTEST`: rising in lightness, and told apart by colour-blind eyes."""


@dataclass(frozen=True, eq=False)
class Column:
    """A volume as it is shown: cut in three."""

    modality: str
    kind: Kind
    planes: tuple[Array, Array, Array]
    """Axial (Y, X), coronal (Z, X) and sagittal (Z, Y), in [0, 1]."""

    @classmethod
    def of(cls, modality: str, kind: Kind, volume: Array, at: Sequence[int]) -> "Column":
        """Cut a volume (Z, Y, X) at the voxel `at`."""
        z, y, x = at
        return cls(modality, kind, (volume[z].copy(), volume[:, y].copy(), volume[:, :, x].copy()))


def where_most(region: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    """The slice of each axis (Z, Y, X) that holds most of a region."""
    z, y, x = (int(region.sum(tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3))
    return z, y, x


def middle(region: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    """A voxel (Z, Y, X) in the middle of a head: through the ventricles, beside the midline."""
    counts = [region.sum(tuple({0, 1, 2} - {axis})).cumsum() for axis in range(3)]
    z, y, x = (int(np.searchsorted(c, share * c[-1])) for c, share in zip(counts, (0.6, 0.5, 0.45), strict=True))
    return z, y, x


def save_columns(path: Path, columns: Sequence[Column], spacing_mm: Sequence[float]) -> list[Mapping[str, str]]:
    """Write volumes side by side as one WebP, a column each, all on one scale; returns what each column is.

    `spacing_mm` is of (Z, Y, X). Shown as by `save_picture`; coronal and sagittal planes with the head's top up, the
    sagittal one with the face to the left. Errors and deviations are in colours.
    """
    depth, height, width = spacing_mm
    sides = [(height, width), (depth, width), (depth, height)]
    planes = columns[0].planes
    extents = [(a.shape[0] * mm[0], a.shape[1] * mm[1]) for a, mm in zip(planes, sides, strict=True)]
    factor = COLUMN / max(across for _, across in extents)
    sizes = [(max(1, round(across * factor)), max(1, round(up * factor))) for up, across in extents]
    total = sum(up for _, up in sizes) + GAP * (len(sizes) - 1)
    canvas = Image.new("RGB", (len(columns) * (COLUMN + GAP) - GAP, total))
    for number, column in enumerate(columns):
        top = 0
        for plane, (across, up) in zip(column.planes, sizes, strict=True):
            tile = _pixels(plane, BRIGHTEST if column.kind in MAPS else WHITE).resize((across, up), RESAMPLING)
            if column.kind in MAPS:
                tile.putpalette(_PALETTE)
            canvas.paste(tile.convert("RGB"), (number * (COLUMN + GAP) + (COLUMN - across) // 2, top))
            top += up + GAP
    buffer = BytesIO()
    canvas.save(buffer, format="WEBP", quality=85)
    write_atomically(path, buffer.getvalue())
    return [{"modality": column.modality, "kind": column.kind} for column in columns]


def save_picture(path: Path, rows: Sequence[Sequence[tuple[str, Array]]]) -> None:
    """Write rows of (title, slice) as one PNG.

    A slice is (Y, X) in [0, 1], of which up to WHITE is shown; rows posterior → anterior and columns left → right as
    volumes are in memory; it is shown as radiologists look at it, from below: anterior up, the patient's left on the
    viewer's right.
    """
    tiles = [[_tile(title, image) for title, image in row] for row in rows]
    width = max(sum(tile.width for tile in row) for row in tiles)
    height = sum(max(tile.height for tile in row) for row in tiles)
    canvas, top = Image.new("L", (width, height)), 0
    for row in tiles:
        left = 0
        for tile in row:
            canvas.paste(tile, (left, top))
            left += tile.width
        top += max(tile.height for tile in row)
    buffer = BytesIO()
    canvas.save(buffer, format="PNG")
    write_atomically(path, buffer.getvalue())


def _tile(title: str, image: Array) -> Image.Image:
    pixels = _pixels(image, WHITE)
    factor = TILE / max(pixels.size)
    size = (max(1, round(pixels.width * factor)), max(1, round(pixels.height * factor)))
    tile = Image.new("L", (size[0] + 2, size[1] + BAND))
    tile.paste(pixels.resize(size, RESAMPLING), (0, BAND))
    ImageDraw.Draw(tile).text((2, 2), title, fill=200)
    return tile


def _pixels(image: Array, white: float) -> Image.Image:
    """A plane as it is looked at, 0 to `white` as 0 to 255."""
    return Image.fromarray((np.clip(image[::-1, ::-1] / white, 0, 1) * 255).astype(np.uint8))


_ANCHORS = np.linspace(0, 255, len(COLOURS))
_PALETTE = [round(float(np.interp(i, _ANCHORS, [c[k] for c in COLOURS]))) for i in range(256) for k in range(3)]
