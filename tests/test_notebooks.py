"""The notebooks: how they are built, and that they run from anywhere and draw what they declare."""

import ast
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ddpo_lib import runs
from ddpo_lib.book import batch, figures, paths, profiles, results
from ddpo_lib.objectives import ddpo
from ddpo_lib.settings import Finetune

WORLDS = ("toy", "thesis")
SETTINGS = (Finetune, ddpo.Settings)
NOTEBOOKS = sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb"))


def read(name):
    return nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4)


def parameters(name) -> dict:
    """The parameters cell's names and literals."""
    [cell] = [c for c in read(name).cells if "parameters" in c.metadata.get("tags", [])]
    assert cell.source.startswith("# Parameters\n")
    statements = ast.parse(cell.source).body
    assert all(isinstance(statement, ast.Assign) for statement in statements)
    return {s.targets[0].id: ast.literal_eval(s.value) for s in statements}


def main_output(name) -> str:
    """The kind that a notebook must show: an image, or, if it makes tables alone, a table."""
    made = [] if name == "50_finetune" else batch.contents()[name].makes
    tables_alone = made and all(each.startswith("table") for each in made)
    return "text/html" if tables_alone else "image/png"


def test_batch_has_every_notebook():
    assert sorted(["50_finetune", *batch.contents()]) == NOTEBOOKS


def test_what_needs_known_factors_is_made_in_the_toy_world_alone():
    toy, thesis = (batch.contents()["57_mode_collapse"].files(profiles.load(p)) for p in WORLDS)
    assert set(toy) - set(thesis) == {"extra_57_proxy_and_true.png", "extra_57_proxy_and_true.pdf"}


def test_batch_makes_every_artefact_of_the_thesis():
    made = {figures.identifier(name) for entry in batch.contents().values() for name in entry.makes}
    chapters = {1: [1], 2: [1, 2, 3, 4, 6, 7, 8], 3: [1, 3], 4: [1, 2, 3, 4], 5: range(1, 15)}
    appendices = {"A": [1], "B": range(1, 5), "C": range(1, 9), "D": range(1, 5)}
    wanted = {f"{part}.{n}" for part, ns in (chapters | appendices).items() for n in ns}
    wanted |= {"table 5.1", "table A.1", "table A.2"}
    own = re.compile(r"(extra|table) [0-9]{2}")  # of notebooks, which the thesis does not have
    assert {identifier for identifier in made if not own.fullmatch(identifier)} == wanted


def test_committed_figures_are_what_the_committed_notebooks_draw():
    """All there, none blank, none stale."""
    manifest = [entry for entry in figures.manifest() if entry["profile"] == "toy"]
    declared = {name: notebook for notebook, e in batch.contents().items() for name in e.makes}
    assert {entry["name"]: entry["notebook"] for entry in manifest} == declared
    made = {run.name for run in profiles.load("toy").batch()}
    for entry in manifest:
        assert entry["code"] == figures.code_hash(entry["notebook"]), entry["name"]
        assert set(entry["source_runs"]) <= made
        check_files(entry, paths.FIGURES)


