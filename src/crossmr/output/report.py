"""One page that shows what was done: report.html, which needs no network, no server and no other file.

It is made from what `complete` and `evaluate` wrote, so it can be made again at any time, and be deleted.
"""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, cast

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from crossmr.completion.layout import records_of
from crossmr.completion.status import finished_cases, is_case, reasons_of
from crossmr.completion.study import DISCLAIMER, ENHANCEMENT
from crossmr.completion.verdict import VERDICTS
from crossmr.data.naming import display_name, in_usual_order
from crossmr.errors import OutputError
from crossmr.evaluation.evaluate import BY_PROTOCOL, Evaluation, warnings_of
from crossmr.evaluation.measurements import Picture
from crossmr.evaluation.measures import KEPT, STRUCTURES, Score
from crossmr.evaluation.others import PREFIX
from crossmr.evaluation.predictors import AGAINST
from crossmr.evaluation.statistics import (
    CalibrationSummary,
    ContrastSummary,
    Summary,
    out_of_reach,
    patients_of,
    say_out_of_reach,
)
from crossmr.evaluation.tables import (
    BASELINE,
    COLUMNS,
    HEADINGS,
    KEPT_HEADINGS,
    SPREADS,
    TOO_FEW,
    Bounds,
    bounds_of,
    kept_cell,
    of_fewer,
    read_scores,
)
from crossmr.files import REPORT, is_page, read_json, refuse_foreign, write_atomically
from crossmr.picture import BRIGHT, BRIGHTEST, COLOURS, DARK

MOST_PICTURES = 200
"""Pictures of a page at most; the tables of an evaluation hold all cases."""
CASES_PER_PAGE = MOST_PICTURES
MOST_ROWS = 500
"""Cases of a verdict that the first page names; status.csv has them all."""


class Point(NamedTuple):
    """A point of a plot, and what it stands for."""

    x: float
    y: float
    label: str


Series = Mapping[str, Sequence[Point]]
"""Name → its points."""


@dataclass(frozen=True)
class Plot:
    """Points in a square of 100 by 100, y upwards, and what stands along its axes."""

    title: str
    x: str
    y: str
    series: Series
    """Within the square."""
    ticks: Sequence[tuple[float, str]]
    """Of both axes, which share one scale: the diagonal is where the two are equal."""
    joined: bool
    """Whether a line runs through the points of a series."""


@dataclass(frozen=True)
class TargetTable:
    """Every predictor of one target from one set of sources."""

    target: str
    sources: str
    patients: int
    rows: Mapping[str, Mapping[str, Summary]]
    """Predictor → region → its metrics."""
    fewer: Mapping[str, str]
    """Predictor → of how many patients it has images, where they are fewer; else ''."""
    kept: Mapping[str, Sequence[str]]
    """Predictor → how often it keeps the contrast of each structure, as text."""
    bounds: Bounds | None
    """What stands beside a mean."""
    out_of_reach: Sequence[str]
    """Which differences cannot be significant, as text."""


@dataclass(frozen=True)
class SubsetTable:
    """Mean PSNR over the brain, in dB, by sources and target."""

    targets: Sequence[str]
    sources: Sequence[str]
    others: Sequence[str]
    """The predictors beside the model's own."""
    means: Mapping[tuple[str, str, str], float | None]
    """By sources, target and predictor."""


def report_completion(out: Path) -> Path:
    """Write report.html of a cohort: its cases, their pictures, and where all of it comes from; returns the first page.

    Like status.csv it has every case that was ever finished there, and those that failed in the last run. It lies in
    OUT, or among the records of another profile, with the further pages in the folder report beside it. `out` is OUT,
    or the folder of its records.

    Raises:
        OutputError: OUT holds no completed cohort, or cannot be written.
    """
    out = records_of(out)
    cohort = read_json(out / "manifest.json", OutputError)
    if "completed" not in cohort:
        raise OutputError(f"{out} holds no completed cohort. Run crossmr complete again.")
    names = [case for case in finished_cases(out) if case not in cohort["failed"]]
    pages = [names[k : k + CASES_PER_PAGE] for k in range(0, len(names), CASES_PER_PAGE)] or [[]]
    links = [("report.html", pages[0]), *((f"report/{k}.html", page) for k, page in enumerate(pages[1:], 2))]
    counts = dict.fromkeys(("failed", "not synthesised", "synthesised", "nothing to synthesise"), 0)
    counts["failed"] = len(cohort["failed"])
    verdicts, where, synthesised = _no_verdicts(cohort["failed"]), dict[str, str](), set[str]()
    for number, (link, page) in reversed([*enumerate(links)]):  # the first one last, which counts them all
        manifests = ((name, read_json(out / name / "manifest.json", OutputError)) for name in page)
        cases = [manifest for name, manifest in manifests if is_case(manifest, name)]
        for case in cases:
            outcome = "not synthesised" if case["not_filled"] else "nothing to synthesise"
            outcome = "synthesised" if case["synthetic"] else outcome
            counts[outcome] += 1
            verdicts[case.get("verdict", "look")][case["case"]] = reasons_of(case)
            where[case["case"]] = f"{link if number else ''}#{case['case']}"
            synthesised |= {*case["synthetic"]}
        body = {
            "title": "Completed studies",
            "counts": {} if number else counts,
            "warnings": [DISCLAIMER, *([ENHANCEMENT] if "t1c" in synthesised else [])],
            "cases": cases,
            "picture": _reader(out, (case.get("picture", {}).get("file") for case in cases)),
            "number": number,
            "pages": [(("../" if number else "") + to, names[0], names[-1]) for to, names in links if names],
            "left": cohort.get("left", 0),
        }
        if number == 0:
            body |= {"verdicts": {v: dict(sorted(its.items())) for v, its in verdicts.items()}, "where": where}
            body |= {"failed": cohort["failed"], "most_rows": MOST_ROWS}
        written = _write(out / link, "completion.html.j2", body)
    _remove_pages(out / "report", len(links))
    return written


