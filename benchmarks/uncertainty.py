"""Do the standard deviations beside the images tell where these are wrong, and which lesions are lost?

python benchmarks/uncertainty.py runs/default -o runs/evidence              # the shipped weights, the test studies
python benchmarks/uncertainty.py runs/default -o runs/evidence --table      # from the kept rows alone
python benchmarks/uncertainty.py runs/default -o runs/evidence --site SSA --model \
    runs/evidence/patients/seed-0/SSA-model-of-other-sites-as-it-is/run/model       # a site left out, by patients.py

Every contrast is made from every subset of the others, in every third axial slice. The standard deviation is compared
with the error within the brain, on the scale of robust standard deviations, by region and by the number of sources:
'deep' is 5 mm and more from the brain's rim, 'rim' the rest; lesion (of T1ce what enhances) and fluid are those of
`crossmr evaluate`; 'healthy' is outside both. AUSE is of one voxel in seven, beside rivals that every network has:

intensity   the synthetic image itself
rim         how near the brain's rim is, in its slice
gradient    the size of the image's gradient, in its slice
looked up   the root mean square error of the validation patients from as many sources, at that distance from the rim
            and that intensity
variants    the spread of four syntheses: as it is, mirrored, with noise on the sources, and both; three sources only

'again' is a trial that the product does not have: the variance is fitted anew on the validation patients, with terms
for how far each source lies above and below 2.5 robust standard deviations around; no labels are needed.

A lesion is lost below half of its contrast, and kept between .7 and 1.4 of it. Given its true outline, the AUC says how
often the ratio of mean standard deviations, lesion over the healthy rest, is larger for a lost lesion than for a kept
one of the same contrast. The rank correlation of that ratio with the share of contrast kept is below 0 where lost
lesions are flagged; beside it the same of the rivals.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from grid import Kept, Row, arguments, by_patient, column, four_contrasts, parser
from patients import EVERY, SITES, of_site, tested
from scipy import ndimage
from scipy.optimize import minimize
from scipy.stats import mannwhitneyu, spearmanr
from thin import FOUR, made, thinned

from crossmr import metrics
from crossmr.data.dataset import Case
from crossmr.data.naming import DISPLAY_NAMES
from crossmr.device import choose_device
from crossmr.evaluation.measures import KEPT, LOST, RIM_MM, measure_contrasts, structures_of
from crossmr.evaluation.subjects import Array, Mask, Subject, subject_of_case
from crossmr.networks.model import CrossConditionedModel
from crossmr.networks.scale import RANGE, standardise
from crossmr.registry import load_model
from crossmr.tensors import seeded

SHIPPED = "shipped weights"
REGIONS = ("brain", "deep", "rim", "lesion", "fluid", "healthy")
RIVALS = ("intensity", "rim", "gradient", "looked up", "variants", "again")
FLAGS = ("std", "intensity", "gradient", "looked up", "variants", "again")
"""What may flag a lost lesion, whose outline is given: the ratio of its mean there to that in the rest."""
STD_95 = 1.96
SPARSE = 7
"""One voxel in so many makes the AUSE, and the fits."""
DISTANCES, INTENSITIES = (0.0, 2.0, 4.0, 7.0, 12.0, 20.0, 1e9), tuple(np.linspace(0, 1, 31).tolist())
"""Edges of the bins of what is looked up: millimetres, and the [0, 1] scale."""
FAR, AROUND, NOISE = 2.5, 1.5, 0.1
"""Robust standard deviations from the median that are far; voxels of the Gaussian around; noise of the variants."""
SUBSETS = tuple(some for size in (3, 2, 1) for some in itertools.combinations(FOUR, size))
SECONDS = 35.0
"""Of one test study, on two cores."""
Fit = dict[str, Any]
"""Of a target: 'looked up', number of sources → (distances, intensities); 'again', the weights of the variance."""


def from_rim(subject: Subject) -> Array:
    """How far each voxel is from the brain's rim in its slice, in millimetres."""
    planes = np.pad(subject.head, ((0, 0), (1, 1), (1, 1)))
    each = [ndimage.distance_transform_edt(plane, subject.spacing_mm[1:])[1:-1, 1:-1] for plane in planes]
    return np.stack(each).astype(np.float32)


