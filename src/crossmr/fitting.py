"""The one training loop: exact to resume, wherever it was stopped.

Batches, masks, steps of diffusion and noise are drawn from the seed and the step's number alone, so there is no random
state to keep: weights, their average, the optimiser and the step are the whole state.
"""

import copy
import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.utils.data import DataLoader

from crossmr.checkpoint import load_checkpoint, save_checkpoint
from crossmr.data.dataset import seeded
from crossmr.device import out_of_memory
from crossmr.display import Display
from crossmr.errors import Interrupted, ModelError
from crossmr.files import append_line, write_atomically
from crossmr.recipes import FitConfig

Made = TypeVar("Made")

SECONDS_BETWEEN_CHECKPOINTS = float(os.environ.get("CROSSMR_SECONDS_BETWEEN_CHECKPOINTS", 60))
VALIDATIONS = 10
"""Times a stage is validated, its last step included."""
TIMED_STEPS = 6
"""Steps that are timed, after as many to warm up, to turn --minutes into a number of steps."""
USABLE = 0.92
"""Share of the time that goes into steps; the rest is validation and checkpoints."""


@dataclass(frozen=True)
class Loop:
    """Where a training runs, and where it leaves its state and its log."""

    folder: Path
    fabric: Fabric
    seed: int
    display: Display


@dataclass(frozen=True)
class Job:
    """What fit() needs to know of a stage."""

    name: str
    data: Any
    """`data[step]` is that step's batch, and `data.steps_per_epoch` their number in an epoch."""
    loss: Callable[[nn.Module, Any, torch.Generator], Tensor]
    """From network, batch and the step's generator to a scalar."""
    validate: Callable[[nn.Module, Path], dict[str, float]] | None
    """From the averaged network and the path of a picture to what is measured on held-out patients."""
    workers: int = 0
    """Processes that read batches, where a GPU would otherwise wait for them."""