def check_files(entry, folder):
    """The artefact's files are the ones that the manifest knows, and show something."""
    assert len(entry["files"]) == len(entry["sha256"]) > 0
    for file in entry["files"]:
        content = (folder / file).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"][file.split("/")[1]], file
        if file.endswith(".png"):
            assert np.asarray(Image.open(folder / file).convert("L")).std() > 5, file
        elif file.endswith(".pdf"):
            assert len(content) > 5000
        else:
            assert len(pd.read_csv(folder / file)) > 1


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_complete(name):
    code = [cell for cell in read(name).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    shown = {kind for cell in code for output in cell.outputs for kind in output.get("data", {})}
    assert main_output(name) in shown


def test_readme_has_every_notebook_and_the_numbers_of_table_5_1():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    assert sorted(set(re.findall(r"\(notebooks/(\w+)\.ipynb\)", readme))) == NOTEBOOKS
    assert all((paths.ROOT / link).exists() for link in re.findall(r"\((figures/\S+)\)", readme))
    for row in pd.read_csv(paths.FIGURES / "toy" / "table_5_1.csv").itertuples():
        before = f"{row.baseline_mean:.3f} ± {row.baseline_se:.3f}".replace("-", "−")
        after = f"{row.ddpo_mean:.3f} ± {row.ddpo_se:.3f}".replace("-", "−")
        assert f"| {before} | {after} | {row.effect_size:.2f} |" in readme, row.task


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_parameters_cell_has_literals_and_profile_first(name):
    values = parameters(name)
    assert next(iter(values.items())) == ("profile", "toy")
    assert {type(value) for value in values.values()} <= {str, int, float, bool, type(None)}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_is_built_like_every_other(name):
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    number = name.split("_")[0]
    assert notebook.cells[0].source.startswith(f"# {number} · ")
    colab, given, begin, *_, last = [c.source for c in notebook.cells if c.cell_type == "code"]
    assert "google.colab" in colab and len(colab.splitlines()) <= 5
    assert given.startswith("# Parameters")
    assert f'notebook.begin("{name}")' in begin
    assert re.search(r"^ *assert ", last, re.MULTILINE)


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_committed_outputs_are_fit_to_read(name):
    """No failures, dead progress bars or paths of the machine that made them; small."""
    notebook = read(name)
    outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert "application/vnd.jupyter.widget-view+json" not in str(outputs)
    assert not {"widgets", "papermill"} & set(notebook.metadata)
    assert "injected-parameters" not in str([c.metadata for c in notebook.cells])
    text = "\n".join(
        str(o.get("text", "")) + "".join(v for k, v in o.get("data", {}).items() if "text" in k)
        for o in outputs
    )
    assert not re.search(r"/(home|root|Users|tmp|work|content|mnt)/", text)
    assert (paths.NOTEBOOKS / f"{name}.ipynb").stat().st_size < 5e6  # a page of 64x64 images


@pytest.mark.parametrize("name", [name for name in NOTEBOOKS if name[0] in "234567"])
def test_chapters_ask_answer_and_solve(name):
    """A question at the start and its answer at the end; in chapters 2 and 3 every exercise has a
    folded solution, in the others at least one."""
    notebook = read(name)
    assert "**Question.**" in notebook.cells[0].source
    prose = "\n".join(c.source for c in notebook.cells if c.cell_type == "markdown") + "\n"
    parts = [prose.index(f"\n## {title}\n") for title in ("Exercises", "Answer", "What holds")]
    assert parts == sorted(parts)
    exercises = re.findall(r"^[0-9]+\. ", prose[parts[0] : parts[1]], re.MULTILINE)
    solutions = [c for c in notebook.cells if "solution" in c.metadata.get("tags", [])]
    if name[0] in "23":
        assert len(solutions) == len(exercises) > 0
    assert solutions
    for cell in solutions:
        assert cell.metadata.jupyter.source_hidden
        assert re.search(r"^ *assert ", cell.source, re.MULTILINE)


def test_every_equation_of_the_thesis_has_its_place():
    """As a numbered formula of a notebook, in a docstring, or in docs/fidelity.md."""
    cells = [cell.source for name in NOTEBOOKS for cell in read(name).cells]
    tags = ", ".join(re.findall(r"\\tag\{([^}]*)\}", "\n".join(cells)))
    library = [file.read_text() for file in (paths.ROOT / "ddpo_lib").rglob("*.py")]
    named = ", ".join(re.findall(r"[Ee]quations? (\d\.\d+)", "\n".join(library)))
    fidelity = (paths.ROOT / "docs/fidelity.md").read_text()
    refused = ", ".join(re.findall(r"\((\d\.\d+)\)", fidelity))
    chapters = {2: range(4, 29), 3: range(1, 26), 4: range(1, 6)}
    wanted = [f"{chapter}.{n}" for chapter, numbers in chapters.items() for n in numbers]
    found = set(re.findall(r"\d\.\d+", f"{tags} {named} {refused}"))
    assert not [number for number in wanted if number not in found]


def test_finetune_notebook_takes_every_setting():
    own = {"profile", "policy", "task", "seed"}
    settings = {field.name for kind in SETTINGS for field in dataclasses.fields(kind)}
    settings |= {"reward", "objective", "jpeg_encoding", "guidance"}
    values = parameters("50_finetune")
    assert set(values) == own | settings
    assert all(values[name] is None for name in settings)


def test_published_numbers():
    table = pd.read_csv(paths.THESIS / "table_5_1.csv")
    effects = (table.ddpo_mean - table.baseline_mean).abs() / (table.baseline_se * table.n**0.5)
    assert effects.round(2).tolist() == [1.49, 2.37, 0.91, 2.81, 1.14, 2.07, 2.25]
    hyperparameters = pd.read_csv(paths.THESIS / "table_a_2.csv", index_col="setting")
    for field in (field for kind in SETTINGS for field in dataclasses.fields(kind)):
        if field.name in hyperparameters.index and field.name != "peak_learning_rate":
            published = hyperparameters.compressibility[field.name]
            assert pd.isna(published) or field.type(published) == field.default, field.name


def test_smoke_profile_has_the_runs_of_the_toy_profile():
    smoke, toy = profiles.load("smoke"), profiles.load("toy")
    assert smoke.policies == toy.policies and smoke.models == toy.models
    assert {run.name for run in toy.batch()} == {run.name for run in smoke.batch()}
    assert {run.name: run.reward for run in toy.batch()} == {
        run.name: run.reward for run in smoke.batch()
    }


# Running them -------------------------------------------------------------------------------------


def call(root, where, *arguments):
    """Run a Python module as a user would, with the tests' project folder."""
    env = os.environ | {"DDPO_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    env.pop("MPLBACKEND", None)  # the kernel's own, which shows figures in the notebook
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=where,
        env=env,
        capture_output=True,
        text=True,
        timeout=600,
    )


def papermill(root, where, name, *arguments):
    notebook = paths.NOTEBOOKS / f"{name}.ipynb"
    arguments = ("--no-progress-bar", *arguments)
    return call(root, where, "papermill", notebook, where / f"{name}.ipynb", *arguments)


@pytest.fixture(scope="module")
def executed(root, tmp_path_factory):
    """Every notebook, run by papermill on the smoke profile from a folder outside the project.

    The first makes the finetunings that the others need.
    """
    where = tmp_path_factory.mktemp("elsewhere")

    def execute(name):
        return papermill(root, where, name, "-p", "profile", "smoke")

    first = "51_what_the_seeds_agree_on"
    others = [name for name in NOTEBOOKS if name != first]
    with ThreadPoolExecutor(2) as pool:
        finished = [execute(first), *pool.map(execute, others)]
    for name, done in zip([first, *others], finished, strict=True):
        assert done.returncode == 0, f"{name}:\n{done.stderr[-3000:]}"
    return where


def test_every_notebook_runs_from_another_folder(executed, root):
    for name in NOTEBOOKS:
        notebook = nbformat.read(executed / f"{name}.ipynb", as_version=4)
        outputs = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs]
        assert not [o for o in outputs if o.get("name") == "stderr"]
        assert [o for o in outputs if main_output(name) in o.get("data", {})]
        assert "widget-view" not in str(outputs)
        assert str(root) not in str(outputs)


