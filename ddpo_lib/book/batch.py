"""Around the batch: what it will do, checked before it starts, and what it has made.

    python -m ddpo_lib.book.batch plan toy --cores 2
    python -m ddpo_lib.book.batch report toy
    python -m ddpo_lib.book.batch adopt toy

The batch itself is the Snakefile.
"""

import argparse
import ast
import heapq
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from ddpo_lib import disk
from ddpo_lib.book import finetuning, paths, profiles
from ddpo_lib.book.profiles import Profile, Run
from ddpo_lib.settings import check_whole

FINETUNE_PARAMETERS = ("profile", "policy", "task", "seed")
"""Papermill parameters of 50_finetune in the batch; all other notebooks get the profile alone."""

SECONDS_PER_NETWORK_CALL, SECONDS_PER_FINETUNING, BACKWARD = 0.0036, 20, 2
"""One picture once through a toy UNet, in bf16 on one of two cores of a cloud machine that both are
busy; starting a kernel, importing, loading, drawing; a backward pass, in forward passes."""


@dataclass(frozen=True)
class Notebook:
    """A notebook of the batch, as notebooks/contents.yaml describes it."""

    seconds: int
    makes: list
    toy_only: list = ()

    def files(self, profile: Profile) -> list[str]:
        """What it makes: figures as PNG and PDF, tables as CSV."""
        made = [name for name in self.makes if profile.is_toy or name not in self.toy_only]
        kinds = {"table": ["csv"], "fig": ["png", "pdf"], "extra": ["png", "pdf"]}
        return [f"{name}.{kind}" for name in made for kind in kinds[name.split("_")[0]]]


def contents() -> dict[str, Notebook]:
    """Every notebook of the batch but 50_finetune, which runs once for each finetuning."""
    text = (paths.NOTEBOOKS / "contents.yaml").read_text(encoding="utf-8")
    return {name: Notebook(**entry) for name, entry in yaml.load(text, profiles.Loader).items()}


def plan(profile_name: str, cores: int, every_seed: bool = False) -> str:
    """What is done, what is to do, and about how long it will take; with every seed of the
    finetunings alone. Changes nothing.

    ValueError for what would fail later: no such profile, an impossible setting, a missing
    notebook, a parameter that a notebook does not have, about which papermill only warns.
    """
    check_whole("cores", cores, 1)
    profile, notebooks = profiles.load(profile_name), contents()
    for name in ("50_finetune", *notebooks):
        given = FINETUNE_PARAMETERS if name == "50_finetune" else ("profile",)
        known = sorted(parameters(name))
        if unknown := sorted(set(given) - set(known)):
            raise ValueError(f"{name}: unknown parameter {unknown}; its cell has {known}")
    batch, missing = profile.batch(every_seed), []
    notebooks = {} if every_seed else notebooks
    more = "" if every_seed else f" and {len(notebooks)} notebooks"
    lines = [f"Profile {profile.name}: {len(batch)} finetunings{more}"]
    for run in batch:
        home, done = finetuning.home(run).name, finetuning.iterations_done(run)
        state, n = "done", f"{run.settings.n_iterations} iterations"
        if not finetuning.is_complete(run):
            missing.append(run)
            state = f"goes on after {done} of {n}" if done else f"to do, {n}"
        aside = "" if home == run.name else f", in {home}, beside another run of this name"
        lines.append(f"  {run.name:<32} {state}{aside}")
    last = "Every finetuning is done; what is made of them is made again where it has changed."
    if missing and profile.is_toy:
        minutes = seconds(profile, missing, notebooks, cores) / 60
        last = f"This will take about {minutes:.0f} minutes on {cores} cores like a laptop's. "
        last += "Stop it whenever you like: it goes on where it was."
    elif missing:
        last = "How long it takes depends on the GPU. In a second terminal, .venv/bin/python -m "
        last += f"ddpo_lib.book.batch plan {profile.name} shows how far each finetuning is."
    return "\n".join([*lines, last])


def parameters(notebook: str) -> dict[str, ast.expr]:
    """A notebook's parameters and their defaults. ValueError if there is no such notebook."""
    file = paths.NOTEBOOKS / f"{notebook}.ipynb"
    if not file.is_file():
        raise ValueError(f"the batch needs {file}, which does not exist")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", ())]
    return assigned("".join(tagged[0]["source"])) if tagged else {}


def assigned(source: str) -> dict[str, ast.expr]:
    """The names that a parameters cell assigns, in order, and what to."""
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return {node.targets[0].id: node.value for node in nodes if hasattr(node.targets[0], "id")}


def seconds(profile: Profile, todo: list[Run], notebooks: dict[str, Notebook], cores: int) -> float:
    """Expected time: finetunings side by side, one a core, then notebooks.

    A network call is one picture through the network once. A rollout is n_samples × n_steps of
    them; an update goes forward and backward through its share of all steps but the last, which is
    no action. Development and evaluation sets are drawn by two samplers.
    """
    durations = []
    for run in todo:
        s = run.settings
        update = (1 + BACKWARD) * s.n_samples * (s.n_steps - 1) * s.n_inner_epochs
        update *= s.timestep_fraction
        iteration = (s.n_samples + 2 * s.n_development) * s.n_steps + update
        calls = (s.n_iterations - finetuning.iterations_done(run)) * iteration
        calls += 2 * profile.evaluation.n * profile.evaluation.n_steps
        durations.append(calls * SECONDS_PER_NETWORK_CALL + SECONDS_PER_FINETUNING)
    free_at = [0.0] * cores
    for duration in sorted(durations, reverse=True) + [each.seconds for each in notebooks.values()]:
        heapq.heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


