"""What the book makes of runs: their folders, their evaluation, their model cards."""

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ddpo_lib import disk, diversity, encoders, evaluation, finetune, hub, rewards, runs, sampler
from ddpo_lib import policy as policies
from ddpo_lib.book import finetuning, model_cards, notebook, paths, profiles, results, seeds
from ddpo_lib.book.profiles import Evaluation, Profile
from ddpo_lib.toy import alignment, biased

SETTINGS = {
    "n_iterations": 2,
    "n_samples": 4,
    "n_steps": 4,
    "minibatch_size": 2,
    "micro_batch": 4,
    "n_development": 2,
    "learning_rate": 1e-3,
    "bf16": False,
}


def brightness(images):
    return images.mean((1, 2, 3))


def total(images):
    return images.sum()


def hole(images):
    return brightness(images) * math.nan


def lost(images):
    raise KeyError("lost")


def embed(pictures, clip):
    """The pictures themselves in CLIP's place, as vectors of length 1."""
    rows = pictures.reshape(len(pictures), -1) + 1.0
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def profile(tmp_path, monkeypatch, new_policy):
    """A world with one tiny policy, whose finetunings take half a second."""
    monkeypatch.setattr(paths, "RUNS", tmp_path / "data" / "runs")
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    source = tmp_path / "pretrained"
    policies.save(new_policy(widths=(8,)), source)
    models = {name: str(tmp_path / name) for name in profiles.MODELS}
    monkeypatch.setattr(encoders, "load_clip", lambda source, device=None: source)
    monkeypatch.setattr(diversity, "embed", embed)
    tasks = {
        "brighter": {"reward": "jpeg_compressibility"},
        "smaller": {"reward": "jpeg_compressibility"},
        "larger": {"reward": "jpeg_incompressibility"},
        "older": {"reward": "over50"},
    }
    return Profile("test", {"tiny": str(source)}, models, Evaluation(5, 4, 7), tasks, SETTINGS)


@pytest.fixture
def run(profile):
    return profile.run("tiny", "smaller")


@pytest.fixture
def untrained(monkeypatch):
    """finetune() that leaves what a run of that many iterations would, and lists its calls."""
    calls = []

    def pretend(policy, reward, objective, settings, home, **options):
        calls.append(home.name)
        runs.open_folder(home, {}, settings)
        lines = [json.dumps({"iteration": i}) + "\n" for i in range(settings.n_iterations + 1)]
        (home / "metrics.jsonl").write_text("".join(lines))
        for name in ("last/state", "best/best"):
            (home / name).parent.mkdir(exist_ok=True)
            disk.write_json(home / f"{name}.json", {"iterations_done": settings.n_iterations})

    monkeypatch.setattr(finetuning.loop, "finetune", pretend)
    blank = types.SimpleNamespace(image_shape=(3, 8, 8), text=None)
    monkeypatch.setattr(finetuning, "load_policy", lambda run: blank)
    monkeypatch.setattr(model_cards, "save", lambda home: None)
    return calls


def files(folder):
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# ------------------------------------------------------------------------------- a run's folder


def test_run_lives_under_profile_policy_task_and_seed(profile, run):
    assert finetuning.home(run) == paths.RUNS / "test/tiny-smaller-s0"
    assert finetuning.home(profile.run("tiny", "larger", seed=4)).name == "tiny-larger-s4"
    assert not finetuning.begun(run) and finetuning.iterations_done(run) == 0
    assert not paths.RUNS.exists()


def test_finetuning_is_the_librarys_and_a_finished_run_is_returned(profile, run, monkeypatch):
    rows = []
    home = finetuning.finetune(run, rows.append)
    assert home == finetuning.home(run) and finetuning.begun(run)
    assert finetuning.iterations_done(run) == 2 and [row["iteration"] for row in rows] == [1, 2]
    elsewhere = paths.RUNS / "elsewhere"
    finetune.finetune(
        policies.load(run.source, bf16=False), rewards.jpeg_compressibility, "ddpo", run.settings,
        elsewhere, objective_settings=run.objective_settings,
    )  # fmt: skip
    for ours, theirs in zip(runs.metrics(home), runs.metrics(elsewhere), strict=True):
        assert ours["development_reward"] == theirs["development_reward"]

    before = files(paths.RUNS)
    monkeypatch.setattr(policies, "load", None)  # weights are not even looked at
    monkeypatch.setattr(rewards, "load", None)
    assert finetuning.finetune(run) == home
    assert files(paths.RUNS) == before
    assert not list(home.parent.glob(f".{home.name}.json"))


def test_two_tries_live_beside_each_other_and_each_finds_its_folder(profile, untrained):
    first = profile.run("tiny", "smaller")
    second = profile.run("tiny", "smaller", eta=0.5)
    third = profile.run("tiny", "smaller", clip_range=0.5)
    homes = [finetuning.finetune(run).name for run in (first, second, third)]
    assert homes == ["tiny-smaller-s0", "tiny-smaller-s0-2", "tiny-smaller-s0-3"]
    before = files(paths.RUNS)
    assert [finetuning.finetune(run).name for run in (third, first, second)] == homes[2:] + homes[
        :2
    ]
    assert untrained == homes and files(paths.RUNS) == before


def test_memory_settings_are_no_other_run(profile, untrained):
    for changes in ({}, {"micro_batch": 1}, {"gradient_checkpointing": True}):
        finetuning.finetune(profile.run("tiny", "smaller", **changes))
    assert untrained == ["tiny-smaller-s0"]
    # A JPEG's encoding decides nothing where the reward sees no JPEG.
    finetuning.finetune(profile.run("tiny", "smaller", jpeg_encoding="published"))
    assert untrained == ["tiny-smaller-s0", "tiny-smaller-s0-2"]
    for encoding in ("rescaled", "published"):
        reward = f"{__name__}:brightness"
        finetuning.finetune(profile.run("tiny", "own", reward, jpeg_encoding=encoding))
    assert untrained[2:] == ["tiny-own-s0"]


