"""The loop on a tiny policy: it learns, resumes to the bit, and loses nothing when things break."""

import dataclasses
import itertools
import json
import os
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from ddpo_lib import checkpoints, disk, diversity, rewards, runs, sampler, watch
from ddpo_lib import finetune as loop
from ddpo_lib import policy as policies
from ddpo_lib.objectives import ddpo
from ddpo_lib.policy import Policy
from ddpo_lib.settings import Finetune

N_CALLS = 11
"""Of the reward in a run of three iterations: the development set by two samplers, then a rollout
and the development set twice in each."""


def weights(folder):
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def without_seconds(row):
    return {name: value for name, value in row.items() if name != "seconds"}


def everything(home):
    """All that a run leaves, without its durations."""
    return {
        "last": weights(home / "last"),
        "best": weights(home / "best"),
        "moments": load_file(home / "last/optimizer.safetensors"),
        "done": runs.iterations_done(home),
        "kept": runs.best(home),
        "metrics": [without_seconds(row) for row in runs.metrics(home)],
        "development": {
            file.name: {key: value.tobytes() for key, value in np.load(file).items()}
            for file in sorted((home / "development").iterdir())
        },
    }


def assert_same(home, expected):
    found = everything(home)
    for name, value in expected.items():
        if name in ("last", "best", "moments"):
            assert found[name].keys() == value.keys()
            assert all(found[name][key].equal(value[key]) for key in value), name
        else:
            assert found[name] == value, name
    assert not [p for p in home.rglob("*") if p.name.endswith((".tmp", ".previous"))]


def test_reward_rises(finetune, new_policy):
    """By more than twice its spread. (The schedule is coarse: with the real one most of the
    gradient's noise comes from the last action, and a tiny run would not learn.)"""
    coarse = DDPMScheduler(num_train_timesteps=5, beta_start=0.1, beta_end=0.5)
    home = finetune(
        policy=Policy(new_policy(widths=(8,)).unet, coarse), own=ddpo.Settings(clip_range=1e-2),
        n_iterations=8, n_samples=40, minibatch_size=20, n_steps=5, micro_batch=80,
    )  # fmt: skip
    before, *curve = runs.metrics(home)
    spread = 2 * curve[0]["reward_sd"]
    assert curve[-1]["development_reward"] > before["development_reward"] + spread
    assert curve[-1]["reward_mean"] > curve[0]["reward_mean"] + spread


@pytest.mark.parametrize("answer", [True, np.True_])
def test_run_stops_where_its_watcher_says_and_goes_on(finetune, answer):
    whole = finetune("whole")
    home = finetune("stopped", on_iteration=lambda row: answer if row["iteration"] == 1 else None)
    assert [row["iteration"] for row in runs.metrics(home)] == [0, 1]
    assert finetune("stopped") == home
    assert_same(home, everything(whole))


def test_other_answers_stop_nothing(finetune):
    for name, answer in {"number": 1, "text": "yes", "false": False, "none": None}.items():
        home = finetune(name, on_iteration=lambda row, answer=answer: answer)
        assert len(runs.metrics(home)) == 4


def test_what_a_run_leaves(finetune):
    seen = []
    home = finetune(n_inner_epochs=2, on_iteration=seen.append)

    before, *rows = runs.metrics(home)
    assert (home / "metrics.jsonl").read_text().count("\n") == 4
    kinds = itertools.product(("development", "stochastic"), ("reward", "sd", "spread"))
    assert before.keys() == {"iteration", *map("_".join, kinds)}
    assert [row["iteration"] for row in (before, *rows)] == [0, 1, 2, 3]
    updates = [update for row in rows for update in row["updates"]]
    assert [update["update"] for update in updates] == list(range(12))  # 3 × 2 epochs × 2 batches
    assert {update["learning_rate"] for update in updates} == {1e-3}
    for first, *later in (row["updates"] for row in rows):
        assert first["mean_ratio"] == pytest.approx(1, abs=1e-6)
        assert first["clip_fraction"] == 0 and 0 <= first["kl"] < 1e-6
        assert all(update["clip_fraction"] > 0 and update["kl"] > 0 for update in later)

    for row in rows:
        assert len(row["rewards"]) == 4
        assert row["reward_mean"] == pytest.approx(np.mean(row["rewards"]), rel=1e-5)
        assert row["reward_sd"] == pytest.approx(np.std(row["rewards"], ddof=1), rel=1e-4)
        for name in ("kl", "loss", "clip_fraction", "grad_norm"):
            assert row[name] == pytest.approx(np.mean([update[name] for update in row["updates"]]))
    for kind in ("development", "stochastic"):
        pictures, scores = runs.development(home, kind)
        assert pictures.shape == (4, 2, 8, 8, 3) and pictures.dtype == np.uint8
        for i, row in enumerate((before, *rows)):
            assert row[f"{kind}_reward"] == pytest.approx(scores[i].mean(), rel=1e-5)
            assert row[f"{kind}_sd"] == pytest.approx(scores[i].std(ddof=1), rel=1e-4)
            assert row[f"{kind}_spread"] == pytest.approx(diversity.spread(pictures[i]))

    # A flat dict of numbers, for a logger, an iteration.
    assert [row["iteration"] for row in seen] == [1, 2, 3]
    assert all(isinstance(value, int | float) for row in seen for value in row.values())
    assert [{**row, "rewards": 0, "updates": 0} for row in seen] == [
        {**row, "rewards": 0, "updates": 0} for row in rows
    ]


