"""Profiles: defaults, overrides, and every mistake a reader can make in one."""

import dataclasses

import pandas as pd
import pytest
import yaml

from ddpo_lib import config, paths

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
def load(tmp_path, monkeypatch):
    """load(**changes): a profile with changed content."""
    monkeypatch.setattr(paths, "CONFIG", tmp_path)

    def load(**changes) -> config.Profile:
        (tmp_path / "mine.yaml").write_text(yaml.safe_dump(CONTENT | changes))
        return config.load("mine")

    return load


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_of_the_project_load(name):
    profile = config.load(name)
    assert profile.name == name
    assert len({run.name for run in profile.batch()}) == len(profile.runs)


def test_toy_batch_has_the_seven_finetunings():
    batch = [(run.policy, run.task) for run in config.load("toy").batch()]
    low_rates_of_figure_5_7 = [("faces", "aesthetic-low-lr"), ("faces", "aesthetic-lower-lr")]
    jpeg_and_taste = ["aesthetic", "compressibility", "incompressibility"]
    expected = [("faces", task) for task in [*jpeg_and_taste, "over50"]]
    expected += [("churches", task) for task in jpeg_and_taste]
    assert batch == expected + low_rates_of_figure_5_7


def test_defaults_are_the_hyperparameters_of_table_a_2():
    settings = config.Finetune()
    assert (settings.n_steps, settings.eta) == (40, 1.0)
    assert (settings.n_iterations, settings.n_samples, settings.minibatch_size) == (72, 100, 10)
    assert (settings.n_inner_epochs, settings.n_updates) == (1, 720)
    assert (settings.clip_range, settings.advantage_clip) == (1e-4, 4.5)
    assert (settings.learning_rate, settings.lr_schedule) == (9e-8, "constant")
    assert (settings.weight_decay, settings.max_grad_norm) == (1e-4, 1.0)
    assert settings.warmup == 0.25
    assert settings.final_lr_fraction == 0.1
    assert settings.objective == "ddpo_is"


def test_task_overrides_profile_and_policy_overrides_task_and_caller_overrides_all(load):
    profile = load()
    faces = profile.run("faces", "aesthetic").settings
    churches = profile.run("churches", "aesthetic").settings
    assert (faces.n_steps, churches.n_steps) == (20, 20)
    assert (faces.n_iterations, churches.n_iterations) == (5, 7)
    assert (faces.learning_rate, churches.learning_rate) == (9e-8, 2e-5)
    assert (faces.advantage_clip, churches.advantage_clip) == (10, 10)
    assert profile.run("faces", "compressibility").settings.n_iterations == 10
    mine = profile.run("churches", "aesthetic", n_iterations=2, learning_rate=None).settings
    assert (mine.n_iterations, mine.learning_rate) == (2, 2e-5)
    assert profile.run("churches", "aesthetic").settings == churches  # nothing was used up


def test_run_carries_everything(load):
    run = load().run("faces", "compressibility", seed=3)
    assert (run.profile, run.policy, run.source) == ("mine", "faces", "toy/faces")
    assert (run.task, run.reward, run.seed) == ("compressibility", "jpeg_compressibility", 3)
    assert run.models.clip == "toy/clip"
    assert run.name == "faces-compressibility-s3"
    assert [run.name for run in load().batch()] == [
        "churches-aesthetic-s0", "faces-compressibility-s3",
    ]  # fmt: skip


def test_own_reward_needs_no_task_in_the_profile(load):
    run = load().run("faces", "red", reward="my_rewards:redness")
    assert (run.task, run.reward, run.settings.n_iterations) == ("red", "my_rewards:redness", 10)
    other = load().run("faces", "aesthetic", reward="my_rewards:redness")
    assert (other.reward, other.settings.advantage_clip) == ("my_rewards:redness", 10)


def test_replace_changes_settings(load):
    run = load().run("faces", "aesthetic")
    assert config.replace(run, bf16=False).settings.bf16 is False
    assert run.settings.bf16 is True


# ------------------------------------------------------------------------------- mistakes


def test_unknown_profile_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown profile 'tyo': .*'toy'"):
        config.load("tyo")


def test_unknown_policy_names_the_known_ones(load):
    with pytest.raises(ValueError, match=r"unknown policy 'cats': .*\['churches', 'faces'\]"):
        load().run("cats", "aesthetic")


def test_unknown_task_names_the_known_ones(load):
    with pytest.raises(ValueError, match=r"unknown task 'red': .*\['aesthetic', 'compressi.*own"):
        load().run("faces", "red")


def test_unknown_setting_names_the_known_ones(load):
    with pytest.raises(ValueError, match=r"unknown setting \['lerning_rate'\]; .*'learning_rate'"):
        load().run("faces", "aesthetic", lerning_rate=1e-5)


