"""Around the batch: what it plans, what stops it early, what it leaves for readers."""

import dataclasses
import json
import re
import subprocess
import sys

import nbformat
import pytest

from ddpo_lib import batch, config, paths


def test_batch_runs_every_notebook_with_its_parameters():
    command = [sys.executable, "-m", "snakemake", "-n", "-p", "--forceall", "--nolock"]
    command += ["--cores", "2", "--config", "profile=toy"]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    planned = done.stdout + done.stderr
    for run in config.load("toy").batch():
        given = f"-p profile toy -p policy {run.policy} -p task {run.task} -p seed {run.seed} "
        assert f"50_finetune-{run.name}.ipynb {given}" in planned
    for notebook in batch.NOTEBOOKS:
        assert f"notebooks/{notebook}.ipynb -p profile toy " in planned


def test_misspelled_parameter_fails_before_anything_runs(tmp_path, monkeypatch):
    for file in paths.NOTEBOOKS.glob("*.ipynb"):
        notebook = json.loads(file.read_text())
        for cell in notebook["cells"]:
            if file.stem == "50_finetune" and "parameters" in cell["metadata"].get("tags", []):
                source = "".join(cell["source"])
                cell["source"] = re.sub(r"^task\b", "tsak", source, flags=re.MULTILINE)
        (tmp_path / file.name).write_text(json.dumps(notebook))
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    with pytest.raises(ValueError, match=r"50_finetune: unknown parameter \['task'\].*tsak"):
        batch.plan("toy", cores=2)


def test_missing_notebook_fails_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        batch.plan("toy", cores=2)


def test_plan_knows_what_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RUNS", tmp_path)
    runs = config.load("toy").batch()
    complete, half_way, foreign = (tmp_path / "toy" / run.name for run in runs[:3])
    for home, run in zip((complete, half_way, foreign), runs, strict=False):
        (home / "last").mkdir(parents=True)
        n = 4 if home == half_way else run.settings.n_iterations
        (home / "last" / "state.json").write_text(json.dumps({"iterations_done": n}))
        made = config.replace(run, eta=0.5) if home == foreign else run
        (home / "settings.json").write_text(json.dumps(dataclasses.asdict(made)))
        if home != half_way:
            (home / "evaluation.json").write_text("{}")

    before, *states, last = batch.plan("toy", cores=2).splitlines()

    assert f"{len(runs)} finetunings" in before
    assert re.search(r"about \d+ minutes on 2 cores", last)
    assert states[0].endswith(" done")
    assert "goes on after 4 of" in states[1]
    assert "to do again, eta 0.5 → 1.0" in states[2]
    assert not (foreign / "evaluation.json").exists()
    assert (complete / "evaluation.json").exists()


def test_time_is_shared_among_cores():
    profile = config.load("toy")
    runs = profile.batch()
    one, two = (batch.seconds(profile, runs, batch.NOTEBOOKS, cores=n) for n in (1, 2))
    assert one / 2 <= two < one


def test_adopt_takes_outputs_of_notebooks_that_ran_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path / "notebooks")
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(
        batch, "NOTEBOOKS", {"51_a": None, "52_b": None, "53_c": None, "54_d": None}
    )
    executed = tmp_path / "runs" / "toy" / "notebooks"

    def write(folder, name, code, *outputs, injected=False):
        given = 'policy = "faces"\ntask = "blue"'
        cells = [nbformat.v4.new_code_cell(given, id="a", metadata={"tags": ["parameters"]})]
        if injected:
            cells.append(nbformat.v4.new_code_cell('profile = "toy"', id="random"))
        cells.append(nbformat.v4.new_code_cell(code, id="b", outputs=list(outputs)))
        folder.mkdir(parents=True, exist_ok=True)
        notebook = nbformat.v4.new_notebook(cells=cells)
        notebook.metadata.kernelspec = {
            "name": "python3",
            "display_name": "Python 3",
            "language": "python",
        }
        nbformat.write(notebook, folder / f"{name}.ipynb")

    def result(text):
        return nbformat.v4.new_output("execute_result", {"text/plain": text}, execution_count=9)

    for name in ("50_finetune", "51_a", "52_b", "53_c", "54_d"):
        write(paths.NOTEBOOKS, name, "1 + 1")
    write(executed, "50_finetune-faces-blue-s0", "1 + 1", result("fifty"), injected=True)
    write(executed, "51_a", "1 + 1", result("fifty-one"), injected=True)
    write(executed, "52_b", "1 + 2", result("stale"), injected=True)
    write(executed, "54_d", "1 + 1", nbformat.v4.new_output("error", traceback=["no"]))

    before = (paths.NOTEBOOKS / "51_a.ipynb").stat().st_mtime_ns
    lines = batch.adopt("toy").splitlines()
    left = ["left alone" in line for line in lines]
    assert left == [False, False, True, True, True] and "failed" in lines[-1]
    assert (paths.NOTEBOOKS / "51_a.ipynb").stat().st_mtime_ns == before  # Snakemake looks at it
    for name, text in (("50_finetune", "fifty"), ("51_a", "fifty-one")):
        given, last = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
        assert (given.execution_count, last.execution_count) == (1, 2)
        assert last.outputs[0].data["text/plain"] == text
        assert last.outputs[0].execution_count == 2
    for name in ("52_b", "53_c", "54_d"):
        cells = nbformat.read(paths.NOTEBOOKS / f"{name}.ipynb", as_version=4).cells
        assert not cells[1].outputs
