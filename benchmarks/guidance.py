"""The paper's question: what is y_0 worth near the plateau, and does any y_0 that can be had at completion pay?

Every network starts from the shipped weights, converted exactly into a network of fixed sources, and learns for equally
many steps from the same batches, by the absolute error, lesions weighted. Condition layers start at zero. y_0 is
standardised feature by feature, which favours it. Rows are named NETWORK: what it is completed with.

unguided      no y_0; the baseline of every comparison
published     its condition layers learn with the rest, on samples of p(y_0), drawn without the patient, eight each
given         the same on samples of p(y_0 | sources)
true          the same on the true y_0: in half of the samples of the crop, in half of the volume
last          240 steps more of the condition layers alone, on the true y_0, the rest being that of `unguided`, frozen

They learn at ten times the others' rate, but in `last`. A network whose condition layers make use of y_0 differs by it
from what it makes of the training mean; the truth's gain is a lower bound of what y_0 is worth.

T1 + T2 -> T1ce + FLAIR with all of them, three seeds of unguided, published and true; T1 + T1ce + T2 -> FLAIR with
unguided and true. `--site SSA --start MODEL --patients 5`: few patients of a scanner that the model, one of
patients.py, has not seen; unguided and true start from it, and are measured on the site's test and validation patients;
MRM and MDN stay those of all. `--start nothing`: unguided, published and true learn from random weights as recipe
`paper` does: its form, half as wide and on patches of 2 x 2, condition layers with the rest at one rate, squared error.

The three patients who have two visits are training patients of the shipped weights, of
MRM and of MDN, not of these networks; they have a table of their own, and with `--site` those of the site another one:
there MODEL has not seen them either.

python benchmarks/guidance.py runs/default -o runs/evidence --seeds 0 1 2    # goes on where it was stopped
python benchmarks/guidance.py runs/default -o runs/evidence --site SSA --patients 5 --start \
    runs/evidence/patients/seed-0/SSA-model-of-other-sites-as-it-is/run/model
python benchmarks/guidance.py runs/default -o runs/evidence --start nothing
python benchmarks/guidance.py runs/default -o runs/evidence --table
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import cast

import torch
from grid import (
    HOW,
    PUBLISHED,
    THREE,
    Kept,
    Row,
    Task,
    arguments,
    batches,
    by_slices,
    fit,
    four_contrasts,
    keep_images,
    parser,
    table,
)
from guided import (
    OTHER_VISIT,
    FixedTask,
    Measuring,
    completing,
    conversion_error,
    converted,
    error,
    guiding,
    measuring,
    seconds_a_step,
    vectors,
)
from patients import SITES, of_site, tested
from representations import ANY, TINY, Guide, Pooled, Sizes, tiny_base, trained_representations, write_tensors
from safetensors.torch import load_file
from torch import Tensor, nn

from crossmr.data.dataset import Case
from crossmr.device import choose_device
from crossmr.display import Display
from crossmr.evaluation.subjects import subject_of_case
from crossmr.networks.c_unet import CUNet, SynthesisConfig
from crossmr.networks.model import first_weights
from crossmr.registry import load_model
from crossmr.tensors import seeded
from crossmr.training.batches import ImageBatch

STEPS, LAST_STEPS, STEPS_FROM_NOTHING = 340, 240, 2000
NOTHING = "nothing"
"""Where networks start from random weights, in the part's and the option's words."""
FORM = SynthesisConfig(channels=48, patch=2, condition_width=96)
"""Recipe paper's, half as wide and on patches, so that a processor gets near the plateau."""
SECONDS_A_STUDY, REPRESENTING = 4.6, 10
"""To synthesise and to measure two images of a study; minutes to train MRM and MDN and to represent all; two cores."""


@dataclass(frozen=True)
class Variant:
    """A network, and what it is completed with: by the first seed, and by all."""

    learns: str
    """From which y_0: 'nothing', 'p(y_0)', 'p(y_0 | sources)' or 'truth'."""
    completions: tuple[str, ...]
    always: tuple[str, ...]
    last: bool = False