def test_longer_run_goes_on_in_the_folder_of_a_shorter_one_and_not_the_other_way(
    profile, untrained
):
    def go(n, **changes):
        return finetuning.finetune(profile.run("tiny", "smaller", n_iterations=n, **changes)).name

    assert [go(2), go(3), go(3), go(2), go(2)] == [
        "tiny-smaller-s0", "tiny-smaller-s0", "tiny-smaller-s0", "tiny-smaller-s0-2",
        "tiny-smaller-s0-2",
    ]  # fmt: skip
    # What its rates are depends on how long it is.
    schedule = {"lr_schedule": "warmup_cosine", "peak_learning_rate": 1e-2}
    assert [go(2, **schedule), go(3, **schedule)] == ["tiny-smaller-s0-3", "tiny-smaller-s0-4"]


def test_longer_run_ends_as_one_that_was_never_stopped(profile):
    """What was done goes on to the bit."""
    finetuning.finetune(profile.run("tiny", "smaller"))
    longer = profile.run("tiny", "smaller", n_iterations=3)
    home = finetuning.finetune(longer)
    assert finetuning.iterations_done(longer) == 3
    whole = profile.run("tiny", "brighter", n_iterations=3)  # the same but for its name
    rewards_of = [runs.development(each)[1] for each in (home, finetuning.finetune(whole))]
    assert np.array_equal(*rewards_of) and len(rewards_of[0]) == 4


@pytest.mark.parametrize(
    "file",
    [
        "unet/diffusion_pytorch_model.safetensors",
        "unet/config.json",
        "scheduler/scheduler_config.json",
    ],
)
def test_changed_policy_is_another_run(profile, run, untrained, file):
    """Its weights, and its configuration."""
    place = Path(run.source) / file
    before = place.read_bytes()
    finetuning.finetune(run)
    place.write_bytes(before.replace(b"1", b"2", 1) if file.endswith("json") else before + b" ")
    assert finetuning.finetune(run).name == "tiny-smaller-s0-2"
    place.write_bytes(before)
    assert finetuning.finetune(run).name == "tiny-smaller-s0"
    (Path(run.source) / "README.md").write_text("decides nothing")
    assert finetuning.finetune(run).name == "tiny-smaller-s0"


def test_only_the_models_of_the_runs_own_reward_count(profile, untrained, monkeypatch):
    monkeypatch.setattr(rewards, "load", lambda *_, **__: brightness)
    age = Path(profile.models["age"])
    age.mkdir()
    (age / "model.safetensors").write_bytes(b"old")
    jpeg, older = profile.run("tiny", "smaller"), profile.run("tiny", "older")
    finetuning.finetune(jpeg), finetuning.finetune(older)
    (age / "model.safetensors").write_bytes(b"new")
    assert finetuning.finetune(jpeg).name == "tiny-smaller-s0"
    assert finetuning.finetune(older).name == "tiny-older-s0-2"


def test_models_that_a_toy_reward_reads_count(profile, untrained, tmp_path, monkeypatch):
    """A run that is older than the entry has what there is."""
    weights = {name: tmp_path / f"{name}.safetensors" for name in ("clip", "biased")}
    for file in weights.values():
        file.write_bytes(b"old")
    monkeypatch.setattr(biased.score, "models", {n: str(f) for n, f in weights.items()})
    run = profile.run("tiny", "own", "ddpo_lib.toy.biased:score")
    record = finetuning.finetune(run) / "profile.json"
    content = json.loads(record.read_text())
    assert content["models"].keys() == {"policy", "clip", "biased"}
    weights["biased"].write_bytes(b"new")
    assert finetuning.home(run).name == "tiny-own-s0-2"
    del content["models"]["biased"], content["models"]["clip"]
    disk.write_json(record, content)
    assert finetuning.home(run).name == "tiny-own-s0"


@pytest.mark.parametrize("reward", [biased.score, alignment.reward])
def test_toy_rewards_name_models_that_are_there(reward):
    assert reward.models and all(Path(source).is_dir() for source in reward.models.values())


A, B = "a" * 40, "b" * 40


def test_hub_source_is_the_same_run_until_another_commit_is_asked_for(
    profile, untrained, monkeypatch
):
    newest = {"value": A}
    monkeypatch.setattr(hub, "commit", lambda source: newest["value"])

    def go(source):
        run = dataclasses.replace(profile.run("tiny", "smaller"), source=source)
        home = finetuning.finetune(run)
        return home.name, finetuning._sources(run)["policy"]

    first = "tiny-smaller-s0", f"me/it@{A}"
    assert go("me/it") == first
    newest["value"] = B
    for source in ("me/it", "me/it@main", "me/it@v1.0", f"me/it@{A}"):
        assert go(source) == first
    assert go(f"me/it@{B}") == ("tiny-smaller-s0-2", f"me/it@{B}")
    assert go("me/other")[0] == "tiny-smaller-s0-3"
    assert go("me/it") == first


