"""The numbers as people read them: on the terminal, and in CSV."""

import csv
import math
import os
from dataclasses import replace

import pytest
from rich.console import Console

from crossmr.errors import OutputError
from crossmr.evaluation.measures import (
    INTENSITY,
    METRICS,
    STD,
    CalibrationPoint,
    ContrastScore,
    Score,
    UncertaintyScore,
)
from crossmr.evaluation.statistics import summarise, summarise_contrasts, summarise_uncertainty_by_target
from crossmr.evaluation.tables import other_tables, read_scores, tables, uncertainty_table, write_csv


def score(case="A", predictor="own", region="brain", sources="t1n", target="t2f", **metrics):
    values = {**dict.fromkeys(METRICS, 0.5), **metrics}
    return Score(case, f"patient of {case}", sources, target, predictor, "volume", region, **values)


def text_of(*shown, width=200):
    console = Console(width=width, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with console.file:
        for table in shown:
            console.print(table)
    return console.export_text()


# CSV


def test_the_columns_are_the_fields_and_the_values_come_back(tmp_path):
    rows = [
        score("caf\udce9, left", "against: [a]", psnr=math.inf, nmse=math.nan, mae=0.1 + 0.2),
        score("B", "linear regression", "slices"),
    ]
    write_csv(tmp_path / "metrics.csv", rows)
    text = (tmp_path / "metrics.csv").read_bytes().decode(errors="surrogatepass")
    assert text.splitlines()[0] == (
        "case,patient,sources,target,predictor,protocol,region,psnr,ssim,mae,nmse,haarpsi,correlation,psnr_affine"
    )
    first, second = csv.DictReader(text.splitlines())
    assert (first["case"], first["psnr"], first["nmse"], second["region"]) == (
        "caf\udce9, left",
        "inf",
        "nan",
        "slices",
    )
    read, other = read_scores(tmp_path / "metrics.csv")
    assert replace(read, case="", patient="", nmse=0) == replace(rows[0], case="", patient="", nmse=0)
    assert math.isnan(read.nmse)
    assert other == rows[1]


def test_the_other_files_have_their_columns(tmp_path):
    rows = {
        "a": UncertaintyScore("A", "P", "t1n", "t2f", STD, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, math.nan),
        "b": CalibrationPoint("A", "P", "t1n", "t2f", 1, 0.1, 0.2),
        "c": ContrastScore("A", "P", "t1n", "t2f", "own", "lesion", 2.0, 0.5, 0.25),
    }
    columns = {
        "a": "uncertainty,correlation,error,error_most_certain_90,ause,coverage_95,std_ratio,error_ratio,lesion_kept",
        "b": "decile,std,error",
        "c": "predictor,structure,truth,predicted,kept",
    }
    values = {"a": "std,0.1,0.2,0.3,0.4,0.5,0.6,0.7,nan", "b": "1,0.1,0.2", "c": "own,lesion,2.0,0.5,0.25"}
    for name, row in rows.items():
        write_csv(tmp_path / name, [row])
        wanted = f"case,patient,sources,target,{columns[name]}\nA,P,t1n,t2f,{values[name]}\n"
        assert (tmp_path / name).read_text() == wanted


@pytest.mark.parametrize("text", [None, "case,psnr\nA,1\n", "a,b\n1,2,3,4,5,6,7,8,9,10,11,12,13,fourteen\n"])
def test_a_damaged_file_is_one_line(tmp_path, text):
    if text is not None:
        (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(OutputError, match=r"metrics\.csv is missing or damaged"):
        read_scores(tmp_path / "metrics.csv")


# Tables


def test_a_target_has_a_row_for_each_predictor():
    rows = [
        score(case, predictor, region, target=target, psnr=20 + n + k / 10)
        for n, predictor in enumerate(("own", "guided: sample", "against: [/plain]", "constant"))
        for k, case in enumerate("ABC")
        for region in ("brain", "slices")
        for target in ("t1c", "t2f")
    ]
    shown = tables(summarise(rows))
    assert [table.row_count for table in shown] == [4, 4]
    text = text_of(*shown)
    for words in (
        "t1c from t1n: mean and range over 3 patients (fewer than 6: no interval)",
        "t2f from t1n",
        "own",
        "guided: sample",
        "constant",
    ):
        assert words in text
    assert "against: [/plain]" in text  # a name is no markup
    cells = {column.header: list(column.cells) for column in shown[0].columns}
    assert [cell.splitlines()[0] for cell in cells["PSNR\nbrain"]] == ["20.10", "21.10", "22.10", "23.10"]
    assert cells["PSNR\nbrain"][0] == "20.10\n20.00–20.20"
    assert cells["PSNR\ntumour"] == ["–"] * 4
    plain = {column.header: list(column.cells) for column in tables(summarise(rows), intervals=False)[0].columns}
    assert plain["PSNR\nbrain"] == ["20.10", "21.10", "22.10", "23.10"]


def test_a_table_shows_zero_as_zero_and_what_is_unknown_as_a_dash():
    rows = [score("A", ssim=0.0, psnr=math.inf), score("B", ssim=0.0)]
    rows += [score(case, region="deep", correlation=math.nan) for case in "AB"]
    (table,) = tables(summarise(rows))
    cells = {column.header: next(iter(column.cells)) for column in table.columns}
    assert cells["SSIM\nbrain"] == "0.000\n0.000–0.000"
    assert cells["corr.\ndeep"] == cells["PSNR\nbrain"] == cells["PSNR\ntumour"] == cells["fluid\nkept"] == "–"


def test_a_table_says_how_many_patients_keep_a_contrast():
    rows = [
        score(case, predictor, target=target)
        for case in "AB"
        for predictor in ("own", "other")
        for target in ("t1c", "t2f")
    ]
    shares = {
        ("t2f", "own", "lesion"): (0.9, 0.1),
        ("t2f", "own", "fluid"): (0.9, 1.1),
        ("t2f", "other", "lesion"): (math.nan, 0.1),
        ("t1c", "other", "fluid"): (math.nan, math.nan),
    }
    contrasts = [
        ContrastScore(case, case, "t1n", target, predictor, structure, 2.0, 2 * share, share)
        for (target, predictor, structure), both in shares.items()
        for case, share in zip("AB", both, strict=True)
    ]
    t1c, t2f = tables(summarise(rows), summarise_contrasts(contrasts))
    for table, lesions, fluid in ((t1c, ["–", "–"], ["–", "–"]), (t2f, ["1 of 2", "0 of 1"], ["2 of 2", "–"])):
        cells = {column.header: list(column.cells) for column in table.columns}
        assert (cells["lesions\nkept"], cells["fluid\nkept"]) == (lesions, fluid)


def test_a_narrow_terminal_shows_whole_numbers():
    places = (("deep", "correlation"), ("brain", "psnr"), ("brain", "ssim"), ("tumour", "psnr"))
    rows = [
        score("A", "guided: unconditional", region, psnr=12.34, ssim=0.567, correlation=0.891) for region, _ in places
    ]
    contrasts = [
        ContrastScore(str(n), str(n), "t1n", "t2f", "guided: unconditional", structure, 2.0, 2.0, 1.0)
        for n in range(99)
        for structure in ("lesion", "fluid")
    ]
    text = text_of(*tables(summarise(rows), summarise_contrasts(contrasts), intervals=False), width=80)
    last = next(line for line in text.splitlines() if "guided: unconditional" in line)
    assert last.split() == ["guided:", "unconditional", "0.891", "12.34", "0.567", "12.34", *["99", "of", "99"] * 2]


def test_of_one_patient_there_is_no_interval():
    (table,) = tables(summarise([score(psnr=20.0)]))
    assert "mean over 1 patients" in text_of(table)
    assert next(iter(table.columns[2].cells)) == "20.00"


def test_an_interval_stands_beside_the_mean_of_six_patients():
    rows = [score(str(k), psnr=20.0 + k) for k in range(6)]
    rows += [score(str(k), region="tumour", psnr=20.0 + k) for k in range(5)]
    (table,) = tables(summarise(rows))
    assert table.title == "t2f from t1n: mean and 95 % interval over 6 patients"
    cells = {column.header: next(iter(column.cells)) for column in table.columns}
    low, high = map(float, cells["PSNR\nbrain"].split("\n")[1].split("–"))
    assert 20 < low < 22.5 < high < 25
    assert cells["PSNR\ntumour"] == "22.00"  # of five there is none


@pytest.mark.parametrize(("patients", "caption"), [(5, "0.062"), (6, None)])
def test_a_table_says_where_two_models_cannot_differ_significantly(patients, caption):
    rows = [score(str(k), name, psnr=20.0 + k) for k in range(patients) for name in ("own", "against: x", "constant")]
    (table,) = tables(summarise(rows))
    wanted = f"5 patients are too few for a significant difference between models (p is {caption} at least)"
    assert table.caption == (caption and wanted)


def test_a_row_of_fewer_patients_says_of_how_many():
    rows = [score(str(k), "own", psnr=20.0 + k) for k in range(8)] + [score("0", "images: [b]", psnr=30.0)]
    (table,) = tables(summarise(rows))
    assert "over 8 patients" in str(table.title)
    assert [*table.columns[0].cells] == ["own", "images: \\[b]\nof 1 patient"]
    assert "1 patient is too few for a significant difference of images: \\[b]" in str(table.caption)


def test_every_subset_has_two_tables_for_each_predictor_but_the_baselines():
    psnr = {"own": 20.0, "against: plain": 21.0, "linear regression": 19.0, "constant": 5.0}
    subsets = (("t1n", "t2f"), ("t1n", "t1c"), ("t1n+t1c", "t2f"))
    rows = [
        score("A", predictor, sources=sources, target=target, psnr=value + len(sources))
        for sources, target in subsets
        for predictor, value in psnr.items()
    ]
    fullest, shown = (made := tables(summarise(rows), intervals=False))[:2], made[2:]
    assert [table.title for table in fullest] == [
        "t2f from t1n+t1c: mean over 1 patients",
        "t1c from t1n: mean over 1 patients",
    ]
    assert [table.title for table in shown] == [
        f"{metric} over the brain, {predictor} (linear regression)"
        for predictor in ("own", "against: plain")
        for metric in ("PSNR", "SSIM")
    ]
    assert [table.row_count for table in shown] == [2] * 4
    own, second = ({c.header: list(c.cells) for c in shown[n].columns} for n in (0, 2))
    assert (own["from"], own["patients"]) == (["t1n", "t1n+t1c"], ["1", "1"])
    assert own["t1c"] == ["23.00 (22.00)", ""]
    assert own["t2f"] == ["23.00 (22.00)", "27.00 (26.00)"]
    assert second["t2f"] == ["24.00 (22.00)", "28.00 (26.00)"]


def test_of_several_subsets_the_one_that_most_patients_have_is_shown_in_full():
    """One study that lacks a contrast does not hide what is known of the others."""
    whole = [score(case, "own", sources="t1n+t1c+t2w", target="t2f") for case in "ABC"]
    lacking = [score("D", "own", sources="t1n+t1c", target="t2f")]
    for rows in ([*whole, *lacking], [*lacking, *whole]):
        first, *rest = tables(summarise(rows), intervals=False)
        assert first.title == "t2f from t1n+t1c+t2w: mean over 3 patients"
        assert len(rest) == 2


def test_uncertainty_is_one_table():
    rows = [
        UncertaintyScore("A", "P", sources, "t2f", name, 0.1, error, error / 2, ause, 0.9, 100 * error, 2.0, 1.0)
        for sources, error in (("t1n", 0.02), ("t1n+t2w", 0.04))
        for name, ause in ((STD, 0.2), (INTENSITY, 0.4))
    ]
    table = uncertainty_table(summarise_uncertainty_by_target(rows))
    assert [column.header for column in table.columns][:3] == ["target", "uncertainty", "patients"]
    assert [list(column.cells) for column in table.columns] == [
        *(["t2f", "t2f"], ["std", "predicted intensity"], ["1", "1"]),
        *(["0.0300", "0.0300"], ["0.0150", "0.0150"], ["0.20", "0.40"], ["0.90", "–"]),
        ["2.00 / 3.00", "2.00 / 3.00"],
    ]
    rows = [replace(row, std_ratio=math.nan, error_ratio=math.nan) for row in rows]
    assert list(uncertainty_table(summarise_uncertainty_by_target(rows)).columns[-1].cells) == ["– / –", "– / –"]


def test_a_mean_over_fewer_images_than_another_says_so():
    """By another protocol: two of four images have a tumour, and two a linear regression."""
    rows = [
        {"target": "t2f", "predictor": name, "measure": measure, "images": images, "mean": 0.5}
        for name, counts in (("own", (4, 1)), ("linear regression", (2, 1)))
        for measure, images in zip(("ssim_whole", "ssim_tumour"), counts, strict=True)
    ]
    (table,) = other_tables("brasyn", rows)
    assert table.title == "t2f by the protocol 'brasyn': mean over 4 images"
    assert [list(column.cells) for column in table.columns][1:] == [
        ["0.5000", "0.5000\nof 2 images"],
        ["0.5000\nof 1 image"] * 2,
    ]
