"""The one training loop: a stage's batches, gradients, steps, average, checkpoints and log.

Batches, masks, steps of diffusion and noise are drawn from the seed and the step's number alone, so there is no random
state to keep: weights, their average, the optimiser and the step are the whole state. On a processor a training that
was stopped, even killed, therefore ends with the very weights of one that never was, unless less memory is left and
batches go through in more parts; then, as on a GPU, whose sums depend on the order in which its threads finish, with
weights that differ by rounding.
"""

import copy
import itertools
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from crossmr.checkpoint import load_checkpoint, save_checkpoint
from crossmr.data.prepare import default_workers
from crossmr.device import autocast, out_of_memory
from crossmr.display import Task
from crossmr.errors import CrossmrError, Interrupted, ModelError
from crossmr.files import append_line, read_lines, write_atomically
from crossmr.main_memory import SHARED, available_memory, shared_memory
from crossmr.tensors import seeded
from crossmr.training.batches import StepDataset
from crossmr.training.memory import explain, micro_batches, step_memory
from crossmr.training.plan import VALIDATIONS, Budget, Clock, Plan, write_plan
from crossmr.training.recipes import TrainConfig
from crossmr.training.shared import Compute, cut
from crossmr.training.stages import Stage

SECONDS_BETWEEN_CHECKPOINTS = float(os.environ.get("CROSSMR_SECONDS_BETWEEN_CHECKPOINTS", 60))
VALIDATION_FRACTION = 0.1
"""Of a stage's time at most, where a budget decides the steps; the last step is validated if there is any time left."""
READ_AHEAD, IN_USE = 2, 3
"""Batches that lie in shared memory at once: of each process that reads, and of the training."""
LOGGED = 200
"""Lines that a stage writes into the log."""


def _summed_gradients(
    stage: Stage[Any, Any], network: nn.Module, batch: Any, parts: int, compute: Compute
) -> tuple[Tensor, Tensor]:
    """The gradients of the sum of the errors of this process's samples; that sum, and how many there are."""
    network.zero_grad(set_to_none=True)
    total, count = torch.zeros((), device=compute.device), torch.zeros((), device=compute.device)
    samples = torch.arange(len(batch[0]))
    sizes = [len(part) for part in samples.tensor_split(min(parts, len(samples)))]
    for end, size in zip(itertools.accumulate(sizes), sizes, strict=True):
        with autocast(compute.device, compute.dtype):
            error, number = stage.loss(network, compute.to_device(cut(batch, slice(end - size, end))))
        error.backward()  # type: ignore[no-untyped-call]
        total, count = total + error.detach(), count + number
    return total, count


def _divided(network: nn.Module, total: Tensor, count: Tensor, compute: Compute) -> Tensor:
    """Divide gradients of sums by the count, both over all processes; returns the mean error."""
    grads = [parameter.grad for parameter in network.parameters() if parameter.grad is not None]
    if compute.ranks.size > 1:
        flat = torch.cat([*(grad.flatten() for grad in grads), torch.stack([total, count])])
        compute.ranks.all_reduce(flat)
        *sums, ends = torch.split(flat, [*(grad.numel() for grad in grads), 2])
        for grad, summed in zip(grads, sums, strict=True):
            grad.copy_(summed.view(grad.shape))
        total, count = ends
    count = count.clamp(min=1)
    for grad in grads:
        grad /= count
    return total / count