def _no_verdicts(failed: Mapping[str, str]) -> dict[str, dict[str, list[Any]]]:
    """Verdict, from the worst to the best → its cases → their reasons; of those that failed."""
    found: dict[str, dict[str, list[Any]]] = {verdict: {} for verdict in reversed(VERDICTS)}
    found["refuse"] = {case: [{"contrasts": [], "text": reason}] for case, reason in failed.items()}
    return found


def _remove_pages(folder: Path, last: int) -> None:
    """Delete the pages that an earlier report had beyond the last one."""
    for page in folder.glob("*.html"):
        if page.stem.isdigit() and int(page.stem) > last and is_page(page):
            page.unlink()


def report_evaluation(out: Path) -> Path:
    """Write OUT/report.html of an evaluation: plots of all cases, tables and pictures.

    Raises:
        OutputError: OUT holds no evaluation, or cannot be written.
    """
    result = cast(Evaluation, read_json(out / "metrics.json", OutputError))
    if result.get("format") == BY_PROTOCOL:
        raise OutputError(f"{out} holds an evaluation by another protocol, which has no page: see its metrics.csv.")
    if not result.get("finished"):
        raise OutputError(f"{out} holds no finished evaluation. Run crossmr evaluate again.")
    by_case: dict[str, list[Picture]] = {}
    for picture in result["pictures"]:
        by_case.setdefault(picture["case"], []).append(picture)
    others = [BASELINE, *([result["against"]["predictor"]] if result["against"] else [])]
    others += dict.fromkeys(entry["predictor"] for entry in result["summary"] if entry["predictor"].startswith(PREFIX))
    scores = read_scores(out / "metrics.csv")
    body = {
        "title": "Evaluation",
        "counts": {
            "cases": len(result["cases"]),
            "failed": len(result["failed"]),
            "trained on": len(result["overlap"]["trained_on"]),
        },
        "warnings": [DISCLAIMER, *warnings_of(result)],
        "result": result,
        "tables": _target_tables(result["summary"], result["contrasts"]),
        "subsets": _subset_table(result["summary"], result["own"], others),
        "plots": [
            *(plot for other in others for plot in _scatter(scores, result["own"], other)),
            *_calibration(result["calibration"]),
        ],
        "headings": [(region, HEADINGS[metric], metric, digits) for region, metric, digits in COLUMNS],
        "structures": list(KEPT_HEADINGS.values()),
        "kept_between": KEPT,
        "spreads": SPREADS,
        "too_few": TOO_FEW,
        "by_case": by_case,
        "picture": _reader(out, (picture["file"] for picture in result["pictures"])),
    }
    return _write(out / REPORT, "evaluation.html.j2", body)


@cache
def _templates() -> Environment:
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["display_name"] = display_name
    pages.filters["display_names"] = lambda sources: " + ".join(display_name(m) for m in sources.split("+"))
    return pages


def _write(path: Path, template: str, body: Mapping[str, Any]) -> Path:
    page = (
        _templates()
        .get_template(template)
        .render(
            **body,
            version=version("crossmr"),
            most_pictures=MOST_PICTURES,
            window=f"{DARK:g} % to {BRIGHT:g} %",
            brightest=BRIGHTEST,
            colours=", ".join(f"rgb{colour}" for colour in COLOURS),
        )
    )
    refuse_foreign(path, is_page)
    write_atomically(path, page.encode(errors="replace"))
    return path


