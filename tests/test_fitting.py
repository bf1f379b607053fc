"""The training loop on a network of one layer, where everything can be computed by hand."""

import copy
import json
import signal
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from lightning_fabric import Fabric
from torch import nn

from crossmr import fitting
from crossmr.checkpoint import load_checkpoint
from crossmr.display import SILENT, Display
from crossmr.errors import Interrupted, ModelError
from crossmr.fitting import Job, Loop, fit, steps_in
from crossmr.recipes import FitConfig

CONFIG = FitConfig(batch_size=1, learning_rate=0.05, weight_decay=0.0, ema_decay=0.5)


class Data:
    """Batches that are their own step's number."""

    steps_per_epoch = 10

    def __init__(self) -> None:
        self.asked: list[int] = []

    def __getitem__(self, step: int) -> torch.Tensor:
        self.asked.append(step)
        return torch.tensor([[float(step)]])

    def __len__(self) -> int:
        return 1000


class Network(nn.Linear):
    """One weight that learns to be 2."""

    def __init__(self) -> None:
        super().__init__(1, 1, bias=False)
        nn.init.zeros_(self.weight)

    def loss(self, batch: torch.Tensor) -> torch.Tensor:
        return ((self.weight - 2) ** 2).sum() + 0 * batch.sum()


def loop(folder) -> Loop:
    return Loop(folder, Fabric(accelerator="cpu", devices=1), 0, SILENT)


def job(data: Data, **kwargs) -> Job:
    return Job("toy", data, lambda network, batch, generator: network.loss(batch), kwargs.pop("validate", None))


def test_loss_falls_and_is_logged(tmp_path):
    averaged = fit(loop(tmp_path), Network(), job(Data()), CONFIG, 100)
    assert averaged.weight.item() == pytest.approx(2, abs=0.2)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == list(range(1, 101))
    assert records[-1]["loss"] < 0.05 * records[0]["loss"]


def test_learning_rate_decays_as_a_polynomial_of_power_09(tmp_path):
    fit(loop(tmp_path), Network(), job(Data()), CONFIG, 10)
    rates = [json.loads(line)["learning_rate"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rates == pytest.approx([0.05 * (1 - step / 10) ** 0.9 for step in range(10)])


def test_the_average_follows_the_weights(tmp_path):
    network = Network()
    averaged = fit(loop(tmp_path), network, job(Data()), CONFIG, 3)
    expected, weight = 0.0, []
    other = Network()
    optimiser = torch.optim.Adam(other.parameters(), 0.05, weight_decay=0.0)
    for step in range(3):
        optimiser.param_groups[0]["lr"] = 0.05 * (1 - step / 3) ** 0.9
        optimiser.zero_grad()
        other.loss(torch.zeros(1, 1)).backward()
        optimiser.step()
        weight.append(other.weight.item())
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight[-1]
    assert network.weight.item() == pytest.approx(weight[-1], abs=1e-6)
    assert averaged.weight.item() == pytest.approx(expected, abs=1e-6)


def test_batches_are_asked_for_once_and_in_order_across_a_stop(tmp_path, monkeypatch):
    first, second = Data(), Data()
    stopping = job(first, validate=lambda network, picture: signal.raise_signal(signal.SIGTERM) or {"val": 1.0})
    monkeypatch.setattr(fitting, "VALIDATIONS", 2)
    with pytest.raises(Interrupted, match="Stopped at step 10 of 20 of toy; the same command goes on"):
        fit(loop(tmp_path), Network(), stopping, CONFIG, 20)
    _, data = load_checkpoint(tmp_path / "stages" / "toy")
    assert data["step"] == 10
    fit(loop(tmp_path), Network(), job(second), CONFIG, 20)
    assert first.asked[:10] == list(range(10))
    assert second.asked == list(range(10, 20))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_finished_stage_does_nothing_more(tmp_path):
    done = fit(loop(tmp_path), Network(), job(Data()), CONFIG, 5)
    again = Data()
    same = fit(loop(tmp_path), Network(), job(again), CONFIG, 5)
    assert again.asked == []
    assert torch.equal(done.weight, same.weight)


class Pairs(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Five(Data):
    """Batches of five samples."""

    def __getitem__(self, step: int) -> Pairs:
        x = torch.arange(5.0)[:, None] + step
        return Pairs(x, 3 * x + 1)


class Line(nn.Linear):
    """What learns y from x."""

    def __init__(self) -> None:
        super().__init__(1, 1)

    def loss(self, batch: Pairs) -> torch.Tensor:
        return (self(batch.x) - batch.y).square().mean()


def squared(network: nn.Module, batch: Pairs, _: torch.Generator) -> torch.Tensor:
    return network.loss(batch)


def test_out_of_memory_a_batch_goes_through_in_parts(tmp_path, capsys):
    def loss(network: nn.Module, batch: Pairs, generator: torch.Generator) -> torch.Tensor:
        sizes.append(len(batch.x))
        if len(batch.x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return squared(network, batch, generator)

    sizes: list[int] = []
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    torch.manual_seed(0)
    network, config = Line(), FitConfig(learning_rate=0.05)
    whole = fit(loop(tmp_path / "whole"), copy.deepcopy(network), Job("toy", Five(), squared, None), config, 6)
    said = replace(loop(tmp_path / "parts"), display=Display())
    parts = fit(said, network, Job("toy", Five(), loss, None), config, 6)
    assert sizes == [5, 3, *[2, 1, 1, 1] * 6]
    torch.testing.assert_close(parts.weight, whole.weight, rtol=1e-5, atol=1e-6)
    logs = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    for one, other in zip(*(map(json.loads, log) for log in logs), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert "toy: out of memory; batches go through in 4 parts from here on" in capsys.readouterr().out
    assert steps_in(said, network, Job("toy", Five(), loss, None), config, 0.001) >= 1


def test_not_one_sample_fits_into_memory(tmp_path):
    def loss(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(ModelError, match=r"toy: out of memory with one sample at a time\. Lower --set crop"):
        fit(loop(tmp_path), Line(), Job("toy", Five(), loss, None), CONFIG, 6)


def test_minutes_are_turned_into_steps_on_a_copy(tmp_path):
    network = Network()
    steps = steps_in(loop(tmp_path), network, job(Data()), CONFIG, 0.1)
    assert steps > 10
    assert network.weight.item() == 0
