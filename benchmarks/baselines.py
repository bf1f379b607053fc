"""Peers at equal cost: other ways from sources to targets, on the same slices, split, order and seed.

  u-net            regression by the C-UNet's unguided twin; the reference
  pix2pix          the same network against a discriminator of patches (Isola et al. 2017): least-squares GAN + 100 L1
  pixel-diffusion  MONAI's U-Net denoises the targets beside the sources: x_0 prediction, DDIM of 50 or 250 steps
  transformer      Restormer (Zamir et al. 2022), a U-Net of attention across channels: regression
  ours             the package's design: a fifth of its steps for the masked autoencoder, seven tenths for the C-UNet, a
                   tenth for its condition layers; completed unguided, and as the mean of eight guided syntheses

The network that maps sources to targets has the u-net's parameters within 6 % (ours counts MRM and MDN on top), and
each method is trained for as many steps as cost the u-net's FLOPs (the MDN's are left out: under 1 %).

python benchmarks/baselines.py ../shared/data -o runs/baselines --task lgg-t1 --steps 500 --seeds 0
"""

import argparse
import copy
import csv
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from ablation import CONDITION_WIDTH, DDIM_STEPS, FORM, Bench, c_unet, described, distribution, representation
from monai.networks.nets import DiffusionModelUNet, PatchDiscriminator
from monai.networks.nets.restormer import Restormer
from tasks import MEASURES, TASKS, Samples, Steps, averaged, fabric, flipped, in_chunks, initialised, load_task, score
from torch import Generator, Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from crossmr.checkpoint import load_checkpoint, save_checkpoint
from crossmr.data.dataset import seeded
from crossmr.diffusion import Schedule, ddim_sample, q_sample
from crossmr.display import SILENT
from crossmr.metrics import paired_wilcoxon
from crossmr.stages.distribution import DistributionConfig, DistributionNetwork
from crossmr.stages.representation import MaskedAutoencoder, RepresentationConfig
from crossmr.stages.synthesis import CUNet, SynthesisConfig, mean_where_present

REFERENCE, SLOW = "u-net", "pixel-diffusion, DDIM 250"
SCHEDULE, ETA = Schedule(), 0.0
"""No fresh noise: at 50 steps DDIM's FID is 4.7 without and 8.0 with it (Song et al. 2021, Table 1)."""
GAN_RATE, GAN_BETAS, EMA_DECAY = 2e-4, (0.5, 0.999), 0.99
COSTS = ("parameters", "steps", "tflop", "evaluations", "slice_gflop", "slice_seconds", "volume_seconds", "peak_mib")
"""TFLOP of the training, evaluations of the network a slice; the rest is of inference."""
FIELDS = ("task", "seed", "method", "slices", "patient", "target", *MEASURES)

Row = dict[str, Any]
Batch = tuple[Tensor, Tensor, Tensor]
"""Sources (B, S, Y, X), targets (B, T, Y, X), and which targets were acquired (B, T)."""
Completion = Callable[[nn.Module, Tensor, Sequence[Generator]], Tensor]
"""(network, sources, a generator a slice) → targets on their [0, 1] scale, but not clipped."""


@dataclass(frozen=True, eq=False)
class Method:
    """One way from sources to targets, sides multiples of 8."""

    networks: tuple[Callable[[], nn.Module], ...]
    """The first one completes; others only help to train it."""
    losses: Callable[[Sequence[nn.Module], Batch, Generator], Iterator[Tensor]]
    """The loss of each network in turn."""
    completions: Mapping[str, tuple[Completion, int]]
    """Row of the tables → how the network completes, and in how many evaluations."""
    train: Callable[[Bench, int], nn.Module] | None = None
    """For a method that is trained in another way, or elsewhere: bench and steps → the network that completes."""


def squared(networks: Sequence[nn.Module], batch: Batch, _: Generator) -> Iterator[Tensor]:
    """The loss of plain regression."""
    x, y, acquired = batch
    yield mean_where_present((networks[0](x).float() - y).square(), acquired)


