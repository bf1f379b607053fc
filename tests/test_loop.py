"""The training loop on networks of one layer, where everything can be computed by hand."""

import copy
import json
import math
import signal
import threading
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from conftest import Listener
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trainings import gradients

from crossmr.checkpoint import load_checkpoint, save_checkpoint
from crossmr.display import SILENT, Display
from crossmr.errors import Interrupted, ModelError, SetError
from crossmr.training import loop
from crossmr.training import plan as planning
from crossmr.training.batches import StepDataset
from crossmr.training.loop import Trainer
from crossmr.training.memory import StepMemory
from crossmr.training.plan import Budget, Plan, read_plan
from crossmr.training.recipes import TrainConfig
from crossmr.training.shared import Compute
from crossmr.training.stages import Stage

CONFIG = TrainConfig(batch_size=5, learning_rate=0.05, weight_decay=0.0, ema_decay=0.5)
COMPUTE = Compute(torch.device("cpu"), torch.float32, 0, SILENT)


@pytest.fixture(autouse=True)
def little_memory_needed(monkeypatch):
    """No time goes into estimates, unless a test sets its own."""
    monkeypatch.setattr(loop, "step_memory", lambda *_: StepMemory(per_sample=1, fixed=0))


class Pairs(NamedTuple):
    x: Tensor
    y: Tensor
    present: Tensor


class Five(StepDataset[Pairs]):
    """Batches of five samples, of which two have no target."""

    steps_per_epoch = 10

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, step: int) -> Pairs:
        self.asked.append(step)
        x = torch.arange(5.0)[:, None] + step % 3
        return Pairs(x, 3 * x + 1, torch.tensor([1.0, 0, 1, 0, 1])[:, None])


class Line(Stage[Pairs, Pairs]):
    """Learns y from x, where there is a y, with some noise on x."""

    name = "line"
    num_workers = 0

    def __init__(self) -> None:
        network = nn.Linear(1, 1)
        nn.init.zeros_(network.weight)
        nn.init.zeros_(network.bias)
        super().__init__(network, Five())
        self.sizes: list[int] = []
        self.validated: list[float] = []

    def batch(self, raw: Pairs, generator: torch.Generator, shard=None) -> Pairs:
        return raw._replace(x=raw.x + 0.01 * torch.randn(raw.x.shape, generator=generator))

    def loss(self, network: nn.Module, batch: Pairs) -> tuple[Tensor, Tensor]:
        self.sizes.append(len(batch.x))
        return (batch.present * (network(batch.x) - batch.y) ** 2).sum(), batch.present.sum()

    def validate(self, network: Any, picture) -> dict[str, float]:
        self.validated.append(network.weight.item())
        return {"val_weight": network.weight.item()}


def trainer(folder, stage: Stage, config=CONFIG, budget: Budget | None = None, compute=COMPUTE) -> Trainer:
    folder.mkdir(exist_ok=True)
    return Trainer(folder, stage, config, compute, budget or Budget())


def train(folder, stage: Stage, steps: int, **kwargs) -> Any:
    return trainer(folder, stage, **kwargs).train(Plan(((0, steps),)))


