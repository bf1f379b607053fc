"""Files are whole or not there."""

import contextlib
import errno
import hashlib
import json
import os
import stat
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest

from crossmr import files
from crossmr.errors import CrossmrWarning, ModelError, NamingError, OutputError, SetError, StudyError
from crossmr.files import (
    LOCK,
    digest,
    listed_once,
    locked,
    read_json,
    refuse_foreign,
    walk,
    write_atomically,
    write_json,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def failing(number):
    def fail(*_args, **_kwargs):
        raise OSError(number, os.strerror(number))

    return fail


def test_content_is_written_and_replaced_in_new_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomically(path, b"old")
    write_atomically(path, b"new\x00")
    assert path.read_bytes() == b"new\x00"
    assert names(path.parent) == ["file.bin"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_the_umask_decides_who_may_read(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"")
        assert os.umask(mask) == mask  # left as it was
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_the_umask_is_never_touched(tmp_path, monkeypatch):
    """It is the whole process's: two threads that set it to read it may leave it at 0."""
    monkeypatch.setattr(os, "umask", None)
    write_atomically(tmp_path / "file", b"")


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_failure_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch, call, number):
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")
    monkeypatch.setattr(files.os, call, failing(number))
    with pytest.raises(OutputError) as caught:
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]
    assert str(path) in str(caught.value)
    assert os.strerror(number) in str(caught.value)


