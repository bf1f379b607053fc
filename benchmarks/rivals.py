"""Rivals at equal data and equal training FLOPs on whole slices: what does each make of T1 + T1ce + T2 → FLAIR?

Every predictor of rival_networks.py and rival_generators.py is trained from nothing on the same whole studies with the
same total of floating-point operations: matrix products and convolutions of a step's forward and backward pass,
counted, times the steps. Three learning rates each are tried at a sixth of that, and up to two beyond where the lowest
or the highest is the best by absolute error on fixed slices of the validation patients; then the whole training.
Measured are the test studies, by `grid.measured`; a predictor that completes only every tenth slice (diffusion:
`--every`) is compared with the others on these slices.
Seconds and memory are those of a process of its own that completes the first test study, libraries included.

python benchmarks/rivals.py runs/default -o runs/evidence    # goes on with what is missing
python benchmarks/rivals.py runs/default -o runs/evidence --only ours "DynUNet 2D" --seeds 0 1 2
python benchmarks/rivals.py runs/default -o runs/evidence --table --differences
python benchmarks/rivals.py runs/default -o runs/evidence --tiny

A training that is killed starts again; what is finished (a rate, a training, a study) is kept. One training of the
default 60 TFLOP takes about 3 to 10 minutes on two idle cores (OMP_NUM_THREADS=2).
"""

import json
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from grid import (
    COLUMNS,
    DIFFERENCES,
    HOW,
    THREE,
    Kept,
    Row,
    arguments,
    baseline_rows,
    fit,
    flops,
    four_contrasts,
    keep_images,
    measured,
    parser,
    seconds,
    table,
)
from rival_generators import RIVALS, Diffusion, WaveletFlow
from rival_networks import VALIDATION, VIEWS, Images, Rival, ThreeViews, some_slices
from torch import nn

from crossmr.baselines import BASELINES
from crossmr.checkpoint import load_bundle, save_bundle
from crossmr.data.dataset import Case
from crossmr.device import autocast, choose_device, choose_precision
from crossmr.evaluation.subjects import Subject, subject_of_case
from crossmr.files import read_json
from crossmr.networks.model import read_model

TERAFLOP = 60.0
TUNED = 1 / 6
"""Of the budget, for each rate."""
MOST_RATES = 5
"""Tried of a predictor: where the best is the lowest or highest so far, another one beyond it."""
EVERY = 10
SECONDS_MEASURED = 12.0
"""About, for a predictor and a study: completed and measured."""
CONTROLS = ("mirror images, too: ours", "three axial networks", *(f"{v} slices of {ThreeViews.name}" for v in VIEWS))
"""What tells planes from the mean of several images; in a table of its own, beside ours and the three views."""
IMAGES = ("ours", "published form", "DynUNet", "three views", "pix2pix", "wavelet flow", "diffusion")
"""Starts of the names of those whose images segmenter.py measures."""
WHOLE, SOME = "all", "some"
"""Which slices a row is about."""