def one_pass(network: nn.Module, x: Tensor, _: Sequence[Generator]) -> Tensor:
    """Completion by plain regression."""
    return network(x)  # type: ignore[no-any-return]


def u_net(sources: int, targets: int) -> Method:
    """The C-UNet without guidance."""
    network = partial(CUNet, SynthesisConfig(**FORM), sources, targets, None)  # type: ignore[arg-type]
    return Method((network,), squared, {REFERENCE: (one_pass, 1)})


def transformer(sources: int, targets: int) -> Method:
    """Restormer, since MONAI's SwinUNETR has 1.4 M parameters at its smallest."""
    form = {"dim": 16, "num_blocks": (1, 1, 2, 1), "heads": (1, 2, 4, 8), "num_refinement_blocks": 1}
    return Method((partial(Restormer, 2, sources, targets, **form),), squared, {"transformer": (one_pass, 1)})


def pix2pix(sources: int, targets: int, adversarial: float = 1.0, l1: float = 100.0) -> Method:
    """Isola et al. 2017, Eq. 4, with least squares (Mao et al. 2017) and without dropout.

    The discriminator sees sources and targets, those that were not acquired as zeros in true and false images alike.
    It normalises each image by itself, as theirs did with one a batch.
    """

    def losses(networks: Sequence[nn.Module], batch: Batch, _: Generator) -> Iterator[Tensor]:
        (x, y, acquired), (network, critic) = batch, networks
        true, false = (images * acquired[..., None, None] for images in (y, network(x).float()))

        def verdict(images: Tensor) -> Tensor:
            return critic(torch.cat([x, images], 1))[-1].float()  # type: ignore[no-any-return]

        critic.requires_grad_(False)
        yield adversarial * (verdict(false) - 1).square().mean() + l1 * mean_where_present(
            (false - true).abs(), acquired
        )
        critic.requires_grad_(True)
        yield (verdict(false.detach()).square().mean() + (verdict(true) - 1).square().mean()) / 2

    critic = partial(PatchDiscriminator, 2, 16, sources + targets, num_layers_d=3, norm="INSTANCE")
    return Method((*u_net(sources, targets).networks, critic), losses, {"pix2pix": (one_pass, 1)})


def pixel_diffusion(sources: int, targets: int) -> Method:
    """Targets on [-1, 1], denoised beside the sources; attention where the C-UNet has it."""
    alpha_bar = SCHEDULE.alpha_bar()

    def losses(networks: Sequence[nn.Module], batch: Batch, generator: Generator) -> Iterator[Tensor]:
        x, y, acquired = batch
        t = torch.randint(SCHEDULE.steps, (len(y),), generator=generator)
        noise = torch.randn(y.shape, generator=generator).to(y.device)
        noised = q_sample(2 * y - 1, noise, alpha_bar[t])
        x_0 = networks[0](torch.cat([x, noised], 1), t.to(y.device)).float()
        yield mean_where_present((x_0 - (2 * y - 1)).square(), acquired)

    def sample(network: nn.Module, x: Tensor, generators: Sequence[Generator], *, steps: int) -> Tensor:
        def predict_x0(x_t: Tensor, t: Tensor) -> Tensor:
            return network(torch.cat([x, x_t], 1), t).float().clamp(-1, 1)  # type: ignore[no-any-return]

        shape = (len(x), targets, *x.shape[2:])
        drawn = ddim_sample(predict_x0, shape, SCHEDULE, steps=steps, eta=ETA, generator=generators, device=x.device)
        return (drawn + 1) / 2

    form = {"channels": (16, 32, 48, 64), "attention_levels": (False, False, False, True), "num_res_blocks": 1}
    form |= {"norm_num_groups": 4, "num_head_channels": 32}
    network = partial(DiffusionModelUNet, 2, sources + targets, targets, **form)
    rows = {f"pixel-diffusion, DDIM {steps}": (partial(sample, steps=steps), steps) for steps in (50, 250)}
    return Method((network,), losses, rows)