def test_declared_figures_are_there_and_not_blank(executed, root):
    manifest = {
        e["name"]: e
        for e in json.loads((root / "figures" / "manifest.json").read_text(encoding="utf-8"))
    }
    declared = {name: notebook for notebook, e in batch.contents().items() for name in e.makes}
    assert sorted(manifest) == sorted(declared)
    for name, notebook in declared.items():
        entry = manifest[name]
        assert entry["notebook"] == notebook and entry["profile"] == "smoke"
        assert set(entry["source_runs"]) <= {run.name for run in profiles.load("smoke").batch()}
        check_files(entry, root / "figures")


def test_table_5_1_has_its_seven_rows(executed, root):
    table = pd.read_csv(root / "figures" / "smoke" / "table_5_1.csv")
    assert table.columns.tolist() == results.COLUMNS
    assert table.groupby("policy").size().to_dict() == {"faces": 4, "churches": 3}
    assert (table.n == 20).all()


def test_finished_finetuning_is_marked_complete(executed, root):
    home = root / "data" / "runs" / "smoke" / "faces-compressibility-s0"
    assert json.loads((home / "evaluation.json").read_text(encoding="utf-8"))["n"] == 20


ONE_OF_EACH = [name for i, name in enumerate(NOTEBOOKS) if i == 0 or name[0] != NOTEBOOKS[i - 1][0]]
"""The first notebook of each chapter."""


@pytest.mark.parametrize("names", [ONE_OF_EACH, pytest.param(NOTEBOOKS, marks=pytest.mark.slow)])
def test_notebooks_pass_nbval(executed, root, tmp_path, names):
    """Top to bottom in a fresh kernel, as in JupyterLab after editing the profile by hand. All
    have been run by papermill, so one of each chapter will do where time is short."""

    def nbval(name):
        text = (paths.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8")
        copy = tmp_path / f"{name}.ipynb"
        copy.write_text(text.replace('profile = \\"toy\\"', 'profile = \\"smoke\\"'))
        assert copy.read_text(encoding="utf-8") != text
        return call(root, tmp_path, "pytest", "--nbval-lax", "-p", "no:cacheprovider", copy)

    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(nbval, names):
            assert done.returncode == 0, done.stdout[:3000]


def test_own_reward_by_name(executed, root, tmp_path):
    """A reader's reward, imported from the folder that papermill runs in."""
    (tmp_path / "my_rewards.py").write_text(
        "def blueness(images):\n    return images[:, 2].mean((1, 2))\n"
    )
    own = ["-p", "task", "blue", "-p", "reward", "my_rewards:blueness", "-p", "n_iterations", "1"]
    done = papermill(root, tmp_path, "50_finetune", "-p", "profile", "smoke", *own)
    assert done.returncode == 0, done.stderr[-3000:]
    home = root / "data/runs/smoke/faces-blue-s0"
    settings = json.loads((home / "settings.json").read_text(encoding="utf-8"))
    assert settings["identity"]["reward"]["name"] == "blueness"
    assert runs.iterations_done(home) == 1


def test_misspelled_parameter_stops_before_anything_runs(root, tmp_path):
    before = sorted(root.rglob("*"))
    done = papermill(
        root, tmp_path, "58_galleries", "-p", "profil", "smoke", "-p", "n_columns", "5"
    )
    assert done.returncode != 0
    assert "unknown parameter ['profil']" in done.stderr
    assert "'n_columns'" in done.stderr  # says what the notebook takes
    assert sorted(root.rglob("*")) == before
