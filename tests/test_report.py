"""The report: one file that needs no other, shows every case, and says what is synthetic and what went wrong."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import nibabel as nib
import numpy as np
import pytest
from conftest import SHAPE, image, make_head, save_untrained, write_study

from crossmr.baselines import fit_baselines
from crossmr.completion.cohort import complete_cohort
from crossmr.completion.study import DISCLAIMER, ENHANCEMENT
from crossmr.data.naming import find_studies
from crossmr.errors import OutputError
from crossmr.evaluation.evaluate import EvaluationSettings, evaluate
from crossmr.evaluation.subjects import subject_of_files
from crossmr.evaluation.tables import read_scores
from crossmr.networks.inference import InferenceSettings
from crossmr.networks.model import read_model
from crossmr.networks.trained_on import names_of, remember
from crossmr.output import report

SETTINGS = InferenceSettings(precision="float32")
SECOND = "<b>"
ALL = ("t1n", "t1c", "t2w", "t2f")
THREE = ("t1n", "t1c", "t2f")


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], "", []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag, **attributes):
        return [found for name, found in self.tags if name == tag and attributes.items() <= found.items()]


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Complete patients; the name of one would be markup, another has a bright lesion."""
    folder = tmp_path_factory.mktemp("cohort")
    for seed, case in enumerate(("Ann", "B<i>ob", "Cem")):
        write_study(folder, case, ALL, seed=seed)
    labels = np.zeros(SHAPE, np.uint8)
    labels[12:16, 14:18, 9:15] = 3
    bright = {m: make_head(m) + np.float32(60) * (labels > 0) for m in ALL}
    write_study(folder, "Ann", replace={**bright, "seg": labels})
    return folder


@pytest.fixture(scope="module")
def model(cohort, tmp_path_factory):
    """A model of any subset, which gives standard deviations and has baselines."""
    readers = [lambda files=files: subject_of_files(files).volumes for files in find_studies(cohort)]
    changes = {"guidance": "last", "uncertainty": True, "sources": ALL, "targets": ALL}
    folder = tmp_path_factory.mktemp("model")
    return read_model(save_untrained(folder, baselines=fit_baselines(readers, ALL), **changes))


@pytest.fixture(scope="module")
def completed(cohort, model, tmp_path_factory):
    """Ann lacks T1ce and FLAIR, Bob nothing, Cem's volumes do not fit together."""
    folder, out = tmp_path_factory.mktemp("incomplete"), tmp_path_factory.mktemp("completed")
    shutil.copytree(cohort, folder, dirs_exist_ok=True)
    for modality in ("t1c", "t2f"):
        (folder / "Ann" / f"Ann-{modality}.nii.gz").unlink()
    nib.save(image(make_head("t2w", shape=(20, 20, 20))), folder / "Cem" / "Cem-t2w.nii.gz")
    complete_cohort(folder, out, model, SETTINGS)
    return out


@pytest.fixture(scope="module")
def evaluated(cohort, tmp_path_factory):
    """Three modalities, each from every subset of the others, against a second model whose name would be markup."""
    out, runs = tmp_path_factory.mktemp("evaluated"), tmp_path_factory.mktemp("runs")
    patients = [remember(names_of("Cem", ()), names_of("Ann", ()))]
    readers = [lambda files=files: subject_of_files(files).volumes for files in find_studies(cohort)]
    task = {"sources": THREE, "targets": THREE}
    first = save_untrained(
        runs / "first", baselines=fit_baselines(readers, THREE), guidance="last", uncertainty=True, **task
    )
    second = save_untrained(runs / SECOND, guidance="none", seed=1, patients=patients, **task)
    evaluate(first, cohort, out, EvaluationSettings(every_subset=True, against=second, inference=SETTINGS))
    return out


def needs_nothing(page):
    """Nothing on the page points anywhere but into itself."""
    for tag, attributes in page.tags:
        for name in ("src", "href", "action", "data", "poster", "srcset"):
            assert (attributes.get(name) or "#").startswith(("#", "data:")), (tag, attributes)
    assert not re.findall(r"https?://|@import|url\(", page.source)