def records(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def by_hand(steps: int, config: TrainConfig) -> tuple[list[float], list[float]]:
    """The loop in its plainest form: weights after each step, and their averages."""
    stage, weights, averages, average = Line(), [], [], 0.0
    network = stage.network
    form = {"weight_decay": config.weight_decay, "betas": (0.9, config.beta_2)}
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimiser]
    optimiser = kind(network.parameters(), config.learning_rate, **form)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = config.learning_rate * (1 - step / steps) ** 0.9
        batch = stage.batch(stage.data[step], loop.seeded("line", 0, step))
        optimiser.zero_grad()
        error, count = stage.loss(network, batch)
        (error / count).backward()
        nn.utils.clip_grad_norm_(network.parameters(), config.gradient_clip)
        optimiser.step()
        decay = min(config.ema_decay, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * network.weight.item()
        weights.append(network.weight.item())
        averages.append(average)
    return weights, averages


def test_the_loss_falls_and_is_logged(tmp_path):
    train(tmp_path, Line(), 100, config=TrainConfig(learning_rate=0.3, ema_decay=0.5))
    lines = records(tmp_path)
    assert [line["step"] for line in lines] == list(range(1, 101))
    assert lines[-1]["loss"] < 0.05 * lines[0]["loss"]
    assert {"stage", "loss", "learning_rate", "steps_per_second", "val_weight"} <= lines[-1].keys()


def test_the_learning_rate_decays_as_a_polynomial_of_power_09(tmp_path):
    train(tmp_path, Line(), 10)
    rates = [line["learning_rate"] for line in records(tmp_path)]
    assert rates == pytest.approx([0.05 * (1 - step / 10) ** 0.9 for step in range(10)])


def test_the_rate_warms_up_and_falls_along_a_cosine(tmp_path):
    train(tmp_path, Line(), 10, config=replace(CONFIG, schedule="cosine", warm_up=4))
    rates = [line["learning_rate"] for line in records(tmp_path)]
    cosine = [0.025 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates == pytest.approx([rate * min(1, (step + 1) / 4) for step, rate in enumerate(cosine)])


@pytest.mark.parametrize("optimiser", ["adam", "adamw"])
@pytest.mark.parametrize("beta_2", [0.999, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
def test_steps_are_the_optimiser_s_with_weight_decay_and_the_average_follows(tmp_path, weight_decay, beta_2, optimiser):
    config = TrainConfig(
        batch_size=5,
        learning_rate=0.05,
        weight_decay=weight_decay,
        ema_decay=0.5,
        optimiser=optimiser,
        beta_2=beta_2,
    )
    stage = Line()
    averaged = train(tmp_path, stage, 4, config=config)
    weights, averages = by_hand(4, config)
    assert stage.network.weight.item() == pytest.approx(weights[-1], rel=1e-5)
    assert float(averaged.weight) == pytest.approx(averages[-1], rel=1e-5)


def test_each_of_these_changes_the_weights():
    decayed = replace(CONFIG, weight_decay=0.5)
    configs = [CONFIG, decayed, replace(decayed, optimiser="adamw"), replace(CONFIG, beta_2=0.5)]
    assert len({by_hand(4, config)[0][-1] for config in configs}) == len(configs)


def test_gradients_are_clipped_before_the_step(tmp_path):
    stage = Line()
    part = trainer(tmp_path, stage, config=TrainConfig(batch_size=5, gradient_clip=0.1))
    part._step(stage.data[0], Plan(((0, 5),)))
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in stage.network.parameters()))
    assert norm == pytest.approx(0.1, rel=1e-3)
    assert float(part.recent[0][1]) > 1  # what it was before is what is watched


def test_validation_sees_the_averaged_weights(tmp_path):
    stage = Line()
    averaged = train(tmp_path, stage, 4)
    weights, averages = by_hand(4, CONFIG)
    assert stage.validated == pytest.approx(averages, rel=1e-5)
    assert stage.validated[-1] == float(averaged.weight)
    assert abs(averages[-1] - weights[-1]) > 1e-3


# A batch in parts is the whole batch


class Masked(NamedTuple):
    images: Tensor
    truth: Tensor
    present: Tensor


class Convolution(Stage[Masked, Masked]):
    """A small network on images whose targets are in part absent."""

    name = "convolution"

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Sequential(nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 2, 3)), Five())  # type: ignore

    def batch(self, raw: Masked, generator: torch.Generator, shard=None) -> Masked:
        return raw

    def loss(self, network: nn.Module, batch: Masked) -> tuple[Tensor, Tensor]:
        error = (network(batch.images) - batch.truth).square().mean((2, 3))
        return (batch.present * error).sum(), batch.present.sum()

    def validate(self, network: nn.Module, picture) -> dict[str, float]:
        return {}


@pytest.mark.parametrize("parts", [2, 3, 4, 8])
def test_gradients_in_parts_are_those_of_the_whole_batch(parts):
    stage = Convolution()
    generator = torch.Generator().manual_seed(1)
    images, truth = (torch.rand(8, 2, side, side, generator=generator) for side in (12, 8))
    present = torch.tensor([[1.0, 1], [1, 0], [0, 0], [0, 0], [0, 1], [1, 1], [0, 0], [0, 0]])
    batch = Masked(images, truth, present)
    whole = gradients(stage, stage.network, batch, 1, COMPUTE)
    want = torch.cat([p.grad.flatten() for p in stage.network.parameters()])
    loss = gradients(stage, stage.network, batch, parts, COMPUTE)
    got = torch.cat([p.grad.flatten() for p in stage.network.parameters()])
    assert float(loss) == pytest.approx(float(whole), rel=1e-5)
    assert float((got - want).norm() / want.norm()) < 1e-5
    error, count = stage.loss(stage.network, batch)
    assert float(whole) == pytest.approx((error / count).item(), rel=1e-6)
    plain = torch.autograd.grad(error / count, list(stage.network.parameters()))
    torch.testing.assert_close(want, torch.cat([gradient.flatten() for gradient in plain]))


