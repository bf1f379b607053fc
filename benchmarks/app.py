"""The page in a real browser, with real studies and the shipped model: every step is seen, timed and photographed.

A study of NIfTI lacks T1ce and FLAIR, and one of its names says nothing; another comes as a zip of DICOM. Both are
given, corrected, completed, looked at and downloaded; a run is cancelled; the page is followed by the keyboard alone.
"""

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from playwright.sync_api import Page, sync_playwright
from scans import unpacked

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import dicoms

SWITCHES = [
    *("--no-sandbox", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-sync"),
    *("--disable-component-update", "--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"),
]
COMMAND = "import sys; sys.argv = ['crossmr', 'app', '--no-open']; from crossmr.cli import main; main()"
SIZE = {"width": 1280, "height": 800}
DESCRIPTIONS = {"t1n": "T1 se tra", "t2w": "T2 tse tra", "t2f": "unnamed"}


def main() -> None:
    """Run all of it, and print what was seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--case", default="BraTS2021_01476")
    parser.add_argument("--second", default="Brats18_TCIA10_628_1")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    seen: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        place = Path(folder)
        study, archive = make_inputs(options, place)
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=SWITCHES)
        with running(place / "tmp") as address:
            for scheme in ("light", "dark"):
                context = browser.new_context(viewport=SIZE, color_scheme=scheme, offline=False)
                page = context.new_page()
                watch(page, seen)
                page.goto(address)
                shot = Shots(page, options.out, scheme)
                if scheme == "light":
                    seen["keyboard"] = follow_keyboard(page)
                    seen["NIfTI"] = nifti(page, shot, study, place)
                else:
                    seen["hostile"] = hostile(page, shot, place)
                    seen["DICOM"] = dicom(page, shot, archive, place)
                context.close()
        seen["left in the temporary folder"] = [path.name for path in (place / "tmp").iterdir()]
        browser.close()
    print(json.dumps(seen, indent=2, ensure_ascii=False))
    (options.out / "seen.json").write_text(json.dumps(seen, indent=2, ensure_ascii=False))


def make_inputs(options: argparse.Namespace, place: Path) -> tuple[Path, Path]:
    """A folder of NIfTI and a zip of DICOM, each without two of its contrasts."""
    folder = unpacked(options.data, place / "whole", (options.case, options.second))
    study = place / options.case
    study.mkdir()
    found = {
        path.name.split("-")[-1].split("_")[-1].split(".")[0]: path for path in (folder / options.case).glob("*.gz")
    }
    shutil.copy(found["t1n"], study / f"{options.case}_t1n.nii.gz")
    shutil.copy(found["t2w"], study / f"{options.case}_scan2.nii.gz")
    (study / "notes.txt").write_text("not a scan")
    export = place / "dicom"
    second = {
        path.name.split("-")[-1].split("_")[-1].split(".")[0]: path for path in (folder / options.second).glob("*.gz")
    }
    for number, modality in enumerate(("t1n", "t2w", "t2f"), 1):
        image = nib.as_closest_canonical(nib.load(second[modality]))
        voxels = np.clip(np.asarray(image.dataobj, np.float64), 0, None)
        voxels = np.rint(voxels * (4000 / voxels.max()))
        kind = modality if modality != "t2f" else "?"
        description = DESCRIPTIONS[modality]
        dicoms.write_series(export / str(number), voxels, image.affine, kind, number=number, description=description)
    archive = place / "export.zip"
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for path in sorted(export.rglob("*.dcm")):
            packed.write(path, path.relative_to(export))
    return study, archive


@contextlib.contextmanager
def running(place: Path) -> Iterator[str]:
    """The page's address."""
    place.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(place)}
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.terminate()
        process.wait(30)


class Shots:
    """Photographs, numbered in their order."""

    def __init__(self, page: Page, out: Path, scheme: str):
        self.page, self.out, self.scheme, self.count = page, out, scheme, 0

    def __call__(self, name: str) -> None:
        """Take one, of the step named so."""
        self.count += 1
        self.page.screenshot(path=self.out / f"{self.scheme}-{self.count}-{name}.png", timeout=120_000)


def watch(page: Page, seen: dict[str, Any]) -> None:
    """Note whatever the page complains of, and whatever it asks of others."""
    wrong = seen.setdefault("complaints", [])
    page.on("console", lambda one: wrong.append(one.text) if one.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "request",
        lambda one: None if "127.0.0.1" in one.url or one.url[:5] in ("data:", "blob:") else wrong.append(one.url),
    )
    page.on("dialog", lambda dialog: dialog.accept())