def test_policy_that_comes_in_stays_as_it_was(finetune, new_policy):
    policy = new_policy(widths=(8,))
    before = {name: value.clone() for name, value in policy.unet.state_dict().items()}
    home = finetune(policy=policy)
    assert all(value.equal(before[name]) for name, value in policy.unet.state_dict().items())
    assert not weights(home / "last")["conv_in.weight"].equal(before["conv_in.weight"])


def test_seed_alone_decides(finetune):
    torch.manual_seed(1)
    expected = everything(finetune("a"))
    torch.manual_seed(2)
    np.random.seed(2)
    assert_same(finetune("b"), expected)
    other = everything(finetune("c", seed=1))
    assert other["metrics"][1]["rewards"] != expected["metrics"][1]["rewards"]
    assert other["development"] != expected["development"]


def test_iterations_have_their_own_noise(finetune):
    """At a rate of nearly zero only the noise tells one iteration from the next."""
    before, *rows = runs.metrics(finetune(learning_rate=1e-30))
    scores = [score for row in rows for score in row["rewards"]]
    assert len(set(scores)) == 12
    assert {row["development_reward"] for row in rows} == {before["development_reward"]}


@pytest.mark.parametrize("size", [(8, 12), (12, 8)])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("reward", [rewards.jpeg_compressibility, rewards.jpeg_incompressibility])
def test_one_channel_and_oblong_images_go_through_the_whole_loop(
    finetune, new_policy, size, channels, reward
):
    policy = new_policy(channels=channels, widths=(8,), size=size)
    home = finetune(policy=policy, reward=reward, n_iterations=2)
    pictures, scores = runs.development(home)
    assert pictures.shape == (3, 2, *size, channels) and np.isfinite(scores).all()
    assert policies.load(home / "best").image_shape == (channels, *size)
    pipeline = DDPMPipeline.from_pretrained(home / "best")
    assert pipeline.unet.config.in_channels == channels


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_schedules_of_other_people_go_through_the_whole_loop(
    finetune, new_policy, spacing, prediction
):
    policy = new_policy(
        widths=(8,), timestep_spacing=spacing, prediction_type=prediction, steps_offset=1
    )
    home = finetune(policy=policy, n_iterations=1)
    first = runs.metrics(home)[1]["updates"][0]
    assert first["mean_ratio"] == pytest.approx(1, abs=1e-6)
    saved = json.loads((home / "best/scheduler/scheduler_config.json").read_text())
    assert saved["timestep_spacing"] == spacing and saved["prediction_type"] == prediction


# ------------------------------------------------------------------------------- what reaches what


def spy(monkeypatch, calls):
    """Note what each optimizer step was given."""
    step = loop.update

    def noting(network, optimizer, rows, loss, **rest):
        calls.append((optimizer.param_groups[0], rows, loss, rest))
        return step(network, optimizer, rows, loss, **rest)

    monkeypatch.setattr(loop, "update", noting)


@pytest.mark.parametrize("scope", ["iteration", "minibatch"])
def test_update_gets_credit_of_its_own_samples(finetune, monkeypatch, scope):
    given = []
    loss = ddpo.loss

    def noting(policy, experience, rows, credit, *rest):
        i = rows[:, 0, 1].unique()
        given.append((experience.trajectory.x_0[i].mean((1, 2, 3)), credit[i]))
        return loss(policy, experience, rows, credit, *rest)

    monkeypatch.setattr(ddpo, "loss", noting)
    finetune(
        own=ddpo.Settings(advantage_scope=scope), n_iterations=1, n_samples=6, minibatch_size=3,
        micro_batch=100,
    )  # fmt: skip
    scores = torch.cat([reward for reward, _ in given])
    assert len(given) == 2
    assert len(scores.unique()) == 6  # every sample once
    for reward, credit in given:
        group = scores if scope == "iteration" else reward
        expected = (reward - group.mean()) / group.std(correction=0)
        torch.testing.assert_close(credit, expected, rtol=1e-3, atol=1e-4)