def test_a_batch_without_any_target_changes_nothing():
    stage = Convolution()
    batch = Masked(torch.rand(2, 2, 12, 12), torch.rand(2, 2, 8, 8), torch.zeros(2, 2))
    assert float(gradients(stage, stage.network, batch, 2, COMPUTE)) == 0
    assert not any(p.grad.any() for p in stage.network.parameters())


def test_what_is_random_is_drawn_for_the_whole_batch(tmp_path):
    """Parts see the noise that the whole batch would."""
    whole, cut = Line(), Line()
    train(tmp_path / "whole", whole, 6)
    part = trainer(tmp_path / "cut", cut)
    part.micro_batches = 3
    part.train(Plan(((0, 6),)))
    assert cut.sizes == [2, 2, 1] * 6
    assert cut.network.weight.item() == pytest.approx(whole.network.weight.item(), rel=1e-5)


# Memory


def test_the_number_of_parts_is_estimated_and_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "step_memory", lambda *_: StepMemory(per_sample=10**9, fixed=0))
    monkeypatch.setattr(loop, "available_memory", lambda: 4 * 10**9)
    stage = Line()
    train(tmp_path, stage, 2, compute=Compute(torch.device("cpu"), torch.float32, 0, Display()))
    assert stage.sizes == [2, 2, 1] * 2
    assert "line: a batch of 5 needs about 5.0 GB, 4.0 GB are available: in 3 parts" in capsys.readouterr().out


class Greedy(Line):
    """Takes too much memory for more than two samples."""

    def loss(self, network: nn.Module, batch: Pairs) -> tuple[Tensor, Tensor]:
        result = super().loss(network, batch)
        if len(batch.x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return result


def test_out_of_memory_there_are_twice_as_many_parts_and_a_resumed_run_has_as_many(tmp_path, capsys):
    stage, said = Greedy(), Compute(torch.device("cpu"), torch.float32, 0, Display())
    train(tmp_path / "whole", whole := Line(), 6)
    part = trainer(tmp_path / "parts", stage, compute=said)
    averaged = part.train(Plan(((0, 6),)))
    assert stage.sizes == [5, 3, *[2, 1, 1, 1] * 6]
    assert "line: out of memory; batches go through in 4 parts now" in capsys.readouterr().out
    assert stage.network.weight.item() == pytest.approx(whole.network.weight.item(), rel=1e-5)
    assert load_checkpoint(tmp_path / "parts" / "stages" / "line")[1]["micro_batches"] == 4
    again = trainer(tmp_path / "parts", Line())
    assert (again.done, again.micro_batches) == (6, 4)
    assert float(again.averaged.weight) == float(averaged.weight)


def test_a_resumed_run_is_estimated_anew_and_has_at_least_as_many_parts(tmp_path, monkeypatch, capsys):
    train(tmp_path, Line(), 2)
    said = Compute(torch.device("cpu"), torch.float32, 0, Display())
    monkeypatch.setattr(loop, "available_memory", lambda: 4)  # of which a step may take two samples' worth
    less = Line()
    assert trainer(tmp_path, less, compute=said).micro_batches == 3
    assert "line: 1 part(s) before; the weights differ by rounding" in capsys.readouterr().out
    train(tmp_path, less, 4)
    assert less.sizes == [2, 2, 1] * 2
    monkeypatch.setattr(loop, "available_memory", lambda: 10**9)
    assert trainer(tmp_path, Line(), compute=said).micro_batches == 3
    assert "before; the weights" not in capsys.readouterr().out
    monkeypatch.setattr(loop, "available_memory", lambda: 0)
    with pytest.raises(ModelError, match="line: one sample needs about"):
        trainer(tmp_path, Line())


def test_not_one_sample_fits_into_memory(tmp_path):
    class Hungry(Line):
        def loss(self, network: nn.Module, batch: Pairs) -> tuple[Tensor, Tensor]:
            raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ModelError, match=r"line: out of memory with one sample at a time\. Lower --set crop"):
        train(tmp_path, Hungry(), 6)