def variants(model: CrossConditionedModel, subject: Subject, sources: Sequence[str], every: int) -> dict[str, Array]:
    """The spread over four syntheses of each missing contrast; the first one is the image as it is."""
    stacks: dict[str, list[Array]] = {}
    for mirrored, noisy in itertools.product((False, True), repeat=2):
        volumes = dict(subject.volumes)
        for m in sources if noisy else ():
            noise = torch.randn(volumes[m].shape, generator=seeded("noise", subject.name, m, mirrored)).numpy()
            volumes[m] = np.where(volumes[m] > 0, (volumes[m] + NOISE / RANGE * noise).clip(1e-3, 1), np.float32(0))
        head = subject.head
        if mirrored:
            volumes, head = {m: np.ascontiguousarray(v[..., ::-1]) for m, v in volumes.items()}, head[..., ::-1]
        images, _ = made(model, replace(subject, volumes=volumes, head=head), sources, every)
        for target, image in images.items():
            stacks.setdefault(target, []).append(image[..., ::-1] if mirrored else image)
    return {target: np.stack(images).std(0) for target, images in stacks.items()}


def terms(less: Subject, sources: Sequence[str], std: Array) -> Array:
    """What the variance is made of again (terms, Z, Y, X): the written one, 1, and how far the sources lie around."""
    far = []
    for source in sources:
        z = standardise(torch.from_numpy(less.volumes[source])).numpy()
        far += [np.maximum(z - FAR, 0), np.maximum(-z - FAR, 0)]
    smooth = [ndimage.gaussian_filter(one, (0, AROUND, AROUND)) for one in far]
    return np.stack([(std * RANGE) ** 2, np.ones_like(std), *smooth]).astype(np.float32)


def likeliest(parts: npt.NDArray[np.float32], squared: npt.NDArray[np.float32]) -> list[float]:
    """Weights >= 0 of the terms (K, N) of a variance under which squared errors (N,) are likeliest, if Gaussian."""

    def cost(logs: npt.NDArray[np.float64]) -> tuple[float, npt.NDArray[np.float64]]:
        weights = np.exp(logs)
        fitted = weights @ parts
        slope = (1 / fitted - squared / fitted**2) / len(squared)
        return float((np.log(fitted) + squared / fitted).mean()), (parts @ slope) * weights

    first = np.log([1.0, *[1e-2] * (len(parts) - 1)])
    bounds = [(-12.0, 4.0)] * len(first)
    return [float(w) for w in np.exp(minimize(cost, first, jac=True, method="L-BFGS-B", bounds=bounds).x)]


def fit(model: CrossConditionedModel, cases: Sequence[Case], every: int) -> dict[str, Fit]:
    """What is learnt of the validation patients, target by target.

    What is looked up is learnt for each number of sources, the variance that is fitted again of three sources alone.
    """
    pairs: dict[tuple[str, int], list[tuple[Array, Array, Array]]] = {}
    variances: dict[str, list[tuple[Array, Array]]] = {}
    for case in cases:
        subject = subject_of_case(case)
        less = thinned(subject, every)
        distance = from_rim(less)
        for sources in SUBSETS:
            images, stds = made(model, subject, sources, every)
            for target, image in images.items():
                chosen = np.flatnonzero(less.head & (less.volumes[target] > 0))[::SPARSE]
                squared = ((image - less.volumes[target]) * RANGE).ravel()[chosen] ** 2
                three = distance.ravel()[chosen], image.ravel()[chosen], squared
                pairs.setdefault((target, len(sources)), []).append(three)
                if len(sources) == len(FOUR) - 1:
                    parts = terms(less, sources, stds[target]).reshape(-1, less.head.size)[:, chosen]
                    variances.setdefault(target, []).append((parts, squared))
    fits: dict[str, Fit] = {target: {"looked up": {}} for target in FOUR}
    for (target, count), some in pairs.items():
        distance, image, squared = (np.concatenate(one) for one in zip(*some, strict=True))
        bins = (np.array(DISTANCES), np.array(INTENSITIES))
        voxels = np.histogram2d(distance, image, bins)[0]
        total = np.histogram2d(distance, image, bins, weights=squared)[0]
        mean = (total + 10 * squared.mean()) / (voxels + 10)  # of few voxels, towards the mean of all
        fits[target]["looked up"][count] = np.sqrt(mean)
    for target, known in variances.items():
        fits[target]["again"] = likeliest(*(np.concatenate(one, -1) for one in zip(*known, strict=True)))
    return fits