class Ours(nn.Module):
    """MRM, C-UNet and MDN of the package's design."""

    def __init__(self, sources: int, targets: int):
        super().__init__()
        form = RepresentationConfig(**FORM, patch_size=4, cell=8)  # type: ignore[arg-type]
        self.representation = MaskedAutoencoder(form, targets)
        dim = self.representation.dim
        config = SynthesisConfig(**FORM, condition_width=CONDITION_WIDTH)  # type: ignore[arg-type]
        self.synthesis = CUNet(config, sources, targets, dim, guided_last=True)
        self.distribution = DistributionNetwork(DistributionConfig(width=96, blocks=4), dim, dim, 2)

    def forward(self, x: Tensor, y_0: Tensor | None = None) -> Tensor:
        """One pass of the C-UNet."""
        return self.synthesis(x, y_0)  # type: ignore[no-any-return]


def ours(sources: int, targets: int) -> Method:
    """What `ablation.py` calls last."""

    def train(bench: Bench, steps: int) -> nn.Module:
        first, network = bench.sources, Ours(sources, targets)
        network.representation = representation(replace(bench, steps=steps // 5), "ours-mrm", slice(first, None), 8)

        def truth(images: Tensor) -> Tensor:
            return network.representation.represent(images[:, first:])

        def told(images: Tensor) -> Tensor:
            return network.representation.represent(network(images[:, :first]).float().clamp(0, 1))

        finished = c_unet(replace(bench, steps=7 * steps // 10), "ours-unguided", None, lambda *_: torch.empty(0))
        network.synthesis = c_unet(
            replace(bench, steps=steps // 10),
            "ours",
            network.representation.dim,
            lambda x, *_: truth(x),
            dropout=0.0,
            start=finished,
            last=True,
        )
        y, x = (described(bench, call, bench.task.train, mirrored=True) for call in (truth, told))
        usable = bench.task.train.present.amin(1) > 0
        pairs = (part[:, usable].flatten(0, 1) for part in (y, x))
        network.distribution = distribution(bench, "ours-mdn", *pairs, steps=2000)
        return network.eval()

    def mean_of_8(network: nn.Module, x: Tensor, _: Sequence[Generator]) -> Tensor:
        network = cast(Ours, network)
        condition = network.representation.represent(network(x).float().clamp(0, 1))
        noises = [seeded("ours", k) for k in range(8) for _ in x]
        repeated, grid = condition.repeat(8, 1, 1, 1), condition.shape[2:]
        y_0 = network.distribution.sample(noises, repeated, grid=grid, steps=DDIM_STEPS)
        return torch.stack([network(x, one).float().clamp(0, 1) for one in y_0.chunk(8)]).mean(0)

    rows = {"ours": (one_pass, 1), "ours, mean of 8": (mean_of_8, 9)}
    return Method((partial(Ours, sources, targets),), squared, rows, train)


METHODS: dict[str, Callable[[int, int], Method]] = {
    REFERENCE: u_net,
    "pix2pix": pix2pix,
    "pixel-diffusion": pixel_diffusion,
    "transformer": transformer,
    "ours": ours,
}


Methods = Mapping[str, Method]


def completions(methods: Methods) -> list[tuple[str, str, Completion, int]]:
    """Each row's method, name, completion and evaluations."""
    return [(name, row, *how) for name, method in methods.items() for row, how in method.completions.items()]


def flops(call: Callable[[], object]) -> int:
    """Floating-point operations of a call, a multiplication and an addition being two.

    PyTorch's counter passes over the CPU's fused attention, so that attention is taken apart here; and it overlooks
    groups in a convolution's backward pass, where either gradient costs what the convolution did.
    """

    def backward(grad: list[int], x: list[int], w: list[int], *rest: Any, **_: Any) -> int:
        return conv_flop_count(x, w, grad, rest[4]) * int(sum(rest[7][:2]))

    formulas = {torch.ops.aten.convolution_backward: backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter, sdpa_kernel(SDPBackend.MATH):
        call()
    return int(counter.get_total_flops())


def counted(method: Method, batch: int, channels: tuple[int, int], size: Sequence[int]) -> tuple[int, float, float]:
    """Parameters of the network that completes, TFLOP of a training step, GFLOP of one evaluation of a slice.

    Counted on tensors without contents.
    """
    with torch.device("meta"):
        networks = [build() for build in method.networks]
        x, y = (torch.empty(batch, count, *size) for count in channels)
        acquired = torch.empty(batch, channels[1])
    calls: list[Any] = []

    def step() -> None:
        for loss in method.losses(networks, (x, y, acquired), seeded("step")):
            loss.backward()  # type: ignore[no-untyped-call]

    hook = networks[0].register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    tflop, parameters = flops(step) / 1e12, sum(parameter.numel() for parameter in networks[0].parameters())
    hook.remove()
    gflop = flops(partial(networks[0], *calls[0])) / batch / 1e9
    return parameters, tflop, gflop


def trained(bench: Bench, name: str, method: Method, steps: int) -> nn.Module:
    """The network that completes, from its checkpoint if it has one."""

    def examples(indices: tuple[Tensor, Tensor]) -> Batch:
        chosen, flips = indices
        images = flipped(bench.images(bench.task.train, chosen), flips.to(bench.runner.device))
        acquired = bench.task.train.present[chosen].to(images.device)
        return images[:, : bench.sources], images[:, bench.sources :], acquired[:, bench.sources :]

    def build() -> nn.Module:
        """With a `loss`, which `fit` asks for though the method has its own."""
        network = method.networks[0]()
        network.loss = network.forward  # type: ignore[assignment]
        return network

    def loss(network: nn.Module, indices: tuple[Tensor, Tensor], generator: Generator) -> Tensor:
        return next(method.losses([network], examples(indices), generator))

    if method.train is not None:
        return method.train(bench, steps)
    if len(method.networks) > 1:
        return alternate(bench, name, method, examples, steps)
    return bench.fit(name, build, loss, steps)


def alternate(bench: Bench, name: str, method: Method, examples: Callable[..., Batch], steps: int) -> nn.Module:
    """Train several networks in turn, each by its own Adam; decay and averaging are `fit`'s. Starts over if stopped."""
    folder = bench.folder / "stages" / name
    networks = [initialised(bench.seed, build, 2).to(bench.runner.device) for build in method.networks]
    mean = copy.deepcopy(networks[0]).requires_grad_(False).eval()
    if (finished := load_checkpoint(folder)) is not None:
        mean.load_state_dict(finished[0])
        return mean
    optimisers = [torch.optim.Adam(network.parameters(), GAN_RATE, betas=GAN_BETAS) for network in networks]
    wrapped = [bench.runner.setup(*pair)[0] for pair in zip(networks, optimisers, strict=True)]
    data = Steps(len(bench.task.train), bench.batch, bench.seed)
    for step in range(steps):
        losses = method.losses(wrapped, examples(data[step]), seeded(name, bench.seed, step))
        for loss, optimiser in zip(losses, optimisers, strict=True):
            optimiser.param_groups[0]["lr"] = GAN_RATE * (1 - step / steps) ** 0.9
            optimiser.zero_grad(set_to_none=True)
            bench.runner.backward(loss)
            optimiser.step()
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(mean.parameters()), list(networks[0].parameters()), 1 - decay)
    save_checkpoint(folder, steps, mean.state_dict(), {"steps": steps})
    return mean


def completed(bench: Bench, network: nn.Module, completion: Completion, chosen: Tensor) -> Tensor:
    """Targets (N, T, Y, X) of some of the test slices; a slice's noise is drawn from seed and slice."""

    def call(part: Tensor) -> Tensor:
        generators = [seeded("noise", bench.seed, int(index)) for index in chosen[part]]
        return completion(network, bench.images(bench.test, chosen[part])[:, : bench.sources], generators)

    return in_chunks(bench.runner, call, len(chosen)).clamp(0, 1)


def thinned(samples: Samples, every: int) -> Tensor:
    """Indices of each n-th slice of every patient, the middle one among them."""
    own = [(samples.patient == number).nonzero().flatten() for number in range(len(samples.names))]
    return torch.cat([index[(torch.arange(len(index)) - len(index) // 2) % every == 0] for index in own])


def scored(bench: Bench, method: Method, network: nn.Module, few: Tensor) -> list[Row]:
    """Scores of each patient by each completion, over all slices (but for the slow one) and over the few."""
    rows = []
    for row, (completion, _) in method.completions.items():
        chosen = few if row == SLOW else torch.arange(len(bench.test))
        prediction = torch.full((len(bench.test), len(bench.task.targets), *bench.test.images.shape[2:]), torch.nan)
        prediction[chosen] = completed(bench, network, completion, chosen)
        for part in {len(part): part for part in (few, chosen)}.values():
            common = {"task": bench.task.name, "seed": bench.seed, "method": row, "slices": len(part)}
            rows += [common | one for one in score(bench.task, bench.test.select(part), prediction[part])]
    return rows


def seconds(bench: Bench, methods: Methods, networks: Mapping[str, nn.Module], volumes: int) -> dict[str, Row]:
    """Median time to complete a volume's scored slices; the methods take turns, so that noise hits all alike.

    What a library prepares for a new shape is left to an untimed pass, or to the first of a sampler's.
    """
    own = [index for n in range(len(bench.test.names)) if len(index := (bench.test.patient == n).nonzero().flatten())]
    taken = defaultdict(list)
    for place in np.linspace(0, len(own) - 1, min(volumes, len(own))).round().astype(int):
        for name, row, completion, evaluations in completions(methods):
            for _ in range(2 if evaluations == 1 else 1):
                start = time.perf_counter()
                completed(bench, networks[name], completion, own[place])
                spent = time.perf_counter() - start
            taken[row].append((spent, spent / len(own[place])))
    names = ("volume_seconds", "slice_seconds")
    return {row: dict(zip(names, np.median(t, axis=0).tolist(), strict=True)) for row, t in taken.items()}


def peak_mib(name: str, row: str, shape: tuple[int, ...], targets: int, precision: str) -> float:
    """How far a fresh process's memory rises above its network and sources (N, S, Y, X) as these are completed.

    Resident memory on Linux, its peak reset just before; not `ru_maxrss`, which a child inherits. Weights and
    intensities do not matter to it. It includes the noise of all steps, which `ddim_sample` draws beforehand.
    """
    method = METHODS[name](shape[1], targets)
    network, x = initialised(0, method.networks[0], 2).eval(), torch.rand(shape)
    generators = [seeded(index) for index in range(len(x))]

    def resident(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision.startswith("bf16")):
        method.completions[row][0](network, x.contiguous(memory_format=torch.channels_last), generators)
    return resident("VmHWM") - before


def tables(rows: Sequence[Row], costs: Sequence[Row]) -> str:
    """Means over patients with Wilcoxon's p against the reference, and what each method costs, as Markdown."""
    scores: dict[tuple[Any, ...], dict[Any, Row]] = defaultdict(dict)
    for key, values in averaged(rows, ["slices", "target", "method", "patient"]).items():
        scores[key[:3]][key[3]] = values
    lines = [["slices", "target", "method", *MEASURES], ["---"] * (3 + len(MEASURES))]
    for key, own in sorted(scores.items(), key=lambda item: item[0][:2]):
        cells, reference = [*map(str, key)], scores[*key[:2], REFERENCE]
        for measure in MEASURES:
            pairs = [(own[p][measure], reference[p][measure]) for p in own if measure in own[p]]
            p_value = "" if own is reference or not pairs else f" (p {paired_wilcoxon(*zip(*pairs, strict=True)):.2g})"
            cells.append(f"{sum(a for a, _ in pairs) / len(pairs):.3f}{p_value}" if pairs else "")
        lines.append(cells)
    lines += [[], ["method", *COSTS], ["---"] * (1 + len(COSTS))]
    lines += [[cost["method"], *(f"{cost[key]:.6g}" for key in COSTS)] for cost in costs]
    return "\n".join(f"| {' | '.join(cells)} |" if cells else "" for cells in lines) + "\n"


def main() -> None:
    """Train, score and time every method, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?", default=Path("../shared/data"))
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/baselines"))
    parser.add_argument(
        "--task", choices=[name for name in TASKS if not name.endswith(("3d", "any"))], default="lgg-t1"
    )
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=500, help="of the u-net; the others' follow from its FLOPs")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--every", type=int, default=8, help="of the test slices, score each n-th")
    parser.add_argument("--diffusion-every", type=int, default=1, help=f"of those, score each n-th by {SLOW}")
    parser.add_argument("--volumes", type=int, default=5, help="that are timed")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    parser.add_argument("--weights", type=float, nargs=2, default=(1.0, 100.0), help="of pix2pix's GAN and L1")
    options = parser.parse_args()
    task, runner = load_task(options.task, options.data, options.out, SILENT), fabric(options.precision)
    test = task.test.select(torch.arange(0, len(task.test), options.every))
    few = thinned(test, options.diffusion_every)
    channels, size = (len(task.sources), len(task.targets)), test.images.shape[2:]
    methods = {name: METHODS[name](*channels) for name in dict.fromkeys((REFERENCE, *options.methods))}
    if "pix2pix" in methods:
        methods["pix2pix"] = pix2pix(*channels, *options.weights)
    counts = {name: counted(method, options.batch, channels, size) for name, method in methods.items()}
    budget = options.steps * counts[REFERENCE][1]
    steps = {name: max(1, round(budget / tflop)) for name, (_, tflop, _) in counts.items()}
    folder = options.out / task.name / f"{options.steps}-steps"
    rows: list[Row] = []
    networks: dict[str, nn.Module] = {}
    for seed in options.seeds:
        bench = Bench(task, test, folder / f"seed-{seed}", runner, seed, options.steps, options.batch, SILENT)
        for name, method in methods.items():
            print(f"{task.name} seed {seed} | {name} | {steps[name]} steps of {counts[name][1]:.4f} TFLOP", flush=True)
            networks[name] = trained(bench, name, method, steps[name])
            path = bench.folder / f"{name}.json"
            if not path.exists():
                path.write_text(json.dumps(scored(bench, method, networks[name], few)))
            rows += json.loads(path.read_text())
    path = folder / "measured.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    if not {row for _, row, _, _ in completions(methods)} <= set(measured):
        measured = seconds(bench, methods, networks, options.volumes)
        shape = (int(test.patient.bincount().max()), channels[0], *size)
        for name, row, _, _ in completions(methods):
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                job = fresh.submit(peak_mib, name, row, shape, channels[1], options.precision)
                measured[row]["peak_mib"] = job.result()
        path.write_text(json.dumps(measured))
    costs = []
    for name, row, _, evaluations in completions(methods):
        parameters, tflop, gflop = counts[name]
        spent = {"parameters": parameters, "steps": steps[name], "tflop": steps[name] * tflop}
        use = {"evaluations": evaluations, "slice_gflop": evaluations * gflop}
        costs.append({"method": row, **spent, **use, **measured[row]})
    for title, fields, table in (("quality", FIELDS, rows), ("costs", ("method", *COSTS), costs)):
        with (folder / f"{title}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, fields)
            writer.writeheader()
            writer.writerows(table)
    (folder / "tables.md").write_text(text := tables(rows, costs))
    print(text)


if __name__ == "__main__":
    main()
