"""Bad inputs to every public entry, one a line: what is given, and what the answer must say.

The answer is one error of the kind that stands with the entry. It names the bad value, or what is
allowed, and no file has changed by then.
"""

import contextlib
import importlib
import json
import math
import shutil
import signal
import sys
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import SMALL
from safetensors.torch import load_file, save_file

from ddpo_lib import (
    diversity,
    encoders,
    evaluation,
    experience,
    guidance,
    hub,
    inversion,
    judges,
    log_probs,
    objectives,
    prompts,
    rewards,
    runs,
    sampler,
)
from ddpo_lib import finetune as loop
from ddpo_lib import policy as policies
from ddpo_lib.book import (
    batch,
    diagrams,
    figures,
    model_cards,
    notebook,
    paths,
    profiles,
    results,
)
from ddpo_lib.objectives import ddpo, hrf
from ddpo_lib.settings import Finetune
from ddpo_lib.toy import regressor

ROWS = []


def entry(name, kind, call, rows):
    """Add rows (given, words): call(world, given) raises the kind of error, with these words."""
    ROWS.extend(pytest.param(call, kind, *row, id=f"{name}-{i}") for i, row in enumerate(rows))


def do(world, given):
    return given(world)


def listing(folder):
    """Every file and its content, but for locks, which are empty and stay."""
    files = [each for each in folder.rglob("*") if not each.name.endswith(".lock")]
    return {each: each.read_bytes() if each.is_file() else None for each in files}


def write(world, name, text="x"):
    """A file that is there before the call; returns its path."""
    file = world.folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    world.before = listing(world.folder)
    return file


NAN, INF = math.nan, math.inf

# fmt: off
# ------------------------------------------------------------------------------- settings

entry("loop", ValueError, lambda _, given: Finetune(**given), [
    ({"n_iterations": 0}, "n_iterations=0: must be >= 1"),
    ({"n_iterations": True}, "n_iterations=True: must be of type int"),
    ({"n_iterations": 2.0}, "n_iterations=2.0: must be of type int"),
    ({"n_samples": 1, "minibatch_size": 1}, "n_samples=1: must be >= 2"),  # no deviation
    ({"n_samples": 15}, "n_samples=15 is not a multiple of minibatch_size=10"),
    ({"n_samples": 10, "minibatch_size": 20}, "n_samples=10 is not a multiple of minibatch_size=2"),
    ({"n_steps": 1}, "n_steps=1: must be >= 2"),
    ({"n_steps": "40"}, "n_steps='40': must be of type int"),
    ({"eta": 0}, "eta=0: must be > 0 and <= 1"),
    ({"eta": 3.0}, "eta=3.0: must be > 0 and <= 1"),  # more noise than a state holds
    ({"eta": NAN}, "eta=nan: must be > 0 and <= 1"),
    ({"eta": None}, "eta=None: must be of type float"),
    ({"min_std": -0.1}, "min_std=-0.1: must be >= 0 and < 1"),
    ({"min_std": 5}, "min_std=5: must be >= 0 and < 1"),
    ({"minibatch_size": 0}, "minibatch_size=0: must be >= 1"),
    ({"n_inner_epochs": 0}, "n_inner_epochs=0: must be >= 1"),
    ({"micro_batch": 0}, "micro_batch=0: must be >= 1"),
    ({"micro_batch": None}, "micro_batch=None: must be of type int"),
    ({"timestep_fraction": 0}, "timestep_fraction=0: must be > 0 and <= 1"),
    ({"timestep_fraction": 50}, "timestep_fraction=50: must be > 0 and <= 1"),  # no percentage
    ({"gradient_checkpointing": 1}, "gradient_checkpointing=1: must be of type bool"),
    ({"log_prob_reduction": "median"}, "'median': must be one of ('mean', 'sum')"),
    ({"log_prob_reduction": None}, "log_prob_reduction=None: must be of type str"),
    ({"learning_rate": -1e-6}, "learning_rate=-1e-06: must be >= 0 and <= 1"),
    ({"learning_rate": 0.0}, "learning_rate=0 at a constant rate: nothing would be learned"),
    ({"learning_rate": 2}, "learning_rate=2: must be >= 0 and <= 1"),
    ({"learning_rate": "3e-5"}, "in YAML 3e-5 needs its dot: 3.0e-5"),
    ({"learning_rate": True}, "learning_rate=True: must be of type float"),
    ({"lr_schedule": "cosine"}, "'cosine': must be one of ('constant', 'warmup_cosine')"),
    ({"peak_learning_rate": -1e-6}, "peak_learning_rate=-1e-06: must be > 0"),  # climbs the loss
    ({"peak_learning_rate": 0}, "peak_learning_rate=0: must be > 0"),
    ({"warmup": 3}, "warmup=3: must be >= 0 and <= 1"),
    ({"final_lr_fraction": -1}, "final_lr_fraction=-1: must be >= 0 and <= 1"),
    ({"weight_decay": 1.5}, "weight_decay=1.5: must be >= 0 and <= 1"),
    ({"max_grad_norm": -1.0}, "max_grad_norm=-1.0: must be > 0"),  # would turn the gradient round
    ({"max_grad_norm": 0}, "max_grad_norm=0: must be > 0"),
    ({"max_grad_norm": INF}, "max_grad_norm=inf: must be > 0 and finite"),
    ({"n_development": 1}, "n_development=1: must be >= 2"),
    ({"select_by": "best"}, "'best': must be one of ('development', 'stochastic', 'latest')"),
    ({"bf16": "yes"}, "bf16='yes': must be of type bool"),
])

entry("objective", ValueError, lambda _, row: objectives.load(row[0]).Settings(**row[1]), [
    (("ddpo", {"estimator": "ddpo_is"}), "estimator='ddpo_is': must be one of ('is', 'sf')"),
    (("ddpo", {"clip_range": -0.01}), "clip_range=-0.01: must be > 0 and <= 1"),
    (("ddpo", {"clip_range": 0}), "clip_range=0: must be > 0 and <= 1"),
    (("ddpo", {"clip_range": 1.5}), "clip_range=1.5: must be > 0 and <= 1"),
    (("ddpo", {"clip_range": NAN}), "clip_range=nan: must be > 0 and <= 1"),
    (("ddpo", {"clip_range": True}), "clip_range=True: must be of type float"),
    (("ddpo", {"clip_range": "0.1"}), "clip_range='0.1': must be of type float"),
    (("ddpo", {"advantage_clip": -1.0}), "advantage_clip=-1.0: must be > 0"),  # all would be -1
    (("ddpo", {"advantage_clip": 0.0}), "advantage_clip=0.0: must be > 0"),
    (("ddpo", {"advantage_clip": INF}), "advantage_clip=inf: must be > 0 and finite"),
    (("ddpo", {"advantage_scope": "batch"}), "must be one of ('iteration', 'minibatch')"),
    (("ddpo", {"loss_reduction": "none"}), "must be one of ('sum', 'mean')"),
    (("ddpo", {"group_size": 0}), "group_size=0: must be >= 1"),
    (("ddpo", {"kl_weight": -1}), "kl_weight=-1: must be >= 0"),
    (("d3po", {"temperature": 0}), "temperature=0: must be > 0"),
    (("d3po", {"clip_range": 1}), "clip_range=1: must be > 0 and < 1"),
    (("dense", {"group_size": 1}), "group_size=1: must be >= 2"),
    (("dense", {"n_draws": 0}), "n_draws=0: must be >= 1"),
    (("dense", {"n_comparisons": 0}), "n_comparisons=0: must be >= 1"),
    (("dense", {"discount": 1.1}), "discount=1.1: must be > 0 and <= 1"),
    (("dense", {"scale": 0}), "scale=0: must be > 0"),
    (("dense", {"clip_range": -1}), "clip_range=-1: must be > 0"),
    (("dpok", {"clip_range": 2}), "clip_range=2: must be > 0 and <= 1"),
    (("dpok", {"kl_weight": -0.1}), "kl_weight=-0.1: must be >= 0"),
    (("dpok", {"value_weight": NAN}), "value_weight=nan: must be >= 0"),
    (("dpok", {"helper_rate": 0}), "helper_rate=0: must be > 0"),
    (("hrf", {"group_size": 1}), "group_size=1: must be >= 2"),  # a sibling alone
    (("hrf", {"window": "last"}), "must be one of ('moving', 'fixed', 'anywhere')"),
    (("hrf", {"move_at": 0}), "move_at=0: must be >= 1"),
    (("nft", {"beta": 0}), "beta=0: must be > 0"),
    (("nft", {"kl_weight": -1.0}), "kl_weight=-1.0: must be >= 0"),
    (("nft", {"n_draws": 1.5}), "n_draws=1.5: must be of type int"),
    (("promise", {"kl_weight": -1}), "kl_weight=-1: must be >= 0"),
    (("rwr", {"weights": "best"}), "must be one of ('softmax', 'sparse')"),
    (("rwr", {"inverse_temperature": -1}), "inverse_temperature=-1: must be >= 0"),
    (("rwr", {"kept": 0}), "kept=0: must be > 0 and <= 1"),
    (("rwr", {"kept": 10}), "kept=10: must be > 0 and <= 1"),  # no percentage, no number
    (("sft", {"kl_weight": "0"}), "kl_weight='0': must be of type float"),
    (("sft", {"n_draws": 0}), "n_draws=0: must be >= 1"),
    (("tdpo", {"steps_per_update": 0}), "steps_per_update=0: must be >= 1"),
    (("tdpo", {"value_clip": 0}), "value_clip=0: must be > 0"),
    (("tdpo", {"reset_every": -1}), "reset_every=-1: must be >= 0"),
    (("tdpo", {"helper_rate": -20}), "helper_rate=-20: must be > 0"),
    (("ppo2", {}), "cannot import the objective 'ppo2'"),
    (("", {}), "cannot import the objective ''"),
    (("json.decoder", {}), "the objective 'json.decoder' lacks ['Settings', 'helpers', 'credit'"),
    (("..ddpo", {}), "cannot import the objective '..ddpo'"),
    ((3, {}), "the objective 3 lacks"),
    ((None, {}), "the objective None lacks"),
    ((SimpleNamespace(__name__="mine", Settings=ddpo.Settings), {}), "'mine' lacks ['helpers', "),
])

