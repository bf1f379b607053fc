"""How many patients does a training need, and what does a model do at a site that it has not seen?

python benchmarks/patients.py runs/default --data ../shared/data -o runs/evidence     # goes on where it was stopped
python benchmarks/patients.py runs/default -o runs/evidence --only SSA 2021           # some parts; see below
python benchmarks/patients.py runs/default -o runs/evidence --table                   # from the kept rows alone
python benchmarks/patients.py runs/default -o runs/evidence --table --run runs/default/run    # and over steps

The product trains all, by recipe 'any', on the set of BASE with another split. Parts, by their names for --only:

SSA, 2021   A new site. A base model is trained without the site (its cases by the prefixes of their names). It is
            measured on the site's test patients as it is, and after fine-tuning on five of the site's others; for SSA
            on 10 and 20 too, beside trainings on 5 and 20 from nothing, and on five from MRM.
            Controls: a model of all sites by as many steps as the base; the base, fine-tuned on five patients of other
            sites. The shipped weights stand beside: they have seen the site's other patients, but not these, and had
            more than ten times as many steps.
mixed       5, 10, 20 and 40 patients of all sources, each group within the next: from nothing and from MRM.
features    40 patients, and networks of 24 and 72 features instead of 48, at equal steps.
TCIA, 2013, CBICA, MS    A short base training without the site, as it is: one to three test patients. Not done unless
            named.

MRM: the same network learns to restore patches of 16 x 16 pixels, three quarters of which are hidden, on all training
scans but SSA's, and on the patients who lack contrasts. It sees one scan at a time, as if no two were of one patient.

Test patients of a site are those of the lists in default_weights.py, TEST and VALIDATION; of 'mixed' and 'features' the
14 whole studies of TEST. Each contrast is made from the three others, in every third axial slice. Fine-tuning has a
third of the learning rate and a quarter of the steps of a training from nothing; those of the model that it starts from
are not counted: a user gets it ready. Those of MRM are: together they are as many as from nothing. Trainings on few
patients have no validation. BraTS 2018's TCIA patients come from several hospitals, which other sources may share.
"""

import argparse
import random
import shutil
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from curves import MEASURES, WANTED, over_patients, over_steps, starts
from default_weights import TEST, VALIDATION
from grid import Kept, Row, arguments, four_contrasts, parser, seconds
from restoring import Restoring
from scans import patient_of, write_set
from thin import rows_of

from crossmr.config import with_settings
from crossmr.data.dataset import Case, PreparedDataset
from crossmr.data.naming import DISPLAY_NAMES
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.device import autocast, choose_device, choose_precision
from crossmr.display import Display
from crossmr.evaluation.subjects import subject_of_case
from crossmr.networks.c_unet import CUNet
from crossmr.registry import load_model
from crossmr.training.recipes import RECIPES, Recipe
from crossmr.training.run import train
from crossmr.training.settings import TrainingSettings
from crossmr.training.stages import STAGES, SynthesisStage

SITES = {
    "SSA": ("BraTS-SSA",),
    "TCIA": ("Brats18_TCIA",),
    "2013": ("Brats18_2013",),
    "CBICA": ("Brats18_CBICA",),
    "2021": ("BraTS2021_", "BraTS-GLI"),
    "MS": ("patient",),
}
"""How the cases of each site are called."""
PARTS = ("SSA", "mixed", "features", "2021")
STEPS, TUNING_STEPS, MRM_STEPS, SHORT_STEPS = 1200, 300, 500, 900
BASE_STEPS = {"SSA": 2000, "2021": 2000}
FEW = {"SSA": (5, 10, 20), "2021": (5,)}
MIXED, MIXED_MRM, FEATURES = (5, 10, 20, 40), (5, 20), (24, 72)
MEASURING_SECONDS = 5.0
"""Of one study, four contrasts, on two cores."""
NOTHING, MRM, OTHERS, SHIPPED = "from nothing", "from MRM", "from a model of other sites", "shipped weights"
ZERO_SHOT, ALL_SITES = "model of other sites, as it is", "model of all sites, as many steps"
ELSEWHERE = "from a model of other sites, on their patients"
EVERY = 3
"""Of the axial slices one in so many is made and measured."""


