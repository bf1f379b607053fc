"""What guidance.py and realism.py do with a C-UNet: the shipped network converted, its loss, completions, measuring."""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any, cast

import numpy as np
import torch
from grid import Kept, Predict, Row, Task, measured, network_inputs, seconds
from patients import SITES
from representations import BATCH, EVERY, Guide, ridge
from scans import SECOND_VISITS, cohort_of
from torch import Tensor, nn

from crossmr.data.dataset import Case
from crossmr.device import autocast, choose_precision
from crossmr.evaluation.subjects import Array, Subject
from crossmr.networks.c_unet import CUNet, synthesis_error
from crossmr.networks.model import CrossConditionedModel, first_weights
from crossmr.networks.scale import on_unit_scale, standardise
from crossmr.tensors import neighbours, seeded, to_model_input
from crossmr.training.batches import ImageBatch

OTHER_VISIT = SECOND_VISITS | {first: second for second, first in SECOND_VISITS.items()}
DRAWN = 8
"""Samples of a patient: in training, and whose mean is taken."""
LESION_WEIGHT = 0.5
"""As the shipped weights learnt."""


class FixedTask(nn.Module):
    """A C-UNet of which only the outputs of one task are looked at.

    The full-resolution correction reads all the outputs of the shipped network: it needs those of the other contrasts,
    too.
    """

    def __init__(self, network: CUNet, chosen: Sequence[int]):
        super().__init__()
        self.network, self.chosen = network, list(chosen)

    def forward(self, inputs: Tensor, y_0: Tensor | None = None) -> Tensor:
        """Map inputs (N, S·C + 1, Y, X) and y_0 (N, D) to the task's targets (N, T, Y, X), standardised."""
        return cast(Tensor, self.network(inputs, y_0))[:, self.chosen]


def converted(shipped: CrossConditionedModel, task: Task, dim: int, seed: int = 0) -> FixedTask:
    """The any-subset network as one of fixed sources, with condition layers for y_0 (N, dim) that change nothing yet.

    Where a given source is above 0 its availability map is the map of the head: their weights are added up. Absent
    sources are 0, and their maps, too: their weights are dropped. The two agree but where some of the given sources
    are 0 within the head, and in slices where one is black throughout, which the any-subset network takes for absent.
    """
    config, own = shipped.config, shipped.synthesis
    sources, targets = task
    given = [config.sources.index(m) for m in sources]
    outputs = len(config.targets) * (1 + config.uncertainty)
    slices = [s * config.context_slices + k for s in given for k in range(config.context_slices)]
    with first_weights(seed, "guidance"):
        network = CUNet(config.synthesis, len(slices) + 1, outputs, representation_dim=dim)
    weights = dict(own.state_dict())
    first_map = len(config.sources) * config.context_slices
    for name, before in {"encoder.stem.conv.weight": 0, "decoder.out.correct.0.weight": outputs}.items():
        maps = [*(before + first_map + s for s in given), weights[name].shape[1] - 1]
        images = [before + channel for channel in slices]
        parts = weights[name][:, :before], weights[name][:, images], weights[name][:, maps].sum(1, keepdim=True)
        weights[name] = torch.cat(parts, 1)
    absent, unknown = network.load_state_dict(weights, strict=False)
    if unknown or not all("condition" in name.split(".") for name in absent):
        raise SystemExit(f"The shipped network has another form: {[*absent, *unknown][:3]} do not fit.")
    network.zero_condition()
    fixed = FixedTask(network, [config.targets.index(m) for m in targets])
    fixed.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return fixed


