"""Pictures: orientation, scale, size."""

import numpy as np
import pytest
from PIL import Image

from crossmr import files
from crossmr.errors import OutputError
from crossmr.picture import (
    BAND,
    BRIGHTEST,
    COLOURS,
    GAP,
    PANEL,
    TILE,
    Panel,
    middle,
    save_panels,
    save_picture,
    where_most,
    window,
    windowed,
)


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
    image[0, 3] = 0.5  # posterior, right
    save_picture(tmp_path / "a.png", [[("", image)]])
    shown = body(read(tmp_path / "a.png"))
    assert (shown[0, -1], shown[-1, 0]) == (255, 127)  # up on the viewer's right, down on their left
    assert (shown[0, 0], shown[-1, -1]) == (0, 0)


def test_intensities_are_shown_from_black_to_white_and_clipped(tmp_path):
    image = np.repeat(np.array([[-3.0] * 4 + [0.5] * 4 + [9.0] * 4], np.float32), 12, axis=0)
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


def test_volumes_are_cut_in_three_side_by_side_in_the_radiological_convention(tmp_path):
    head = np.zeros((10, 40, 20), np.float32)  # Z, Y, X of 4, 1 and 1 mm
    head[:] = 0.1
    head[8:, 30:, :5] = 0.6  # superior, anterior, left
    at = where_most(head > 0.5)
    assert (at[0] in (8, 9), at[1] >= 30, at[2] < 5) == (True, True, True)
    error = np.full_like(head, BRIGHTEST)
    panels = [Panel.of("t1n", "acquired", head, at), Panel.of("t1n", "error", error, at)]
    assert [plane.shape for plane in panels[0].planes] == [(40, 20), (10, 20), (10, 40)]
    kinds = save_panels(tmp_path / "new" / "a.webp", panels, (4.0, 1.0, 1.0), {"t1n": "T1"})
    assert kinds == [{"modality": "t1n", "kind": "acquired"}, {"modality": "t1n", "kind": "error"}]
    with Image.open(tmp_path / "new" / "a.webp") as image:
        assert image.format == "WEBP"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    # 40 mm of the sagittal plane fill a panel, so the axial one is 100 wide and 200 high, both others 200 high
    assert pixels.shape == (BAND + 600 + 2 * GAP, 2 * PANEL + GAP, 3)
    assert pixels[:BAND].max() > 100  # what it is
    pixels = pixels[BAND:]
    assert pixels[90:110, :12].max() > 80  # the patient's right
    first, second = pixels[:, :PANEL], pixels[:, PANEL + GAP :]
    axial, coronal, sagittal = (first[top : top + 200] for top in (0, 200 + GAP, 400 + 2 * GAP))
    for plane, left, right in ((axial, 50, 150), (coronal, 50, 150)):
        assert (plane[5, right - 5] > 240).all()  # up, and on the viewer's right
        assert (plane[5, left + 5] < 15).all()
        assert (plane[-5, right - 5] < 15).all()
    assert (sagittal[5, 5] > 240).all()  # the face looks left
    assert (sagittal[5, -5] < 15).all()
    np.testing.assert_allclose(second[100, 100], COLOURS[-1], atol=12)


def test_a_synthetic_panel_says_so_in_its_pixels(tmp_path):
    head = np.full((10, 40, 20), 0.5, np.float32)
    panels = [Panel.of("t1n", kind, head, (5, 20, 10)) for kind in ("synthetic", "truth")]
    save_panels(tmp_path / "a.webp", panels, (4.0, 1.0, 1.0), {})
    with Image.open(tmp_path / "a.webp") as image:
        band = np.asarray(image.convert("RGB")).astype(int)[:BAND]
    made, true = band[:, :PANEL], band[:, PANEL + GAP :]
    assert (made[..., 0] - made[..., 2]).max() > 55  # in a colour that no grey has
    assert abs(true[..., 0] - true[..., 2]).max() < 40


def test_a_volume_is_shown_in_its_own_window_or_another_s():
    volume = np.linspace(0.2, 0.8, 1001, dtype=np.float32).reshape(7, 11, 13)
    volume[0] = 0  # masked
    black, white = window(volume)
    rest = volume[1:]
    assert (black, white) == pytest.approx((np.percentile(rest, 1), np.percentile(rest, 99.5)))
    shown = windowed(volume, (black, white))
    assert shown[0].max() == 0
    assert (shown.min(), shown.max()) == (0, 1)
    assert shown[volume > white].min() == 1
    assert windowed(np.full((1, 1), (black + white) / 2, np.float32), (black, white)).item() == pytest.approx(0.5)
    assert Panel.of("t2f", "synthetic", volume, (3, 4, 5)).window == (black, white)
    assert Panel.of("t2f", "synthetic", volume, (3, 4, 5), like=(0.1, 0.4)).window == (0.1, 0.4)
    assert Panel.of("t2f", "error", volume, (3, 4, 5), like=(0.1, 0.4)).window == (0, BRIGHTEST)


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_volume_of_one_value_has_a_window(value):
    black, white = window(np.full((4, 4, 4), value, np.float32))
    assert white > black


def test_the_middle_of_a_head():
    head = np.zeros((30, 40, 20), bool)
    head[10:20, 10:30, 5:15] = True
    assert middle(head) == (15, 19, 9)
    head[:5] = True  # a wide bottom draws it down a little
    assert middle(head)[0] < 15


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
