"""The batch: one rule a notebook, parameters from config/<profile>.yaml.

`make reproduce` is the usual way in; `snakemake --cores 2 --config profile=toy` is the same batch.
"""

import os
from pathlib import Path

from ddpo_lib.book import finetuning, paths
from ddpo_lib.book.batch import FINETUNE_PARAMETERS, contents
from ddpo_lib.book.profiles import load


workdir: str(paths.OUTPUT)


PROFILE = load(config.get("profile", "toy"))
HOME = f"data/runs/{PROFILE.name}"
FIGURES = f"figures/{PROFILE.name}"
NOTEBOOKS = os.path.relpath(paths.NOTEBOOKS, paths.OUTPUT)

# By folder: retrained models and changed settings, but for n_iterations, have another.
RUNS = {finetuning.home(run).name: run for run in PROFILE.batch()}

# An edited library redraws the figures, which takes minutes; it does not finetune again.
LIBRARY = sorted(Path(paths.__file__).parents[1].rglob("*.py"))

# Retrained toy models redraw them too: some notebooks look at the toy world in every profile.
TOY = sorted(paths.TOY.rglob("*.safetensors"))

# What two notebooks print at once nobody can read: it goes to a file, and a failure is told in a
# few lines. The kernel is named because editors like to write their own into a notebook.
PAPERMILL = "papermill --kernel python3 --no-progress-bar {input.notebook:q} {log.notebook:q}"
QUIETLY = " > {log.text:q} 2>&1 || {{ python -m ddpo_lib.book.batch failure {log.text:q} >&2; exit 1; }}"


rule all:
    input:
        [f"{FIGURES}/{file}" for entry in contents().values() for file in entry.files(PROFILE)],
    message:
        "everything is there"


# Snakemake deletes the declared output of a job that failed or starts over, and takes for made what
# somebody made by hand. So it is a mark of its own, and the checkpoints survive for the run to go on.
# One thread each: two finetunings side by side are as fast as one after the other on two threads.
rule finetune:
    input:
        notebook=NOTEBOOKS + "/50_finetune.ipynb",
    output:
        touch(HOME + "/{home}/batch.done"),
    log:
        notebook=HOME + "/notebooks/50_finetune-{home}.ipynb",
        text=HOME + "/notebooks/50_finetune-{home}.log",
    params:
        profile=PROFILE.name,
        policy=lambda wildcards: RUNS[wildcards.home].policy,
        task=lambda wildcards: RUNS[wildcards.home].task,
        seed=lambda wildcards: RUNS[wildcards.home].seed,
        # For the rest, a change is a reason to run again.
        n_iterations=lambda wildcards: RUNS[wildcards.home].settings.n_iterations,
        evaluation=str(PROFILE.evaluation),
    priority: 1
    threads: 1
    message:
        "finetune {wildcards.home}"
    shell:
        PAPERMILL + "".join(f" -p {name} {{params.{name}:q}}" for name in FINETUNE_PARAMETERS) + QUIETLY


# The other seeds: `make seeds`. What they say is committed, so the batch can do without them.
SEED_RUNS = {finetuning.home(run).name: run for run in PROFILE.batch(every_seed=True)}


rule seed:
    output:
        touch(HOME + "/{home}/seed.done"),
    log:
        text=HOME + "/logs/{home}.log",
    params:
        profile=PROFILE.name,
        policy=lambda wildcards: SEED_RUNS[wildcards.home].policy,
        task=lambda wildcards: SEED_RUNS[wildcards.home].task,
        seed=lambda wildcards: SEED_RUNS[wildcards.home].seed,
        n_iterations=lambda wildcards: SEED_RUNS[wildcards.home].settings.n_iterations,
        evaluation=str(PROFILE.evaluation),
    threads: 1
    message:
        "finetune {wildcards.home}"
    shell:
        "python -m ddpo_lib.book.finetuning {params.profile:q} {params.policy:q} {params.task:q}"
        " --seed {params.seed}" + QUIETLY


rule seeds:
    input:
        [f"{HOME}/{home}/seed.done" for home in SEED_RUNS],
    output:
        touch(HOME + "/seeds.done"),  # no table: Snakemake would delete it before it is made again
    params:
        profile=PROFILE.name,
    threads: 2  # it runs alone, after all others
    message:
        "what the seeds say"
    shell:
        "python -m ddpo_lib.book.seeds {params.profile:q}"


# Minutes each: begun last, one core would wait for them.
LONG = "24_classifier_free_guidance", "41_reward_trajectories", "53_without_reinforcement_learning"

for name, notebook in contents().items():

    rule:
        name:
            name
        input:
            # All of chapter 5 and the appendices show finetuned policies.
            [f"{HOME}/{home}/batch.done" for home in RUNS] if name > "50" else [],
            LIBRARY,
            TOY,
            notebook=f"{NOTEBOOKS}/{name}.ipynb",
        output:
            # Restored where the notebook fails: its old figures stay.
            [update(f"{FIGURES}/{file}") for file in notebook.files(PROFILE)],
        log:
            notebook=f"{HOME}/notebooks/{name}.ipynb",
            text=f"{HOME}/notebooks/{name}.log",
        params:
            profile=PROFILE.name,
        priority: 1 if name in LONG else 0
        threads: 1
        message:
            name
        shell:
            PAPERMILL + " -p profile {params.profile:q}" + QUIETLY
