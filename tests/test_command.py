"""What the commands share: the options of messages, the last sentence, and the checks of what is given."""

import json

import pytest
import typer
from typer.testing import CliRunner

from crossmr import command
from crossmr.command import (
    MESSAGE_OPTIONS,
    Summary,
    check_extra,
    check_paths,
    mapping_of,
    modalities_of,
    pairs,
    speaks,
)
from crossmr.errors import ConfigError, ModelError, NamingError, OutputError

FAILED = Summary({"failed": 1, "made": 2, "kept": 0}, {"Bob": "no scan"}, "in out", {"more": 3}, ["Ann: made t2f"])


def call(function, *arguments):
    """Run a function as a command."""
    app = typer.Typer()
    app.command()(function)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def count(number: int, *, display) -> Summary | None:
    """Count up to NUMBER."""
    display.say(f"counting to {number}")
    return FAILED if number else None


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No test speaks as the one before."""
    monkeypatch.setattr(command, "messages", command.Messages())


def test_a_command_has_the_options_of_messages_in_place_of_its_display():
    shown = call(speaks()(count), "--help").stdout
    assert "Count up to NUMBER." in shown
    assert all(flag in shown for flag in ("--quiet", "--debug", "--json"))
    assert "display" not in shown
    some = call(speaks("quiet", "debug")(count), "--help").stdout
    assert "--quiet" in some
    assert "--json" not in some
    assert call(speaks("quiet", "debug")(count), "1", "--json").exit_code == 2


def test_what_a_command_returns_is_said_after_what_it_said():
    result = call(speaks()(count), "4")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == ["counting to 4", "Ann: made t2f", "3 studies: 1 failed, 2 made; in out"]
    assert result.stderr == "Bob failed: no scan\n"
    nothing = call(speaks()(count), "0")
    assert (nothing.exit_code, nothing.stdout) == (0, "counting to 0\n")


def test_json_alone_is_on_the_standard_output():
    result = call(speaks()(count), "4", "--json")
    counts = {"failed": 1, "made": 2, "kept": 0}
    assert json.loads(result.stdout) == {"more": 3, "counts": counts, "failed": {"Bob": "no scan"}}
    assert "3 studies: 1 failed, 2 made; in out" in result.stderr
    assert call(speaks()(count), "4").stdout.startswith("counting")  # asked for once, not for ever


def test_quiet_leaves_failures():
    result = call(speaks()(count), "4", "--quiet")
    assert (result.stdout, result.stderr) == ("", "Bob failed: no scan\n")


def test_a_summary_without_failures_ends_well_and_is_kept_in_its_log(tmp_path):
    def make(*, display) -> Summary:
        return Summary({"failed": 0, "made": 1}, {}, "in out", {}, log=tmp_path / "a.log")

    result = call(speaks()(make))
    assert result.exit_code == 0
    assert result.stdout == "1 study: 0 failed, 1 made; in out\n"
    assert "1 study: 0 failed, 1 made; in out\n" in (tmp_path / "a.log").read_text()


def test_what_is_doubtful_is_no_success():
    def doubt(*, display) -> Summary:
        return Summary({"failed": 0, "made": 1}, {}, "in out", {}, doubtful=True)

    assert call(speaks()(doubt)).exit_code == 1


def test_every_option_of_messages_is_one_of_their_attributes():
    assert [*MESSAGE_OPTIONS, "silent"] == [*vars(command.Messages())]  # no option: of the other ranks of a training


def test_wrong_paths_are_refused_and_what_is_not_given_is_not(tmp_path):
    (tmp_path / "file").write_text("in the way")
    check_paths(out=tmp_path / "new", studies=[tmp_path, None], models=[None])
    check_paths()
    for wrong, error in (
        ({"out": tmp_path / "file"}, OutputError),
        ({"studies": [tmp_path, tmp_path / "gone"]}, NamingError),
        ({"models": [None, tmp_path]}, ModelError),
    ):
        with pytest.raises(error):
            check_paths(**wrong)


def test_an_extra_that_is_not_installed_is_named():
    check_extra("app", "json", "typer")
    with pytest.raises(ConfigError, match=r'nor_this and nor_that not installed.*pip install "crossmr\[app\]"'):
        check_extra("app", "json", "nor_this", "nor_that")


def test_pairs_and_modalities():
    assert pairs(["a = b", "c=d=e"], "--set", "x=1") == {"a": "b", "c": "d=e"}
    assert pairs(None, "--set", "x=1") == {}
    for wrong in ("a", "=b", "a="):
        with pytest.raises(ConfigError, match=f"--set is '{wrong}'; expected KEY=VALUE, such as x=1"):
            pairs([wrong], "--set", "x=1")
    assert pairs(["a=1", "a=2"], "--set", "x=1") == {"a": "2"}
    assert mapping_of(["t1n=*_A*", "t2w=*_T2*", "t1n =*_B*"]) == {"t1n": "*_A*|*_B*", "t2w": "*_T2*"}
    assert modalities_of(["T1ce, FLAIR"]) == modalities_of(["T1ce", "FLAIR"]) == ("t1c", "t2f")
    assert modalities_of(None) is modalities_of([]) is None
    with pytest.raises(ConfigError, match="t1x"):
        modalities_of(["t1x"])
