"""What the page sends: harmless names, counted bytes, plain files, and archives that are not believed."""

import asyncio
import io
import stat
import struct
import zipfile

import nibabel as nib
import pytest
from conftest import image, make_head, run_async

from crossmr.app import uploads
from crossmr.app.uploads import Limits, Refused, Store, harmless

NIFTI = image(make_head()).to_bytes()
DICOM = bytes(128) + b"DICM" + bytes(100)


@pytest.fixture
def store(tmp_path):
    (tmp_path / "scans").mkdir()
    return Store(tmp_path / "scans", Limits(total=2**20, files=20, free=0))


def give(store, name, content, *, chunk=50_000, breaks=False, announced=0):
    async def chunks():
        for start in range(0, len(content), chunk):
            yield content[start : start + chunk]
        if breaks:
            raise ConnectionError("closed")

    run_async(store.receive(name, chunks(), announced))


def there(store):
    """Every file of the page's folder, what came in beside included."""
    top = store.folder.parent
    return sorted(path.relative_to(top).as_posix() for path in top.rglob("*") if not path.is_dir() or path.is_symlink())


def packed(*entries, method=zipfile.ZIP_DEFLATED, attributes=None):
    held = io.BytesIO()
    with zipfile.ZipFile(held, "w", method) as archive:
        for name, content in entries:
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.create_system, info.external_attr = 3, (attributes or stat.S_IFREG | 0o644) << 16
            archive.writestr(info, content)
    return held.getvalue()


def test_a_file_and_a_folder_land_where_they_belong(store):
    give(store, "T1.nii", NIFTI)
    give(store, "Ann/sub/FLAIR.nii", NIFTI)
    assert there(store) == ["scans/Ann/sub/FLAIR.nii", "scans/study/T1.nii"]
    path = store.folder / "study" / "T1.nii"
    assert path.read_bytes() == NIFTI
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert store.taken == 2 * len(NIFTI)
    assert not store.remarks


@pytest.mark.parametrize(
    "name",
    [
        *("/etc/passwd", "\\x", "C:/x.nii", "c:\\x.nii", "../x.nii", "a/../../x.nii", "a\\..\\x.nii", "", "."),
        *("a" * 300, "/".join("a" * 30)),
    ],
)
def test_a_path_that_leads_elsewhere_is_refused(store, name):
    with pytest.raises(Refused):
        give(store, name, NIFTI)
    assert there(store) == []


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("a//b/./T1.nii", "a/b/T1.nii"),
        ("a\\T1.nii", "a/T1.nii"),
        ("a:b/T1\x00.nii", "a_b/T1_.nii"),
        ("a/ /T1.nii. ", "a/_/T1.nii"),
        ("e\u0301/T1.nii", "é/T1.nii"),
    ],
)
def test_a_path_is_made_fit_for_any_system(name, kept):
    assert str(harmless(name)) == kept


def test_what_a_system_keeps_for_itself_is_passed_over(store):
    for name in ("Ann/.DS_Store", "__MACOSX/Ann/T1.nii", "Ann/Thumbs.db"):
        give(store, name, NIFTI)
    assert there(store) == []
    assert not store.names


def test_of_another_kind_only_the_name_is_kept(store):
    give(store, "notes.exe", b"MZ" + bytes(1000))
    give(store, "FLAIR.mif", b"mrtrix image" + bytes(1000))
    assert (store.folder / "study" / "notes.exe").stat().st_size == 0  # that FLAIR.mif was given must be known
    assert store.taken == 0
    assert store.remarks["study/FLAIR.mif"] == "is neither a volume nor DICOM; it is not read"
    give(store, "x.zip", packed(("y.zip", packed(("T1.nii", NIFTI)))))
    assert store.remarks["x/y.zip"] == "is an archive that is not opened; unpack it"


def test_dicom_is_known_by_its_content(store):
    give(store, "Ann/IM0001", DICOM)
    give(store, "Ann/IM0002", b"\x08\x00\x05\x00" + bytes(200))
    assert not store.remarks
    assert store.taken == len(DICOM) + 204


def test_a_volume_that_is_none_is_said_and_kept(store):
    give(store, "FLAIR.nii.gz", b"<!doctype html><p>Log in</p>")
    assert "is a web page, not a volume" in store.remarks["study/FLAIR.nii.gz"]
    assert there(store) == ["scans/study/FLAIR.nii.gz"]  # else FLAIR would seem to be missing


