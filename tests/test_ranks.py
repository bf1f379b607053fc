"""Several processes that train together: the same weights as one, and all end when one does."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
import safetensors.torch
import torch
from conftest import sha256, tree, write_study

from crossmr import ranks
from crossmr.cli import main
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.errors import ConfigError, SetError
from crossmr.ranks import ALONE, Ranks, joined, started
from crossmr.training import loop, plan, stages
from crossmr.training.memory import StepMemory

TORCHRUN = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
SRUN = {"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "8", "SLURM_LOCALID": "1"}
SIZES = {
    **{"crop": "16,16", "representation.multipliers": "1,2", "synthesis.multipliers": "1,2", "samples": "2"},
    **{"representation.channels": "4", "synthesis.channels": "4", "distribution.width": "16"},
    **{f"{name}_train.batch_size": "5" for name in ("representation", "synthesis", "guidance")},
    **{"distribution.blocks": "1", "distribution_train.batch_size": "15", "augmentation.probability": "0.5"},
}
PUBLISHED = ["--sources", "t1n,t2w", "--targets", "t1c,t2f"]
FAILS = -1
UNGUIDED = [*PUBLISHED, "--set", "guidance=none"]
JOINT = [*PUBLISHED, "--set", "guidance=joint", "--set", "uncertainty=false"]
ANY = ["--set", "any_subset=true", "--set", "context_slices=3", "--set", "guidance=last"]


# One process


def test_torchrun_and_srun_say_which_process_this_is():
    assert started({}) is ALONE
    assert started({**TORCHRUN, "WORLD_SIZE": "1", "RANK": "0"}) is ALONE
    assert started(TORCHRUN) == Ranks(2, 4, 1)
    assert started(SRUN) == Ranks(3, 8, 1, gpu_each=True)
    assert started({**SRUN, **TORCHRUN}) == Ranks(2, 4, 1)  # torchrun within srun
    in_a_batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert started(in_a_batch_script) is ALONE  # srun starts the steps of a job; the script is none of them


@pytest.mark.parametrize("wrong", [{"RANK": "4"}, {"RANK": "-1"}, {"WORLD_SIZE": "many"}, {"LOCAL_RANK": ""}])
def test_numbers_that_make_no_sense_are_refused(wrong):
    with pytest.raises(ConfigError, match="Start it with torchrun or srun, or unset WORLD_SIZE"):
        started({**TORCHRUN, **wrong})
    with pytest.raises(ConfigError, match="RANK="):
        started({"WORLD_SIZE": "2"})


@pytest.mark.parametrize(
    ("nodes", "address"),
    [("gpu[003-007,9],big1", "gpu003"), ("node1", "node1"), ("a7,b[1-2]", "a7"), ("gpu-[12]", "gpu-12")],
)
def test_processes_of_srun_meet_on_the_first_machine_at_a_port_of_the_job_and_step(nodes, address):
    environment = {"SLURM_STEP_NODELIST": nodes, "SLURM_JOB_ID": "123456", "SLURM_STEP_ID": "0"}
    place = ranks._meeting_place(environment)
    assert place["MASTER_ADDR"] == address
    assert 20_000 <= int(place["MASTER_PORT"]) < 30_000
    assert ranks._meeting_place({**environment, "SLURM_STEP_ID": "1"})["MASTER_PORT"] != place["MASTER_PORT"]
    assert ranks._meeting_place({**environment, "MASTER_ADDR": "x", "MASTER_PORT": "1"}) == {}
    with pytest.raises(ConfigError, match="MASTER_ADDR"):
        ranks._meeting_place({})


@pytest.mark.parametrize(("size", "count"), [(1, 5), (2, 5), (3, 24), (4, 4), (4, 2)])
def test_the_parts_are_all_there_is_and_of_equal_size_but_for_one(size, count):
    shards = [Ranks(rank, size).shard(count) for rank in range(size)]
    rows = torch.arange(count)
    assert torch.equal(torch.cat([shard.of(rows) for shard in shards]), rows)
    assert len({len(shard.of(rows)) for shard in shards}) <= 2


def test_one_process_is_told_what_it_says_and_needs_no_process_group():
    with joined() as alone:
        assert alone is ALONE
        assert alone.first
        assert alone.any(True)
        assert not alone.any(False)
        assert alone.all_gather(7) == [7]
        assert alone.broadcast_numbers(1.5, 2) == (1.5, 2)
        assert alone.broadcast_json(lambda: [1]) == [1]
        alone.all_reduce(torch.ones(2))
        alone.barrier()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize(
    ("of", "count", "name", "index"),
    [
        *((Ranks(5, 8, 1), 4, name, 1) for name in ("auto", "cuda")),
        (Ranks(5, 8, 3), 4, "auto", 3),
        (Ranks(5, 8, 3, gpu_each=True), 4, "auto", 3),
        (Ranks(5, 8, 3, gpu_each=True), 1, "auto", 0),  # SLURM shows each task its own
        (ALONE, 4, "cuda:2", 2),
        (ALONE, 4, "cuda", None),
    ],
)
def test_each_process_has_a_gpu_of_its_own(of, count, name, index):
    with mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: count):
        assert of.device(name) == torch.device("cuda", index)
        assert of.device("cpu") == torch.device("cpu")


def test_a_device_that_processes_cannot_share_is_refused():
    with mock.patch.multiple(torch.cuda, is_available=lambda: True, device_count=lambda: 2):
        with pytest.raises(ConfigError, match="each of 4 processes has its own: --device cuda"):
            Ranks(1, 4, 1).device("cuda:1")
        with pytest.raises(ConfigError, match=r"shows 2 GPU\(s\), but has at least 3 processes"):
            Ranks(2, 4, 2).device("auto")
    with (
        mock.patch.object(torch.backends.mps, "is_available", return_value=True),
        pytest.raises(ConfigError, match="not on 'mps': --device cpu"),
    ):
        Ranks(0, 2, 0).device("mps")


def test_gpus_sum_gradients_by_nccl_and_processes_agree_by_gloo(monkeypatch):
    """No GPU is needed: what PyTorch is asked for is noted, and then refused."""
    for name, value in {**TORCHRUN, "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    asked = mock.Mock(side_effect=RuntimeError("no GPU"))
    monkeypatch.setattr(torch.distributed, "init_process_group", asked)
    set_device = mock.Mock()
    gpus = {"is_available": lambda: True, "device_count": lambda: 2, "set_device": set_device}
    with mock.patch.multiple(torch.cuda, **gpus), pytest.raises(ranks.RankLost), joined("auto"):
        pass
    assert asked.call_args == mock.call("cpu:gloo,cuda:nccl", rank=2, world_size=4, timeout=ranks.TIMEOUT)
    set_device.assert_called_once_with(torch.device("cuda", 1))
    with pytest.raises(ranks.RankLost), joined("cpu"):
        pass
    assert asked.call_args.args == ("gloo",)


# Several processes


@dataclass(frozen=True)
class Accident:
    """What happens to one process before a step of a stage: a signal, or an error if it is `FAILS`."""

    signal: int = 0
    rank: int = 1
    stage: str = "synthesis"
    step: int = 2


def learn(arguments: list[str], environment: dict[str, str], said: Path, accident: Accident) -> None:
    """One process of a training, by the command line, in a few seconds less than a new one would take."""
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    os.environ.update(environment)
    torch.set_num_threads(1)
    stages.VALIDATION_SLICES = 5
    loop.step_memory = lambda *_: StepMemory(per_sample=1, fixed=0)
    loop.SECONDS_BETWEEN_CHECKPOINTS = 0.0 if accident.signal == signal.SIGKILL else 60.0
    ranks.TIMEOUT = timedelta(seconds=float(environment.get("TIMEOUT", 60)))
    if environment["RANK"] == "1":  # it began so much later
        begun = plan.Budget.spent
        plan.Budget.spent = lambda budget: begun(budget) - float(environment.get("LATER", 0))
    usual = loop.Trainer._step

    def step(self, *given):
        here = (self.ranks.rank, self.stage.name, self.done)
        if accident.signal and here == (accident.rank, accident.stage, accident.step):
            if accident.signal == FAILS:
                raise SetError("images.npy is damaged")
            os.kill(os.getpid(), accident.signal)
        return usual(self, *given)

    loop.Trainer._step = step
    sys.argv = ["crossmr", "train", *arguments]
    main()


def together(size: int, prepared: Path, out: Path, *options: str, accident=Accident(), **more) -> tuple[list, list]:
    """Exit codes of so many processes that train together, and what each said."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["crossmr.training.run", "crossmr.cli", "monai.transforms", "torch._dynamo"])
    with socket.socket() as free:
        free.bind(("localhost", 0))
        meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    sizes = [text for key, value in SIZES.items() for text in ("--set", f"{key}={value}")]
    arguments = [str(prepared), "-o", str(out), "--recipe", "tiny", "--precision", "float32", *sizes, *options]
    said = [out.with_name(f"{out.name}-{rank}.txt") for rank in range(size)]
    processes = []
    for rank in range(size):
        where = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), **meeting, **more}
        processes.append(context.Process(target=learn, args=(arguments, where, said[rank], accident)))
        processes[-1].start()
    for rank, process in enumerate(processes):
        hangs = accident.signal == signal.SIGSTOP and rank == accident.rank
        process.join(0 if hangs else 100)
    codes = [process.exitcode for process in processes]  # None: it has not ended
    for process in processes:
        process.kill()
        process.join()
    return codes, [path.read_text() for path in said]


