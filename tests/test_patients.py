"""Whose each study is: a table, names, and scans that are shared."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crossmr.data.naming import recognise
from crossmr.data.patients import assign, doubts, grouping, merge, read_patients
from crossmr.errors import ConfigError


def studies(*cases):
    return recognise([Path("cohort", case, f"{case}-t1n.nii.gz") for case in cases], root=Path("cohort"))


def table(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "patients.csv"
    path.write_text(text, encoding=encoding)
    return path


# The table


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("separator", [",", ";"])
def test_a_table_says_whose_each_study_is(tmp_path, separator, encoding):
    text = "case,patient,part\nA,Müller,train\n\nB, Müller,\nC,Roe,test\n".replace(",", separator)
    entries = read_patients(table(tmp_path, text, encoding))
    assert {case: (entry.patient, entry.part) for case, entry in entries.items()} == {
        **{"A": ("Müller", "train"), "B": ("Müller", "")},
        "C": ("Roe", "test"),
    }
    assert [entry.line for entry in entries.values()] == [2, 4, 5]
    found = assign(studies("A", "B", "C", "D_T0"), entries, tmp_path)
    assert {study.case: study.patient for study in found} == {"A": "Müller", "B": "Müller", "C": "Roe", "D_T0": "D_T0"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"line 1: its columns are none; expected case and patient, and part"),
        ("A,P\n", r"line 1: its columns are A, P"),
        ("case,patient,splits\nA,P,train\n", r"line 1: its columns are case, patient, splits"),
        ("case,patient\nA,P\nB\n", r"line 3: it has 1 columns; expected 2: case, patient"),
        ("case,patient\nA,P\n,P\n", r"line 3, column case: it is empty"),
        ("case,patient\nA,\n", r"line 2, column patient: it is empty"),
        ("case,patient,part\nA,P,trian\n", r"line 2, column part: 'trian' is not a part; expected train, val, test"),
        ("case,patient\nA,P\nA,Q\n", r"line 3, column case: 'A' is on line 2 already"),
        (
            "case,patient,part\nA,P,train\nB,P,test\n",
            r"line 3, column part: patient 'P' is in test here and in train on line 2",
        ),
    ],
)
def test_what_is_wrong_with_a_table_is_said_by_line_and_column(tmp_path, text, message):
    with pytest.raises(ConfigError, match=rf"^--patients .*patients\.csv, {message}"):
        read_patients(table(tmp_path, text))


def test_a_table_that_is_missing_or_no_text(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read_patients(tmp_path / "none.csv")
    (tmp_path / "patients.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot be read: it is no UTF-8 text"):
        read_patients(tmp_path / "patients.csv")


def test_a_study_that_is_not_there_is_refused_with_the_nearest(tmp_path):
    path = table(tmp_path, "case,patient\nP-001,A\nP-0002,B\n")
    with pytest.raises(ConfigError, match=r"line 3, column case: there is no study 'P-0002'. Did you mean 'P-002'\?"):
        assign(studies("P-001", "P-002"), read_patients(path), path)


def test_the_hint_is_none_that_the_table_lists_itself(tmp_path):
    path = table(tmp_path, "case,patient\nP00,A\nP01,B\nP02,C\n")
    with pytest.raises(ConfigError, match=r"line 2, .* there is no study 'P00'. The studies are P01, P02, …$"):
        assign(studies("P01", "P02"), read_patients(path), path)
    with pytest.raises(ConfigError, match=r"line 3, .* there is no study 'P01'. Did you mean 'P-01'\?$"):
        assign(studies("P02", "P-01", "P00"), read_patients(path), path)


def test_a_table_of_the_whole_cohort_serves_a_part_of_it(tmp_path):
    path, said = table(tmp_path, "case,patient\nP00,A\nP01,A\nP02,C\nP_3,D\n"), []
    found = assign(studies("P01", "P02", "P-3"), read_patients(path), path, said.append)
    assert {study.case: study.patient for study in found} == {"P01": "A", "P02": "C", "P-3": "P-3"}
    assert said == [
        f"warning: 2 lines name studies that are not there in --patients {path}: P00, P_3; did you mean 'P-3' by 'P_3'?"
    ]
    with pytest.raises(ConfigError, match="there is no study 'P0"):  # of another cohort
        assign(studies("Q01", "Q02"), read_patients(path), path, said.append)


# Shared scans


def test_studies_that_share_a_scan_are_of_one_patient():
    patients = {"A": "Ann", "B": "Bob", "C": "Cem", "D": "Dan", "E": "Eve", "E2": "Eve"}
    scans = {"A": ["1", "2"], "B": ["3"], "C": ["2", "4"], "D": ["4"], "E": ["5"], "E2": ["6", "3"]}
    merged, shared = merge(patients, scans)
    assert merged == {"A": "Ann", "B": "Bob", "C": "Ann", "D": "Ann", "E": "Bob", "E2": "Bob"}
    assert sorted(shared) == [["A", "C", "D"], ["B", "E2"]]
    assert merge(patients, {case: [case] for case in patients}) == (patients, [])


@given(st.dictionaries(st.sampled_from("ABCDEFGH"), st.lists(st.integers(0, 9), max_size=3), min_size=1))
def test_no_scan_is_ever_of_two_patients(scans):
    merged, shared = merge({case: case.lower() for case in scans}, {c: map(str, own) for c, own in scans.items()})
    for case, own in scans.items():
        for other, theirs in scans.items():
            if set(own) & set(theirs):
                assert merged[case] == merged[other]
                assert case == other or any({case, other} <= set(group) for group in shared)
    assert set(merged.values()) <= {case.lower() for case in scans}


# What is open


def test_weak_groupings_and_look_alikes_are_doubtful():
    found = doubts(studies("P01_T0", "P01_T1", "P02_T0", "PAT003_A", "PAT003_B", "Ann_T0", "Ann_T1"))
    assert found == [
        "P01_T0, P01_T1 are taken for studies of one patient, P01",
        "Ann_T0, Ann_T1 are taken for studies of different patients",
        "PAT003_A, PAT003_B are taken for studies of different patients",
    ]


def test_folders_of_years_are_doubtful():
    names = [
        Path("c", f"Smith_{who}/{year}/{m}.nii") for who in ("J", "A") for year in (2019, 2020) for m in ("T1", "T2")
    ]
    found = recognise(names, root=Path("c"))
    assert [s.patient for s in found] == ["Smith_A_2019", "Smith_A_2020", "Smith_J_2019", "Smith_J_2020"]
    assert len(doubts(found)) == 2


def in_folders(*folders):
    return recognise([Path("c", folder, f"{m}.nii") for folder in folders for m in ("T1", "T2")], root=Path("c"))


@pytest.mark.parametrize(
    "first",
    [
        "baseline {} followup {}",
        "preop {} post-op {}",
        "timepoint1 {} timepoint2 {}",
        "ses-1 {} ses-2 {}",
        "2019-03-01 {} 2020-03-01 {}",
        "site/baseline {} site/followup {}",
        "pre {} post {}",
    ],
)
@pytest.mark.parametrize("patients", [("P00", "P01"), ("sub-01", "sub-02"), ("Ann", "Bob")])
def test_visits_that_are_named_before_the_patient(first, patients):
    one, two = first.format("", "").split()
    found = in_folders(*(f"{visit}/{patient}" for visit in (one, two) for patient in patients))
    assert sorted(study.patient for study in found) == [patient for patient in patients for _ in range(2)]
    assert doubts(found) == []
    if one != "pre" and "/" not in one and "Ann" not in patients:
        named = studies(*(f"{visit}_{patient}" for visit in (one, two) for patient in patients))
        assert {study.case: study.patient for study in named} == {study.case: study.patient for study in found}


@pytest.mark.parametrize(
    "visits",
    ["2019-03-01_MRI 2020-03-01_MRI", "Baseline_MRI Followup_MRI", "visit_1_MRI visit_2_MRI", "tp1_3T tp2_1.5T"],
)
@pytest.mark.parametrize("folder", ["{patient}/{visit}", "{visit}/{patient}", "x/{patient}/{visit}/anat"])
def test_visits_whose_folders_say_more(visits, folder):
    """The case has the folder's name, the patient not."""
    paths = [
        Path("c", folder.format(patient=p, visit=v), f"{p}_{m}.nii")
        for p in ("P01", "P02")
        for v in visits.split()
        for m in ("T1", "T2")
    ]
    found = recognise(paths, root=Path("c"))
    assert [s.case for s in found] == sorted(f"{p}_{v}" for p in ("P01", "P02") for v in visits.split())
    assert [s.patient for s in found] == ["P01", "P01", "P02", "P02"]
    assert doubts(found) == []


