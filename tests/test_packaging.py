"""What carries crossmr to where people work: the image's files, 3D Slicer's module, the release."""

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from conftest import image, make_head, save_untrained, voxels

ROOT = Path(__file__).parents[1]
PACKAGING = ROOT / "packaging"
CONTAINERFILE = (PACKAGING / "Containerfile").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SLICER = PACKAGING / "slicer" / "CrossmrComplete.py"


def script(path, text):
    """A program of a few lines."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


# ---------------------------------------------------------------- image


def test_the_image_is_pinned_labelled_and_unprivileged():
    assert re.search(r"^ARG BASE=docker\.io/library/python:[\w.-]+@sha256:[0-9a-f]{64}$", CONTAINERFILE, re.MULTILINE)
    assert f"ARG VERSION={version('crossmr')}\n" in CONTAINERFILE
    assert re.search(r"^USER [1-9]\d*:[1-9]\d*$", CONTAINERFILE, re.MULTILINE)
    for name in ("title", "description", "version", "revision", "source", "licenses", "authors"):
        assert f"org.opencontainers.image.{name}=" in CONTAINERFILE
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", CONTAINERFILE, re.MULTILINE)
    assert copied
    assert [path for paths in copied for path in paths.split() if not (ROOT / path).exists()] == []


def test_the_image_s_packages_are_pinned_to_what_crossmr_takes():
    pinned = dict(line.split("==") for line in (PACKAGING / "constraints.txt").read_text().split() if "==" in line)
    installed = {"dicom", "formats", "register"}
    extras = [line for extra in installed for line in PROJECT["optional-dependencies"][extra]]
    for line in (*PROJECT["dependencies"], *extras):
        name, floor = re.match(r"([\w.-]+)>=([\d.]+)", line).groups()
        if name != "torch":  # an argument of the build
            assert numbers(pinned[name.lower()]) >= numbers(floor), line


def numbers(text):
    return [int(part) for part in re.findall(r"\d+", text)]


@pytest.mark.parametrize(
    ("arguments", "ran"),
    [
        (["--version"], "crossmr --version"),
        (["complete", "a b", "-o", "c"], "crossmr complete a b -o c"),
        (["crossmr", "models"], "crossmr models"),
        (["crossmr-bids", "in", "out", "group"], "crossmr-bids in out group"),
        (["crossmr-mercure"], "crossmr-mercure"),
        ([], "crossmr-mercure"),
    ],
)
def test_the_image_runs_what_it_is_given(tmp_path, arguments, ran):
    for name in ("crossmr", "crossmr-bids", "crossmr-mercure"):
        script(tmp_path / name, f'echo {name} "$@"')
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    if not arguments:
        environment["MERCURE_IN_DIR"] = "/in"  # the router starts its modules so
    said = subprocess.run([PACKAGING / "entry.sh", *arguments], env=environment, capture_output=True, text=True)
    assert (said.returncode, said.stdout.strip()) == (0, ran)


@pytest.mark.skipif(Path("/input").exists(), reason="this machine has a folder /input")
def test_the_image_without_arguments_and_mounts_says_what_it_wants():
    said = subprocess.run([PACKAGING / "entry.sh"], capture_output=True, text=True)
    assert said.returncode == 2
    assert "mount the studies at /input and a writable folder at /output" in said.stderr


# ---------------------------------------------------------------- 3D Slicer


@pytest.fixture(scope="module")
def crossmr(tmp_path_factory):
    """The program, in an environment that is not Slicer's, and a small model."""
    folder = tmp_path_factory.mktemp("program")
    code = f"import sys; sys.path.insert(0, {str(ROOT / 'src')!r}); from crossmr.cli import main; main()"
    model = save_untrained(folder / "model", guidance="last", uncertainty=True)
    return script(folder / "crossmr", f'exec {sys.executable} -c "{code}" "$@"'), model


def slicer(*arguments, **environment):
    """Run the module as Slicer does: in another Python, whose variables would break crossmr's."""
    return subprocess.run(
        [sys.executable, "-E", SLICER, *map(str, arguments)],
        env=os.environ | {"PYTHONHOME": "/nowhere"} | environment,
        capture_output=True,
        text=True,
    )


def test_slicer_s_description_is_read_by_ctk_and_lists_the_script_s_options(caplog):
    from ctk_cli import CLIModule

    with caplog.at_level(logging.WARNING):
        module = CLIModule(str(SLICER.with_suffix(".xml")))
        arguments, options, outputs = module.classifyParameters()
    assert caplog.messages == []
    assert module.version == version("crossmr")
    assert "not a medical device" in module.description
    assert arguments == []
    assert [output.name for output in outputs] == ["verdict", "reasons"]
    help_text = slicer("--help").stdout
    known = set(re.findall(r"^  (?:-h, )?--(\w+)", help_text, re.MULTILINE))
    assert {option.longflag.lstrip("-") for option in options} == known - {"help", "xml", "returnparameterfile"}
    assert slicer("--xml").stdout.strip() == SLICER.with_suffix(".xml").read_text().strip()
    assert SLICER.read_text().startswith("#!")  # by which Slicer knows a command-line module