def test_a_completed_cohort_is_one_page(completed):
    page = Page(report.report_completion(completed))
    needs_nothing(page)
    assert DISCLAIMER in page.text
    assert ENHANCEMENT in page.text
    assert [found["data-case"] for found in page.all("section")] == ["Ann", "B<i>ob"]
    assert not page.all("i")  # a name is text
    assert "t2w is 20×20×20" in page.text.split("Failed")[1].split("Cases")[0]
    (picture,) = page.all("img")
    assert base64.b64decode(picture["src"].partition(",")[2]) == (completed / "pictures" / "Ann.webp").read_bytes()
    names = [found["class"] for found in page.all("span") if "title" in found]
    assert names == ["acquired", "acquired", *["synthetic", "standard deviation"] * 2]
    manifest = json.loads((completed / "Ann" / "manifest.json").read_text())
    assert manifest["inputs"]["t1n"]["sha256"][:16] in page.text
    assert manifest["std"]["of"] in page.text
    for synthesis in manifest["synthetic"].values():
        assert f"{synthesis['file']}, {synthesis['std']} · from T1, T2" in page.text
    counts = re.findall(r"<b>(\d+)</b>([a-z ]+)<", page.source)
    assert counts == [("1", "failed"), ("0", "not synthesised"), ("1", "synthesised"), ("1", "nothing to synthesise")]
    assert len(page.all("span", **{"class": "chip made"})) == 2


def test_a_finished_case_is_still_on_the_page_of_the_next_run(completed, cohort, model, tmp_path):
    out = tmp_path / "out"
    (tmp_path / "in").mkdir()
    source = write_study(tmp_path / "in", "Ann", ("t1n", "t2w"))
    for _ in range(2):
        complete_cohort(source, out, model, SETTINGS)
    assert json.loads((out / "manifest.json").read_text())["skipped"] == ["Ann"]
    page = Page(report.report_completion(out))
    assert len(page.all("img")) == 1
    (out / "pictures" / "Ann.webp").unlink()
    page = Page(report.report_completion(out))
    assert not page.all("img")
    assert "no picture on this page" in page.text


def test_an_evaluation_is_one_page(evaluated):
    page = Page(report.report_evaluation(evaluated))
    needs_nothing(page)
    body = json.loads((evaluated / "metrics.json").read_text())
    assert len(page.all("section")) == 3
    assert len(page.all("img")) == 9  # of each patient every modality, from the other two
    headings = re.findall(r"<h3>(.*)</h3>", page.source)
    each_case = [f"{name}: each case" for name in ("T1", "T1ce", "FLAIR")]
    assert headings[:7] == [*each_case, *each_case, "Calibration of the standard deviation"]
    # of two plots for each target three subsets of sources by three patients, and ten deciles of three targets
    assert len(page.all("circle")) == 2 * 3 * 3 * 3 + 3 * 10
    assert len(page.all("polyline")) == 3
    for found in page.all("circle"):
        assert 0 <= float(found["cx"]) <= 100
        assert 0 <= float(found["cy"]) <= 100
    means = {
        e["predictor"]: f"{e['psnr']['mean']:.2f}"
        for e in body["summary"]
        if (e["sources"], e["target"], e["region"]) == ("t1n+t1c", "t2f", "brain")
    }
    row = next(line for line in page.source.split("<tr>") if line.startswith("<td>T1 + T1ce</td>"))
    cell = "{unguided}<small>{linear regression}</small><small>{against: <b>}</small>"
    for predictor, mean in means.items():
        cell = cell.replace(f"{{{predictor}}}", mean)
    assert row.split("<td>")[4].startswith(cell)
    assert "in grey: linear regression, against: <b>." in page.text  # a model's name is text
    assert body["against"]["sha256"] in page.text
    assert "The second model was trained on 1 of these patients (Cem)" in page.text
    assert "its standard deviations were calibrated, on 1 of these patients (Ann)" in page.text
    assert "The model was trained on" not in page.text
    for entry in body["uncertainty"]:
        assert f"{entry['ause']:.2f}" in page.text
    assert "3 patients: mean and range (fewer than 6: no interval); * differs from the first row" in page.text
    assert "3 patients are too few for a significant difference between models (p is 1 at least);" in page.text


def test_the_page_of_an_evaluation_says_what_lesions_come_to(evaluated):
    """How many keep their contrast, by the table's order of targets and predictors, and the ratios of deviation."""
    page = Page(report.report_evaluation(evaluated))
    body = json.loads((evaluated / "metrics.json").read_text())
    kept = {
        (e["target"], e["sources"], e["predictor"]): f"{e['kept'] * e['patients']:.0f} of {e['patients']}"
        for e in body["contrasts"]
        if e["structure"] == "lesion" and e["patients"]
    }
    assert set(kept.values()) == {"0 of 1", "1 of 1"}
    tasks = dict.fromkeys((e["target"], e["sources"]) for e in body["summary"])
    predictors = list(dict.fromkeys(e["predictor"] for e in body["summary"]))
    tables = page.source.split("<summary>")[1 : len(tasks) + 1]
    for task, table in zip(tasks, tables, strict=True):
        assert "3 patients" in table
        rows = table.split("<tr")[2:]
        cells = [row.split("<td>")[-2].removesuffix("</td>") for row in rows]
        assert cells == [kept.get((*task, predictor), "–") for predictor in predictors]
    (lost, *_) = (e for e in body["uncertainty"] if e["patients_lost"])
    for ratio in ("error_ratio", "std_ratio"):
        assert f"<td>{lost[ratio]:.2f}<small>({lost[f'{ratio}_lost']:.2f} of 1 lost)</small></td>" in page.source