def weights(out: Path) -> torch.Tensor:
    """All weights of the model, and what is known of its errors."""
    files = sorted((out / "model").glob("*.safetensors"))
    return torch.cat([t.flatten().float() for file in files for t in safetensors.torch.load_file(file).values()])


def records(out: Path) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "steps_per_second"} for line in lines]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Seven patients, two of whom lack a contrast."""
    folder = tmp_path_factory.mktemp("together")
    lacking = {0: ("t1n", "t1c", "t2w"), 1: ("t1n", "t1c", "t2f")}
    for number in range(7):
        modalities = lacking.get(number, ("t1n", "t1c", "t2w", "t2f"))
        write_study(
            folder / "cohort", f"P-0000{number}-000", modalities, seed=number, air=False, lesion=number % 2 == 0
        )
    prepare(folder / "cohort", folder / "set", PrepareSettings(split=Split(0.6, 0.2, 0.2, seed=34)))
    return folder / "set"


@pytest.mark.parametrize(
    ("size", "options"),
    [
        (2, JOINT),
        (4, ANY),
    ],
    ids=["joint", "any"],
)
def test_several_processes_train_what_one_does_and_only_the_first_speaks(prepared, tmp_path, size, options):
    """Batches of 5 and 15 samples are no multiple of 2 nor 4, and validation slices neither."""
    assert together(1, prepared, tmp_path / "one", "--steps", "2", *options)[0] == [0]
    codes, said = together(size, prepared, tmp_path / "more", "--steps", "2", *options)
    assert codes == [0] * size, said
    one, more = weights(tmp_path / "one"), weights(tmp_path / "more")
    assert ((one - more).norm() / one.norm()).item() < 1e-6
    for a, b in zip(records(tmp_path / "one"), records(tmp_path / "more"), strict=True):
        assert (a.pop("stage"), a) == (b.pop("stage"), pytest.approx(b, rel=1e-4, abs=1e-6))
    assert said[1:] == [""] * (size - 1)
    assert f"{size} processes train together, {size} of them on this machine" in said[0]
    assert "model: " in said[0]
    assert {path.name for path in (tmp_path / "more").rglob("*")} == {
        path.name for path in (tmp_path / "one").rglob("*")
    }


@pytest.fixture(scope="module")
def undisturbed(prepared, tmp_path_factory) -> Path:
    """What two processes make."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert together(2, prepared, out, "--steps", "4", *UNGUIDED)[0] == [0, 0]
    return out


