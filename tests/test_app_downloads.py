"""What is downloaded: what was made, said to be synthetic, and nothing that is not for sharing."""

import io
import zipfile

import numpy as np

from crossmr.app import downloads
from crossmr.app.downloads import files_of, stream_zip

TREE = (
    *("Ann/Ann-t2f_synthetic.nii.gz", "Ann/Ann-t2f_std.nii.gz", "Ann/manifest.json", "pictures/Ann.webp"),
    *("Ann/Ann-t2f_synthetic_dicom/0001.dcm", "report.html", "status.csv", "manifest.json", ".crossmr.lock"),
    *("private_paths.json", "crossmr.log", "scans/Ann/Ann-t1n.nii.gz"),
)


def make(folder):
    for name in TREE:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(name.encode())
    return folder


def test_nothing_private_and_no_scan_is_in_a_download(tmp_path):
    out = make(tmp_path)
    nifti = [name for name, _ in files_of(out, "nifti")]
    assert nifti == [
        *("Ann/Ann-t2f_std.nii.gz", "Ann/Ann-t2f_synthetic.nii.gz", "Ann/manifest.json", "manifest.json"),
        *("pictures/Ann.webp", "report.html", "status.csv"),
    ]
    assert [name for name, _ in files_of(out, "dicom")] == ["Ann/Ann-t2f_synthetic_dicom/0001.dcm", "Ann/manifest.json"]


def test_a_zip_is_written_while_it_is_sent(tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "BLOCK", 1000)
    content = np.random.default_rng(0).bytes(50_000)
    (tmp_path / "a.nii.gz").write_bytes(content)
    (tmp_path / "b.dcm").write_bytes(bytes(20_000))
    files = [(name, tmp_path / name) for name in ("a.nii.gz", "b.dcm")]
    blocks = list(stream_zip("Ann_SYNTHETIC", files))
    assert len(blocks) > 60
    assert max(map(len, blocks)) < 3000  # never all of it
    with zipfile.ZipFile(io.BytesIO(b"".join(blocks))) as archive:
        assert archive.testzip() is None
        assert archive.namelist() == ["Ann_SYNTHETIC/SYNTHETIC.txt", "Ann_SYNTHETIC/a.nii.gz", "Ann_SYNTHETIC/b.dcm"]
        assert archive.read("Ann_SYNTHETIC/a.nii.gz") == content
        assert archive.getinfo("Ann_SYNTHETIC/b.dcm").compress_size < 1000
        assert b"not a medical device" in archive.read("Ann_SYNTHETIC/SYNTHETIC.txt")