def steps_in(loop: Loop, network: nn.Module, job: Job, config: FitConfig, minutes: float) -> int:
    """How many steps fit into `minutes`, measured on a copy of the network that is then thrown away."""
    network, optimiser = _set_up(loop, copy.deepcopy(network), config)
    started, parts = 0.0, 1
    for step in range(2 * TIMED_STEPS):
        if step == TIMED_STEPS:
            _synchronise(loop.fabric.device)
            started = time.monotonic()
        _, parts = _step(loop, network, optimiser, job, config, job.data[step], step, parts)
    _synchronise(loop.fabric.device)
    pace = (time.monotonic() - started) / TIMED_STEPS
    return max(1, int(USABLE * 60 * minutes / pace))


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def fit(loop: Loop, network: nn.Module, job: Job, config: FitConfig, steps: int) -> nn.Module:
    """Train one network for `steps` steps, or from its newest checkpoint on, and return its averaged copy.

    Batches, masks, steps of diffusion and noise are drawn from the seed and the step's number, so a run that was
    stopped anywhere, even killed, ends with the very weights of one that never was. Where memory runs out, batches go
    through in parts whose gradients are summed.

    Raises:
        Interrupted: on Ctrl-C or SIGTERM, after the step in progress and a checkpoint.
        ModelError: the loss is not finite any more, or not even one sample fits into memory.
    """
    folder, log = loop.folder / "stages" / job.name, loop.folder / "metrics.jsonl"
    averaged = copy.deepcopy(network).requires_grad_(False)
    network, optimiser = _set_up(loop, network, config)
    done = _restore(loop, folder, network, averaged, optimiser)
    _truncate_log(log, job.name, done)
    loader = DataLoader(
        job.data,
        batch_size=None,
        sampler=range(done, steps),
        num_workers=job.workers if loop.fabric.device.type == "cuda" else 0,
    )
    every, log_every = max(1, steps // VALIDATIONS), max(1, steps // 200)
    losses: list[Tensor] = []
    parts = 1
    saved = marked = time.monotonic()
    with _stop_requests() as stopping, loop.display.task(job.name, steps, done) as task:
        for step, batch in enumerate(loader, start=done):
            rate = config.learning_rate * (1 - step / steps) ** 0.9
            for group in optimiser.param_groups:
                group["lr"] = rate
            loss_now, parts = _step(loop, network, optimiser, job, config, batch, step, parts)
            losses.append(loss_now)
            _average(averaged, network, min(config.ema_decay, (1 + step) / (10 + step)))
            done, last = step + 1, step + 1 == steps
            record: dict[str, Any] = {}
            if done % log_every == 0 or last:
                loss = float(torch.stack(losses).mean())
                if not math.isfinite(loss):
                    raise ModelError(
                        f"{job.name}: the loss is {loss} at step {done}. Lower {job.name}'s learning rate."
                    )
                pace = len(losses) / max(1e-9, time.monotonic() - marked)
                record = {
                    "stage": job.name,
                    "step": done,
                    "loss": loss,
                    "learning_rate": rate,
                    "steps_per_second": pace,
                }
                losses, marked = [], time.monotonic()
            if job.validate is not None and (done % every == 0 or last):
                picture = loop.folder / "pictures" / f"{job.name}-{done:06d}.png"
                record = {"stage": job.name, "step": done, **record, **job.validate(averaged, picture)}
                marked = time.monotonic()
            if record:
                append_line(log, json.dumps(record))
                note = " ".join(f"{k} {v:.4g}" for k, v in record.items() if k == "loss" or k.startswith("val_"))
            task.advance(note if record else "")
            if last or stopping.is_set() or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                _save(folder, done, steps, network, averaged, optimiser)
                saved = time.monotonic()
            if stopping.is_set() and not last:
                raise Interrupted(
                    f"Stopped at step {done} of {steps} of {job.name}; the same command goes on from there."
                )
    return averaged


def _set_up(loop: Loop, network: nn.Module, config: FitConfig) -> tuple[nn.Module, torch.optim.Optimizer]:
    learning = [parameter for parameter in network.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(learning, config.learning_rate, weight_decay=config.weight_decay)
    wrapped, wrapped_optimiser = loop.fabric.setup(network, optimiser)
    wrapped.mark_forward_method("loss")
    return wrapped, wrapped_optimiser


def _step(
    loop: Loop,
    network: nn.Module,
    optimiser: torch.optim.Optimizer,
    job: Job,
    config: FitConfig,
    batch: Any,
    step: int,
    parts: int,
) -> tuple[Tensor, int]:
    """One step of gradient descent: the loss, detached, and in how many parts the batch went through."""
    network.train()

    def descend(pieces: Sequence[tuple[Any, float]]) -> Tensor:
        optimiser.zero_grad(set_to_none=True)
        return _descend(loop, network, job, seeded(job.name, loop.seed, step), pieces)

    before = parts
    loss, parts = in_parts(job.name, batch, descend, parts)
    if parts > before:
        loop.display.say(f"{job.name}: out of memory; batches go through in {parts} parts from here on")
    loop.fabric.clip_gradients(network, optimiser, max_norm=config.gradient_clip, error_if_nonfinite=False)
    optimiser.step()
    return loss, parts


def _descend(
    loop: Loop, network: nn.Module, job: Job, generator: torch.Generator, parts: Sequence[tuple[Any, float]]
) -> Tensor:
    """Sum the gradients of a batch's parts, and their losses, each by its share of the samples."""
    total = torch.zeros((), device=loop.fabric.device)
    for part, share in parts:
        loss = share * job.loss(network, part, generator)
        loop.fabric.backward(loss)
        total = total + loss.detach()
    return total


def in_parts(
    name: str, batch: Any, run: Callable[[Sequence[tuple[Any, float]]], Made], parts: int = 1
) -> tuple[Made, int]:
    """What `run` makes of a batch's parts and their shares of its samples, and how many parts it took.

    Where memory runs out there are twice as many.

    Raises:
        ModelError: not even one sample fits into memory.
    """
    while True:
        try:
            return run(_cut(batch, parts)), parts
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if parts == (samples := len(_tensors(batch)[0])):
                raise ModelError(
                    f"{name}: out of memory with one sample at a time. Lower --set crop or the network's size."
                ) from error
        parts = min(2 * parts, samples)


def _cut(batch: Any, parts: int) -> list[tuple[Any, float]]:
    """A batch in so many parts, and their shares of its samples."""
    if parts == 1:
        return [(batch, 1.0)]
    tensors = _tensors(batch)
    pieces = zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True)
    return [(type(batch)(*piece), len(piece[0]) / len(tensors[0])) for piece in pieces]


def _tensors(batch: Any) -> Sequence[Tensor]:
    """The tensors (B, ...) of a batch, a tuple or dataclass of them."""
    return batch if isinstance(batch, tuple) else [getattr(batch, field.name) for field in fields(batch)]


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the network's by 1 - decay."""
    torch._foreach_lerp_(list(averaged.parameters()), list(network.parameters()), 1 - decay)


def _save(
    folder: Path,
    step: int,
    steps: int,
    network: nn.Module,
    averaged: nn.Module,
    optimiser: torch.optim.Optimizer,
) -> None:
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in averaged.state_dict().items()}
    for index, slots in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{slot}": value for slot, value in slots.items()}
    save_checkpoint(folder, step, tensors, {"steps": steps})


def _restore(
    loop: Loop, folder: Path, network: nn.Module, averaged: nn.Module, optimiser: torch.optim.Optimizer
) -> int:
    """Load the newest whole checkpoint, if any, and return the steps it had done."""
    found = load_checkpoint(folder, loop.display.say)
    if found is None:
        return 0
    tensors, data = found
    network.load_state_dict({k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")})
    averaged.load_state_dict({k.removeprefix("ema."): v for k, v in tensors.items() if k.startswith("ema.")})
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if key.startswith("optimiser."):
            _, index, slot = key.split(".")
            slots.setdefault(int(index), {})[slot] = value
    optimiser.load_state_dict({"state": slots, "param_groups": optimiser.state_dict()["param_groups"]})
    return int(data["step"])


def _truncate_log(log: Path, stage: str, done: int) -> None:
    """Drop what a killed run wrote after the checkpoint that it resumes from."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["stage"] != stage or record["step"] <= done:
            kept.append(line + "\n")
    write_atomically(log, "".join(kept).encode())


@contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is never cut in two; a second Ctrl-C is not held back."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def request(number: int, frame: Any) -> None:
        if stopping.is_set():
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
