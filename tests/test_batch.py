"""Around the batch: what it plans, what stops it early, what it leaves for readers."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from ddpo_lib.book import batch, finetuning, paths, profiles

NAMES = ("50_finetune", *batch.contents())


def snakemake(*arguments, **options):
    """Snakemake's standard output and error, of the project's Snakefile."""
    command = [sys.executable, "-m", "snakemake", "-s", paths.ROOT / "Snakefile", "--nolock"]
    programs = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    env = os.environ | {"PATH": programs} | options.pop("env", {})
    done = subprocess.run(
        [*command, "--cores", "2", *arguments], env=env, capture_output=True, text=True, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_batch_runs_every_notebook_with_its_parameters(root):
    env = {"DDPO_ROOT": str(root)}
    planned = snakemake("-n", "-p", "--forceall", "--config", "profile=toy", cwd=root, env=env)
    for run in profiles.load("toy").batch():
        given = f"-p profile toy -p policy {run.policy} -p task {run.task} -p seed {run.seed} "
        assert f"50_finetune-{run.name}.ipynb {given}" in planned
    for notebook in batch.contents():
        assert f"notebooks/{notebook}.ipynb -p profile toy " in planned
    assert not (root / "data").exists()  # a look


def test_nothing_reaches_a_shell_unquoted():
    """But for a seed, which is a whole number."""
    text = (paths.ROOT / "Snakefile").read_text(encoding="utf-8")
    placeholders = re.findall(r"\{(?:input|output|log|params)[^{}]*\}", text)
    assert len(placeholders) > 8 and "{{params.{name}:q}}" in text
    assert {each for each in placeholders if not each.endswith(":q}")} == {"{params.seed}"}


def test_contents_name_every_notebook_and_what_it_saves():
    """A new notebook, or a new figure, has to be entered."""
    files = {
        file.stem: file.read_text(encoding="utf-8") for file in paths.NOTEBOOKS.glob("*.ipynb")
    }
    assert sorted(files) == sorted(NAMES)
    for name, entry in batch.contents().items():
        assert entry.seconds > 0 and set(entry.toy_only) <= set(entry.makes)
        saved = set(re.findall(r'(?:fig|table|extra)_\w+(?=\\")', files[name]))
        assert saved - set(entry.makes) <= {"fig_c_", "fig_b_", "fig_d_"} | {
            "table_a_2",
            "table_5_1",
        }
        assert len(entry.makes) == len(set(entry.makes))
    toy, thesis = profiles.load("toy"), profiles.load("thesis")
    entry = batch.Notebook(1, ["fig_1_1_a", "table_1_2", "extra_57_b"], ["extra_57_b"])
    assert entry.files(thesis) == ["fig_1_1_a.png", "fig_1_1_a.pdf", "table_1_2.csv"]
    assert entry.files(toy) == [*entry.files(thesis), "extra_57_b.png", "extra_57_b.pdf"]


def test_parameters_of_a_notebook():
    found = batch.parameters("50_finetune")
    defaults = [ast.literal_eval(found[name]) for name in ("profile", "seed", "eta")]
    assert defaults == ["toy", 0, None]
    cell = "# Parameters\na = 1\nb = {'c': -2}\nc = a / 3\nd, e = 1, 2\nprint(a)\n"
    assert list(batch.assigned(cell)) == ["a", "b", "c"]


@pytest.fixture
def notebooks(tmp_path, monkeypatch):
    """A folder of the project's notebooks, to be changed."""
    folder = tmp_path / "notebooks"
    shutil.copytree(paths.NOTEBOOKS, folder, ignore=shutil.ignore_patterns(".*"))
    monkeypatch.setattr(paths, "NOTEBOOKS", folder)
    return folder


