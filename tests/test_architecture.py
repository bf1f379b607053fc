"""The house rules that a machine can check: layers, lint, types, and no unpickling."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

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


def test_every_module_has_its_tests():
    """tests/test_<module>.py, or, where two rooms have a module of that name, test_<room>_<module>.py as well."""
    modules = [path for path in SOURCE.rglob("*.py") if path.parent.name != "phantom" and path.stem != "__init__"]
    tests = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    stems = [path.stem for path in modules]
    for path in modules:
        assert path.stem in tests or f"{path.parent.name}_{path.stem}" in tests, path
        if stems.count(path.stem) > 1:
            assert f"{path.parent.name}_{path.stem}" in tests, path
    assert "phantom" in tests  # one test for that house


def test_the_map_names_every_module():
    """Each room's modules are named within CONTRIBUTING.md's map, after their room."""
    _, _, page = (ROOT / "CONTRIBUTING.md").read_text().partition("## The map\n```\n")
    file_map, _, _ = page.partition("```")
    for path in SOURCE.rglob("*.py"):
        if path.stem != "__init__":
            room = path.parent.name if path.parent != SOURCE else "crossmr"
            _, _, rest = file_map.partition(f"{room}/")
            words = (path.name, path.stem) if room == "phantom" else (path.name,)
            assert any(word in rest for word in words), f"{path} is not in CONTRIBUTING.md's map"


def test_nothing_pulls_torchvision_or_downloads():
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    assert not [d for d in dependencies if "torchvision" in d or "torchmetrics" in d]
    for path in SOURCE.rglob("*.py"):
        assert not re.search(r"\b(urllib|requests|httpx|socket|from_pretrained)\b", path.read_text()), path
