"""The plan of the house: who may import whom, what importing costs, how large the rooms are."""

import ast
import json
import subprocess
import sys

import pytest

from ddpo_lib.book import paths

PACKAGE = paths.ROOT / "ddpo_lib"
FILES = sorted(PACKAGE.rglob("*.py"))
ABOVE = {"library": {"book", "toy"}, "book": set(), "toy": {"book"}}
"""Part → the parts that it must not import."""


def part(file):
    home = file.relative_to(PACKAGE).parts[0]
    return home if home in ("book", "toy") else "library"


def imported(file):
    """Dotted names that a file imports, wherever it does."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_arrows_run_one_way(file):
    parts = {name.split(".")[1] for name in imported(file) if name.startswith("ddpo_lib.")}
    assert not parts & ABOVE[part(file)]


def test_an_arrow_the_wrong_way_would_be_seen(tmp_path):
    file = tmp_path / "policy.py"
    file.write_text(
        "def f():\n    from ddpo_lib.book import paths\n    import ddpo_lib.toy.faces\n"
    )
    parts = {name.split(".")[1] for name in imported(file)}
    assert parts == ABOVE["library"]


def test_files_and_functions_are_short():
    """The diagrams, which are lists of boxes and arrows, count apart from the rest of the book, and
    the objectives from the rest of the library."""
    sizes = dict.fromkeys((*ABOVE, "diagrams", "objectives"), 0)
    for file in FILES:
        text = file.read_text(encoding="utf-8")
        n_lines = text.count("\n")
        apart = "diagrams" if file.stem in ("diagrams", "shapes") else file.parent.name
        sizes[apart if apart in sizes else part(file)] += n_lines
        assert n_lines <= 320, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{file}: {node.name}"
    limits = {"library": 3295, "objectives": 900, "book": 2230, "diagrams": 320}
    assert all(sizes[name] <= limit for name, limit in limits.items()), sizes


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_text_is_utf_8_whatever_the_locale(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) in ("os.open", "Image.open"):
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        binary = any(ast.unparse(each) in ("'rb'", "'wb'") for each in node.args)
        if name in ("read_text", "write_text") or (name in ("open", "fdopen") and not binary):
            told = {word.arg for word in node.keywords}
            assert "encoding" in told, f"{file}:{node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_files_are_written_whole_or_not_at_all(file):
    """As drafts of `disk.replacing`, but for what goes to a folder that is itself a draft."""
    if file.name in ("pipelines.py", "site.py") or part(file) == "toy" and file.stem != "make":
        return
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and node.attr in ("write_text", "write_bytes"):
            assert ast.unparse(node.value) == "draft", f"{file}:{node.lineno}"


def test_imports_are_cheap():
    """Bounds are generous: benchmarks/imports.py tells what they cost on an idle machine."""
    script = paths.ROOT / "benchmarks/imports.py"
    done = subprocess.run(
        [sys.executable, script, "--repeats", "1"], capture_output=True, text=True, check=True
    )
    added = json.loads(done.stdout)["added_s"]
    assert added["ddpo_lib.policy"] < 1 and added["ddpo_lib.objectives.ddpo"] < 1
    (notebook,) = (value for name, value in added.items() if "book.notebook" in name)
    assert notebook < 2.5