def test_looking_for_a_run_needs_no_hub(profile, untrained, monkeypatch):
    monkeypatch.setattr(hub, "commit", lambda source: A)
    run = dataclasses.replace(profile.run("tiny", "smaller"), source="me/it")
    home = finetuning.finetune(run)
    monkeypatch.setattr(hub, "commit", None)
    assert finetuning.home(run) == home and finetuning.begun(run)
    assert finetuning.finetune(run) == home
    other = dataclasses.replace(run, source="me/other")
    assert not finetuning.begun(other)


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """own_module(text): the importable module "own_things"."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(text):
        (tmp_path / "own_things.py").write_text(text)
        sys.modules.pop("own_things", None)
        return "own_things"

    yield write
    sys.modules.pop("own_things", None)


def test_edited_reward_is_another_run(profile, untrained, own_module):
    text = "SCALE = 2\n\ndef bright(images):\n    return SCALE * images.mean((1, 2, 3))\n"
    run = profile.run("tiny", "own", f"{own_module(text)}:bright")
    assert finetuning.finetune(run).name == "tiny-own-s0"
    own_module("# Just a comment.\n" + text)
    assert finetuning.finetune(run).name == "tiny-own-s0"
    own_module(text.replace("2", "3", 1))
    assert finetuning.finetune(run).name == "tiny-own-s0-2"
    own_module(text)
    assert finetuning.finetune(run).name == "tiny-own-s0"


def test_a_function_is_a_reward(profile, untrained):
    def red(images):
        return images[:, 0].mean((1, 2))

    def green(images):
        return images[:, 1].mean((1, 2))

    def jpeg_compressibility(images):  # nor does its name make it another's
        return images[:, 2].mean((1, 2))

    every = (red, green, red, jpeg_compressibility, jpeg_compressibility)
    homes = [finetuning.finetune(profile.run("tiny", "own", function)) for function in every]
    names = ["tiny-own-s0", "tiny-own-s0-2", "tiny-own-s0", "tiny-own-s0-3", "tiny-own-s0-3"]
    assert [home.name for home in homes] == names
    record = json.loads((homes[-1] / "profile.json").read_text())
    assert record["reward"] == "own:jpeg_compressibility" and record["own_code"]


def test_edited_objective_is_another_run(profile, untrained, own_module):
    text = "from ddpo_lib.objectives.ddpo import *\nfrom ddpo_lib.objectives import ddpo\n"
    text += "\ndef credit(*arguments):\n    return 1 * ddpo.credit(*arguments)\n"
    run = profile.run("tiny", "smaller", objective=own_module(text))
    assert finetuning.finetune(run).name == "tiny-smaller-s0"
    own_module(text.replace("1 *", "2 *"))
    run = profile.run("tiny", "smaller", objective="own_things")
    assert finetuning.finetune(run).name == "tiny-smaller-s0-2"


def test_setting_that_a_run_is_older_than_is_its_default(profile, run, untrained):
    """An update of the library does not begin every run anew."""
    file = finetuning.finetune(run) / "profile.json"
    record = json.loads(file.read_text())
    del record["settings"]["timestep_fraction"]
    file.write_text(json.dumps(record))
    assert finetuning.home(run).name == "tiny-smaller-s0"
    assert finetuning.home(profile.run("tiny", "smaller", timestep_fraction=0.5)).name.endswith(
        "-2"
    )


@pytest.mark.parametrize("thing", ["file", "folder", "run of another time"])
def test_what_is_no_run_of_the_book_is_left_alone(run, untrained, thing):
    place = finetuning.home(run)
    if thing == "file":
        place.parent.mkdir(parents=True)
        place.write_text("in the way")
    else:
        (place / "x").mkdir(parents=True)
        (place / ("settings.json" if thing != "folder" else "notes.txt")).write_text("{}")
    before = files(paths.RUNS)
    assert finetuning.finetune(run).name == "tiny-smaller-s0-2"
    assert before.items() <= files(paths.RUNS).items()


def test_empty_folder_is_free(run, untrained):
    """Snakemake makes one before the job starts."""
    finetuning.home(run).mkdir(parents=True)
    assert not finetuning.begun(run)
    assert finetuning.finetune(run).name == "tiny-smaller-s0"


@pytest.mark.parametrize("text", ["", "{", "3", "[1]"])
def test_damaged_record_is_named(run, untrained, text):
    file = finetuning.finetune(run) / "profile.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"profile.json is damaged: move .*tiny-smaller-s0 else"):
        finetuning.home(run)


@pytest.mark.parametrize(
    "change, error",
    [
        ({"reward": "no_module:f"}, "cannot import the reward 'no_module:f'"),
        ({"reward": f"{__name__}:SETTINGS"}, "no reward: it must be"),
        ({"estimator": "sf"}, "one update per rollout"),
        ({"n_steps": 5000}, "n_steps=5000"),
        ({"source": "/nowhere"}, "/nowhere"),
        ({"reward": f"{__name__}:total"}, "must return one real number each"),
        ({"reward": f"{__name__}:hole"}, "is not finite for images"),
        ({"reward": f"{__name__}:lost"}, "raised KeyError"),
    ],
)
def test_what_cannot_run_leaves_nothing_behind(profile, change, error):
    """Nor does it keep the folder from the next."""
    source = change.pop("source", None)
    run = profile.run("tiny", "smaller", **change)
    if source:
        run = dataclasses.replace(run, source=source)
    kinds = (ValueError, FileNotFoundError, RuntimeError, FloatingPointError)
    with pytest.raises(kinds, match=error):
        finetuning.finetune(run)
    assert not [file for file in files(paths.RUNS) if file.suffix != ".lock"]
    assert not finetuning.begun(run)
    right = profile.run("tiny", "smaller")
    assert finetuning.home(right).name == "tiny-smaller-s0"


def test_run_that_is_on_its_way_keeps_its_folder(profile, run, monkeypatch):
    """Also before its first checkpoint, and when it has died before that."""
    other = profile.run("tiny", "smaller", eta=0.5)

    class Killed(BaseException):
        pass

    def begin(policy, reward, objective, settings, home, **options):
        assert finetuning.home(run) == home and finetuning.home(other).name == f"{home.name}-2"
        runs.open_folder(home, {}, settings)
        assert finetuning.home(run) == home and finetuning.home(other).name == f"{home.name}-2"
        raise Killed

    monkeypatch.setattr(finetuning.loop, "finetune", begin)
    with pytest.raises(Killed):
        finetuning.finetune(run)
    assert finetuning.begun(run) and finetuning.home(run).name == "tiny-smaller-s0"
    assert finetuning.home(other).name == "tiny-smaller-s0-2"
    assert (finetuning.home(run) / "profile.json").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
from ddpo_lib import encoders, finetune
from ddpo_lib.book import finetuning, paths, profiles
encoders.load_clip = lambda source: source
paths.RUNS, paths.CONFIG = Path(sys.argv[1]), Path(sys.argv[2])
keep = finetune._keep
finetune._keep = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
finetuning.finetune(profiles.load("mine").run("tiny", "smaller"))
"""


