"""Profiles: defaults, overrides, and every mistake a reader can make in one."""

import dataclasses
import os
import shutil
import subprocess
import sys
import types

import pandas as pd
import pytest
import yaml

from ddpo_lib.book import paths, profiles
from ddpo_lib.objectives import ddpo
from ddpo_lib.settings import Finetune

PROFILES = sorted(file.stem for file in paths.CONFIG.glob("*.yaml"))

CONTENT = {
    "policies": {"faces": "toy/faces", "churches": "toy/churches"},
    "models": {"clip": "toy/clip", "aesthetic": "toy/aesthetic", "age": "toy/age"},
    "evaluation": {"n": 10},
    "finetune": {"n_steps": 20, "n_iterations": 10},
    "tasks": {
        "compressibility": {"reward": "jpeg_compressibility"},
        "aesthetic": {
            "reward": "aesthetic",
            "advantage_clip": 10,
            "n_iterations": 5,
            "churches": {"n_iterations": 7, "learning_rate": 2.0e-5},
        },
    },
    "runs": [
        {"policy": "churches", "task": "aesthetic"},
        {"policy": "faces", "task": "compressibility", "seed": 3},
    ],
}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """write(text): a profile of this text, read."""
    monkeypatch.setattr(paths, "CONFIG", tmp_path)

    def write(text: str | bytes, name="mine") -> profiles.Profile:
        raw = text if isinstance(text, bytes) else text.encode()
        (tmp_path / f"{name}.yaml").write_bytes(raw)
        return profiles.load(name)

    return write


@pytest.fixture
def load(write):
    """load(**changes): a profile with changed content."""
    return lambda **changes: write(yaml.safe_dump(CONTENT | changes, sort_keys=False))


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_of_the_project_load(name):
    profile = profiles.load(name)
    assert profile.name == name
    assert len({run.name for run in profile.batch()}) == len(profile.batch())


def test_toy_batch_has_the_seven_finetunings():
    batch = [(run.policy, run.task) for run in profiles.load("toy").batch()]
    low_rates_of_figure_5_7 = [("faces", "aesthetic-low-lr"), ("faces", "aesthetic-lower-lr")]
    jpeg_and_taste = ["aesthetic", "compressibility", "incompressibility"]
    expected = [("faces", task) for task in [*jpeg_and_taste, "over50"]]
    expected += [("churches", task) for task in jpeg_and_taste]
    beside_the_thesis = [("faces", "aesthetic-fooled")]
    more_rates = [("faces", "aesthetic-mean-lr"), ("faces", "aesthetic-high-lr")]
    assert batch == expected + beside_the_thesis + low_rates_of_figure_5_7 + more_rates


def test_toy_tasks_differ_in_rate_and_length_alone():
    toy = profiles.load("toy")
    free = {"learning_rate", "peak_learning_rate", "lr_schedule", "n_iterations"}
    first, *others = [
        {k: v for k, v in vars(run.settings).items() if k not in free} for run in toy.batch()
    ]
    assert all(other == first for other in others) and first["eta"] == 1
    assert len({run.objective_settings for run in toy.batch()}) == 1
    clip = toy.batch()[0].objective_settings.clip_range
    assert clip == profiles.load("thesis").batch()[0].objective_settings.clip_range


def test_toy_seeds_are_five_of_every_task_of_table_5_1():
    runs = profiles.load("toy").batch(every_seed=True)
    over_seeds = [(r.policy, r.task) for r in profiles.load("toy").batch()[:8]]
    for policy, task in [*over_seeds, ("faces", "control"), ("faces", "biased")]:
        seeds = [run.seed for run in runs if (run.policy, run.task) == (policy, task)]
        assert seeds == [0, 1, 2, 3, 4]


def test_task_overrides_profile_and_policy_overrides_task_and_caller_overrides_all(load):
    profile = load()
    faces = profile.run("faces", "aesthetic")
    churches = profile.run("churches", "aesthetic")
    assert (faces.settings.n_steps, churches.settings.n_steps) == (20, 20)
    assert (faces.settings.n_iterations, churches.settings.n_iterations) == (5, 7)
    assert (faces.settings.learning_rate, churches.settings.learning_rate) == (9e-8, 2e-5)
    assert faces.objective_settings == churches.objective_settings
    assert faces.objective_settings == ddpo.Settings(advantage_clip=10)
    assert profile.run("faces", "compressibility").settings.n_iterations == 10
    mine = profile.run("churches", "aesthetic", n_iterations=2, learning_rate=None, clip_range=0.5)
    assert (mine.settings.n_iterations, mine.settings.learning_rate) == (2, 2e-5)
    assert mine.objective_settings == ddpo.Settings(advantage_clip=10, clip_range=0.5)
    assert profile.run("churches", "aesthetic") == churches  # nothing was used up


