"""On whom a model was trained: found by who has the patient, and by nobody else."""

import hashlib
import json

import pytest

from crossmr.errors import ModelError
from crossmr.networks import trained_on
from crossmr.networks.trained_on import (
    FILE,
    PatientList,
    add_seen,
    count_seen,
    find,
    is_learnt,
    is_seen,
    names_of,
    read_list,
    remember,
    write_list,
)


def listed(train, val=()):
    """The list of a training on patients by name, without scans."""
    return remember(*([name for patient in part for name in names_of(patient, ())] for part in (train, val)))


def test_patients_are_found_by_name_and_by_scan():
    one = remember(names_of("Ann", ["a1", "a2"]) + names_of("Müller\udcff", ()), names_of("Bob", ["b1"]))
    studies = {
        "by name": names_of("Ann", ["x"]),
        "by scan": names_of("another name", ["y", "a2"]),
        "no Unicode": names_of("Müller\udcff", ()),
        "validated": names_of("Bob", ()),
        "validated under another name": names_of("B", ["b1"]),
        "both": names_of("Bob", ["a1"]),
        "new": names_of("ann", ["z"]),
        "a name like a scan": names_of("a1", ["Ann"]),
    }
    assert find([one], studies) == {
        **dict.fromkeys(["by name", "by scan", "no Unicode", "both"], "train"),
        **dict.fromkeys(["validated", "validated under another name"], "val"),
    }


def test_the_training_part_counts_in_whichever_list():
    studies = {"A": names_of("Ann", ()), "B": names_of("Bob", ())}
    for lists in ([listed(["Ann"], ["Bob"]), listed(["Bob"])], [listed(["Bob"]), listed(["Ann"], ["Bob"])]):
        assert find([*lists, PatientList()], studies) == {"A": "train", "B": "train"}
    assert find([], studies) == find([PatientList()], studies) == {}


def test_hashes_are_salted_and_slow(quick_hashes, monkeypatch):
    """Two lists of one patient share nothing, and a hash is scrypt's: 5 ms a try, seconds for a thousand patients."""
    assert quick_hashes == 2**11
    monkeypatch.setattr(trained_on, "COST", quick_hashes)
    first, second = listed(["Doe^Jane"]), listed(["Doe^Jane"])
    assert not {first.salt, *first.train} & {second.salt, *second.train}
    assert len(first.salt) == 32
    slow = hashlib.scrypt(b"patient Doe^Jane", salt=first.salt.encode(), n=2**11, r=8, p=1, dklen=8)
    assert first.train == (slow.hex(),)
    assert find([first], {"A": names_of("Doe^Jane", ())}) == {"A": "train"}


def test_what_was_written_is_read_and_no_file_is_no_list(tmp_path):
    lists = [listed(["Ann"], ["Bob"]), PatientList()]
    write_list(tmp_path, lists)
    assert read_list(tmp_path) == tuple(lists)
    assert b"Ann" not in (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).unlink()
    assert read_list(tmp_path) == ()


@pytest.mark.parametrize("change", [{"format": "other"}, {"format_version": 9}, {"trainings": 3}, {"trainings": [3]}])
def test_another_file_or_a_changed_one_is_refused(tmp_path, change):
    write_list(tmp_path, [listed(["Ann"])])
    body = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps(body | change))
    with pytest.raises(ModelError, match=r"patients\.json was changed or damaged.*Copy it again, or delete it"):
        read_list(tmp_path)
    body = {key: value for key, value in (body | change).items() if key != "sha256"}
    (tmp_path / FILE).write_text(json.dumps({**body, "sha256": trained_on.digest(body)}))
    with pytest.raises(ModelError, match=r"patients\.json (is not a list of patients|.*of another version)"):
        read_list(tmp_path)


# What it was trained on, as counts

HEAD, BRAIN = ("A", ("t1n", "t2f"), False), ("B", ("t1n", "t2w"), True)
PHANTOM = ("PHANTOM-00000-000", ("t1n", "t2w"), False)


def test_studies_are_counted_by_contrast_and_skull_and_phantoms_are_no_patients():
    seen = count_seen([HEAD, BRAIN, PHANTOM])
    assert seen == {
        "studies": 3,
        "without_skull": 1,
        "contrasts": {
            "with_skull": {"t1n": 1, "t2f": 1, "t2w": 0},
            "without_skull": {"t1n": 1, "t2f": 0, "t2w": 1},
        },
    }
    assert is_seen(seen)
    assert not is_learnt(seen, "t2w", without_skull=False)
    assert is_learnt(seen, "t2w", without_skull=True)
    assert not is_learnt(seen, "pdw", without_skull=True)
    assert is_learnt(count_seen([PHANTOM]), "t2w", without_skull=False)  # a model of phantoms is for phantoms


def test_a_model_that_does_not_say_what_it_learnt_has_learnt_everything():
    earlier = {"studies": 9, "without_skull": 2}
    assert is_learnt(earlier, "t2w", without_skull=False)
    assert is_learnt({}, "t2w", without_skull=True)
    assert add_seen(count_seen([HEAD]), earlier) == {"studies": 10, "without_skull": 2}


def test_counts_of_the_initial_model_are_added():
    summed = add_seen(count_seen([HEAD]), count_seen([BRAIN]))
    assert summed == count_seen([HEAD, BRAIN])


@pytest.mark.parametrize(
    "record",
    [
        None,
        [],
        {"studies": "9"},
        {"contrasts": 3},
        {"contrasts": {"with_skull": {}}},
        {"contrasts": {"with_skull": {"t1n": "x"}, "without_skull": {}}},
    ],
)
def test_counts_that_are_none_are_recognised(record):
    assert not is_seen(record)
    assert is_seen({})
