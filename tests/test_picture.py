"""Pictures for people: where up is, and whose left."""

import numpy as np
import pytest
from PIL import Image

from crossmr import files
from crossmr.errors import OutputError
from crossmr.picture import BAND, TILE, save_picture


def read(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def body(pixels):
    """The first tile without its title."""
    return pixels[BAND : BAND + TILE, :TILE].astype(int)


def test_rows_and_columns_of_tiles(tmp_path):
    square, wide = np.zeros((8, 8), np.float32), np.zeros((4, 8), np.float32)
    save_picture(tmp_path / "new" / "a.png", [[("a", square), ("b", square)], [("c", wide)]])
    height = (TILE + BAND) + (TILE // 2 + BAND)
    assert read(tmp_path / "new" / "a.png").shape == (height, 2 * (TILE + 2))


def test_anterior_is_up_and_the_patients_left_on_the_viewers_right(tmp_path):
    image = np.zeros((4, 4), np.float32)  # rows posterior → anterior, columns left → right
    image[3, 0] = 1.0  # anterior, left
    image[0, 3] = 0.3  # posterior, right
    save_picture(tmp_path / "a.png", [[("", image)]])
    shown = body(read(tmp_path / "a.png"))
    assert (shown[0, -1], shown[-1, 0]) == (255, 127)  # up on the viewer's right, down on their left
    assert (shown[0, 0], shown[-1, -1]) == (0, 0)


def test_intensities_are_shown_from_black_to_white_and_clipped(tmp_path):
    image = np.repeat(np.array([[-3.0] * 4 + [0.3] * 4 + [9.0] * 4], np.float32), 12, axis=0)
    save_picture(tmp_path / "a.png", [[("", image)]])
    shown = body(read(tmp_path / "a.png"))[TILE // 2]
    assert (shown[-TILE // 6], shown[TILE // 2], shown[TILE // 6]) == (0, 127, 255)


def test_titles_stand_above_their_tiles(tmp_path):
    image = np.zeros((8, 8), np.float32)
    save_picture(tmp_path / "a.png", [[("", image), ("truth, t1c", image)]])
    pixels = read(tmp_path / "a.png")
    assert not pixels[:, :TILE].any()
    assert pixels[:BAND, TILE + 2 :].any()
    assert not pixels[BAND:].any()


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 2)])
def test_any_shape_is_a_tile(tmp_path, shape):
    save_picture(tmp_path / "a.png", [[("t", np.ones(shape, np.float32))]])
    assert max(read(tmp_path / "a.png").shape) >= TILE


def test_a_failure_leaves_the_old_picture(tmp_path, monkeypatch):
    path, image = tmp_path / "a.png", np.zeros((8, 8), np.float32)
    save_picture(path, [[("", image)]])
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "replace", full)
    with pytest.raises(OutputError, match="No space left"):
        save_picture(path, [[("", image + 1)]])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]