def _reader(out: Path, files: Iterable[str | None]) -> Callable[[str], str | None]:
    """From a picture's name to its data URL, for as many as a page has; None for the rest, and for what is gone."""
    shown = [file for file in dict.fromkeys(files) if file and (out / file).is_file()][:MOST_PICTURES]

    def read(file: str) -> str | None:
        if file not in shown:
            return None
        return "data:image/webp;base64," + base64.b64encode((out / file).read_bytes()).decode()

    return read


def _target_tables(summary: Sequence[Summary], contrasts: Sequence[ContrastSummary]) -> list[TargetTable]:
    tables = []
    by_structure = {(e["target"], e["sources"], e["predictor"], e["structure"]): e for e in contrasts}
    for target, sources in dict.fromkeys((entry["target"], entry["sources"]) for entry in summary):
        entries = [entry for entry in summary if (entry["target"], entry["sources"]) == (target, sources)]
        rows: dict[str, dict[str, Summary]] = {}
        for entry in entries:
            rows.setdefault(entry["predictor"], {})[entry["region"]] = entry
        kept = {
            predictor: [kept_cell(by_structure.get((target, sources, predictor, each))) for each in STRUCTURES]
            for predictor in rows
        }
        patients = max(entry["patients"] for entry in entries)
        too_few, own = say_out_of_reach(out_of_reach(entries), patients), patients_of(entries)
        fewer = {name: of_fewer(count, patients) for name, count in own.items()}
        tables.append(TargetTable(target, sources, patients, rows, fewer, kept, bounds_of(patients), too_few))
    return tables


def _subset_table(summary: Sequence[Summary], own: str, others: Sequence[str]) -> SubsetTable | None:
    """The model's own and the other predictors from every subset of sources; None where there is one set alone."""
    brain = [entry for entry in summary if entry["region"] == "brain" and entry["predictor"] in (own, *others)]
    sources = list(dict.fromkeys(entry["sources"] for entry in brain))
    if len(sources) < 2:
        return None
    means = {(e["sources"], e["target"], e["predictor"]): e["psnr"]["mean"] for e in brain}
    targets = in_usual_order({entry["target"] for entry in brain})
    return SubsetTable(targets, sorted(sources, key=lambda name: name.count("+")), others, means)


def _scatter(scores: Sequence[Score], own: str, other: str) -> list[Plot]:
    """Every case's PSNR over the brain against another predictor's, a plot a target."""
    psnr = {(s.target, s.sources, s.case, s.predictor): s.psnr for s in scores if s.region == "brain"}
    plots = []
    for target in in_usual_order({target for target, *_ in psnr}):
        series: dict[str, list[Point]] = {}
        for goal, sources, case, predictor in psnr:
            point = Point(psnr.get((goal, sources, case, other), math.nan), psnr[goal, sources, case, predictor], case)
            if goal == target and predictor == own and math.isfinite(point.x) and math.isfinite(point.y):
                series.setdefault(sources, []).append(point)
        if series:
            x = f"PSNR of {'the ' * (other == BASELINE)}{other.removeprefix(AGAINST)}, dB"
            plots.append(_plot(f"{display_name(target)}: each case", x, "PSNR of the model, dB", series))
    return plots


def _calibration(curve: Sequence[CalibrationSummary]) -> list[Plot]:
    """The standard deviation of each decile of the voxels, against their error."""
    series: dict[str, list[Point]] = {}
    for entry in curve:
        point = Point(entry["std"], entry["error"], f"decile {entry['decile']}")
        series.setdefault(display_name(entry["target"]), []).append(point)
    if not series:
        return []
    x, y = "standard deviation", "root mean square of the error"
    return [_plot("Calibration of the standard deviation", x, y, series, origin=True)]


def _plot(title: str, x: str, y: str, series: Series, *, origin: bool = False) -> Plot:
    """Scale the points of all series into the square; with `origin` both axes begin at 0, and the points are joined."""
    values = [value for points in series.values() for point in points for value in (point.x, point.y)]
    low, high = 0.0 if origin else min(values), max(values)
    margin = 0.05 * (high - low) or 1.0
    low, high = (low if origin else low - margin), high + margin
    step = next((s * 10.0**e for e in range(-6, 6) for s in (1, 2, 5) if (high - low) / (s * 10.0**e) <= 6), high - low)
    first = -int(-low // step)

    def place(value: float) -> float:
        return round(100 * (value - low) / (high - low), 2)

    placed = {name: [Point(place(p.x), place(p.y), p.label) for p in points] for name, points in series.items()}
    ticks = [(place(n * step), f"{n * step:g}") for n in range(first, first + 8) if n * step <= high]
    return Plot(title, x, y, placed, ticks, origin)
