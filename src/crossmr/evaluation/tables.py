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
from crossmr.evaluation.statistics import (
    FEWEST,
    ContrastSummary,
    Summary,
    UncertaintySummary,
    out_of_reach,
    patients_of,
    say_out_of_reach,
)
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
RATIOS: tuple[Literal["error_ratio", "std_ratio"], ...] = ("error_ratio", "std_ratio")
"""And last, in one column."""
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


Bounds = tuple[Literal["low", "least"], Literal["high", "most"]]
SPREADS: dict[Bounds | None, str] = {None: "", ("least", "most"): " and range", ("low", "high"): " and 95 % interval"}
TOO_FEW: dict[Bounds | None, str] = {
    None: "",
    ("least", "most"): f" (fewer than {FEWEST}: no interval)",
    ("low", "high"): "",
}


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
    """How well the standard deviations tell where the errors are: see `summarise_uncertainty_by_target`."""
    table = _table("uncertainty: errors within the head, mean over patients")
    table.add_column("target")
    table.add_column("uncertainty")
    for heading in ("patients", *(heading for heading, _, _ in UNCERTAINTY_COLUMNS), "error / std, lesion over rest"):
        table.add_column(heading, justify="right")
    for entry in summary:
        cells = [_number(entry[measure], digits) for _, measure, digits in UNCERTAINTY_COLUMNS]
        ratios = " / ".join(_number(entry[ratio], 2) for ratio in RATIOS)
        table.add_row(entry["target"], entry["uncertainty"], str(entry["patients"]), *cells, ratios)
    return table


def other_tables(protocol: str, summary: Sequence[OtherSummary]) -> list[Table]:
    """A table for all targets together and one for each, by another protocol than ours.

    What is the mean over fewer images than the others says over how many.
    """
    shown = [measure for measure in OTHER_COLUMNS if any(entry["measure"] == measure for entry in summary)]
    made = []
    for target in dict.fromkeys(entry["target"] for entry in summary):
        entries = {(e["predictor"], e["measure"]): e for e in summary if e["target"] == target}
        images = max(entry["images"] for entry in entries.values())
        table = _table(f"{target} by the protocol '{protocol}': mean over {images} image{'s' * (images > 1)}")
        table.add_column("predictor", no_wrap=True)
        for measure in shown:
            table.add_column(OTHER_COLUMNS[measure][0], justify="right", no_wrap=True)
        for predictor in dict.fromkeys(predictor for predictor, _ in entries):
            cells = [_other_cell(entries.get((predictor, m)), OTHER_COLUMNS[m][1], images) for m in shown]
            table.add_row(escape(predictor), *cells)
        made.append(table)
    return made


def _other_cell(entry: OtherSummary | None, digits: int, images: int) -> str:
    """A mean, and over how many images where that is not over all `images`."""
    if entry is None or entry["mean"] is None:
        return "–"
    fewer = f"\nof {entry['images']} image{'s' * (entry['images'] > 1)}" * (entry["images"] < images)
    return f"{_number(entry['mean'], digits)}{fewer}"


def bounds_of(patients: int) -> Bounds | None:
    """Which bounds stand beside a mean over so many patients: of its interval, or, of few, of their values."""
    if patients < 2:
        return None
    return ("least", "most") if patients < FEWEST else ("low", "high")


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
    bounds = bounds_of(patients) if intervals else None
    table = _table(f"{target} from {sources}: mean{SPREADS[bounds]} over {patients} patients{TOO_FEW[bounds]}")
    of_models = {name: few for name, few in out_of_reach(entries).items() if name not in BASELINES}
    table.caption = "\n".join(map(escape, say_out_of_reach(of_models, patients))) or None
    table.add_column("predictor", no_wrap=True)
    for region, metric, _ in COLUMNS:
        table.add_column(f"{HEADINGS[metric]}\n{region}", justify="right", no_wrap=True)
    for heading in KEPT_HEADINGS.values():
        table.add_column(f"{heading}\nkept", justify="right", no_wrap=True)
    kept = {(e["predictor"], e["structure"]): e for e in contrasts if (e["target"], e["sources"]) == (target, sources)}
    by_place, own = {(entry["predictor"], entry["region"]): entry for entry in entries}, patients_of(entries)
    for predictor in dict.fromkeys(entry["predictor"] for entry in entries):
        cells = [_cell(by_place.get((predictor, r)), metric, digits, bounds) for r, metric, digits in COLUMNS]
        cells += [kept_cell(kept.get((predictor, structure))) for structure in STRUCTURES]
        named = "\n".join(filter(None, (predictor, of_fewer(own[predictor], patients))))
        table.add_row(escape(named), *cells)
    return table


def of_fewer(own: int, patients: int) -> str:
    """Of how many patients a predictor has images, where they are fewer than the table's; else ''."""
    return "" if own == patients else f"of {own} patient{'s' * (own > 1)}"


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
            own, baseline = (_cell(entry, metric, digits) for entry in pair)
            cells.append("" if own == "–" else f"{own} ({baseline})")
        patients = max(entry["patients"] for entry in summary if entry["sources"] == sources)
        table.add_row(sources, str(patients), *cells)
    return table


def _table(title: str) -> Table:
    return Table(title=escape(title), title_justify="left", box=SIMPLE, padding=(0, 1))


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _cell(entry: Summary | None, metric: Metric, digits: int, bounds: Bounds | None = None) -> str:
    if entry is None or (mean := entry[metric]["mean"]) is None:
        return "–"
    low, high = (entry[metric][bound] for bound in bounds) if bounds else (None, None)
    if low is None or high is None:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f}\n{low:.{digits}f}–{high:.{digits}f}"