# Stopping and going on


class Stopping(Line):
    """Is asked to stop in its first validation."""

    def validate(self, network: nn.Module, picture) -> dict[str, float]:
        signal.raise_signal(signal.SIGTERM)
        return {"val": 1.0}


def test_batches_are_asked_for_once_and_in_order_across_a_stop(tmp_path):
    first, second = Stopping(), Line()
    plan = Plan(((0, 20),), validations=2)
    with pytest.raises(Interrupted, match="Stopped at step 10 of 20 of line; the same command goes on"):
        trainer(tmp_path, first).train(plan)
    assert load_checkpoint(tmp_path / "stages" / "line")[1]["step"] == 10
    resumed = trainer(tmp_path, second).train(plan)
    assert first.data.asked == [0, *range(10)]  # the first one, to estimate its memory
    assert second.data.asked == [10, *range(10, 20)]
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert torch.equal(resumed.weight, train(tmp_path / "whole", Line(), 20).weight)  # exact, on the processor


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path):
    train(tmp_path, Line(), 5)
    tensors, data = load_checkpoint(tmp_path / "stages" / "line")
    kept = {key: data[key] for key in ("finished", "micro_batches", "spent")}
    save_checkpoint(tmp_path / "stages" / "line", 5, tensors, kept)
    again = trainer(tmp_path, Line())
    assert (again.done, again.validation_seconds) == (5, 0)


def test_a_finished_stage_does_nothing_more(tmp_path):
    done, again = train(tmp_path, Line(), 5), Line()
    same = train(tmp_path, again, 5)
    assert again.data.asked == [5]  # to estimate its memory
    assert torch.equal(done.weight, same.weight)


# A run that diverges keeps its last finite checkpoint


class Diverging(Line):
    """Its loss is infinite from some step on."""

    def loss(self, network: nn.Module, batch: Pairs) -> tuple[Tensor, Tensor]:
        error, count = super().loss(network, batch)
        return error * (math.inf if len(self.sizes) > 150 else 1.0), count


def test_a_diverged_run_keeps_its_last_finite_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    with pytest.raises(ModelError, match="not finite any more"):
        train(tmp_path, Diverging(), 2000)  # the log is written every tenth step, checkpoints at every one
    tensors, data = load_checkpoint(tmp_path / "stages" / "line")
    assert data["step"] == 150
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert all(math.isfinite(line["loss"]) for line in records(tmp_path))


def test_the_advice_is_one_that_is_accepted(tmp_path):
    with pytest.raises(ModelError, match=r"another folder with --set line_train\.learning_rate=0\.0125$"):
        train(tmp_path, Diverging(), 400)


def test_a_gradient_that_is_not_finite_is_noticed_where_the_loss_is(tmp_path):
    class Steep(Line):
        def loss(self, network: Any, batch: Pairs) -> tuple[Tensor, Tensor]:
            return (network.weight - network.weight).abs().sqrt().sum(), torch.ones(())  # its slope at 0 is no number

    with pytest.raises(ModelError, match="not finite any more at step 1"):
        train(tmp_path, Steep(), 5)
    assert load_checkpoint(tmp_path / "stages" / "line") is None


def test_weights_that_the_last_step_spoils_are_no_model(tmp_path, monkeypatch):
    def spoil(optimiser: torch.optim.Optimizer, *_: object) -> None:
        for group in optimiser.param_groups:
            for weights in group["params"]:
                weights.data.fill_(math.inf)

    for kind in (torch.optim.Adam, torch.optim.AdamW):
        monkeypatch.setattr(kind, "step", spoil)
    with pytest.raises(ModelError, match=r"the weights are not finite any more at step 1.*line_train\.learning_rate"):
        train(tmp_path, Line(), 1)
    assert load_checkpoint(tmp_path / "stages" / "line") is None


# Numerics


def test_the_precision_is_set_on_purpose_before_a_step(tmp_path, monkeypatch):
    from crossmr import device

    calls = []
    monkeypatch.setattr(device, "numerics", lambda *arguments: calls.append(arguments) or nullcontext())
    train(tmp_path, Line(), 1)
    assert calls[0] == (torch.device("cpu"), torch.float32)


# Time, on a clock that is set by hand