def test_visits_before_numbers_are_doubtful():
    """20190101_0001 may be a day and a minute; 1 of baseline need not be 1 of followup."""
    by_name = studies("20190101_0001", "20200101_0001", "20190101_0002", "baseline_003", "followup_003")
    whose = [study.patient for study in by_name]
    assert whose == ["0001", "20190101_0002", "0001", "003", "003"]
    by_folder = in_folders("2019-03-01/654321", "2019-03-02/654321", "baseline/1", "followup/1", "followup/2")
    assert [study.patient for study in by_folder] == ["654321", "654321", "1", "1", "2"]
    assert doubts([*by_name, *by_folder]) == [
        "20190101_0001, 20200101_0001 are taken for studies of one patient, 0001",
        "baseline_003, followup_003 are taken for studies of one patient, 003",
        "baseline_1, followup_1 are taken for studies of one patient, 1",
        "2019-03-01_654321, 2019-03-02_654321 are taken for studies of one patient, 654321",
    ]


@pytest.mark.parametrize(
    "folders",
    [
        "20190301/0915 20190302/0915 20190303/1230",
        "20190301/091500 20200301/091500 20200301/101500",
        "2019-03-01/1 2019-03-02/1 2019-03-01/2",
        "20190301/F_33 20190401/F_33",
        "20190101_101500 20200101_101500 20200102_091020",
        "BASE-01-007 BASE-02-007 BASE-03-001",
        "PRE-01-007 PRE-02-007",
        "TIME-01-007 TIME-02-007",
        "PRE-01-02 PRE-03-02",
        "TP53_001 TP54_001 TP53_002 TP54_003 P1 P2 P3 P4 P5 P6 P7 P8",
        "FU_2019_001 FU_2020_001",
        "20190301_F_33 20190401_F_33 20190501_M_40",
        "20190301_Brain_3T 20190401_Brain_3T 20190501_Kopf",
    ],
)
def test_what_is_no_patient_makes_no_two_studies_one_patients(folders):
    """An hour, a number, sex and age, the field: different patients, and that they may be one is said."""
    found = in_folders(*folders.split())
    assert len({study.patient for study in found}) == len(folders.split())
    one, two = (folder.replace("/", "_") for folder in folders.split()[:2])
    assert f"{one}, {two} are taken for studies of different patients" in doubts(found)


