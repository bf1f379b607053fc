"""The page in a real browser: drop, correct, run, cancel, look, download; by keyboard, in light and dark."""

import base64
import gzip
import io
import re
import sys
import time
import zipfile

import nibabel as nib
import numpy as np
import pytest
from conftest import image, make_head, save_untrained
from PIL import Image
from test_app_server import Client, served
from test_viewer import coloured

from crossmr.app import server, sessions
from crossmr.app.jobs import Queue
from crossmr.app.uploads import Limits

SLOW = """
import sys, time
from crossmr.app import worker
usual = worker.VERBS["complete"]
def slow(model, job, tell):
    tell({"text": "Predicting the slices", "done": 1, "total": 4, "unit": "slices"})
    time.sleep(2)
    return usual(model, job, tell)
worker.VERBS["complete"] = slow
worker.main(*sys.argv[1:])
"""
"""A worker that stays where it can be seen for two seconds."""
CONTRAST = """() => {
  const channels = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const light = (rgb) => {
    const [r, g, b] = rgb.map((c) => c / 255).map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const [r, g, b, a = 1] = channels(getComputedStyle(one).backgroundColor);
      if (a > 0.99) return [r, g, b];
    }
    return [255, 255, 255];
  };
  const low = [];
  for (const one of document.querySelectorAll("body *")) {
    const own = [...one.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || !one.checkVisibility() || one.closest(":disabled, .unseen, .skip")) continue;
    const [a, b] = [light(channels(getComputedStyle(one).color).slice(0, 3)), light(ground(one))];
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) low.push(`${one.tagName} ${one.textContent.trim().slice(0, 30)}: ${ratio.toFixed(2)}`);
  }
  return low;
}"""
NAMELESS = """() => [...document.querySelectorAll("button, a[href], select, input:not([hidden]), progress, iframe")]
  .filter((one) => one.checkVisibility() && !(one.textContent.trim() || one.ariaLabel || one.title || one.labels?.length
    || document.getElementById(one.getAttribute("aria-labelledby"))?.textContent.trim())).map((one) => one.outerHTML)"""


