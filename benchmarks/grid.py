"""What the experiments of docs/evidence*.md share: patients, trainings, kept rows and tables.

BASE is the output of default_weights.py: its prepared set and its split are those of the shipped weights. An experiment
trains networks, measures what they make of the test patients, and keeps a row for each image in OUT/EXPERIMENT.jsonl;
the same command goes on with what is missing. Some rows are kept in rows/ beside the scripts, and `--table -o
benchmarks/rows` prints their tables. OUT is of one BASE, one version of the default weights and one budget of the
trainings: take another one where any of these changes. Patients are the units of every table: seeds and visits are
averaged first. The linear regression is fitted on all training patients of BASE, its 18 phantoms too.
"""

import argparse
import copy
import json
import math
import shutil
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from scans import cohort_of, patient_of, write_set
from scipy import ndimage
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from crossmr import metrics
from crossmr.baselines import predict_baselines
from crossmr.data.dataset import Case, PreparedDataset
from crossmr.data.formats import content_sha256
from crossmr.data.naming import DISPLAY_NAMES
from crossmr.device import autocast, choose_device, choose_precision
from crossmr.display import Display
from crossmr.evaluation.measures import KEPT, measure, measure_contrasts, regions_of, structures_of
from crossmr.evaluation.subjects import Array, Subject
from crossmr.networks.inference import HeadVolumes, InferenceSettings, synthesise
from crossmr.networks.model import CrossConditionedModel
from crossmr.networks.scale import on_unit_scale, standardise
from crossmr.tensors import crop_or_pad, neighbours, to_model_input
from crossmr.training.batches import Batches, BatchSettings
from crossmr.training.recipes import TrainConfig

Task = tuple[Sequence[str], Sequence[str]]
"""Sources, targets."""
PUBLISHED: Task = ("t1n", "t2w"), ("t1c", "t2f")
"""The published one."""
THREE: Task = ("t1n", "t1c", "t2w"), ("t2f",)
"""One of three to one: FLAIR, whose lesions matter most."""
CROP = 192, 160
"""Voxels of a training crop, (Y, X): nearly all brains whole."""
HOW = TrainConfig(
    batch_size=8,
    learning_rate=1e-3,
    schedule="cosine",
    warm_up=100,
    optimiser="adamw",
    beta_2=0.99,
    weight_decay=0.01,
    gradient_clip=1.0,
    ema_decay=0.995,
)
"""Optimisation of every network that an experiment trains, unless it says otherwise."""
COLUMNS = {
    "correlation, brain": ("correlation_brain", 3),
    "correlation, deep": ("correlation_deep", 3),
    "PSNR, brain": ("psnr_brain", 2),
    "SSIM, brain": ("ssim_brain", 3),
    "HaarPSI, brain": ("haarpsi_brain", 3),
    "correlation, tumour": ("correlation_tumour", 3),
    "PSNR, tumour": ("psnr_tumour", 2),
}
"""Heading → value of a row and its digits."""
FASTER = 10.0
"""Times the learning rate, for layers that start at zero beside trained ones."""
SMOOTH_MM = 1.5
"""Standard deviation of the Gaussian under which two images are compared without their finest detail."""
Row = dict[str, Any]
Key = TypeVar("Key", bound=Hashable)
Predict = Callable[[Tensor], Tensor]
"""Inputs (N, C, Y, X) of axial slices, standardised → images (N, T, Y, X), standardised."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The command line that the experiments share."""
    options = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument(
        "base", type=Path, nargs="?", default=Path("runs/default"), help="the output of default_weights.py"
    )
    options.add_argument("-o", "--out", type=Path, default=Path("runs/evidence"))
    options.add_argument(
        "--seeds", nargs="+", type=int, help="of the trainings, 0 by default; tables are of these alone"
    )
    options.add_argument("--device", default="auto")
    options.add_argument(
        "--table", action="store_true", help="print the tables of the rows in OUT; needs neither BASE nor scans"
    )
    options.add_argument(
        "--tiny", action="store_true", help="a rehearsal: a few steps, one patient; its rows mean nothing"
    )
    return options


DIFFERENCES: dict[str, Any] = {"action": "store_true", "help": "print differences to what * compares with"}
"""The option --differences of those whose tables the evidence page shows so."""