def test_settings_reach_the_rollout_the_optimizer_and_the_objective(finetune, monkeypatch):
    calls, trajectories = [], []
    spy(monkeypatch, calls)
    rollout = sampler.rollout
    monkeypatch.setattr(
        sampler, "rollout", lambda *a, **k: trajectories.append(rollout(*a, **k)) or trajectories[0]
    )
    finetune(
        n_iterations=1, eta=0.5, log_prob_reduction="sum", weight_decay=0.03, n_steps=5,
        max_grad_norm=0.7, micro_batch=3, own=ddpo.Settings(advantage_clip=0.5, clip_range=0.3),
    )  # fmt: skip
    (trajectory,) = trajectories
    assert trajectory.eta == 0.5 and trajectory.reduction == "sum"
    assert trajectory.timesteps.tolist() == [800, 600, 400, 200, 0]
    for group, rows, _, rest in calls:
        assert group["weight_decay"] == 0.03
        assert group["betas"] == (0.9, 0.999) and group["eps"] == 1e-8
        assert rest["max_grad_norm"] == 0.7 and rest["micro_batch"] == 3
        assert rows.shape == (8, 1, 2) and rest["n_units"] == 8  # 4 stochastic steps × 2 samples


def test_min_std_leaves_steps_out_and_fractions_are_drawn_anew(finetune, monkeypatch):
    calls = []
    spy(monkeypatch, calls)
    finetune("a", n_iterations=1, n_steps=9, min_std=0.05)
    assert {rows[:, 0, 0].max().item() for _, rows, _, _ in calls} == {7 - 1}
    calls.clear()
    finetune("b", n_iterations=3, n_steps=9, timestep_fraction=0.5)
    drawn = [rows[:, 0, 0].unique().tolist() for _, rows, _, _ in calls]
    assert len(drawn) == 6 and all(len(steps) == 4 for steps in drawn)
    assert len({tuple(steps) for steps in drawn}) > 3


def test_learning_rates_are_the_schedules(finetune):
    home = finetune(
        lr_schedule="warmup_cosine", learning_rate=1e-5, peak_learning_rate=9e-5, warmup=0.4
    )
    rates = [update["learning_rate"] for row in runs.metrics(home)[1:] for update in row["updates"]]
    cosine = [1e-6 + 8.9e-5 * (1 + np.cos(np.pi * x)) / 2 for x in (0, 1 / 3, 2 / 3, 1)]
    np.testing.assert_allclose(rates, [1e-5, 5e-5, *cosine], rtol=1e-6)


def test_gradient_checkpointing_reaches_the_network(finetune, monkeypatch):
    seen = []
    iterate = loop.iterate
    monkeypatch.setattr(
        loop,
        "iterate",
        lambda t, i: seen.append(t.learner.unet.is_gradient_checkpointing) or iterate(t, i),
    )
    finetune("a", n_iterations=1)
    finetune("b", n_iterations=1, gradient_checkpointing=True)
    assert seen == [False, True]


# ------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("schedule", ["constant", "warmup_cosine"])
def test_run_killed_at_any_reward_resumes_to_the_bit(finetune, brightness, schedule):
    """Killed in every rollout and every development set of three iterations."""
    expected = everything(finetune("unbroken", lr_schedule=schedule))
    for call in range(N_CALLS):
        brightness.calls, brightness.fail_at = 0, call
        with pytest.raises(KeyboardInterrupt):
            finetune(f"killed-{call}", lr_schedule=schedule)
        torch.manual_seed(call)  # a new process has another global state
        brightness.fail_at = None
        assert_same(finetune(f"killed-{call}", lr_schedule=schedule), expected)


def test_bf16_run_resumes_to_the_bit(finetune, brightness):
    expected = everything(finetune("unbroken", bf16=True))
    brightness.calls, brightness.fail_at = 0, 6
    with pytest.raises(KeyboardInterrupt):
        finetune(bf16=True)
    brightness.fail_at = None
    assert_same(finetune(bf16=True), expected)
    in_full = everything(finetune("full", bf16=False))
    assert in_full["metrics"] != expected["metrics"]  # bf16 was on


WRITES = [
    (disk, "write_json", 1), (disk, "write_json", 2), (runs, "append_metrics", 1),
    (runs, "append_metrics", 3), (runs, "save_development", 1), (runs, "save_development", 2),
    (checkpoints, "save_best", 1), (checkpoints, "save_best", 2), (checkpoints, "save_last", 1),
    (checkpoints, "save_last", 3),
]  # fmt: skip