def test_a_name_is_taken_once_even_at_once(store):
    give(store, "T1.nii", NIFTI)
    with pytest.raises(Refused, match="is here already") as refused:
        give(store, "t1.NII", b"other")  # one file on many systems
    assert refused.value.status == 409
    assert (store.folder / "study" / "T1.nii").read_bytes() == NIFTI

    async def both():
        async def chunks(byte):
            for _ in range(10):
                yield byte * 1000
                await asyncio.sleep(0)

        return await asyncio.gather(
            *(store.receive("a/T2.nii", chunks(b), 0) for b in (b"a", b"b")), return_exceptions=True
        )

    ends = run_async(both())
    assert sorted(type(end).__name__ for end in ends) == ["NoneType", "Refused"]
    assert len(set((store.folder / "a" / "T2.nii").read_bytes())) == 1  # one of them, whole
    with pytest.raises(Refused, match="a file and a folder"):
        give(store, "a/T2.nii/x.nii", NIFTI)


def test_too_large_and_too_many_are_refused_and_nothing_is_left(store):
    with pytest.raises(Refused, match=r"more than 0\.000977 GiB") as refused:
        give(store, "T1.nii", bytes(2**20 + 1))
    assert refused.value.status == 413
    with pytest.raises(Refused):
        give(store, "T1.nii", b"", announced=2**21)
    assert (there(store), store.taken, store.names) == ([], 0, {})
    give(store, "T1.nii", bytes(2**20))
    with pytest.raises(Refused):
        give(store, "T2.nii", b"x")
    for number in range(19):
        give(store, f"{number}.nii", b"")
    with pytest.raises(Refused, match="more than 20 files"):
        give(store, "last.nii", b"")


def test_a_full_disk_is_refused(tmp_path):
    (tmp_path / "scans").mkdir()
    store = Store(tmp_path / "scans", Limits(free=2**62))
    with pytest.raises(Refused, match="nearly full") as refused:
        give(store, "T1.nii", NIFTI)
    assert refused.value.status == 507
    assert there(store) == []


def test_a_file_that_broke_off_leaves_nothing(store):
    with pytest.raises(ConnectionError):
        give(store, "T1.nii", NIFTI, breaks=True)
    assert (there(store), store.taken) == ([], 0)
    give(store, "T1.nii", NIFTI)


def test_a_zip_becomes_a_folder(store):
    give(store, "export.zip", packed(("IM1", DICOM), ("b/IM2", DICOM), ("b/.DS_Store", b"x"), ("read.txt", b"hello")))
    assert there(store) == [f"scans/export/{name}" for name in ("IM1", "b/IM2", "read.txt")]
    assert (store.folder / "export" / "b" / "IM2").read_bytes() == DICOM
    give(store, "other.zip", packed(("Ann/a/IM1", DICOM), ("Ann/IM2", DICOM)))
    assert (store.folder / "Ann" / "IM2").exists()  # the archive names a folder itself
    assert store.taken == 4 * len(DICOM)
    with pytest.raises(Refused, match="Ann/a/IM1 is here already"):
        give(store, "again.zip", packed(("Ann/IM9", DICOM), ("Ann/a/IM1", DICOM)))
    assert not (store.folder / "Ann" / "IM9").exists()  # all of it, or nothing


@pytest.mark.parametrize(
    "name", ["../../evil.nii", "/etc/evil.nii", "a/../../evil.nii", "..\\evil.nii", "C:\\evil.nii"]
)
def test_a_zip_that_leads_out_is_refused_as_a_whole(store, name):
    with pytest.raises(Refused, match="is not a path below a folder"):
        give(store, "x.zip", packed(("Ann/T1.nii", NIFTI), (name, NIFTI)))
    assert there(store) == []


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK])
def test_a_zip_with_a_link_or_a_device_is_refused(store, kind):
    with pytest.raises(Refused, match="is a link or a device"):
        give(store, "x.zip", packed(("T1.nii", b"/etc/passwd"), attributes=kind | 0o777))
    assert there(store) == []