@dataclass(frozen=True)
class Job:
    """One training, or none, and on whom its model is measured."""

    part: str
    predictor: str
    patients: int = 0
    """On how many of `pool` it is trained; 0: on all training cases but the site's."""
    steps: int = 0
    """0: the shipped weights."""
    start: str = ""
    """The job, by its folder, whose model it starts from."""
    features: int = 48

    @property
    def folder(self) -> str:
        """Where it is trained; what leaves no site out is trained once."""
        part = "all" if self.predictor == ALL_SITES else self.part
        return f"{part} {self.predictor} {self.patients or ''}".strip().replace(", ", " ").replace(" ", "-")

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.predictor}, {self.patients} patients" if self.patients else self.predictor

    @property
    def is_start(self) -> bool:
        """Whether others start from it, or measure it too, so that it is kept."""
        return self.predictor in (ZERO_SHOT, ALL_SITES, MRM) and not self.patients

    def of_site(self, case: str) -> bool:
        """Whether a case is of the site that the job leaves out."""
        return self.predictor != ALL_SITES and of_site(case, self.part)


MASKED = Job("MRM", MRM, steps=MRM_STEPS)


def jobs(part: str, pool: int) -> Iterator[Job]:
    """What one part trains and measures, the most telling first; `pool` is how many patients it may train on."""
    if part == "features":
        yield from (Job(part, f"{width} features", MIXED[-1], STEPS, features=width) for width in FEATURES)
        return
    if part != "mixed":
        base = Job(part, ZERO_SHOT, steps=BASE_STEPS.get(part, SHORT_STEPS))
        few = [count for count in FEW.get(part, ()) if count <= pool]
        yield from (base, Job(part, SHIPPED))
        yield from (Job(part, OTHERS, count, TUNING_STEPS, base.folder) for count in few)
        if few:
            yield from (Job(part, ELSEWHERE, few[0], TUNING_STEPS, base.folder), Job(part, ALL_SITES, steps=base.steps))
        if part == "SSA":
            yield from (Job(part, NOTHING, count, STEPS) for count in (few[0], few[-1]))
    else:
        yield from (Job(part, NOTHING, count, STEPS) for count in MIXED)
        yield Job(part, SHIPPED)
    if part in ("SSA", "mixed"):
        yield MASKED
        counts = MIXED_MRM if part == "mixed" else FEW[part][:1]
        yield from (Job(part, MRM, count, STEPS - MRM_STEPS, MASKED.folder) for count in counts)


def of_site(case: str, part: str) -> bool:
    """Whether a case is of the site that a part leaves out; 'mixed' and 'features' leave none out."""
    return case.startswith(SITES.get("SSA" if part == "MRM" else part, ("nobody",)))


def tested(base: Path, part: str) -> list[Case]:
    """On whom a part is measured: the test studies, or, where it is a site, its own, those of the validation too."""
    cases = four_contrasts(base, "test")
    return [c for c in cases + four_contrasts(base, "val") if of_site(c.name, part)] if part in SITES else cases