# ------------------------------------------------------------------------------- profiles

CONTENT = {
    "policies": {"faces": "toy/faces", "churches": "toy/churches"},
    "models": {"clip": "toy/clip", "aesthetic": "toy/aesthetic", "age": "toy/age"},
    "tasks": {"aesthetic": {"reward": "aesthetic"}, "over50": {"reward": "over50"}},
}


def read(world, content):
    """A profile of this text or these bytes, or of `CONTENT` with these changes."""
    if isinstance(content, dict):
        content = yaml.safe_dump(CONTENT | content, sort_keys=False)
    world.patch.setattr(paths, "CONFIG", write(world, "mine.yaml", content).parent)
    return profiles.load("mine")


def task(**changes):
    return {"tasks": {"red": changes}}


def batch_of(*runs):
    return {"runs": [{"policy": "faces", "task": "aesthetic"} | run for run in runs]}


entry("profile", ValueError, read, [
    ({"polices": {}}, "mine.yaml: the file: unknown ['polices']; known are ['evaluation"),
    ({"name": "../../x"}, "mine.yaml: the file: unknown ['name']"),
    ({"policies": ["faces"]}, "policies: must be a mapping, not ['faces']"),
    ({"policies": {"faces": 3}}, "policies: ['faces'] must be folders or ids, not 3"),
    ({"policies": {"faces": ""}}, "policies: ['faces'] must be folders or ids, not ''"),
    ({"policies": {"a/b": "toy/faces"}}, "the name 'a/b': must be of letters, digits"),
    ({"policies": {"faces-a": "toy/faces"}}, "the name 'faces-a': must be of"),  # see `Run.name`
    ({"models": {"clip": "x", "age": "y"}}, "models: missing ['aesthetic']"),
    ({"models": {}}, "models: missing ['aesthetic', 'age', 'clip']"),
    ({"models": None}, "models: missing ['aesthetic', 'age', 'clip']"),
    ({"models": "toy/clip"}, "models: must be a mapping, not 'toy/clip'"),
    ({"models": CONTENT["models"] | {"age": ["a"]}}, "models: ['age'] must be folders or ids"),
    ({"evaluation": {"m": 1}}, "evaluation: unknown ['m']"),
    ({"evaluation": [10]}, "evaluation: must be a mapping, not [10]"),
    ({"evaluation": {"n": 0}}, "n=0: must be >= 2"),
    ({"evaluation": {"n": 1}}, "n=1: must be >= 2"),
    ({"evaluation": {"n": "20"}}, "n='20': must be of type int"),
    ({"evaluation": {"n_steps": 0}}, "n_steps=0: must be >= 1"),
    ({"evaluation": {"seed": True}}, "seed=True: must be of type int"),
    ({"evaluation": {"seed": -1}}, "seed=-1: must be >= 0"),
    ({"finetune": {"steps": 9}}, "finetuning faces-aesthetic: settings: unknown ['steps']"),
    ({"finetune": 3}, "finetune: must be a mapping, not 3"),
    ({"finetune": {"eta": None}}, "finetuning faces-aesthetic: eta=None: must be of type"),
    ({"finetune": {"eta": True}}, "eta=True: must be of type float"),
    ({"finetune": {"learning_rate": "3e-5"}}, "learning_rate='3e-5': must be of type float"),
    ({"finetune": {"n_samples": 10.0}}, "n_samples=10.0: must be of type int"),
    ({"finetune": {"clip_range": -0.01}}, "clip_range=-0.01: must be > 0"),
    ({"finetune": {"objective": "ddpo_is"}}, "cannot import the objective 'ddpo_is'"),
    ({"finetune": {"objective": 3}}, "objective=3: must be a name"),
    ({"finetune": {"objective": None}}, "objective=None: must be a name"),
    ({"finetune": {"estimator": "isf"}}, "estimator='isf': must be one of ('is', 'sf')"),
    ({"finetune": {"jpeg_encoding": "zip"}}, "jpeg_encoding='zip': must be one of"),
    ({"finetune": {"objective": "rwr", "clip_range": 0.1}}, "settings: unknown ['clip_range']"),
    ({"tasks": ["red"]}, "tasks: must be a mapping, not ['red']"),
    ({"tasks": {"a b": {"reward": "aesthetic"}}}, "the name 'a b': must be of letters, digits"),
    (task(reward="aesthetic", cats={}), "finetuning faces-red: settings: unknown ['cats']"),
    (task(n_steps=9), "finetuning faces-red: unknown reward None"),
    ({"tasks": {"red": None}}, "finetuning faces-red: unknown reward None"),
    ({"tasks": {"red": "aesthetic"}}, "the task: must be a mapping, not 'aesthetic'"),
    (task(reward="tasty"), "finetuning faces-red: unknown reward 'tasty': give one of"),
    (task(reward="aesthetic", faces=3), "faces: must be a mapping, not 3"),
    (batch_of({"task": "red"}), "unknown task 'red': mine has ['aesthetic', 'over50']"),
    (batch_of({"policy": "cats"}), "unknown policy 'cats': mine has ['churches', 'faces']"),
    (batch_of({"policy": ["faces"]}), "the name ['faces']: must be of letters"),
    (batch_of({"seed": "a"}), "seed='a': must be of type int"),
    (batch_of({"seeds": 0}), "seeds=0: must be a whole number from 1 up"),
    (batch_of({"seeds": 2.0}), "seeds=2.0: must be a whole number from 1 up"),
    (batch_of({"seeds": 2, "seed": 1}), "a seed and a number of seeds: give one of them"),
    (batch_of({"seeds_only": "no"}), "seeds_only='no': must be true or false"),
    (batch_of({"n_iterations": 1}), "runs: unknown ['n_iterations']; known are ['policy', 'seed'"),
    (batch_of({}, {"seed": 0}), "runs: ['faces-aesthetic-s0'] stand twice"),
    ({"runs": {"policy": "faces"}}, "runs: must be a list, not {'policy': 'faces'}"),
    ({"runs": ["faces"]}, "runs: must be a mapping, not 'faces'"),
    ({"runs": [{"policy": "faces"}]}, "runs: missing ['task']"),
    ({"finetuned": ["a/b"]}, "finetuned: must be a mapping"),
    ({"finetuned": {"faces": "a/b"}}, "faces: must be a mapping, not 'a/b'"),
    ({"finetuned": {"faces": {"aesthetic": 3}}}, "faces: ['aesthetic'] must be folders"),
    ({"finetuned": {"cats": {"aesthetic": "a/b"}}}, "unknown policy 'cats'"),
    ({"finetuned": {"faces": {"red": "a/b"}}}, "unknown task 'red'"),
    ("", "mine.yaml: the file: missing ['models', 'policies', 'tasks']"),
    ("3: {}", "the file: unknown ['3']"),
    ("- faces", "the file: must be a mapping, not ['faces']"),
    ("faces", "the file: must be a mapping, not 'faces'"),
    ("policies: {faces: a/b, faces: a/c}", "'faces' stands twice"),
    ("tasks: {}\nmodels: {}\ntasks: {}", "'tasks' stands twice"),
    ("tasks: [", "mine.yaml: while parsing"),
    ("tasks: !!python/object:os.system {}", "could not determine a constructor"),
    ("? [a, b]\n: 1", "unhashable"),
    (b"policies: {faces: '\xff'}", "mine.yaml: 'utf-8' codec can't decode"),
])