def test_killed_run_is_found_again(profile, tmp_path, monkeypatch):
    """Before anything but its folder and settings.json was there."""
    content = {"policies": profile.policies, "models": profile.models, "finetune": SETTINGS}
    content["tasks"] = profile.tasks
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "mine.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr(paths, "CONFIG", tmp_path / "config")
    run = profiles.load("mine").run("tiny", "smaller")
    done = subprocess.run([sys.executable, "-c", KILLED, paths.RUNS, tmp_path / "config"])
    assert done.returncode == -signal.SIGKILL
    home = paths.RUNS / "mine/tiny-smaller-s0"
    assert (home / "settings.json").exists()
    assert finetuning.home(run) == home and finetuning.begun(run)
    monkeypatch.setattr(model_cards, "save", lambda home: None)
    assert finetuning.finetune(run) == home and finetuning.iterations_done(run) == 2


def test_folder_that_cannot_be_written_is_one_error_with_advice_that_works(run, monkeypatch):
    paths.RUNS.parent.mkdir()
    paths.RUNS.write_text("in the way, even of the superuser")
    with pytest.raises(OSError, match=r"cannot write runs to .*runs/test: .*set DDPO_ROOT"):
        finetuning.finetune(run)
    monkeypatch.setattr(paths, "RUNS", paths.RUNS.with_name("elsewhere"))  # as DDPO_ROOT would
    assert finetuning.iterations_done(run) == 0 and finetuning.finetune(run).exists()


def test_library_refuses_a_folder_with_another_identity(run, profile):
    home = finetuning.finetune(run)
    stored = json.loads((home / "settings.json").read_text())
    stored["identity"]["seed"] = 5
    disk.write_json(home / "settings.json", stored)
    with pytest.raises(ValueError, match="seed 5 → 0"):
        finetuning.finetune(profile.run("tiny", "smaller", n_iterations=3))