def arguments(options: argparse.ArgumentParser) -> argparse.Namespace:
    """What the command line says; a rehearsal has a folder of its own in OUT.

    `seeds` are those of the trainings, `shown` those of the tables: all where none is named.
    """
    given = options.parse_args()
    given.shown, given.seeds = given.seeds, given.seeds or [0]
    if given.tiny and given.out.name != "tiny":
        given.out /= "tiny"
    return given


class Kept:
    """The rows of one experiment, in a file that only grows."""

    def __init__(self, out: Path, experiment: str):
        out.mkdir(parents=True, exist_ok=True)
        self.path = out / f"{experiment}.jsonl"
        text = self.path.read_text() if self.path.exists() else ""
        whole, _, cut = text.rpartition("\n")  # a process that was killed may have left half a line
        if cut:
            self.path.write_text(f"{whole}\n" if whole else "")
        self.rows: list[Row] = [json.loads(line) for line in whole.splitlines()]

    def of(self, seeds: Sequence[int] | None) -> list[Row]:
        """The rows of these seeds, or all."""
        return [row for row in self.rows if seeds is None or row["seed"] in seeds]

    def has(self, **key: Any) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.rows)

    def add(self, rows: Iterable[Row]) -> None:
        """Keep these rows, all of them or none; six digits of a number are enough."""
        new = [{k: float(f"{v:.6g}") if isinstance(v, float) else v for k, v in row.items()} for row in rows]
        self.rows += new
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in new))


def four_contrasts(base: Path, split: str) -> list[Case]:
    """The studies of a split that have all four contrasts, phantoms left out."""
    cases = PreparedDataset(base / "set").split(split)
    return [case for case in cases if len(case.modalities) == 4 and cohort_of(case.name) != "phantoms"]


def start_of_row(subject: Subject, sources: Sequence[str], target: str) -> Row:
    """Whose image it is, made of what."""
    about = {"case": subject.name, "patient": subject.patient, "cohort": cohort_of(subject.name)}
    return {**about, "sources": "+".join(sources), "target": target}


def measured(subject: Subject, sources: Sequence[str], images: Mapping[str, Array], **facts: Any) -> list[Row]:
    """A row for each image, target → volume (Z, Y, X) in [0, 1], of one study; `facts` name predictor and seed."""
    rows = {target: {**facts, **start_of_row(subject, sources, target)} for target in images}
    within = {t: np.where(subject.head_of(t), volume, np.float32(0)) for t, volume in images.items()}
    for score in measure(subject, sources, {"": within}):
        if score.protocol == "volume":
            numbers = asdict(score)
            rows[score.target] |= {
                f"{name}_{score.region}": numbers[name]
                for name in ("psnr", "ssim", "mae", "haarpsi", "correlation", "psnr_affine")
            }
    for contrast in measure_contrasts(subject, sources, {"": within}):
        rows[contrast.target][f"{contrast.structure}_kept"] = contrast.kept
    return list(rows.values())


def synthesised(
    model: CrossConditionedModel, subject: Subject, sources: Sequence[str], targets: Sequence[str]
) -> Mapping[str, Array]:
    """What the model makes of these sources, 0 outside the head."""
    given = {m: subject.volumes[m] for m in sources}
    head = HeadVolumes.of(given, subject.head, subject.spacing_mm)
    images = (
        synthesise(model, head, subject.name, InferenceSettings(targets=tuple(targets))).images.numpy() * subject.head
    )
    return dict(zip(targets, images, strict=True))


