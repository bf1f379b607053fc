"""The command line: help, verbs end to end, and one clear line for every kind of bad input."""

import contextlib
import gzip
import importlib
import io
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from crossmr import cli
from crossmr.cli import main
from crossmr.completion.cohort import CohortSummary
from crossmr.data.prepare import PrepareSettings, prepare
from crossmr.data.split import Split
from crossmr.errors import CrossmrWarning
from crossmr.networks.c_unet import SynthesisConfig
from crossmr.networks.distribution import DistributionConfig
from crossmr.networks.masked_autoencoder import RepresentationConfig
from crossmr.networks.model import CrossConditionedModel, ModelConfig, save_model
from crossmr.phantom import write_cohort

GRID = {"shape": (40, 48, 32), "spacing_mm": (4.8, 4.8, 5.6)}


@dataclass(frozen=True)
class Result:
    """What one call of the command line left behind."""

    returncode: int
    stdout: str
    stderr: str


def crossmr(*arguments: object) -> Result:
    """Run the command line in this process, which spares the imports."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["crossmr", *map(str, arguments)]
    try:
        with (
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            pytest.raises(SystemExit) as stopped,
        ):
            main()
    finally:
        sys.argv = before
    return Result(int(stopped.value.code or 0), out.getvalue(), err.getvalue())


def refused(result: Result, *wanted: str, code: int = 1) -> None:
    """Exit code, one line that says everything wanted, and no traceback."""
    assert result.returncode == code, result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1, lines
    for text in wanted:
        assert text in lines[0], lines[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A small model of T1 + T2 → T1ce + FLAIR that learnt nothing."""
    folder = tmp_path_factory.mktemp("model")
    config = ModelConfig(
        sources=("t1n", "t2w"),
        targets=("t1c", "t2f"),
        window=(32, 32),
        representation=RepresentationConfig(channels=4, multipliers=(1, 2)),
        distribution=DistributionConfig(width=16, blocks=1, conditional=True),
        synthesis=SynthesisConfig(channels=4, multipliers=(1, 2)),
    )
    model = CrossConditionedModel(config)
    save_model(folder, model, {})
    return folder


@pytest.fixture(scope="module")
def cohort(tmp_path_factory) -> Path:
    """Two phantom patients without T1ce and FLAIR."""
    folder = tmp_path_factory.mktemp("cohort")
    write_cohort(folder, 2, seed=1, missing={0: ["t1c", "t2f"], 1: ["t1c", "t2f"]}, **GRID)
    return folder


@pytest.fixture
def study(cohort, tmp_path) -> Path:
    """A copy of the first patient's study, to spoil."""
    source = sorted(cohort.iterdir())[0]
    return Path(shutil.copytree(source, tmp_path / "cohort" / source.name))


def image(study: Path, modality: str) -> Path:
    return study / f"{study.name}-{modality}.nii.gz"


def rewrite(path: Path, change) -> None:
    """Replace an image's voxels."""
    loaded = nib.load(path)
    data = change(np.asarray(loaded.dataobj, np.float32))
    nib.save(nib.Nifti1Image(data, loaded.affine), path)


def test_help_is_quick_and_names_every_verb():
    result = crossmr("--help")
    assert result.returncode == 0
    for verb in ("prepare", "train", "complete", "evaluate", "demo"):
        assert verb in result.stdout
    code = "import sys, crossmr.cli; sys.exit('torch' in sys.modules or 'nibabel' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


WRONG_PATHS = """
complete gone -o out | complete . -o out --model gone | complete . -o out --model ./no/model
complete . -o file/out | complete . -o out --reference gone | complete . -o out --targets t1x
view gone | view file | view completed --scans gone
evaluate gone . -o out | evaluate default gone -o out | evaluate default . -o out --against gone
evaluate default . -o file
prepare gone -o out | prepare . gone -o out | prepare . -o file/out
train gone -o run | train . -o run | train set -o run --start gone | train set -o file
convert gone -o out | convert . -o file
nnunet gone completed -o out | nnunet . gone -o out | nnunet . completed -o file
models verify gone | models export gone file.zip | models import gone | models remove gone
demo -o file
"""