def test_being_stopped_leaves_the_old_content_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file.bin"
    write_atomically(path, b"old")

    def stop(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", stop)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["file.bin"]


def test_a_folder_without_permission_is_an_output_error(tmp_path, monkeypatch):
    monkeypatch.setattr(type(tmp_path), "open", failing(errno.EACCES))
    with pytest.raises(OutputError, match=r"Permission denied.*permissions"):
        write_atomically(tmp_path / "file", b"")


def test_a_file_in_the_place_of_the_folder_is_an_output_error(tmp_path):
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(OutputError):
        write_atomically(tmp_path / "taken" / "file", b"")
    assert (tmp_path / "taken").read_text() == "mine"


def test_a_folder_in_the_place_of_the_file_is_an_output_error(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError):
        write_atomically(tmp_path / "taken", b"")
    assert names(tmp_path) == ["taken"]


def test_json_survives(tmp_path):
    data = {"é": [1, 2.5, None, True], "n": {"x": "µ"}, "tiny": 5e-324, "big": 10**20}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert (tmp_path / "a.json").read_text(encoding="utf-8").endswith("}\n")
    assert "é" in (tmp_path / "a.json").read_text(encoding="utf-8")


def test_names_that_are_no_unicode_survive(tmp_path):
    data = {"patient": os.fsdecode(b"M\xfcller")}
    write_json(tmp_path / "a.json", data)
    assert read_json(tmp_path / "a.json") == data
    assert digest(data) != digest({"patient": "Müller"})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_json_holds_nan(tmp_path, value):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": value})
    assert read_json(tmp_path / "a.json") == {"x": 1}
    with pytest.raises(ValueError, match="JSON"):
        digest({"x": value})


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"a": 1',
        b"[1]",
        b"3",
        b"null",
        b"\xff\xfe\x00",
        b"\x00" * 64,
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": ' + b"[" * 100_000,
    ],
)
def test_damaged_json_is_one_clear_line(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(SetError, match="is damaged") as caught:
        read_json(tmp_path / "a.json", SetError)
    assert str(tmp_path / "a.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_missing_json_is_one_clear_line(tmp_path):
    with pytest.raises(ModelError, match=r"a\.json cannot be read: No such file"):
        read_json(tmp_path / "a.json")


def test_digest_of_bytes_is_sha256():
    assert digest(b"abc") == hashlib.sha256(b"abc").hexdigest()


def test_digest_of_json_ignores_order_and_survives_a_round_trip():
    data = {"b": [1, {"y": 0.1, "x": 2}], "a": "é"}
    shuffled = {"a": "é", "b": [1, {"x": 2, "y": 0.1}]}
    assert digest(data) == digest(shuffled) == digest(json.loads(json.dumps(data)))
    assert digest(data) != digest({**data, "b": [{"y": 0.1, "x": 2}, 1]})


def test_digest_never_changes():
    """What is on people's disks was hashed this way; another form would make all of it 'damaged'."""
    want = hashlib.sha256('{"a": "é", "b": [1, 0.1, null]}'.encode()).hexdigest()
    assert digest({"b": [1, 0.1, None], "a": "é"}) == want


def test_a_line_is_appended_or_the_reason_is_told(tmp_path):
    files.append_line(tmp_path / "log", "one")
    files.append_line(tmp_path / "log", "two")
    assert (tmp_path / "log").read_text() == "one\ntwo\n"
    with pytest.raises(OutputError, match="could not be written: No such file or directory"):
        files.append_line(tmp_path / "gone" / "log", "three")


def test_one_writer_per_folder(tmp_path):
    """A second process is refused; a killed one leaves nothing behind that could refuse anybody."""
    code = (
        "import sys, time; from pathlib import Path; from crossmr.files import locked\n"
        "out = Path(sys.argv[1])\n"
        "with locked(out): (out / 'at work').touch(); time.sleep(60)"
    )
    out = tmp_path / "new" / "out"
    other = subprocess.Popen([sys.executable, "-c", code, out])
    while not (out / "at work").exists():
        assert other.poll() is None
        time.sleep(0.05)
    with pytest.raises(OutputError, match=r"being written to by another crossmr\. Wait for it"), locked(out):
        pass
    other.kill()
    other.wait()
    with locked(out):
        assert (out / files.LOCK).exists()
    assert [path.name for path in out.iterdir()] == ["at work"]


HOLD = (
    "import sys, time; from pathlib import Path; from crossmr.files import locked\n"
    "with locked(Path(sys.argv[1])): Path(sys.argv[1], 'at work').touch(); time.sleep(60)"
)


@contextlib.contextmanager
def running(out):
    """Another process that writes to a folder."""
    with subprocess.Popen([sys.executable, "-c", HOLD, out]) as other:
        try:
            while not (out / "at work").exists():
                assert other.poll() is None
                time.sleep(0.02)
            yield other
        finally:
            other.kill()


def test_one_writer_above_and_below(tmp_path):
    """A running crossmr's folder, the folders above it, what lies in it, and links to these are refused."""
    out, link = tmp_path / "a" / "b" / "out", tmp_path / "link"
    out.mkdir(parents=True)
    link.symlink_to(out)
    with running(out) as other:
        for place in (out, link, out / "case", link / "case" / "deep", out.parent):
            with (
                pytest.raises(OutputError, match=r"(out|link) is being written to by another crossmr\. Wait"),
                locked(place),
            ):
                pass
        link.unlink()
        with locked(tmp_path), locked(tmp_path / "c"):  # deeper ones are refused when they are come to
            write_atomically(tmp_path / "c" / "file", b"")
            for place in (out, out / "case"):
                with pytest.raises(OutputError, match=r"out is being written to by another crossmr\. Wait"):
                    write_atomically(place / "file", b"")
        other.kill()
        other.wait()
        with locked(out.parent), locked(out), locked(out / "case"):
            write_atomically(out / "case" / "file", b"")
    assert not list(tmp_path.rglob(".*"))


def test_two_threads_are_two_writers(tmp_path):
    with locked(tmp_path), locked(tmp_path / "within"), ThreadPoolExecutor(1) as pool:

        def lock_within():
            with locked(tmp_path / "other"):
                pass

        with pytest.raises(OutputError, match="being written to by another crossmr"):
            pool.submit(lock_within).result()


@pytest.mark.parametrize("name", ["ENOLCK", "EOPNOTSUPP", "ENOTSUP", "EINVAL", "ENOSYS"])
def test_a_file_system_without_locks_is_written_to_and_said_once(tmp_path, monkeypatch, name):
    monkeypatch.setattr(files, "_lock", failing(getattr(errno, name)))

    def write():
        with locked(tmp_path / "out"), locked(tmp_path / "records"):
            write_atomically(tmp_path / "out" / "file", b"")
            write_atomically(tmp_path / "records" / "file", b"")

    with pytest.warns(CrossmrWarning, match=r"out is on a file system without locks: let no other crossmr") as said:
        write()
    assert len(said) == 1
    assert names(tmp_path / "out") == names(tmp_path / "records") == ["file"]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_lock_that_fails_otherwise_is_an_output_error(tmp_path, monkeypatch, number):
    monkeypatch.setattr(files, "_lock", failing(number))
    with pytest.raises(OutputError, match=f"out could not be written: {os.strerror(number)}"), locked(tmp_path / "out"):
        pass


@pytest.fixture
def nobody_s(monkeypatch):
    """Locks that are another user's: opened to read at most."""
    usual = os.open

    def open_as_another(path, flags, *rest):
        if os.path.lexists(path) and str(path).endswith(files.LOCK) and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return usual(path, flags, *rest)

    monkeypatch.setattr(files.os, "open", open_as_another)


def test_another_user_s_lock_locks_as_one_s_own(tmp_path, nobody_s):
    """A killed run of a colleague's has left it, or it is at work."""
    (tmp_path / files.LOCK).touch()
    with locked(tmp_path):
        write_atomically(tmp_path / "file", b"")
    assert names(tmp_path) == ["file"]
    with (
        running(tmp_path),
        pytest.raises(OutputError, match="being written to by another crossmr"),
        locked(tmp_path),
    ):
        pass


@pytest.mark.parametrize("call", ["open", "_lock"])  # of a file, and on NFS of one that is only read
def test_another_user_s_lock_that_cannot_be_opened_is_named(tmp_path, monkeypatch, nobody_s, call):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / files.LOCK).touch()
    monkeypatch.setattr(*((files, "_lock", failing(errno.EBADF)) if call == "_lock" else (os, "open", failing(13))))
    with (
        pytest.raises(OutputError, match=r"\.crossmr\.lock cannot be opened: it is another user's\. Delete it if no"),
        locked(tmp_path / "out"),
    ):
        pass
    assert names(tmp_path / "out") == [files.LOCK]


def test_another_user_s_folder_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "open", failing(errno.EACCES))
    with pytest.raises(OutputError, match=r"other could not be written: Permission denied"), locked(tmp_path / "other"):
        pass


