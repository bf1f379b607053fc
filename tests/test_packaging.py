"""What carries crossmr to where people work: the image's files, 3D Slicer's module, the release."""

import os
import re
import subprocess
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest

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
    ],
)
def test_the_image_runs_what_it_is_given(tmp_path, arguments, ran):
    for name in ("crossmr", "crossmr-bids"):
        script(tmp_path / name, f'echo {name} "$@"')
    path = f"{tmp_path}:{os.environ['PATH']}"
    said = subprocess.run([PACKAGING / "entry.sh", *arguments], env={"PATH": path}, capture_output=True, text=True)
    assert (said.returncode, said.stdout) == (0, f"{ran}\n")


@pytest.mark.skipif(Path("/input").exists(), reason="this machine has a folder /input")
def test_the_image_without_arguments_and_mounts_says_what_it_wants():
    said = subprocess.run([PACKAGING / "entry.sh"], capture_output=True, text=True)
    assert said.returncode == 2
    assert "mount the studies at /input and a writable folder at /output" in said.stderr