@pytest.mark.parametrize("module, name, fatal", WRITES)
@pytest.mark.parametrize("when", ["before", "after"])
def test_run_killed_around_a_write_resumes_to_the_bit(finetune, module, name, fatal, when):
    """Before or after the nth time that a function writes."""
    expected = everything(finetune("unbroken", seed=1))
    assert expected["kept"]["iteration"] > 0  # so best/ is written more than once
    write, counter = getattr(module, name), itertools.count(1)

    def crash(*args):
        fatal_now = next(counter) == fatal
        if fatal_now and when == "before":
            raise KeyboardInterrupt
        result = write(*args)
        if fatal_now:
            raise KeyboardInterrupt
        return result

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(module, name, crash)
        finetune(seed=1)
    assert_same(finetune(seed=1), expected)


def test_best_and_its_record_agree_after_every_kill(finetune, tmp_path):
    """A policy kept before the checkpoint of its iteration is said to be that iteration's."""
    expected = everything(finetune("unbroken", seed=1))
    save, counter = checkpoints.save_last, itertools.count(1)

    def crash(*args):
        if next(counter) == expected["kept"]["iteration"]:
            raise KeyboardInterrupt
        return save(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save_last", crash)
        finetune(seed=1)
    home = tmp_path / "run"
    assert runs.best(home) == expected["kept"]
    best = weights(home / "best")
    assert all(best[key].equal(value) for key, value in expected["best"].items())
    assert runs.iterations_done(home) == expected["kept"]["iteration"] - 1


@pytest.mark.parametrize("name", ["last", "best"])
def test_run_killed_between_two_renames_resumes_to_the_bit(finetune, brightness, tmp_path, name):
    expected = everything(finetune("unbroken"))
    brightness.calls, brightness.fail_at = 0, 6
    with pytest.raises(KeyboardInterrupt):
        finetune()
    brightness.fail_at = None
    home = tmp_path / "run"
    (home / name).rename(home / f"{name}.previous")
    (home / f"{name}.tmp").mkdir()
    assert_same(finetune(), expected)


def test_finished_run_returns_without_loading_or_scoring(finetune, brightness, monkeypatch):
    home = finetune()
    expected = everything(home)
    monkeypatch.setattr(loop, "iterate", None)
    monkeypatch.setattr(checkpoints, "restore_learner", None)
    assert finetune() == home
    assert brightness.calls == N_CALLS
    assert_same(home, expected)


def test_longer_run_at_a_constant_rate_goes_on_from_a_shorter_one(finetune):
    expected = everything(finetune("long", n_iterations=3))
    finetune(n_iterations=1)
    assert_same(finetune(n_iterations=3), expected)
    with pytest.raises(ValueError, match="holds 3 iterations, more than n_iterations=2"):
        finetune(n_iterations=2)


def test_memory_settings_may_change_on_the_way(finetune):
    finetune(n_iterations=1)
    home = finetune(n_iterations=2, micro_batch=100, gradient_checkpointing=True)
    assert runs.iterations_done(home) == 2


# ------------------------------------------------------------------------------- best


def test_best_is_the_policy_with_the_highest_development_reward(finetune, brightness):
    # Development sets at eta = 0 are calls 0, 3, 6 and 9 of the reward: the best comes after
    # iteration 1; by the training sampler they are calls 1, 4, 7 and 10, and it comes after 2.
    brightness.script = [0.0, 0.0, 0.0, 5.0, 0.0, 0.0, 4.0, 9.0, 0.0, 4.5, 8.0]
    home = finetune()
    kept = runs.best(home)
    assert kept["iteration"] == 1
    assert kept["reward"] == runs.development(home)[1][1].mean()
    brightness.calls = 0
    other = finetune("stochastic", select_by="stochastic")
    assert runs.best(other)["iteration"] == 2
    assert runs.best(other)["reward"] == runs.development(other, "stochastic")[1][2].mean()
    brightness.calls = 0
    latest = finetune("latest", select_by="latest")
    assert runs.best(latest) == runs.best(latest) | {
        "iteration": 3, "reward": runs.development(latest)[1][3].mean()
    }  # fmt: skip
    best, last = weights(latest / "best"), weights(latest / "last")
    assert all(best[key].equal(value) for key, value in last.items())

    brightness.script = None
    after_one = weights(finetune("one", n_iterations=1) / "last")
    best = weights(home / "best")
    assert all(best[key].equal(value) for key, value in after_one.items())
    pipeline = DDPMPipeline.from_pretrained(home / "best")
    assert pipeline.unet.state_dict()["conv_in.weight"].equal(best["conv_in.weight"])


def test_best_is_the_pretrained_policy_if_nothing_got_better(finetune, brightness, new_policy):
    brightness.script = [9.0, *[0.0] * 10]
    policy = new_policy(widths=(8,))
    home = finetune(policy=policy)
    best = weights(home / "best")
    assert all(best[key].equal(value) for key, value in policy.unet.state_dict().items())
    assert runs.best(home)["iteration"] == 0


@pytest.mark.parametrize("kind, eta", [("development", 0.0), ("stochastic", 0.7)])
def test_development_pictures_are_drawn_from_fixed_noise_by_the_policy_of_that_iteration(
    finetune, new_policy, kind, eta
):
    policy = new_policy(widths=(8,))
    home = finetune(policy=policy, n_iterations=1, eta=0.7)
    pictures, scores = runs.development(home, kind)
    after, seeds = policies.load(home / "last", bf16=False), loop.development_seeds(0, 2)
    for i, learner in enumerate([policy, after]):
        x_0 = sampler.sample(learner, sampler.noise(learner, seeds), 4, eta, seeds)
        np.testing.assert_allclose(pictures[i], rewards.to_uint8(x_0), atol=1)
        np.testing.assert_allclose(scores[i], x_0.mean((1, 2, 3)), atol=1e-5)


def test_development_seeds_are_the_runs_own():
    seeds = loop.development_seeds(0, 3)
    assert len(set(seeds)) == 3 and seeds == loop.development_seeds(0, 3)
    training = sampler.seeds(loop._seeds(0, 1)[0], 3)
    assert not {*seeds} & {*loop.development_seeds(1, 3), *training}


# ------------------------------------------------------------------------------- collapse


def test_vendi_scores_are_recorded_and_a_collapse_is_said_once(finetune, brightness, capsys):
    """Embeddings that are one and the same from iteration 2 on: two images, then one."""
    seen, counter = [], itertools.count()

    def embed(pictures):
        call = next(counter)
        seen.append(pictures)
        return np.eye(2) if call < 4 else np.array([[1.0, 0.0], [1.0, 0.0]])

    home = finetune(embed=embed)
    for kind in ("development", "stochastic"):
        vendi = [row[f"{kind}_vendi"] for row in runs.metrics(home)]
        assert vendi == pytest.approx([2, 2, 1, 1])
    assert np.array_equal(
        seen[2:4], [runs.development(home, k)[0][1] for k in ("development", "stochastic")]
    )
    said = "iteration 2: the training sampler's Vendi score fell from 2.00 to 1.00"
    assert "fell" not in capsys.readouterr().out  # half of it is not under half
    counter, threshold = itertools.count(), watch.COLLAPSED
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "COLLAPSED", 0.6)
        again = finetune("again", embed=embed)
    out = capsys.readouterr().out
    assert out.count(said) == 1 and out.count("fell") == 1 and threshold == 0.5
    assert_same(again, everything(home))


