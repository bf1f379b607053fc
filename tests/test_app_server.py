"""Who may ask the page's server, and what is answered; a real server on this computer, with a real worker."""

import contextlib
import gzip
import http.client
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import nibabel as nib
import pytest
from conftest import image, in_thread, make_head, save_untrained
from typer.testing import CliRunner

from crossmr.app import server, sessions
from crossmr.app.server import AppSettings, Guard, is_loopback, make_server
from crossmr.app.uploads import Limits
from crossmr.cli import app
from crossmr.errors import ConfigError

TOKEN = "a-token-that-nobody-guesses"
NO_FILE = "There is no file that can be read yet; hidden files are not read. Drop a study first."
NOTHING = server.NOTHING.encode()


class Client:
    """Speaks to a server as its page does; `headers` replace what a browser sends."""

    def __init__(self, port, token=TOKEN):
        self.port, self.token, self.key = port, token, ""

    def ask(self, method, path, body=None, **headers):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        sent = {"Host": f"127.0.0.1:{self.port}", "Origin": f"http://127.0.0.1:{self.port}"} | headers
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        connection.request(method, path, content, {name: value for name, value in sent.items() if value is not None})
        answer = connection.getresponse()
        answer.content = answer.read()
        connection.close()
        return answer

    def of_token(self, method, path, body=None, **headers):
        return self.ask(method, f"/{self.token}/{path}", body, **headers)

    def open(self):
        self.key = json.loads(self.of_token("POST", "pages", {}).content)["key"]
        return self

    def page(self, method, path="", body=None):
        answer = self.of_token(method, f"pages/{self.key}{path}", body)
        return answer.status, json.loads(answer.content or b"{}")

    def give(self, name, content):
        return self.page("POST", f"/files?path={name}", content)

    def give_study(self, case="Ann", modalities=("t1n", "t2w")):
        for modality in modalities:
            content = image(make_head(modality, shape=(26, 28, 22))).to_bytes()
            assert self.give(f"{case}/{case}-{modality}.nii", content)[0] == 204

    def finished(self, verb):
        """The page's state when its job has ended."""
        assert self.page("POST", f"/{verb}", {})[0] == 202
        return self.waited()

    def waited(self):
        while (state := self.page("GET")[1])["job"]["state"] in ("waiting", "running"):
            time.sleep(0.05)
        return state


@contextlib.contextmanager
def served(root, model, limits):
    """The port of a page that is served from this folder, and the folder."""
    heard = []
    running = make_server(root, AppSettings(model=str(model), device="cpu", limits=limits), TOKEN, heard.append)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "SWEEP_SECONDS", 0.05)
        thread = threading.Thread(target=running.run)
        thread.start()
        while not heard:
            time.sleep(0.01)
        yield heard[0], root
        running.should_exit = True
        thread.join(20)
    assert not thread.is_alive()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """A server of an untrained model that takes half a MiB and thirty files, and the folder of its pages."""
    model, limits = save_untrained(tmp_path_factory.mktemp("model")), Limits(total=2**19, files=30, free=0)
    with served(tmp_path_factory.mktemp("root"), model, limits) as where:
        yield where


@pytest.fixture
def client(address):
    made = Client(address[0])
    yield made
    if made.key:
        made.page("DELETE")


def test_the_page_may_ask_nobody_else(client):
    answer = client.of_token("GET", "")
    assert answer.status == 200
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["referrer-policy"] == "no-referrer"
    assert answer.headers["cache-control"] == "no-store"
    text = answer.content.decode()
    assert "Research use only" in text
    assert "not a medical device" in text
    assert "<style" not in text
    assert "//" not in text.replace("<!doctype", "")  # nothing from elsewhere
    for name, kind in (("app.js", "text/javascript"), ("app.css", "text/css"), ("niivue.umd.js", "text/javascript")):
        answer = client.of_token("GET", f"static/{name}")
        assert (answer.status, answer.headers["content-type"].split(";")[0]) == (200, kind)
    assert client.of_token("GET", "static/server.py").status == 404
    assert client.of_token("GET", "static/..%2fserver.py").status == 404


