"""The numbers as people read them: tables for the terminal, and CSV."""

import csv
import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from rich.box import SIMPLE
from rich.markup import escape
from rich.table import Table

from crossmr.baselines import BASELINES
from crossmr.data.naming import in_usual_order
from crossmr.errors import OutputError
from crossmr.evaluation.measures import METRICS, STRUCTURES, Metric, Score, Structure
from crossmr.evaluation.statistics import ContrastSummary, Summary, UncertaintySummary
from crossmr.files import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BASELINE = "linear regression"
"""The predictor that a model's own is held against."""
HEADINGS: dict[Metric, str] = {"psnr": "PSNR", "ssim": "SSIM", "correlation": "corr."}
COLUMNS: tuple[tuple[str, Metric, int], ...] = (
    ("deep", "correlation", 3),
    ("brain", "psnr", 2),
    ("brain", "ssim", 3),
    ("tumour", "psnr", 2),
)
"""What the tables show: region, metric, digits; then the patients whose lesion, and whose fluid, is kept."""
KEPT_HEADINGS: dict[Structure, str] = {"lesion": "lesions", "fluid": "fluid"}
UNCERTAINTY_COLUMNS: tuple[tuple[str, Literal["error", "error_most_certain_90", "ause", "coverage_95"], int], ...] = (
    ("mean error", "error", 4),
    ("error, most certain 90 %", "error_most_certain_90", 4),
    ("AUSE (0 is perfect)", "ause", 2),
    ("within 1.96 std", "coverage_95", 2),
)
"""What the table of uncertainty shows: heading, measure, digits."""
OTHER_COLUMNS: dict[str, tuple[str, int]] = {
    "ssim_whole": ("SSIM\nwhole", 4),
    "ssim_tumour": ("SSIM\ntumour", 4),
    "ssim_healthy": ("SSIM\nhealthy", 4),
    "psnr": ("PSNR\nwhole scan", 2),
    "ssim": ("SSIM\nwhole scan", 4),
    "dice_wt": ("Dice\nWT", 3),
    "dice_tc": ("Dice\nTC", 3),
    "dice_et": ("Dice\nET", 3),
}
"""Measure of another protocol → heading and digits."""


class OtherSummary(TypedDict):
    """The mean over all images of one measure of one predictor by another protocol."""

    target: str
    """'all' for the mean over all targets."""
    predictor: str
    measure: str
    images: int
    mean: float | None
    """None if infinite."""


def tables(
    summary: Sequence[Summary], contrasts: Sequence[ContrastSummary] = (), *, intervals: bool = True
) -> list[Table]:
    """A table for each target: brain and tumour by the protocol 'volume', and how often lesion and fluid are kept.

    Where a target was synthesised from several subsets of sources, of the subset that most patients have, and of such
    the largest; and for each predictor two tables of all subsets.
    """
    tasks: dict[tuple[str, str], list[Summary]] = {}
    for entry in summary:
        tasks.setdefault((entry["target"], entry["sources"]), []).append(entry)
    fullest: dict[str, list[Summary]] = {}
    for (target, _), entries in tasks.items():
        fullest[target] = max(fullest.get(target, entries), entries, key=_size)
    made = [_target_table(entries, contrasts, intervals) for entries in fullest.values()]
    if len(tasks) == len(fullest):
        return made
    predictors = [name for name in dict.fromkeys(entry["predictor"] for entry in summary) if name not in BASELINES]
    shown: tuple[tuple[Metric, int], ...] = (("psnr", 2), ("ssim", 3))
    return made + [_subsets_table(summary, predictor, *column) for predictor in predictors for column in shown]


def _size(entries: Sequence[Summary]) -> tuple[int, int]:
    """How many patients, and how many sources, the images of one target from one subset of sources have."""
    return max(entry["patients"] for entry in entries), len(entries[0]["sources"].split("+"))


def uncertainty_table(summary: Sequence[UncertaintySummary]) -> Table:
    """How well the standard deviations tell where the errors are.

    Of a target that was synthesised from several subsets of sources, the mean over these.
    """
    table = _table("uncertainty: errors within the head")
    table.add_column("target")
    table.add_column("uncertainty")
    for heading in (*(heading for heading, _, _ in UNCERTAINTY_COLUMNS), "error / std, lesion over rest"):
        table.add_column(heading, justify="right")
    for target, name in dict.fromkeys((entry["target"], entry["uncertainty"]) for entry in summary):
        entries = [entry for entry in summary if (entry["target"], entry["uncertainty"]) == (target, name)]
        cells = [_mean([entry[measure] for entry in entries], digits) for _, measure, digits in UNCERTAINTY_COLUMNS]
        ratios = ([entry["error_ratio"] for entry in entries], [entry["std_ratio"] for entry in entries])
        table.add_row(target, name, *cells, " / ".join(_mean(values, 2) for values in ratios))
    return table


