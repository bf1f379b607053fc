"""Lines in a log, a bar in a terminal, nothing when quiet."""

import io

import pytest

from crossmr import display
from crossmr.display import SILENT, Display


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
