"""The viewer: one file that draws the volumes with the network off, and does what its keys say."""

import base64
import gzip
import io
import json
import re
import shutil

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import save_untrained, write_study
from PIL import Image

from crossmr.completion.cohort import complete_cohort
from crossmr.completion.study import DISCLAIMER, ENHANCEMENT
from crossmr.errors import OutputError
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.output import viewer
from crossmr.output.viewer import ASSETS, PAGES, view_case, write_linked

ALL_FOUR = ("t1n", "t1c", "t2w", "t2f")


@pytest.fixture(scope="module")
def completed(tmp_path_factory):
    """Where Ann was completed, who lacked T1ce and FLAIR, and the scans that she has after all."""
    folder, truth = tmp_path_factory.mktemp("view"), tmp_path_factory.mktemp("truth")
    model = read_model(
        save_untrained(folder / "model", guidance="last", uncertainty=True, sources=ALL_FOUR, targets=ALL_FOUR)
    )
    model.calibration = {"variance": torch.tensor([[0.1, 0.0]] * 4)}  # so that colours are not all the brightest
    write_study(truth, "Ann", ALL_FOUR)
    write_study(folder / "scans", "Ann", ("t1n", "t2w"))
    write_study(folder / "scans", "Bob", ALL_FOUR, seed=1)
    complete_cohort(folder / "scans", folder / "out", model, InferenceSettings(precision="float32"))
    return folder / "out", truth


def shown(path):
    """The volumes that a page holds, name → image."""
    text = path.read_text().partition('<script id="volumes" type="application/json">')[2].partition("</script>")[0]
    return {
        v["name"]: nib.Nifti1Image.from_bytes(gzip.decompress(base64.b64decode(v["data"]))) for v in json.loads(text)
    }


def test_a_page_holds_what_was_acquired_and_what_was_made(completed):
    out, _ = completed
    path, notes = view_case(out)
    assert (path, notes) == (out / "view" / "Ann.html", [])
    volumes = shown(path)
    assert list(volumes) == [
        *(
            "T1 acquired",
            "T2 acquired",
            "T1ce synthetic",
            "T1ce standard deviation",
            "FLAIR synthetic",
            "FLAIR standard deviation",
        )
    ]
    made = nib.load(out / "Ann" / "Ann-t2f_synthetic.nii.gz")
    held = volumes["FLAIR synthetic"]
    assert held.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(held.affine, made.affine)
    np.testing.assert_allclose(held.get_fdata(), made.get_fdata(), atol=0.5 / 255 + 1e-6)
    text = path.read_text()
    assert DISCLAIMER in text
    assert ENHANCEMENT in text
    assert "Copyright (c) 2021, Niivue" in text


def test_true_and_synthetic_volumes_of_a_contrast_share_a_window(completed):
    out, truth = completed
    for scans, real in ((None, "acquired"), (truth, "truth")):
        text = view_case(out, "Ann", scans=scans)[0].read_text()
        held = json.loads(text.partition('<script id="volumes" type="application/json">')[2].partition("</script>")[0])
        windows = {(v["modality"], v["kind"]): (v["black"], v["white"]) for v in held}
        assert windows["t1n", "acquired"] != windows["t2f", "synthetic"]
        if real == "truth":
            assert windows["t2f", "truth"] == windows["t2f", "synthetic"]
            assert windows["t1c", "truth"] == windows["t1c", "synthetic"]
        assert windows["t2f", "standard deviation"] == (0, 0.2)


def test_a_page_says_the_verdict_and_where_it_opens(completed):
    out, _ = completed
    manifest = json.loads((out / "Ann" / "manifest.json").read_text())
    text = view_case(out, "Ann")[0].read_text()
    assert f'<script id="look-at" type="application/json">{json.dumps(manifest["look_at"]["mm"])}</script>' in text
    path = out / "Ann" / "manifest.json"
    before = path.read_text()
    reason = {"verdict": "look", "kind": "lost lesion", "contrasts": ["t2f"], "text": "It is gone."}
    path.write_text(json.dumps({**manifest, "verdict": "look", "reasons": [reason]}))
    assert '<div class="warning">look: It is gone.</div>' in view_case(out, "Ann")[0].read_text()
    path.write_text(before)


