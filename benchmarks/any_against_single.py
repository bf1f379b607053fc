"""What does one network for every subset cost against networks of one task each, of its size and trained as long?

On each task the C-UNet of recipe `any` is trained on random subsets, for the steps of the others, twice and four times
as many, and beside it one C-UNet for each of some patterns: sources → all the rest. Same data, order, flips, first
mix and steps. Scores are those of `ablation.py`, paired over patients; the least-squares mix is the trivial rival.
--designs trains the network of any subset without what makes it learn sooner: `squared` error, missing sources left
`black` instead of filled with the mix, maps of ones (`loud`), or all three (`before`).

python benchmarks/any_against_single.py ../shared/data -o runs/any-single --task cubes-any --steps 500 --batch 16
python benchmarks/any_against_single.py ../shared/data -o runs/any-single --task lgg-any --steps 400 --seeds 0 --every 2
python benchmarks/any_against_single.py -o runs/any-single --table
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import cast

import torch
from ablation import FORM, Bench
from tasks import Samples, Task, fabric, flipped, gram_matrix, in_chunks, least_squares, load_task, score, write_rows
from torch import Tensor, nn

from crossmr import metrics
from crossmr.display import SILENT
from crossmr.jobs import random_subsets
from crossmr.model import SHOWN, CrossConditionedModel
from crossmr.recipes import TINY
from crossmr.stages.synthesis import CUNet, LinearMix, SynthesisConfig

PATTERNS = {
    "lgg-any": (("t1n",), ("t1n", "t1c"), ("t1n", "t2f")),
    "cubes-any": (("t1n",), ("t2f",), ("t1n", "t2w"), ("t1n", "t2w", "t2f"), ("t1n", "t1c", "t2w")),
}
TIMES = (1, 2, 4)
"""Steps of the network of any subset, in those of the others."""
DESIGNS = ("squared", "black", "loud", "before")
ARMS = ("linear mix", "single", *(f"any-{times}" for times in TIMES), *DESIGNS)


def model_of(
    sources: Sequence[str], targets: Sequence[str], gram: Tensor, known: Sequence[str], design: str = ""
) -> CrossConditionedModel:
    """An untrained model whose C-UNet starts from the least-squares mix; of any subset if sources are targets."""
    error = "squared" if design in ("squared", "before") else "absolute"
    form = SynthesisConfig(**FORM, residual=True, loss=error)  # type: ignore[arg-type]
    recipe = replace(TINY, any_subset=tuple(sources) == tuple(targets), synthesis=form)
    model = CrossConditionedModel(recipe.model_config(tuple(sources), tuple(targets)))
    mix = cast(LinearMix, model.synthesis.mix)
    for pattern in range(len(mix.weights)):
        shown = [s for s in range(len(sources)) if not mix.any_subset or pattern >> s & 1]
        wanted = [t for t in range(len(targets)) if not mix.any_subset or t not in shown]
        if shown and wanted:
            rows = [known.index(sources[s]) for s in shown], [known.index(targets[t]) for t in wanted]
            weights = least_squares(gram, *rows)
            for number, target in enumerate(wanted):
                mix.weights[pattern, [*shown, len(sources)], target] = weights[:, number]
    if design in ("black", "before"):
        mix.fill = lambda inputs, mixed: inputs  # type: ignore[method-assign]
    return model


def one_pattern(task: Task, sources: Sequence[str]) -> Task:
    """The task of synthesising all else from `sources`."""
    targets = tuple(m for m in task.sources if m not in sources)
    order = [task.sources.index(m) for m in (*sources, *targets)]

    def ordered(samples: Samples) -> Samples:
        return replace(samples, images=samples.images[:, order], present=samples.present[:, order])

    return Task(task.name, tuple(sources), targets, *(ordered(s) for s in (task.train, task.val, task.test)))


def read(model: CrossConditionedModel, images: Tensor, shown: Tensor, design: str) -> Tensor:
    """What the C-UNet of any subset reads, with maps of ones where the design wants them."""
    inputs = model.inputs(images, shown)
    if design in ("loud", "before"):
        inputs[:, -shown.shape[1] :] /= SHOWN
    return inputs


def trained(bench: Bench, name: str, model: CrossConditionedModel, steps: int) -> CUNet:
    """The model's C-UNet, trained on the bench's task; in place, so that the model holds it."""
    train, count = bench.task.train, len(bench.task.sources)

    def loss(network: nn.Module, batch: tuple[Tensor, Tensor], generator: torch.Generator) -> Tensor:
        chosen, flips = batch
        images, present = flipped(bench.images(train, chosen), flips), train.present[chosen]
        if model.config.any_subset:
            shown = random_subsets(present, generator)
            return network.loss(read(model, images, shown, name), images, present - shown)  # type: ignore[operator, no-any-return]
        return network.loss(images[:, :count], images[:, count:], present[:, count:])  # type: ignore[operator, no-any-return]

    return bench.fit(name, lambda: model.synthesis, loss, steps)  # type: ignore[return-value]


def scored(bench: Bench, arm: str, task: Task, prediction: Tensor) -> list[dict[str, object]]:
    """Rows of one network on one pattern."""
    sources = "+".join(task.sources)
    common = {"task": task.name, "seed": bench.seed, "steps": bench.steps, "arm": arm, "sources": sources}
    return [{**common, **row} for row in score(task, task.test, prediction.clamp(0, 1))]


def single(bench: Bench, gram: Tensor, sources: Sequence[str]) -> list[dict[str, object]]:
    """A network of one pattern, and the least-squares mix that it starts from."""
    known, bench = bench.task.sources, replace(bench, task=one_pattern(bench.task, sources))
    task, count = bench.task, len(sources)
    with seeded_weights(bench.seed):
        model = model_of(sources, task.targets, gram, known)
    network = trained(bench, "single-" + "+".join(sources), model, bench.steps)
    rows = []
    for arm, call in (("single", network), ("linear mix", cast(LinearMix, network.mix))):

        def made(chosen: Tensor, call: nn.Module = call) -> Tensor:
            images: Tensor = call(bench.images(task.test, chosen)[:, :count])
            return images[:, :, 0] if isinstance(call, LinearMix) else images

        rows += scored(bench, arm, task, in_chunks(bench.runner, made, len(task.test)))
    return rows


def any_subset(
    bench: Bench, gram: Tensor, patterns: Sequence[tuple[str, ...]], name: str, times: int = 1
) -> list[dict[str, object]]:
    """One network of every subset, trained `times` as long, on each of the patterns; its name may be a design's."""
    known, test, rows = bench.task.sources, bench.task.test, []
    with seeded_weights(bench.seed):
        model = model_of(known, known, gram, known, name)
    network = trained(bench, name, model, times * bench.steps)
    for sources in patterns:
        shown = torch.tensor([float(m in sources) for m in known])

        def made(chosen: Tensor, shown: Tensor = shown) -> Tensor:
            inputs = read(model, bench.images(test, chosen), test.present[chosen] * shown, name)
            return network(inputs)  # type: ignore[no-any-return]

        task = one_pattern(bench.task, sources)
        whole = in_chunks(bench.runner, made, len(test))
        rows += scored(bench, name, task, whole[:, [known.index(target) for target in task.targets]])
    return rows