entry("profile name", ValueError, lambda _, name: profiles.load(name), [
    ("tyo", "unknown profile 'tyo'"), ("../config/toy", "unknown profile '../config/toy'"),
    ("", "unknown profile ''"), (".", "unknown profile '.'"), (None, "'toy'"), (3, "'toy'"),
    ([], "unknown profile []"), ("toy.yaml", "unknown profile 'toy.yaml'"),
])


def run_of(policy="faces", task="aesthetic", **given):
    return lambda w: w.toy.run(policy, task, **given)


entry("run of a profile", ValueError, do, [
    (run_of("cats"), "unknown policy 'cats': toy has ['churches', 'faces']"),
    (run_of(None), "the name None: must be of letters, digits"),
    (run_of(task="red"), "unknown task 'red': toy has ['aesthetic', "),
    (run_of(task="a/b", reward="aesthetic"), "the name 'a/b': must be of letters, digits"),
    (run_of(task="a b", reward="aesthetic"), "the name 'a b': must be of"),
    (run_of(task="$(touch x)", reward="aesthetic"), "the name '$(touch x)': must be of"),
    (run_of(task="..", reward="aesthetic"), "the name '..': must be of"),
    (run_of(task="-x", reward="aesthetic"), "the name '-x': must be of"),
    (run_of(task="", reward="aesthetic"), "the name '': must be of"),
    (run_of(task="ä", reward="aesthetic"), "the name 'ä': must be of"),
    (run_of(task="a\n", reward="aesthetic"), r"the name 'a\n': must be of"),
    (run_of(task=3, reward="aesthetic"), "the name 3: must be of"),
    (run_of(reward="tasty"), "unknown reward 'tasty': give one of ('jpeg_compressibility'"),
    (run_of(reward=""), "unknown reward ''"),
    (run_of(reward=3), "unknown reward 3"),
    (run_of(reward=["aesthetic"]), "unknown reward ['aesthetic']"),
    (run_of(seed=-1), "finetuning faces-aesthetic: seed=-1: must be >= 0"),
    (run_of(seed=1.5), "seed=1.5: must be of type int"),
    (run_of(seed="a"), "seed='a': must be of type int"),
    (run_of(seed=True), "seed=True: must be of type int"),
    (run_of(seed=None), "seed=None: must be of type int"),
    (run_of(lerning_rate=1e-5), "settings: unknown ['lerning_rate']; known are ['adapter_alpha'"),
    (run_of(jpeg_encoding="zip"), "jpeg_encoding='zip': must be one of ('rescaled', 'published')"),
    (run_of(objective="ppo2"), "cannot import the objective 'ppo2'"),
    (run_of(objective=ddpo), "must be a name"),
    (lambda w: results.finish(w.toy, run_of()(w)), "faces-aesthetic-s0 was not begun"),
    (lambda w: batch.plan("toy", 0), "cores=0: must be"),
    (lambda w: batch.plan("toy", 1.5), "cores=1.5: must be"),
    (lambda w: batch.parameters("99_x"), "99_x.ipynb, which does not exist"),
])

# ------------------------------------------------------------------------------- notebooks