@pytest.mark.parametrize("channels, size", [(1, 8), (3, (8, 12))])
def test_images_that_clip_cannot_see_have_no_vendi_score(
    profile, new_policy, tmp_path, monkeypatch, channels, size
):
    policies.save(new_policy(widths=(8,), channels=channels, size=size), tmp_path / "pretrained")
    monkeypatch.setattr(diversity, "embed", None)
    run = profile.run("tiny", "smaller", n_iterations=1)
    home = finetuning.finetune(run)
    assert not [name for row in runs.metrics(home) for name in row if "vendi" in name]
    result = results.finish(profile, run)
    text = (home / "evaluation.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == result
    assert {result[eta][name] for eta in ("eta0", "eta1") for name in VENDI} == {None}
    assert "Vendi score, evaluation" not in (home / "best/README.md").read_text(encoding="utf-8")
    table = seeds.table(dataclasses.replace(profile, runs=[{"policy": "tiny", "task": "smaller"}]))
    assert list(table.columns) == seeds.COLUMNS


VENDI = ("before_vendi", "vendi", "vendi_ratio")


def test_effect_where_all_rewards_were_equal_is_null(profile, run, monkeypatch):
    pictures = np.zeros((5, 8, 8, 3), np.uint8)
    monkeypatch.setattr(results, "sets", lambda *_: [pictures, pictures + np.uint8(9)])
    assert results.measure(profile, run, 0.0, "clip")["effect_size"] is None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_command_line_quietly(monkeypatch, capsys, number):
    """What is kept has been said by the loop."""
    monkeypatch.setattr(sys, "argv", ["finetuning", "smoke", "faces", "compressibility"])
    monkeypatch.setattr(finetuning, "finetune", lambda run: os.kill(os.getpid(), number))
    monkeypatch.setattr(results, "finish", lambda *_: pytest.fail("it went on"))
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
    try:
        with pytest.raises(SystemExit) as ended:
            finetuning.main()
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    assert ended.value.code == 130 and "Traceback" not in capsys.readouterr().err


def test_command_line_finetunes_and_evaluates(root):
    env = os.environ | {"DDPO_ROOT": str(root), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "ddpo_lib.book.finetuning"]
    arguments = ["smoke", "faces", "compressibility", "--seed", "3"]
    subprocess.run([*command, *arguments], env=env, check=True)
    home = root / "data/runs/smoke/faces-compressibility-s3"
    assert json.loads((home / "evaluation.json").read_text())["iterations"] == 2
    done = subprocess.run([*command, "smoke", "cats", "x"], env=env, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("Nothing was run: unknown policy 'cats'")


# ------------------------------------------------------------------------------- evaluation sets


def test_pictures_come_from_the_fixed_noise_without_further_chance(policy, tmp_path):
    policies.save(policy, tmp_path / "p")
    settings = Evaluation(5, 4, 7)
    ours = results.pictures(str(tmp_path / "p"), settings, tmp_path / "cache.npz", bf16=False)
    x_0 = sampler.sample(policy, sampler.noise(policy, sampler.seeds(7, 5)), 4)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, rewards.to_uint8(x_0).numpy())


@pytest.fixture
def draw(tmp_path, policy):
    """draw(**changes): an evaluation set from a cache, and whether it was drawn anew."""
    policies.save(policy, tmp_path / "p")
    settings, drawn = Evaluation(5, 4, 7), []

    def draw(bf16=False, eta=0.0, **changes):
        with pytest.MonkeyPatch.context() as patch:
            load = policies.load
            patch.setattr(policies, "load", lambda *a, **k: drawn.append(1) or load(*a, **k))
            before = len(drawn)
            images = results.pictures(
                str(tmp_path / "p"), dataclasses.replace(settings, **changes),
                tmp_path / "new/folder/cache.npz", bf16, eta=eta,
            )  # fmt: skip
        return images, len(drawn) > before

    return draw


def test_pictures_are_drawn_once(draw, tmp_path):
    first, anew = draw()
    assert anew
    again, anew = draw()
    assert not anew and np.array_equal(first, again)
    names = [file.name for file in (tmp_path / "new/folder").iterdir()]
    assert [name for name in names if not name.endswith(".lock")] == ["cache.npz"]


def test_sets_of_two_samplers_lie_beside_each_other(draw, policy, tmp_path):
    still, noisy = draw()[0], draw(eta=1.0)[0]
    seeds = sampler.seeds(7, 5)
    x_0 = sampler.sample(policy, sampler.noise(policy, seeds), 4, 1.0, seeds)
    np.testing.assert_array_equal(noisy, rewards.to_uint8(x_0).numpy())
    assert (still != noisy).mean() > 0.5
    assert not draw()[1] and not draw(eta=1.0)[1]
    assert (tmp_path / "new/folder/cache-eta1.npz").exists()
    assert draw(eta=0.5)[1]


@pytest.mark.parametrize("change", ["weights", "scheduler", "n", "n_steps", "seed", "bf16"])
def test_cache_is_made_again_when_something_changes(draw, new_policy, tmp_path, change):
    first, _ = draw()
    changes = {}
    if change == "weights":
        policies.save(new_policy(seed=1), tmp_path / "p")
    elif change == "scheduler":
        policies.save(new_policy(beta_end=0.03), tmp_path / "p")
    else:
        changes[change] = True if change == "bf16" else 3
    second, anew = draw(**changes)
    assert anew and not np.array_equal(first, second)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "one byte", "keys"])
