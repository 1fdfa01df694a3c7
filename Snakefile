"""The batch: one rule a notebook, parameters from config/<profile>.yaml.

`make reproduce` is the usual way in; `snakemake --cores 2 --config profile=toy` is the same batch.
"""

import dataclasses
from pathlib import Path

from ddpo_lib import paths
from ddpo_lib.config import Finetune, load


workdir: str(paths.ROOT)


PROFILE = load(config.get("profile", "toy"))
RUNS = {run.name: run for run in PROFILE.batch()}
HOME = f"data/runs/{PROFILE.name}"
FIGURES = f"figures/{PROFILE.name}"
EVALUATIONS = [f"{HOME}/{name}/evaluation.json" for name in RUNS]

# An edited library redraws the figures, which takes a minute; it does not finetune again.
LIBRARY = sorted(Path(paths.__file__).parent.glob("*.py"))

# What two notebooks print at once nobody can read: it goes to a file, of which a failure shows
# the end. The kernel is named because editors like to write their own into a notebook.
PAPERMILL = "papermill --kernel python3 --no-progress-bar {input.notebook} {log.notebook}"
QUIETLY = " > {log.text} 2>&1 || {{ tail -n 20 {log.text} >&2; exit 1; }}"


def setting(name):
    return lambda wildcards: f"{name}={getattr(RUNS[wildcards.run].settings, name)}"


def weights(run):
    """Of its policy and of its reward, under data/: retrained ones are another experiment."""
    folders = [paths.DATA / source for source in run.sources.values()]
    return sorted(file for folder in folders for file in folder.rglob("*.safetensors"))


rule all:
    input:
        expand(
            FIGURES + "/{name}.{kind}",
            name=[
                "fig_5_1_samples_faces",
                "fig_5_3_learning_curves",
                "fig_5_7_lr_schedule",
                "fig_5_12_samples_churches",
            ],
            kind=["png", "pdf"],
        ),
        FIGURES + "/table_5_1.csv",
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
        *[setting(field.name) for field in dataclasses.fields(Finetune)],
        policy=lambda wildcards: RUNS[wildcards.run].policy,
        task=lambda wildcards: RUNS[wildcards.run].task,
        seed=lambda wildcards: RUNS[wildcards.run].seed,
        source=lambda wildcards: RUNS[wildcards.run].source,
        reward=lambda wildcards: RUNS[wildcards.run].reward,
        # As text: Snakemake does not notice a change inside an object.
        models=str(PROFILE.models),
        evaluation=str(PROFILE.evaluation),
    threads: 1
    message:
        "finetune {wildcards.run}"
    shell:
        PAPERMILL + " -r profile {PROFILE.name} -r policy {params.policy}"
        " -r task {params.task} -p seed {params.seed}" + QUIETLY


# From here on a notebook has all cores, so these run one after another.
rule learning_curves:
    input:
        EVALUATIONS,
        LIBRARY,
        notebook="notebooks/51_learning_curves.ipynb",
    output:
        multiext(FIGURES + "/fig_5_3_learning_curves", ".png", ".pdf"),
        multiext(FIGURES + "/fig_5_7_lr_schedule", ".png", ".pdf"),
    log:
        notebook=HOME + "/notebooks/51_learning_curves.ipynb",
        text=HOME + "/notebooks/51_learning_curves.log",
    threads: workflow.cores
    message:
        "51_learning_curves: Figures 5.3 and 5.7"
    shell:
        PAPERMILL + " -r profile {PROFILE.name}" + QUIETLY


rule results_table:
    input:
        EVALUATIONS,
        LIBRARY,
        notebook="notebooks/52_results_table.ipynb",
    output:
        FIGURES + "/table_5_1.csv",
    log:
        notebook=HOME + "/notebooks/52_results_table.ipynb",
        text=HOME + "/notebooks/52_results_table.log",
    threads: workflow.cores
    message:
        "52_results_table: Table 5.1"
    shell:
        PAPERMILL + " -r profile {PROFILE.name}" + QUIETLY


rule samples:
    input:
        EVALUATIONS,
        LIBRARY,
        notebook="notebooks/53_samples.ipynb",
    output:
        multiext(FIGURES + "/fig_5_1_samples_faces", ".png", ".pdf"),
        multiext(FIGURES + "/fig_5_12_samples_churches", ".png", ".pdf"),
    log:
        notebook=HOME + "/notebooks/53_samples.ipynb",
        text=HOME + "/notebooks/53_samples.log",
    threads: workflow.cores
    message:
        "53_samples: Figures 5.1 and 5.12"
    shell:
        PAPERMILL + " -r profile {PROFILE.name}" + QUIETLY