OF_TRUE = "truth of the volume", "a patient of the source", "a sample given the sources"
VARIANTS = {
    "unguided": Variant("nothing", ("nothing",), ("nothing",)),
    "published": Variant("p(y_0)", ("a sample of p(y_0)", "training mean"), ("a sample of p(y_0)",)),
    "true": Variant(
        "truth",
        (
            "truth of each slice",
            "truth of the volume",
            "a patient of the source",
            "a patient of another source",
            "training mean",
            "ridge regression",
            "a sample of each slice given its sources",
            "mean of 8 vectors of each slice given its sources",
            "a sample given the sources",
            "mean of 8 vectors given the sources",
            "a sample of p(y_0)",
            "nothing",
        ),
        ("truth of the volume",),
    ),
    "given": Variant("p(y_0 | sources)", ("a sample given the sources", "mean of 4 images given the sources"), ()),
    "last": Variant("truth", (*OF_TRUE, "training mean"), (), last=True),
}
OF_FEW = {"unguided": ("nothing",), "true": (*OF_TRUE, "a patient of another source", "training mean")}
"""What is measured of few patients, and, the first two of each, of T1 + T1ce + T2 -> FLAIR."""
AT_VISITS = {
    "unguided": ("nothing",),
    "true": ("truth of the volume", "the other visit", "a patient of the source"),
}
FROM_NOTHING = {
    "unguided": ("nothing",),
    "published": VARIANTS["published"].completions,
    "true": (*OF_TRUE, "training mean", "ridge regression", "mean of 8 vectors given the sources"),
}
VISITS = "visits"
BASELINE = "unguided: nothing"
KEEP = {"unguided": "unguided twin", "published": "published guidance"}
"""Networks whose images the segmenter measures, and how it calls them."""
BY_COHORT = (
    BASELINE,
    "true: truth of the volume",
    "true: a patient of the source",
    "true: a patient of another source",
    "true: a sample given the sources",
)
"""What is looked at in each cohort by itself: a reference might tell a site's style of contrast."""


@dataclass(frozen=True)
class Experiment:
    """All of it: what there is, and where it goes."""

    base: Path
    out: Path
    tiny: bool
    display: Display
    device: torch.device
    start: str = "default"
    """The model from which the networks start."""
    site: str = ""
    """Where given, only its patients are trained on and measured."""

    def steps(self, net: "Net") -> int:
        """Of a network's training."""
        if net.from_nothing:
            return 2 if self.tiny else STEPS_FROM_NOTHING
        return 2 if self.tiny else LAST_STEPS if VARIANTS[net.variant].last else STEPS

    @property
    def batch(self) -> dict[str, int]:
        """What is changed of the batches: from nothing, more steps of fewer slices; of a rehearsal, two slices."""
        return {"batch_size": 2} if self.tiny else {"batch_size": 4} if self.start == NOTHING else {}

    def cases(self, split: str) -> list[Case]:
        """The studies of a split."""
        return four_contrasts(self.base, split)

    def test(self) -> list[Case]:
        """The studies that are measured."""
        return tested(self.base, self.site)

    @cache  # noqa: B019  (lives as long as the script)
    def guide(self, task: Task) -> Guide:
        """MRM, MDN and vectors of a task; trains what is missing."""
        sizes = TINY if self.tiny else Sizes()
        model = trained_representations(self.base, self.out, task, sizes, self.display)
        mrm = trained_representations(self.base, self.out, ANY, sizes, self.display)
        return Guide(model, Pooled(mrm, self.out / "representations" / "pooled"), task)

    def training(self, net: "Net") -> list[Case]:
        """The training studies, or those of so many of the site's patients, drawn at random; none who came twice."""
        cases = [case for case in self.cases("train") if case.name not in OTHER_VISIT]
        if net.patients is None:
            return cases
        cases = [case for case in cases if of_site(case.name, self.site)]
        order = torch.randperm(len(cases), generator=seeded("patients", net.patients, net.seed)).tolist()
        return [cases[i] for i in order[: net.patients]]


@dataclass(frozen=True)
class Net:
    """One network that is trained."""

    task: Task
    variant: str
    seed: int
    patients: int | None = None
    site: str = ""
    from_nothing: bool = False

    @property
    def name(self) -> str:
        """Of its file."""
        few = "" if self.patients is None else f"-{self.site}-{self.patients}"
        return f"{'+'.join(self.task[1])}-{self.variant}-{self.seed}{few}{'-from-nothing' * self.from_nothing}"


def started(experiment: Experiment, task: Task, dim: int, seed: int = 0) -> FixedTask:
    """A network that vectors of so many features may guide, from the model that is the start, or from nothing."""
    if experiment.start != NOTHING:
        return converted(load_model(experiment.start), task, dim, seed)
    with first_weights(seed, "guidance"):
        network = CUNet(FORM, 3 * len(task[0]) + 1, len(task[1]), representation_dim=dim)
    fixed = FixedTask(network, range(len(task[1])))
    fixed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fixed


