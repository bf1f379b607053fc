"""Pictures: rows of slices with titles as PNG, and panels of three planes per volume as WebP."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import ExifTags, Image, ImageDraw

from crossmr.files import write_atomically

Array = npt.NDArray[np.float32]
Kind = Literal["acquired", "synthetic", "other model", "truth", "error", "standard deviation"]
"""What a panel shows; 'other model' is the synthesis of a model that is compared with."""
SOFTWARE = "crossmr"
"""What the Exif data of a picture name as the program that drew it."""
TILE = 192
"""Pixels of a tile's longer side."""
DARK, BRIGHT = 1.0, 99.5
"""Percentiles of a volume, where it is not masked, that are shown black and white."""
RESAMPLING = Image.Resampling.BILINEAR
BAND = 16
"""Pixels of the band above a tile that holds its title."""
PANEL = 200
"""Pixels of a panel's width."""
GAP = 4
"""Pixels between planes."""
MADE, PLAIN = (224, 164, 88), (200, 200, 200)
"""In which the name of a synthetic panel is written, and that of any other."""
MAPS: tuple[Kind, ...] = ("error", "standard deviation")
"""Kinds that are shown in colours, not in greys."""
BRIGHTEST = 0.2
"""Value that is shown in the last of the colours."""
COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))
"""From 0 to `BRIGHTEST`: of increasing lightness, and distinct to the colour-blind."""


@dataclass(frozen=True, eq=False)
class Panel:
    """Three orthogonal planes of a volume."""

    modality: str
    kind: Kind
    planes: tuple[Array, Array, Array]
    """Axial (Y, X), coronal (Z, X) and sagittal (Z, Y), in [0, 1]."""
    window: tuple[float, float]
    """What is shown black and white."""

    @classmethod
    def of(
        cls, modality: str, kind: Kind, volume: Array, at: Sequence[int], like: tuple[float, float] | None = None
    ) -> "Panel":
        """Cut a volume (Z, Y, X) at the voxel `at`; it is shown in the window `like`, or else in its own."""
        z, y, x = at
        shown = (0.0, BRIGHTEST) if kind in MAPS else like or window(volume)
        return cls(modality, kind, (volume[z].copy(), volume[:, y].copy(), volume[:, :, x].copy()), shown)


def window(volume: Array) -> tuple[float, float]:
    """What of a volume (Z, Y, X) is shown black and white; (0, 1) if all of it is 0."""
    inside = volume[volume != 0]
    if not inside.size:
        return 0.0, 1.0
    black, white = (float(p) for p in np.percentile(inside, (DARK, BRIGHT), overwrite_input=True))
    return black, white if white > black else black + 1


def windowed(image: Array, shown: tuple[float, float]) -> Array:
    """An image in this window: 0 is black, 1 white; what is exactly 0, because it is masked, is black."""
    black, white = shown
    scaled: Array = np.clip((image - np.float32(black)) / np.float32(white - black), 0, 1) * (image != 0)
    return scaled