def test_run_carries_everything(load):
    run = load(finetune={"jpeg_encoding": "published"}).run("faces", "compressibility", seed=3)
    assert (run.profile, run.policy, run.source) == ("mine", "faces", str(paths.TOY / "faces"))
    assert (run.task, run.reward, run.seed) == ("compressibility", "jpeg_compressibility", 3)
    assert run.models["clip"] == str(paths.TOY / "clip")
    assert (run.objective, run.objective_settings) == ("ddpo", ddpo.Settings())
    assert run.jpeg_encoding == "published"
    assert run.name == "faces-compressibility-s3"
    assert {run: 1}[run] == 1  # notebooks keep things by run
    assert [run.name for run in load().batch()] == [
        "churches-aesthetic-s0", "faces-compressibility-s3",
    ]  # fmt: skip


def test_own_reward_needs_no_task_in_the_profile(load):
    def redness(images):
        return images[:, 0].mean((1, 2))

    for reward in ("my_rewards:redness", redness):
        run = load().run("faces", "red", reward=reward)
        assert (run.task, run.reward, run.settings.n_iterations) == ("red", reward, 10)
    other = load().run("faces", "aesthetic", reward="my_rewards:redness")
    assert other.reward == "my_rewards:redness"
    assert other.objective_settings.advantage_clip == 10


@pytest.fixture
def own_objective(monkeypatch):
    """An importable module with its own `Settings`."""
    module = types.ModuleType("my_objective")

    @dataclasses.dataclass(frozen=True)
    class Settings:
        beta: float = 0.5
        clip_range: float = 0.25

    module.Settings = Settings
    for name in ("helpers", "credit", "units", "loss"):
        setattr(module, name, getattr(ddpo, name))
    monkeypatch.setitem(sys.modules, "my_objective", module)
    return module


def test_own_objective_takes_its_own_settings_and_none_of_the_other(load, own_objective):
    """The profile's clip range is DDPO's."""
    finetune = {"n_steps": 20, "clip_range": 0.01}
    profile = load(finetune=finetune)
    assert profile.run("faces", "aesthetic").objective_settings.clip_range == 0.01
    run = profile.run("faces", "aesthetic", objective="my_objective", beta=0.75)
    assert run.objective == "my_objective"
    assert run.objective_settings == own_objective.Settings(beta=0.75)
    assert run.settings.n_steps == 20
    with pytest.raises(ValueError, match=r"unknown \['advantage_clip'\]; known are .*'beta'"):
        profile.run("faces", "aesthetic", objective="my_objective", advantage_clip=2.0)
    tasks = {"red": {"reward": "aesthetic", "objective": "my_objective", "beta": 0.125}}
    run = load(finetune=finetune, tasks=tasks, runs=[]).run("faces", "red")
    assert run.objective_settings == own_objective.Settings(beta=0.125)
    assert load(finetune={"objective": "my_objective"}, tasks=tasks, runs=[]).run("faces", "red")


def test_setting_of_objective_and_loop_is_ambiguous(load, own_objective):
    own_objective.Settings = dataclasses.make_dataclass("Settings", [("eta", float, 1.0)])
    with pytest.raises(ValueError, match=r"\['eta'\]: settings of the loop, and of the objective"):
        load().run("faces", "compressibility", objective="my_objective")


def test_a_folder_is_named_absolutely_and_a_hub_id_stays(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "google/ddpm-x").mkdir(parents=True)  # nor does the working directory matter
    policies = {"a": "toy/faces", "b": "google/ddpm-x", "c": str(tmp_path), "d": "../config"}
    profile = load(policies=policies | {"e": "./nowhere"}, tasks={}, runs=[])
    assert profile.policies == {
        "a": str(paths.DATA / "toy/faces"),
        "b": "google/ddpm-x",
        "c": str(tmp_path),
        "d": str(paths.DATA / "../config"),
        "e": str(paths.DATA / "nowhere"),
    }