def rows_of(**columns):
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


@pytest.mark.parametrize(
    "rows, said",
    [
        (rows_of(stochastic_spread=[1.0, 0.6, 0.4]), "spread fell from 1.00 to 0.40: its images"),
        (rows_of(stochastic_vendi=[4.0, 2.0, 1.9]), "Vendi score fell from 4.00 to 1.90: its"),
        (
            rows_of(kl=[None, 10.0, 1001.0]),
            "KL 1001 nats: the policy runs away, lower the learning",
        ),
        (rows_of(stochastic_spread=[1.0, 0.4, 0.3]), None),  # said before
        (rows_of(stochastic_spread=[1.0, 0.5, 0.5]), None),
        (rows_of(kl=[None, 1001.0, 2000.0]), None),
        (rows_of(kl=[None, 10.0, None]), None),  # not a number
        (rows_of(reward_mean=[0.0, 1.0]), None),
    ],
)
def test_collapse_and_divergence_are_said_when_they_begin(rows, said):
    found = watch.warnings(rows)
    assert (said in found[0] and len(found) == 1) if said else not found


def test_what_is_recorded_of_diversity_decides_nothing(finetune):
    expected = everything(finetune("without"))
    found = everything(finetune("with", embed=lambda pictures: np.eye(len(pictures))))
    for name in ("last", "best", "moments"):
        assert all(found[name][key].equal(value) for key, value in expected[name].items())
    # A run without goes on with it, and back.
    finetune("mixed", n_iterations=1)
    home = finetune("mixed", n_iterations=3, embed=lambda pictures: np.eye(len(pictures)))
    assert runs.iterations_done(home) == 3


# ------------------------------------------------------------------------------- identity


def test_other_settings_in_the_same_folder_are_refused_and_nothing_is_lost(finetune):
    expected = everything(finetune())
    for changes in (
        {"learning_rate": 5e-4}, {"seed": 1}, {"own": ddpo.Settings(clip_range=0.3)},
        {"bf16": True}, {"reward": lambda images: -images.mean((1, 2, 3))},
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r"run holds a run with other settings: .* → "):
            finetune(**changes)
    assert_same(finetune(), expected)