def looked_up(table: npt.NDArray[np.float64], distance: Array, image: Array) -> Array:
    """The error that was found at that distance from the rim and that intensity."""
    row = np.digitize(distance, DISTANCES[1:-1])
    place = np.digitize(image, INTENSITIES[1:-1])
    return table.astype(np.float32)[row, place]


def regions(less: Subject, target: str, distance: Array) -> dict[str, Mask]:
    """Where errors are measured; no lesion or fluid where there is hardly any."""
    inside = less.head & (less.volumes[target] > 0)
    structures: dict[str, Mask] = {str(name): pair[0] for name, pair in structures_of(less, target).items()}
    healthy = inside & ~less.tumour & ~structures.get("fluid", np.zeros_like(inside))
    deep = distance >= RIM_MM
    return {"brain": inside, "deep": inside & deep, "rim": inside & ~deep, **structures, "healthy": healthy}


def row_of(
    less: Subject, sources: Sequence[str], target: str, image: Array, ways: Mapping[str, Array], distance: Array
) -> Row:
    """All that is measured of one image; `ways` are its uncertainties, 'std' first."""
    error, row = (image - less.volumes[target]) * RANGE, dict[str, Any]()
    places = regions(less, target, distance)
    for region, mask in places.items():
        for way in ("std", *(["again"] if "again" in ways else [])):
            std = ways[way][mask] * RANGE
            row[f"{way}_{region}"] = float(np.sqrt((std**2).mean()))
            row[f"coverage_{way}_{region}"] = float((np.abs(error[mask]) <= STD_95 * std).mean())
        row[f"error_{region}"] = float(np.sqrt((error[mask] ** 2).mean()))
    chosen = np.flatnonzero(places["brain"])[::SPARSE]
    missed = torch.from_numpy(np.abs(error).ravel()[chosen])
    for way, uncertainty in ways.items():
        scores = metrics.error_against_uncertainty(missed, torch.from_numpy(uncertainty.ravel()[chosen]))
        row[f"ause_{way}"] = scores["ause"]
    if (pair := structures_of(less, target).get("lesion")) is not None:
        for name, values in (*((w, ways[w]) for w in FLAGS if w in ways), ("error", np.abs(error))):
            row[f"ratio_{name}"] = float(values[pair[0]].mean() / values[pair[1]].mean())
        contrasts = measure_contrasts(less, sources, {"": {target: image}})
        row["lesion_kept"] = next(one.kept for one in contrasts if one.structure == "lesion")
    return row


def rows_of(model: CrossConditionedModel, case: Case, fits: Mapping[str, Fit], every: int, name: str) -> list[Row]:
    """The rows of one study: of every subset of its contrasts, each that is missing."""
    subject = subject_of_case(case)
    less, rows = thinned(subject, every), []
    distance = from_rim(less)
    for sources in SUBSETS:
        images, stds = made(model, subject, sources, every)
        spread = variants(model, subject, sources, every) if len(sources) == 3 else {}
        for target, image in images.items():
            ways = {"std": stds[target], "intensity": image, "rim": -distance}
            ways["gradient"] = np.hypot(*np.gradient(image, axis=(1, 2)))
            ways["looked up"] = looked_up(fits[target]["looked up"][len(sources)], distance, image)
            if target in spread:
                variance = np.tensordot(fits[target]["again"], terms(less, sources, stds[target]), 1)
                ways |= {"variants": spread[target], "again": (np.sqrt(variance) / RANGE).astype(np.float32)}
            facts = {"model": name, "case": case.name, "patient": case.patient, "target": target}
            measured = row_of(less, sources, target, image, ways, distance)
            rows.append({**facts, "sources": "+".join(sources), "count": len(sources), **measured})
    return rows