def test_a_zip_bomb_is_refused_before_it_is_unpacked(store, monkeypatch):
    monkeypatch.setattr(uploads, "SMALL", 2**16)
    with pytest.raises(Refused, match=r"would become 1 MiB, out of 0\.0"):
        give(store, "x.zip", packed(("T1.nii", bytes(900_000))))
    with pytest.raises(Refused, match="more than 20 files"):
        give(store, "x.zip", packed(*((f"{n}.nii", b"") for n in range(21))))
    assert (there(store), store.taken, store.names) == ([], 0, {})


def test_a_zip_that_lies_about_its_sizes_writes_no_more_than_it_says(store):
    """The headers say 1000 bytes, the data are 200 000: zipfile reads 1000 and finds the sum wrong."""
    content = bytearray(packed(("T1.nii", bytes(200_000))))
    for at in (content.find(b"PK\x03\x04") + 22, content.find(b"PK\x01\x02") + 24):
        content[at : at + 4] = struct.pack("<L", 1000)
    with pytest.raises(Refused, match="is no zip that can be read"):
        give(store, "x.zip", bytes(content))
    assert (there(store), store.taken) == ([], 0)


def test_overlapping_entries_are_refused(store):
    """A bomb whose entries are all one piece of data."""
    content = packed(*((f"{n}.nii", bytes(50_000)) for n in range(3)))
    start = content.find(b"PK\x01\x02")
    first = content[start : content.find(b"PK\x01\x02", start + 4)]
    end = content[content.find(b"PK\x05\x06") :]
    count = 15
    central = b"".join(first.replace(b"0.nii", f"{n:x}.nii".encode()) for n in range(count))
    end = end[:8] + struct.pack("<HHLL", count, count, len(central), start) + end[20:]
    with pytest.raises(Refused):
        give(store, "x.zip", content[:start] + central + end)
    assert there(store) == []


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"PK\x03\x04" + bytes(100), "is no zip, or was cut off"),
        (packed(("T1.nii", NIFTI))[:-30], "is no zip, or was cut off"),
        (packed(("T1.nii", NIFTI), method=zipfile.ZIP_LZMA), "a rare method"),
        (
            b"PK" + packed(("T1.nii", NIFTI), method=zipfile.ZIP_STORED)[2:].replace(NIFTI[400:440], b"x" * 40),
            "no zip that",
        ),
    ],
)
def test_a_broken_zip_is_refused(store, content, said):
    with pytest.raises(Refused, match=said):
        give(store, "x.zip", content)
    assert (there(store), store.taken) == ([], 0)


def test_an_encrypted_zip_is_refused(store):
    content = bytearray(packed(("T1.nii", NIFTI)))
    for at in (content.find(b"PK\x03\x04") + 6, content.find(b"PK\x01\x02") + 8):
        content[at] |= 1
    with pytest.raises(Refused, match="is encrypted"):
        give(store, "x.zip", bytes(content))


def test_a_list_of_files_without_end_is_not_read(tmp_path):
    """A directory of zip64 that announces more entries than memory holds."""
    record = b"PK\x06\x06" + bytes(20) + struct.pack("<QQQQ", 2**40, 2**40, 2**46, 0)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, 0, 1)
    path = tmp_path / "x.zip"
    path.write_bytes(record + locator + b"PK\x05\x06" + struct.pack("<HHHHLLH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0, 0))
    with pytest.raises(Refused, match="lists more than 20 files"):
        uploads.check_directory(path, "x.zip", 20)
    path.write_bytes(packed(("T1.nii", NIFTI)))
    uploads.check_directory(path, "x.zip", 20)


def test_a_link_in_the_way_is_not_followed(store, tmp_path):
    target = tmp_path / "elsewhere"
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(FileExistsError):
        uploads._new_file(tmp_path / "link")
    assert not target.exists()


def test_what_was_received_can_be_read(store):
    give(store, "Ann/T1.nii", NIFTI)
    assert nib.load(store.folder / "Ann" / "T1.nii").shape == (28, 32, 24)


def test_a_page_that_starts_over_while_an_archive_is_unpacked_keeps_nothing_of_it(store, monkeypatch):
    usual, unpacked = uploads._copy, []

    def copied(file, start, place):
        usual(file, start, place)
        unpacked.append(place)
        if len(unpacked) == 2:
            store.close()

    monkeypatch.setattr(uploads, "_copy", copied)
    with pytest.raises(Refused, match="the page started over"):
        give(store, "all.zip", packed(*((f"P/{k}.nii", NIFTI) for k in range(5))))
    assert len(unpacked) == 2
    assert not store.folder.parent.exists()
