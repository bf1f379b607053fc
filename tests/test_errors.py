"""The tree of errors is what its docstring draws; a message that is stored names no folder."""

import inspect
import os
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmr import errors
from crossmr.errors import names_only

OWN = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__ and not issubclass(kind, Warning)
]


def test_the_tree_is_drawn_whole():
    drawn = set(re.findall(r"^(?:[├└]── )?(\w+)", errors.__doc__.split("\n\n")[1], flags=re.MULTILINE))
    assert drawn == {kind.__name__ for kind in OWN}


def test_every_error_is_caught_by_the_one_base():
    for kind in OWN:
        assert issubclass(kind, errors.CrossmrError)
        assert kind is errors.CrossmrError or kind.__bases__ == (errors.CrossmrError,)


FILE = Path("/data/DOE, JOHN/1961 02 03/P1/P1-t1n.nii.gz")


@pytest.mark.parametrize(
    ("message", "stored"),
    [
        ("P1: {file}: cannot be read (x). Check the path.", "P1: P1-t1n.nii.gz: cannot be read (x). Check the path."),
        ("2 files claim it: {file}, {file}.", "2 files claim it: P1-t1n.nii.gz, P1-t1n.nii.gz."),
        ("{folder}/P1-seg.nii.gz, '{folder}/a b.nii'", "P1-seg.nii.gz, 'a b.nii'"),
        ("{folder} cannot be listed; see {folder}.", "its folder cannot be listed; see its folder."),
        ("[Errno 2] No such file: '/else/where/x.npy'", "[Errno 2] No such file: 'x.npy'"),
        ("C:\\Users\\doe\\x.npy is gone", "x.npy is gone"),
        ("T1/T2 at 1×1×1 mm, 3/4 and/or more: -t1n/x", "T1/T2 at 1×1×1 mm, 3/4 and/or more: -t1n/x"),
        ("given as scans/P1/x.nii.gz or scans", "given as x.nii.gz or scans"),
    ],
)
def test_of_a_path_its_name_is_left(message, stored):
    text = message.format(file=FILE, folder=FILE.parent)
    assert names_only(text, [FILE, Path("scans/P1/x.nii.gz")]) == stored


def test_links_are_seen_through(tmp_path):
    (tmp_path / "DOE").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "DOE")
    text = f"{tmp_path / 'DOE' / 'x.nii'} and {tmp_path / 'link' / 'y z.nii'} and {tmp_path / 'DOE' / 'z z.nii'}"
    assert names_only(text, [tmp_path / "link" / "x.nii"]) == "x.nii and y z.nii and z z.nii"


@given(st.lists(st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1), min_size=2))
def test_no_known_folder_survives(parts):
    parts = [f"<{part}>" for part in parts]  # no folder is named like a part of another, or of the message
    path = Path(os.sep, *parts)
    stored = names_only(f"P1: {path} is damaged", [path])
    assert stored == f"P1: {parts[-1]} is damaged"