def test_misspelled_parameter_fails_before_anything_runs(notebooks):
    file = notebooks / "50_finetune.ipynb"
    notebook = json.loads(file.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if "parameters" in cell["metadata"].get("tags", []):
            source = "".join(cell["source"])
            cell["source"] = re.sub(r"^task\b", "tsak", source, flags=re.MULTILINE)
    file.write_text(json.dumps(notebook), encoding="utf-8")
    with pytest.raises(ValueError, match=r"50_finetune: unknown parameter \['task'\].*tsak"):
        batch.plan("toy", cores=2)


def test_missing_notebook_fails_before_anything_runs(notebooks):
    (notebooks / "31_reward_models.ipynb").unlink()
    with pytest.raises(ValueError, match="31_reward_models.ipynb, which does not exist"):
        batch.plan("toy", cores=2)


@pytest.fixture
def begin(tmp_path, monkeypatch):
    """begin(run, n_iterations, evaluated): what a run leaves; its folder."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")

    def begin(run, n_iterations, evaluated=None):
        with finetuning._claimed(run):
            home = finetuning.home(run)
            (home / "last").mkdir(parents=True)
            (home / "settings.json").write_text("{}")
            state = {"iterations_done": n_iterations}
            (home / "last" / "state.json").write_text(json.dumps(state))
        if evaluated is not None:
            (home / "evaluation.json").write_text(json.dumps({"iterations": evaluated}))
        return home

    return begin


def contents_of(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def test_plan_knows_what_is_done_and_changes_nothing(begin, tmp_path):
    profile = profiles.load("toy")
    complete, half_way, foreign, trained, longer, *others = profile.batch()
    foreign_rate = profile.run(foreign.policy, foreign.task, learning_rate=0.5)
    begin(complete, complete.settings.n_iterations, complete.settings.n_iterations)
    begin(half_way, 4)
    begin(foreign_rate, 3, evaluated=3)
    begin(trained, trained.settings.n_iterations, evaluated=4)  # evaluated before it went on
    begin(longer, longer.settings.n_iterations + 1, evaluated=longer.settings.n_iterations + 1)
    before = contents_of(tmp_path)

    first, *states, last = batch.plan("toy", cores=2).splitlines()

    assert f"{2 + len(others) + 3} finetunings and {len(batch.contents())} notebooks" in first
    assert re.search(r"about \d+ minutes on 2 cores", last)
    assert states[0].endswith(" done")
    assert "goes on after 4 of" in states[1]
    assert f"to do, 24 iterations, in {foreign.name}-2, beside another run of" in states[2]
    assert "goes on after 24 of 24" in states[3]
    assert f"to do, {longer.settings.n_iterations} iterations, in {longer.name}-2" in states[4]
    assert contents_of(tmp_path) == before
    assert not (tmp_path / "figures").exists()


def test_batch_takes_the_folders_that_the_runs_have(begin, root):
    """A try by hand under other settings is neither taken for the batch's run nor displaced."""
    profile = profiles.load("smoke")
    run = profile.batch()[0]
    begin(profile.run(run.policy, run.task, eta=0.5), 2, evaluated=2)
    shutil.copytree(paths.RUNS, root / "data" / "runs")
    env = {"DDPO_ROOT": str(root)}
    planned = snakemake("-n", "-p", "--config", "profile=smoke", cwd=root, env=env)
    assert f"50_finetune-{run.name}-2.ipynb -p profile smoke" in planned
    assert f"{run.name}-2/batch.done" in planned and f"{run.name}/batch.done" not in planned


def test_batch_goes_on_with_what_was_begun_by_hand(begin, root):
    """Also where that has an evaluation, which Snakemake would take for the batch's."""
    profile = profiles.load("smoke")
    run = profile.batch()[1]
    begin(profile.run(run.policy, run.task, n_iterations=1), 1, evaluated=1)
    shutil.copytree(paths.RUNS, root / "data" / "runs", dirs_exist_ok=True)
    env = {"DDPO_ROOT": str(root)}
    planned = snakemake("-n", "-p", "--config", "profile=smoke", cwd=root, env=env)
    assert f"50_finetune-{run.name}.ipynb -p profile smoke" in planned


def test_time_is_shared_among_cores(begin):
    profile = profiles.load("toy")
    runs = profile.batch()
    one, two = (batch.seconds(profile, runs, batch.contents(), cores=n) for n in (1, 2))
    assert one / 2 <= two < one
    begin(runs[0], 4)
    assert batch.seconds(profile, runs, {}, 1) < batch.seconds(profile, runs[1:], {}, 1) + one / 10


def test_mistake_on_the_command_line_is_one_line():
    command = [sys.executable, "-m", "ddpo_lib.book.batch", "plan", "nope"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch("Nothing was done: unknown profile 'nope'.*\n", done.stderr), done.stderr


def test_report_lists_what_was_made(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    monkeypatch.setattr(paths, "FIGURES", tmp_path / "figures")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "data" / "runs")
    for name in ("figures/toy/fig_1_1_a.png", "data/runs/toy/faces-a-s0/best/x/weights"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"0" * 3000)
    titles = ["Figures and tables", "Finetuned policies", "Executed notebooks"]
    lines = batch.report("toy").splitlines()
    assert [line for line in lines if not line.startswith(" ")] == titles
    assert [line.split() for line in lines if line.startswith(" ")] == [
        ["3", "kB", "figures/toy/fig_1_1_a.png"],
        ["3", "kB", "data/runs/toy/faces-a-s0/best"],
    ]


# ------------------------------------------------------------------------------- adopt


KERNEL = {"name": "python3", "display_name": "Python 3", "language": "python"}


@pytest.fixture
def pages(tmp_path, monkeypatch):
    """pages(name=code, ...): notebooks of a batch in which 50_finetune shows "faces, aesthetic"."""
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")

    def write(**codes):
        paths.NOTEBOOKS.mkdir()
        entries = {name: {"seconds": 1, "makes": []} for name in codes if name != "50_finetune"}
        (paths.NOTEBOOKS / "contents.yaml").write_text(yaml.safe_dump(entries))
        for name, code in codes.items():
            given = '# Parameters\npolicy = "faces"\ntask = "aesthetic"\nseed = 0\nprofile = "toy"'
            tags = {"tags": ["parameters"]}
            cells = [
                nbformat.v4.new_code_cell(given, id="a", metadata=tags),
                nbformat.v4.new_markdown_cell("prose", id="m"),
                nbformat.v4.new_code_cell(code, id="b"),
                nbformat.v4.new_code_cell("2 + 2", id="c"),
            ]
            notebook = nbformat.v4.new_notebook(cells=cells)
            notebook.metadata.kernelspec = KERNEL
            nbformat.write(notebook, paths.NOTEBOOKS / f"{name}.ipynb")

    return write


def execute(name, copy=None):
    """As the batch does."""
    folder = paths.RUNS / "toy" / "notebooks"
    folder.mkdir(parents=True, exist_ok=True)
    files = paths.NOTEBOOKS / f"{name}.ipynb", folder / f"{copy or name}.ipynb"
    program = os.path.join(os.path.dirname(sys.executable), "papermill")
    options = ["--kernel", "python3", "--no-progress-bar", "-p", "profile", "toy"]
    subprocess.run([program, *options, *files], capture_output=True)
    return files[1]


def outputs(name):
    cells = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
    return [cell.outputs for cell in cells if cell.cell_type == "code"]


def test_adopt_takes_outputs_of_notebooks_that_ran_as_they_are(pages):
    pages(**{"50_finetune": "50", "51_a": "51", "52_b": "1 + 2", "53_c": "53"})
    execute("50_finetune", "50_finetune-faces-aesthetic-s0")
    execute("51_a")
    execute("52_b")
    file = paths.NOTEBOOKS / "52_b.ipynb"
    file.write_text(file.read_text().replace("1 + 2", "1 + 3"))

    before = (paths.NOTEBOOKS / "51_a.ipynb").stat().st_mtime_ns
    left = ["left alone" in line for line in batch.adopt("toy").splitlines()]
    assert left == [False, False, True, True]
    assert (paths.NOTEBOOKS / "51_a.ipynb").stat().st_mtime_ns == before  # Snakemake looks at it
    for name, text in (("50_finetune", "50"), ("51_a", "51")):
        cells = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
        assert [cell.get("execution_count") for cell in cells] == [1, None, 2, 3]
        assert cells[2].outputs[0].data["text/plain"] == text
        assert cells[2].outputs[0].execution_count == 2
    assert outputs("52_b") == outputs("53_c") == [[], [], []]


def test_adopted_notebook_is_whole_or_as_it_was(pages, monkeypatch):
    pages(**{"50_finetune": "50", "51_a": "51"})
    ran = nbformat.read(paths.NOTEBOOKS / "51_a.ipynb", as_version=4)
    ran.metadata.papermill = {"exception": None}  # as papermill leaves it
    for cell in ran.cells:
        cell.metadata.papermill = {"status": "completed"}
    for count, cell in enumerate((c for c in ran.cells if c.cell_type == "code"), 1):
        cell.execution_count, cell.metadata.execution = count, {"shell.execute_reply": "now"}
    (paths.RUNS / "toy/notebooks").mkdir(parents=True)
    nbformat.write(ran, paths.RUNS / "toy/notebooks/51_a.ipynb")
    file = paths.NOTEBOOKS / "51_a.ipynb"
    before = file.read_bytes()

    def fail(notebook, target):
        Path(target).write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(nbformat, "write", fail)
    with pytest.raises(OSError, match="cannot write .*No space left on device.* free some space"):
        batch.adopt("toy")
    assert file.read_bytes() == before
    assert sorted(each.name for each in paths.NOTEBOOKS.iterdir()) == [
        "50_finetune.ipynb", "51_a.ipynb", "contents.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "code",
    [
        "1 / 0",
        "import os; os.kill(os.getpid(), 9)",
        # With an answer on its way, a cell that never ended looks as if it had.
        "import os, time; print('half', flush=True); time.sleep(1); os.kill(os.getpid(), 9)",
    ],
)
def test_adopt_leaves_a_notebook_that_did_not_run_to_its_end(pages, code):
    pages(**{"50_finetune": "50", "51_a": code})
    execute("51_a")
    before = (paths.NOTEBOOKS / "51_a.ipynb").read_bytes()
    lines = batch.adopt("toy").splitlines()
    assert lines[1].strip() == "51_a: did not run to its end, left alone"
    assert (paths.NOTEBOOKS / "51_a.ipynb").read_bytes() == before


def test_adopt_leaves_what_papermill_had_not_finished(pages):
    """As a killed papermill leaves it, and as another tool or a hand would."""
    pages(**{"50_finetune": "50", "51_a": "51"})
    copy = execute("51_a")
    whole = copy.read_text()

    def adopted(change):
        notebook = nbformat.reads(whole, as_version=4)
        change(notebook)
        nbformat.write(notebook, copy)
        return "left alone" not in batch.adopt("toy").splitlines()[1]

    def set_status(notebook, status):
        notebook.cells[-1].metadata.papermill.status = status

    assert not adopted(lambda n: set_status(n, "running"))
    assert not adopted(lambda n: set_status(n, "pending"))
    assert not adopted(lambda n: n.cells[-1].update(execution_count=2))
    assert not adopted(lambda n: n.cells[-1].metadata.pop("execution"))
    assert not adopted(lambda n: n.metadata.papermill.update(exception=True))
    assert not adopted(lambda n: n.metadata.pop("papermill"))
    assert not adopted(lambda n: n.cells[-1].metadata.pop("papermill"))
    assert outputs("51_a") == [[], [], []]
    assert adopted(lambda n: None)


# ------------------------------------------------------------------------------- failures


def test_failure_names_the_notebook_its_cell_and_its_error_in_a_few_lines(pages):
    pages(**{"50_finetune": "50", "51_a": "x = 1\n" + "y = 2\n" * 30 + "x / 0"})
    copy = execute("51_a")
    log = copy.with_suffix(".log")
    log.write_text("a traceback\n" * 500)
    said = batch.failure(str(log)).splitlines()
    assert len(said) <= 15
    assert said[0].startswith("51_a failed in cell ") and said[1] == "    x = 1"
    assert "ZeroDivisionError: division by zero" in said
    assert said[-1].endswith("51_a.ipynb")


def test_old_figures_stay_where_a_notebook_fails(tmp_path):
    """In a copy of the project with one notebook."""
    project, out = tmp_path / "project", tmp_path / "out"
    for name in ("ddpo_lib", "config"):
        shutil.copytree(paths.ROOT / name, project / name)
    shutil.copy(paths.ROOT / "Snakefile", project)
    (project / "data").symlink_to(paths.DATA)
    (project / "notebooks").mkdir()
    (project / "notebooks/contents.yaml").write_text("20_a: {seconds: 1, makes: [extra_20_a]}\n")
    cells = [nbformat.v4.new_code_cell("# Parameters\nprofile = 'toy'"), *map(
        nbformat.v4.new_code_cell, ("fine = 1", "fine / 0")
    )]  # fmt: skip
    cells[0].metadata["tags"] = ["parameters"]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": KERNEL})
    nbformat.write(notebook, project / "notebooks/20_a.ipynb")
    old = {out / f"figures/smoke/extra_20_a.{kind}": f"an old {kind}" for kind in ("png", "pdf")}
    for file, text in old.items():
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        os.utime(file, (1e9, 1e9))
    env = {"DDPO_ROOT": str(out), "PYTHONPATH": str(project)}
    options = ["-s", project / "Snakefile", "--config", "profile=smoke", "--quiet", "host"]
    said = r"20_a failed in cell \d+, which begins\s+fine / 0"
    with pytest.raises(AssertionError, match=said):
        snakemake(*options, cwd=project, env=env)
    assert {file: file.read_text() for file in old} == old


def test_failure_without_an_executed_notebook_is_the_end_of_its_log(tmp_path):
    log = tmp_path / "faces-aesthetic-s0.log"
    log.write_text("\n".join(f"line {i}" for i in range(100)))
    said = batch.failure(str(log)).splitlines()
    assert len(said) <= 15 and said[0].startswith("faces-aesthetic-s0 failed; its log")
    assert said[-1] == "line 99"


def test_missing_lists_what_was_not_made(pages, monkeypatch):
    pages(**{"50_finetune": "50", "51_a": "51", "52_b": "1 / 0"})
    execute("51_a")
    execute("52_b")
    notebooks = {name: batch.Notebook(1, [f"extra_{name}"]) for name in ("51_a", "52_b", "53_c")}
    monkeypatch.setattr(batch, "contents", lambda: notebooks)
    monkeypatch.setattr(finetuning, "is_complete", lambda run: run.task != "over50")
    said = batch.missing("toy")
    assert "Not finetuned to the end:\n  faces-over50-s0\n" in said
    assert "52_b: extra_52_b.png, extra_52_b.pdf\n  53_c: extra_53_c.png" in said
    assert "51_a" not in said and said.endswith("only the rest is run.")