def test_with_the_scans_of_all_the_truth_stands_beside(completed):
    out, truth = completed
    volumes = shown(view_case(out, "Ann", scans=truth)[0])
    assert [name for name in volumes if name.endswith("truth")] == ["T1ce truth", "FLAIR truth"]


def test_scans_that_were_registered_are_registered_again(tmp_path):
    pytest.importorskip("SimpleITK", reason="pip install crossmr[register]")
    model = read_model(save_untrained(tmp_path / "model", guidance="last"))
    write_study(tmp_path / "in", "Ann", ("t1n", "t2w"))
    path = tmp_path / "in" / "Ann" / "Ann-t2w.nii.gz"
    scan = nib.load(path)
    moved = scan.affine.copy()
    moved[:3, 3] += 4
    nib.save(nib.Nifti1Image(np.asarray(scan.dataobj)[1:], moved), path)
    complete_cohort(tmp_path / "in", tmp_path / "out", model, InferenceSettings(precision="float32", register="always"))
    pages = [shown(view_case(tmp_path / "out", "Ann", scans=scans)[0]) for scans in (None, tmp_path / "in")]
    for name, volume in pages[0].items():
        np.testing.assert_array_equal(volume.dataobj, pages[1][name].dataobj)


def test_scans_of_another_patient_of_the_same_name_are_said(completed, tmp_path):
    out, truth = completed
    assert view_case(out, "Ann", scans=truth)[1] == []
    write_study(tmp_path, "Ann", ALL_FOUR, seed=7)
    _, (note,) = view_case(out, "Ann", scans=tmp_path)
    assert note == f"t1n, t2w of {tmp_path} is not what Ann was completed from, and may be another patient's"


def test_scans_that_moved_are_named_or_left_out(completed, tmp_path):
    out, _ = completed
    shutil.copytree(out, tmp_path / "copy" / "out")
    path, (note,) = view_case(tmp_path / "copy" / "out")
    assert "--scans" in note
    assert [name.split()[1] for name in shown(path)] == ["synthetic", "standard"] * 2


@pytest.mark.parametrize(
    ("case", "said"), [("Zoe", "no completed case 'Zoe'; it has Ann, Bob"), ("../x", "no completed")]
)
def test_what_is_not_there_is_refused(completed, case, said):
    with pytest.raises(OutputError, match=said):
        view_case(completed[0], case)


def test_another_s_page_is_not_replaced(completed, tmp_path):
    out = shutil.copytree(completed[0], tmp_path / "out")
    page, _ = view_case(out, "Ann")
    assert view_case(out, "Ann")[0] == page  # one of ours is
    page.write_text("<html>mine</html>")
    with pytest.raises(OutputError, match=r"Ann\.html is not crossmr's, so it is not replaced\. Name another folder"):
        view_case(out, "Ann")
    assert page.read_text() == "<html>mine</html>"


def test_an_empty_folder_is_refused(completed, tmp_path):
    with pytest.raises(OutputError, match="it has none"):
        view_case(tmp_path)
    with pytest.raises(OutputError, match="holds no study Ann"):
        view_case(completed[0], scans=completed[0].parent / "scans" / "Bob")


def pixels(page, pane):
    with Image.open(io.BytesIO(page.locator(f"#{pane} canvas").screenshot())) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def coloured(image):
    """Pixels in colours, but for the crosshair's."""
    return int(((np.ptp(image, axis=2) > 40) & (image[..., 2] > image[..., 1] + 20)).sum())


