"""The loop on a tiny policy: it learns, resumes to the bit, and loses nothing when things break."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from safetensors.torch import load_file

from ddpo_lib import config, finetune, paths, ppo, rewards, runs, sampler
from ddpo_lib import policy as policies
from ddpo_lib.policy import Policy

N_CALLS = 7
"""Of the reward in a run of three iterations: development set, then (rollout, development) each."""


def weights(folder):
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def everything(home):
    """All that a run leaves, without its durations."""
    timeless = pd.read_csv(home / "iterations.csv").drop(columns="seconds")
    return {
        "last": weights(home / "last"),
        "best": weights(home / "best"),
        "moments": load_file(home / "last/optimizer.safetensors"),
        "state": json.loads((home / "last/state.json").read_text()),
        "metrics": (home / "metrics.csv").read_text(),
        "rewards": (home / "rewards.csv").read_text(),
        "iterations": timeless.to_csv(index=False),
        "development": {
            file.name: {key: value.tobytes() for key, value in np.load(file).items()}
            for file in sorted((home / "development").glob("*.npz"))
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


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """elsewhere(run): finetunes it without a break, in a folder of its own."""

    def unbroken(run):
        with monkeypatch.context() as patch:
            patch.setattr(paths, "RUNS", tmp_path / "unbroken")
            return finetune.finetune(run)

    return unbroken


def test_reward_rises(new_run, new_policy):
    """By more than twice its spread. (The schedule is coarse: with the real one most of the
    gradient's noise comes from the last action, and a tiny run would not learn.)"""
    run = new_run(
        n_iterations=8, n_samples=40, minibatch_size=20, n_steps=5, micro_batch=80, clip_range=1e-2
    )
    coarse = DDPMScheduler(5, beta_start=0.1, beta_end=0.5)
    policies.save(Policy(new_policy(widths=(8,)).unet, coarse), run.source)
    home = finetune.finetune(run)
    curve = pd.read_csv(home / "iterations.csv")
    start = np.load(home / "development/000.npz")["rewards"].mean()
    assert curve.development_reward.iloc[-1] > start + 2 * curve.reward_sd[0]
    assert curve.reward_mean.iloc[-1] > curve.reward_mean[0] + 2 * curve.reward_sd[0]


def test_what_a_run_leaves(new_run):
    run = new_run(n_inner_epochs=2)
    home = finetune.finetune(run)
    assert home == paths.RUNS / "test/tiny-brighter-s0"

    metrics = pd.read_csv(home / "metrics.csv")
    assert metrics["update"].tolist() == list(range(12))  # 3 iterations, 2 epochs, 2 mini-batches
    assert metrics.iteration.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (metrics.learning_rate == 1e-3).all()
    first_updates = metrics[metrics["update"] % 4 == 0]
    np.testing.assert_allclose(first_updates.mean_ratio, 1, atol=1e-6)
    assert (first_updates.clip_fraction == 0).all()
    assert (metrics[metrics["update"] % 4 > 0].clip_fraction > 0).all()

    scores = pd.read_csv(home / "rewards.csv")
    assert scores["sample"].tolist() == list(range(4)) * 3
    curve = pd.read_csv(home / "iterations.csv")
    per_iteration = scores.groupby("iteration").reward
    np.testing.assert_allclose(curve.reward_mean, per_iteration.mean(), rtol=1e-5)
    np.testing.assert_allclose(curve.reward_sd, per_iteration.std(), rtol=1e-5)

    for i in range(4):
        development = np.load(home / f"development/{i:03d}.npz")
        assert development["pictures"].shape == (2, 8, 8, 3)
        assert development["pictures"].dtype == np.uint8
        if i > 0:
            mean = development["rewards"].mean()
            assert curve.development_reward[i - 1] == pytest.approx(mean, rel=1e-5)
    assert not list(home.rglob("*.tmp"))
    assert not list(home.rglob("*.previous"))


def test_seed_alone_decides(new_run, elsewhere):
    torch.manual_seed(1)
    home = finetune.finetune(new_run(seed=0))
    expected = everything(home)
    torch.manual_seed(2)
    np.random.seed(2)
    assert_same(elsewhere(new_run(seed=0)), expected)
    other = everything(finetune.finetune(new_run(seed=1)))
    assert other["rewards"] != expected["rewards"]
    assert other["development"] != expected["development"]


def test_iterations_have_their_own_noise(new_run, monkeypatch):
    """With a rate of zero only the noise tells one iteration from the next."""
    home = finetune.finetune(new_run(learning_rate=0.0))
    scores = pd.read_csv(home / "rewards.csv").reward.to_numpy().reshape(3, 4)
    assert len(np.unique(scores)) == scores.size
    assert len({*pd.read_csv(home / "iterations.csv").development_reward}) == 1


@pytest.mark.parametrize("scope", ["iteration", "minibatch"])
def test_update_gets_advantages_of_its_own_samples(new_run, monkeypatch, scope):
    run = new_run(n_iterations=1, advantage_scope=scope, n_samples=6, minibatch_size=3)
    seen = []
    update = finetune.ppo.update

    def spy(learner, optimizer, trajectory, advantage, *rest):
        seen.append((trajectory.x_0.mean((1, 2, 3)), advantage))
        return update(learner, optimizer, trajectory, advantage, *rest)

    monkeypatch.setattr(finetune.ppo, "update", spy)
    finetune.finetune(run)

    rewards = torch.cat([reward for reward, _ in seen])
    assert len(seen) == 2
    assert len(rewards.unique()) == 6  # every sample once
    for reward, advantage in seen:
        group = rewards if scope == "iteration" else reward
        expected = (reward - group.mean()) / group.std(correction=0)
        torch.testing.assert_close(advantage, expected, rtol=1e-3, atol=1e-4)


def test_settings_reach_the_rollout_the_optimizer_and_the_advantages(new_run, monkeypatch):
    seen = []
    update = finetune.ppo.update

    def spy(learner, optimizer, trajectory, advantage, *rest):
        seen.append((optimizer.param_groups[0], trajectory, advantage))
        return update(learner, optimizer, trajectory, advantage, *rest)

    monkeypatch.setattr(finetune.ppo, "update", spy)
    changes = {"eta": 0.5, "log_prob_reduction": "sum", "weight_decay": 0.03, "n_steps": 4}
    finetune.finetune(new_run(n_iterations=1, advantage_clip=0.5, **changes))

    for group, trajectory, advantage in seen:
        assert group["weight_decay"] == 0.03
        assert group["betas"] == (0.9, 0.999)
        assert group["eps"] == 1e-8
        assert trajectory.eta == 0.5
        assert trajectory.reduction == "sum"
        assert trajectory.timesteps.tolist() == [750, 500, 250, 0]
        assert advantage.abs().max() == 0.5


def test_steps_are_drawn_anew_for_every_update(new_run, monkeypatch):
    drawn = []
    draw = ppo.draw_steps

    def spy(*arguments):
        drawn.append(draw(*arguments).tolist())
        return torch.tensor(drawn[-1])

    monkeypatch.setattr(ppo, "draw_steps", spy)
    finetune.finetune(new_run(n_steps=9, timestep_fraction=0.5))
    assert len(drawn) == 6
    assert all(len(steps) == 4 for steps in drawn)
    assert len({tuple(steps) for steps in drawn}) > 3


def test_gradient_checkpointing_reaches_the_network(new_run, monkeypatch):
    seen = []
    iterate = finetune.iterate

    def spy(learner, *rest):
        seen.append(learner.unet.is_gradient_checkpointing)
        return iterate(learner, *rest)

    monkeypatch.setattr(finetune, "iterate", spy)
    finetune.finetune(new_run(seed=1, n_iterations=1))
    finetune.finetune(new_run(seed=2, n_iterations=1, gradient_checkpointing=True))
    assert seen == [False, True]


def test_samples_come_in_another_order_every_epoch(new_run, monkeypatch):
    orders = []
    select = finetune.ppo.select
    monkeypatch.setattr(
        finetune.ppo, "select", lambda t, i: orders.append(i.tolist()) or select(t, i)
    )
    finetune.finetune(new_run(n_inner_epochs=2, n_samples=12, minibatch_size=12))
    assert all(sorted(order) == list(range(12)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6


# ------------------------------------------------------------------------------- resume


@pytest.mark.parametrize("schedule", ["constant", "warmup_cosine"])
def test_run_killed_at_any_reward_resumes_to_the_bit(new_run, elsewhere, brightness, schedule):
    """Killed in every rollout and every development set of three iterations."""
    expected = everything(elsewhere(new_run(lr_schedule=schedule)))
    for call in range(N_CALLS):
        run = new_run(lr_schedule=schedule)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paths, "RUNS", paths.RUNS / f"killed-{call}")
            brightness.calls, brightness.fail_at = 0, call
            with pytest.raises(KeyboardInterrupt):
                finetune.finetune(run)
            torch.manual_seed(call)  # a new process has another global state
            brightness.fail_at = None
            assert_same(finetune.finetune(run), expected)


def test_bf16_run_resumes_to_the_bit(new_run, elsewhere, brightness):
    run = new_run(bf16=True)
    expected = everything(elsewhere(run))
    brightness.calls, brightness.fail_at = 0, 4
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(run)
    brightness.fail_at = None
    assert_same(finetune.finetune(run), expected)
    in_full = everything(elsewhere(config.replace(run, bf16=False)))
    assert in_full["rewards"] != expected["rewards"]  # bf16 was on


def test_run_killed_while_writing_resumes_to_the_bit(new_run, elsewhere):
    """Before the nth file that a function of `runs` writes; rows come three files an iteration."""
    run = new_run(seed=1)  # whose development reward rises, so that best/ is written twice
    expected = everything(elsewhere(run))
    assert expected["state"]["best_iteration"] > 0
    for name, fatal in [
        ("write_json", 1), ("write_json", 3), ("save_best", 1), ("save_best", 2),
        ("append_rows", 2), ("append_rows", 6), ("save_checkpoint", 1), ("save_checkpoint", 2),
    ]:  # fmt: skip
        write, left = getattr(runs, name), [fatal]

        def crash(*args, write=write, left=left):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return write(*args)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paths, "RUNS", paths.RUNS / f"{name}-{fatal}")
            with pytest.MonkeyPatch.context() as crashing, pytest.raises(KeyboardInterrupt):
                crashing.setattr(runs, name, crash)
                finetune.finetune(run)
            assert_same(finetune.finetune(run), expected)


@pytest.mark.parametrize("name", ["last", "best"])
def test_run_killed_between_two_renames_resumes_to_the_bit(new_run, elsewhere, brightness, name):
    run = new_run()
    expected = everything(elsewhere(run))
    brightness.calls, brightness.fail_at = 0, 4
    with pytest.raises(KeyboardInterrupt):
        finetune.finetune(run)
    brightness.fail_at = None
    home = runs.folder(run)
    (home / name).rename(home / f"{name}.previous")
    (home / f"{name}.tmp").mkdir()
    assert_same(finetune.finetune(run), expected)


def test_finished_run_returns_at_once(new_run, brightness, monkeypatch):
    run = new_run()
    home = finetune.finetune(run)
    expected = everything(home)
    calls = brightness.calls
    monkeypatch.setattr(finetune, "iterate", None)
    assert finetune.finetune(run) == home
    assert brightness.calls == calls == N_CALLS
    assert_same(home, expected)


def test_changed_setting_starts_anew_and_keeps_the_old_run(new_run, elsewhere, capsys):
    run = new_run()
    before = everything(finetune.finetune(run))
    changed = config.replace(run, learning_rate=5e-4)
    home = finetune.finetune(changed)
    assert "learning_rate 0.001 → 0.0005" in capsys.readouterr().out
    assert_same(home.with_name("tiny-brighter-s0.old1"), before)
    assert_same(home, everything(elsewhere(changed)))


# ------------------------------------------------------------------------------- best


def test_best_is_the_policy_with_the_highest_development_reward(new_run, elsewhere, brightness):
    # Development sets are calls 0, 2, 4 and 6 of the reward: the best comes after iteration 1.
    brightness.script = [0.0, 0.0, 5.0, 0.0, 4.0, 0.0, 4.5]
    home = finetune.finetune(new_run())
    state = json.loads((home / "last/state.json").read_text())
    assert state["best_iteration"] == 1
    assert state["best_reward"] == np.load(home / "development/001.npz")["rewards"].mean()

    brightness.script = None
    # With a constant rate the first iteration does not know how many will follow.
    after_one = weights(elsewhere(new_run(n_iterations=1)) / "last")
    best = weights(home / "best")
    assert all(best[key].equal(value) for key, value in after_one.items())

    pipeline = DDPMPipeline.from_pretrained(home / "best")
    assert pipeline.unet.state_dict()["conv_in.weight"].equal(best["conv_in.weight"])


def test_best_is_the_pretrained_policy_if_nothing_got_better(new_run, brightness):
    brightness.script = [9.0, *[0.0] * 6]
    run = new_run()
    home = finetune.finetune(run)
    pretrained = policies.load(run.source, bf16=False).unet.state_dict()
    best = weights(home / "best")
    assert all(best[key].equal(value) for key, value in pretrained.items())
    state = json.loads((home / "last/state.json").read_text())
    assert state["best_iteration"] == 0


def test_development_pictures_are_drawn_without_noise_by_the_policy_of_that_iteration(new_run):
    run = new_run(n_iterations=1)
    home = finetune.finetune(run)
    pictures, scores = runs.development(home)
    assert pictures.shape == (2, 2, 8, 8, 3) and scores.shape == (2, 2)
    for i, folder in enumerate([run.source, home / "last"]):
        learner = policies.load(folder, bf16=False)
        x_0 = sampler.sample(learner, finetune.development_noise(learner, run), 3)
        np.testing.assert_array_equal(pictures[i], rewards.to_uint8(x_0))
        np.testing.assert_allclose(scores[i], x_0.mean((1, 2, 3)), atol=1e-6)


def test_development_noise_is_the_runs_own(new_run, policy):
    def noise(seed):
        return finetune.development_noise(policy, new_run(seed, n_development=3))

    assert noise(0).shape == (3, 3, 8, 8)
    assert noise(0).equal(noise(0))
    assert not noise(0).equal(noise(1))


# ------------------------------------------------------------------------------- mistakes


def test_nan_reward_stops_the_run_and_loses_nothing(new_run, elsewhere, brightness):
    run = new_run()
    expected = everything(elsewhere(run))
    brightness.calls, brightness.nan_at = 0, 3  # the rollout of iteration 1
    with pytest.raises(ValueError, match=r"'own_rewards:brightness' is not finite .* \[1\]: nan"):
        finetune.finetune(run)
    state = json.loads((runs.folder(run) / "last/state.json").read_text())
    assert state["iterations_done"] == 1
    brightness.nan_at = None
    assert_same(finetune.finetune(run), expected)


def test_unknown_reward_stops_before_anything_runs(new_run):
    run = new_run()
    unknown = config.dataclasses.replace(run, reward="beauty")
    with pytest.raises(ValueError, match="unknown reward 'beauty'"):
        finetune.finetune(unknown)
    assert not (runs.folder(run) / "last").exists()


@pytest.mark.parametrize(
    "file",
    [
        "optimizer.safetensors",
        "state.json",
        "unet/diffusion_pytorch_model.safetensors",
        "scheduler/scheduler_config.json",
    ],
)
def test_damaged_checkpoint_is_one_clear_error(new_run, file):
    run = new_run(n_iterations=2)
    home = finetune.finetune(run)
    damaged = home / "last" / file
    damaged.write_bytes(damaged.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"checkpoint .*last is damaged .* move .*brighter-s0 "):
        finetune.finetune(run)


def test_unwritable_folder_is_one_clear_error(new_run):
    run = new_run()
    paths.RUNS.write_text("a file in the folder's place")
    with pytest.raises(OSError, match=r"cannot write the run's folder .*DDPO_ROOT"):
        finetune.finetune(run)


def test_missing_pretrained_policy_is_one_clear_error(new_run):
    run = config.dataclasses.replace(new_run(), source="toy/cats/blue")
    with pytest.raises(FileNotFoundError, match="no policy at 'toy/cats/blue'"):
        finetune.finetune(run)