class Trainer:
    """Trains one stage's network in a run's folder, from its newest checkpoint on."""

    def __init__(self, folder: Path, stage: Stage[Any, Any], config: TrainConfig, compute: Compute, budget: Budget):
        self.folder, self.stage, self.config, self.compute, self.budget = folder, stage, config, compute, budget
        self.checkpoints, self.log = folder / "stages" / stage.name, folder / "metrics.jsonl"
        self.ranks, self.shard = compute.ranks, compute.ranks.shard(config.batch_size)
        self.network = stage.network.requires_grad_(False)
        self.trainable = stage.trainable
        for parameter in self.trainable:
            parameter.requires_grad_(True)
        self.averaged = copy.deepcopy(self.network).requires_grad_(False)
        optimiser = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
        self.optimiser: torch.optim.Optimizer = optimiser(
            self.trainable, config.learning_rate, betas=(0.9, config.beta_2), weight_decay=config.weight_decay
        )
        self.done, self.micro_batches = 0, 0
        self.recent: list[Tensor] = []
        """(loss, norm of the gradient) of each step since the last line in the log."""
        self.measured: tuple[int, dict[str, float]] = (0, {})
        """The last validation: after how many steps, and what it measured."""
        self.validation_seconds = 0.0
        self._restore()
        self.micro_batches = self.ranks.all_reduce_max(self._parts())

    def train(self, plan: Plan) -> nn.Module:
        """Train to the plan's last step and return the averaged network.

        Raises:
            Interrupted: on Ctrl-C or SIGTERM, of whichever process, after the step in progress and a checkpoint.
            ModelError: the loss is not finite any more, or not even one sample fits into memory.
        """
        if self.ranks.first:
            _truncate_log(self.log, self.stage.name, self.done)
        clock = Clock(self.done, self.budget)
        saved = self.logged = time.monotonic()
        display = self.compute.display
        with (
            _stop_requests(self.ranks.size == 1) as stopping,
            display.task(self.stage.name, plan.total, self.done) as task,
        ):
            for raw in self._batches(plan):
                rate = self._step(raw, plan)
                plan = self._corrected(plan, clock)
                last = self.done == plan.total
                task.total = plan.total
                self._write_log(plan, rate, task, clock)
                stop = self.ranks.any(stopping.is_set())
                if last or stop or time.monotonic() - saved > SECONDS_BETWEEN_CHECKPOINTS:
                    self._save(plan)
                    saved = time.monotonic()
                if last:
                    break
                if stop:
                    self.ranks.barrier()  # for the checkpoint: where one process ends, torchrun ends the others
                    steps = f"step {self.done} of {plan.total}" if plan.total else f"step {self.done}"
                    raise Interrupted(f"Stopped at {steps} of {self.stage.name}; the same command goes on from there.")
        return self.averaged

    def _batches(self, plan: Plan) -> Iterator[Any]:
        """The batches from the first step that is not done."""
        if plan.total is not None and self.done >= plan.total:
            return iter(())
        steps: Any = itertools.count(self.done)
        gpu = self.compute.device.type == "cuda"
        workers = self._num_workers() if gpu and self.stage.num_workers else 0
        if self.stage.num_workers and not workers:
            return _ahead(self.stage.data, steps)
        options: Any = {"num_workers": workers, "pin_memory": gpu, "worker_init_fn": _leave_signals_to_the_parent}
        return _raising(DataLoader(_ErrorsAsItems(self.stage.data), None, sampler=steps, **options))

    def _num_workers(self) -> int:
        """How many processes read batches for a GPU: as far as there are cores, and shared memory, for them."""
        wanted = min(self.stage.num_workers, max(1, default_workers() // self.ranks.local_size - 1))
        batch, left = sum(int(tensor.nbytes) for tensor in self.stage.data[self.done]), shared_memory()
        fit = max(0, left // self.ranks.local_size // batch - IN_USE) // READ_AHEAD
        if fit < wanted:
            enough = 2 * self.ranks.local_size * (READ_AHEAD * wanted + IN_USE) * batch
            self.compute.display.say(
                f"{self.stage.name}: {fit} instead of {wanted} processes read batches of {batch / 1e6:.0f} MB, for "
                f"{SHARED} has {left / 1e6:.0f} MB; a container has more by --shm-size={math.ceil(enough / 2**30)}g"
            )
        return min(wanted, fit)

    def _step(self, raw: Any, plan: Plan) -> float:
        """One step of gradient descent; returns its learning rate."""
        batch = self._draw(raw)
        rate = self.config.rate(self.done, plan.progress(self.done))
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        loss = self._backward(batch)
        norm = nn.utils.clip_grad_norm_(self.trainable, self.config.gradient_clip)
        self.optimiser.step()
        _average(self.averaged, self.network, min(self.config.ema_decay, (1 + self.done) / (10 + self.done)))
        self.recent.append(torch.stack([loss, norm]))
        self.done += 1
        return rate

    def _draw(self, raw: Any) -> Any:
        """This process's shard of this step's batch, everything random drawn."""
        return self.stage.batch(raw, seeded(self.stage.name, self.compute.seed, self.done), self.shard)

    def _backward(self, batch: Any) -> Tensor:
        """The gradients of a batch's mean error, and that mean, in as many parts as memory wants.

        Sums over the parts are divided by the count of the whole batch, so that the parts do not change the gradients;
        nor does the number of processes, each of which has some of the batch's samples. Where memory runs out, batches
        go through in twice as many parts from there on.
        """
        name, size = self.stage.name, len(batch[0])
        self.network.train()
        while True:
            try:
                sums = _summed_gradients(self.stage, self.network, batch, self.micro_batches, self.compute)
                break
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                if self.micro_batches >= size:
                    raise ModelError(
                        f"{name}: out of memory with one sample at a time. Lower --set crop or the network's size."
                    ) from error
            self.micro_batches = min(2 * self.micro_batches, size)
            self.compute.display.say(f"{name}: out of memory; batches go through in {self.micro_batches} parts now")
        return _divided(self.network, *sums, self.compute)

    def _parts(self) -> int:
        """In how many parts a batch has to go through, by an estimate of the memory that it takes; as before, or more.

        Other devices than the processor say when their memory runs out, and `_backward` then cuts the batch.
        """
        before = max(1, self.micro_batches)
        if self.compute.device.type != "cpu":
            return before
        batch = self._draw(self.stage.data[self.done])
        name, size = self.stage.name, len(batch[0])
        sample = self.compute.to_device(cut(batch, slice(0, 1)))
        memory = step_memory(self.network, self.stage.loss, sample, self.compute.dtype)
        available = available_memory() // self.ranks.local_size
        parts = max(before, micro_batches(name, size, memory, available))
        self.compute.display.say(explain(name, size, memory, available, parts))
        if 0 < self.micro_batches < parts:
            self.compute.display.say(f"{name}: {before} part(s) before; the weights differ by rounding")
        return parts

    def _corrected(self, plan: Plan, clock: Clock) -> Plan:
        """The plan, made anew from the measured pace where that is due."""
        if (until := plan.until) is None or not self.ranks.broadcast_numbers(clock.due(plan, self.done))[0]:
            return plan
        _synchronise(self.compute.device)
        pace, left = self.ranks.broadcast_numbers(clock.pace(self.done), until - self.budget.spent())
        if plan.total is None and left <= 0:
            plan = replace(plan, validations=0)
        elif plan.total is None:
            self._validate(clock)  # to see how long it takes
            (left,) = self.ranks.broadcast_numbers(until - self.budget.spent())
            most = VALIDATION_FRACTION * left / max(1e-9, self.validation_seconds)
            plan = replace(plan, validations=max(1, min(VALIDATIONS, int(most))))
        coming = math.ceil(plan.validations * (1 - plan.progress(self.done))) + self.stage.later_validations
        total = self.done + max(0, int((left - coming * self.validation_seconds) / pace))
        plan = replace(plan, segments=(*plan.segments, (self.done, total)))
        if self.ranks.first:
            write_plan(self.folder, self.stage.name, plan)
        return plan

    def _validate(self, clock: Clock) -> dict[str, float]:
        """What the stage measures of the averaged network; once per step."""
        if self.measured[0] != self.done:
            self._check_weights()
            _synchronise(self.compute.device)
            begin = time.monotonic()
            picture = self.folder / "pictures" / f"{self.stage.name}-{self.done:06d}.png"
            self.measured = self.done, self.stage.validate(self.averaged, picture)
            if any(
                math.isnan(value)
                for name, value in self.measured[1].items()
                if name.startswith(("val_error_", "val_loss"))
            ):
                raise self._diverged("what it makes of the validation patients is")
            (self.validation_seconds,) = self.ranks.broadcast_numbers(time.monotonic() - begin)
            clock.pause(self.validation_seconds)
        return self.measured[1]

    def _write_log(self, plan: Plan, rate: float, task: Task, clock: Clock) -> None:
        """Count the step on the display, and write a line into the log where one is due."""
        record: dict[str, Any] = {}
        if plan.due(self.done, LOGGED):
            loss, steps = self._finite_loss(), len(self.recent)
            pace = steps / max(1e-9, time.monotonic() - self.logged)
            record = {"loss": loss, "learning_rate": rate, "steps_per_second": pace}
            self.recent = []
        if self.measured[0] == self.done or (plan.total is not None and plan.due(self.done, plan.validations)):
            record |= self._validate(clock)
        if record and self.ranks.first:
            append_line(self.log, json.dumps({"stage": self.stage.name, "step": self.done, **record}))
            self.logged = time.monotonic()
        task.advance(" ".join(f"{k} {v:.4g}" for k, v in record.items() if k == "loss" or k.startswith("val_")))

    def _finite_loss(self) -> float:
        """The mean loss since the last line in the log.

        Raises:
            ModelError: it, or the norm of a gradient, is not finite.
        """
        values = torch.stack(self.recent)  # (steps, 2)
        if self.ranks.first and not bool(values.isfinite().all()):
            raise self._diverged("the loss or its gradient is")
        return float(values[:, 0].mean())

    def _check_weights(self) -> None:
        """Refuse averaged weights that are not finite, as the last step may leave them.

        Raises:
            ModelError: they are not.
        """
        if self.ranks.first and not all(bool(weights.isfinite().all()) for weights in self.averaged.parameters()):
            raise self._diverged("the weights are")

    def _diverged(self, what: str) -> ModelError:
        name = self.stage.name
        return ModelError(
            f"{name}: {what} not finite any more at step {self.done}; what was saved before that is kept. Start in "
            f"another folder with --set {name}_train.learning_rate={self.config.learning_rate / 4:g}"
        )

    def _save(self, plan: Plan) -> None:
        """Write a checkpoint, unless the loss is not finite any more; rank 0 does."""
        if not self.ranks.first:
            return
        if self.recent:
            self._finite_loss()
        self._check_weights()
        tensors = {f"network.{k}": v for k, v in self.network.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.averaged.state_dict().items()}
        for index, slots in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{index}.{slot}": value for slot, value in slots.items()}
        data = {"finished": self.done == plan.total, "micro_batches": self.micro_batches, "spent": self.budget.spent()}
        data |= {"processes": self.ranks.size, "validation_seconds": self.validation_seconds}
        save_checkpoint(self.checkpoints, self.done, tensors, data)

    def _restore(self) -> None:
        """Go on from the newest whole checkpoint, if there is one; all processes start from rank 0's weights."""
        say, fresh = self.compute.display.say, self.network.state_dict()

        def read() -> tuple[Mapping[str, Tensor], dict[str, Any]]:
            return load_checkpoint(self.checkpoints, say) or ({f"network.{k}": v for k, v in fresh.items()}, {})

        tensors, data = self.ranks.broadcast(read)
        if not data and self.ranks.size == 1:
            return
        if not data:
            self.network.load_state_dict(without_prefix(tensors, "network."))
            self.averaged.load_state_dict(without_prefix(tensors, "network."))
            return
        self.network.load_state_dict(without_prefix(tensors, "network."))
        self.averaged.load_state_dict(without_prefix(tensors, "ema."))
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in without_prefix(tensors, "optimiser.").items():
            index, slot = key.split(".")
            slots.setdefault(int(index), {})[slot] = value
        self.optimiser.load_state_dict({"state": slots, "param_groups": self.optimiser.state_dict()["param_groups"]})
        self.done, before, now = int(data["step"]), int(data.get("processes", 1)), self.ranks.size
        if before == now:
            self.micro_batches = int(data["micro_batches"])
        else:
            say(f"{self.stage.name}: goes on with {now} process(es), {before} before; the weights differ by rounding")
        self.budget.before = max(self.budget.before, float(data["spent"]))
        self.validation_seconds = float(data.get("validation_seconds", 0))  # of earlier versions' checkpoints unknown


def _ahead(data: StepDataset[Any], steps: Iterator[int]) -> Iterator[Any]:
    """The batches of these steps, each read while the one before is in use: a disk far away makes nobody wait."""
    with ThreadPoolExecutor(1) as reader:
        following = reader.submit(data.__getitem__, next(steps))
        while True:
            batch, following = following.result(), reader.submit(data.__getitem__, next(steps))
            yield batch


def without_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with this, without it."""
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _synchronise(device: torch.device) -> None:
    """Wait for a GPU, so that a clock says how long it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def _average(averaged: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the averaged weights towards the network's by 1 - decay."""
    get_ema_multi_avg_fn(decay)(  # type: ignore[no-untyped-call]
        list(averaged.parameters()), list(network.parameters()), 0
    )


def _truncate_log(log: Path, stage: str, done: int) -> None:
    """Drop what a killed run wrote after the checkpoint from which it resumes."""
    if not log.exists():
        return
    kept = [line for line in read_lines(log) if line["stage"] != stage or line["step"] <= done]
    write_atomically(log, "".join(json.dumps(line) + "\n" for line in kept).encode())


class _ErrorsAsItems(Dataset[Any]):
    """Batches for readers in processes of their own, which give back what is wrong with a study instead of raising it.

    PyTorch would raise it with the reader's traceback in its text.
    """

    def __init__(self, data: StepDataset[Any]) -> None:
        self.data = data

    def __getitem__(self, step: int) -> Any:
        try:
            return self.data[step]
        except CrossmrError as error:
            return error


def _raising(batches: Iterable[Any]) -> Iterator[Any]:
    """Batches of `_ErrorsAsItems`, up to what is wrong."""
    for batch in batches:
        if isinstance(batch, CrossmrError):
            raise batch
        yield batch


def _leave_signals_to_the_parent(_: int) -> None:
    """Go on until the training has stopped: a scheduler, or Ctrl-C, signals the readers, too."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def _stop_requests(alone: bool) -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set, so that a step is never cut in two.

    A second Ctrl-C is not held back, but where torchrun or srun may have sent it again: they kill what does not end.
    """
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def request(number: int, frame: Any) -> None:
        if stopping.is_set() and alone:
            raise KeyboardInterrupt
        stopping.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