@torch.no_grad()
def conversion_error(shipped: CrossConditionedModel, fixed: FixedTask, task: Task, subject: Subject) -> str:
    """How far the images of the shipped network and of the converted one lie apart, in float32, on a real study."""
    sources, targets = task
    config, spacing = shipped.config, subject.spacing_mm[0]
    nothing = np.zeros_like(subject.volumes[sources[0]])
    everything = torch.from_numpy(np.stack([subject.volumes[m] if m in sources else nothing for m in config.sources]))
    own = torch.from_numpy(np.stack([subject.volumes[m] for m in sources]))
    chosen, differences, lacking = [config.targets.index(m) for m in targets], [], []
    for z in [z for z, plane in enumerate(subject.head) if plane.any()][::EVERY]:
        around = [neighbours(z, config.context_slices, len(nothing), spacing)]
        slices = to_model_input(everything, around, 2, 32)
        available = torch.tensor([[float(m in sources) for m in config.sources]])
        theirs = shipped.predict(shipped.network_input(slices, available))[0][:, chosen]
        inputs = network_inputs(to_model_input(own, around, 2, 32), config.context_slices)
        apart = (on_unit_scale(theirs) - on_unit_scale(fixed(inputs))).abs()
        differences.append(apart[(inputs[:, -1:] > 0).expand_as(apart)])
        middle = slices[:, config.context_slices // 2 :: config.context_slices][
            :, [m in sources for m in config.sources]
        ]
        lacking.append((middle == 0).any(1)[inputs[:, -1] > 0].float())
    apart, lacks = torch.cat(differences), torch.cat(lacking)
    return (
        f"converted, {subject.name}: images differ by {apart.mean():.1e}, at most {apart.max():.1e}; "
        f"a given source is 0 in {lacks.mean():.2%} of the head"
    )


def guiding(learns: str, guide: Guide, cases: Sequence[Case], seed: int) -> Callable[[ImageBatch, int], Tensor | None]:
    """What guides the samples of a batch in training, (N, T·D): see `Variant.learns`."""
    if learns == "nothing":
        return lambda raw, step: None
    if learns != "truth":
        given = learns == "p(y_0 | sources)"
        drawn = torch.stack([guide.samples(case, DRAWN, given=given, seed=seed) for case in cases])

        def sample(raw: ImageBatch, step: int) -> Tensor:
            which = torch.randint(DRAWN, (len(raw.case),), generator=seeded("which", seed, step))
            return drawn[raw.case, which]

        return sample
    volumes = torch.cat([guide.volume(case) for case in cases])

    def truth(raw: ImageBatch, step: int) -> Tensor:
        half, targets = len(raw.case) // 2, raw.images[:, -len(guide.task[1]) :]
        present = raw.present[:half, -len(guide.task[1]) :]
        return torch.cat([guide.of_crops(targets[:half], present), volumes[raw.case[half:]]])

    return truth


def error(
    network: nn.Module, raw: ImageBatch, y_0: Tensor | None, targets: int, *, as_published: bool = False
) -> Tensor:
    """The mean error of a batch of sources, then targets, within the head: absolute, lesions weighted; or squared."""
    sources = raw.images.shape[1] - targets
    slices = raw.neighbours[:, : sources * 3]
    truth, present = raw.images[:, sources:], raw.present[:, sources:]
    prediction = network(network_inputs(slices, 3).contiguous(memory_format=torch.channels_last), y_0)
    weight = (truth > 0) * present[:, :, None, None] * (1 + (0 if as_published else LESION_WEIGHT) * raw.lesion)
    total, count = synthesis_error(prediction, standardise(truth), weight, absolute=not as_published)
    return total / count.clamp(min=1)


def source_of(case: str) -> str:
    """The source that a case is of, by its name; else its cohort."""
    return next((site for site, names in SITES.items() if case.startswith(names)), cohort_of(case))


def another(known: Sequence[Case], case: Case, *, same: bool) -> Case:
    """A training study of another patient, of the same source, else cohort, or of another one, drawn at random."""
    own = case.name, OTHER_VISIT.get(case.name)
    for kind in (source_of, cohort_of):
        fitting = [o for o in known if o.name not in own and (kind(o.name) == kind(case.name)) == same]
        if fitting:
            break
    return fitting[int(torch.randint(len(fitting), (1,), generator=seeded("another", case.name, same)))]


