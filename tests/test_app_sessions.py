"""What each page has is its own, and goes with it."""

import stat
import time

import pytest

from crossmr.app import sessions
from crossmr.app.sessions import Sessions
from crossmr.app.uploads import Limits, Refused


@pytest.fixture
def held(tmp_path):
    return Sessions(tmp_path, Limits())


def test_a_page_has_a_folder_of_its_own_that_goes_with_it(held, tmp_path):
    one, other = held.make(), held.make()
    assert one.key != other.key
    assert stat.S_IMODE((one.folder / "scans").stat().st_mode) & 0o077 == 0
    (one.folder / "scans" / "T1.nii").write_bytes(b"x")
    held.forget(one)
    assert list(tmp_path.iterdir()) == [other.folder]
    with pytest.raises(Refused, match="is not here any more") as refused:
        held.find(one.key)
    assert refused.value.status == 404
    assert held.find(other.key) is other


def test_a_page_that_is_not_heard_of_is_forgotten(held, monkeypatch):
    now = time.monotonic()
    one, other = held.make(), held.make()
    monkeypatch.setattr(time, "monotonic", lambda: now + sessions.FORGET_SECONDS - 1)
    assert held.unheard() == []
    held.find(other.key)
    monkeypatch.setattr(time, "monotonic", lambda: now + sessions.FORGET_SECONDS + 1)
    assert held.unheard() == [one]


def test_a_page_that_is_closed_is_forgotten_sooner_unless_it_comes_back(held, monkeypatch):
    now = time.monotonic()
    one, other = held.make(), held.make()
    held.leave(one.key)
    held.leave(other.key)
    held.leave("nobody")
    held.find(other.key)  # it was only loaded anew
    monkeypatch.setattr(time, "monotonic", lambda: now + sessions.LEAVE_SECONDS + 1)
    assert held.unheard() == [one]


def test_so_many_pages_and_no_more(held, monkeypatch):
    monkeypatch.setattr(sessions, "MAX_PAGES", 2)
    held.make()
    held.make()
    with pytest.raises(Refused, match="2 pages are open already"):
        held.make()


def test_of_what_jobs_made_the_last_is_kept(held):
    one = held.make()
    folders = [one.new_folder(name) for name in ("sorted", "out", "out")]
    for folder in folders:
        folder.mkdir()
    one.keep_only(folders[2])
    assert sorted(path.name for path in one.folder.iterdir()) == ["out-3", "scans", "sorted-1"]


def test_a_page_is_called_by_its_studies(held):
    one = held.make()
    assert one.name == "0 files"
    one.recognised = {"cases": [{"case": name} for name in ("Ann", "Bob", "Cem", "Dan")]}
    assert one.name == "Ann, Bob, Cem, …"
