"""Around the batch: what it will do, checked before it starts, and what it has made.

    python -m ddpo_lib.batch plan toy --cores 2
    python -m ddpo_lib.batch report toy
    python -m ddpo_lib.batch adopt toy

The batch itself is the Snakefile.
"""

import argparse
import ast
import dataclasses
import heapq
import json
import os
import sys
from pathlib import Path

from ddpo_lib import config, paths
from ddpo_lib.config import Profile, Run


@dataclasses.dataclass(frozen=True)
class Notebook:
    """What the batch has to know about a notebook."""

    seconds: int
    """On one core in profile toy, with the finetunings there and the other core busy; measured."""
    makes: tuple[str, ...]
    """The figures and tables that it leaves in figures/<profile>/."""
    toy_only: tuple[str, ...] = ()
    """Those of them that need to know what a picture was drawn from."""

    def files(self, profile: Profile) -> list[str]:
        """Their files: figures as PNG and PDF, tables as CSV."""
        kinds = {True: ("csv",), False: ("png", "pdf")}
        made = [name for name in self.makes if profile.is_toy or name not in self.toy_only]
        return [f"{name}.{kind}" for name in made for kind in kinds[name.startswith("table_")]]


NOTEBOOKS = {
    "00_quickstart": Notebook(70, ("fig_1_1_the_loop",)),
    "20_forward_process": Notebook(
        25, ("fig_2_1_forward_process", "fig_2_2_noise_schedule", "fig_2_3_reparameterisation")
    ),
    "21_training_a_ddpm": Notebook(65, ("fig_2_4_denoising_matching",)),
    "22_clip_guidance": Notebook(90, ("fig_2_6_clip_guidance",)),
    "23_ddim_and_inversion": Notebook(80, ("fig_2_7_ddim_chain", "fig_2_8_ddim_inversion")),
    "30_policy_gradients": Notebook(40, ("fig_3_1_mdp", "fig_3_3_weighted_trajectories")),
    "31_reward_models": Notebook(30, ("extra_31_agreement",)),
    "40_denoising_as_mdp": Notebook(40, ("fig_4_1_denoising_mdp", "fig_4_2_reward_finetuning")),
    "41_reward_trajectories": Notebook(
        80, ("fig_4_3_reward_trajectories", "fig_4_4_extreme_trajectories")
    ),
    "51_learning_curves": Notebook(20, ("fig_5_3_learning_curves", "fig_5_7_lr_schedule")),
    "52_results_table": Notebook(30, ("table_5_1",)),
    "53_samples": Notebook(40, ("fig_5_1_samples_faces", "fig_5_12_samples_churches")),
    "54_emergent_effects": Notebook(
        35,
        (
            "fig_5_2_emergent_compressibility",
            "fig_5_5_emergent_incompressibility",
            "fig_5_8_emergent_aesthetic",
            "extra_54_factor_shifts",
        ),
    ),
    "55_transitions": Notebook(
        35,
        (
            "fig_5_4_transition_compressibility",
            "fig_5_6_transition_incompressibility",
            "fig_5_9_transition_aesthetic",
            "fig_5_11_transition_over50",
            "fig_5_13_transitions_churches",
            "fig_c_1_transition_compressibility",
            "fig_c_2_transition_compressibility",
            "fig_c_3_transition_incompressibility",
            "fig_c_4_transition_incompressibility",
            "fig_c_5_transition_aesthetic",
            "fig_c_6_transition_aesthetic",
            "fig_c_7_transition_over50",
            "fig_c_8_transition_over50",
        ),
    ),
    "56_age_distribution": Notebook(30, ("fig_5_10_age_distribution",)),
    "57_mode_collapse": Notebook(
        60, ("fig_5_14_mode_collapse", "extra_57_proxy_and_true"), ("extra_57_proxy_and_true",)
    ),
    "58_galleries": Notebook(
        20,
        (
            "fig_b_1_gallery_faces_pretrained",
            "fig_b_2_gallery_faces_compressibility",
            "fig_b_3_gallery_faces_incompressibility",
            "fig_b_4_gallery_faces_aesthetic",
            "fig_d_1_gallery_churches_pretrained",
            "fig_d_2_gallery_churches_compressibility",
            "fig_d_3_gallery_churches_incompressibility",
            "fig_d_4_gallery_churches_aesthetic",
        ),
    ),
    "59_development_set": Notebook(25, ("fig_a_1_development_set", "table_a_1", "table_a_2")),
}
"""Every notebook of the batch but 50_finetune, which runs once for each finetuning."""

FINETUNE_PARAMETERS = ("profile", "policy", "task", "seed")
"""Papermill parameters of 50_finetune in the batch; all other notebooks get the profile alone."""

SECONDS_PER_NETWORK_CALL = 0.0023
"""One picture once through a toy UNet, on one core while the other core does the same; measured on
two cores of a cloud machine, in bf16."""
SECONDS_PER_FINETUNING = 20
"""Starting a kernel, importing, loading models, drawing."""
BACKWARD = 2
"""What a backward pass costs, in forward passes."""


def needs_finetunings(notebook: str) -> bool:
    """Whether the notebook shows finetuned policies: all of chapter 5 and the appendices."""
    return notebook > "50"