def light_measures(
    subject: Subject,
    sources: Sequence[str],
    images: Mapping[str, Array],
    also: Mapping[str, Callable[[Array, Array], float]] | None = None,
    **facts: Any,
) -> list[Row]:
    """Rows of correlation and error deep within the brain, and of contrasts kept: in a tenth of `measured`'s time.

    `correlation_smooth` is the correlation once image and truth are smoothed by a Gaussian of SMOOTH_MM. What is kept
    is a contrast in quartile ranges of the rest of the brain, each image's own: `lesion_step` and `lesion_range` are
    the predicted contrast and the predicted quartile range over the true ones, `lesion_kept` their quotient. `also` are
    further measures of image and truth deep within the brain.
    """
    rows = dict[str, Row]()
    sigma = [SMOOTH_MM / side for side in subject.spacing_mm]
    for target, volume in images.items():
        within, sharp = regions_of(subject, target)["deep"], (volume, subject.volumes[target])
        smooth = (ndimage.gaussian_filter(v, sigma) for v in sharp)
        pair, blurred = (torch.from_numpy(np.stack([v[within] for v in vs]))[:, None, None] for vs in (sharp, smooth))
        numbers: dict[str, Tensor | float] = {
            "correlation_deep": metrics.correlation(*pair),
            "mae_deep": metrics.mae(*pair),
        }
        numbers["correlation_smooth"] = metrics.correlation(*blurred)
        numbers |= {name: of(*(v[within] for v in sharp)) for name, of in (also or {}).items()}
        about = start_of_row(subject, sources, target)
        rows[target] = {**facts, **about, **{name: float(number) for name, number in numbers.items()}}
    for contrast in measure_contrasts(subject, sources, {"": images}):
        name, row = contrast.structure, rows[contrast.target]
        row[f"{name}_kept"] = contrast.kept
        _, rest = structures_of(subject, contrast.target)[name]
        own, true = (np.subtract(*np.percentile(v[contrast.target][rest], (75, 25))) for v in (images, subject.volumes))
        row[f"{name}_range"] = float(own / true) if true else math.nan
        row[f"{name}_step"] = contrast.kept * row[f"{name}_range"]
    return list(rows.values())


def split_set(
    prepared: Path,
    out: Path,
    split: Callable[[str, str], str | None],
    change: Callable[[Case, str, Array], Array] | None = None,
) -> PreparedDataset:
    """A prepared set with another split, its arrays linked: `split(case, split before)` is where a case goes, or None.

    `change(case, modality, volume)` maps stored volumes (Z, Y, X) in [0, 1]; 0 stays 0.
    """
    dataset = PreparedDataset(prepared)
    shutil.rmtree(out, ignore_errors=True)
    entries = dict[str, Any]()
    for case in dataset.cases:
        entry = dict(dataset.manifest["cases"][case.name])
        if (part := split(case.name, case.split)) is None:
            continue
        folder = out / "cases" / case.name
        folder.mkdir(parents=True)
        entry["part"], entry["files"] = part, dict(entry["files"])
        for name in ("masks.npy", *(() if change else ("images.npy",))):
            (folder / name).symlink_to((case.folder / name).resolve())
        if change:
            volumes = [change(case, m, case.volume(m)) for m in case.modalities]
            np.save(folder / "images.npy", np.stack(volumes, 1).astype(np.float16))
            entry["files"]["images.npy"] = content_sha256(folder / "images.npy")
        entries[case.name] = entry
    write_set(out, dataset.manifest, entries)
    return PreparedDataset(out)


def images_folder(out: Path, predictor: str) -> Path:
    """Where a predictor's images are kept."""
    return out / "images" / predictor.replace(" ", "-").replace("/", "-")


def keep_images(out: Path, predictor: str, subject: Subject, images: Mapping[str, Array]) -> None:
    """Keep images as OUT/images/PREDICTOR/CASE-TARGET.npy, float16 in [0, 1]: segmenter.py measures them later."""
    folder = images_folder(out, predictor)
    folder.mkdir(parents=True, exist_ok=True)
    for target, volume in images.items():
        np.save(folder / f"{subject.name}-{target}.npy", volume.astype(np.float16))


def baseline_rows(model: CrossConditionedModel, subject: Subject, task: Task) -> list[Row]:
    """Rows of the trivial predictors of one study, fitted on the model's training patients."""
    sources, targets = task
    given = {m: subject.volumes[m] for m in sources}
    predicted = predict_baselines(model.baselines, model.config.modalities, given, targets)
    return [
        row
        for name, volumes in predicted.items()
        for row in measured(subject, sources, dict(zip(targets, volumes, strict=True)), predictor=name, seed=0)
    ]


def batches(cases: Sequence[Case], modalities: Sequence[str], seed: int, **changes: Any) -> Batches:
    """Crops of slices with their neighbours, as the shipped weights' training draws them, but not augmented."""
    settings = {"size": CROP, "batch_size": HOW.batch_size, "seed": seed, "lesion_draws": 2, "context": 3, **changes}
    return Batches(cases, modalities, BatchSettings(**settings))