def test_a_wrong_path_is_refused_before_anything_heavy_is_imported(tmp_path):
    (tmp_path / "file").write_text("in the way")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text("{}")
    (tmp_path / "completed" / "case").mkdir(parents=True)
    (tmp_path / "completed" / "case" / "manifest.json").write_text("{}")
    commands = [command.strip() for line in WRONG_PATHS.splitlines() for command in line.split("|") if command.strip()]
    code = (
        "import sys; from crossmr.cli import main\n"
        "for line in sys.stdin:\n"
        "    sys.argv = ['crossmr', *line.split()]\n"
        "    try: main()\n"
        "    except SystemExit as stop: heavy = {'torch', 'monai', 'scipy', 'nibabel'} & set(sys.modules)\n"
        "    print(*sorted(heavy), flush=True)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input="\n".join(commands), capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.splitlines() == [""] * len(commands), done.stderr
    messages = done.stderr.splitlines()
    assert len(messages) == len(commands), done.stderr
    for command, message in zip(commands, messages, strict=True):
        assert re.search("gone|no/model|file|t1x|^crossmr: [.] ", message), (command, message)


STOPPED = {
    "complete": ("crossmr.completion.cohort.complete_cohort", "complete COHORT -o out", "goes on where it stopped"),
    "prepare": ("crossmr.data.prepare.prepare", "prepare COHORT -o out", "goes on where it stopped"),
    "train": ("crossmr.training.run.train", "train SET -o out", "goes on where it stopped"),
    "convert": ("crossmr.dicom.convert.convert", "convert COHORT -o out", "goes on where it stopped"),
    "evaluate": ("crossmr.evaluation.evaluate.evaluate", "evaluate default COHORT -o out", "starts again"),
    "demo": ("crossmr.demo.demo", "demo -o out", "starts again"),
}


@pytest.mark.parametrize("verb", STOPPED)
def test_ctrl_c_says_whether_the_same_command_goes_on(verb, cohort, tmp_path, monkeypatch):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    function, command, goes_on = STOPPED[verb]
    monkeypatch.setattr(function, stop)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "SET").mkdir()
    (tmp_path / "SET" / "manifest.json").write_text("{}")
    result = crossmr(*command.replace("COHORT", str(cohort)).split())
    refused(result, f"crossmr: {verb} was stopped; the same command {goes_on}.", code=130)


def test_prepare_stopped_by_ctrl_c_in_a_terminal_says_so_once(tmp_path):
    """The signal reaches the processes that prepare studies too; none of them complains."""
    write_cohort(tmp_path / "phantoms", 1, seed=2, **GRID)
    for case in (f"P{number}" for number in range(60)):  # so many that they are not all ready when the signal comes
        (tmp_path / "cohort" / case).mkdir(parents=True)
        for modality in ("t1n", "t1c", "t2w", "t2f"):
            (scan,) = (tmp_path / "phantoms").rglob(f"*-{modality}.nii.gz")
            (tmp_path / "cohort" / case / f"{case}-{modality}.nii.gz").symlink_to(scan)
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job ignores it
    command = [sys.executable, "-c", f"{code}; from crossmr.cli import main; main()", "prepare", "cohort", "-o", "set"]
    command += ["--workers", "2"]
    running = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True, start_new_session=True)
    while not list(tmp_path.glob("set/cases/*/case.json")) and running.poll() is None:
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGINT)
    assert running.communicate()[1] == "crossmr: prepare was stopped; the same command goes on where it stopped.\n"
    assert running.returncode == 130
    assert 0 < len(list(tmp_path.glob("set/cases/*/case.json"))) < 60
    assert not (tmp_path / "set" / "manifest.json").exists()


def test_commands_are_listed_in_the_order_of_use():
    listed = re.findall(r"^│ ([a-z]+) ", crossmr("--help").stdout.partition("Commands")[2], flags=re.MULTILINE)
    expected = "complete status report view app evaluate prepare train models convert nnunet demo"
    assert listed == expected.split()