def test_one_process_that_is_told_to_stop_stops_all_and_the_same_command_ends_with_the_same_weights(
    prepared, undisturbed, tmp_path
):
    out, command = tmp_path / "run", (prepared, tmp_path / "run", "--steps", "4", *UNGUIDED)
    codes, said = together(2, *command, accident=Accident(signal.SIGTERM))
    assert codes == [130, 130], said
    assert said[0].endswith("crossmr: Stopped at step 3 of 4 of synthesis; the same command goes on from there.\n")
    assert said[1] == ""
    codes, said = together(2, *command)
    assert codes == [0, 0], said
    assert "processes, " not in said[0].replace("2 processes train", "")
    for file in (undisturbed / "model").glob("*.safetensors"):
        assert sha256(file) == sha256(out / "model" / file.name)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_all_and_what_was_saved_is_enough(prepared, undisturbed, tmp_path, rank):
    out, command = tmp_path / "run", (prepared, tmp_path / "run", "--steps", "4", *UNGUIDED)
    codes, said = together(2, *command, accident=Accident(signal.SIGKILL, rank))
    assert codes == ([-9, 1] if rank == 0 else [1, -9]), said
    assert said[1] == ""
    if rank == 1:  # where rank 0 is lost, torchrun says so
        assert said[0].splitlines()[-1].startswith("crossmr: Another process of this training ended")
        return
    saved = tree(out)
    codes, said = together(1, *command)  # by one process alone
    assert codes == [0], said
    assert "synthesis: goes on with 1 process(es), 2 before; the weights differ by rounding" in said[0]
    assert any("step-00000002" in name for name in saved)
    one, two = weights(out), weights(undisturbed)
    assert ((one - two).norm() / two.norm()).item() < 1e-6