def over_patients(rows: Sequence[Row], value: str, of: Callable[[Sequence[Row]], float]) -> str:
    """A number of rows that have the value, with its interval over patients."""
    own = [row for row in rows if value in row and np.isfinite(row.get("lesion_kept", np.nan))]
    groups = [[r for r in own if r["patient"] == patient] for patient in sorted({row["patient"] for row in own})]
    if len(groups) < 5 or not np.isfinite(of(own)):
        return "–"
    random = np.random.default_rng(0)
    drawn = [of([r for k in random.integers(len(groups), size=len(groups)) for r in groups[k]]) for _ in range(300)]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return f"{of(own):.2f} ({low:.2f}–{high:.2f})"


def auc(rows: Sequence[Row], value: str) -> str:
    """How often the value is larger for a lost lesion than for a kept one of the same contrast."""

    def of(some: Sequence[Row]) -> float:
        lost = [r[value] for r in some if r["lesion_kept"] < LOST]
        kept = [r[value] for r in some if KEPT[0] <= r["lesion_kept"] <= KEPT[1]]
        return float(mannwhitneyu(lost, kept).statistic / len(lost) / len(kept)) if lost and kept else float("nan")

    return over_patients(rows, value, of)


def rank_correlation(rows: Sequence[Row], value: str) -> str:
    """Spearman's, of the value with the share of its contrast that the lesion keeps."""

    def of(some: Sequence[Row]) -> float:
        return float(spearmanr([r["lesion_kept"] for r in some], [r[value] for r in some]).statistic)

    return over_patients(rows, value, of)


def mean(rows: Sequence[Row], value: str) -> float:
    """Over patients."""
    numbers = by_patient(rows, value).values()
    return statistics.fmean(numbers) if numbers else float("nan")


def calibrated(rows: Sequence[Row], region: str, way: str = "std") -> str:
    """Standard deviation : error, and the coverage, of one region."""
    if not by_patient(rows, f"error_{region}"):
        return "–"
    std, error, coverage = (mean(rows, f"{name}_{region}") for name in (way, "error", f"coverage_{way}"))
    return f"{std:.2f} : {error:.2f}, {100 * coverage:.0f} %"


def print_table(title: str, heads: Sequence[str], lines: Mapping[str, Sequence[str]]) -> None:
    """Markdown."""
    print(f"\n**{title}**\n\n| | {' | '.join(heads)} |\n{'|---' * (len(heads) + 1)}|")
    for name, cells in lines.items():
        print(f"| {name} | {' | '.join(cells)} |")


def print_tables(rows: Sequence[Row]) -> None:
    """All tables of one model."""
    targets = {DISPLAY_NAMES[t]: [row for row in rows if row["target"] == t] for t in FOUR}
    most = {name: [row for row in own if row["count"] == 3] for name, own in targets.items()}
    title = "Standard deviation : root mean square error, errors within 1.96 deviations"
    by_region = {name: [calibrated(own, region) for region in REGIONS] for name, own in most.items()}
    print_table(f"{title}; three sources", REGIONS, by_region)
    both = list(itertools.product(("brain", "lesion"), (1, 2, 3)))
    by_count = {
        name: [calibrated([row for row in own if row["count"] == k], region) for region, k in both]
        for name, own in targets.items()
    }
    heads = [f"{region}, {k} source{'s' * (k > 1)}" for region, k in both]
    print_table(f"{title}; by the number of sources", heads, by_count)

    for sources, some in (("three sources", most), ("all subsets", targets)):
        ways = [way for way in ("std", *RIVALS) if any(f"ause_{way}" in row for row in rows)]
        ways = ways if some is most else [way for way in ways if way not in ("variants", "again")]
        cells = {}
        for name, own in some.items():
            groups = {way: [{**row, "ause": row.get(f"ause_{way}")} for row in own] for way in ways}
            cells[name] = list(column(groups, "std", "ause", 2).values())
        print_table(f"AUSE, 0 is perfect; {sources}", ways, cells)
    print_lesions(targets)
    again = {
        name: [
            *(f"{mean(own, f'ratio_{way}'):.2f}" for way in ("error", "std", "again")),
            *(calibrated(own, region, way) for region in ("brain", "lesion") for way in ("std", "again")),
        ]
        for name, own in most.items()
    }
    heads = ["lesion over rest: error", "std", "again", "brain: std", "again", "lesion: std", "again"]
    print_table("Fitted again with what the sources show; three sources", heads, again)