@pytest.mark.parametrize("name", ["GE3T", "S01", "brain01", "Prisma", "GBM", "anon", "MR BRAIN W WO 70553", "P01"])
@pytest.mark.parametrize("between", ["_", "/"])
@pytest.mark.parametrize(("days", "others"), [(4, 0), (11, 1)])
def test_a_name_after_every_date_is_nobodys(name, between, days, others):
    """A scanner's, or a disease's: all studies, or very many, are never one patient's by that alone, as is said."""
    found = in_folders(*(f"201903{day:02}{between}{name}" for day in range(1, 1 + days)), *["P7"] * others)
    if others and name in ("P01", "MR BRAIN W WO 70553"):  # as it is called, it may be one who came often
        assert len({study.patient for study in found}) == 2
        return
    assert len({study.patient for study in found}) == days + others
    assert len(doubts(found)) == 1
    few = in_folders(*(f"201903{day:02}{between}{who}" for day in (1, 2) for who in ("GE3T", "S01")))
    assert {study.confidence for study in few} == {"weak"}
    assert len(doubts(few)) == 2


def test_days_in_a_patients_folder_are_doubtful():
    """A patient's days, described: TCIA's way."""
    found = in_folders("W1/01-23-1999-NA-MR BRAIN-12345", "W1/03-23-1999-NA-MR BRAIN-22345", "W2/01-23-2000-MR-32345")
    assert doubts(found) == [
        "W1_01-23-1999-NA-MR BRAIN-12345, W1_03-23-1999-NA-MR BRAIN-22345 are taken for studies of different patients"
    ]
    found = in_folders("W1/01-23-1999-BRAIN-1", "W1/03-23-1999-BRAIN-2", "W2/01-23-2000-BRAIN-3")
    assert doubts(found) == ["W1_01-23-1999-BRAIN-1, W1_03-23-1999-BRAIN-2 are taken for studies of different patients"]
    found = in_folders("P01/20190301_Brain_3T", "P01/20200301_Brain_3T", "P02/20190301/Brain_3T")
    assert [study.patient for study in found] == ["P01", "P01", "P02"]


def test_visits_of_isbi_2015_are_doubtful():
    found = studies("training01_01", "training01_02", "training02_01", "training02_02")
    assert doubts(found) == [
        "training01_01, training01_02 are taken for studies of different patients",
        "training02_01, training02_02 are taken for studies of different patients",
    ]


@pytest.mark.parametrize(
    "folders",
    [
        "train/P01 test/P01",
        "siteA/P01 siteB/P01 siteC/P01",
        "site1/P01 site2/P01",
        "V1/P01 V2/P01",
        "2019/P01 2020/P01",
        "train/001 test/001",
        "progression/P01 pseudoprogression/P01",
        "A/imgs/P1 B/imgs/P1",
    ],
)
def test_one_name_in_several_places_is_doubtful(folders):
    """Different patients, but that is said, of the right ones, and not of those beside them."""
    twice = folders.split()
    found = in_folders(*twice, *(f"{twice[0].split('/')[0]}/P0{k}" for k in (5, 6)))
    of = ", ".join(sorted(folder.replace("/", "_") for folder in twice))
    assert doubts(found) == [f"{of} are taken for studies of different patients"]
    if "00" not in folders and "imgs" not in folders:
        assert doubts(studies(*(folder.replace("/", "_") for folder in twice))) == doubts(found)