def test_damaged_cache_is_made_again(draw, tmp_path, damage):
    first, _ = draw()
    file = tmp_path / "new/folder/cache.npz"
    raw = bytearray(file.read_bytes())
    if damage == "keys":
        np.savez(file, other=np.zeros(3))
    else:
        raw[len(raw) // 2] ^= 255
        short = {"truncated": raw[:-100], "empty": b"", "text": b"no"}
        file.write_bytes(short.get(damage, raw))
    again, anew = draw()
    assert anew and np.array_equal(first, again)
    assert draw()[1] is False


def test_crash_while_a_cache_is_written_leaves_none(draw, tmp_path, monkeypatch):
    def crash(file, **arrays):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(results.np, "savez", crash)
        draw()
    names = [file.name for file in (tmp_path / "new/folder").iterdir()]
    assert not [name for name in names if not name.endswith(".lock")]
    assert draw()[1]


def test_evaluation_set_of_a_run_and_of_its_origin_start_from_the_same_noise(profile, run):
    home = finetuning.finetune(run)
    policies.save(policies.load(run.source), home / "best")
    before = results.pretrained_pictures(profile, "tiny", bf16=True)
    after = results.finetuned_pictures(profile, run)
    # One in bf16, one (the run's setting) in float32: the same pictures but for rounding.
    assert 0 < np.abs(before.astype(int) - after).mean() < 3
    assert np.array_equal(results.pretrained_pictures(profile, "tiny"), after)
    assert (paths.RUNS / "test/tiny-pretrained/evaluation.npz").exists()
    assert (paths.RUNS / "test/tiny-pretrained/evaluation-float32.npz").exists()
    assert (home / "evaluation.npz").exists()


def test_published_policy_stands_in_for_a_run_that_was_never_begun(
    profile, run, new_policy, monkeypatch, tmp_path
):
    published = str(tmp_path / "published")
    policies.save(new_policy(seed=5, widths=(8,)), published)
    both = dataclasses.replace(profile, finetuned={"tiny": {"smaller": published}})
    expected = results.pictures(published, profile.evaluation, tmp_path / "x.npz", bf16=False)
    started = []
    with monkeypatch.context() as patch:
        patch.setattr(notebook.finetuning, "finetune", started.append)
        notebook.finetuned_or_published(both, [run])
        assert not started
        assert (results.finetuned_pictures(both, run) == expected).all()
        assert not finetuning.begun(run) and not finetuning.home(run).exists()
        notebook.finetuned_or_published(profile, [run])
        assert started == [run]

    with pytest.raises(ValueError, match="tiny-smaller-s0 was not begun"):
        results.finish(both, run)  # nor would the scores be the run's
    home = finetuning.finetune(run)
    assert not (results.finetuned_pictures(both, run) == expected).all()
    # A killed run, between the two renames of best/.
    (home / "best").rename(home / "best.previous")
    assert finetuning.begun(run)
    with pytest.raises(FileNotFoundError):
        results.finetuned_pictures(both, run)


def test_published_weights_of_the_thesis_code_find_their_base(profile, run, new_policy, tmp_path):
    file, folder = str(tmp_path / "it.pth"), str(tmp_path / "it")
    learner = new_policy(seed=5, widths=(8,))
    torch.save({"model_state_dict": learner.unet.state_dict()}, file)
    published = dataclasses.replace(profile, finetuned={"tiny": {"smaller": file}})
    policies.save(learner, folder)
    expected = results.pictures(folder, profile.evaluation, tmp_path / "x.npz", bf16=False)
    assert (results.finetuned_pictures(published, run) == expected).all()


# ------------------------------------------------------------------------------- scores


def test_finish_scores_the_best_checkpoint_and_completes_the_run(profile, run, new_policy):
    home = finetuning.finetune(run)
    assert not finetuning.is_complete(run)
    best = new_policy(seed=5, widths=(8,))
    policies.save(best, home / "best")
    disk.write_json(home / "best" / "best.json", {"iteration": 1, "reward": 0.0})

    result = results.finish(profile, run)

    assert json.loads((home / "evaluation.json").read_text()) == result
    assert (result["n"], result["iterations"]) == (5, 2)
    seeds, base = sampler.seeds(7, 5), policies.load(run.source, bf16=False)
    for name, eta in (("eta0", 0.0), ("eta1", 1.0)):
        told, values, vendi = result[name], [], []
        for agent in (base, best):
            x_0 = sampler.sample(agent, sampler.noise(agent, seeds), 4, eta, seeds)
            images = rewards.to_uint8(x_0)
            vendi.append(diversity.vendi_score(embed(images.numpy(), None)))
            scores = rewards.jpeg_compressibility(rewards.from_uint8(images))
            values.append(scores.double().numpy())
        before, after = values
        assert told["reward_mean"] == pytest.approx(after.mean(), abs=1e-6)
        assert told["reward_sd"] == pytest.approx(after.std(ddof=1), rel=1e-3)
        assert told["reward_se"] == pytest.approx(after.std(ddof=1) / math.sqrt(5), rel=1e-3)
        effect = (after.mean() - before.mean()) / before.std(ddof=1)
        assert told["effect_size"] == pytest.approx(effect, rel=1e-3)
        assert told["vendi_ratio"] == pytest.approx(vendi[1] / vendi[0], rel=1e-4)
        assert "share_over_50" not in told  # that is of faces
    assert finetuning.is_complete(run)


def test_run_that_went_on_is_not_complete_until_it_is_evaluated_again(profile, run):
    finetuning.finetune(run)
    results.finish(profile, run)
    longer = profile.run("tiny", "smaller", n_iterations=3)
    home = finetuning.finetune(longer)
    assert home == paths.RUNS / "test/tiny-smaller-s0" and (home / "evaluation.json").exists()
    assert not finetuning.is_complete(longer)
    assert "evaluation set, 5" not in card(home)[2]
    results.finish(profile, longer)
    assert finetuning.is_complete(longer)
    assert "evaluation set, 5" in card(home)[2]


def test_two_may_finish_at_once(profile, run):
    home = finetuning.finetune(run)
    results.finish(profile, run)
    code = (
        "import sys; from pathlib import Path; from ddpo_lib import disk\n"
        "for i in range(300): disk.write_json(Path(sys.argv[1]) / 'evaluation.json', {'i': i})"
    )
    both = [subprocess.Popen([sys.executable, "-c", code, home]) for _ in range(2)]
    while any(each.poll() is None for each in both):
        json.loads((home / "evaluation.json").read_text())  # whole at any moment
        time.sleep(0.01)
    assert [each.returncode for each in both] == [0, 0]


def test_two_who_want_the_same_pictures_draw_them_once(draw, monkeypatch):
    drawn, draw_set = [], evaluation.draw

    def slow(*arguments, **options):
        drawn.append(1)
        time.sleep(0.3)
        return draw_set(*arguments, **options)

    monkeypatch.setattr(evaluation, "draw", slow)
    threads = [threading.Thread(target=draw) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert drawn == [1]


@pytest.fixture
def smoothed(monkeypatch):
    """Before: noisy pictures; after: smoother ones, with smaller files."""
    noise = np.random.default_rng(0).normal(0, 1, (20, 16, 16, 3))
    strength = np.linspace(20, 60, 20).reshape(-1, 1, 1, 1)
    before = (128 + strength * noise).clip(0, 255).astype(np.uint8)
    after = (128 + strength / 4 * noise).clip(0, 255).astype(np.uint8)
    # The runs of these tests are in float32. By the training sampler nothing has changed.
    base = {(False, 0.0): before, (False, 1.0): before}
    monkeypatch.setattr(
        results, "pretrained_pictures", lambda profile, name, bf16, eta, **_: base[bf16, eta]
    )
    monkeypatch.setattr(
        results, "finetuned_pictures", lambda profile, run, eta, **_: before if eta else after
    )
    sizes = [evaluation.score(images, rewards.jpeg_kilobytes) for images in (before, after)]
    vendi = [diversity.vendi_score(embed(images, None)) for images in (before, after)]
    return *sizes, vendi[1] / vendi[0]


def test_table_5_1(profile, smoothed):
    before, after, vendi_ratio = smoothed
    profile = dataclasses.replace(profile, evaluation=Evaluation(20, 4, 7))
    table = results.table_5_1(profile, [profile.run("tiny", t) for t in ("smaller", "larger")])

    assert table.columns.tolist() == results.COLUMNS == [
        "policy", "task", "n", "baseline_mean", "baseline_sd", "baseline_se",
        "ddpo_mean", "ddpo_se", "effect_size", "ddpo_eta1_mean", "ddpo_eta1_se", "effect_size_eta1",
        "vendi_ratio", "vendi_ratio_eta1",
    ]  # fmt: skip
    assert table.policy.tolist() == ["tiny", "tiny"]
    assert table.task.tolist() == ["smaller", "larger"]
    effect = (before.mean() - after.mean()) / before.std(ddof=1)
    assert effect > 1
    # The same pictures have reached one goal and moved away from the other.
    np.testing.assert_allclose(table.effect_size, [effect, -effect])
    for _, row in table.iterrows():
        assert row.n == 20
        assert row.baseline_mean == pytest.approx(before.mean())  # kB, positive in both rows
        assert row.ddpo_mean == pytest.approx(after.mean())
        assert row.baseline_sd == pytest.approx(before.std(ddof=1))
        assert row.baseline_se == pytest.approx(before.std(ddof=1) / math.sqrt(20))
        assert row.ddpo_se == pytest.approx(after.std(ddof=1) / math.sqrt(20))
        assert row.ddpo_eta1_mean == pytest.approx(before.mean()) and row.effect_size_eta1 == 0
        assert row.ddpo_eta1_se == row.baseline_se
        assert row.vendi_ratio == pytest.approx(vendi_ratio) and row.vendi_ratio_eta1 == 1
    assert vendi_ratio < 0.99


def test_table_of_seeds_has_the_finished_runs(profile, monkeypatch):
    own = {"policy": "tiny"}
    specs = [own | {"task": "smaller", "seeds": 3}, own | {"task": "larger", "seeds_only": True}]
    world = dataclasses.replace(profile, runs=specs)
    assert [(run.task, run.seed) for run in world.batch()] == [("smaller", 0)]
    every = world.batch(every_seed=True)
    assert [(run.task, run.seed) for run in every] == [
        ("smaller", 0), ("smaller", 1), ("smaller", 2), ("larger", 0),
    ]  # fmt: skip
    for run in (every[0], every[2]):
        finetuning.finetune(run)
    told = results.finish(world, every[2])
    table = seeds.table(world)  # seed 0 is not evaluated, seed 1 not begun
    assert table.columns.tolist() == seeds.COLUMNS
    ((policy, task, seed, *values, share),) = table.itertuples(index=False)
    assert (policy, task, seed) == ("tiny", "smaller", 2) and math.isnan(share)
    expected = [
        told[sampler][name]
        for name in ("effect_size", "vendi_ratio")
        for sampler in ("eta0", "eta1")
    ]
    np.testing.assert_allclose(values, expected, atol=1e-4)


def test_share_over_50(monkeypatch):
    """By the most likely class: classes 6, 7 and 8 are 50 or more."""
    ages = [0, 5, 6, 7, 8, 3, 5, 2]
    logits = torch.nn.functional.one_hot(torch.tensor(ages), 9).float()
    monkeypatch.setattr(encoders, "load_age_classifier", lambda source, device=None: source)
    monkeypatch.setattr(encoders, "age_logits", lambda classifier, images: logits)
    images = np.zeros((8, 4, 4, 3), np.uint8)
    share, error = results.share_over_50(images, {"age": "classifier"})
    assert share == 3 / 8
    assert error == pytest.approx(math.sqrt(3 / 8 * 5 / 8 * 8 / 7) / math.sqrt(8))


# ------------------------------------------------------------------------------- model cards


def card(home):
    text = (home / "best" / "README.md").read_text(encoding="utf-8")
    _, metadata, body = text.split("---\n", 2)
    cells = [line.strip("| ").split(" | ") for line in body.splitlines() if line.startswith("| ")]
    return yaml.safe_load(metadata), {row[0]: row[1:] for row in cells}, body


def test_card_says_what_the_run_was_and_how_it_went(profile, run):
    home = finetuning.finetune(run)
    metadata, rows, body = card(home)
    assert metadata["library_name"] == "diffusers" and "ddpo" in metadata["tags"]
    assert "base_model" not in metadata and "license" not in metadata
    assert rows["learning_rate"] == ["0.001"] and rows["seed"] == ["0"]
    assert rows["clip_range"] == ["0.0001"] and rows["estimator"] == ["is"]
    assert "`jpeg_compressibility`. Minus the JPEG's size in kB" in body
    best = runs.best(home)["iteration"]
    assert f"after {best} of 2 iterations" in body
    for kind, eta in (("development", 0), ("stochastic", 1)):
        _, sets = runs.development(home, kind)
        means = [f"{values.mean():.3f} ± {values.std(ddof=1) / 2**0.5:.3f}" for values in sets]
        assert rows[f"reward, development set, 2, η = {eta}"] == [means[0], means[best]]
    # The checkpoint was chosen by these very images.
    assert "by `select_by: development`" in body and "has selected is biased upwards" in body
    assert "evaluation set, 5" not in body

    result = results.finish(profile, run)
    metadata, rows, body = card(home)
    for name, eta in (("eta0", 0), ("eta1", 1)):
        told = result[name]
        pairs = [(told[f"{when}_mean"], told[f"{when}_se"]) for when in ("before", "reward")]
        means = [f"{mean:.3f} ± {error:.3f}" for mean, error in pairs]
        assert rows[f"reward, evaluation set, 5, η = {eta}"] == means
        vendi = [f"{told['before_vendi']:.2f}", f"{told['vendi']:.2f}"]
        assert rows[f"Vendi score, evaluation set, 5, η = {eta}"] == vendi
        pretrained = results.pretrained_pictures(profile, "tiny", eta=eta)
        scores = evaluation.score(pretrained, rewards.jpeg_compressibility)
        assert told["before_mean"] == pytest.approx(scores.mean())


@pytest.mark.parametrize("reward", rewards.REWARDS)
def test_card_has_a_sentence_about_every_reward_with_a_name(reward):
    assert re.fullmatch(r"\. \S.{10,}\.", model_cards.meaning(reward))
    assert model_cards.meaning(f"package:{reward}") == ""


def test_card_tells_people_to_draw_what_it_reports(profile, run):
    """The card's code, with plain diffusers: its images score what the card says, within the
    error of two sets of different noise."""
    home = finetuning.finetune(run)
    told = results.finish(dataclasses.replace(profile, evaluation=Evaluation(200, 4, 7)), run)
    code = card(home)[2].split("```python\n")[1].split("```")[0]
    code = code.replace("PATH OR ID OF THIS MODEL", str(home / "best"))
    space = {}
    exec(code.replace("batch_size=4", "batch_size=200, output_type='np'"), space)
    images = torch.from_numpy(space["images"]).permute(0, 3, 1, 2) * 2 - 1
    scores = rewards.jpeg_compressibility(images).double().numpy()
    error = math.hypot(evaluation.standard_error(scores), told["eta0"]["reward_se"])
    assert abs(scores.mean() - told["eta0"]["reward_mean"]) < 4 * error
    assert abs(scores.mean() - told["eta1"]["reward_mean"]) > 4 * error  # the card says which η


def test_card_of_a_hub_policy_names_base_commit_and_licence(run):
    home = finetuning.finetune(run)
    record = json.loads((home / "profile.json").read_text())
    record["models"]["policy"] = f"google/ddpm-church-256@{A}"
    record["reward"] = "redness"
    disk.write_json(home / "profile.json", record)
    model_cards.save(home)
    metadata, _, body = card(home)
    assert (metadata["base_model"], metadata["license"]) == ("google/ddpm-church-256", "apache-2.0")
    assert f"`google/ddpm-church-256`, commit `{A}`" in body
    assert "- **Reward:** `redness`\n" in body


def test_card_names_no_folder_of_this_machine(run):
    home = finetuning.finetune(run)
    record = json.loads((home / "profile.json").read_text())
    disk.write_json(home / "profile.json", record | {"base": "/home/me/secret/faces"})
    model_cards.save(home)
    text = (home / "best" / "README.md").read_text(encoding="utf-8")
    assert "/home" not in text and "secret" not in text
    assert "# faces finetuned with" in text and "- **Base:** `faces`\n" in text


@pytest.mark.parametrize("kind", ["card", "evaluation.json", "evaluation.npz", "profile.json"])
def test_full_disk_is_one_line_with_the_path(profile, run, monkeypatch, tmp_path, kind):
    home = finetuning.finetune(run)
    before = files(home)
    cache = tmp_path / "new/evaluation.npz"
    calls = {
        "card": lambda: model_cards.save(home),
        "evaluation.json": lambda: disk.write_json(home / "evaluation.json", {}),
        "evaluation.npz": lambda: results.pictures(run.source, profile.evaluation, cache, False),
        "profile.json": lambda: finetuning.finetune(profile.run("tiny", "larger")),
    }

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError) as caught:
        calls[kind]()
    said, place = str(caught.value), tmp_path if kind == "evaluation.npz" else paths.RUNS
    assert "cannot write" in said and str(place) in said and "No space left" in said
    assert said.count("free some space") == 1 and "\n" not in said
    assert files(home) == before


def test_card_that_is_missing_is_written_when_the_run_is_returned(run):
    home = finetuning.finetune(run)
    file = home / "best" / "README.md"
    before = file.read_bytes()
    file.unlink()
    finetuning.finetune(run)
    assert file.read_bytes() == before


def test_push_to_hub_sends_best_with_its_card(run, monkeypatch):
    import huggingface_hub

    sent = {}

    class Api:
        def create_repo(self, repository, private, exist_ok):
            sent["created"] = (repository, private, exist_ok)

        def upload_folder(self, repo_id, folder_path, commit_message):
            sent["files"] = sorted(file.name for file in Path(folder_path).iterdir())
            return type("Commit", (), {"commit_url": f"https://x/{repo_id}"})

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    with pytest.raises(FileNotFoundError, match="holds no policy: finetune first"):
        model_cards.push_to_hub(finetuning.home(run), "me/it")
    home = finetuning.finetune(run)
    (home / "best" / "README.md").unlink()
    assert model_cards.push_to_hub(home, "me/it", private=True) == "https://x/me/it"
    assert sent["created"] == ("me/it", True, True)
    assert "README.md" in sent["files"] and "model_index.json" in sent["files"]


# ------------------------------------------------------------------------------- notebooks


def test_missing_runs_are_finetuned_and_announced(profile, run, untrained, capsys, monkeypatch):
    monkeypatch.setattr(notebook, "clear_output", lambda: None)
    other = profile.run("tiny", "larger")
    finetuning.finetune(run)
    homes = notebook.finetuned(profile, [run, other])
    assert [home.name for home in homes] == ["tiny-smaller-s0", "tiny-larger-s0"]
    assert capsys.readouterr().out == "to be finetuned first: tiny-larger-s0\n"
    notebook.finetuned(profile, [run, other])
    assert capsys.readouterr().out == ""
