"""The house rules that a machine can check: layers, lint, types, and no unpickling."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import judge

import crossmr

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "crossmr"


def run(*command: str) -> None:
    result = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_imports_run_downwards():
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_ruff_format():
    run("ruff", "format", "--check", ".")


def test_ruff_check():
    run("ruff", "check", ".")


def test_mypy():
    run("mypy")


def test_nothing_is_ever_unpickled():
    for path in SOURCE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
            assert not {"pickle", "dill", "joblib", "shelve", "marshal"} & set(names), path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("torch.load", "pickle.load", "pickle.loads"), f"{path}: {called}"
                if called == "np.load":
                    keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                    assert keywords.get("allow_pickle") == "False", path


def test_public_names_exist_and_are_few():
    assert len(crossmr.__all__) <= 25
    for name in crossmr.__all__:
        assert getattr(crossmr, name).__doc__ or name == "RECIPES", name


def test_public_names_are_listed_once_for_python_and_type_checkers():
    """`__init__.pyi` imports each name under its own name, which is what makes it public to type checkers."""
    listed = re.findall(r"^from crossmr\S* import (\w+) as (\w+)$", (SOURCE / "__init__.pyi").read_text(), re.MULTILINE)
    assert [name for name, _ in listed] == [name for _, name in listed]
    assert sorted(name for name, _ in listed) == crossmr.__all__
    assert set(crossmr.__all__) < set(dir(crossmr))
    with pytest.raises(AttributeError, match="module 'crossmr' has no attribute 'complet'"):
        _ = crossmr.complet


def test_importing_crossmr_loads_nothing_heavy():
    code = "import sys, crossmr; dir(crossmr); sys.exit(bool({'torch', 'nibabel', 'monai'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def imported(path: Path) -> set[str]:
    """Every module of crossmr that a file imports, or from which it imports a name."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name for name in names if name.startswith("crossmr.")}


def test_every_module_has_its_tests():
    """tests/test_<module>.py imports it; where two rooms have a module of that name, test_<room>_<module>.py does."""
    modules = [path for path in SOURCE.rglob("*.py") if path.parent.name != "phantom" and path.stem != "__init__"]
    stems = [path.stem for path in modules]
    for path in modules:
        room = path.parent.name
        names = [f"test_{room}_{path.stem}.py", *([f"test_{path.stem}.py"] if stems.count(path.stem) == 1 else [])]
        tests = [ROOT / "tests" / name for name in names if (ROOT / "tests" / name).exists()]
        assert tests, f"{path} has no tests/{names[-1]}"
        module = ".".join(("crossmr", *path.relative_to(SOURCE).with_suffix("").parts))
        assert any(module in imported(test) for test in tests), f"{tests[0].name} does not import {module}"
    assert "crossmr.phantom" in imported(ROOT / "tests" / "test_phantom.py")  # one test for that room


def mapped(page: str) -> set[str]:
    """The modules in CONTRIBUTING.md's map, as paths below src/crossmr: a room's lines are indented below its own."""
    (tree,) = re.findall(r"^```\nsrc/crossmr/\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    paths, room = set(), ""
    for line in tree.partition("\nsrc/")[0].splitlines():
        indent, text = len(line) - len(line.lstrip()), line.strip()
        if indent == 2:
            room = text.split()[0] if text.split()[0].endswith("/") else ""
        names = [p.name for p in (SOURCE / room).glob("*.py") if p.stem in text] if room == "phantom/" else []
        paths |= {room + name for name in names or re.findall(r"\w+\.py\b", text)}
    return paths


def test_the_map_names_every_module_and_no_other():
    modules = {path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py") if path.stem != "__init__"}
    assert mapped((ROOT / "CONTRIBUTING.md").read_text()) == modules


def test_nothing_pulls_torchvision_or_downloads():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not [d for d in dependencies if "torchvision" in d or "torchmetrics" in d]
    for path in SOURCE.rglob("*.py"):
        assert not re.search(r"\b(urllib|(?<!starlette\.)requests|httpx|socket|from_pretrained)\b", path.read_text()), (
            path
        )


@pytest.mark.parametrize(("required", "ends"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_a_judge_that_is_not_there_fails_where_judges_are_required(monkeypatch, required, ends):
    monkeypatch.setenv("CROSSMR_REQUIRE_JUDGES", required)
    with pytest.raises(ends, match="no-such-judge is not on this machine; install some-package"):
        judge("some-package", "no-such-judge", "nor-such")
    assert Path(judge("python", "no-such-judge", sys.executable)) == Path(sys.executable)