def other_tables(protocol: str, summary: Sequence[OtherSummary]) -> list[Table]:
    """A table for all targets together and one for each, by another protocol than ours."""
    shown = [measure for measure in OTHER_COLUMNS if any(entry["measure"] == measure for entry in summary)]
    made = []
    for target in dict.fromkeys(entry["target"] for entry in summary):
        means = {(e["predictor"], e["measure"]): e["mean"] for e in summary if e["target"] == target}
        images = max(entry["images"] for entry in summary if entry["target"] == target)
        table = _table(f"{target} by the protocol '{protocol}': mean over {images} image{'s' * (images > 1)}")
        table.add_column("predictor", no_wrap=True)
        for measure in shown:
            table.add_column(OTHER_COLUMNS[measure][0], justify="right", no_wrap=True)
        for predictor in dict.fromkeys(predictor for predictor, _ in means):
            table.add_row(escape(predictor), *(_mean([means.get((predictor, m))], OTHER_COLUMNS[m][1]) for m in shown))
        made.append(table)
    return made


def kept_cell(entry: ContrastSummary | None) -> str:
    """In how many patients a contrast is kept, of how many; a dash where it stands out in none."""
    if entry is None or entry["kept"] is None:
        return "–"
    return f"{round(entry['kept'] * entry['patients'])} of {entry['patients']}"


def write_csv(path: Path, rows: "Sequence[DataclassInstance]") -> None:
    """Write one or more rows of one kind; the columns are their fields.

    Raises:
        OutputError: the file cannot be written.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in dataclasses.fields(rows[0]))
    writer.writerows(dataclasses.astuple(row) for row in rows)
    write_atomically(path, text.getvalue().encode(errors="surrogatepass"))  # file names may be no Unicode


def is_table(path: Path, kind: "type[DataclassInstance]") -> bool:
    """Whether a file is a table that `write_csv` wrote of rows of this kind: its first line names their fields."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.readline(4096) == ",".join(field.name for field in dataclasses.fields(kind)).encode() + b"\n"


def read_scores(path: Path) -> list[Score]:
    """Read metrics.csv.

    Raises:
        OutputError: it is missing or damaged.
    """
    try:
        with path.open(newline="", errors="replace") as file:
            rows = [(row[: -len(METRICS)], map(float, row[-len(METRICS) :])) for row in list(csv.reader(file))[1:]]
        return [
            Score(case, patient, sources, target, predictor, protocol, region, *metrics)
            for (case, patient, sources, target, predictor, protocol, region), metrics in rows
        ]
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{path} is missing or damaged ({error}). Run crossmr evaluate again.") from error


def _target_table(entries: Sequence[Summary], contrasts: Sequence[ContrastSummary], intervals: bool) -> Table:
    """Predictor × region and metric, then structure, of one target."""
    patients, (target, sources) = max(e["patients"] for e in entries), (entries[0]["target"], entries[0]["sources"])
    intervals = intervals and patients > 1
    table = _table(f"{target} from {sources}: mean{' and 95 % interval' * intervals} over {patients} patients")
    table.add_column("predictor", no_wrap=True)
    for region, metric, _ in COLUMNS:
        table.add_column(f"{HEADINGS[metric]}\n{region}", justify="right", no_wrap=True)
    for heading in KEPT_HEADINGS.values():
        table.add_column(f"{heading}\nkept", justify="right", no_wrap=True)
    kept = {(e["predictor"], e["structure"]): e for e in contrasts if (e["target"], e["sources"]) == (target, sources)}
    by_place = {(entry["predictor"], entry["region"]): entry for entry in entries}
    for predictor in dict.fromkeys(entry["predictor"] for entry in entries):
        cells = [_cell(by_place.get((predictor, r)), metric, digits, intervals) for r, metric, digits in COLUMNS]
        cells += [kept_cell(kept.get((predictor, structure))) for structure in STRUCTURES]
        table.add_row(escape(predictor), *cells)
    return table


def _subsets_table(summary: Sequence[Summary], predictor: str, metric: Metric, digits: int) -> Table:
    """Sources × target: one metric over the brain, of one predictor and, in brackets, of the linear regression."""
    brain = {(e["sources"], e["target"], e["predictor"]): e for e in summary if e["region"] == "brain"}
    targets = in_usual_order({entry["target"] for entry in summary})
    table = _table(f"{HEADINGS[metric]} over the brain, {predictor} ({BASELINE})")
    table.add_column("from", no_wrap=True)
    table.add_column("patients", justify="right")
    for target in targets:
        table.add_column(target, justify="right", no_wrap=True)
    for sources in dict.fromkeys(entry["sources"] for entry in summary):
        cells = []
        for target in targets:
            pair = (brain.get((sources, target, name)) for name in (predictor, BASELINE))
            own, baseline = (_cell(entry, metric, digits, False) for entry in pair)
            cells.append("" if own == "–" else f"{own} ({baseline})")
        patients = max(entry["patients"] for entry in summary if entry["sources"] == sources)
        table.add_row(sources, str(patients), *cells)
    return table


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", box=SIMPLE, padding=(0, 1))


def _mean(values: Sequence[float | None], digits: int) -> str:
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):.{digits}f}" if known else "–"


def _cell(entry: Summary | None, metric: Metric, digits: int, interval: bool) -> str:
    if entry is None or (mean := entry[metric]["mean"]) is None:
        return "–"
    low, high = entry[metric]["low"], entry[metric]["high"]
    if not interval or low is None or high is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f}\n{low:.{digits}f}–{high:.{digits}f}"