@pytest.mark.parametrize(
    "name",
    [
        "objective",
        "log_prob_reduction",
        "loss_reduction",
        "advantage_scope",
        "lr_schedule",
        "jpeg_encoding",
    ],
)
def test_unknown_choice_names_the_known_ones(name):
    with pytest.raises(ValueError, match=rf"{name}='nonsense': must be one of \('"):
        config.Finetune(**{name: "nonsense"})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"eta": 0.0}, "eta=0.0: finetuning needs a stochastic sampler"),
        ({"objective": "ddpo_sf"}, "one update per rollout: .* n_samples, 100"),
        ({"n_samples": 15}, "n_samples=15 is not a multiple of minibatch_size=10"),
        ({"n_steps": 1}, "n_steps=1: must be at least 2"),
        ({"minibatch_size": 0}, "minibatch_size=0: must be at least 1"),
        ({"n_inner_epochs": 0}, "n_inner_epochs=0: must be at least 1"),
        ({"micro_batch": 0}, "micro_batch=0: must be at least 1"),
        ({"n_iterations": 0}, "n_iterations=0: must be at least 1"),
        ({"learning_rate": "3e-5"}, r"learning_rate='3e-5': must be of type float .*3\.0e-5"),
        ({"n_samples": 10.0}, "n_samples=10.0: must be of type int"),
        ({"bf16": "no"}, "bf16='no': must be of type bool"),
    ],
)
def test_impossible_setting_is_one_clear_error(change, message):
    with pytest.raises(ValueError, match=message):
        config.Finetune(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"polices": {}}, r"mine.yaml: unknown setting \['polices'\]"),
        ({"models": {"clip": "x", "age": "y"}}, r"mine.yaml: models: missing \['aesthetic'\]"),
        ({"models": {}}, r"mine.yaml: models: missing \['aesthetic', 'age', 'clip'\]"),
        ({"evaluation": {"m": 1}}, r"mine.yaml: evaluation: unknown setting \['m'\]"),
        ({"finetune": {"steps": 9}}, r"finetuning churches-.*: unknown setting \['steps'\]"),
        ({"tasks": {"red": {"reward": "aesthetic", "cats": {}}}}, r"unknown setting \['cats'\]"),
        ({"tasks": {"red": {"n_steps": 9}}}, "task 'red' of profile 'mine' names no reward"),
        ({"runs": [{"policy": "faces", "task": "red"}]}, "unknown task 'red'"),
        ({"runs": [{"policy": "cats", "task": "aesthetic"}]}, "unknown policy 'cats'"),
    ],
)
def test_mistake_in_a_profile_is_found_when_it_is_read(load, change, message):
    with pytest.raises(ValueError, match=message):
        load(**change)


def test_missing_part_of_a_profile_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "CONFIG", tmp_path)
    content = {name: value for name, value in CONTENT.items() if name != "tasks"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match=r"mine.yaml: missing \['tasks'\]"):
        config.load("mine")


# ------------------------------------------------------------------------------- thesis


def test_thesis_world_has_the_toy_worlds_runs_and_tasks():
    """The same notebooks run in both."""
    toy, thesis = config.load("toy"), config.load("thesis")
    assert set(toy.tasks) <= set(thesis.tasks)
    assert {run.name for run in toy.batch()} == {run.name for run in thesis.batch()}
    for run in thesis.batch():
        assert run.reward == toy.run(run.policy, run.task).reward


def test_thesis_world_uses_the_thesis_models():
    thesis = config.load("thesis")
    sources = {**thesis.policies, **dataclasses.asdict(thesis.models)}
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
    settings = dataclasses.asdict(config.load("thesis").run(policy, task).settings)
    for name in table.index.intersection(list(settings)):
        schedule_off = name == "peak_learning_rate" and settings["lr_schedule"] == "constant"
        expected = type(settings[name])(table[name])
        assert schedule_off or settings[name] == expected, name
    assert settings["n_samples"] // settings["minibatch_size"] == int(
        table["updates_per_iteration"]
    )


def test_thesis_world_keeps_every_step_and_the_defaults_of_the_method():
    settings = config.load("thesis").run("faces", "over50").settings
    changed = config.Finetune(micro_batch=settings.micro_batch)
    assert settings == changed


def test_low_rates_of_figure_5_7():
    thesis = config.load("thesis")
    rates = [thesis.run("faces", f"aesthetic-{name}-lr").settings for name in ("low", "lower")]
    assert [s.learning_rate for s in rates] == [9e-8, 7e-8]
    assert {s.lr_schedule for s in rates} == {"constant"}
    assert {s.n_iterations for s in rates} == {35}


def test_published_policies_are_the_seven_of_table_5_1():
    thesis = config.load("thesis")
    table = pd.read_csv(paths.THESIS / "table_5_1.csv")
    names = {"google/ddpm-celebahq-256": "faces", "google/ddpm-church-256": "churches"}
    for row in table.itertuples():
        published = thesis.published(thesis.run(names[row.policy], row.task))
        kind = row.policy.removeprefix("google/ddpm-")
        assert published == f"alkzar90/ddpo-{row.task}-{kind}"
    assert sum(len(tasks) for tasks in thesis.finetuned.values()) == len(table) == 7
    assert thesis.published(thesis.run("faces", "aesthetic-low-lr")) is None
    toy = config.load("toy")
    assert all(toy.published(run) is None for run in toy.batch())


@pytest.mark.parametrize(
    "finetuned, message",
    [
        ({"cats": {"aesthetic": "a/b"}}, "unknown policy 'cats'"),
        ({"faces": {"red": "a/b"}}, "unknown task 'red'"),
    ],
)
def test_published_policy_of_an_unknown_task_is_found_when_it_is_read(load, finetuned, message):
    with pytest.raises(ValueError, match=message):
        load(finetuned=finetuned)