def stands_out(page):
    """Whether every text does from its ground, in light and in dark, and nothing lies beyond the window's side."""
    for scheme in ("dark", "light"):
        page.emulate_media(color_scheme=scheme)
        assert page.evaluate(CONTRAST) == [], scheme
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    return True


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Where a page is served whose runs take two seconds more."""
    model = save_untrained(
        tmp_path_factory.mktemp("model"),
        guidance="last",
        uncertainty=True,
        sources=("t1n", "t2w"),
        targets=("t1c", "t2f"),
    )
    usual = Queue
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "Queue", lambda command: usual([sys.executable, "-c", SLOW, *command[3:]]))
        with served(tmp_path_factory.mktemp("root"), model, Limits(free=0)) as (port, root):
            yield port, root


@pytest.fixture
def page(browser, address):
    """The page; whatever it complains of, or asks of others, fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 800}, color_scheme="light", accept_downloads=True)
    context.set_default_timeout(90_000)  # of a machine that does much else
    opened, wrong = context.new_page(), []
    own = f"http://127.0.0.1:{address[0]}/"
    opened.on("console", lambda one: wrong.append(one.text) if one.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("request", lambda r: None if r.url.startswith((own, "data:", "blob:")) else wrong.append(r.url))
    opened.on("dialog", lambda dialog: dialog.accept())
    opened.goto(f"{own}a-token-that-nobody-guesses/")
    opened.wait_for_selector("#study:visible")
    yield opened
    context.close()
    assert [text for text in wrong if "409" not in text and "415" not in text] == []  # refusals, which a test asks for


def drop(page, files):
    """Let files fall on the page, as a hand would."""
    given = page.evaluate_handle(
        """async (files) => {
          const transfer = new DataTransfer();
          for (const [name, text] of files)
            transfer.items.add(new File([Uint8Array.from(atob(text), (c) => c.charCodeAt(0))], name));
          return transfer;
        }""",
        [[name, base64.b64encode(content).decode()] for name, content in files],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("#drop", event, {"dataTransfer": given})


def drop_folder(page, folder):
    """Let a folder of the disk fall on the page, through the browser itself."""
    box, browser = page.locator("#drop").bounding_box(), page.context.new_cdp_session(page)
    data = {"items": [], "files": [str(folder)], "dragOperationsMask": 1}
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    for event in ("dragEnter", "dragOver", "drop"):
        browser.send("Input.dispatchDragEvent", {"type": event, **at, "data": data})


def volume(modality):
    return image(make_head(modality)).to_bytes()


def outcome(page, text):
    page.locator(".outcome", has_text=text).wait_for()


def look(canvas):
    with Image.open(io.BytesIO(canvas.screenshot())) as shot:
        return np.asarray(shot.convert("RGB")).astype(int)


def test_drop_correct_cancel_run_look_download(page, tmp_path):
    assert stands_out(page)
    drop(page, [("Ann_t1n.nii", volume("t1n")), ("Ann_scan2.nii", volume("t2w")), ("notes.txt", b"hello")])
    page.wait_for_selector("#check:visible")
    outcome(page, "Ann_scan2.nii may be it")
    assert page.locator("#go").is_disabled()
    assert stands_out(page)
    assert "study/notes.txt is neither a volume" in page.locator("#remarks").inner_text()
    page.get_by_label("Contrast of Ann_scan2.nii").select_option(label="T2")
    outcome(page, "Would synthesise T1ce, FLAIR from T1, T2")
    assert page.evaluate(NAMELESS) == []
    page.reload()  # what was corrected stays, also when something else is
    outcome(page, "Would synthesise T1ce, FLAIR from T1, T2")
    page.get_by_label("Contrast of Ann_t1n.nii").select_option(label="FLAIR")
    outcome(page, "Nothing would be synthesised")
    assert page.get_by_label("Contrast of Ann_scan2.nii").input_value() == "t2w"
    page.get_by_label("Contrast of Ann_t1n.nii").select_option(label="T1")
    outcome(page, "Would synthesise T1ce, FLAIR from T1, T2")

    page.get_by_role("button", name="Synthesise T1ce, FLAIR").click()
    page.get_by_text("1 of 4 slices").wait_for()
    assert page.locator("#run-bar").evaluate("(bar) => [bar.value, bar.max]") == [1, 4]
    assert page.locator("#announce").text_content() == "Predicting the slices, 25 percent"
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector("#check:visible")
    page.get_by_role("button", name="Synthesise T1ce, FLAIR").click()
    page.wait_for_selector("#result:visible")

    assert stands_out(page)
    assert re.match(r"Verdict: (Use|Look|Refuse)", page.locator("#verdict").inner_text())
    assert page.locator("#made dd.synthetic").all_inner_texts() == ["SYNTHETIC, from T1, T2"] * 2
    assert "not a medical device" in page.locator("#made").inner_text()
    viewer = page.frame_locator("#viewer iframe")
    viewer.locator("body[data-ready=yes]").wait_for()
    (frame,) = page.frames[1:]
    names = [button.split(" ", 1)[1] for button in viewer.locator("#left nav button").all_inner_texts()]
    assert names == ["T1 acquired", "T2 acquired", "T1ce synthetic", "FLAIR synthetic"]
    where = "panes.map((pane) => [...pane.nv.scene.crosshairPos])"
    box = viewer.locator("#right canvas").bounding_box()
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
    left, right = frame.evaluate(where)
    assert left == pytest.approx(right)  # linked
    head = look(viewer.locator("#right canvas"))
    assert (head.max(2) > 60).mean() > 0.02
    assert coloured(head) < 50
    viewer.locator("#overlay").check()
    frame.evaluate("Promise.all(panes.map((pane) => pane.busy)).then(() => null)")
    page.wait_for_timeout(300)
    assert coloured(look(viewer.locator("#right canvas"))) > 500  # the deviation

    with page.expect_download() as download:
        page.get_by_role("link", name="Download NIfTI").click()
    download.value.save_as(tmp_path / "out.zip")
    assert download.value.suggested_filename == "Ann_SYNTHETIC_nifti.zip"
    with zipfile.ZipFile(tmp_path / "out.zip") as packed:
        made = packed.read("Ann_SYNTHETIC_nifti/Ann/Ann-t2f_synthetic.nii.gz")
    assert nib.Nifti1Image.from_bytes(gzip.decompress(made)).shape == (28, 32, 24)
    page.reload()  # is no closing
    page.wait_for_selector("#result:visible")
    page.get_by_role("button", name="Start over").click()
    page.wait_for_selector("#study:visible")


def test_a_folder_a_broken_zip_and_the_same_file_twice(page, tmp_path):
    (tmp_path / "Bob" / "anat").mkdir(parents=True)
    for modality in ("t1n", "t2w"):
        (tmp_path / "Bob" / "anat" / f"{modality}.nii").write_bytes(volume(modality))
    drop_folder(page, tmp_path / "Bob")
    outcome(page, "Would synthesise T1ce, FLAIR from T1, T2")
    assert page.locator(".case h3").inner_text() == "Bob"
    drop(page, [("evil.zip", b"PK\x03\x04" + bytes(50))])
    page.get_by_role("alert").filter(has_text="evil.zip: is no zip").wait_for()
    page.set_input_files("#folder", tmp_path / "Bob")
    page.get_by_role("alert").filter(has_text="is here already").wait_for()
    page.reload()
    outcome(page, "Would synthesise T1ce, FLAIR from T1, T2")  # nothing was lost


def test_a_second_page_waits_is_told_its_place_and_may_leave(page, address):
    other = Client(address[0]).open()
    other.give_study("Ann")
    other.finished("recognise")
    drop(page, [(f"Bob_{m}.nii", volume(m)) for m in ("t1n", "t2w")])
    page.wait_for_selector("#check:visible")
    other.page("POST", "/complete", {})
    page.get_by_role("button", name="Synthesise T1ce, FLAIR").click()
    page.locator("#run-text", has_text="Waiting: one job is done before this one").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.wait_for_selector("#check:visible")
    assert other.waited()["job"]["state"] == "done"  # nothing of it was lost
    other.page("DELETE")


def test_a_page_that_is_closed_is_forgotten(page, address, monkeypatch):
    drop(page, [("Ann_t1n.nii", volume("t1n"))])
    page.wait_for_selector("#check:visible")
    key = page.evaluate("sessionStorage.getItem('page')")
    folder = address[1] / f"page-{key}"
    assert folder.exists()
    monkeypatch.setattr(sessions, "LEAVE_SECONDS", 0.2)
    page.goto("about:blank")
    deadline = time.monotonic() + 15
    while folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_it_is_used_by_the_keyboard_and_read_aloud(page):
    reached = []
    for _ in range(3):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.textContent.trim()"))
    assert reached == ["Skip to the content", "Choose files…", "Choose a folder…"]
    with page.expect_file_chooser() as chooser:
        page.get_by_role("button", name="Choose files").focus()
        page.keyboard.press("Enter")
    files = [{"name": f"Ann_{m}.nii", "mimeType": "", "buffer": volume(m)} for m in ("t1n", "t2w")]
    chooser.value.set_files(files)
    page.wait_for_selector("#check:visible")
    assert page.evaluate("document.activeElement.id") == "check-title"  # a reader begins to read there
    tree = page.locator("body").aria_snapshot()
    for told in (
        "banner:",
        'heading "crossmr" [level=1]',
        'navigation "Steps"',
        'heading "Check what was recognised" [level=2]',
    ):
        assert told in tree
    assert 'combobox "Contrast of Ann_t1n.nii"' in tree
    assert "status: 1 study recognised. Synthesise T1ce, FLAIR" in tree
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == "Contrast of Ann_t1n.nii"
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "go"
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.keyboard.press("Enter")
    page.wait_for_selector("#result:visible")
    assert page.evaluate("document.activeElement.id") == "result-title"
    assert page.evaluate(NAMELESS) == []
    viewer = page.frame_locator("#viewer iframe")
    viewer.locator("body[data-ready=yes]").wait_for()
    button = viewer.locator("#right nav button", has_text="FLAIR synthetic")
    button.focus()
    page.keyboard.press("Space")
    assert button.get_attribute("aria-pressed") == "true"
    assert button.evaluate("(one) => document.activeElement === one")
