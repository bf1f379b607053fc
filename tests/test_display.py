"""Lines in a log, a bar in a terminal, nothing when quiet."""

import io

import pytest

from crossmr import display
from crossmr.display import SILENT, Display
from crossmr.errors import ConfigError


@pytest.fixture
def clock(monkeypatch):
    """A clock that is moved by hand."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(display, "time", clock)
    return clock


def terminal(shown):
    shown.console._force_terminal = True
    shown.console.file = io.StringIO()
    return shown.console.file


def test_a_log_gets_plain_lines(capsys):
    Display().say("one")
    Display().say("two")
    assert capsys.readouterr().out == "one\ntwo\n"


@pytest.mark.parametrize("text", ["[bold]x[/bold] [0, 1]", "sub:brain:t1n", "x" * 500, "30 % of /a/b"])
def test_a_line_is_printed_as_it_is(capsys, text):
    Display().say(text)
    assert capsys.readouterr().out == text + "\n"


def test_the_end_of_a_job_is_a_line(capsys):
    with Display().task("synthesis", 3) as task:
        for _ in range(3):
            task.advance("loss 0.5")
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("synthesis: 3/3  loss 0.5")


def test_a_long_job_is_a_line_now_and_then_with_the_time_left(capsys, clock):
    with Display().task("synthesis", 100, done=40) as task:
        for _ in range(20):
            clock.now += 2
            task.advance()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["48/100", "56/100"]  # 16 s apart
    assert lines[0].endswith("104 s left")  # 52 steps of 2 s: the 40 done before cost nothing
    assert lines[1].endswith("88 s left")


def test_quiet_shows_nothing(capsys, clock):
    for shown in (SILENT, Display(quiet=True)):
        shown.say("secret")
        with shown.task("job", 2) as task:
            clock.now += 100
            task.advance("a")
            task.advance("b")
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar():
    shown = Display()
    file = terminal(shown)
    with shown.task("[job]", 4, done=1) as task:
        task.advance("[loss] 0.25")
        task.advance("[loss] 0.125")
    text = file.getvalue()
    assert "3/4" in text
    assert "[job]" in text
    assert "[loss] 0.125" in text


def test_a_quiet_terminal_gets_nothing():
    shown = Display(quiet=True)
    file = terminal(shown)
    with shown.task("job", 1) as task:
        task.advance()
    shown.say("secret")
    assert file.getvalue() == ""


def test_an_error_within_a_job_passes():
    shown = Display()
    terminal(shown)
    with pytest.raises(ZeroDivisionError), shown.task("job", 1):
        raise ZeroDivisionError


def test_a_log_keeps_every_line_and_says_that_it_is_not_for_sharing(tmp_path, capsys):
    for text in ("one", "two"):
        with Display(quiet=True).logged(tmp_path / "crossmr.log") as logging:
            logging.say(text)
            logging.say_failure(f"{text}\nfailed")
    first, *lines = (tmp_path / "crossmr.log").read_text().splitlines()
    assert first.startswith("crossmr log.")
    assert "not for sharing" in first
    assert [line[20:] for line in lines] == ["one", "one failed", "two", "two failed"]
    assert capsys.readouterr() == ("", "one failed\ntwo failed\n")


@pytest.mark.parametrize("link", [False, True])
def test_a_file_or_link_that_is_no_log_is_not_touched(tmp_path, link, capsys):
    target = tmp_path / "crossmr.log"
    if link:
        target.symlink_to(tmp_path / "elsewhere")
    else:
        target.write_text("a stranger's\n")
    with Display().logged(target) as logging:
        logging.say("shown")
    assert capsys.readouterr().out == "shown\n"
    assert not (tmp_path / "elsewhere").exists()
    assert link or target.read_text() == "a stranger's\n"


def test_the_traceback_of_an_unforeseen_error_is_in_the_log_and_that_of_a_refusal_is_not(tmp_path):
    with pytest.raises(ConfigError), SILENT.logged(tmp_path / "refused.log"):
        raise ConfigError("no")
    assert not (tmp_path / "refused.log").exists()
    with pytest.raises(ZeroDivisionError), SILENT.logged(tmp_path / "crossmr.log"):
        raise ZeroDivisionError("by zero")
    assert "Traceback" in (tmp_path / "crossmr.log").read_text()


@pytest.mark.parametrize("debug", [False, True])
def test_an_unforeseen_error_says_where_its_traceback_is(tmp_path, debug, capsys):
    said = []
    for shown in (Display(debug=debug), Display(debug=debug).log_to(tmp_path / "crossmr.log")):
        try:
            _ = 1 / 0
        except ZeroDivisionError as error:
            said.append(shown.unforeseen(error))
    assert said[0] == "ZeroDivisionError: division by zero; --debug shows the traceback"
    assert said[1] == "ZeroDivisionError: division by zero; the traceback is in crossmr.log"
    assert "_ = 1 / 0" in (tmp_path / "crossmr.log").read_text()
    assert ("_ = 1 / 0" in capsys.readouterr().err) == debug