class Experiment:
    """The base, where results go, and how large it is."""

    def __init__(self, options: argparse.Namespace, seed: int):
        self.tiny, self.seed, self.device = options.tiny, seed, options.device
        self.base: Path = options.base
        self.data: Path = options.data
        self.out: Path = options.out / "patients" / f"seed-{seed}"
        self.kept = Kept(self.out.parents[1], "patients")

    def pool(self, part: str, *, elsewhere: bool = False) -> list[list[str]]:
        """The cases of each patient who may be trained on, in a random order that the seed decides.

        They are the site's, where the part is a site, or, `elsewhere`, the others'.
        """
        cases = [case.name for case in four_contrasts(self.base, "train")]
        if part in SITES:
            cases = [case for case in cases if of_site(case, part) != elsewhere]
        patients: dict[str, list[str]] = {}
        for case in sorted(cases):
            patients.setdefault(patient_of(case), []).append(case)
        order = sorted(patients)
        random.Random(self.seed).shuffle(order)
        return [patients[patient] for patient in order]

    def test(self, part: str) -> list[Case]:
        """On whom a part is measured."""
        cases = tested(self.base, part)
        return cases[:1] if self.tiny else cases

    def jobs(self, parts: Sequence[str]) -> list[Job]:
        """All jobs of some parts, none twice."""
        return list(dict.fromkeys(job for part in parts for job in jobs(part, len(self.pool(part)))))

    def left(self, job: Job) -> list[Case]:
        """The test cases on which a job's model is not measured yet; none of MRM, which makes no contrast."""
        key = {"part": job.part, "predictor": job.name, "seed": self.seed}
        return [] if job == MASKED else [c for c in self.test(job.part) if not self.kept.has(**key, case=c.name)]

    def model(self, job: Job) -> Path:
        """Where a job's model is, or will be."""
        return self.out / job.folder / "run" / "model"

    def steps(self, job: Job) -> int:
        """So many steps it has."""
        return min(job.steps, 4) if self.tiny else job.steps

    def recipe(self, job: Job) -> Recipe:
        """How it is trained."""
        settings = {"synthesis.channels": str(job.features), "synthesis_train.warm_up": "100"}
        if job.predictor in (OTHERS, ELSEWHERE):
            rate = RECIPES["any"].synthesis_train.learning_rate / 3
            settings |= {"synthesis_train.learning_rate": f"{rate}", "synthesis_train.warm_up": "30"}
        if self.tiny:
            settings |= {"synthesis.channels": str(job.features // 6), "crop": "96,96"}
        return with_settings(replace(RECIPES["any"], by_set=()), settings)

    def prepared(self, job: Job) -> Path:
        """The set of a job: that of the base with another split, its arrays linked."""
        folder, sets = self.out / job.folder / "set", [self.base / "set"]
        if (folder / "manifest.json").exists():
            return folder
        if job == MASKED:
            sets.append(self.out.parent / "incomplete")
            if not (sets[-1] / "manifest.json").exists():
                prepare([self.data / "lgg_incomplete"], sets[-1], PrepareSettings(), display=Display())
        entries = {name: (s, e) for s in sets for name, e in PreparedDataset(s).manifest["cases"].items()}
        pool = self.pool(job.part, elsewhere=job.predictor == ELSEWHERE)
        parts = {name: "train" for cases in pool[: job.patients] for name in cases}
        if not job.patients:
            known = {name for name in entries if name not in TEST and not job.of_site(name)}
            parts = {name: "val" if name in VALIDATION else "train" for name in known}
            if job == MASKED:
                parts = {name: part for name, part in parts.items() if part == "train"}
        if self.tiny:
            some = [name for name in sorted(parts) if parts[name] == "train"][:: max(1, len(parts) // 3)]
            parts = {name: parts[name] for name in some}
        (folder / "cases").mkdir(parents=True, exist_ok=True)
        for name in parts:
            if not (link := folder / "cases" / name).exists():
                link.symlink_to((entries[name][0] / "cases" / name).resolve(), target_is_directory=True)
        own = {name: {**entries[name][1], "part": part} for name, part in parts.items()}
        write_set(folder, PreparedDataset(sets[0]).manifest, own)
        return folder

    def train(self, job: Job) -> None:
        """Train a job's model, unless there is one."""
        model, display = self.model(job), Display()
        if (model / "config.json").exists():
            return
        settings = TrainingSettings(self.recipe(job), steps=self.steps(job), device=self.device, seed=self.seed)
        first = self.out / job.start / "run" / "model" if job.start else None
        STAGES["synthesis"] = Restoring if job == MASKED else SynthesisStage
        train(self.prepared(job), model.parent, settings, initial_model=first, display=display)

    def do(self, job: Job, all_jobs: Sequence[Job]) -> None:
        """Train and measure what is missing of a job, and keep no more of it than others need."""
        left = self.left(job)
        if left or job == MASKED:
            for one in (one for one in all_jobs if one.folder == job.start or (one == job and job.steps)):
                self.train(one)
        facts = {"part": job.part, "predictor": job.name, "start": job.predictor, "patients": job.patients}
        facts |= {"seed": self.seed, "steps": self.steps(job), "features": job.features}
        if left:
            model = load_model(self.model(job) if job.steps else None, choose_device(self.device))
            for case in left:
                self.kept.add(rows_of(model, subject_of_case(case), 30 if self.tiny else EVERY, facts))
        shutil.rmtree(self.model(job).parent / "stages", ignore_errors=True)
        if not job.is_start:
            shutil.rmtree(self.out / job.folder, ignore_errors=True)

    def seconds(self, all_jobs: Sequence[Job]) -> float:
        """How long what is missing will take."""
        step, total = step_seconds(self.recipe(MASKED), choose_device(self.device)), 0.0
        for job in all_jobs:
            left = self.left(job)
            if (left or job == MASKED) and not (self.model(job) / "config.json").exists():
                total += self.steps(job) * step * (job.features / 48) ** 1.8
            total += len(left) * MEASURING_SECONDS
        return total


def step_seconds(recipe: Recipe, device: torch.device) -> float:
    """How long a step of eight slices takes here and now."""
    config = recipe.model_config(tuple(WANTED), tuple(WANTED))
    network = CUNet(config.synthesis, config.in_channels, 2 * len(WANTED)).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(8, config.in_channels, *recipe.crop, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        with autocast(device, choose_precision("auto", device)):
            error = network(images).float().abs().mean()
        error.backward()
        float(error.detach())  # waits for a GPU

    step()
    return statistics.median(seconds(step)[0] for _ in range(3))


def print_tables(rows: Sequence[Row], runs: Sequence[Path]) -> None:
    """All tables, from kept rows alone."""
    for part in dict.fromkeys(row["part"] for row in rows):
        own = [row for row in rows if row["part"] in ((part, "mixed") if part == "features" else (part,))]
        if part == "features":
            widths = [
                row
                for row in own
                if row["patients"] == MIXED[-1]
                and row["start"] in (NOTHING, *(f"{width} features" for width in FEATURES))
            ]
            own = [{**row, "start": f"{row['features']} features"} for row in widths]
        order = [NOTHING, OTHERS, ELSEWHERE, MRM, ZERO_SHOT, ALL_SITES, SHIPPED]
        own.sort(key=lambda row: order.index(row["start"]) if row["start"] in order else row["features"])
        print(f"\n## {part}")
        for measure in (*MEASURES, "lesions kept"):
            print(starts(own, measure, (ZERO_SHOT, 0) if part in SITES else None))
        if part in ("SSA", "mixed"):
            print(over_patients(own, NOTHING))
    print(left_out(rows))
    if runs:
        print(f"\n## Steps\n{over_steps(runs)}")


def left_out(rows: Sequence[Row]) -> str:
    """Markdown: the test studies of each small site by a model without it / by that of 40 patients of all sources.

    The two differ in more than the site: in steps, and the first learns from LGG and the phantoms, too.
    """

    def of(part: str, start: str, patients: int) -> dict[tuple[str, str], float]:
        some = (row for row in rows if (row["part"], row["start"], row["patients"]) == (part, start, patients))
        return {(row["case"], row["target"]): row["correlation_deep"] for row in some if row["case"] in TEST}

    of_all = of("mixed", NOTHING, MIXED[-1])
    lines, costs = list[str](), {target: list[float]() for target in WANTED}
    for part in (site for site in SITES if site not in BASE_STEPS):
        if not (without := of(part, ZERO_SHOT, 0)):
            continue
        cells = []
        for target in WANTED:
            pairs = [(value, of_all[key]) for key, value in without.items() if key[1] == target and key in of_all]
            costs[target] += [own - other for own, other in pairs]
            cells.append(" / ".join(f"{statistics.fmean(some):.2f}" for some in zip(*pairs, strict=True)))
        lines.append(f"| {part}, {len({case for case, _ in without})} | {' | '.join(cells)} |")
    names = [DISPLAY_NAMES[target] for target in WANTED]
    means = [f"{statistics.fmean(some):+.3f}" if some else "–" for some in costs.values()]
    head = [f"| left out, test patients | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    return "\n".join(["\n## Small sites", *head, *lines, f"| mean difference | {' | '.join(means)} |"])


def main() -> None:
    """Train and measure what is missing, then print the tables."""
    options = parser(__doc__)
    options.add_argument("--data", type=Path, default=Path("../shared/data"), help="for lgg_incomplete")
    options.add_argument("--only", nargs="+", default=PARTS, choices=(*PARTS, "TCIA", "2013", "CBICA", "MS"))
    options.add_argument(
        "--run",
        type=Path,
        nargs="+",
        default=(),
        help="runs, each going on with the one before: their curve over steps",
    )
    given = arguments(options)
    for seed in () if given.table else given.seeds:
        experiment = Experiment(given, seed)
        all_jobs = experiment.jobs(given.only)
        print(f"seed {seed}: about {experiment.seconds(all_jobs) / 60:.0f} minutes", flush=True)
        for job in all_jobs:
            taken, _ = seconds(partial(experiment.do, job, all_jobs))
            print(f"{job.part}, {job.name}: {taken / 60:.1f} minutes", flush=True)
    print_tables(Experiment(given, 0).kept.of(given.shown), given.run)


if __name__ == "__main__":
    main()