@pytest.mark.parametrize(
    "schedule", [{"beta_schedule": "squaredcos_cap_v2"}, {"clip_sample": False}, {"beta_end": 0.03}]
)
def test_other_schedule_of_the_same_weights_is_another_policy(finetune, new_policy, schedule):
    finetune()
    with pytest.raises(ValueError, match="policy .* → "):
        finetune(policy=new_policy(widths=(8,), **schedule))


def reward_from(source):
    space = {}
    exec(compile(source, "<cell>", "exec"), space)
    return space["reward"]


def test_edited_reward_is_another_run(finetune):
    bright = "def reward(images):\n    return images.mean((1, 2, 3))"
    home = finetune(reward=reward_from(bright), n_iterations=1)
    assert finetune(reward=reward_from(bright), n_iterations=1) == home
    with pytest.raises(ValueError, match="reward.fingerprint"):
        finetune(reward=reward_from(bright.replace("mean", "amax")), n_iterations=1)


def test_edited_objective_is_another_run(finetune, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = (
        "from ddpo_lib.objectives.ddpo import Settings, credit, helpers, units\n"
        "from ddpo_lib.experience import rescore\n"
        "def loss(policy, experience, rows, credit, settings, helpers):\n"
        "    step, sample = rows[:, 0].unbind(-1)\n"
        "    new = rescore(policy, experience.trajectory, step, sample)\n"
        "    return -credit[sample] * new.log_ratio, {'kl': new.kl}\n"
    )
    (tmp_path / "own_objective.py").write_text(source)
    home = finetune(objective="own_objective", n_iterations=1)
    assert set(runs.metrics(home)[1]["updates"][0]) == {
        "update", "loss", "kl", "grad_norm", "learning_rate",
    }  # fmt: skip
    del sys.modules["own_objective"]
    (tmp_path / "own_objective.py").write_text(source.replace("new.log_ratio", "new.log_prob  "))
    with pytest.raises(ValueError, match="objective.fingerprint"):
        finetune(objective="own_objective", n_iterations=1)


def learned_baseline():
    """An objective whose helper learns: A = reward - b, and (reward - b)^2 is part of the loss."""
    module = types.ModuleType("learned_baseline")
    module.Settings, module.units = ddpo.Settings, ddpo.units

    def helpers(policy, settings, loop):
        baseline = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(baseline.weight)
        return baseline

    def credit(experience, settings, loop, helpers):
        return experience.rewards

    def loss(policy, experience, rows, credit, settings, helpers):
        value, metrics = ddpo.loss(policy, experience, rows, credit, settings, helpers)
        error = (experience.rewards[rows[:, 0, 1]] - helpers.weight.view(())).square()
        return value + error, metrics | {"baseline_error": error.detach()}

    module.helpers, module.credit, module.loss = helpers, credit, loss
    return module


def test_helper_that_learns_resumes_to_the_bit(finetune, brightness):
    expected = finetune("unbroken", objective=learned_baseline())
    baseline = load_file(expected / "last/helpers.safetensors")["weight"]
    assert baseline.item() != 0
    brightness.calls, brightness.fail_at = 0, 8
    with pytest.raises(KeyboardInterrupt):
        finetune(objective=learned_baseline())
    brightness.fail_at = None
    home = finetune(objective=learned_baseline())
    assert_same(home, everything(expected))
    assert load_file(home / "last/helpers.safetensors")["weight"].equal(baseline)


# ------------------------------------------------------------------------------- mistakes


def test_nan_reward_stops_the_run_and_loses_nothing(finetune, brightness, tmp_path):
    expected = everything(finetune("unbroken"))
    brightness.calls, brightness.nan_at = 0, 5  # the rollout of iteration 2
    said = r"iteration 2: .*not finite .*\[1\]: nan; let it return .*the checkpoint of iteration 1"
    with pytest.raises(FloatingPointError, match=said):
        finetune()
    assert runs.iterations_done(tmp_path / "run") == 1
    brightness.nan_at = None
    assert_same(finetune(), expected)


@pytest.mark.parametrize("where", ["during an iteration", "after its last update"])
def test_diverged_policy_never_becomes_best_or_last(finetune, tmp_path, monkeypatch, where):
    """Pictures of NaN would turn black, and black is the smallest JPEG."""
    expected = everything(finetune("unbroken", n_iterations=1, reward=rewards.jpeg_compressibility))
    iterate = loop.iterate

    def diverge(training, iteration):
        if iteration == 2 and where == "during an iteration":
            training.learner.unet.conv_in.weight.data[0] = torch.nan
        result = iterate(training, iteration)
        if iteration == 2:
            training.learner.unet.conv_in.weight.data[0] = torch.nan
        return result

    monkeypatch.setattr(loop, "iterate", diverge)
    with pytest.raises(
        FloatingPointError, match=r"iteration 2: .*finite.* checkpoint of iteration 1"
    ):
        finetune(reward=rewards.jpeg_compressibility)
    home = tmp_path / "run"
    assert all(
        everything(home)[name].keys() == expected[name].keys()
        and all(everything(home)[name][key].equal(value) for key, value in expected[name].items())
        for name in ("last", "best")
    )


@pytest.mark.parametrize(
    "wrong", [lambda x: x.sum(), lambda x: x[99], lambda x: x.mean((1, 2)) * torch.nan]
)
def test_reward_that_fails_at_once_leaves_the_folder_to_the_mended_one(finetune, tmp_path, wrong):
    with pytest.raises((ValueError, RuntimeError, FloatingPointError)):
        finetune(reward=wrong, n_iterations=1)
    assert not (tmp_path / "run").exists()
    assert runs.iterations_done(finetune(n_iterations=1)) == 1


def test_what_others_left_in_the_folder_stays_where_the_reward_fails_at_once(finetune, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.notes").write_text("mine")
    with pytest.raises(ValueError, match="it must return one real number"):
        finetune(reward=lambda images: images.sum(), n_iterations=1)
    assert (tmp_path / "run/.notes").exists()


def test_gradient_that_is_not_finite_names_tensor_and_update(finetune, monkeypatch):
    loss = ddpo.loss

    def broken(*arguments):
        value, logged = loss(*arguments)
        return value * torch.inf, logged

    monkeypatch.setattr(ddpo, "loss", broken)
    said = (
        r"iteration 1: update 0: the gradient of \S+ is not finite: nothing was updated. Lower the "
        r"learning rate \(0.001\), .* keeps the checkpoint of iteration 0"
    )
    with pytest.raises(FloatingPointError, match=said):
        finetune(n_iterations=1)


def test_helper_that_is_not_finite_replaces_no_checkpoint(finetune, monkeypatch):
    """Its NaN would come back with every resume."""
    objective, iterate = learned_baseline(), loop.iterate

    def spoiled(training, iteration):
        done = iterate(training, iteration)
        if iteration == 2:
            training.helpers.weight.data.fill_(torch.nan)
        return done

    home = finetune(objective=objective, n_iterations=1)
    monkeypatch.setattr(loop, "iterate", spoiled)
    with pytest.raises(
        FloatingPointError, match="iteration 2: weights .* the helpers' weight: low"
    ):
        finetune(objective=objective, n_iterations=2)
    assert runs.iterations_done(home) == 1
    assert load_file(home / "last/helpers.safetensors")["weight"].isfinite().all()


def test_development_set_is_drawn_in_micro_batches(finetune, monkeypatch):
    sizes, sample = [], sampler.sample
    monkeypatch.setattr(
        sampler, "sample", lambda *a, **k: sizes.append(k["batch_size"]) or sample(*a, **k)
    )
    finetune(n_iterations=1, n_development=5, micro_batch=2)
    assert sizes == [2] * 2  # before and after


def test_reward_that_cannot_tell_samples_apart_is_said_to_teach_nothing(finetune, capsys):
    finetune(reward=lambda images: torch.zeros(len(images)), n_iterations=1)
    written = capsys.readouterr()
    assert "iteration 1: every credit is 0, nothing can be learned" in written.out + written.err


def test_folder_that_is_no_run_is_left_alone(finetune, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="is not empty, and no run"):
        finetune()
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["thesis.tex"]


def test_unwritable_folder_is_one_clear_error(finetune, tmp_path):
    (tmp_path / "file").write_text("in the folder's place")
    with pytest.raises(OSError, match=r"cannot write .*file/run: .*give another folder"):
        finetune("file/run")


def test_nothing_of_this_machine_is_in_what_could_be_shared(finetune, new_policy, tmp_path):
    policies.save(new_policy(widths=(8,)), tmp_path / "pretrained")
    home = finetune(policy=policies.load(tmp_path / "pretrained", bf16=False), n_iterations=1)
    for file in Path(home / "best").rglob("*.json"):
        assert str(tmp_path) not in file.read_text()


def test_learner_runs_as_the_settings_say(finetune, new_policy, monkeypatch):
    seen = []
    iterate = loop.iterate
    monkeypatch.setattr(loop, "iterate", lambda t, i: seen.append(t.learner.bf16) or iterate(t, i))
    in_float32 = dataclasses.replace(new_policy(widths=(8,)), bf16=False)
    finetune(policy=in_float32, bf16=True, n_iterations=1)
    finetune(policy=in_float32, bf16=True, n_iterations=2)  # also when it goes on
    assert seen == [True, True]


# ------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("name", ["optimizer.safetensors", "unet/config.json",
                                  "unet/diffusion_pytorch_model.safetensors"])  # fmt: skip