def print_lesions(targets: Mapping[str, Sequence[Row]]) -> None:
    """Whether lost lesions are flagged, contrast by contrast: most lost ones are of T1ce, most kept ones are not."""
    lines = {}
    for name, own in targets.items():
        known = [row for row in own if np.isfinite(row.get("lesion_kept", np.nan))]
        if known:
            counts = [sum(r["lesion_kept"] < LOST for r in known), len(known)]
            of_most = [r for r in known if r["count"] == 3]
            ranks = [rank_correlation(of_most, f"ratio_{way}") for way in FLAGS]
            own_auc, all_ranks = auc(known, "ratio_std"), rank_correlation(known, "ratio_std")
            lines[name] = ["{} of {}".format(*counts), own_auc, all_ranks, *ranks]
    heads = ["lost, all subsets", "AUC of std, all subsets", "rank correlation of std, all subsets", *FLAGS]
    print_table("Lost lesions, by the ratio of lesion over rest; rank correlations with the share kept", heads, lines)


def measure_all(given: argparse.Namespace, kept: Kept, name: str) -> None:
    """Measure the test studies that are missing."""
    every = 30 if given.tiny else EVERY
    test = [case for case in tested(given.base, given.site) if not given.only or case.name in given.only]
    test = test[: 1 if given.tiny else None]
    left = [case for case in test if not kept.has(model=name, case=case.name)]
    val = [case for case in four_contrasts(given.base, "val") if not of_site(case.name, given.site)]
    print(f"about {(SECONDS * len(left) + 10 * len(val)) / 60:.0f} minutes", flush=True)
    if not left:
        return
    model = load_model(given.model, choose_device(given.device))
    fits = fit(model, val[: 1 if given.tiny else None], every)
    for case in left:
        begin = time.monotonic()
        kept.add(rows_of(model, case, fits, every, name))
        print(f"{case.name}: {time.monotonic() - begin:.0f} seconds", flush=True)


def main() -> None:
    """Measure what is missing, then print the tables."""
    options = parser(__doc__)
    options.add_argument("--model", type=Path, help="a model's folder; by default the shipped weights")
    options.add_argument("--site", choices=tuple(SITES), help="only its patients; it is none of the validation's")
    options.add_argument("--only", nargs="+", default=(), metavar="CASE", help="these test studies")
    given = arguments(options)
    kept, name = (
        Kept(given.out, "uncertainty"),
        SHIPPED if given.model is None else f"without {given.site}" if given.site else str(given.model),
    )
    if not given.table:
        measure_all(given, kept, name)
    for model in dict.fromkeys(row["model"] for row in kept.rows):
        cases = {row["case"] for row in kept.rows if row["model"] == model}
        print(f"\n## {model}: {len(cases)} studies")
        print_tables([row for row in kept.rows if row["model"] == model])
        if model != SHIPPED and (same := [r for r in kept.rows if r["model"] == SHIPPED and r["case"] in cases]):
            print("\n## shipped weights, the same studies")
            print_tables(same)


if __name__ == "__main__":
    main()