def report(profile_name: str) -> str:
    """Figures, tables, finetuned policies and executed notebooks: paths and sizes."""
    home = paths.RUNS / profiles.load(profile_name).name
    made = {
        "Figures and tables": (paths.FIGURES / profile_name).glob("*.*"),
        "Finetuned policies": home.glob("*/best"),
        "Executed notebooks": (home / "notebooks").glob("*.ipynb"),
    }
    lines = []
    for title, places in made.items():
        lines.append(title)
        for place in sorted(places):
            size = sum(f.stat().st_size for f in (place, *place.rglob("*")) if f.is_file())
            lines.append(f"  {size / 1e3:8,.0f} kB  {paths.shown(place)}")
    return "\n".join(lines)


def missing(profile_name: str) -> str:
    """What a batch that failed has left undone: finetunings, and notebooks with what they make."""
    profile, lines = profiles.load(profile_name), []
    if runs_left := [run for run in profile.batch() if not finetuning.is_complete(run)]:
        lines += ["Not finetuned to the end:", *(f"  {run.name}" for run in runs_left)]
    left = []
    for name, notebook in contents().items():
        ran = paths.RUNS / profile_name / "notebooks" / f"{name}.ipynb"
        if not (ran.exists() and _is_whole(_read(ran))):
            left.append(f"  {name}: {', '.join(notebook.files(profile))}")
    if left:
        lines += ["Not run to the end, so that these are as they were before, or not there:", *left]
    return "\n".join([*lines, "Start it again: what is done stays, and only the rest is run."])


def failure(log: str) -> str:
    """Why a notebook or a finetuning failed, in at most fifteen lines: its cell and its error, or
    the end of its log."""
    text, executed = Path(log), Path(log).with_suffix(".ipynb")
    cells = _read(executed).cells if executed.exists() else []
    for i, cell in enumerate(cells):
        for output in cell.get("outputs", ()):
            if output.output_type == "error":
                source = [f"    {line}" for line in cell.source.splitlines()[:6]]
                said = output.evalue.splitlines()[:4] or [""]
                title = f"{executed.stem} failed in cell {i}, which begins"
                return "\n".join([title, *source, f"{output.ename}: {said[0]}", *said[1:],
                                  f"All of it: {paths.shown(executed)}"])  # fmt: skip
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines()[-12:]
    return "\n".join([f"{text.stem} failed; its log, {paths.shown(text)}, ends", *lines])


def adopt(profile_name: str) -> str:
    """Take the outputs of the batch's executed notebooks into notebooks/, where readers see them.

    Of 50_finetune it is the run that its parameters cell names. From a notebook that did not run to
    its end, or has changed since it ran, nothing is taken.
    """
    import nbformat

    given = parameters("50_finetune")
    own = {name: ast.literal_eval(given[name]) for name in ("policy", "task", "seed")}
    shown = finetuning.home(profiles.load(profile_name).run(**own)).name
    copies = {"50_finetune": f"50_finetune-{shown}"} | {name: name for name in contents()}
    lines = []
    for name, copy in copies.items():
        file = paths.NOTEBOOKS / f"{name}.ipynb"
        copy = paths.RUNS / profile_name / "notebooks" / f"{copy}.ipynb"
        notebook = _read(file)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        ran = _read(copy) if copy.exists() else nbformat.v4.new_notebook()
        done = {cell.id: cell for cell in ran.cells}
        if any(cell.id not in done or done[cell.id].source != cell.source for cell in code):
            lines.append(f"  {name}: not run since it changed, left alone")
        elif not _is_whole(ran):
            lines.append(f"  {name}: did not run to its end, left alone")
        else:
            for count, cell in enumerate(code, 1):
                cell.outputs, cell.execution_count = done[cell.id].outputs, count
                for output in cell.outputs:
                    if output.output_type == "execute_result":
                        output.execution_count = count
            before = file.stat()
            with disk.replacing(file) as draft:
                nbformat.write(notebook, draft)
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # no reason to run again
            lines.append(f"  {name}: {file.stat().st_size / 1e3:,.0f} kB")
    return "\n".join(lines)


def _read(notebook: Path):
    import nbformat

    return nbformat.read(notebook, as_version=4)


def _is_whole(executed) -> bool:
    """Whether papermill went through all cells in order and the kernel answered to each of code.

    Papermill's own word is not enough: after a kernel's death it calls every cell completed.
    """
    code = [cell for cell in executed.cells if cell.cell_type == "code" and cell.source.strip()]
    states = [cell.metadata.get("papermill", {}).get("status") for cell in executed.cells]
    return (
        executed.metadata.get("papermill", {"exception": True})["exception"] is None
        and set(states) == {"completed"}
        and all("shell.execute_reply" in cell.metadata.get("execution", {}) for cell in code)
        and [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ddpo_lib.book.batch", description=__doc__)
    tasks = {f.__name__: f for f in (plan, report, missing, failure, adopt)}
    parser.add_argument("what", choices=tasks)
    parser.add_argument("profile", help="or, of failure, the log's file")
    parser.add_argument("--cores", type=int, default=1)
    given = parser.parse_args()
    more = [given.cores] if given.what == "plan" else []
    try:
        print(tasks[given.what](given.profile, *more))
    except (OSError, ValueError, RuntimeError) as error:
        sys.exit(f"Nothing was done: {error}")


if __name__ == "__main__":
    main()