def start(experiment: Experiment, net: Net) -> FixedTask:
    """The network before its training."""
    dim = experiment.guide(net.task).model.config.representation.dim * len(net.task[1])
    network = started(experiment, net.task, dim, net.seed)
    if VARIANTS[net.variant].last:
        first = trained(experiment, replace(net, variant="unguided"))
        network.load_state_dict(first.state_dict())
        network.requires_grad_(False)
        for parameter in network.network.condition_layers():
            parameter.requires_grad_(True)
    elif VARIANTS[net.variant].learns == "nothing":
        for parameter in network.network.condition_layers():
            parameter.requires_grad_(False)
    return network.to(experiment.device)


def loss_of(experiment: Experiment, net: Net) -> Callable[[nn.Module, int], Tensor]:
    """The loss of a network at a step."""
    sources, targets = net.task
    cases = experiment.training(net)
    data = batches(cases, (*sources, *targets), net.seed, **experiment.batch)
    guides = guiding(VARIANTS[net.variant].learns, experiment.guide(net.task), cases, net.seed)

    def loss(network: nn.Module, step: int) -> Tensor:
        raw = ImageBatch(*(tensor.to(experiment.device) for tensor in data[step]))
        y_0 = guides(raw, step)
        y_0 = None if y_0 is None else y_0.to(experiment.device)
        return error(network, raw, y_0, len(targets), as_published=net.from_nothing)

    return loss


def trained(experiment: Experiment, net: Net) -> FixedTask:
    """A network, trained or read."""
    path = experiment.out / "guidance" / f"{net.name}.safetensors"
    network = start(experiment, net)
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.eval()
    last = VARIANTS[net.variant].last
    how = HOW if net.from_nothing else replace(HOW, learning_rate=1e-3 if last else 3e-4, warm_up=50, ema_decay=0.99)
    averaged = fit(
        network,
        loss_of(experiment, net),
        experiment.steps(net),
        how,
        fast=() if last or net.from_nothing else network.network.condition_layers(),
        name=net.name,
        display=experiment.display,
    )
    write_tensors(path, averaged.state_dict())
    return cast(FixedTask, averaged)


def measure_net(experiment: Experiment, net: Net, wanted: Sequence[str], part: str, work: Measuring) -> None:
    """Rows of a network on each study of a part, completed with each of `wanted`; those that are kept are left out."""
    guide, (sources, targets) = experiment.guide(net.task), net.task
    visits = [case for case in experiment.cases("train") if case.name in OTHER_VISIT]
    if experiment.site:
        visits = [case for case in visits if of_site(case.name, experiment.site)]
    cases = visits if part.startswith(VISITS) else experiment.test()
    key = {"part": part, "seed": net.seed, "sources": "+".join(sources), "target": targets[-1]}
    missing = [
        (case, completion)
        for case in cases
        for completion in wanted
        if not work.kept.has(predictor=f"{net.variant}: {completion}", case=case.name, **key)
    ]
    network = trained(experiment, net) if missing else None
    for case, completion in missing:
        assert network is not None
        subject = subject_of_case(case)
        y_0 = vectors(guide, experiment.cases("train"), completion, case, net.seed)
        predict = completing(network, y_0, each_slice="each slice" in completion)
        images = by_slices(subject, sources, targets, predict, device=experiment.device)
        predictor = f"{net.variant}: {completion}"
        if net == Net(PUBLISHED, net.variant, 0) and part == "test" and net.variant in KEEP:
            keep_images(experiment.out, KEEP[net.variant], subject, images)
        if part.startswith(VISITS):
            subject = replace(subject, patient=min(case.name, OTHER_VISIT[case.name]))
        work.add(subject, sources, images, predictor=predictor, seed=net.seed, part=part)
    work.finish()


def as_shipped(experiment: Experiment, task: Task, work: Measuring) -> None:
    """Rows of the converted network before any training."""
    sources, targets = task
    shipped, part = load_model(experiment.start), f"{experiment.site} as it is" if experiment.site else "test"
    key = {"part": part, "predictor": "as shipped", "seed": 0, "sources": "+".join(sources), "target": targets[-1]}
    missing = [case for case in experiment.test() if not work.kept.has(case=case.name, **key)]
    fixed = converted(shipped, task, 1).eval()
    for case in missing:
        subject = subject_of_case(case)
        if case is missing[0]:
            print(conversion_error(shipped, fixed, task, subject), flush=True)
        predict = completing(fixed, None, each_slice=False)
        images = by_slices(subject, sources, targets, predict, device=torch.device("cpu"))
        work.add(subject, sources, images, predictor="as shipped", seed=0, part=part)