def test_toy_world_is_known_by_its_models(load):
    assert load().is_toy and load(runs=[]).is_toy
    assert not load(policies={"faces": "a/b", "churches": "a/c"}).is_toy
    assert not load(policies={"faces": "a/b", "churches": "a/c"}, runs=[]).is_toy


# ------------------------------------------------------------------------------- mistakes


def test_profile_name_is_of_the_alphabet_too(write):
    with pytest.raises(ValueError, match="'my profile': must be of letters"):
        write(yaml.safe_dump(CONTENT), name="my profile")


def test_empty_sections_say_nothing(load):
    empty = load(evaluation=None, finetune=None, runs=None, finetuned=None)
    assert empty.evaluation == profiles.Evaluation() and empty.batch() == []
    assert empty.run("faces", "compressibility").settings == Finetune()
    assert load(finetuned={"faces": None}).finetuned == {"faces": {}}
    assert load(tasks={"red": {"reward": "aesthetic", "faces": None}}, runs=[])


def test_any_locale_will_do(load, tmp_path, monkeypatch):
    text = yaml.safe_dump(CONTENT).replace("toy/faces", "mödel/é")
    file = tmp_path / "mine.yaml"
    file.write_text(text, encoding="utf-8")
    code = "from ddpo_lib.book import paths, profiles; import sys; from pathlib import Path\n"
    code += "paths.CONFIG = Path(sys.argv[1]); found = profiles.load('mine').policies['faces']\n"
    code += "assert found == 'm\\xf6del/\\xe9', ascii(found)"
    env = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", code, tmp_path], env=env, check=True)


# ------------------------------------------------------------------------------- paths


def where(code, env=(), folder=None):
    """What a new process finds in `paths`: the standard output of code, or the error."""
    done = subprocess.run(
        [sys.executable, "-c", f"from ddpo_lib.book import paths\n{code}"],
        cwd=folder, env=os.environ | dict(env), capture_output=True, text=True,
    )  # fmt: skip
    return done.stdout or done.stderr


def test_ddpo_root_moves_what_is_written_and_nothing_else(tmp_path):
    code = "import os; os.chdir('/')\nfor name in ('ROOT', 'CONFIG', 'TOY', 'RUNS', 'FIGURES'): "
    code += "print(getattr(paths, name))"
    root, config, toy, *written = where(code, {"DDPO_ROOT": "out"}, tmp_path).split()
    assert (root, config) == (str(paths.ROOT), str(paths.ROOT / "config"))
    assert toy == str(paths.ROOT / "data/toy")
    assert written == [str(tmp_path / "out/data/runs"), str(tmp_path / "out/figures")]
    for unset in ("", str(paths.ROOT)):
        *_, runs, figures = where(code, {"DDPO_ROOT": unset}, tmp_path).split()
        assert [runs, figures] == [str(paths.ROOT / "data/runs"), str(paths.ROOT / "figures")]


def test_outside_a_checkout_one_error_says_what_to_do(tmp_path):
    site = tmp_path / "site-packages"
    shutil.copytree(paths.ROOT / "ddpo_lib", site / "ddpo_lib")
    env = {"PYTHONPATH": str(site)}
    assert where("print(paths.__file__)", env, tmp_path).startswith(str(site))
    for access in (
        "paths.RUNS", "paths.ROOT", "paths.resolve('toy/faces')",
        "from ddpo_lib.book import profiles; profiles.load('toy')",
        "from ddpo_lib.book import batch; batch.plan('toy', 1)",
    ):  # fmt: skip
        *_, last = where(access, env, tmp_path).splitlines()
        assert last.startswith("RuntimeError: ddpo_lib.book needs a checkout"), last
        assert "pip install -e" in last
    assert "AttributeError" in where("paths.nothing", env, tmp_path)
    assert "AttributeError" in where("paths.NOTHING")
    library = "from ddpo_lib import finetune, runs; print('works')"
    assert where(library, env, tmp_path) == "works\n"
    assert sorted(file.name for file in site.iterdir()) == ["ddpo_lib"]


def test_paths_are_shown_from_the_checkout_or_the_written_folder_on(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "OUTPUT", tmp_path)
    assert paths.shown(tmp_path / "data/runs/x") == "data/runs/x"
    assert paths.shown(paths.TOY / "faces") == "data/toy/faces"
    assert paths.shown("/elsewhere/x") == "/elsewhere/x"
    assert paths.shown("google/ddpm-church-256") == "google/ddpm-church-256"


