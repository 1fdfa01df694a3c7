"""Around the batch: what it will do, checked before it starts, and what it has made.

    python -m ddpo_lib.batch plan toy --cores 2
    python -m ddpo_lib.batch report toy

The batch itself is the Snakefile.
"""

import argparse
import dataclasses
import heapq
import json
import re
import sys
from pathlib import Path

from papermill import inspect_notebook

from ddpo_lib import config, paths
from ddpo_lib.config import Profile, Run

SECONDS_PER_NETWORK_CALL = 0.002
"""One picture once through a toy UNet, on one core while the other core does the same; measured on
two cores of a cloud machine, in bf16."""
SECONDS_PER_NOTEBOOK = 20
"""Starting a kernel, importing, loading models, drawing."""
BACKWARD = 2
"""A backward pass in network calls."""


def plan(profile_name: str, cores: int) -> str:
    """What is done, what is to do, and about how long it will take.

    Raises:
        ValueError: something that would fail later: no such profile, an impossible setting, a
            missing notebook, a parameter that a notebook does not have.
    """
    profile = config.load(profile_name)
    batch = profile.batch()
    notebooks = notebook_parameters()
    check_parameters(notebooks)
    n_others = len(notebooks) - 1
    lines = [f"Profile {profile.name}: {len(batch)} finetunings, then {n_others} notebooks"]
    for run in batch:
        done = iterations_done(run)
        if is_complete(run):
            state = "done"
        elif changes := changed_settings(run):
            state = f"to do again, {', '.join(changes)}"
            # Snakemake sees files and not settings: without this it would take a run that somebody
            # made by hand under other settings for the batch's own.
            (_home(run) / "evaluation.json").unlink(missing_ok=True)
        elif done:
            state = f"goes on after {done} of {run.settings.n_iterations} iterations"
        else:
            state = f"to do, {run.settings.n_iterations} iterations"
        lines.append(f"  {run.name:<32} {state}")
    missing = [run for run in batch if not is_complete(run)]
    if not missing:
        lines.append("Every finetuning is done; notebooks run only where something has changed.")
    elif all(source.startswith("toy/") for source in profile.policies.values()):
        minutes = seconds(profile, missing, n_others, cores) / 60
        lines.append(f"This will take about {minutes:.0f} minutes on {cores} cores like those of a "
                     "laptop. Stop it whenever you like: it goes on where it was.")  # fmt: skip
    else:
        lines.append("How long it takes depends on the GPU; the same command in a second terminal "
                     "shows how far each finetuning is.")  # fmt: skip
    return "\n".join(lines)


def notebook_parameters() -> dict[str, set[str]]:
    """Notebook → names of the parameters that the Snakefile gives it."""
    rules = re.split(r"^rule ", (paths.ROOT / "Snakefile").read_text(), flags=re.MULTILINE)
    return {
        notebook[1]: set(re.findall(r"-[pr] (\w+) ", rule))
        for rule in rules
        if (notebook := re.search(r'notebook="notebooks/(\w+)\.ipynb"', rule))
    }


def check_parameters(notebooks: dict[str, set[str]]) -> None:
    """Papermill only warns about a name that a notebook does not have; this raises ValueError."""
    for notebook, given in notebooks.items():
        file = paths.NOTEBOOKS / f"{notebook}.ipynb"
        if not file.is_file():
            raise ValueError(f"the batch needs {file}, which does not exist")
        known = set(inspect_notebook(str(file)))
        if given - known:
            raise ValueError(
                f"{notebook}: unknown parameter {sorted(given - known)}; its parameters cell has "
                f"{sorted(known)}"
            )


def iterations_done(run: Run) -> int:
    """Iterations that the run's folder holds, 0 if it was made under other settings."""
    file = _home(run) / "last" / "state.json"
    if not file.exists() or changed_settings(run):
        return 0
    return json.loads(file.read_text())["iterations_done"]


def changed_settings(run: Run) -> list[str]:
    """What differs from the run that lies in the run's folder, none if there is no run."""
    file = _home(run) / "settings.json"
    if not file.exists():
        return []
    before = _flat(json.loads(file.read_text()))
    now = _flat(json.loads(json.dumps(dataclasses.asdict(run))))
    changed = [name for name in now if before.get(name) != now[name]]
    return [f"{name} {before.get(name)} → {now[name]}" for name in changed]


def is_complete(run: Run) -> bool:
    """Trained to the end and evaluated."""
    evaluated = (_home(run) / "evaluation.json").exists()
    return evaluated and iterations_done(run) == run.settings.n_iterations


def seconds(profile: Profile, todo: list[Run], n_notebooks: int, cores: int) -> float:
    """Expected time: finetunings side by side, one a core, then notebooks one after another.

    A network call is one picture through the network once. A rollout is n_samples × n_steps of
    them; an update goes forward and backward through all steps but the last, which is no action.
    """
    evaluation = profile.evaluation.n * profile.evaluation.n_steps
    durations = []
    for run in todo:
        s = run.settings
        rollout = s.n_samples * s.n_steps
        update = (1 + BACKWARD) * s.n_samples * (s.n_steps - 1) * s.n_inner_epochs
        development = s.n_development * s.n_steps
        remaining = s.n_iterations - iterations_done(run)
        calls = remaining * (rollout + update + development) + evaluation
        durations.append(calls * SECONDS_PER_NETWORK_CALL + SECONDS_PER_NOTEBOOK)
    free_at = [0.0] * cores
    for duration in sorted(durations, reverse=True):
        heapq.heapreplace(free_at, free_at[0] + duration)
    pretrained = len({run.policy for run in todo}) * evaluation
    return max(free_at) + pretrained * SECONDS_PER_NETWORK_CALL + n_notebooks * SECONDS_PER_NOTEBOOK


def report(profile_name: str) -> str:
    """Figures, tables, finetuned policies and executed notebooks: paths and sizes."""
    home = paths.RUNS / profile_name
    made = {
        "Figures and tables": (paths.FIGURES / profile_name).glob("*.*"),
        "Finetuned policies": home.glob("*/best"),
        "Executed notebooks": (home / "notebooks").glob("*.ipynb"),
    }
    lines = []
    for title, files in made.items():
        lines.append(title)
        lines += [
            f"  {_size(file) / 1e3:8,.0f} kB  {file.relative_to(paths.ROOT)}"
            for file in sorted(files)
        ]
    return "\n".join(lines)


def _home(run: Run) -> Path:
    # Not runs.folder: importing torch takes longer than everything else here.
    return paths.RUNS / run.profile / run.name


def _flat(settings: dict) -> dict:
    own = {name: value for name, value in settings.items() if name != "settings"}
    return own | settings["settings"]


def _size(file: Path) -> int:
    files = file.rglob("*") if file.is_dir() else [file]
    return sum(f.stat().st_size for f in files if f.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ddpo_lib.batch", description=__doc__)
    parser.add_argument("what", choices=["plan", "report"])
    parser.add_argument("profile")
    parser.add_argument("--cores", type=int, default=1)
    arguments = parser.parse_args()
    try:
        if arguments.what == "plan":
            print(plan(arguments.profile, arguments.cores))
        else:
            print(report(arguments.profile))
    except ValueError as error:
        sys.exit(f"Nothing was run: {error}")


if __name__ == "__main__":
    main()