def plan(profile_name: str, cores: int) -> str:
    """What is done, what is to do, and about how long it will take.

    Raises:
        ValueError: something that would fail later: no such profile, an impossible setting, a
            missing notebook, a parameter that a notebook does not have.
    """
    profile = config.load(profile_name)
    batch = profile.batch()
    check_notebooks()
    lines = [f"Profile {profile.name}: {len(batch)} finetunings and {len(NOTEBOOKS)} notebooks"]
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
    elif profile.is_toy:
        minutes = seconds(profile, missing, NOTEBOOKS, cores) / 60
        lines.append(f"This will take about {minutes:.0f} minutes on {cores} cores like those of a "
                     "laptop. Stop it whenever you like: it goes on where it was.")  # fmt: skip
    else:
        lines.append(
            "How long it takes depends on the GPU. In a second terminal, .venv/bin/python "
            f"-m ddpo_lib.batch plan {profile.name} shows how far each finetuning is."
        )
    return "\n".join(lines)


def check_notebooks() -> None:
    """Every notebook is there and has the parameters that the batch gives it, or ValueError.

    Papermill only warns about a name that a notebook does not have.
    """
    given = {"50_finetune": FINETUNE_PARAMETERS} | dict.fromkeys(NOTEBOOKS, ("profile",))
    for notebook, names in given.items():
        file = paths.NOTEBOOKS / f"{notebook}.ipynb"
        if not file.is_file():
            raise ValueError(f"the batch needs {file}, which does not exist")
        known = parameters(notebook)
        if unknown := sorted(set(names) - set(known)):
            raise ValueError(
                f"{notebook}: unknown parameter {unknown}; its parameters cell has {sorted(known)}"
            )


def parameters(notebook: str) -> dict[str, str]:
    """A notebook's parameters, and their defaults as they are written."""
    from papermill import inspect_notebook  # imported late: it takes as long as torch

    inspected = inspect_notebook(str(paths.NOTEBOOKS / f"{notebook}.ipynb"))
    return {name: entry["default"] for name, entry in inspected.items()}


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
    now = json.loads(json.dumps(dataclasses.asdict(run)))
    return config.differences(json.loads(file.read_text()), now)


def is_complete(run: Run) -> bool:
    """Trained to the end and evaluated."""
    evaluated = (_home(run) / "evaluation.json").exists()
    return evaluated and iterations_done(run) == run.settings.n_iterations


def seconds(profile: Profile, todo: list[Run], notebooks: dict[str, Notebook], cores: int) -> float:
    """Expected time: finetunings side by side, one a core, then notebooks.

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
        durations.append(calls * SECONDS_PER_NETWORK_CALL + SECONDS_PER_FINETUNING)
    free_at = [0.0] * cores
    durations = sorted(durations, reverse=True) + [entry.seconds for entry in notebooks.values()]
    for duration in durations:
        heapq.heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


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


def adopt(profile_name: str) -> str:
    """Take the outputs of the batch's executed notebooks into notebooks/, where readers see them.

    Of 50_finetune it is the run that its parameters cell names. From a notebook that failed, or has
    changed since it ran, nothing is taken.
    """
    import nbformat

    home = paths.RUNS / profile_name / "notebooks"
    own = parameters("50_finetune")
    shown = "-".join(ast.literal_eval(own[name]) for name in ("policy", "task"))
    executed = {"50_finetune": f"50_finetune-{shown}-s0"} | {name: name for name in NOTEBOOKS}
    lines = []
    for name, copy in executed.items():
        file = paths.NOTEBOOKS / f"{name}.ipynb"
        notebook = nbformat.read(file, as_version=4)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        done = {}
        if (home / f"{copy}.ipynb").exists():
            cells = nbformat.read(home / f"{copy}.ipynb", as_version=4).cells
            done = {cell.id: cell for cell in cells}
        if any(cell.id not in done or done[cell.id].source != cell.source for cell in code):
            lines.append(f"  {name}: not run since it changed, left alone")
            continue
        outputs = [output for cell in code for output in done[cell.id].outputs]
        if any(output.output_type == "error" for output in outputs):
            lines.append(f"  {name}: failed, left alone")
            continue
        for count, cell in enumerate(code, 1):
            cell.outputs, cell.execution_count = done[cell.id].outputs, count
            for output in cell.outputs:
                if output.output_type == "execute_result":
                    output.execution_count = count
        before = file.stat()
        nbformat.write(notebook, file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # no reason to run it again
        lines.append(f"  {name}: {file.stat().st_size / 1e3:,.0f} kB")
    return "\n".join(lines)


def _home(run: Run) -> Path:
    # Not runs.folder: importing torch takes longer than everything else here.
    return paths.RUNS / run.profile / run.name


def _size(file: Path) -> int:
    files = file.rglob("*") if file.is_dir() else [file]
    return sum(f.stat().st_size for f in files if f.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m ddpo_lib.batch", description=__doc__)
    parser.add_argument("what", choices=["plan", "report", "adopt"])
    parser.add_argument("profile")
    parser.add_argument("--cores", type=int, default=1)
    arguments = parser.parse_args()
    try:
        if arguments.what == "plan":
            print(plan(arguments.profile, arguments.cores))
        else:
            print({"report": report, "adopt": adopt}[arguments.what](arguments.profile))
    except ValueError as error:
        sys.exit(f"Nothing was run: {error}")


if __name__ == "__main__":
    main()