@pytest.mark.parametrize(
    ("other", "axis"),
    [("linear regression", "PSNR of the linear regression, dB"), (f"against: {SECOND}", f"PSNR of {SECOND}, dB")],
)
def test_points_lie_where_the_numbers_say(evaluated, other, axis):
    scores = read_scores(evaluated / "metrics.csv")
    plots = report._scatter(scores, "unguided", other)
    chosen = [s for s in scores if (s.target, s.sources, s.region) == ("t1c", "t1n", "brain")]
    values = {(s.case, s.predictor): s.psnr for s in chosen}
    (plot,) = (p for p in plots if p.title.startswith("T1ce"))
    assert plot.x == axis
    assert {point.label for point in plot.series["t1n"]} == {"Ann", "B<i>ob", "Cem"}
    for point in plot.series["t1n"]:
        for at, predictor in ((point.x, other), (point.y, "unguided")):
            (first, low), (last, high) = plot.ticks[0], plot.ticks[-1]
            step = (float(high) - float(low)) / (last - first)
            assert float(low) + step * (at - first) == pytest.approx(values[point.label, predictor], abs=0.01)


@pytest.mark.parametrize(("values", "ticks"), [((20, 30), 5), ((20, 20.001), 4), ((5, 5), 3), ((1e-4, 9e-4), 4)])
def test_ticks_are_round_and_few(values, ticks):
    plot = report._plot("", "", "", {"a": [report.Point(*values, "")]})
    assert ticks <= len(plot.ticks) <= 8
    assert all(0 <= at <= 100 for at, _ in plot.ticks)
    assert all(len(text) <= 8 for _, text in plot.ticks)


def test_another_s_page_is_not_replaced(completed, tmp_path):
    shutil.copytree(completed, tmp_path / "out")
    page = tmp_path / "out" / "report.html"
    report.report_completion(tmp_path / "out")
    report.report_completion(tmp_path / "out")  # one of ours is
    page.write_text("<html>mine</html>")
    with pytest.raises(OutputError, match=r"report\.html is not crossmr's, .*Name another folder"):
        report.report_completion(tmp_path / "out")
    assert page.read_text() == "<html>mine</html>"


def test_a_page_shows_so_many_pictures(evaluated, monkeypatch):
    monkeypatch.setattr(report, "MOST_PICTURES", 5)
    assert len(Page(report.report_evaluation(evaluated)).all("img")) == 5


@pytest.mark.parametrize("make", [report.report_completion, report.report_evaluation])
def test_of_nothing_there_is_no_report(make, tmp_path):
    with pytest.raises(OutputError, match="cannot be read"):
        make(tmp_path)
    for name in ("manifest.json", "metrics.json"):
        (tmp_path / name).write_text('{"finished": false}')
    with pytest.raises(OutputError, match="again"):
        make(tmp_path)


def test_the_pages_work_in_a_browser_with_the_network_off(completed, evaluated, page):
    for made in (report.report_completion(completed), report.report_evaluation(evaluated)):
        page.goto(made.as_uri())
        figure = page.locator("figure").first
        seen = "async (image) => { image.scrollIntoView(); await image.decode(); return image.naturalWidth }"
        width = figure.locator("img").evaluate(seen)
        assert width == len(figure.locator(".names span").all()) * 204 - 4
        before = figure.bounding_box()
        figure.locator("img").click()
        assert figure.bounding_box()["width"] > 1340 > before["width"]
        page.keyboard.press("Escape")
        assert figure.bounding_box()["width"] == before["width"]
        dark = figure.locator("img").screenshot()
        page.locator("#brightness").fill("3")
        assert figure.locator("img").screenshot() != dark
        page.locator("#search").fill("nobody")
        assert not page.locator("section.case:visible").count()
        page.locator("#search").fill("ann")
        assert page.locator("section.case:visible").count() == 1