@pytest.mark.parametrize("verb", ["complete", "evaluate", "train"])
def test_expert_options_have_a_panel_of_their_own(verb):
    basic, _, rest = crossmr(verb, "--help").stdout.partition("─ Expert ─")
    expert, _, messages = rest.partition("─ Messages ─")
    expert, _, machines = expert.partition("─ Many machines ─")
    assert "--debug" in messages
    assert ("--part" in machines) == (verb != "train")
    expected = {
        "complete": {"guidance", "reference", "ddim-steps", "planes", "samples", "seed", "precision"},
        "evaluate": {"guidance", "ddim-steps", "planes", "samples", "seed", "precision"},
        "train": {"stage", "steps", "set", "seed", "precision"},
    }
    assert set(re.findall(r"^│ +--([a-z-]+)", expert, flags=re.MULTILINE)) == expected[verb]
    assert "--out" in basic
    assert ("─ DICOM ─" in basic) == (verb == "complete")


def test_the_version_is_crossmrs_torchs_and_pythons():
    code = (
        "import sys; from crossmr.cli import main; sys.argv = ['crossmr', '--version']\n"
        "try: main()\nexcept SystemExit as stop: sys.exit(stop.code or ('torch' in sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    versions = [version("crossmr"), version("torch"), platform.python_version()]
    assert said == "crossmr {}, torch {}, Python {}\n".format(*versions)


def test_the_shell_completes_commands(monkeypatch):
    monkeypatch.setenv("_CROSSMR_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "crossmr ev")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert crossmr().stdout.split() == ["evaluate"]
    monkeypatch.delenv("_CROSSMR_COMPLETE")
    assert "--show-completion" in crossmr("--help").stdout


def test_the_first_line_of_a_training_waits_for_nothing_heavy(tmp_path):
    code = (
        "import sys; from crossmr.cli import main; from crossmr.display import Display\n"
        "Display.say = lambda self, text: (print(text, 'torch' in sys.modules), sys.exit())\n"
        "main()"
    )
    (tmp_path / "SET").mkdir()
    (tmp_path / "SET" / "manifest.json").write_text("{}")
    command = [sys.executable, "-c", code, "train", "SET", "-o", str(tmp_path / "run")]
    said = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path).stdout
    assert said.startswith("training on SET")
    assert said.strip().endswith("False")


def test_complete_fills_a_cohort_and_skips_it_next_time(cohort, model, tmp_path):
    spelt = ("--targets", "FLAIR", "--targets", "T1ce")  # in usual words, not in codes
    result = crossmr("complete", cohort, "-o", tmp_path, "--model", model, "--ddim-steps", 4, *spelt)
    assert result.returncode == 0, result.stderr
    assert "synthesised t1c, t2f" in result.stdout
    assert "no finding" in result.stdout
    for case in (path.name for path in cohort.iterdir()):
        written = nib.load(tmp_path / case / f"{case}-t2f_synthetic.nii.gz")
        reference = nib.load(cohort / case / f"{case}-t1n.nii.gz")
        assert written.shape == reference.shape
        assert written.header["sform_code"] == reference.header["sform_code"]
        np.testing.assert_array_equal(written.affine, reference.affine)
        assert written.header["descrip"].item().startswith(b"SYNTHETIC t2f by crossmr")
        assert json.loads((tmp_path / case / "manifest.json").read_text())["settings"]["ddim_steps"] == 4
    listed = ("--targets", "T1ce,FLAIR")
    again = crossmr("complete", cohort, "-o", tmp_path, "--model", model, "--ddim-steps", 4, *listed)
    assert again.returncode == 0
    assert again.stdout.splitlines()[-1].startswith("2 studies: 0 failed, 2 finished before; in ")


def test_a_run_reports_on_its_own_layout(cohort, model, tmp_path):
    earlier = {"format": "crossmr-completion", "completed": {}, "failed": {}}  # by a version that named no profile
    (tmp_path / "manifest.json").write_text(json.dumps(earlier))
    (study, *_) = sorted(cohort.iterdir())
    given = ("complete", *study.glob("*.nii.gz"), "-o", tmp_path, "--model", model)
    result = crossmr(*given, "--profile", "bids")
    assert f"report: {tmp_path / 'crossmr' / 'report.html'}" in result.stdout, result.stderr
    refused(
        crossmr(*given, "--profile", "challenge"), "holds the records of --profile bids", "Go on with --profile bids"
    )


def test_a_bad_patient_is_reported_and_the_others_finished(cohort, study, model, tmp_path):
    shutil.copytree(sorted(cohort.iterdir())[1], study.parent / sorted(cohort.iterdir())[1].name)
    rewrite(image(study, "t1n"), np.zeros_like)
    result = crossmr("complete", study.parent, "-o", tmp_path / "out", "--model", model)
    refused(result, study.name, "t1n is all zero", "Export it again")
    assert result.stdout.splitlines()[-1].startswith("2 studies: 1 failed, 1 synthesised; in ")
    assert not (tmp_path / "out" / study.name).exists()


def test_the_summary_counts_every_study_once_and_failures_first(cohort, study, model, tmp_path):
    """One fails, one has nothing to be made from, one has everything, one is synthesised, one was finished before."""
    folder = study.parent
    write_cohort(folder, 3, seed=3, **GRID)  # the first is the one that was copied, complete now
    one, two, three = sorted(path.name for path in folder.iterdir())
    for path in [*(folder / two).glob("*-t1c*"), *(folder / two).glob("*-t1n*")]:
        path.unlink()
    rewrite(folder / three / f"{three}-t1n.nii.gz", np.zeros_like)
    fourth = Path(shutil.copytree(sorted(cohort.iterdir())[0], folder / "fourth"))
    for path in fourth.iterdir():
        path.rename(path.with_name(path.name.replace(one, "fourth")))
    result = crossmr("complete", folder, "-o", tmp_path / "out", "--model", model)
    expected = "4 studies: 1 failed, 1 not synthesised, 1 synthesised, 1 nothing to synthesise; in "
    assert result.stdout.splitlines()[-1].startswith(expected), result.stdout
    assert f"{two}: t1c not synthesised: the model needs t1n, t2w, and t1n is missing" in result.stdout
    again = crossmr("complete", folder, "-o", tmp_path / "out", "--model", model, "--json")
    assert again.stderr.splitlines()[-1].startswith("4 studies: 1 failed, 3 finished before; in ")
    counts = json.loads(again.stdout)["counts"]  # nothing but JSON on the standard output
    expected = {"failed": 1, "not synthesised": 0, "synthesised": 0, "nothing to synthesise": 0, "finished before": 3}
    assert counts == expected
    assert list(json.loads(again.stdout)["failed"]) == [three]
    log = (tmp_path / "out" / "crossmr.log").read_text()
    assert result.stdout.splitlines()[-1] in log
    assert again.stderr.splitlines()[-1] in log
    quiet = crossmr("complete", folder, "-o", tmp_path / "out", "--model", model, "--quiet")
    refused(quiet, three, "t1n is all zero")
    assert quiet.stdout == ""


def test_a_dry_run_of_files_says_what_would_be_made_and_writes_nothing(cohort, model, tmp_path):
    files = sorted(sorted(cohort.iterdir())[0].glob("*.nii.gz"))
    case = files[0].parent.name
    result = crossmr("complete", *files, "-o", tmp_path / "out", "--model", model, "--dry-run")
    assert result.returncode == 0, result.stderr
    assert f"{case}: t1n is {case}-t1n.nii.gz" in result.stdout
    assert f"{case}: would synthesise t1c, t2f from t1n, t2w" in result.stdout
    last = result.stdout.splitlines()[-1]
    assert last.startswith(
        "1 study: 0 would fail, 1 to be synthesised; nothing was written; names and headers were read"
    )
    assert last.endswith("images were not checked, so a study may still be refused")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["complete", "evaluate"])
