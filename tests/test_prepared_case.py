"""One case: what lies on disk, when it counts as finished, what is a case at all."""

import numpy as np
import pytest
from conftest import write_study

from crossmr.data import prepared_case
from crossmr.data.naming import find_studies
from crossmr.data.prepared_case import ARRAYS, Unread, delete_case, is_case, prepare_case, read_prepared
from crossmr.files import digest, write_json


def test_what_is_prepared_is_written_in_one_copy(tmp_path):
    """Images are cut one after the other, and what is hashed is what is written."""
    (study,) = find_studies(write_study(tmp_path, "A"))
    record = prepare_case(study, tmp_path / "set")
    for name, stored in record["files"].items():
        path = tmp_path / "set" / "cases" / "A" / name
        assert digest(path.read_bytes()) == stored
        array = np.load(path, allow_pickle=False)
        np.save(tmp_path / "again.npy", array)
        assert (tmp_path / "again.npy").read_bytes() == path.read_bytes()  # as NumPy writes it


def test_a_case_is_finished_begun_or_none_of_ours(tmp_path):
    (study,) = find_studies(write_study(tmp_path / "cohort", "A"))
    folder = tmp_path / "set" / "cases" / "A"
    record = prepare_case(study, tmp_path / "set")
    assert read_prepared(folder) == record
    assert is_case(folder, ())
    write_json(folder / "case.json", {**record, "signature": ""})
    assert read_prepared(folder) is None  # begun
    assert is_case(folder, ())
    (folder / "case.json").unlink()
    assert not is_case(folder, ())  # two arrays of anybody
    assert is_case(folder, ("A",))
    assert prepare_case(study, tmp_path / "set") == record
    (folder / "notes.txt").write_text("mine")
    delete_case(folder)
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (folder / ARRAYS[0]).symlink_to(folder / "notes.txt")
    assert not is_case(folder, ("A",))


@pytest.mark.parametrize("rule", ["labels", "registration"])
def test_what_an_earlier_rule_prepared_is_prepared_again(tmp_path, monkeypatch, rule):
    """Only where there are labels, or volumes were registered."""
    cohort = tmp_path / "cohort"
    for case in ("A", "B"):
        write_study(cohort, case, lesion=case == "A")
    mode = "if needed" if rule == "registration" else "never"

    def prepared():
        for study in find_studies(cohort):
            prepare_case(study, tmp_path / "set", mode)
            prepare_case(study, tmp_path / "plain")
        files = sorted(tmp_path.glob("*/cases/*/case.json"))
        return {f"{p.parts[-4]}/{p.parts[-2]}": (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}

    before = prepared()
    assert prepared() == before
    monkeypatch.setattr(prepared_case, f"RULE_OF_{rule.upper()}", 0)
    changed = {case for case, when in prepared().items() if when != before[case]}
    assert changed == ({"set/A", "plain/A"} if rule == "labels" else {"set/A", "set/B"})


def test_files_that_cannot_be_read_are_told_from_files_that_are_wrong(tmp_path):
    (study,) = find_studies(write_study(tmp_path / "cohort", "A"))
    path = next(iter(study.images().values()))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    damaged = prepare_case(study, tmp_path / "set")
    assert isinstance(damaged, str)
    assert not isinstance(damaged, Unread)
    path.unlink()
    assert isinstance(prepare_case(study, tmp_path / "set"), Unread)
    assert not (tmp_path / "set").exists()