class Time:
    """A clock on which nothing but what sleeps takes time."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Time:
    made = Time()
    for module in (loop, planning):
        monkeypatch.setattr(module, "time", made)
    return made


class Slow(Line):
    """Steps, validations, and the first batch take their time."""

    later_validations = 2

    def __init__(self, clock: Time, seconds=lambda step: 2.0, validation: float = 7.0) -> None:
        super().__init__()
        self.clock, self.seconds, self.validation = clock, seconds, validation

    def batch(self, raw: Pairs, generator: torch.Generator, shard=None) -> Pairs:
        self.clock.sleep(20.0 if len(self.data.asked) == 2 else 0.0)  # processes start, memory is estimated
        return super().batch(raw, generator)

    def loss(self, network: nn.Module, batch: Pairs) -> tuple[Tensor, Tensor]:
        self.clock.sleep(self.seconds(len(self.sizes)))
        return super().loss(network, batch)

    def validate(self, network: Any, picture) -> dict[str, float]:
        self.clock.sleep(self.validation)
        return super().validate(network, picture)


PACES = {
    "even": lambda step: 2.0,
    "slower": lambda step: 1.0 if step < 100 else 3.0,
    "faster": lambda step: 3.0 if step < 40 else 1.0,
    "uneven": lambda step: 6.0 if step % 5 == 0 else 1.0,
}


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("seconds", [150.0, 600.0, 1800.0])
def test_a_stage_ends_when_its_time_is_up(tmp_path, clock, pace, seconds):
    stage = Slow(clock, PACES[pace])
    trainer(tmp_path, stage, budget=Budget(minutes=60)).train(Plan(until=seconds))
    later = stage.later_validations * stage.validation  # left for what comes after the stage
    assert clock.now + later == pytest.approx(seconds, rel=0.1)
    plan, lines = read_plan(tmp_path, "line"), records(tmp_path)
    assert plan.segments[0][0] <= 10
    assert 4 <= len(plan.segments) <= 20
    if pace == "even" and seconds > 150:  # the first plan was right, validations and all
        assert {abs(total - plan.total) for _, total in plan.segments} <= {0, 1, 2}
    assert lines[-1]["step"] == plan.total
    assert lines[-1]["learning_rate"] < 0.1 * CONFIG.learning_rate
    assert len({line["step"] for line in lines}) == len(lines)
    assert stage.validation * len(stage.validated) <= max(2 * stage.validation, 0.15 * seconds)


def test_the_learning_rate_is_that_of_the_recorded_plan(tmp_path, clock):
    trainer(tmp_path, Slow(clock, PACES["slower"]), budget=Budget(minutes=60)).train(Plan(until=500.0))
    plan = read_plan(tmp_path, "line")
    rates = [(line["step"], line["learning_rate"]) for line in records(tmp_path) if "learning_rate" in line]
    assert len(rates) > 100
    for step, rate in rates:
        assert rate == pytest.approx(CONFIG.learning_rate * (1 - plan.progress(step - 1)) ** 0.9)
    assert [rate for _, rate in rates] == sorted((rate for _, rate in rates), reverse=True)


def test_with_next_to_no_time_there_is_one_step(tmp_path, clock):
    trainer(tmp_path, Slow(clock), budget=Budget(minutes=1e-6)).train(Plan(until=0.0))
    assert [line["step"] for line in records(tmp_path)] == [1]
    assert "val_weight" not in records(tmp_path)[0]  # nor is there time to validate
    assert load_checkpoint(tmp_path / "stages" / "line")[1]["finished"]


@pytest.mark.parametrize("stop", [4, 60, 110])
def test_a_resumed_run_follows_the_recorded_plan_and_spends_what_is_left(tmp_path, clock, stop):
    class Interrupted_(Slow):
        def batch(self, raw: Pairs, generator: torch.Generator, shard=None) -> Pairs:
            if len(self.data.asked) == stop + 1:
                signal.raise_signal(signal.SIGTERM)
            return super().batch(raw, generator)

    budget = Budget(minutes=60)
    with pytest.raises(Interrupted):
        trainer(tmp_path, Interrupted_(clock), budget=budget).train(Plan(until=500.0))
    before, spent = read_plan(tmp_path, "line"), budget.spent()
    clock.sleep(10_000)  # nobody trains
    again = trainer(tmp_path, Slow(clock), budget=Budget(minutes=60))
    assert (again.done, again.budget.before) == (stop, pytest.approx(spent))
    assert again.validation_seconds == (0 if before is None else 7)
    again.train(before or Plan(until=500.0))
    assert again.budget.spent() + 14 == pytest.approx(500, rel=0.1)
    plan = read_plan(tmp_path, "line")
    assert before is None or plan.segments[: len(before.segments)] == before.segments
    for line in records(tmp_path):
        rate = CONFIG.learning_rate * (1 - plan.progress(line["step"] - 1)) ** 0.9
        assert line.get("learning_rate", rate) == pytest.approx(rate)


def test_a_copy_of_the_network_is_what_is_kept(tmp_path):
    stage = Line()
    before = copy.deepcopy(stage.network)
    averaged = train(tmp_path, stage, 2)
    assert averaged is not stage.network
    assert not torch.equal(before.weight, averaged.weight)
    assert not averaged.weight.requires_grad


# Reading ahead


def test_the_next_batch_is_read_while_one_is_in_use_and_in_order():
    data, begun = Five(), threading.Event()
    usual = data.__getitem__

    class Slow(Five):
        def __getitem__(self, step: int) -> Pairs:
            if step == 8:
                begun.set()
            if step == 9:
                raise OSError("the disk is gone")
            return usual(step)

    batches = loop._ahead(Slow(), iter(range(7, 20)))
    assert torch.equal(next(batches).x, data[7].x)
    assert begun.wait(10)
    assert torch.equal(next(batches).x, data[8].x)
    with pytest.raises(OSError, match="the disk is gone"):
        next(batches)


def test_batches_that_are_read_ahead_train_the_same(tmp_path):
    """A thread draws what the loop would."""
    ahead, between = Line(), Line()
    ahead.num_workers = 1
    assert torch.equal(train(tmp_path / "a", ahead, 5).weight, train(tmp_path / "b", between, 5).weight)
    assert ahead.data.asked[1:6] == between.data.asked[1:6]


@pytest.mark.parametrize(("free", "readers"), [(64 * 2**20, 0), (96 * 2**20, 1), (2**33, 4)])
def test_no_more_processes_read_than_shared_memory_has_room_for(free, readers, tmp_path, monkeypatch):
    """A container has 64 MB of it, if nobody says more, and a reader without room ends a training."""
    stage, listener = Line(), Listener()
    monkeypatch.setattr(loop, "shared_memory", lambda: free)
    monkeypatch.setattr(loop, "default_workers", lambda: 5)
    monkeypatch.setattr(Line, "num_workers", 16)
    monkeypatch.setattr(Five, "__getitem__", lambda self, step: Pairs(*torch.zeros(3, 5, 2**18)))  # 16 MB
    one = trainer(tmp_path, stage)
    one.compute = replace(one.compute, device=torch.device("cuda"), display=listener)
    given = []
    monkeypatch.setattr(loop, "DataLoader", lambda *_, **options: given.append(options["num_workers"]) or [])
    monkeypatch.setattr(loop, "_ahead", lambda *_: given.append(0) or [])
    assert [*one._batches(Plan(((0, 5),)))] == []
    assert given == [readers]
    want = f"line: {readers} instead of 4 processes read batches of 16 MB, for /dev/shm has {free / 1e6:.0f} MB"
    assert listener.said == [want + "; a container has more by --shm-size=1g"] * (readers < 4)


class Broken(StepDataset[Pairs]):
    """A study whose second batch cannot be read; the first one says what a reader does with signals."""

    steps_per_epoch = 2

    def __getitem__(self, step: int) -> Any:
        if step:
            raise SetError("set/cases/P1: images.npy is damaged. Prepare the set again.")
        return torch.tensor([signal.getsignal(one) == signal.SIG_IGN for one in (signal.SIGINT, signal.SIGTERM)])


def test_readers_outlive_the_signals_of_a_training_and_say_what_is_wrong_in_its_own_words():
    options = {"num_workers": 1, "worker_init_fn": loop._leave_signals_to_the_parent}
    batches = loop._raising(DataLoader(loop._ErrorsAsItems(Broken()), None, sampler=range(2), **options))
    assert next(batches).tolist() == [True, True]
    with pytest.raises(SetError, match=r"^set/cases/P1: images\.npy is damaged\. Prepare the set again\.$"):
        next(batches)
