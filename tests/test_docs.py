"""What the documents say exists: commands, options, files and functions."""

import contextlib
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.main import get_command

import crossmr
from crossmr.bids_app import parser
from crossmr.cli import app, main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
METHOD = (ROOT / "docs" / "method.md").read_text()
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text() for path in [*ROOT.glob("*.md"), *ROOT.glob("[a-z]*/*.md")]
}
SOURCES = {path: path.read_text() for path in (ROOT / "src").rglob("*.py")}
HOW_TO = (ROOT / "docs" / "how-to.md").read_text()
COMMANDS = re.findall(r"^(?:pip install \. && )?(crossmr [^#\n]+)", README + HOW_TO, flags=re.MULTILINE)


def test_readme_has_its_two_commands():
    assert "pip install . && crossmr demo -o demo" in README
    assert 'pip install -e ".[dev]" && pytest' in README


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_parses(command):
    _, *arguments = shlex.split(command)
    verb = get_command(app)
    while hasattr(verb, "commands"):  # 'models' has verbs of its own
        name, *arguments = arguments
        verb = verb.commands[name]
    assert verb.make_context(name, arguments).params


def commands(group, prefix=""):
    """Every verb of the command line, name → command, those of 'models' included."""
    for name, command in group.commands.items():
        yield f"{prefix}{name}", command
        if hasattr(command, "commands"):
            yield from commands(command, f"{name} ")


COMMANDS_AND_APP = [get_command(app), *(command for _, command in commands(get_command(app)))]
OPTIONS = {o for command in COMMANDS_AND_APP for p in command.params for o in (*p.opts, *p.secondary_opts)}
OPTIONS |= {option for action in parser()._actions for option in action.option_strings}
NOW = [text for page, text in PAGES.items() if page != "CHANGELOG.md"]  # which names what is gone
NAMED = sorted({option for text in NOW for option in re.findall(r"`(--[a-z][a-z-]*)", text)})


@pytest.mark.parametrize("option", NAMED)
def test_every_option_named_exists(option):
    assert option in OPTIONS | {"--help"}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"`([A-Za-z_]+(?:\.[A-Za-z_]+)*)`", METHOD))))
def test_every_function_that_the_method_names_exists(name):
    *places, last = name.split(".")
    place = places[-1] if places else ""
    settings = {
        "representation": "RepresentationConfig",
        "distribution": "DistributionConfig",
        "synthesis": "SynthesisConfig",
    }
    source = "\n".join(
        text
        for path, text in SOURCES.items()
        if not place or path.stem == place or f"class {settings.get(place, place)}" in text
    )
    known = rf"(def|class) {last}\b|^    {last}:|\"{last}\"|\b{last} =|\b{last}:"
    assert re.search(known, source, flags=re.MULTILINE), name


@pytest.mark.parametrize(("name", "path"), re.findall(r"\[`([A-Za-z_0-9.]+)`\]\(\.\./(src/[^)]+)\)", METHOD))
def test_every_function_is_linked_to_the_file_that_defines_it(name, path):
    owner, _, last = name.rpartition(".")
    text = (ROOT / path).read_text()
    assert re.search(rf"^ *(def|class) {last}\b", text, flags=re.MULTILINE), f"{path} does not define {name}"
    assert not owner or f"class {owner}" in text or Path(path).stem == owner.rpartition(".")[2], name


def anchors(text):
    """What a link may name in a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_exist(page):
    path, text = ROOT / page, PAGES[page]
    for link, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!https?:)([^)]+)\)", text)):
        target = path.parent / link if link else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), f"{link}#{anchor}"
    for script in re.findall(r"`((?:benchmarks/)?[a-z_]+\.py)`", text if "benchmarks" in page else ""):
        assert (ROOT / "benchmarks" / script.removeprefix("benchmarks/")).exists(), script


def test_every_benchmark_is_listed():
    listed = (ROOT / "benchmarks" / "README.md").read_text()
    for path in (ROOT / "benchmarks").glob("*.py"):
        assert f"`{path.name}`" in listed


def test_the_changelog_has_a_heading_for_this_version():
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text()


def in_small(script):
    """The tutorial's commands on fewer and coarser phantoms, in a tenth of the time."""
    for large, small in (
        (
            "{'shape': (72, 84, 40), 'spacing_mm': (2.6, 2.6, 4.5)}",
            "{'shape': (40, 48, 32), 'spacing_mm': (4.7, 4.6, 5.6)}",
        ),
        ("write_cohort('cohort', 8,", "write_cohort('cohort', 5,"),
        ("--minutes 0.4", "--minutes 0.04"),
    ):
        assert script.count(large) == 1, f"the tutorial says {large} no more"
        script = script.replace(large, small)
    return script