def until(page: Page, condition: str, seconds: float = 300) -> None:
    """Wait until a condition holds; Playwright's own way evaluates strings, which the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        if time.monotonic() > deadline:
            raise TimeoutError(condition)
        page.wait_for_timeout(100)


def follow_keyboard(page: Page) -> list[str]:
    """What Tab reaches, in its order."""
    reached = []
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim().slice(0, 40)"))
    page.evaluate("document.activeElement.blur()")
    return reached


def nifti(page: Page, shot: Shots, study: Path, place: Path) -> dict[str, Any]:
    """Folder, correction, cancel, run, view, downloads."""
    page.wait_for_selector("#study:visible")
    shot("study")
    page.set_input_files("#folder", study)
    page.wait_for_selector("#check:visible", timeout=120_000)
    shot("check")
    before = page.locator(".outcome").inner_text()
    page.locator("tr.unknown select").select_option("t2w")
    page.wait_for_selector("#go:enabled", timeout=60_000)
    until(page, "document.querySelector('.why').parentElement && !document.querySelector('tr.unknown')")
    shot("corrected")
    after = page.locator(".outcome").inner_text()
    page.click("#go")
    until(page, "document.querySelector('#run-bar').value > 0 && document.querySelector('#run-bar').max > 1")
    page.wait_for_timeout(400)
    shot("running")
    page.click("#cancel")
    page.wait_for_selector("#check:visible")
    start = time.monotonic()
    page.click("#go")
    steps = []
    while not page.is_visible("#result"):
        text = f"{page.locator('#run-text').text_content()} · {page.locator('#run-detail').text_content()}".rsplit(
            "·", 1
        )[0]
        steps += [] if steps[-1:] == [text] else [text]
        page.wait_for_timeout(200)
    seconds = time.monotonic() - start
    return {
        "before": before,
        "corrected": after,
        "seconds": round(seconds, 1),
        "steps": steps,
        **result(page, shot, place, ("nifti", "bids")),
    }


def hostile(page: Page, shot: Shots, place: Path) -> dict[str, str]:
    """What the page says of archives that are no studies; a second tab that is closed in the middle of its upload."""
    bomb, leads, link = (place / f"{name}.zip" for name in ("bomb", "leads", "link"))
    with (
        zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed,
        packed.open("T1.nii", "w", force_zip64=True) as file,
    ):
        for _ in range(1024):
            file.write(bytes(2**20))
    with zipfile.ZipFile(leads, "w") as packed:
        packed.writestr("../../../../tmp/evil.nii", b"evil")
    with zipfile.ZipFile(link, "w") as packed:
        info = zipfile.ZipInfo("T1.nii")
        info.create_system, info.external_attr = 3, 0o120777 << 16
        packed.writestr(info, "/etc/passwd")
    large = place / "large.nii"
    large.touch()
    os.truncate(large, 2**31)
    other = page.context.new_page()
    other.goto(page.url)
    other.set_input_files("#files", large)
    said = {}
    for path in (bomb, leads, link):
        page.set_input_files("#files", path)
        page.get_by_role("alert").filter(has_text=path.name if path != leads else "evil").wait_for(timeout=60_000)
        said[f"{path.name}, {path.stat().st_size / 1e6:.1f} MB"] = page.locator("#alert").inner_text()
    shot("hostile")
    other.close()
    return said


def dicom(page: Page, shot: Shots, archive: Path, place: Path) -> dict[str, Any]:
    """Zip, correction, run, view, downloads."""
    shot("study")
    page.set_input_files("#files", archive)
    page.wait_for_selector("#check:visible", timeout=240_000)
    shot("check")
    before = page.locator(".outcome").inner_text()
    page.locator("#cases select").nth(2).select_option("t2f")
    until(page, "document.querySelectorAll('#cases .why')[3].textContent.includes('you')")
    shot("corrected")
    after = page.locator(".outcome").inner_text()
    start = time.monotonic()
    page.click("#go")
    page.wait_for_selector("#result:visible", timeout=600_000)
    seconds = time.monotonic() - start
    return {
        "before": before,
        "corrected": after,
        "seconds": round(seconds, 1),
        **result(page, shot, place, ("nifti", "dicom", "bids")),
    }


def result(page: Page, shot: Shots, place: Path, kinds: tuple[str, ...]) -> dict[str, Any]:
    """The viewer's state, and what the downloads hold."""
    start = time.monotonic()
    viewer = page.frame_locator("#viewer iframe")
    viewer.locator("body[data-ready=yes]").wait_for(timeout=180_000)
    page.wait_for_timeout(1500)
    seconds = round(time.monotonic() - start, 1)
    shot("result")
    viewer.locator("#overlay").check()
    (frame,) = page.frames[1:]
    frame.evaluate("Promise.all(panes.map((pane) => pane.busy)).then(() => null)")
    page.wait_for_timeout(1500)
    shot("deviation")
    held = {}
    for kind in kinds:
        with page.expect_download(timeout=120_000) as download:
            page.click(f"#downloads a[href*='{kind}']")
        path = place / download.value.suggested_filename
        download.value.save_as(path)
        with zipfile.ZipFile(path) as packed:
            held[path.name] = {
                "broken": packed.testzip(),
                "files": len(packed.namelist()),
                "MB": round(path.stat().st_size / 1e6, 1),
            }
    verdict = page.locator("#verdict").inner_text()
    return {
        "verdict": verdict,
        "made": page.locator("#made").inner_text(),
        "viewer ready after": seconds,
        "downloads": held,
    }


if __name__ == "__main__":
    main()