def test_a_lock_that_its_holder_deletes_is_locked_anew(tmp_path, monkeypatch):
    """Who opened it before it was deleted holds a file that nobody else will meet."""
    usual, path = files._lock, tmp_path / files.LOCK

    def lock(descriptor, **how):
        if not (tmp_path / "deleted").exists():
            (tmp_path / "deleted").touch()
            path.unlink()
        usual(descriptor, **how)

    monkeypatch.setattr(files, "_lock", lock)
    with locked(tmp_path):
        assert path.exists()
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(files._held_by_another, tmp_path).result()


def test_links_in_a_circle_beside_the_output_do_no_harm(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    with locked(tmp_path):
        pass


@pytest.mark.parametrize("kind", ["text", "folder", "link"])
def test_a_lock_that_is_not_ours_is_refused_and_stays(tmp_path, kind):
    (tmp_path / "mine").write_text("")
    path = tmp_path / "out" / files.LOCK
    path.parent.mkdir()
    if kind == "link":
        path.symlink_to(tmp_path / "mine")
    elif kind == "folder":
        path.mkdir()
    else:
        path.write_text("mine")
    with (
        pytest.raises(OutputError, match=r"\.crossmr\.lock is not crossmr's.*Name another folder"),
        locked(path.parent),
    ):
        pass
    assert path.is_symlink() == (kind == "link")
    assert path.is_dir() or path.read_text() == ("mine" if kind == "text" else "")
    with locked(path.parent / "below"):  # nor is it read as a lock
        pass


def left_by(process, path, host=files._HOST):
    """What a writer of this process leaves unfinished."""
    return path.with_name(f".{path.name}.{host}-{process}.x1{files.PARTIAL}")


def test_what_a_killed_writer_left_is_deleted_where_we_write_and_nothing_else(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    case, other = tmp_path / "case", tmp_path / "other"
    for folder in (case, other):
        folder.mkdir()
        left_by(dead.pid, folder / "half.nii.gz").touch()
        left_by(dead.pid, folder / "series").mkdir()
        (left_by(dead.pid, folder / "series") / "0001.dcm").touch()
    kept = [
        left_by(os.getpid(), case / "running"),
        left_by(dead.pid, case / "elsewhere", host="0" * 8),
        case / f"mine{files.PARTIAL}",
        case / f".mine.x1{files.PARTIAL}",
        case / ".film.mkv.partial",
    ]
    old = left_by(dead.pid, case / "long ago", host="0" * 8)
    for path in (*kept, old):
        path.touch()
    os.utime(old, (0, 0))
    with locked(tmp_path):
        write_atomically(case / "file", b"")
    assert sorted(case.iterdir()) == sorted([*kept, case / "file"])
    assert len(names(other)) == 2  # nobody wrote there


def test_what_is_not_recognised_is_refused(tmp_path):
    path, link = tmp_path / "a.json", tmp_path / "link"
    link.symlink_to(path)
    ours = partial(files.is_record, kind="crossmr-x")
    files.refuse_foreign(path, ours)
    with pytest.raises(OutputError, match="link is not crossmr's"):  # where it leads to nothing, too
        files.refuse_foreign(link, ours)
    write_json(path, {"format": "crossmr-x"})
    files.refuse_foreign(path, ours)
    with pytest.raises(OutputError, match="link is not crossmr's"):
        files.refuse_foreign(link, ours)
    for content in (b'{"format": "crossmr-y"}', b"[]", b"", b"\xff"):
        path.write_bytes(content)
        with pytest.raises(OutputError, match=r"a\.json is not crossmr's, so it is not replaced\. Name another folder"):
            files.refuse_foreign(path, ours)
    with pytest.raises(OutputError, match=r"a\.json is not crossmr's"):  # a file where a folder would be
        files.refuse_foreign(path / "b" / "c.json", ours)
    path.unlink()
    path.mkdir()
    with pytest.raises(OutputError, match="is not crossmr's"):
        files.refuse_foreign(path, ours)


def test_a_locked_folder_stays_only_if_something_was_written(tmp_path):
    with pytest.raises(OutputError, match="why"), locked(tmp_path / "a" / "out"):
        raise OutputError("why")
    assert not (tmp_path / "a" / "out").exists()
    with locked(tmp_path / "b"):
        (tmp_path / "b" / "file").touch()
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["file"]
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="could not be written"), locked(tmp_path / "file"):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES])
@pytest.mark.parametrize("early", [True, False])
def test_a_full_tmpdir_is_named_with_the_remedy(tmp_path, monkeypatch, number, early):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    if early:
        monkeypatch.setattr(files.tempfile, "TemporaryDirectory", failing(number))
    wanted = f"P1 is read in {tmp_path}: no temporary file could be written: {os.strerror(number)}. Free .* TMPDIR"
    with pytest.raises(StudyError, match=wanted), files.temporary_folder("P1 is read"):
        failing(number)()
    assert names(tmp_path) == []


