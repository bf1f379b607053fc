"""Pictures for people: labelled rows of slices, written as PNG."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from crossmr.files import write_atomically

Array = npt.NDArray[np.float32]
TILE = 192
"""Pixels of a tile's longer side."""
WHITE = 0.6
"""What is shown white: half of a head lies below .25."""
BAND = 16
"""Pixels of the band above a tile that names it."""


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
    pixels = Image.fromarray((np.clip(image[::-1, ::-1] / WHITE, 0, 1) * 255).astype(np.uint8))
    factor = TILE / max(pixels.size)
    size = (max(1, round(pixels.width * factor)), max(1, round(pixels.height * factor)))
    tile = Image.new("L", (size[0] + 2, size[1] + BAND))
    tile.paste(pixels.resize(size, Image.Resampling.BILINEAR), (0, BAND))
    ImageDraw.Draw(tile).text((2, 2), title, fill=200)
    return tile