@pytest.mark.parametrize("sites", ["MRI_A MRI_B", "scan_A scan_B", "session_one session_two", "Site_01 Site_02"])
@pytest.mark.parametrize("name", ["P01", "007"])
def test_one_name_at_several_sites_is_doubtful(sites, name):
    """However the sites are called: they may be visits, or copies."""
    one, two = sites.split()
    paths = [Path("c", site, f"{who}_T1.nii") for site in (one, two) for who in (name, 100 + len(site) + ord(site[-1]))]
    found = recognise(paths, root=Path("c"))
    assert {f"{one}_{name}", f"{two}_{name}"} <= {study.patient for study in found}
    assert doubts(found) == [f"{one}_{name}, {two}_{name} are taken for studies of different patients"]


def test_a_letter_after_a_number_and_names_with_and_without_a_last_word_are_doubtful():
    found = studies("P01a", "P01b", "P02A", "P03", "P03_op")
    assert [study.patient for study in found] == ["P01a", "P01b", "P02A", "P03", "P03_op"]
    assert doubts(found) == [
        "P01a, P01b are taken for studies of different patients",
        "P03, P03_op are taken for studies of different patients",
    ]


def test_scans_of_one_name_in_every_patients_folder_are_not_doubtful():
    assert doubts(in_folders(*(f"P0{k}/series3" for k in range(4)))) == []
    assert doubts(in_folders("P1/baseline/scanA1", "P1/followup/scanA1", "P2/baseline/scanA1")) == []


@pytest.mark.parametrize(
    "cases",
    [
        ("BraTS-GLI-00000-000", "BraTS-GLI-00000-001", "BraTS-GLI-00001-000"),
        ("sub-01", "sub-02", "sub-03"),
        ("sub-01_ses-1", "sub-01_ses-2", "sub-02_ses-1"),
        ("IXI012-HH-1211", "IXI013-HH-1212", "IXI014-HH-1236"),
        ("BraTS20_Training_001", "BraTS20_Training_002", "BraTS20_Training_003"),
        ("GBM_M01", "GBM_M02", "GBM_M03"),
        ("PAT001_2019-03-01", "PAT001_2020-04-02", "PAT002_2019-03-01"),
    ],
)
def test_usual_names_are_not_doubtful(cases):
    assert doubts(studies(*cases)) == []


def test_the_grouping_is_said_in_a_few_lines():
    found = studies(*(f"P{k}_visit{n}" for k in range(7) for n in (1, 2)), "Q1_T0", "Q1_T1", "R")
    patients = {study.case: study.patient for study in found} | {"R": "P0"}
    several, named, shared, warning = grouping(found, patients, [["P0_visit1", "R"]])
    assert several.startswith(
        "patients with several studies: 8 (P0: P0_visit1, P0_visit2, R; P1: P1_visit1, P1_visit2;"
    )
    assert several.endswith("; …)")
    assert named == "17 studies of 9 patients by their names; those that share a scan are joined"
    assert shared == "P0_visit1, R share a scan, so they are studies of one patient"
    assert warning.startswith(
        "warning: names leave open who is whose: Q1_T0, Q1_T1 are taken for studies of one patient"
    )
    assert "--patients FILE.csv (columns case, patient)" in warning
    assert grouping(studies("A", "B"), {"A": "A", "B": "B"}, []) == []


def test_numbered_folders_are_no_patients_by_themselves():
    """1 may be the first patient of a group, or the first visit of a patient, but not the 1 of another cohort."""

    def found(*folders):
        return recognise([Path("cohort", folder, "t1.nii.gz") for folder in folders], root=Path("cohort"))

    assert {study.patient for study in found("Meier_A/1", "Weiss_D/2")} == {"Meier_A_1", "Weiss_D_2"}
    assert {study.patient for study in found("1", "2")} == {"1", "2"}
    assert {study.patient for study in found("HC/1023", "HC/1024")} == {"1023", "1024"}
    (first, second) = doubts(found("Meier_A/1", "Meier_A/2", "Huber_B/1", "Huber_B/2"))
    assert first == "Huber_B_1, Huber_B_2 are taken for studies of different patients"
    assert second == "Meier_A_1, Meier_A_2 are taken for studies of different patients"
    assert doubts(found(*(f"{group}/{n}" for group in ("HC", "MS") for n in range(11)))) == []