def test_an_unforeseen_error_of_one_study_leaves_its_traceback_in_the_log(verb, cohort, model, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    first, _ = write_cohort(whole, 2, seed=3, missing={} if verb == "evaluate" else {0: ["t2f"], 1: ["t2f"]}, **GRID)
    module = {"complete": "crossmr.completion.case.complete_study", "evaluate": "crossmr.evaluation.evaluate.predict"}
    place, name = module[verb].rsplit(".", 1)
    original = getattr(sys.modules.get(place) or importlib.import_module(place), name)

    def break_first(study, *rest, **options):
        if getattr(study, "case", None) == first or getattr(study, "name", None) == first:
            raise IndexError("out of range")
        return original(study, *rest, **options)

    monkeypatch.setattr(module[verb], break_first)
    arguments = [model, whole] if verb == "evaluate" else [whole, "--model", model]
    result = crossmr(verb, *arguments, "-o", tmp_path / "out")
    refused(result, first, "IndexError: out of range; the traceback is in crossmr.log")
    log = (tmp_path / "out" / "crossmr.log").read_text()
    assert "not for sharing" in log.splitlines()[0]
    assert 'raise IndexError("out of range")' in log
    assert "Traceback" in crossmr(verb, *arguments, "-o", tmp_path / "out", "--debug").stderr


@pytest.mark.parametrize(("error", "stops"), [("CUDA error: an illegal memory access", True), ("a shape", False)])
def test_an_error_of_the_device_stops_the_run_and_names_what_was_not_tried(error, stops, cohort, tmp_path, monkeypatch):
    from crossmr.completion import case
    from crossmr.completion.cohort import complete_cohort
    from crossmr.networks.model import read_model
    from crossmr.registry import find_model

    calls = []

    def fail(study, *_, **__):
        calls.append(study.case)
        raise RuntimeError(error)

    write_cohort(tmp_path / "three", 3, seed=3, missing={i: ["t2f"] for i in range(3)}, **GRID)
    monkeypatch.setattr(case, "complete_study", fail)
    summary = complete_cohort(tmp_path / "three", tmp_path / "out", read_model(find_model(None)))
    assert len(calls) == (1 if stops else 3)
    assert len(summary.failed) == 3
    assert sum("not tried, because the device failed" in reason for reason in summary.failed.values()) == 2 * stops


def test_errors_are_json_and_show_their_traceback_where_asked(tmp_path):
    result = crossmr("complete", tmp_path / "gone", "-o", tmp_path / "out", "--json", "--debug")
    assert json.loads(result.stdout)["error"].endswith("of one study or of many.")
    assert "Traceback" in result.stderr
    refused(crossmr("complete", tmp_path / "gone", "-o", tmp_path / "out"), "gone: does not exist")


def spoil_truncated(study: Path) -> None:
    path = image(study, "t1n")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def spoil_text(study: Path) -> None:
    image(study, "t1n").write_text("this is no image\n")


def spoil_gzipped_text(study: Path) -> None:
    image(study, "t1n").write_bytes(gzip.compress(b"this is no image either, only longer than a header" * 20))


def spoil_4d(study: Path) -> None:
    rewrite(image(study, "t1n"), lambda data: np.stack([data, data], axis=-1))


def spoil_nan(study: Path) -> None:
    rewrite(image(study, "t2w"), lambda data: np.where(data > np.percentile(data, 99), np.nan, data))


def spoil_infinite(study: Path) -> None:
    rewrite(image(study, "t2w"), lambda data: np.where(data == data.max(), np.inf, data))


def spoil_constant(study: Path) -> None:
    rewrite(image(study, "t2w"), lambda data: np.full_like(data, 7))


def spoil_second_t1(study: Path) -> None:
    shutil.copy(image(study, "t1n"), study / f"{study.name}_T1.nii.gz")


def spoil_grid(study: Path) -> None:
    rewrite(image(study, "t2w"), lambda data: data[:, :, ::2])


def spoil_place(study: Path) -> None:
    path = image(study, "t2w")
    loaded = nib.load(path)
    affine = loaded.affine.copy()
    affine[:3, 3] += 12
    nib.save(nib.Nifti1Image(np.asarray(loaded.dataobj), affine), path)


@pytest.mark.parametrize(
    ("spoil", "wanted"),
    [
        (spoil_truncated, ["t1n.nii.gz", "truncated", "Copy the file again"]),
        (spoil_text, ["t1n.nii.gz", "is not a NIfTI file"]),
        (spoil_gzipped_text, ["t1n.nii.gz", "is not a NIfTI file"]),
        (spoil_4d, ["t1n.nii.gz", "2 volumes, expected one", "Split it"]),
        (spoil_nan, ["t2w", "that are NaN", "replace them by 0"]),
        (spoil_infinite, ["t2w", "1 voxels that are NaN or infinite"]),
        (spoil_constant, ["t2w is constant at 7", "Export it again"]),
        (spoil_second_t1, ["2 files claim to be t1n", "_T1.nii.gz", "-t1n.nii.gz", "mapping"]),
        (spoil_grid, ["t2w is 40×48×16", "t1n is 40×48×32", "Register and resample"]),
        (spoil_place, ["t2w is", "by up to 20.8 mm", "Register and resample"]),
    ],
    ids=lambda value: value.__name__.removeprefix("spoil_") if callable(value) else "",
)
@pytest.mark.parametrize("verb", ["complete", "prepare"])
def test_bad_images(study, model, tmp_path, spoil, wanted, verb):
    spoil(study)
    options = ["--model", model] if verb == "complete" else ["--workers", 1]
    result = crossmr(verb, study.parent, "-o", tmp_path / "out", *options)
    refused(result, study.name, *wanted)
    assert not list((tmp_path / "out").rglob("*.nii.gz"))
    assert not list((tmp_path / "out").rglob("*.partial"))
    assert not list((tmp_path / "out").rglob("case.json"))


def test_empty_and_missing_folders(model, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(crossmr("complete", tmp_path / "empty", "-o", tmp_path / "o", "--model", model), "no volume (.nii.gz,")
    refused(crossmr("complete", tmp_path / "gone", "-o", tmp_path / "o", "--model", model), "does not exist")
    refused(crossmr("prepare", tmp_path / "empty", "-o", tmp_path / "o"), "no volume (.nii.gz,")
    assert not (tmp_path / "o").exists()


def test_output_that_cannot_be_written(cohort, model, tmp_path):
    (tmp_path / "file").write_text("in the way")
    for verb, options in (("complete", ["--model", model]), ("prepare", ["--workers", 1])):
        result = crossmr(verb, cohort, "-o", tmp_path / "file" / "out", *options)
        refused(result, "could not be written", "ame another folder")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="permissions do not bind root")
def test_read_only_output(cohort, model, tmp_path):
    (tmp_path / "out").mkdir(mode=0o555)
    result = crossmr("complete", cohort, "-o", tmp_path / "out", "--model", model)
    refused(result, "could not be written", "permissions")


def test_full_disk(cohort, model, tmp_path):
    """A limit on file size fails a write halfway, as a full disk does, and needs no privilege."""
    code = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); from crossmr.cli import main; main()"
    )
    for verb, options in (("complete", ["--model", str(model)]), ("prepare", ["--workers", "1"])):
        out = tmp_path / verb
        result = subprocess.run(
            [sys.executable, "-c", code, verb, str(cohort), "-o", str(out), *options],
            capture_output=True,
            text=True,
        )
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert "could not be written" in result.stderr
        assert not [p for p in out.rglob("*") if p.suffix in (".gz", ".npy", ".partial")]