def test_one_flipped_bit_in_last_is_noticed(finetune, name):
    home = finetune(n_iterations=1)
    file = home / "last" / name
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 4  # among the numbers, or in a comment's place: the file still reads
    file.write_bytes(raw)
    with pytest.raises(ValueError, match=f"last is damaged .*{name} is not what was written"):
        finetune(n_iterations=2)
    assert runs.iterations_done(home) == 1


def test_everything_is_on_the_disk_before_it_gets_its_name(finetune, monkeypatch):
    """What a power cut leaves under a final name was synced before, the folder after."""
    synced, named = set(), []
    fsync, replace, rename = os.fsync, os.replace, Path.rename

    def path_of(descriptor):
        return Path(os.readlink(f"/proc/self/fd/{descriptor}"))

    def record(descriptor):
        synced.add(path_of(descriptor))
        fsync(descriptor)

    def check(source, target):
        source, target = Path(source), Path(target)
        if target.name.endswith(".previous"):  # what is there already
            return
        parts = [source, *source.rglob("*")] if source.is_dir() else [source]
        assert set(parts) <= synced, target
        named.append(target)
        synced.difference_update([target.parent])

    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(os, "replace", lambda a, b: (check(a, b), replace(a, b)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (check(a, b), rename(a, b))[1])
    home = finetune(n_iterations=2)
    assert {"last", "best", "001.npz", "settings.json"} <= {path.name for path in named}
    assert home in synced and home / "metrics.jsonl" in synced


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_checkpoints_have_the_users_permissions(finetune, umask, mode):
    old = os.umask(umask)
    try:
        home = finetune(n_iterations=1)
    finally:
        os.umask(old)
    files = [f for name in ("last", "best") for f in (home / name).rglob("*") if f.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_weights_that_are_not_finite_replace_no_checkpoint(finetune, monkeypatch):
    """One NaN after the last update of iteration 2, which the development set need not show."""
    expected = everything(finetune("unbroken", n_iterations=1))
    iterate = loop.iterate

    def spoiled(training, iteration):
        done = iterate(training, iteration)
        if iteration == 2:
            with torch.no_grad():
                training.learner.unet.conv_out.bias[0] = torch.nan
        return done

    monkeypatch.setattr(loop, "iterate", spoiled)
    monkeypatch.setattr(loop, "_develop", lambda training: DEVELOPMENT)
    finetune(n_iterations=1)
    with pytest.raises(FloatingPointError, match="iteration 2: weights .* such as conv_out.bias"):
        finetune(n_iterations=2)
    home = finetune(n_iterations=1)
    last = weights(home / "last")
    assert all(last[key].equal(value) for key, value in expected["last"].items())
    assert all(value.isfinite().all() for value in weights(home / "best").values())


DEVELOPMENT = dict.fromkeys(
    ("development", "stochastic"), (np.zeros((2, 8, 8, 3), np.uint8), np.array([0.0, 1.0]))
)


def test_interrupt_says_that_nothing_is_lost(finetune, brightness, capsys):
    brightness.calls, brightness.fail_at = 0, 6
    with pytest.raises(KeyboardInterrupt):
        finetune()
    assert "keeps what was done; the next start goes on with it" in capsys.readouterr().out


def test_mini_batches_are_drawn_anew_for_every_epoch_and_iteration(finetune, monkeypatch):
    calls = []
    spy(monkeypatch, calls)
    finetune(n_iterations=4, n_inner_epochs=2, n_samples=8, minibatch_size=2, micro_batch=8)
    batches = [tuple(sorted(rows[:, 0, 1].unique().tolist())) for _, rows, _, _ in calls]
    epochs = [tuple(batches[i : i + 4]) for i in range(0, 32, 4)]
    assert all(sorted(sum(epoch, ())) == list(range(8)) for epoch in epochs)
    assert len(set(epochs)) == 8


def test_of_equals_the_earliest_is_best(finetune):
    home = finetune(reward=lambda images: torch.zeros(len(images)))
    assert runs.best(home)["iteration"] == 0


def test_weights_decay_apart_from_the_gradient(new_policy):
    policy = new_policy(widths=(8,))
    settings = Finetune(n_samples=2, minibatch_size=2, n_steps=4, weight_decay=0.5, bf16=False)
    training = loop.prepare(policy, lambda x: x.mean((1, 2, 3)), "ddpo", settings, 0)
    before = [p.detach().clone() for p in training.learner.unet.parameters()]
    for p in training.learner.unet.parameters():
        p.grad = torch.zeros_like(p)
    training.optimizer.param_groups[0]["lr"] = 0.1
    training.optimizer.step()
    for p, old in zip(training.learner.unet.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), 0.95 * old)