def test_a_process_that_hangs_ends_the_others_in_time(prepared, tmp_path):
    hangs = Accident(signal.SIGSTOP)
    codes, said = together(2, prepared, tmp_path / "run", "--steps", "4", *UNGUIDED, accident=hangs, TIMEOUT="2")
    assert codes == [1, None], said
    assert "does not answer" in said[0]


def test_minutes_are_planned_by_the_first_process(prepared, tmp_path):
    codes, said = together(2, prepared, tmp_path / "run", "--minutes", "0.03", *UNGUIDED)
    assert codes == [0, 0], said
    (plan,) = json.loads((tmp_path / "run" / "plan.json").read_text()).values()
    assert records(tmp_path / "run")[-1]["step"] == plan["segments"][-1][1]


def test_the_first_process_decides_when_there_is_no_time_for_more_representations(prepared, tmp_path):
    codes, said = together(2, prepared, tmp_path / "run", "--minutes", "0.2", *ANY, LATER="30")
    assert codes == [0, 0], said


def test_what_the_first_process_refuses_it_alone_says(prepared, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("mine")
    codes, said = together(2, prepared, tmp_path / "run", "--steps", "1", *UNGUIDED)
    assert codes == [1, 1]
    assert "run.json is not crossmr's" in said[0]
    assert len(said[0].splitlines()) == 2
    assert said[1] == ""
    codes, said = together(2, prepared, tmp_path / "few", *UNGUIDED, "--set", "synthesis_train.batch_size=1")
    assert codes == [1, 1]
    assert "2 processes cannot share the 1 samples of a batch of synthesis" in said[0]
    assert said[1] == ""


def test_a_failure_of_its_own_each_process_tells(prepared, tmp_path):
    fails = Accident(FAILS)
    codes, said = together(2, prepared, tmp_path / "run", "--steps", "4", *UNGUIDED, accident=fails)
    assert codes == [1, 1]
    assert said[1] == "crossmr: process 2 of 2: images.npy is damaged\n"
    assert said[0].splitlines()[-1].startswith("crossmr: Another process of this training ended")


def test_torchrun_starts_the_command(prepared, tmp_path):
    sizes = [text for key, value in SIZES.items() for text in ("--set", f"{key}={value}")]
    command = ["--no-python", "--", sys.executable, "-c", "from crossmr.cli import main; main()"]
    result = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *command),
            *("train", prepared, "-o", tmp_path / "run", "--recipe", "tiny", "--steps", "1", *sizes, *UNGUIDED),
        ],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("training on ") == 1
    assert (tmp_path / "run" / "model" / "config.json").exists()