def test_unknown_names(cohort, model, tmp_path):
    out = ("-o", tmp_path / "out")
    refused(crossmr("complete", cohort, *out, "--model", model, "--targets", "t1x"), "'t1x' is not a modality", "t1n")
    refused(
        crossmr("complete", cohort, *out, "--model", model, "--targets", "FLAIR,T1"),
        "cannot synthesise t1n",
        "t1c, t2f",
    )
    refused(
        crossmr("complete", cohort, *out, "--model", model, "--guidance", "oracle"),
        "--guidance is 'oracle'",
        "sample",
    )
    refused(crossmr("complete", cohort, *out, "--model", model, "--device", "tpu"), "--device is 'tpu'", "cpu")
    refused(crossmr("complete", cohort, *out, "--model", model, "--ddim-steps", 0), "0 sampling steps", "1 to 1000")
    refused(crossmr("complete", cohort, *out, "--model", model, "--map", "t1n"), "--map is 't1n'", "KEY=VALUE")
    refused(crossmr("prepare", cohort, *out, "--split", "70/40"), "--split is '70/40'", "70/10/20")
    refused(crossmr("train", cohort, *out), "is not a prepared dataset", "crossmr prepare")
    (tmp_path / "manifest.json").write_text("{}")
    refused(crossmr("train", tmp_path, *out, "--recipe", "huge"), "--recipe is 'huge'", "paper, tiny")
    refused(crossmr("train", tmp_path, *out, "--set", "synthesis.chanels=3"), "chanels", "Did you mean 'channels'?")
    assert not (tmp_path / "out").exists()
    assert crossmr("complete", cohort).returncode == 2