def planned(options: argparse.Namespace) -> list[tuple[Net, Sequence[str], str]]:
    """What is trained and measured, the most important first: network, completions, studies."""
    few, plan = options.patients, list[tuple[Net, Sequence[str], str]]()
    chosen = [name for name in VARIANTS if not options.only or name in options.only]
    if few is not None:
        site = options.site
        nets = [(Net(PUBLISHED, name, seed, few, site), OF_FEW[name]) for seed in options.seeds for name in OF_FEW]
        plan = [(net, wanted, f"{few} patients of {site}") for net, wanted in nets if net.variant in chosen]
        return plan + [(net, AT_VISITS[net.variant], f"{VISITS} of {site}") for net, _, _ in plan]
    if options.start == NOTHING:
        part = f"from {NOTHING}"
        pairs = [(seed, name) for seed in options.seeds for name in FROM_NOTHING if name in chosen]
        fresh = [Net(PUBLISHED, name, seed, from_nothing=True) for seed, name in pairs]
        plan = [(net, FROM_NOTHING[net.variant], part) for net in fresh]
        return plan + [(n, AT_VISITS[n.variant], f"{VISITS}, {part}") for n in fresh if n.variant in AT_VISITS]
    for seed in options.seeds:
        for name in chosen:
            wanted = VARIANTS[name].always if seed else VARIANTS[name].completions
            plan += [(Net(PUBLISHED, name, seed), wanted, "test")] * bool(wanted)
    first = [name for name in chosen if 0 in options.seeds]
    plan += [(Net(THREE, name, 0), OF_FEW[name][:2], "test") for name in first if name in OF_FEW]
    return plan + [(Net(PUBLISHED, name, 0), AT_VISITS[name], VISITS) for name in first if name in AT_VISITS]


def say_how_long(experiment: Experiment, plan: Sequence[tuple[Net, Sequence[str], str]]) -> None:
    """Print steps times measured seconds a step, and studies to measure."""
    nets = {net for net, _, _ in plan if not (experiment.out / "guidance" / f"{net.name}.safetensors").exists()}
    images = sum(len(wanted) + 2 * any("images" in w for w in wanted) for _, wanted, _ in plan)
    raw = batches(experiment.cases("train")[:2], (*PUBLISHED[0], *PUBLISHED[1]), 0, **experiment.batch)[0]
    took = seconds_a_step(started(experiment, PUBLISHED, 256), raw, experiment.device)
    steps = sum(map(experiment.steps, nets))
    studies = images * len(experiment.test())
    minutes = (steps * took + studies * SECONDS_A_STUDY) / 60
    print(
        f"{len(nets)} trainings, {steps} steps of {took:.2f} s; {studies} studies to complete and measure, "
        f"{SECONDS_A_STUDY:g} s each: {minutes:.0f} minutes if no row is kept, and {REPRESENTING} for MRM and MDN",
        flush=True,
    )


def show(rows: Sequence[Row]) -> None:
    """The tables, from the rows that are kept."""
    parts = dict.fromkeys(row["part"] for row in rows)
    for part in parts:
        own = [row for row in rows if row["part"] == part]
        print(f"\n## {part}\n{table(own, BASELINE)}")
        print(f"\n### Differences to {BASELINE}\n{table(own, BASELINE, differences=True)}")
        for cohort in dict.fromkeys(row["cohort"] for row in own if part == "test"):
            here = [row for row in own if row["cohort"] == cohort and row["predictor"] in BY_COHORT]
            print(f"\n### {cohort} alone\n{table(here, BASELINE)}")


def main() -> None:
    """Train and measure what is missing, and print the tables."""
    options = parser(__doc__)
    options.add_argument("--only", nargs="+", choices=VARIANTS, default=[], metavar="NETWORK")
    options.add_argument("--site", choices=tuple(SITES), default="", help="with --patients and --start")
    options.add_argument("--patients", type=int, help="train unguided and true on so many of the site's")
    options.add_argument("--start", default="default", help="a model that was trained without the site, or nothing")
    given = arguments(options)
    if bool(given.site) != (given.patients is not None):
        options.error("--site and --patients go together.")
    if (nothing := given.start == NOTHING) and given.site:
        options.error("--start nothing is of all patients.")
    base, out = given.base, given.out
    kept = Kept(out, "guidance")
    if not given.table:
        base = tiny_base(base, out / "base") if given.tiny else base
        device = choose_device(given.device)
        experiment = Experiment(base, out, given.tiny, Display(), device, given.start, given.site)
        plan, begin = planned(given), time.monotonic()
        say_how_long(experiment, plan)
        with measuring(kept) as work:
            for task in (PUBLISHED,) if given.site else (PUBLISHED, THREE) if not (given.only or nothing) else ():
                as_shipped(experiment, task, work)
            for net, wanted, part in plan:
                measure_net(experiment, net, wanted, part, work)
        print(f"{(time.monotonic() - begin) / 60:.1f} minutes")
    show(kept.of(given.shown))


if __name__ == "__main__":
    main()