# ------------------------------------------------------------------------------- thesis


def test_toy_world_has_the_thesis_worlds_runs_and_tasks():
    """The same notebooks run in both; the toy world has a control and a run that is fooled too."""
    toy, thesis = profiles.load("toy"), profiles.load("thesis")
    assert set(thesis.tasks) <= set(toy.tasks)
    assert {run.name for run in thesis.batch()} <= {run.name for run in toy.batch()}
    for run in thesis.batch():
        assert run.reward == toy.run(run.policy, run.task).reward


def test_thesis_world_uses_the_thesis_models():
    thesis = profiles.load("thesis")
    sources = {**thesis.policies, **thesis.models}
    names = {name: source.partition("@")[0] for name, source in sources.items()}
    assert names["faces"] == "google/ddpm-celebahq-256"
    assert names["churches"] == "google/ddpm-church-256"
    assert names["clip"] == "ViT-L-14:openai"
    assert names["age"] == "nateraw/vit-age-classifier"
    assert (thesis.evaluation.n, thesis.evaluation.n_steps) == (1000, 40)


@pytest.mark.parametrize("policy", ["faces", "churches"])
@pytest.mark.parametrize("task", ["compressibility", "incompressibility", "aesthetic"])
def test_thesis_world_has_the_settings_of_table_a_2(policy, task):
    table = pd.read_csv(paths.THESIS / "table_a_2.csv", index_col="setting")[task].dropna()
    run = profiles.load("thesis").run(policy, task)
    settings = dataclasses.asdict(run.settings) | dataclasses.asdict(run.objective_settings)
    compared = table.index.intersection(list(settings))
    assert {"clip_range", "advantage_clip", "learning_rate", "n_iterations"} <= set(compared)
    for name in compared:
        schedule_off = name == "peak_learning_rate" and settings["lr_schedule"] == "constant"
        expected = type(settings[name])(table[name])
        assert schedule_off or settings[name] == expected, name
    assert settings["n_samples"] // settings["minibatch_size"] == int(
        table["updates_per_iteration"]
    )


def test_thesis_world_keeps_every_step_and_the_defaults_of_the_method():
    run = profiles.load("thesis").run("faces", "over50")
    # At its learning rate bfloat16 rounds by more than an update changes.
    assert run.settings == Finetune(micro_batch=run.settings.micro_batch, bf16=False)
    assert (run.objective, run.objective_settings) == ("ddpo", ddpo.Settings())


def test_low_rates_of_figure_5_7():
    thesis = profiles.load("thesis")
    rates = [thesis.run("faces", f"aesthetic-{name}-lr").settings for name in ("low", "lower")]
    assert [s.learning_rate for s in rates] == [9e-8, 7e-8]
    assert {s.lr_schedule for s in rates} == {"constant"}
    assert {s.n_iterations for s in rates} == {35}


def test_published_policies_are_the_seven_of_table_5_1():
    thesis = profiles.load("thesis")
    table = pd.read_csv(paths.THESIS / "table_5_1.csv")
    names = {"google/ddpm-celebahq-256": "faces", "google/ddpm-church-256": "churches"}
    for row in table.itertuples():
        published = thesis.published(thesis.run(names[row.policy], row.task))
        kind = row.policy.removeprefix("google/ddpm-")
        assert published == f"alkzar90/ddpo-{row.task}-{kind}"
    assert sum(len(tasks) for tasks in thesis.finetuned.values()) == len(table) == 7
    assert thesis.published(thesis.run("faces", "aesthetic-low-lr")) is None
    toy = profiles.load("toy")
    assert all(toy.published(run) is None for run in toy.batch())


def test_profile_sd_has_the_papers_prompts():
    """45 animals, and each with three activities; eight samples of a prompt, four updates."""
    runs = {run.task: run for run in profiles.load("sd").batch()}
    assert {task: len(run.settings.prompts) for task, run in runs.items()} == {
        "compressibility": 45, "incompressibility": 45, "aesthetic": 45, "alignment": 135,
    }  # fmt: skip
    assert "an ant washing dishes" in runs["alignment"].settings.prompts
    for run in runs.values():
        settings = run.settings
        assert (run.guidance, settings.adapter_rank, settings.learning_rate) == (5, 4, 3e-4)
        assert settings.n_updates == 4 * settings.n_iterations
