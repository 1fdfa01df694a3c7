"""The batch: one rule a notebook, parameters from config/<profile>.yaml.

`make reproduce` is the usual way in; `snakemake --cores 2 --config profile=toy` is the same batch.
"""

import dataclasses
from pathlib import Path

from ddpo_lib import paths
from ddpo_lib.batch import FINETUNE_PARAMETERS, NOTEBOOKS, needs_finetunings
from ddpo_lib.config import SPEED_ONLY, Finetune, load


workdir: str(paths.ROOT)


PROFILE = load(config.get("profile", "toy"))
RUNS = {run.name: run for run in PROFILE.batch()}
HOME = f"data/runs/{PROFILE.name}"
FIGURES = f"figures/{PROFILE.name}"

# An edited library redraws the figures, which takes minutes; it does not finetune again.
LIBRARY = sorted(Path(paths.__file__).parent.rglob("*.py"))

# Retrained toy models redraw them too: some notebooks look at the toy world in every profile.
TOY = sorted((paths.DATA / "toy").rglob("*.safetensors"))

# What two notebooks print at once nobody can read: it goes to a file, of which a failure shows
# the end. The kernel is named because editors like to write their own into a notebook.
PAPERMILL = "papermill --kernel python3 --no-progress-bar {input.notebook} {log.notebook}"
QUIETLY = " > {log.text} 2>&1 || {{ tail -n 20 {log.text} >&2; exit 1; }}"


# Settings that a finished run does not have to be made again for are left out.
DECISIVE = [f.name for f in dataclasses.fields(Finetune) if f.name not in SPEED_ONLY]


def setting(name):
    return lambda wildcards: getattr(RUNS[wildcards.run].settings, name)


def weights(run):
    """Of its policy and of its reward, under data/: retrained ones are another experiment."""
    folders = [paths.DATA / source for source in run.sources.values()]
    return sorted(file for folder in folders for file in folder.rglob("*.safetensors"))


rule all:
    input:
        [f"{FIGURES}/{file}" for entry in NOTEBOOKS.values() for file in entry.files(PROFILE)],
    message:
        "everything is there"


# Only evaluation.json, a run's last word, is declared. Snakemake deletes the declared output of a
# job that failed or starts over, and the checkpoints must survive that for the run to go on.
# One thread each: two finetunings side by side are as fast as one after the other on two threads.
rule finetune:
    input:
        lambda wildcards: weights(RUNS[wildcards.run]),
        notebook="notebooks/50_finetune.ipynb",
    output:
        HOME + "/{run}/evaluation.json",
    log:
        notebook=HOME + "/notebooks/50_finetune-{run}.ipynb",
        text=HOME + "/notebooks/50_finetune-{run}.log",
    params:
        # One by one, so that the reason for a rerun shows the setting that has changed.
        **{name: setting(name) for name in DECISIVE},
        profile=PROFILE.name,
        policy=lambda wildcards: RUNS[wildcards.run].policy,
        task=lambda wildcards: RUNS[wildcards.run].task,
        seed=lambda wildcards: RUNS[wildcards.run].seed,
        source=lambda wildcards: RUNS[wildcards.run].source,
        reward=lambda wildcards: RUNS[wildcards.run].reward,
        # As text: Snakemake does not notice a change inside an object.
        models=str(PROFILE.models),
        evaluation=str(PROFILE.evaluation),
    priority: 1
    threads: 1
    message:
        "finetune {wildcards.run}"
    shell:
        PAPERMILL + "".join(f" -p {name} {{params.{name}}}" for name in FINETUNE_PARAMETERS) + QUIETLY


for name, notebook in NOTEBOOKS.items():

    rule:
        name:
            name
        input:
            [f"{HOME}/{run}/evaluation.json" for run in RUNS] if needs_finetunings(name) else [],
            LIBRARY,
            TOY,
            notebook=f"notebooks/{name}.ipynb",
        output:
            [
                report(f"{FIGURES}/{file}", category=f"chapter {name[0]}", subcategory=name)
                for file in notebook.files(PROFILE)
            ],
        log:
            notebook=f"{HOME}/notebooks/{name}.ipynb",
            text=f"{HOME}/notebooks/{name}.log",
        threads: 1
        message:
            name
        shell:
            PAPERMILL + f" -p profile {PROFILE.name}" + QUIETLY