def regressed(guide: Guide, known: Sequence[Case], case: Case) -> Tensor:
    """y_0 (1, T·D) by a ridge regression of the training studies' on their sources' vectors."""
    x, y = torch.cat([guide.condition(k) for k in known]), torch.cat([guide.volume(k) for k in known])
    weights, offset = ridge(x.double(), y.double())
    return (guide.condition(case).double() @ weights + offset).float()


def vectors(guide: Guide, known: Sequence[Case], completion: str, case: Case, seed: int) -> Tensor | None:
    """What guides a study's completion: (K, T·D), the images of which are averaged; (Z, T·D), one for each slice."""
    match completion:
        case "nothing":
            return None
        case "truth of each slice":
            return guide.slices(case)
        case "truth of the volume":
            return guide.volume(case)
        case "the other visit":
            names = {other.name: other for other in known}
            return guide.volume(names[OTHER_VISIT[case.name]])
        case "a patient of the source" | "a patient of another source":
            return guide.volume(another(known, case, same=completion == "a patient of the source"))
        case "training mean":
            return torch.cat([guide.volume(k) for k in known]).mean(0, keepdim=True)
        case "ridge regression":
            return regressed(guide, known, case)
        case "a sample of p(y_0)":
            return guide.samples(case, 1, given=False, seed=seed + 1000)
        case "a sample given the sources":
            return guide.samples(case, 1, given=True, seed=seed + 1000)
        case "a sample of each slice given its sources":
            return guide.slice_samples(case, seed + 1000)
        case "mean of 8 vectors of each slice given its sources":
            return torch.stack([guide.slice_samples(case, seed + 1000 + k) for k in range(DRAWN)]).mean(0)
    drawn = guide.samples(case, DRAWN, given=True, seed=seed + 1000)
    return drawn[: DRAWN // 2] if "images" in completion else drawn.mean(0, keepdim=True)


def completing(network: nn.Module, y_0: Tensor | None, *, each_slice: bool) -> Predict:
    """A network guided by one vector for a volume, the mean of its images by several, or each slice by its own."""
    if y_0 is None:
        return lambda inputs: cast(Tensor, network(inputs))
    if each_slice:
        rows: Iterator[Tensor] = iter(torch.split(y_0, BATCH))
        return lambda inputs: cast(Tensor, network(inputs, next(rows).to(inputs.device)))

    def mean(inputs: Tensor) -> Tensor:
        images = [network(inputs, one.to(inputs.device).expand(len(inputs), -1)) for one in y_0]
        return torch.stack(images).mean(0)

    return mean


def seconds_a_step(network: nn.Module, raw: ImageBatch, device: torch.device) -> float:
    """The shortest of three unguided steps on a batch of two sources and two targets, with the gradients."""
    network, raw = network.to(device), ImageBatch(*(tensor.to(device) for tensor in raw))

    def step() -> None:
        with autocast(device, choose_precision("auto", device)):
            loss = error(network, raw, None, 2)
        loss.backward()  # type: ignore[no-untyped-call]

    return min(seconds(step)[0] for _ in range(3))


class Measuring:
    """Images are measured by other processes, while the next are made; rows are kept as soon as they are there."""

    def __init__(self, kept: Kept, pool: ProcessPoolExecutor):
        self.kept, self.pool = kept, pool
        self.waiting: deque[Future[list[Row]]] = deque()

    def add(self, subject: Subject, sources: Sequence[str], images: Mapping[str, Array], **facts: Any) -> None:
        """Have images of one study measured."""
        self.waiting.append(self.pool.submit(measured, subject, sources, images, **facts))
        self.finish(beyond=2)

    def finish(self, beyond: int = 0) -> None:
        """Keep the rows of all but the last `beyond` studies."""
        while len(self.waiting) > beyond:
            self.kept.add(self.waiting.popleft().result())


@contextmanager
def measuring(kept: Kept) -> Iterator[Measuring]:
    """A `Measuring` of two processes, all of whose rows are kept at the end."""
    with ProcessPoolExecutor(2, get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        work = Measuring(kept, pool)
        yield work
        work.finish()