def test_the_tutorial_runs(tmp_path, monkeypatch, capfd):
    """Every command of docs/tutorial.md, in its order; crossmr's in this process, which spares the imports."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGES["docs/tutorial.md"], flags=re.MULTILINE | re.DOTALL)
    for command in re.split(r"\n(?=crossmr |ls )", in_small("\n".join(blocks))):
        if command.startswith("crossmr "):
            monkeypatch.setattr(sys, "argv", shlex.split(command))
            with pytest.raises(SystemExit) as stopped:
                main()
            assert not stopped.value.code, capfd.readouterr()
        else:
            code = re.fullmatch(r'python -c "(.*)"', command.strip(), flags=re.DOTALL)
            subprocess.run([sys.executable, "-c", code[1]] if code else command.split(), check=True)
    for made in (
        *("completed/report.html", "completed/view/PHANTOM-00000-000.html", "evaluation/report.html", "mine.zip"),
        *(f"completed/PHANTOM-00000-000/PHANTOM-00000-000-{m}_synthetic.nii.gz" for m in ("t1c", "t2f")),
    ):
        assert (tmp_path / made).stat().st_size > 1000


PYTHON = (ROOT / "docs" / "python.md").read_text()
EXAMPLES = re.findall(r"^```python\n(.*?)^```", PYTHON, flags=re.MULTILINE | re.DOTALL)
OF_TORCHIO = [example for example in EXAMPLES if "torchio" in example]


def run_example(example, names):
    """Run a piece of docs/python.md; what goes wrong is reported at its line there."""
    lines = PYTHON[: PYTHON.index(example)].count("\n")
    exec(compile("\n" * lines + example, ROOT / "docs" / "python.md", "exec"), names)


@pytest.fixture(scope="module")
def examples(tmp_path_factory):
    """The folder and the names after every example, but TorchIO's, one after the other."""
    folder, names = tmp_path_factory.mktemp("python"), {}
    with contextlib.chdir(folder):
        for example in EXAMPLES:
            if example not in OF_TORCHIO:
                run_example(example, names)
    return folder, names


def test_the_examples_in_python_run(examples):
    folder, names = examples
    for case, made in {"PHANTOM-00000-000": ("t1c", "t2f"), "PHANTOM-00001-000": ("t2f",)}.items():
        wanted = {"manifest.json", *(f"{case}-{m}_{what}.nii.gz" for m in made for what in ("synthetic", "std"))}
        assert {path.name for path in (folder / "completed" / case).iterdir()} == wanted
    assert list(names["result"].images) == ["t1c", "t2f"]
    assert names["array"].shape == names["t1"].shape == (48, 56, 32)
    assert names["measured"]["summary"]
    assert names["image"].shape == (4, 48, 56, 32)
    assert names["segmentation"].shape == (1, 3, 48, 56, 32)
    assert all(channel.std() > 0.5 for channel in names["image"])  # no contrast is empty


def test_the_example_with_torchio_runs(examples):
    pytest.importorskip("torchio", reason="TorchIO is not installed; pip install torchio")
    folder, names = examples
    with contextlib.chdir(folder):
        run_example(OF_TORCHIO[0], names := dict(names))
    assert set(names["filled"].get_images_dict()) == {"t1n", "t2w", "t1c", "t2f"}
    for image in names["filled"].get_images():
        assert image.shape == (1, 48, 56, 32)
        assert image.data.std() > 0.5
        assert (image.affine == names["t1"].affine).all()


def test_python_knows_every_public_name():
    _, table = PYTHON.split("## Every public name")
    assert set(re.findall(r"`([A-Za-z_]+)`", table)) == set(crossmr.__all__)


def test_the_reference_says_of_every_command_and_option_what_its_help_says_and_of_no_other():
    """docs/cli.md is made by: typer src/crossmr/cli.py utils docs --name crossmr --output docs/cli.md."""
    parts = re.split(r"^##+ `crossmr (.+)`$", (ROOT / "docs" / "cli.md").read_text(), flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    known = dict(commands(get_command(app)))
    assert sections.keys() == known.keys()
    for name, section in sections.items():
        command, plain = known[name], " ".join(section.split())
        assert " ".join(command.help.split()) in plain, name
        listed = dict(re.findall(r"^\* `([^`]+)`: (.*)", section.partition("**Commands**")[0], flags=re.MULTILINE))
        shown = [parameter for parameter in command.params if not getattr(parameter, "hidden", False)]
        for parameter in shown:
            helped = [heading for heading, text in listed.items() if text.startswith(parameter.help)]
            if parameter.opts[0].startswith("-"):
                helped = [heading for heading in helped if set(parameter.opts) <= set(re.split(r"[, /]+", heading))]
            assert helped, f"docs/cli.md is stale at {name} {parameter.name}"
        assert len(listed) == len(shown) + ("--help" in listed), f"docs/cli.md has more than {name} takes"


def test_the_rows_that_are_kept_print_their_tables_without_scans():
    """One process, since each script imports the same libraries."""
    folder = ROOT / "benchmarks"
    calls = [[path.stem] for path in sorted((folder / "rows").glob("*.jsonl")) if (folder / f"{path.stem}.py").exists()]
    calls += [["engine", "--scales"], ["realism", "--weights", "1"], ["rivals", "--differences"]]
    code = (
        "import json, runpy, sys\n"
        f"sys.path.insert(0, {str(folder)!r})\n"
        f"for name, *options in json.loads({json.dumps(json.dumps(calls))}):\n"
        f"    sys.argv = [name, '--table', '-o', {str(folder / 'rows')!r}, *options]\n"
        f"    print('==', name, *options)\n"
        f"    runpy.run_path({str(folder)!r} + f'/{{name}}.py', run_name='__main__')\n"
    )
    before = {path.name: path.read_bytes() for path in (folder / "rows").iterdir()}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    printed = result.stdout.split("== ")[1:]
    assert len(printed) == len(calls) >= 10
    assert all("|---" in text for text in printed)
    assert {path.name: path.read_bytes() for path in (folder / "rows").iterdir()} == before