def test_slicer_s_module_completes_a_study(crossmr, tmp_path):
    program, model = crossmr
    for modality in ("t1n", "t2w"):
        nib.save(image(make_head(modality)), tmp_path / f"{modality}.nii.gz")
    made = [tmp_path / "vtkMRMLScalarVolumeNodeB.nii.gz", tmp_path / "vtkMRMLScalarVolumeNodeC.nii.gz"]
    ran = slicer(
        *("--returnparameterfile", tmp_path / "1.params", "--t1n", tmp_path / "t1n.nii.gz"),
        *("--t2w", tmp_path / "t2w.nii.gz", "--t2f_synthetic", made[0], "--t2f_std", made[1]),
        *("--crossmr", program, "--model", model, "--device", "cpu"),
    )
    assert ran.returncode == 0, ran.stderr
    progress = [float(value) for value in re.findall("<filter-progress>(.*)</filter-progress>", ran.stdout)]
    assert progress == sorted(progress)
    assert progress[-1] == 1
    assert {"<filter-start>", "<filter-end>"} <= set(re.findall("<filter-(?:start|end)>", ran.stdout))
    returned = dict(line.split(" = ", 1) for line in (tmp_path / "1.params").read_text().splitlines())
    assert returned.keys() == {"verdict", "reasons"}
    assert returned["verdict"] in ("use", "look")
    for path in made:
        assert nib.load(path).shape == nib.load(tmp_path / "t1n.nii.gz").shape
        assert np.isfinite(voxels(path)).all()
    assert nib.load(made[0]).header["descrip"].item().startswith(b"SYNTHETIC")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ([], "no acquired volume is chosen"),
        (["--t1n", "a.nii.gz"], "no output is chosen"),
        (["--t1n", "a.nii.gz", "--t1n_std", "b.nii.gz"], "t1n is chosen as acquired and as output"),
        (["--t1n", "a.nrrd", "--t2f_synthetic", "b.nii.gz"], "a.nrrd is no .nii.gz file"),
        (
            ["--t1n", "here", "--t2f_synthetic", "b.nii.gz", "--crossmr", "none"],
            "none is not found. Name crossmr of its",
        ),
        (
            ["--t1n", "here", "--t2f_synthetic", "b.nii.gz", "--crossmr", "broken"],
            "CrossmrComplete: something is wrong",
        ),
        (
            ["--t1n", "here", "--t2f_synthetic", "b.nii.gz", "--crossmr", "failing"],
            "CrossmrComplete: study: too small.",
        ),
    ],
)
def test_slicer_is_told_in_one_line_what_is_wrong(tmp_path, arguments, match):
    broken = script(tmp_path / "broken", "echo something is wrong >&2; exit 1")
    summary = json.dumps({"failed": {"study": "study: too small."}})
    failing = script(tmp_path / "failing", f"echo '{summary}'; exit 1")
    (tmp_path / "a.nii.gz").touch()
    names = {"here": tmp_path / "a.nii.gz", "broken": broken, "failing": failing}
    ran = slicer(*(names.get(argument, argument) for argument in arguments))
    assert ran.returncode == 1
    assert match in ran.stderr.splitlines()[-1]


# ---------------------------------------------------------------- release


def test_the_workflow_publishes_without_a_token_by_actions_pinned_to_commits():
    workflow = (ROOT / ".github" / "workflows" / "release.yml").read_text()
    used = re.findall(r"uses: (\S+)", workflow)
    assert len(used) == 5
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", action) for action in used)
    assert "id-token: write" in workflow
    assert not re.search(r"secrets\.|password|token:(?! write)", workflow)


def test_the_licence_of_every_dependency_is_listed():
    page = (ROOT / "docs" / "licences.md").read_text()
    listed = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^\| ([\w.-]+) \|", page, re.MULTILINE)}
    lines = [*PROJECT["dependencies"], *(line for of in PROJECT["optional-dependencies"].values() for line in of)]
    wanted = {re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", line)[0]).lower() for line in lines}
    assert wanted - listed == set(), "run packaging/release.sh and copy its licences.md to docs/"
    assert "UNKNOWN" not in page
    assert "NiiVue" in page


def test_a_wheel_is_the_same_bytes_wherever_and_whenever_it_is_built(tmp_path):
    wheels = []
    for place, time in (("one", 1_000_000_000), ("another/place", 1_500_000_000)):
        folder = tmp_path / place
        without_weights = shutil.ignore_patterns("*.safetensors", "__pycache__")
        shutil.copytree(ROOT / "src", folder / "src", ignore=without_weights)
        for name in ("pyproject.toml", "README.md", "LICENSE"):
            shutil.copy(ROOT / name, folder)
        for path in folder.rglob("*"):
            os.utime(path, (time, time))
        built = subprocess.run(
            [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", "made"],
            cwd=folder,
            env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"},
            capture_output=True,
            text=True,
        )
        assert built.returncode == 0, built.stderr
        wheels += (folder / "made").glob("*.whl")
    first, second = wheels
    assert first.read_bytes() == second.read_bytes()
    with zipfile.ZipFile(first) as wheel:
        names = set(wheel.namelist())
        assert any(name.endswith("licenses/LICENSE") for name in names)
        assert any(name.endswith("licenses/src/crossmr/output/pages/niivue.LICENSE") for name in names)
        (scripts,) = (wheel.read(name).decode() for name in names if name.endswith("entry_points.txt"))
    assert "crossmr-bids = crossmr.bids_app:main" in scripts