def test_it_draws_and_obeys_in_a_browser_with_the_network_off(completed, page):
    out, truth = completed
    page.goto(view_case(out, scans=truth)[0].as_uri())
    page.wait_for_selector("body[data-ready=yes]", timeout=60_000)
    titles = page.locator("[aria-pressed=true]").all_text_contents()
    assert titles == ["all planes", "2 T1ce truth", "5 T1ce synthetic"]
    place = json.loads((out / "Ann" / "manifest.json").read_text())["look_at"]["mm"]
    shown_at = page.evaluate("panes.map((pane) => [...pane.nv.frac2mm(pane.nv.scene.crosshairPos)].slice(0, 3))")
    for position in shown_at:
        assert position == pytest.approx(place, abs=0.1)

    def settled():
        page.evaluate("Promise.all(panes.map((pane) => pane.busy))")
        page.wait_for_timeout(200)
        return pixels(page, "left"), pixels(page, "right")

    left, right = settled()
    for image in (left, right):
        assert (image.max(2) > 60).mean() > 0.05  # a head is there
        assert coloured(image) < 50
    assert np.abs(left - right).mean() > 2  # not the same volume twice

    page.keyboard.press("Space")
    assert np.abs(settled()[1] - left).mean() < 1  # the truth on both sides
    page.keyboard.press("Space")
    assert np.abs(settled()[1] - right).mean() < 1

    page.keyboard.press("u")
    assert coloured(settled()[1]) > 500  # the standard deviation over the synthesis
    assert page.locator("#overlay").is_checked()
    page.keyboard.press("u")
    assert coloured(settled()[1]) < 50

    where = "panes.map((pane) => [...pane.nv.scene.crosshairPos])"
    before = page.evaluate(where)
    page.keyboard.press("ArrowUp")
    after = page.evaluate(where)
    assert after[0] == pytest.approx(after[1])
    assert after[0] != pytest.approx(before[0])
    box = page.locator("#right canvas").bounding_box()
    page.mouse.click(box["x"] + 0.2 * box["width"], box["y"] + 0.2 * box["height"])
    clicked = page.evaluate(where)
    assert clicked[0] == pytest.approx(clicked[1])  # linked
    assert clicked[0] != pytest.approx(after[0])
    assert "T1ce truth 0." in page.locator("#values").text_content()

    page.keyboard.press("Digit1")
    page.keyboard.press("Shift+Digit6")
    settled()
    assert page.locator(".pane [aria-pressed=true]").all_text_contents() == ["6 FLAIR synthetic", "1 T1 acquired"]
    dark = pixels(page, "right").mean()
    for _ in range(4):
        page.keyboard.press("+")
    assert settled()[1].mean() > 1.1 * dark
    page.keyboard.press("l")
    assert page.locator("#layouts [aria-pressed=true]").text_content() == "axial"


def test_a_server_s_page_has_its_volumes_beside_it_and_no_script_within(completed, tmp_path):
    out, _ = completed
    assert write_linked(out, "Ann", tmp_path / "page", "../static") == []
    text = (tmp_path / "page" / "index.html").read_text()
    listed = json.loads(text.partition('<script id="volumes" type="application/json">')[2].partition("</script>")[0])
    held = shown(view_case(out, "Ann")[0])
    assert [v["name"] for v in listed] == list(held)
    for volume in listed:
        beside = nib.Nifti1Image.from_bytes(gzip.decompress((tmp_path / "page" / volume["url"]).read_bytes()))
        np.testing.assert_array_equal(beside.get_fdata(), held[volume["name"]].get_fdata())
    assert {f"../static/{name}" for name in ASSETS} == set(re.findall(r'(?:src|href)="(\.\.[^"]+)"', text))
    assert all((PAGES / name).is_file() for name in ASSETS)
    assert "<style" not in text
    assert not re.search(r"<script>", text)
    assert write_linked(out, "Bob", tmp_path / "Bob", "..") == []  # of whom nothing was synthesised: the scans alone
    text = (tmp_path / "Bob" / "index.html").read_text()
    assert '"kind": "synthetic"' not in text
    assert "Nothing was synthesised: these are the acquired scans." in text


def test_a_volume_like_a_scan_is_shown_on_the_scale_of_the_others():
    shown = viewer._on_unit_scale
    scale = {"like": "t1n", "slope": 200.0, "intercept": -10.0}
    unit = np.float32([0, 0.25, 1])
    mapped = np.where(unit > 0, 200 * unit - 10, 0).astype(np.float32)
    np.testing.assert_allclose(shown(mapped, "synthetic", scale), unit, rtol=1e-6)
    np.testing.assert_allclose(shown(200 * unit, "standard deviation", scale), unit, rtol=1e-6)
    assert shown(unit, "synthetic", None) is unit