def fit(
    network: nn.Module,
    loss: Callable[[nn.Module, int], Tensor],
    steps: int,
    how: TrainConfig = HOW,
    *,
    fast: Sequence[nn.Parameter] = (),
    name: str = "training",
    display: Display | None = None,
) -> nn.Module:
    """Train a network by `loss(network, step)`, and return its averaged copy, in evaluation mode.

    Matrix products are in bfloat16 where the machine multiplies it; the optimisation is `how`, with FASTER times its
    learning rate for `fast`.
    """
    device = next(network.parameters()).device
    dtype = choose_precision("auto", device)
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    kind = torch.optim.AdamW if how.optimiser == "adamw" else torch.optim.Adam
    ids = {id(parameter) for parameter in fast}
    parts = {1.0: [p for p in learning if id(p) not in ids], FASTER: [p for p in learning if id(p) in ids]}
    groups = [{"params": some, "times": times} for times, some in parts.items() if some]
    optimiser = kind(groups, how.learning_rate, betas=(0.9, how.beta_2), weight_decay=how.weight_decay)
    averaged = copy.deepcopy(network)
    network.train()
    with (display or Display()).task(name, steps) as task:
        for step in range(steps):
            for group in optimiser.param_groups:
                group["lr"] = how.rate(step, step / steps) * group["times"]
            optimiser.zero_grad(set_to_none=True)
            with autocast(device, dtype):
                error = loss(network, step)
            error.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learning, how.gradient_clip)
            optimiser.step()
            decay = min(how.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)
                for mine, other in zip(averaged.buffers(), network.buffers(), strict=True):
                    mine.copy_(other)
            task.advance(f"loss {float(error.detach()):.4g}")
    return averaged.eval()


def flops(run: Callable[[], Tensor]) -> float:
    """Floating-point operations of a forward and a backward pass, in 1e9: matrix products and convolutions."""
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _backward}) as counter:
        run().backward()  # type: ignore[no-untyped-call]
    return float(counter.get_total_flops()) / 1e9


def _backward(grad: Any, x: Any, w: Any, *rest: Any, **_: Any) -> int:
    """Of a convolution's backward pass, by shapes: PyTorch 2.13's own count of grouped ones is too high."""
    transposed, mask = rest[4], rest[7]
    one: int = conv_flop_count(list(x), list(w), list(grad), transposed=transposed)
    return one * (int(mask[0]) + int(mask[1]))


def seconds(run: Callable[[], object]) -> tuple[float, object]:
    """How long a call takes, and what it returns."""
    start = time.monotonic()
    result = run()
    return time.monotonic() - start, result


@torch.no_grad()
def by_slices(
    subject: Subject,
    sources: Sequence[str],
    targets: Sequence[str],
    predict: Predict,
    *,
    context: int = 3,
    divisor: int = 32,
    device: torch.device | None = None,
) -> dict[str, Array]:
    """Synthesise a study's axial slices: target → volume (Z, Y, X) in [0, 1].

    `predict` maps `network_inputs` (N, S·context + 1, Y, X), padded to multiples of `divisor`, to standardised targets
    (N, T, Y, X).
    """
    device = device or choose_device("auto")
    dtype = choose_precision("auto", device)
    volumes = torch.stack([torch.from_numpy(subject.volumes[m]) for m in sources])
    slices = [z for z, plane in enumerate(subject.head) if plane.any()]
    shape = subject.head.shape
    images = np.zeros((len(targets), *shape), np.float32)
    for some in (slices[k : k + 8] for k in range(0, len(slices), 8)):
        around = [neighbours(z, context, shape[0], subject.spacing_mm[0]) for z in some]
        inputs = network_inputs(to_model_input(volumes, around, 2, divisor), context).to(device)
        with autocast(device, dtype):
            predicted = predict(inputs.contiguous(memory_format=torch.channels_last)).float().cpu()
        images[:, some] = on_unit_scale(crop_or_pad(predicted, shape[1:], [0.5] * 2)).transpose(0, 1).numpy()
    images *= subject.head
    return dict(zip(targets, images, strict=True))