@dataclass(frozen=True)
class Experiment:
    """What is trained, how long, and where it is kept."""

    options: Namespace
    out: Path
    train: Sequence[Case]
    val: Sequence[Case]
    test: Sequence[Case]
    device: torch.device
    rows: Kept
    """Of images."""
    trainings: Kept
    """Of rates that were tried, trainings, and what a completion costs."""

    def rival(self, name: str, seed: int, rate: float = 1e-3, *, few: bool = False) -> Rival:
        """A predictor before its training; with few patients where it is not to be trained."""
        train, val = (self.val[:1], self.val[:1]) if few else (self.train, self.val)
        rival = RIVALS[name](train, val, seed=seed, rate=rate, device=self.device)
        rival.chosen = self.some
        if self.options.tiny and isinstance(rival, Diffusion):
            rival.steps = 2
        return rival

    @property
    def some(self) -> slice:
        """The slices on which all are compared."""
        return slice(self.options.every // 2, None, self.options.every)

    def subject(self, case: Case) -> Subject:
        """A test study; of a rehearsal some slices of it."""
        subject = subject_of_case(case)
        return some_slices(subject, slice(60, 84)) if self.options.tiny else subject

    def folder(self, name: str, seed: int) -> Path:
        """Where the weights of a training lie."""
        return self.out / "rivals" / f"{name.replace(' ', '-')}-{seed}"

    def is_trained(self, name: str, seed: int) -> bool:
        """Whether they do."""
        return (self.folder(name, seed) / "weights.json").exists()

    def trained(self, name: str, seed: int) -> tuple[Rival, nn.Module]:
        """A predictor with its weights."""
        rival = self.rival(name, seed, few=True)
        stored = load_bundle(self.folder(name, seed), "weights")[0]["network"]
        with torch.no_grad():
            for key, tensor in state_of(rival.network).items():
                tensor.copy_(stored[key])
        return rival, rival.network.eval()

    def found(self, part: str, name: str) -> list[Row]:
        """The rows of trainings of this part and predictor."""
        return [row for row in self.trainings.rows if (row["part"], row["predictor"]) == (part, name)]


@dataclass(frozen=True)
class Cost:
    """What a step of a training costs."""

    gigaflop: float
    seconds: float
    parameters: int

    def steps(self, teraflop: float) -> int:
        """Steps of a total."""
        return max(2, round(1000 * teraflop / self.gigaflop))


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """All tensors of a network, each once: MONAI's DynUNet has two names for some."""
    return {**dict(network.named_parameters()), **dict(network.named_buffers())}


def opened(options: Namespace) -> Experiment:
    """Read what there is; of tables rows alone."""
    splits = ("train", "val", "test")
    train, val, test = ([] if options.table else four_contrasts(options.base, split) for split in splits)
    if options.tiny:
        train, val, test = train[:2], val[:1], test[:1]
    kept = Kept(options.out, "rivals"), Kept(options.out, "rivals_trainings")
    return Experiment(options, options.out, train, val, test, choose_device(options.device), *kept)


def cost_of(experiment: Experiment, name: str) -> Cost:
    """Count a step and time it, on networks that are thrown away."""
    rival = experiment.rival(name, 0, 1e-4)

    def step(number: int) -> torch.Tensor:
        with autocast(experiment.device, choose_precision("auto", experiment.device)):
            return rival.loss(rival.network, number)

    counted = [flops(partial(step, number)) for number in range(rival.period)]
    count = 1 if experiment.options.tiny else 3
    taken, _ = seconds(lambda: fit(rival.network, rival.loss, count, name="a step's time"))
    return Cost(sum(counted) / len(counted), taken / count, sum(p.numel() for p in rival.network.parameters()))


def tuned(experiment: Experiment, name: str, cost: Cost) -> float:
    """The best of the rates, each tried for a part of the budget, with seed 0."""
    steps, waiting = cost.steps(experiment.options.teraflop * TUNED), sorted(RIVALS[name].rates)
    factor = waiting[1] / waiting[0]
    while True:
        for rate in waiting:
            if not experiment.trainings.has(part="rate", predictor=name, rate=rate):
                row, _ = trained_for(experiment, name, 0, rate, steps)
                experiment.trainings.add([{**row, "part": "rate"}])
        errors = {float(row["rate"]): float(row["error"]) for row in experiment.found("rate", name)}
        best = min(errors, key=errors.__getitem__)
        beyond = {min(errors): best / factor, max(errors): best * factor}.get(best)
        if beyond is None or len(errors) >= MOST_RATES:
            return best
        waiting = [float(f"{beyond:.1e}")]


def trained_for(experiment: Experiment, name: str, seed: int, rate: float, steps: int) -> tuple[Row, nn.Module]:
    """Train a predictor, and say how well it does on the validation patients."""
    rival = experiment.rival(name, seed, rate)
    how = replace(HOW, learning_rate=rate, warm_up=max(1, min(HOW.warm_up, steps // 10)))
    start = time.monotonic()
    network = fit(rival.network, rival.loss, steps, how, name=f"{name}, rate {rate:g}")
    minutes = (time.monotonic() - start) / 60
    error = rival.validate(network, 4 if experiment.options.tiny else VALIDATION)
    row = {"predictor": name, "seed": seed, "rate": rate, "steps": steps, "minutes": minutes, "error": error}
    return row, network


def train(experiment: Experiment, name: str, seed: int, cost: Cost | None) -> None:
    """Tune a predictor, train it, and keep its weights and its row, as far as they are missing."""
    folder = experiment.folder(name, seed)
    if cost is not None and not experiment.is_trained(name, seed):
        rate, steps = tuned(experiment, name, cost), cost.steps(experiment.options.teraflop)
        row, network = trained_for(experiment, name, seed, rate, steps)
        row |= {"part": "training", "gigaflop": cost.gigaflop, "parameters": cost.parameters}
        folder.mkdir(parents=True, exist_ok=True)
        save_bundle(folder, {"network": state_of(network)}, row, "weights")
    if not experiment.trainings.has(part="training", predictor=name, seed=seed):
        kept = read_json(folder / "weights.json")
        experiment.trainings.add([{key: kept[key] for key in kept if key not in ("files", "sha256")}])


def measure(experiment: Experiment, name: str, seed: int) -> None:
    """Complete and measure the test studies that are missing."""
    rival, network = experiment.trained(name, seed)
    for predictor, complete in rival.completions(network).items():
        for case in experiment.test:
            if not experiment.rows.has(predictor=predictor, seed=seed, case=case.name):
                subject = experiment.subject(case)
                images = complete(subject)
                if seed == 0 and predictor.startswith(IMAGES) and not rival.partly:
                    keep_images(experiment.out, f"rival: {predictor}", subject, images)
                experiment.rows.add(rows_of(experiment, subject, images, rival.partly, predictor=predictor, seed=seed))
                print(f"{predictor}, seed {seed}: {case.name}", flush=True)


def rows_of(experiment: Experiment, subject: Subject, images: Images, only_some: bool, **facts: object) -> list[Row]:
    """Rows of all slices, unless only some are there, and of some."""
    some = {target: volume[experiment.some] for target, volume in images.items()}
    rows = [] if only_some else measured(subject, THREE[0], images, slices=WHOLE, **facts)
    return rows + measured(some_slices(subject, experiment.some), THREE[0], some, slices=SOME, **facts)


def measure_baselines(experiment: Experiment) -> None:
    """The same of the trivial predictors."""
    model = read_model(experiment.options.base / "run" / "model")
    for case in experiment.test:
        if not experiment.rows.has(predictor=BASELINES[-1], case=case.name):
            subject = experiment.subject(case)
            thin = some_slices(subject, experiment.some)
            rows = [{**row, "slices": WHOLE} for row in baseline_rows(model, subject, THREE)]
            experiment.rows.add(rows + [{**row, "slices": SOME} for row in baseline_rows(model, thin, THREE)])


def measure_cost(experiment: Experiment, name: str) -> None:
    """What completing one study takes, in a process of its own."""
    options = experiment.options
    if experiment.found("cost", name) or not experiment.is_trained(name, 0):
        return
    tiny = ["--tiny"] * options.tiny
    command = [sys.executable, __file__, str(options.base), "-o", str(options.out), "--cost", name, *tiny]
    command += ["--every", str(options.every), "--device", options.device]
    answer = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    experiment.trainings.add(json.loads(answer.splitlines()[-1]))


def print_cost(experiment: Experiment, name: str) -> None:
    """Complete the first test study, and print seconds and peak memory, as JSON."""
    rival, network = experiment.trained(name, 0)
    subject, rows = experiment.subject(experiment.test[0]), []
    heads = np.array([plane.any() for plane in subject.head])
    share = heads[rival.chosen].sum() / heads.sum() if rival.partly else 1.0
    for predictor, complete in rival.completions(network).items():
        taken, _ = seconds(partial(complete, subject))
        # of this process alone: `ru_maxrss` counts the one that started it, too
        gigabytes = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 2**20
        if experiment.device.type == "cuda":
            gigabytes = torch.cuda.max_memory_allocated() / 2**30
        row = {"part": "cost", "predictor": name, "seed": 0, "completed": predictor, "share": float(share)}
        rows.append({**row, "seconds": taken / float(share), "gigabytes": gigabytes})
    print(json.dumps(rows))


def announce(experiment: Experiment, names: Sequence[str]) -> dict[str, Cost]:
    """Say what is left to do, and how long it takes."""
    options, costs, minutes = experiment.options, {}, 0.0
    for name in names:
        left = [seed for seed in options.seeds if not experiment.is_trained(name, seed)]
        if not left:
            continue
        costs[name] = cost = cost_of(experiment, name)
        rates = len(RIVALS[name].rates) - len(experiment.found("rate", name))
        needed = (len(left) + rates * TUNED) * cost.steps(options.teraflop) * cost.seconds / 60
        minutes += needed
        print(
            f"{name}: {cost.parameters / 1e6:.2f} M parameters, {cost.gigaflop:.0f} GFLOP a step, "
            f"{cost.steps(options.teraflop)} steps of {cost.seconds:.2f} s, {needed:.0f} minutes in all",
            flush=True,
        )
    done = {(row["predictor"], row["seed"], row["case"]) for row in experiment.rows.rows}
    own = [key for key in done if key[0].startswith(tuple(names)) and key[1] in options.seeds]
    images = (len(names) + (WaveletFlow.name in names)) * len(options.seeds) * len(experiment.test)
    measuring = (images - len(own)) * SECONDS_MEASURED / 60
    print(f"About {minutes:.0f} minutes of training and {measuring:.0f} of measuring are left.", flush=True)
    return costs


def print_tables(experiment: Experiment) -> None:
    """All tables, from the rows that are kept."""
    every, order = experiment.options.every, [*BASELINES, *RIVALS]

    def place(row: Row) -> int:
        return next((k for k, name in enumerate(order) if row["predictor"].startswith(name)), len(order))

    rows = sorted(experiment.rows.of(experiment.options.shown), key=place)
    controls = [
        row for row in rows if row["slices"] == WHOLE and row["predictor"] in (*CONTROLS, "ours", ThreeViews.name)
    ]
    rows = [row for row in rows if row["predictor"] not in CONTROLS]
    whole, some = ([row for row in rows if row["slices"] == which] for which in (WHOLE, SOME))
    shown = partial(table, against="ours", differences=experiment.options.differences)
    print(f"\nAll slices; * differs from ours.{shown(whole)}")
    print(f"\nThe controls of three views.{shown(controls)}")
    columns = {heading: column for heading, column in COLUMNS.items() if "SSIM" not in heading}
    print(f"\nOne slice of every {every}, without SSIM, which is of volumes.{shown(some, columns=columns)}\n")
    print(
        "| | M parameters | GFLOP a step | steps | TFLOP | rate | minutes | s a study | GiB |" + "\n" + "|---" * 9 + "|"
    )
    for name in RIVALS:
        for row in experiment.found("training", name)[:1]:
            costs = experiment.found("cost", name)
            took = ", ".join(f"{c['seconds']:.1f}" + (" (extrapolated)" if c["share"] < 1 else "") for c in costs)
            memory = max((c["gigabytes"] for c in costs), default=float("nan"))
            numbers = f"{row['parameters'] / 1e6:.2f} | {row['gigaflop']:.0f} | {row['steps']}"
            total = f"{row['gigaflop'] * row['steps'] / 1000:.0f} | {row['rate']:g} | {row['minutes']:.1f}"
            print(f"| {name} | {numbers} | {total} | {took} | {memory:.1f} |")
    print(
        "\n| absolute error on validation slices | at the rates that were tried | after the training |\n|---|---|---|"
    )
    for name in RIVALS:
        tried = ", ".join(f"{row['rate']:g}: {row['error']:.4f}" for row in experiment.found("rate", name))
        after = ", ".join(f"{row['error']:.4f}" for row in experiment.found("training", name))
        print(f"| {name} | {tried or '–'} | {after or '–'} |")


def main() -> None:
    """Train, measure, print."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=list(RIVALS), default=list(RIVALS), metavar="NAME")
    options.add_argument("--teraflop", type=float, default=TERAFLOP, help="floating-point operations of a training")
    options.add_argument("--every", type=int, default=EVERY, help="diffusion completes one slice of so many; 1: all")
    options.add_argument("--cost", choices=list(RIVALS), help="complete one study, and print what it took")
    options.add_argument("--differences", **DIFFERENCES)
    given = arguments(options)
    given.teraflop = 0.0 if given.tiny else given.teraflop
    experiment = opened(given)
    if given.cost:
        print_cost(experiment, given.cost)
        return
    if not given.table:
        costs = announce(experiment, given.only)
        measure_baselines(experiment)
        for seed in given.seeds:
            for name in given.only:
                train(experiment, name, seed, costs.get(name))
                measure(experiment, name, seed)
        for name in given.only:
            measure_cost(experiment, name)
    print_tables(experiment)


if __name__ == "__main__":
    main()