@pytest.mark.parametrize(
    "path", ["/", "/pages", f"/{TOKEN[:-1]}/", f"/{TOKEN}x/", "/%61-token/", f"//{TOKEN}/", "/static/app.js"]
)
def test_without_the_token_there_is_nothing(client, path):
    answer = client.ask("GET", path)
    assert (answer.status, answer.content) == (404, NOTHING)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "192.168.1.7", "", "localhost.evil"]
)
def test_another_name_is_refused(client, host):
    """As a page of evil.example sees this computer, once its name was made to lead here."""
    answer = client.of_token("GET", "", Host=host)
    assert (answer.status, answer.content) == (421, NOTHING)


@pytest.mark.parametrize("host", ["localhost", "localhost:{port}", "127.0.0.1:{port}", "[::1]:{port}"])
def test_this_computers_names_are_let_in(client, host):
    assert client.of_token("GET", "", Host=host.format(port=client.port)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Origin": None},
        {"Origin": "http://127.0.0.1:1"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_only_the_page_itself_changes_anything(client, headers):
    for method, path in (("POST", "pages"), ("DELETE", "pages/x"), ("POST", "pages/x/files?path=a")):
        answer = client.of_token(method, path, b"{}", **headers)
        assert (answer.status, answer.content) == (403, NOTHING)
    assert client.of_token("POST", "pages", {}, **{"Sec-Fetch-Site": "same-origin"}).status == 201


def test_other_addresses_only_if_told():
    def ours(host, called):
        return Guard(None, TOKEN, host)._is_ours(called)

    assert ours("0.0.0.0", "192.168.1.7:8000")
    assert ours("0.0.0.0", "[fe80::1]:8000")
    assert not ours("0.0.0.0", "evil.example:8000")  # a name can be made to lead anywhere, an address cannot
    assert ours("scanner.local", "Scanner.local:8000")
    assert not ours("127.0.0.1", "192.168.1.7:8000")
    assert [is_loopback(host) for host in ("127.0.0.1", "::1", "localhost", "0.0.0.0", "a.b")] == [True] * 3 + [
        False
    ] * 2


def test_a_study_from_its_files_to_its_zips(client, address):
    client.open().give_study()
    found = client.finished("recognise")
    assert (found["files"], found["remarks"], found["job"]["state"]) == (2, {}, "done")
    (case,) = found["recognised"]["cases"]
    assert case["synthesise"] == ["t1c", "t2f"]
    made = client.finished("complete")
    assert made["job"]["error"] == ""
    (case,) = made["results"]["cases"]
    assert case["case"] == "Ann"
    assert case["verdict"] in ("use", "look", "refuse")
    seen = client.of_token("GET", f"pages/{client.key}/view/Ann/index.html")
    assert (seen.status, seen.headers["content-type"].split(";")[0]) == (200, "text/html")
    volume = client.of_token("GET", f"pages/{client.key}/view/Ann/0.nii.gz")
    assert nib.Nifti1Image.from_bytes(gzip.decompress(volume.content)).shape == (26, 28, 22)
    for path in (
        "view/Ann/9.nii.gz",
        "view/Ann/..%2f..%2fresult%2fmanifest.json",
        "view/Bob/index.html",
        "download/x.zip",
    ):
        assert client.of_token("GET", f"pages/{client.key}/{path}").status == 404
    for kind, name in (
        ("nifti", "Ann/Ann-t2f_synthetic.nii.gz"),
        ("bids", "sub-Ann/anat/sub-Ann_desc-synthetic_FLAIR.nii.gz"),
    ):
        answer = client.of_token("GET", f"pages/{client.key}/download/{kind}.zip")
        assert answer.headers["content-disposition"] == f'attachment; filename="Ann_SYNTHETIC_{kind}.zip"'
        with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
            assert archive.testzip() is None
            assert f"Ann_SYNTHETIC_{kind}/{name}" in archive.namelist()
            assert not [name for name in archive.namelist() if "private" in name or name.endswith(".log")]
            assert str(address[1]).encode() not in b"".join(archive.read(name) for name in archive.namelist())
    folder = address[1] / f"page-{client.key}"
    assert folder.exists()
    assert client.page("DELETE")[0] == 204
    assert not folder.exists()
    assert client.page("GET")[0] == 404


def test_a_choice_is_taken_and_nonsense_is_not(client):
    client.open()
    assert client.page("POST", "/recognise", {}) == (409, {"error": NO_FILE})
    assert client.page("POST", "/complete", {})[0] == 409
    client.give_study()
    for body in (b"[]", b"nonsense", b'{"choices": [1]}', b'{"choices": {"a": 1}}', b"[" * 100_000, bytes(2**22 + 1)):
        assert client.page("POST", "/recognise", body)[0] in (400, 413)
    assert client.page("POST", "/recognise", {"choices": {"Ann/Ann-t2w.nii": "t2f", "../../x": "t1n"}})[0] == 202
    (case,) = client.waited()["recognised"]["cases"]
    assert case["acquired"] == ["t1n", "t2f"]


def test_what_is_wrong_is_refused_and_the_page_goes_on(client, address):
    client.open()
    assert client.give("../../evil.nii", b"x")[0] == 400
    assert client.give("%2fetc%2fevil.nii", b"x")[0] == 400
    assert client.give("x.zip", b"PK\x03\x04nonsense")[0] == 415
    status, told = client.give("large.nii", bytes(2**19 + 1))
    assert (status, "more than" in told["error"]) == (413, True)
    assert client.give("page.html", b"<script>alert(1)</script>")[0] == 204
    client.give_study()
    assert client.give("Ann/Ann-t1n.nii", b"x")[0] == 409
    state = client.finished("recognise")
    assert "study/page.html" in state["remarks"]
    assert state["recognised"]["cases"][0]["synthesise"] == ["t1c", "t2f"]
    assert not list(address[1].rglob("*evil*"))
    assert not list(address[1].rglob("incoming*"))


def test_two_pages_at_once_have_nothing_of_one_another_and_a_place_in_the_queue(client, address):
    other = Client(address[0]).open()
    client.open()
    given = [threading.Thread(target=one.give_study, args=[case]) for one, case in ((client, "Ann"), (other, "Bob"))]
    for thread in given:
        thread.start()
    for thread in given:
        thread.join()
    for one, case in ((client, "Ann"), (other, "Bob")):
        assert [found["case"] for found in one.finished("recognise")["recognised"]["cases"]] == [case]
    client.page("POST", "/complete", {})
    status, told = other.page("POST", "/complete", {})
    assert (status, told["place"]) == (202, 1)
    assert client.page("POST", "/complete", {})[0] == 409  # it has one already
    assert client.give("more.nii", b"x")[0] == 409
    assert [one.waited()["results"]["cases"][0]["case"] for one in (other, client)] == ["Bob", "Ann"]
    assert client.of_token("GET", f"pages/{other.key}/view/Ann/index.html").status == 404
    names = [held["name"] for held in json.loads(client.of_token("GET", "pages").content)]
    assert {"Ann", "Bob"} <= set(names)
    other.page("DELETE")


def test_cancel_ends_what_runs_and_another_run_is_whole(client):
    client.open().give_study()
    client.finished("recognise")
    client.page("POST", "/complete", {})
    while client.page("GET")[1]["job"]["state"] == "waiting":
        time.sleep(0.01)
    assert client.page("POST", "/cancel", {})[1]["state"] == "cancelled"
    state = client.page("GET")[1]
    assert (state["results"], state["recognised"]["cases"][0]["case"]) == (None, "Ann")
    assert list(client.finished("complete")["results"]["cases"][0]["synthetic"]) == ["t1c", "t2f"]


def test_a_page_that_was_closed_is_deleted_with_its_job(client, address, monkeypatch):
    client.open().give_study()
    folder = address[1] / f"page-{client.key}"
    client.finished("recognise")
    client.page("POST", "/complete", {})
    monkeypatch.setattr(sessions, "FORGET_SECONDS", 0.3)
    monkeypatch.setattr(sessions, "LEAVE_SECONDS", 0.1)
    client.of_token("POST", f"pages/{client.key}/leave", b"")
    deadline = time.monotonic() + 15
    while folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    monkeypatch.undo()
    again = Client(address[0]).open()  # the worker was ended with the job; there is a new one
    again.give_study()
    assert again.finished("recognise")["recognised"] is not None
    again.page("DELETE")
    client.key = ""


def test_a_file_that_breaks_off_leaves_nothing(client, address):
    client.open()
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=10)
    own = {"Origin": f"http://127.0.0.1:{client.port}", "Content-Length": "400000"}
    connection.putrequest("POST", f"/{TOKEN}/pages/{client.key}/files?path=T1.nii")
    for name, value in own.items():
        connection.putheader(name, value)
    connection.endheaders(bytes(1000))
    folder = address[1] / f"page-{client.key}"
    while not list(folder.glob("incoming*")):
        time.sleep(0.01)
    connection.close()
    while list(folder.glob("incoming*")):
        time.sleep(0.01)
    state = client.page("GET")[1]
    assert (state["files"], state["bytes"]) == (0, 0)


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_the_folder_is_gone_however_it_ends(ending, tmp_path):
    model, place = save_untrained(tmp_path / "model"), tmp_path / "tmp"
    place.mkdir()
    arguments = ["crossmr", "app", "--no-open", "--device", "cpu", "--model", str(model)]
    code = f"import sys; sys.argv = {arguments!r}; from crossmr.cli import main; main()"
    environment = {**os.environ, "TMPDIR": str(place)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=-1, stderr=-1, text=True, env=environment)
    line = process.stdout.readline().strip()
    assert line.startswith("http://127.0.0.1:"), line + process.stderr.read()
    port, token = line.split("/")[2].rpartition(":")[2], line.split("/")[3]
    assert len(token) >= 32
    client = Client(int(port), token).open()
    client.give_study()
    (folder,) = place.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    assert list(folder.rglob("Ann-t1n.nii"))
    client.page("POST", "/recognise", {})
    process.send_signal(ending)
    process.wait(20)
    told = process.communicate()
    deadline = time.monotonic() + 20
    while list(place.glob("crossmr-*")):  # after SIGKILL the worker deletes it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert process.returncode == {signal.SIGTERM: 143, signal.SIGINT: 0, signal.SIGKILL: -9}[ending], told
    assert "Traceback" not in told[1]


def test_the_browser_is_not_told_the_token_in_its_arguments(tmp_path):
    way = server.write_way(tmp_path, f"http://127.0.0.1:1/{TOKEN}/")
    assert TOKEN not in way.as_uri()
    assert way.stat().st_mode & 0o777 == 0o600
    assert f"url=http://127.0.0.1:1/{TOKEN}/" in way.read_text()


def test_settings_that_make_no_sense_are_refused(address):
    with pytest.raises(ConfigError, match="--port is 70000"):
        AppSettings(port=70_000)
    with pytest.raises(ConfigError, match="--limit-gib"):
        AppSettings(limits=Limits(total=0))
    for size in ("nan", "inf", "0"):
        refused = CliRunner().invoke(app, ["app", "--no-open", "--limit-gib", size])
        assert isinstance(refused.exception, ConfigError)
        assert "--limit-gib is no size above 0" in str(refused.exception)
    taken = in_thread(CliRunner().invoke, app, ["app", "--no-open", "--port", str(address[0])])
    assert isinstance(taken.exception, ConfigError)
    assert f"--port {address[0]} cannot be listened on" in str(taken.exception)


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "starlette", None)
    told = CliRunner().invoke(app, ["app", "--no-open"])
    assert 'pip install "crossmr[app]"' in str(told.exception)


def test_no_file_of_the_page_is_missing():
    for path in (*server.STATIC.values(), server.PAGES / "index.html"):
        assert Path(path).is_file()