def where_most(region: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    """The slice of each axis (Z, Y, X) that holds most of a region."""
    z, y, x = (int(region.sum(tuple({0, 1, 2} - {axis})).argmax()) for axis in range(3))
    return z, y, x


def middle(region: npt.NDArray[np.bool_]) -> tuple[int, int, int]:
    """A voxel (Z, Y, X) in the middle of a head, at which its planes cross ventricles, but not the midline."""
    counts = [region.sum(tuple({0, 1, 2} - {axis})).cumsum() for axis in range(3)]
    z, y, x = (int(np.searchsorted(c, fraction * c[-1])) for c, fraction in zip(counts, (0.6, 0.5, 0.45), strict=True))
    return z, y, x


def save_panels(
    path: Path, panels: Sequence[Panel], spacing_mm: Sequence[float], names: Mapping[str, str]
) -> list[Mapping[str, str]]:
    """Write panels side by side as one WebP; returns modality and kind of each.

    `spacing_mm` is of (Z, Y, X). Axial planes are oriented as by `save_picture`; coronal and sagittal planes have the
    top of the head up, the sagittal one with the face to the left. Errors and standard deviations are in colours. Each
    panel says in its pixels what it shows, modalities by their `names`, and where the patient's right is.
    """
    depth, height, width = spacing_mm
    sides = [(height, width), (depth, width), (depth, height)]
    planes = panels[0].planes
    extents = [(a.shape[0] * mm[0], a.shape[1] * mm[1]) for a, mm in zip(planes, sides, strict=True)]
    factor = PANEL / max(across for _, across in extents)
    sizes = [(max(1, round(across * factor)), max(1, round(up * factor))) for up, across in extents]
    total = BAND + sum(up for _, up in sizes) + GAP * (len(sizes) - 1)
    canvas = Image.new("RGB", (len(panels) * (PANEL + GAP) - GAP, total))
    pen = ImageDraw.Draw(canvas)
    for number, panel in enumerate(panels):
        top, left = BAND, number * (PANEL + GAP)
        name = names.get(panel.modality, panel.modality)
        made = panel.kind == "synthetic"
        title = f"SYNTHETIC {name}" if made else f"{name} {panel.kind}"
        pen.text((left + 2, 2), title, fill=MADE if made else PLAIN)
        for plane, (across, up) in zip(panel.planes, sizes, strict=True):
            tile = _pixels(windowed(plane, panel.window)).resize((across, up), RESAMPLING)
            if panel.kind in MAPS:
                tile.putpalette(_PALETTE)
            canvas.paste(tile.convert("RGB"), (left + (PANEL - across) // 2, top))
            if plane is not panel.planes[2]:  # the patient's right; the sagittal plane has none
                pen.text((left + 2, top + up // 2 - 5), "R", fill=(150, 150, 150))
            top += up + GAP
    buffer = BytesIO()
    canvas.save(buffer, format="WEBP", quality=85, exif=_signature())
    write_atomically(path, buffer.getvalue())
    return [{"modality": panel.modality, "kind": panel.kind} for panel in panels]


def save_picture(path: Path, rows: Sequence[Sequence[tuple[str, Array]]]) -> None:
    """Write rows of (title, slice) as one PNG.

    A slice is (Y, X) in [0, 1], in memory from posterior to anterior and from left to right. It is shown in the
    radiological convention: anterior up, the patient's left on the right. 0 is black, 1 white.
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
    canvas.save(buffer, format="PNG", exif=_signature())
    write_atomically(path, buffer.getvalue())


def is_picture(path: Path) -> bool:
    """Whether a file is a picture that crossmr drew: its Exif data say so."""
    try:
        with Image.open(path) as image:
            return image.getexif().get(ExifTags.Base.Software) == SOFTWARE
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # whatever else it is
        return False


def _signature() -> Image.Exif:
    exif = Image.Exif()
    exif[ExifTags.Base.Software] = SOFTWARE
    return exif


def _tile(title: str, image: Array) -> Image.Image:
    pixels = _pixels(image)
    factor = TILE / max(pixels.size)
    size = (max(1, round(pixels.width * factor)), max(1, round(pixels.height * factor)))
    tile = Image.new("L", (size[0] + 2, size[1] + BAND))
    tile.paste(pixels.resize(size, RESAMPLING), (0, BAND))
    ImageDraw.Draw(tile).text((2, 2), title, fill=200)
    return tile


def _pixels(image: Array) -> Image.Image:
    """A plane in the radiological convention, 0 to 1 as 0 to 255."""
    return Image.fromarray((np.clip(np.nan_to_num(image[::-1, ::-1]), 0, 1) * 255).astype(np.uint8))


_ANCHORS = np.linspace(0, 255, len(COLOURS))
_PALETTE = [round(float(np.interp(i, _ANCHORS, [c[k] for c in COLOURS]))) for i in range(256) for k in range(3)]