def begin(world, given):
    """What a notebook does first, with parameters injected as papermill does."""
    name, injected = given
    cells = json.loads((paths.NOTEBOOKS / f"{name}.ipynb").read_text(encoding="utf-8"))["cells"]
    (own,) = ("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ()))
    space = {"In": ["", own, f"# Parameters\n{injected}\n"]}
    for cell in space["In"]:
        exec(cell, space)
    world.patch.setattr(notebook, "get_ipython", lambda: SimpleNamespace(user_ns=space))
    page = notebook.begin(name)
    if name == "50_finetune":  # its next cell
        given = {name: value for name, value in page.parameters.items() if name != "profile"}
        profiles.load(page.profile).run(**given)


QUICK, GUIDANCE, BANDIT = "00_quickstart", "22_clip_guidance", "30_policy_gradients"

entry("notebook", ValueError, begin, [
    ((QUICK, "profile = 'tyo'"), "unknown profile 'tyo'"),
    ((QUICK, "profile = None"), "unknown profile None"),
    ((QUICK, "sede = 5"), "unknown parameter ['sede']: notebook 00_quickstart takes ['profile'"),
    ((QUICK, "policy = 'cats'"), "unknown policy 'cats': toy has ['faces', 'churches']"),
    ((QUICK, "policy = 3"), "unknown policy 3: toy has"),
    ((QUICK, "n_pictures = 0"), "n_pictures=0: must be a whole number from 1 up"),
    ((QUICK, "n_samples = 10.0"), "n_samples=10.0: must be a whole number from 1 up"),
    ((QUICK, "n_steps = 0"), "n_steps=0: must be a whole number from 1 up"),  # not the profile's
    ((QUICK, "seed = -1"), "seed=-1: must be a whole number from 0 up"),
    (("20_forward_process", "n_walks = '5000'"), "n_walks='5000': must be a whole number from 1"),
    (("20_forward_process", "n_pictures = -1"), "n_pictures=-1: must be a whole number from 1 up"),
    (("21_training_a_ddpm", "batch_size = 0"), "batch_size=0: must be a whole number from 1 up"),
    (("21_training_a_ddpm", "learning_rate = 'high'"), "learning_rate='high': must be a finite"),
    (("21_training_a_ddpm", "learning_rate = float('nan')"), "learning_rate=nan: must be a finite"),
    (("21_training_a_ddpm", "n_updates = None"), "n_updates=None: must be a whole number from 1"),
    ((GUIDANCE, "policy = 'dogs'"), "unknown policy 'dogs'"),
    ((GUIDANCE, "gamma_too_large = None"), "gamma_too_large=None: must be a finite number"),
    ((GUIDANCE, "n_shown = 0"), "n_shown=0: must be a whole number from 1 up"),
    ((GUIDANCE, "n_steps = 2.5"), "n_steps=2.5: must be a whole number from 1 up"),
    (("23_ddim_and_inversion", "n_inversion_steps = 0"), "n_inversion_steps=0: must be a whole"),
    (("23_ddim_and_inversion", "policy = ''"), "unknown policy ''"),
    ((BANDIT, "n_walks = 0"), "n_walks=0: must be a whole number from 1 up"),
    ((BANDIT, "offset = 'much'"), "offset='much': must be a finite number"),
    (("31_reward_models", "n_heads = 0"), "n_heads=0: must be a whole number from 1 up"),
    (("31_reward_models", "temperature = None"), "temperature=None: must be a finite number"),
    (("40_denoising_as_mdp", "seed = 1.5"), "seed=1.5: must be a whole number from 0 up"),
    (("41_reward_trajectories", "n_resamples = 0"), "n_resamples=0: must be a whole number from 1"),
    (("41_reward_trajectories", "policy = 'cats'"), "unknown policy 'cats'"),
    (("50_finetune", "policy = 'cats'"), "unknown policy 'cats'"),
    (("50_finetune", "task = 'red'"), "unknown task 'red'"),
    (("50_finetune", "reward = 'tasty'"), "unknown reward 'tasty'"),
    (("50_finetune", "seed = True"), "seed=True: must be a whole number"),
    (("50_finetune", "n_samples = 0"), "n_samples=0: must be a whole number"),
    (("50_finetune", "eta = 3"), "eta=3: must be > 0 and <= 1"),
    (("50_finetune", "lr_schedule = 'cosine'"), "lr_schedule='cosine': must be one of"),
    (("50_finetune", "objective = 'rwr'; clip_range = 0.1"), "settings: unknown ['clip_range']"),
    (("50_finetune", "jpeg_encoding = 'zip'"), "jpeg_encoding='zip': must be one of"),
    (("51_what_the_seeds_agree_on", "n_pictures = 0"), "n_pictures=0: must be a whole number from"),
    (("54_emergent_effects", "seed = '0'"), "seed='0': must be a whole number from 0 up"),
    (("55_transitions", "n_shown = 0"), "n_shown=0: must be a whole number from 1 up"),
    (("55_transitions", "typical = 'middle'"), "typical='middle': must be a finite number"),
    (("56_age_distribution", "seed = -3"), "seed=-3: must be a whole number from 0 up"),
    (("57_mode_collapse", "n_map = 0"), "n_map=0: must be a whole number from 1 up"),
    (("58_galleries", "n_columns = 0"), "n_columns=0: must be a whole number from 1 up"),
    (("59_development_set", "n_rows = 0"), "n_rows=0: must be a whole number from 1 up"),
    (("59_development_set", "policy = 'cats'"), "unknown policy 'cats'"),
    (("24_classifier_free_guidance", "n_points = 0"), "n_points=0: must be a whole number from 1"),
    (("24_classifier_free_guidance", "dropped = 'some'"), "dropped='some': must be a finite"),
    (("25_score_based_models", "n_levels = 2.5"), "n_levels=2.5: must be a whole number from 1"),
    (("32_trust_regions_and_ppo", "clip_range = None"), "clip_range=None: must be a finite number"),
    (("32_trust_regions_and_ppo", "n_epochs = 0"), "n_epochs=0: must be a whole number from 1 up"),
    (("52_who_is_in_the_images", "seed = -1"), "seed=-1: must be a whole number from 0 up"),
    (("53_without_reinforcement_learning", "n_seeds = 0"), "n_seeds=0: must be a whole number"),
    (("53_without_reinforcement_learning", "learning_rate = ''"), "learning_rate='': must be"),
    (("60_methods", "n_fit = -64"), "n_fit=-64: must be a whole number from 1 up"),
    (("61_frontier", "gain = float('inf')"), "gain=inf: must be a finite number"),
    (("62_cures", "profile = 'tyo'"), "unknown profile 'tyo'"),
    (("62_cures", "eta = 1"), "unknown parameter ['eta']: notebook 62_cures takes"),
    (("70_text_to_image", "n_each = 0"), "n_each=0: must be a whole number from 1 up"),
    (("71_unseen_prompts", "prompt = 'a cat'"), "unknown parameter ['prompt']"),
    (("73_fooling_the_judge", "profile = 3"), "unknown profile 3"),
    (("80_claims_and_findings", "seed = 1"), "unknown parameter ['seed']"),
])

# ------------------------------------------------------------------------------- runs


def finetune(world, given):
    """A finetuning of the tiny policy, with something else than usual."""
    given = {"policy": world.policy, "reward": brightness, "objective": "ddpo"} | given
    given.setdefault("settings", Finetune(**SMALL | given.pop("loop", {})))
    loop.finetune(home=world.folder / "run", **given)


def brightness(images):
    return images.mean((1, 2, 3))


def stop_after_two(row):
    if row["iteration"] == 2:
        raise KeyboardInterrupt


entry("finetune", ValueError, finetune, [
    ({"loop": {"n_steps": 5000}}, "n_steps=5000: must be a whole number from 1 to 1000"),
    ({"loop": {"min_std": 0.99}}, "no step has sigma_t > 0.99"),
    ({"seed": -1}, "seed=-1: must be a whole number from 0 up"),
    ({"seed": 1.5}, "seed=1.5: must be a whole number from 0 up"),
    ({"seed": True}, "seed=True: must be a whole number from 0 up"),
    ({"seed": None}, "seed=None: must be a whole number from 0 up"),
    ({"objective": "ppo2"}, "cannot import the objective 'ppo2'"),
    ({"objective": None}, "the objective None lacks ['Settings'"),
    ({"objective_settings": {"clip_range": 0.1}}, "must be a ddpo_lib.objectives.ddpo.Settings"),
    ({"objective_settings": ddpo.Settings(estimator="sf")}, "allows one update per rollout"),
    ({"objective_settings": ddpo.Settings(group_size=3)}, "no multiple of the groups' size, 3"),
    ({"objective": "d3po", "loop": {"minibatch_size": 1}}, "minibatch_size=1 is no multiple"),
    ({"objective": "hrf", "objective_settings": hrf.Settings(group_size=3)}, "the groups' size, 3"),
    ({"objective": "dense"}, "minibatch_size=2 is no multiple of the groups' size, 4"),
    ({"policy": "data/toy/faces"}, "policy='data/toy/faces': must be a ddpo_lib.policy.Policy"),
    ({"policy": None}, "policy=None: must be a ddpo_lib.policy.Policy"),
    ({"settings": {"n_iterations": 3}}, "must be a ddpo_lib.settings.Finetune"),
    ({"settings": ddpo.Settings()}, "must be a ddpo_lib.settings.Finetune"),
    ({"reward": lambda images, prompts: 0}, "reads prompts: this policy needs a function of image"),
    ({"reward": lambda: 0}, "is no reward: a function of (images)"),
    ({"reward": "aesthetic"}, "is no reward: a function of (images)"),
    ({"reward": 3}, "is no reward: a function of (images)"),
    ({"reward": lambda images: images.sum()}, "for 2 images: it must return one real number each"),
    ({"reward": lambda images: [1, 2, 3]}, "for 2 images: it must return one real number each"),
])

entry("finetune on a reward that raises", RuntimeError, finetune, [
    ({"reward": lambda images: images[99]}, "raised IndexError: index 99"),
])


def resume(change, **given):
    """Go on with a run after two iterations of three, after a change to its folder."""
    def call(world):
        home = shutil.copytree(world.home, world.folder / "run")
        change(home)
        world.before = listing(world.folder)
        finetune(world, given)

    return call


def cut(name):
    return lambda home: (home / name).write_bytes((home / name).read_bytes()[:-20])


def put(name, text):
    return lambda home: (home / name).write_text(text)


def drop(name):
    return lambda home: (home / name).unlink()


def link(home):
    (home / "last").rename(home / "mine")
    (home / "last").symlink_to("mine")


def keep(home):
    pass


NETWORK = "unet/diffusion_pytorch_model.safetensors"

entry("run folder", ValueError, do, [
    (resume(keep, loop={"eta": 0.5}), "holds a run with other settings: settings.eta 1.0 → 0.5"),
    (resume(keep, seed=1), "holds a run with other settings: seed 0 → 1"),
    (resume(keep, reward=lambda images: images.amax((1, 2, 3))), "other settings: reward.name"),
    (resume(keep, objective="rwr"), "other settings: objective.name"),
    (resume(keep, objective_settings=ddpo.Settings(clip_range=0.1)), "objective_settings.clip_ran"),
    (resume(drop("settings.json")), "is not empty, and no run: settings.json is missing"),
    (resume(put("settings.json", "")), "settings.json is damaged"),
    (resume(put("settings.json", "{")), "settings.json is damaged"),
    (resume(put("settings.json", "[]")), "settings.json is damaged"),
    (resume(put("settings.json", '{"settings": {}}')), "settings.json is damaged (KeyError"),
    (lambda w: runs.development(w.folder), "holds no development set"),
    (lambda w: runs.development(w.home, "eta0"), "'eta0': must be one of"),
    (lambda w: runs.best(w.folder), "best is damaged (FileNotFoundError"),
    (resume(lambda home: shutil.rmtree(home / "best")), "best is damaged (FileNotFoundError"),
    (resume(put("best/best.json", "{")), "best is damaged (JSONDecodeError"),
    (resume(link), "last'] are links, which the next checkpoint would replace: put the folder"),
    (resume(put("metrics.jsonl", "")), "metrics.jsonl is damaged: it has lines of iterations []"),
    (resume(put("metrics.jsonl", '{"iteration": 1}\n')), "metrics.jsonl is damaged: it has lines"),
    (resume(keep, loop={"n_iterations": 1}), "holds 2 iterations, more than n_iterations=1"),
])

entry("checkpoint", ValueError, do, [
    (resume(put("last/state.json", "")), "last is damaged (JSONDecodeError"),
    (resume(put("last/state.json", "{}")), "last is damaged (KeyError: 'iterations_done')"),
    (resume(put("last/state.json", '{"iterations_done": 1}')), "is damaged (KeyError: 'sha256')"),
    (resume(cut("last/optimizer.safetensors")), "optimizer.safetensors is not what was"),
    (resume(drop("last/optimizer.safetensors")), "is damaged (FileNotFoundError"),
    (resume(cut(f"last/{NETWORK}")), f"{NETWORK} is not what was written"),
    (resume(cut("last/scheduler/scheduler_config.json")), "is not what was written"),
    (resume(put("last/unet/config.json", "{}")), "unet/config.json is not what was"),
    (resume(put("metrics.jsonl", "{\n{}\n")), "metrics.jsonl, line 1 is damaged"),
])

# ------------------------------------------------------------------------------- policies


def altered(change, **given):
    """Load a saved policy, after a change to its folder."""
    def call(world):
        policy = shutil.copytree(world.saved, world.folder / "policy")
        change(policy)
        world.before = listing(world.folder)
        policies.load(policy, "cpu", **given)

    return call


def config(file, **changes):
    """Other fields in a file of JSON."""
    def change(folder):
        content = json.loads((folder / file).read_text()) | changes
        (folder / file).write_text(json.dumps(content))

    return change


def tensor(name, value):
    """Another tensor in the network's weights; None for none."""
    def change(folder):
        state = load_file(folder / NETWORK) | {name: value}
        save_file({k: v for k, v in state.items() if v is not None}, folder / NETWORK)

    return change


INDEX, SCHEDULE, NET = "model_index.json", "scheduler/scheduler_config.json", "unet/config.json"
BIAS = "conv_out.bias"

entry("policy folder", FileNotFoundError, do, [
    (altered(drop(INDEX)), "must be a complete folder of a DDPMPipeline"),
    (altered(put(INDEX, "{")), "must be a complete folder of a DDPMPipeline"),
    (altered(put(INDEX, "{}")), "Cause: KeyError: '_class_name'"),
    (altered(put(INDEX, "[]")), "must be a complete folder of a DDPMPipeline"),
    (altered(drop(SCHEDULE)), "scheduler_config.json"),
    (altered(put(SCHEDULE, "")), "scheduler_config.json"),
    (altered(drop(NET)), "config.json"),
    (altered(put(NET, "{")), "config.json"),
    (altered(drop(NETWORK)), "diffusion_pytorch_model"),
    (altered(cut(NETWORK)), "must be a complete folder"),
    (altered(put(NETWORK, "")), "must be a complete folder"),
    (lambda w: policies.load(w.folder), "must be a complete folder"),
    (lambda w: policies.load(w.folder / "nothing"), "nothing': there is no such folder"),
    (lambda w: policies.load(w.saved / INDEX), "model_index.json': there is no such folder"),
    (lambda w: policies.load("./faces"), "no policy at './faces'"),
    (lambda w: policies.load("faces"), "no policy at 'faces'"),
    (lambda w: policies.load("a/b/c"), "no policy at 'a/b/c'"),
    (lambda w: policies.load(""), "must be a complete folder"),
    (lambda w: policies.load(None), "no policy at 'None'"),
    (lambda w: policies.load(w.folder / "task.pth", base=w.saved), "task.pth': the file does not"),
])

entry("policy", ValueError, do, [
    (altered(config(INDEX, _class_name="StableDiffusionPipeline")), "supported are {'text-to"),
    (altered(config(INDEX, _class_name="DiTPipeline")), "supported are {'pipeline': ("),
    (altered(config(INDEX, unet=["diffusers", "UNet1DModel"])), "supported are {'unet': ('UNet2DM"),
    (altered(config(INDEX, unet=None)), "not supported are {'unet': None}"),
    (altered(config(INDEX, scheduler=["diffusers", "PNDMScheduler"])), "{'scheduler':"),
    (altered(config(SCHEDULE, prediction_type="sample")), "{'prediction_type': ('epsilon"),
    (altered(config(SCHEDULE, thresholding=True)), "not supported are {'thresholding': True}"),
    (altered(config(SCHEDULE, rescale_betas_zero_snr=True)), "'rescale_betas_zero_snr': (False,)"),
    (altered(config(SCHEDULE, timestep_spacing="odd")), "'timestep_spacing': ('leading"),
    (altered(config(SCHEDULE, beta_schedule="sigmoid")), "'beta_schedule': ('linear"),
    (altered(config(SCHEDULE, variance_type="learned_range")), "{'variance': 'learned'}"),
    (altered(config(SCHEDULE, trained_betas=[0.01] * 999 + [NAN])), "num_train_timesteps of them,"),
    (altered(config(SCHEDULE, trained_betas=[0.01] * 999 + [1.5])), "num_train_timesteps of them,"),
    (altered(config(SCHEDULE, trained_betas=[0.01] * 999 + [0.0])), "num_train_timesteps of them,"),
    (altered(config(SCHEDULE, trained_betas=[0.01] * 10)), "num_train_timesteps of them, inside ("),
    (altered(config(SCHEDULE, beta_end=-0.02)), "num_train_timesteps of them, inside (0"),
    (altered(config(NET, sample_size=None)), "{'image size': 'unknown'}"),
    (altered(config(NET, num_class_embeds=10)), "not supported are"),
    (altered(config(NET, out_channels=6)), "another network's, with other tensors, such as"),
    (altered(tensor(BIAS, None)), "with other tensors, such as conv_out.bias"),
    (altered(tensor(BIAS, torch.zeros(2))), "with other tensors, such as"),
    (altered(tensor("conv_out.scale", torch.zeros(3))), "with other tensors, such as conv_out.sca"),
    (altered(tensor(BIAS, torch.full((3,), NAN))), "{'weights': 'not all finite'}"),
    (altered(tensor(BIAS, torch.full((3,), -INF))), "{'weights': 'not all finite'}"),
    (lambda w: policies.load(write(w, "task.pth"), base=w.saved), "no checkpoint of the thesis"),
    (lambda w: policies.load(write(w, "task.pth")), "holds weights alone: name the policy that it"),
    (lambda w: policies.save(w.guided, w.folder / "p"), "save the policy it guides"),
    (lambda w: policies.encode(w.policy, "a face"), "takes no text: prompts must be None"),
    (lambda w: policies.encode(w.policy, ["a face"]), "takes no text: prompts must be None"),
    (lambda w: policies.encode(w.policy, []), "takes no text: prompts must be None"),
    (lambda w: policies.encode(w.policy, 0), "takes no text: prompts must be None"),
    (lambda w: policies.predict_noise(w.policy, w.x_T, w.t, "a face"), "context must be None"),
    (lambda w: policies.steps(w.policy, 0), "n_steps=0: must be a whole number from 1 to 1000"),
    (lambda w: policies.steps(w.policy, 1001), "n_steps=1001: must be a whole number from 1 to 10"),
    (lambda w: policies.steps(w.policy, 40.0), "n_steps=40.0: must be a whole number from 1 to 10"),
    (lambda w: policies.steps(w.policy, True), "n_steps=True: must be a whole number from 1 to 10"),
    (lambda w: policies.steps(w.policy, "40"), "n_steps='40': must be a whole number from 1 to 10"),
    (lambda w: policies.sigma(w.policy, w.t, w.t - 25, eta=-0.1), "eta=-0.1: must lie between 0"),
    (lambda w: policies.transition(w.policy, w.x_T, w.t, w.t - 25, eta=NAN), "eta=nan: must lie"),
])

entry("Hub", FileNotFoundError, do, [
    (lambda w: policies.load("nobody/nothing"), "'nobody/nothing', the id of a model on the"),
    (lambda w: policies.load("google/ddpm-church-256"), "HF_HUB_OFFLINE is set and the cache"),
    (lambda w: policies.load("https://huggingface.co/google/ddpm-church-256"), "HF_HUB_OFFLINE is"),
    (lambda w: policies.load("google/ddpm-church-256@v9"), "HF_HUB_OFFLINE is set"),
    (lambda w: policies.load("https://example.com/a/model"), "no policy at 'https://example.com/a"),
    (lambda w: policies.load("no body/no thing"), "there is no no body/no thing"),
    (lambda w: policies.load("nobody/-nothing-"), "there is no nobody/-nothing-"),
    (lambda w: hub.commit("nobody/nothing"), "cannot get 'nobody/nothing'"),
    (lambda w: encoders.load_clip("no/such/folder"), "give a folder in open_clip's format or a"),
    (lambda w: encoders.load_clip("ViT-L-14:nobody"), "no CLIP model at 'ViT-L-14:nobody'"),
    (lambda w: encoders.load_clip("ViT-L-14:openai"), "HF_HUB_OFFLINE is set"),
    (lambda w: encoders.load_clip(w.folder), "open_clip_config.json is missing"),
    (lambda w: encoders.load_aesthetic_head(w.folder), "model.safetensors is missing"),
    (lambda w: encoders.load_aesthetic_head("no/such"), "HF_HUB_OFFLINE is set"),
    (lambda w: encoders.load_age_classifier(w.folder), "config.json is missing"),
    (lambda w: encoders.load_age_classifier("nateraw/vit-age-classifier"), "HF_HUB_OFFLINE is set"),
    (lambda w: regressor.load_regressor(w.folder), "config.json is missing. `make toy` rebuilds"),
    (lambda w: model_cards.push_to_hub(w.folder, "me/it"), "best holds no policy: finetune"),
])

# ------------------------------------------------------------------------------- rewards

entry("images", ValueError, lambda _, images: rewards.to_uint8(images), [
    (torch.zeros(2, 3, 8, 8).byte(), "got torch.uint8 of shape (2, 3, 8, 8); of uint8 images"),
    (torch.zeros(2, 3, 8, 8).long(), "got torch.int64 of shape (2, 3, 8, 8)"),
    (torch.zeros(2, 3, 8, 8, dtype=torch.complex64), "got torch.complex64"),
    (torch.zeros(3, 8, 8), "expected a float tensor (N, C, H, W) in [-1, 1], got torch.float32 of"),
    (torch.zeros(1, 2, 3, 8, 8), "got torch.float32 of shape (1, 2, 3, 8, 8)"),
    (np.zeros((2, 3, 8, 8)), "got float64 of shape (2, 3, 8, 8)"),
    ([torch.zeros(3, 8, 8)], "got list"),
    (None, "got NoneType"),
    ("faces.png", "got str"),
    (torch.linspace(0, 255, 192).view(1, 3, 8, 8), "got 0 to 255: divide by 127.5, subtract 1"),
])

entry("images not finite", FloatingPointError, lambda _, images: rewards.to_uint8(images), [
    (torch.full((1, 3, 8, 8), NAN), "images [0] are not finite"),
    (torch.full((2, 3, 8, 8), INF), "images [0, 1] are not finite"),
    (torch.full((1, 1, 8, 8), -INF), "images [0] are not finite"),
])

entry("pictures", ValueError, do, [
    (lambda w: rewards.to_uint8(w.images, "webp"), "'webp': must be one of ('rescaled"),
    (lambda w: rewards.to_uint8(w.images, None), "None: must be one of ('rescaled', 'published')"),
    (lambda w: rewards.from_uint8(torch.zeros(2, 8, 8, 3)), "expected a uint8 tensor (N, H, W, C)"),
    (lambda w: rewards.from_uint8(torch.zeros(8, 8, 3).byte()), "got torch.uint8 of shape (8, 8,"),
    (lambda w: rewards.from_uint8(w.pictures), "expected a uint8 tensor (N, H, W, C), got uint8"),
    (lambda w: rewards.jpeg_kilobytes(torch.zeros(1, 2, 8, 8)), "1 or 3 channels, not 2"),
    (lambda w: rewards.jpeg_compressibility(torch.zeros(1, 4, 8, 8)), "1 or 3 channels, not 4"),
    (lambda w: rewards.jpeg_incompressibility(w.images, "zip"), "'zip': must be one of"),
    (lambda w: encoders.embed_images(w.clip, torch.zeros(1, 3, 8, 9)), "expected square RGB image"),
    (lambda w: encoders.embed_images(w.clip, torch.zeros(1, 1, 8, 8)), "got (1, 1, 8, 8)"),
    (lambda w: encoders.embed_texts(w.clip, "an old face"), "texts='an old face': must be a"),
    (lambda w: encoders.embed_texts(w.clip, []), "texts=[]: must be a list of texts"),
    (lambda w: encoders.embed_texts(w.clip, [None]), "texts=[None]: must be a list of texts"),
])


def score(reward, n=4):
    """Score n images, as the loop does."""
    return lambda w: rewards.checked(reward)(torch.zeros(n, 3, 8, 8))


entry("reward", ValueError, do, [
    (score(lambda x: x.sum()), "returned torch.float32 of shape () for 4 images: it must return"),
    (score(lambda x: x[:, 0, 0, :1]), "returned torch.float32 of shape (4, 1)"),
    (score(lambda x: torch.zeros(3)), "returned torch.float32 of shape (3,)"),
    (score(lambda x: [1.0, 2.0]), "returned torch.float32 of shape (2,)"),
    (score(lambda x: np.zeros((4, 1))), "returned torch.float64 of shape (4, 1)"),
    (score(lambda x: torch.zeros(4, dtype=torch.complex64)), "returned torch.complex64"),
    (score(lambda x: np.zeros(4, complex)), "returned torch.complex128"),
    (score(lambda x: x.amax((1, 2, 3)) > 0), "returned torch.bool of shape"),
    (score(lambda x: None), "returned NoneType for 4 images"),
    (score(lambda x: "high"), "returned str for 4 images"),
    (score(lambda x: ["a", "b", "c", "d"]), "returned list for 4 images"),
    (score(lambda x: {"score": 1}), "returned dict for 4 images"),
    (score(lambda x, prompts: [0] * 4), "reads prompts: 4 images and 0 prompts"),
    (score(lambda: 0), "is no reward: a function of (images), or of (images, prompts), and not of"),
    (score(lambda a, b, c: 0), "and not of (a, b, c)"),
    (score("aesthetic"), "'str' is no reward: a function of (images)"),
    (score(None), "'NoneType' is no reward: a function of (images)"),
    (lambda w: rewards.load("beauty"), "unknown reward 'beauty': choose one of"),
    (lambda w: rewards.load("my_module:"), "unknown reward 'my_module:'"),
    (lambda w: rewards.load(":reward"), "unknown reward ':reward'"),
    (lambda w: rewards.load(""), "unknown reward ''"),
    (lambda w: rewards.load(None), "unknown reward None"),
    (lambda w: rewards.load(3), "unknown reward 3"),
    (lambda w: rewards.load("no_such_module:reward"), "cannot import the reward 'no_such_module:r"),
    (lambda w: rewards.load("..:reward"), "cannot import the reward '..:reward'"),
    (lambda w: rewards.load("a b:reward"), "cannot import the reward 'a b:reward'"),
    (lambda w: rewards.load("ddpo_lib.hub:reward"), "has no attribute 'reward'"),
    (lambda w: rewards.load("math:pi"), "'math:pi'"),
    (lambda w: rewards.load("aesthetic"), "'aesthetic' looks through models: name a source of"),
    (lambda w: rewards.load("over50", {"age": ""}), "name a source of ['age']"),
    (lambda w: rewards.load("under30", {"clip": "toy/clip"}), "name a source of ['age']"),
])


entry("reward not finite", FloatingPointError, do, [
    (score(lambda x: torch.tensor([0, 1, NAN, 2])), "is not finite for images [2]: nan; let it"),
    (score(lambda x: torch.tensor([0, -INF, 1, 2])), "is not finite for images [1]: -inf"),
    (score(lambda x: np.array([1e300, 0, 0, 0])), "is not finite for images [0]: inf"),
])


def broken(images):
    raise KeyError("lost")


entry("reward that raises", RuntimeError, do, [
    (score(broken), "reward 'broken' raised KeyError: 'lost'"),
    (score(lambda x: x[99]), "raised IndexError: index 99"),
])

# ------------------------------------------------------------------------------- prompts

entry("prompts", ValueError, lambda _, given: prompts.load(given[0], **given[1]), [
    (([], {}), "no prompts: give at least one"),
    (([""], {}), "prompt 0, '': must be a text that is not empty"),
    ((["a cat", "  "], {}), "prompt 1, '  ': must be a text"),
    (([3], {}), "prompt 0, 3: must be a text"),
    (([None], {}), "prompt 0, None: must be a text"),
    ((["a cat", "a cat"], {}), "prompt 'a cat' comes twice"),
    (("a {animal}", {}), "has the slots ['animal'], and there are words for []"),
    (("a {animal}", {"animal": ["cat"], "place": ["sea"]}), "words for ['animal', 'place']"),
    (("a {animal}", {"animal": []}), "no prompts: give at least one"),
    (("a {animal}", {"animal": ["cat", "cat"]}), "prompt 'a cat' comes twice"),
    (("cats.txt", {"animal": ["cat"]}), "has the slots [], and there are words for ['animal']"),
])

entry("prompts' file", FileNotFoundError, lambda _, name: prompts.load(name), [
    ("cats.txt", "cats.txt"), ("no/such/file", "no/such/file"),
])

entry("judge", ImportError, do, [
    (lambda w: judges.image_reward(), "needs the package ImageReward, which cannot be imported"),
    (lambda w: judges.human_preference(), "pip install hpsv2"),
])

entry("judge's model", FileNotFoundError, do, [
    (lambda w: judges.pick_score("nobody/nothing"), "cannot get 'nobody/nothing', the id of"),
])

entry("judge's prompts", ValueError, do, [
    (lambda w: rewards.checked(judges.clip_alignment(w.clip))(w.images), "2 images and 0 prompts"),
    (lambda w: rewards.checked(judges.clip_alignment(w.clip))(w.images, ["a cat"]),
     "reads prompts: 2 images and 1 prompts"),
])

# ------------------------------------------------------------------------------- sampling

T = 10


def both(**given):
    """rollout and sample of the same arguments; both must refuse, and sample is the last."""
    def call(world):
        chain = {"x_T": world.x_T, "n_steps": T, "seeds": world.seeds, "eta": 1.0} | given
        with pytest.raises(ValueError):
            sampler.rollout(world.policy, **chain)
        sampler.sample(world.policy, **chain)

    return call


def slope(loss):
    """The gradient of a loss, as guidance takes it."""
    return lambda w: guidance.gradient(w.policy, loss, w.x_T, w.t)


entry("sampler", ValueError, do, [
    (both(x_T=torch.zeros(2, 3, 16, 16)), "shape (2, 3, 16, 16) does not fit a policy of shape (3"),
    (both(x_T=torch.zeros(2, 1, 8, 8)), "shape (2, 1, 8, 8) does not fit"),
    (both(x_T=torch.zeros(3, 8, 8)), "shape (3, 8, 8) does not fit"),
    (both(x_T=torch.zeros(0, 3, 8, 8), seeds=[]), "shape (0, 3, 8, 8) does not fit"),
    (both(x_T=torch.zeros(0)), "shape (0,) does not fit"),
    (both(x_T=torch.zeros(())), "shape () does not fit"),
    (both(x_T=torch.zeros(2, 3, 8, 8).long()), "torch.int64"),
    (both(x_T=torch.zeros(2, 3, 8, 8).double()), "torch.float64"),
    (both(x_T=np.zeros((2, 3, 8, 8), np.float32)), "a float32 tensor, as of sampler.noise"),
    (both(eta=-0.1), "eta=-0.1: must lie between 0 (deterministic) and 1"),
    (both(eta=1 + 1e-9), "must lie between 0 (deterministic) and 1"),
    (both(eta=3), "eta=3: must lie between 0"),
    (both(eta=NAN), "eta=nan: must lie between 0"),
    (both(eta=INF), "eta=inf: must lie between 0"),
    (both(seeds=None), "eta=1.0: a stochastic sampler needs a seed for each of 2"),
    (both(seeds=[]), "needs a seed for each of 2"),
    (both(seeds=[1]), "needs a seed for each of 2"),
    (both(seeds=[1, 2, 3]), "needs a seed for each of 2"),
    (both(n_steps=0), "n_steps=0: must be a whole number from 1 to 1000"),
    (both(n_steps=-3), "n_steps=-3: must be a whole number"),
    (both(n_steps=5000), "n_steps=5000: must be a whole number"),
    (both(n_steps=2.5), "n_steps=2.5: must be a whole number"),
    (both(batch_size=0), "batch_size=0: must be a whole number from 1 up"),
    (both(batch_size=-5), "batch_size=-5: must be a whole number from 1 up"),
    (both(batch_size=2.5), "batch_size=2.5: must be a whole number from 1 up"),
    (both(skip=-1), "skip=-1: of 10 steps, 0 to 9 can be left out"),
    (both(skip=T), "skip=10: of 10 steps, 0 to 9 can be left out"),
    (lambda w: sampler.rollout(w.policy, w.x_T, T, w.seeds, reduction="median"), "'median': must"),
    (lambda w: sampler.seeds(-1, 3), "seed=-1: must be a whole number from 0 up"),
    (lambda w: sampler.seeds(1.5, 3), "seed=1.5: must be a whole number from 0 up"),
    (lambda w: sampler.seeds("a", 3), "seed='a': must be a whole number from 0 up"),
    (lambda w: sampler.seeds(0, -2), "n=-2: must be a whole number from 0 up"),
    (lambda w: sampler.seeds(0, 2.5), "n=2.5: must be a whole number from 0 up"),
    (lambda w: sampler.noise(w.policy, []), "number of seeds=0: must be"),
    (lambda w: log_probs.log_prob(w.x_T, w.x_T, torch.ones(2), "median"), "'median': must be one"),
    (lambda w: experience.learnable_steps(torch.zeros(4)), "no step has sigma_t > 0.0, the"),
    (lambda w: experience.learnable_steps(torch.ones(4), 2.0), "lower min_std"),
    (lambda w: inversion.invert(w.policy, w.x_T, T, n_evaluations=0), "n_evaluations=0: must be"),
    (lambda w: inversion.invert(w.policy, w.x_T, T, n_evaluations=1.5), "n_evaluations=1.5: must"),
    (lambda w: inversion.invert(w.policy, torch.zeros(1, 1, 8, 8), T), "does not fit a policy of"),
    (lambda w: inversion.invert(w.policy, w.x_T, 0), "n_steps=0: must be a whole number"),
    (lambda w: guidance.guide(w.policy, brightness, -1), "scale=-1: gamma must be from 0 to 1e6"),
    (lambda w: guidance.guide(w.policy, brightness, 1e30), "scale=1e+30: gamma must be from 0 to"),
    (lambda w: guidance.guide(w.policy, brightness, INF), "scale=inf: gamma must be"),
    (lambda w: guidance.guide(w.policy, brightness, NAN), "scale=nan: gamma must be"),
    (slope(lambda x: x.sum()), "returned shape () for 2 images: it must be shape (2,)"),
    (slope(lambda x: x.mean(1)), "returned shape (2, 8, 8) for 2 images: it must be shape (2,)"),
    (slope(lambda x: 1.0), "returned shape () for 2 images: it must be shape (2,)"),
    (slope(lambda x: brightness(x.detach())), "loss returned values without a gradient"),
    (lambda w: guidance.clip_distance(w.clip, ["old", "grey"]), "must be a list of texts"),
    (lambda w: guidance.clip_distance(w.clip, None), "texts=[None]: must be a list of texts"),
])

# ------------------------------------------------------------------------------- measures

LINE = np.arange(5.0)
HOLE = np.array([0, 1, NAN, 3, 4])
UNIT = np.eye(8)

entry("evaluation", ValueError, do, [
    (lambda w: evaluation.draw(w.policy, 0, 4, 0), "number of seeds=0: must be"),
    (lambda w: evaluation.draw(w.policy, -1, 4, 0), "n=-1: must be a whole number from 0 up"),
    (lambda w: evaluation.draw(w.policy, 2, 4, -1), "seed=-1: must be a whole number from 0 up"),
    (lambda w: evaluation.draw(w.policy, 2, 4, None), "seed=None: must be a whole number from 0"),
    (lambda w: evaluation.draw(w.policy, 2, 0, 0), "n_steps=0: must be a whole number"),
    (lambda w: evaluation.draw(w.policy, 2, 4, 0, eta=2), "eta=2: must lie between"),
    (lambda w: evaluation.draw(w.policy, 2, 4, 0, batch_size=0), "batch_size=0: must be"),
    (lambda w: evaluation.kl_nats(w.policy, w.policy, 0, 4, 0), "number of seeds=0: must be"),
    (lambda w: evaluation.kl_nats(w.policy, w.policy, 2, 4, 0, eta=-1), "eta=-1: must lie"),
    (lambda w: evaluation.score(w.pictures / 255, brightness), "expected a uint8 tensor (N, H, W,"),
    (lambda w: evaluation.score(w.pictures[0], brightness), "got torch.uint8 of shape (8, 8, 3)"),
    (lambda w: evaluation.score(w.pictures, 3), "'int' is no reward"),
    (lambda w: evaluation.score(w.pictures, lambda x: x.sum()), "for 4 images: it must return one"),
    (lambda w: evaluation.bootstrap(np.mean, seed=0), "samples of [] rows"),
    (lambda w: evaluation.bootstrap(np.mean, LINE[:1], seed=0), "samples of [1] rows"),
    (lambda w: evaluation.bootstrap(np.mean, LINE[:0], seed=0), "samples of [0] rows"),
    (lambda w: evaluation.bootstrap(np.mean, HOLE, seed=0), "samples [0] hold values that are not"),
    (lambda w: evaluation.bootstrap(np.mean, LINE, seed=0, n_bootstrap=0), "n_bootstrap=0: must"),
    (lambda w: evaluation.bootstrap(np.mean, LINE, seed=-1), "seed=-1: must be a whole number"),
    (lambda w: evaluation.effect_size(LINE, LINE[:4], 0), "samples of [5, 4] rows: all need the"),
    (lambda w: evaluation.effect_size(LINE[:0], LINE[:0], 0), "samples of [0, 0] rows"),
    (lambda w: evaluation.effect_size(LINE, HOLE, 0), "samples [1] hold values that are not"),
    (lambda w: evaluation.effect_size(HOLE, LINE, 0), "samples [0] hold values that are not"),
    (lambda w: evaluation.effect_size(LINE, np.full(5, INF), 0), "samples [1] hold values"),
    (lambda w: evaluation.effect_size(np.full(5, 0.1), LINE, 0), "all 5 values before are 0.1:"),
    (lambda w: regressor.estimate(w.judge, w.images, "cats"), "unknown domain 'cats'; the"),
])

entry("diversity", ValueError, do, [
    (lambda w: diversity.vendi_score(UNIT[:0]), "the Vendi score of an array of shape (0, 8):"),
    (lambda w: diversity.vendi_score(UNIT[0]), "shape (8,): give embeddings (n, D) of at least 1"),
    (lambda w: diversity.vendi_score(UNIT[None]), "shape (1, 8, 8): give embeddings"),
    (lambda w: diversity.vendi_score(2 * UNIT), "embeddings' lengths are 2 to 2, must be 1:"),
    (lambda w: diversity.vendi_score(0 * UNIT), "lengths are 0 to 0, must be 1"),
    (lambda w: diversity.vendi_score(UNIT * NAN), "embeddings [0, 1, 2, 3, 4, 5, 6, 7] are not"),
    (lambda w: diversity.tsne(UNIT[:3], 0), "t-SNE of an array of shape (3, 8): give embeddings ("),
    (lambda w: diversity.tsne(np.full((8, 8), INF), 0), "are not finite"),
    (lambda w: diversity.tsne(np.ones((40, 8)), 0), "t-SNE of 40 images with one and the same"),
    (lambda w: diversity.tsne(UNIT, -1), "Got -1 instead"),
    (lambda w: diversity.embed(w.pictures / 255, w.clip), "expected a uint8 tensor (N, H, W, C)"),
    (lambda w: diversity.spread(w.pictures / 255), "expected uint8 pictures (n, H, W, C)"),
    (lambda w: diversity.spread(w.pictures[:0]), "expected uint8 pictures (n, H, W, C)"),
    (lambda w: diversity.entropy(LINE[:0], LINE), "entropy of 0 values at 5 levels: give"),
    (lambda w: diversity.entropy(LINE, LINE[:0]), "entropy of 5 values at 0 levels: give"),
    (lambda w: diversity.entropy(HOLE, LINE), "entropy of 5 values at 5 levels: give"),
])

# ------------------------------------------------------------------------------- figures

PAGE = figures.Page("51_what_the_seeds_agree_on", "toy", {"seed": 0})


def table(name, page=PAGE):
    return lambda w: figures.save_table(pd.DataFrame(), name, page)


def damaged(manifest):
    return lambda w: write(w, "figures/manifest.json", manifest) and table("table_5_1")(w)


entry("figure", ValueError, do, [
    *[(table(name), "no artefact's name: use <fig|table>_<chapter>_<number>_<slug>") for name in (
        "learning_curves", "fig_5", "Fig_5_3", "fig_5_3-x", "plot_5_3", "extra_5_x", "extra_54",
        "../../x", "fig_5_3/../../x", "fig_5_3_x\n", "fig_٥_3", "fig_e_1", "", "table_5_1.csv",
    )],
    (lambda w: figures.save(None, "fig_5", PAGE), "'fig_5' is no artefact's name"),
    (lambda w: figures.identifier("fig_5_"), "'fig_5_' is no artefact's name"),
    (lambda w: figures.tile(w.pictures, 0), "columns=0: must be a whole number from 1 up"),
    (lambda w: figures.tile(w.pictures, -2), "columns=-2: must be a whole number from 1 up"),
    (lambda w: figures.tile(w.pictures, 2.0), "columns=2.0: must be a whole number from 1 up"),
    (lambda w: figures.tile(w.pictures[:0], 2), "number of pictures=0: must be"),
    (lambda w: diagrams.loop(w.pictures / 255), "float64 (4, 8, 8, 3): must be uint8 (n, H, W, 3)"),
    (lambda w: diagrams.loop(w.pictures[:2]), "2 pictures: this diagram shows at least 3"),
    (lambda w: diagrams.loop(w.pictures, [1, 2, 3]), "3 rewards for 4 pictures"),
    (lambda w: diagrams.denoising_mdp(w.pictures), "4 pictures: this diagram shows at least 5"),
    (lambda w: diagrams.reward_finetuning(w.pictures), "(8, 8, 3): must be uint8 (N, H, W, 3) at"),
    *[(damaged(text), "figures/manifest.json is damaged") for text in (
        "", "[{", "{}x", "3", "[1]", '[{"name": "fig_1_1"}]',
    )],
])

entry("figure of no notebook", FileNotFoundError, do, [
    (table("table_5_1", figures.Page("99_nothing", "toy", {})), "99_nothing.ipynb"),
])

# ------------------------------------------------------------------------------- command lines


def command(world, line):
    """`python -m ddpo_lib.…` in this process."""
    module, *arguments = line.split()
    world.patch.setattr(sys, "argv", [module, *arguments])
    world.patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
    main = importlib.import_module(f"ddpo_lib.{module}").main
    main(arguments) if module == "toy.make" else main()


entry("command", SystemExit, command, [
    ("book.batch", "the following arguments are required: what, profile"),
    ("book.batch plan", "the following arguments are required: profile"),
    ("book.batch paln toy", "invalid choice: 'paln'"),
    ("book.batch plan tyo", "Nothing was done: unknown profile 'tyo'"),
    ("book.batch plan ../config/toy", "Nothing was done: unknown profile '../config/toy'"),
    ("book.batch plan toy --cores 0", "Nothing was done: cores=0: must be"),
    ("book.batch plan toy --cores -2", "Nothing was done: cores=-2: must be"),
    ("book.batch plan toy --cores two", "argument --cores: invalid int value: 'two'"),
    ("book.batch plan toy --core 2 x", "unrecognized arguments: x"),
    ("book.batch report tyo", "Nothing was done: unknown profile 'tyo'"),
    ("book.batch missing tyo", "Nothing was done: unknown profile 'tyo'"),
    ("book.batch adopt tyo", "Nothing was done: unknown profile 'tyo'"),
    ("book.batch failure no/such.log", "Nothing was done: "),
    ("book.batch failure no/such.log", "no/such.log"),
    ("book.reproduce", "the following arguments are required: profile"),
    ("book.reproduce tyo", "Nothing was done: unknown profile 'tyo'"),
    ("book.reproduce tyo --seeds", "Nothing was done: unknown profile 'tyo'"),
    ("book.reproduce toy --cores 0", "Nothing was done: cores=0: must be"),
    ("book.reproduce toy --seed 3", "unrecognized arguments: 3"),
    ("book.finetuning", "the following arguments are required: profile, policy, task"),
    ("book.finetuning toy faces", "the following arguments are required: task"),
    ("book.finetuning tyo faces aesthetic", "Nothing was run: unknown profile 'tyo'"),
    ("book.finetuning toy cats aesthetic", "Nothing was run: unknown policy 'cats'"),
    ("book.finetuning toy faces red", "unknown task 'red'"),
    ("book.finetuning toy faces ../red --reward aesthetic", "the name '../red': must be of"),
    ("book.finetuning toy faces red --reward tasty", "unknown reward 'tasty'"),
    ("book.finetuning toy faces red --reward no_such:thing", "cannot import the reward 'no_such:t"),
    ("book.finetuning toy faces red --reward math:pi", "math:pi"),
    ("book.finetuning toy faces aesthetic --seed -1", "seed=-1: must be >= 0"),
    ("book.finetuning toy faces aesthetic --seed 1.5", "argument --seed: invalid int value: '1.5'"),
    ("book.finetuning toy faces aesthetic --eta 1", "unrecognized arguments: --eta"),
    ("book.finetuning thesis faces aesthetic", "HF_HUB_OFFLINE is set"),
    ("book.seeds", "the following arguments are required: profile"),
    ("book.seeds tyo", "Not done: unknown profile 'tyo'"),
    ("book.seeds toy", "Not done: no run of profile toy is finished"),
    ("book.seeds toy 3", "unrecognized arguments: 3"),
    ("toy.make dogs", "unknown: dogs; choose from faces, churches"),
    ("toy.make faces --help", "unknown: --help; choose from faces"),
])
# fmt: on


# ------------------------------------------------------------------------------- the check


@pytest.fixture(scope="module")
def built(tmp_path_factory, new_policy):
    """What takes longer to make than to refuse: a tiny policy, its folder, a short run."""
    folder, policy = tmp_path_factory.mktemp("built"), new_policy(widths=(8,))
    policies.save(policy, folder / "policy")
    given = policy, brightness, "ddpo", Finetune(**SMALL), folder / "run"
    with contextlib.suppress(KeyboardInterrupt):
        loop.finetune(*given, on_iteration=stop_after_two)
    seeds = sampler.seeds(0, 2)
    return {
        "policy": policy, "saved": folder / "policy", "home": folder / "run", "seeds": seeds,
        "guided": guidance.guide(policy, brightness, 1), "t": torch.tensor([500, 500]),
        "x_T": sampler.noise(policy, seeds),
        "images": torch.zeros(2, 3, 8, 8), "pictures": np.zeros((4, 8, 8, 3), np.uint8),
        "toy": profiles.load("toy"), "clip": encoders.load_clip(paths.TOY / "clip", "cpu"),
        "judge": SimpleNamespace(outputs={"faces": [], "churches": []}),
    }  # fmt: skip


@pytest.fixture
def world(built, tmp_path, monkeypatch):
    """The things that rows use; runs, figures and the Hub's cache are in a folder of their own."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name, place in (("OUTPUT", "."), ("RUNS", "data/runs"), ("FIGURES", "figures")):
        monkeypatch.setattr(paths, name, tmp_path / place)
    monkeypatch.chdir(tmp_path)
    return SimpleNamespace(**built, folder=tmp_path, patch=monkeypatch, before={})


@pytest.mark.parametrize("call, kind, given, words", ROWS)
def test_bad_input_is_refused_in_words_that_help(world, capsys, call, kind, given, words):
    """A user's mistake at a command line ends it with a message, and never with a traceback."""
    world.before = listing(world.folder)
    with pytest.raises(kind) as caught:
        call(world, given)
    said = str(caught.value) + capsys.readouterr().err
    assert words in said
    assert "Traceback" not in said and getattr(caught.value, "code", 1) not in (0, None)
    assert listing(world.folder) == world.before


def test_table_is_long():
    entries = Counter(row.id.rpartition("-")[0] for row in ROWS)
    print(f"{len(ROWS)} bad inputs:", dict(entries))
    assert len(ROWS) >= 250 and len(entries) >= 15