def network_inputs(slices: Tensor, context: int) -> Tensor:
    """Sources (N, S·context, Y, X) in [0, 1] as a network reads them: standardised, and last a map of the head."""
    head = (slices[:, context // 2 :: context] > 0).any(1, keepdim=True)
    return torch.cat([standardise(slices), head.to(slices)], 1)


def patients_in(rows: Iterable[Row]) -> int:
    """Of how many patients rows are."""
    return len({patient_of(row["case"]) for row in rows})


def by_patient(rows: Iterable[Row], value: str) -> dict[str, float]:
    """Patient → mean of a value over seeds and visits, where it exists."""
    found: dict[str, list[float]] = {}
    for row in rows:
        number = row.get(value)
        if number is not None and math.isfinite(number):
            found.setdefault(patient_of(row["case"]), []).append(number)
    return {patient: statistics.fmean(numbers) for patient, numbers in found.items()}


def kept_share(rows: Iterable[Row], structure: str = "lesion", value: str = "kept") -> str:
    """In how many patients of how many a structure keeps its contrast."""
    shares = by_patient(rows, f"{structure}_{value}").values()
    return f"{sum(KEPT[0] <= share <= KEPT[1] for share in shares)} of {len(shares)}" if shares else "–"


def by_predictor(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Predictor → its rows, in the order in which they first come."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["predictor"], []).append(row)
    return found


def column(
    groups: Mapping[Key, Sequence[Row]], against: Key, value: str, digits: int, *, differences: bool = False
) -> dict[Key, str]:
    """A column of a table: of each group the mean over patients, and its 95 % interval from five patients on.

    A star: it differs from the group `against` over the seeds that both have (Wilcoxon over patients, p < .05 after
    Holm's correction for the tests of the column). With `differences` the others' cells are differences to that, in
    pairs.
    """
    values = {name: list(by_patient(rows, value).values()) for name, rows in groups.items()}
    p_values = dict[Key, float]()
    for name in (name for name in groups if name != against):
        pair = groups[name], groups.get(against, [])
        seeds = set.intersection(*({row.get("seed") for row in rows} for rows in pair))
        own, others = (by_patient([row for row in rows if row.get("seed") in seeds], value) for rows in pair)
        if both := [patient for patient in own if patient in others]:
            p_values[name] = metrics.paired_wilcoxon([own[one] for one in both], [others[one] for one in both])
        if differences:
            values[name] = [own[one] - others[one] for one in both]
    corrected = dict(zip(p_values, metrics.holm(list(p_values.values())), strict=True))
    return {k: number(some, digits, "*" * (corrected.get(k, 1) < 0.05)) for k, some in values.items()}


def number(values: Sequence[float], digits: int, star: str = "") -> str:
    """A mean and, from five values on, its 95 % interval."""
    if not values:
        return "–"
    mean = f"{statistics.fmean(values):.{digits}f}{star}"
    if len(values) < 5:
        return mean
    low, high = metrics.bootstrap_interval(values)
    return f"{mean} ({low:.{digits}f}–{high:.{digits}f})"


def table(
    rows: Sequence[Row],
    against: str,
    columns: Mapping[str, tuple[str, int]] = COLUMNS,
    *,
    differences: bool = False,
) -> str:
    """Markdown, a table for each task: predictors below each other, compared with the one named `against`."""
    parts = []
    for sources, target in dict.fromkeys((row["sources"], row["target"]) for row in rows):
        task = [row for row in rows if (row["sources"], row["target"]) == (sources, target)]
        groups = by_predictor(task)
        names = " + ".join(DISPLAY_NAMES[m] for m in sources.split("+"))
        parts.append(f"\n**{names} → {DISPLAY_NAMES[target]}**, {patients_in(task)} patients\n")
        parts.append("| | seeds | " + " | ".join([*columns, "lesions kept", "fluid kept"]) + " |")
        parts.append("|---" * (len(columns) + 4) + "|")
        cells = [column(groups, against, *one, differences=differences) for one in columns.values()]
        for name, own in groups.items():
            its = [*(one[name] for one in cells), kept_share(own), kept_share(own, "fluid")]
            parts.append(f"| {name} | {len({row['seed'] for row in own})} | {' | '.join(its)} |")
    return "\n".join(parts)