def test_no_tmpdir_at_all_is_named_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", None)
    monkeypatch.setattr(files.tempfile, "_get_default_tempdir", failing(errno.ENOENT))
    with (
        pytest.raises(StudyError, match=r"P1 is read: no temporary .* set TMPDIR"),
        files.temporary_folder("P1 is read"),
    ):
        pass


def test_walking_follows_links_once_and_passes_over_what_is_hidden(tmp_path):
    for name in ("b/c", ".hidden", "elsewhere/d"):
        (tmp_path / "root" / name).mkdir(parents=True)
    (tmp_path / "root" / "elsewhere").rename(tmp_path / "elsewhere")
    for path in ("root/z.txt", "root/a.txt", "root/.secret", "root/b/c/one", "elsewhere/d/two"):
        (tmp_path / path).write_text("")
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "twin").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to(tmp_path / "root")
    found = {
        os.path.relpath(place, tmp_path / "root"): (folders, files) for place, folders, files in walk(tmp_path / "root")
    }
    assert found["."] == (["b", "link", "twin"], ["a.txt", "z.txt"])
    assert [place for place, (_, files) in found.items() if files] == [".", "b/c", "link/d"]
    entered = [place for place, folders, _ in walk(tmp_path / "root") if folders.clear() is None]
    assert entered == [str(tmp_path / "root")]


def test_within_listed_once_no_folder_is_listed_twice(tmp_path, monkeypatch):
    (tmp_path / "a" / "b").mkdir(parents=True)
    listed, scandir = [], os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: listed.append(str(path)) or scandir(path))
    with listed_once():
        for place, folders, _ in walk(tmp_path):
            folders[:] = []  # what one of them does not enter, another may
            assert place == str(tmp_path)
        found = [*walk(tmp_path)]
        (tmp_path / "a" / "new").write_text("")
        assert [*walk(tmp_path)] == found
    assert listed == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]
    assert [*walk(tmp_path)][1][2] == ["new"]


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(NamingError, match=r"cannot be listed \(Permission denied\)\. Check its permissions"):
        list(walk(tmp_path))


@pytest.mark.skipif(sys.platform == "win32", reason="there are no shared locks")
def test_who_shares_a_folder_waits_for_one_who_leaves_it(tmp_path):
    import fcntl

    with (tmp_path / LOCK).open("w") as leaving:  # alone for a moment, to see whether to delete the lock
        fcntl.flock(leaving, fcntl.LOCK_EX | fcntl.LOCK_NB)
        release = threading.Timer(0.2, fcntl.flock, (leaving, fcntl.LOCK_UN))
        release.start()
        with locked(tmp_path, shared=True):
            assert not release.is_alive()
    with (tmp_path / LOCK).open("w") as working:
        fcntl.flock(working, fcntl.LOCK_EX | fcntl.LOCK_NB)
        with pytest.raises(OutputError, match="is being written to by another crossmr"), locked(tmp_path):
            pass


def test_what_was_deleted_while_it_was_looked_at_is_no_foreign_file(tmp_path):
    path = tmp_path / "lock"
    path.touch()

    def gone(_):
        path.unlink()
        return False

    refuse_foreign(path, gone)
    path.touch()
    with pytest.raises(OutputError, match="lock is not crossmr's"):
        refuse_foreign(path, lambda _: False)