@pytest.mark.parametrize("name", ["config.json", "synthesis.safetensors", "distribution.safetensors"])
def test_a_model_with_one_flipped_byte(cohort, model, tmp_path, name):
    damaged = Path(shutil.copytree(model, tmp_path / "model"))
    content = bytearray((damaged / name).read_bytes())
    content[len(content) // 2] ^= 1
    (damaged / name).write_bytes(content)
    result = crossmr("complete", cohort, "-o", tmp_path / "out", "--model", damaged)
    refused(result, name)
    assert not (tmp_path / "out").exists()


def test_prepare_evaluate_and_mapping(tmp_path, model):
    write_cohort(tmp_path / "whole", 3, seed=2, **GRID)
    for path in sorted((tmp_path / "whole").rglob("*.nii.gz")):
        path.rename(path.with_name(path.name.replace("-t1n.nii.gz", "-MPRAGE.nii.gz")))
    globs = [f"--map={m}=*-{n}.nii.gz" for m, n in {"t1n": "MPRAGE", "t1c": "t1c", "t2w": "t2w", "t2f": "t2f"}.items()]
    result = crossmr(
        "prepare", tmp_path / "whole", "-o", tmp_path / "set", "--workers", 1, "--split", "34/33/33", *globs
    )
    assert result.returncode == 0, result.stderr
    assert "3 studies of 3 patients (train 1, val 1, test 1)\n" in result.stdout
    assert result.stdout.splitlines()[-1].startswith("3 studies: 0 failed, 3 prepared; in ")
    assert result.stdout.splitlines()[-1] in (tmp_path / "set" / "crossmr.log").read_text()
    result = crossmr("evaluate", model, tmp_path / "set", "-o", tmp_path / "evaluation", "--guidance", "unconditional")
    assert result.returncode == 0, result.stderr
    assert "guided: sample" in result.stdout
    assert "guided: unconditional" in result.stdout
    assert (tmp_path / "evaluation" / "metrics.csv").exists()


def test_a_damaged_set(tmp_path):
    write_cohort(tmp_path / "whole", 3, seed=2, **GRID)
    prepare(tmp_path / "whole", tmp_path / "set", PrepareSettings(split=Split(0.4, 0.3, 0.3)))
    manifest = tmp_path / "set" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"train"', '"test"', 1))
    refused(
        crossmr("train", tmp_path / "set", "-o", tmp_path / "run", "--recipe", "tiny"),
        "does not match its own SHA-256",
    )


@pytest.mark.skipif(
    not hasattr(os, "confstr") or "glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="no glibc"
)
def test_freed_memory_is_kept_for_the_next_layer():
    def faults(first: str, warm: str = "np.ones(2**23)") -> int:
        code = (
            f"import resource, numpy as np; from crossmr.main_memory import keep_memory; {first}; {warm}\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "for _ in range(5): np.ones(2**23)\n"
            "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
        )
        return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)

    assert faults("keep_memory()") < 0.1 * faults("None")
    in_thread = "from threading import Thread; t = Thread(target=lambda: np.ones(2**23)); t.start(); t.join()"
    assert faults("keep_memory()", in_thread) < 0.1 * faults("None")  # another's memory, too


def test_only_what_counts_for_the_verdict_is_a_warning_and_notes_are_one_line_a_study():
    eight = "T1 has eight bits.", "T2 has eight bits."
    summary = CohortSummary(notes={"Ann": [eight[0], "T2 is noisy.", eight[1]], "Bob": [eight[0]]})
    summary.reasons = {"Ann": ["T2 is noisy.", "FLAIR was not read."]}
    said = ["Ann: warning: T2 is noisy.", f"Ann: note: {' '.join(eight)}", f"Bob: note: {eight[0]}"]
    assert [*cli._outcomes(summary)] == said


@pytest.mark.filterwarnings("default")
def test_a_warning_of_crossmr_s_is_one_line(monkeypatch, capsys):
    def warn(*_, **__):
        warnings.warn("no locks here", CrossmrWarning, stacklevel=1)
        with pytest.warns(UserWarning, match="of a library"):
            warnings.warn("of a library", UserWarning, stacklevel=1)

    monkeypatch.setattr(cli, "app", warn)
    before = warnings.showwarning
    main()
    assert capsys.readouterr().err == "warning: no locks here\n"  # the other goes where it would go without crossmr
    assert warnings.showwarning is before