@contextmanager
def seeded_weights(seed: int) -> Iterator[None]:
    """First weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def table(out: Path) -> None:
    """PSNR of each network, and by how much the one for every subset differs; means over patients, and a CSV."""
    found: dict[tuple[str, ...], dict[str, dict[str, dict[str, list[float]]]]] = defaultdict(
        lambda: defaultdict(lambda: defaultdict(lambda: defaultdict(list)))
    )
    rows = [row for file in sorted(out.glob("*/*-steps/seed-*/*.json")) for row in json.loads(file.read_text())]
    write_rows(out / "any_against_single.csv", rows)
    for row in rows:
        if row["arm"] in ARMS:
            for measure in ("psnr", "ssim"):
                key = (row["task"], str(row["steps"]), row["sources"], row["target"])
                found[key][measure][row["arm"]][row["patient"]].append(row[measure])
    for measure, digits in (("psnr", 2), ("ssim", 3)):
        print(f"\n| {measure.upper()} | target | {' | '.join(ARMS)} |\n|---|---|{'---|' * len(ARMS)}")
        for (task, steps, sources, target), measures in found.items():
            arms = measures[measure]
            means = {arm: {p: sum(v) / len(v) for p, v in of.items()} for arm, of in arms.items()}
            single, cells = means["single"], []
            for arm in ARMS:
                if arm not in means:
                    cells.append("")
                    continue
                values = means[arm]
                cell = f"{sum(values.values()) / len(values):.{digits}f}"
                if arm != "single":
                    p = metrics.paired_wilcoxon([values[c] for c in single], [single[c] for c in single])
                    gain = sum(values[c] - single[c] for c in single) / len(single)
                    cell += f" ({gain:+.{digits}f}{'*' if p < 0.01 else ''})"
                cells.append(cell)
            print(f"| {task} {steps} {sources} | {target} | {' | '.join(cells)} |")


def main() -> None:
    """Train and score one task, or print the table of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/any-single"))
    parser.add_argument("--task", choices=list(PATTERNS), default="cubes-any")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--every", type=int, default=1, help="of the test slices, score each n-th")
    parser.add_argument("--times", type=int, nargs="+", default=list(TIMES))
    parser.add_argument("--designs", nargs="*", choices=DESIGNS, default=[])
    parser.add_argument("--precision", default="bf16-mixed")
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if options.table:
        table(options.out)
        return
    task = load_task(options.task, options.data, options.out, SILENT)
    task = replace(task, test=task.test.select(torch.arange(0, len(task.test), options.every)))
    gram, patterns = gram_matrix(task.train), PATTERNS[task.name]
    for seed in options.seeds:
        folder = options.out / task.name / f"{options.steps}-steps" / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(task, task.test, folder, fabric(options.precision), seed, options.steps, options.batch, SILENT)
        jobs: dict[str, Callable[[], list[dict[str, object]]]] = {
            "single-" + "+".join(sources): partial(single, bench, gram, sources) for sources in patterns
        }
        networks = {f"any-{times}": times for times in options.times} | dict.fromkeys(options.designs, 1)
        jobs |= {name: partial(any_subset, bench, gram, patterns, name, times) for name, times in networks.items()}
        for name, job in jobs.items():
            if not (folder / f"{name}.json").exists():
                (folder / f"{name}.json").write_text(json.dumps(job()))
                print(task.name, seed, name, flush=True)


if __name__ == "__main__":
    main()
