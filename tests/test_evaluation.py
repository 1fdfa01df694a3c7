"""The evaluation set, its cache, and the arithmetic of Table 5.1."""

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

from ddpo_lib import encoders, evaluation, notebook, paths, rewards, runs, sampler
from ddpo_lib import policy as policies
from ddpo_lib.config import Evaluation, Models, Profile

SMALL = Evaluation(n=5, n_steps=4, seed=7)


@pytest.fixture
def profile(new_run):
    return Profile("test", {"tiny": new_run().source}, new_run().models, SMALL, {}, {})


def test_standard_error():
    assert evaluation.standard_error(np.array([1.0, 2.0, 3.0, 6.0])) == pytest.approx(
        math.sqrt((4 + 1 + 0 + 9) / 3) / 2
    )


def test_pictures_come_from_the_fixed_noise_without_further_chance(policy, tmp_path):
    policies.save(policy, tmp_path / "p")
    ours = evaluation.pictures(tmp_path / "p", SMALL, tmp_path / "cache.npz", bf16=False)
    x_0 = sampler.sample(policy, sampler.noise(policy, 5, seed=7), 4)
    assert ours.dtype == np.uint8
    np.testing.assert_array_equal(ours, rewards.to_uint8(x_0).numpy())


def test_pictures_are_drawn_once(policy, tmp_path, monkeypatch):
    policies.save(policy, tmp_path / "p")
    cache = tmp_path / "new/folder/cache.npz"
    first = evaluation.pictures(tmp_path / "p", SMALL, cache)
    monkeypatch.setattr(evaluation.policy, "load", None)
    np.testing.assert_array_equal(evaluation.pictures(tmp_path / "p", SMALL, cache), first)
    assert [file.name for file in cache.parent.iterdir()] == ["cache.npz"]


@pytest.mark.parametrize("change", ["weights", "n", "n_steps", "seed", "bf16"])
def test_cache_is_made_again_when_something_changes(new_policy, tmp_path, change):
    source, cache = tmp_path / "p", tmp_path / "cache.npz"
    policies.save(new_policy(seed=0), source)
    first = evaluation.pictures(source, SMALL, cache, bf16=False)
    settings, bf16 = SMALL, False
    if change == "weights":
        policies.save(new_policy(seed=1), source)
    elif change == "bf16":
        bf16 = True
    else:
        settings = dataclasses.replace(SMALL, **{change: 3})
    second = evaluation.pictures(source, settings, cache, bf16)
    assert not np.array_equal(first, second)


def test_score_is_that_of_the_pictures_a_viewer_sees():
    images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    sizes = []

    def brightness(batch):
        sizes.append(len(batch))
        return batch.mean((1, 2, 3))

    scores = evaluation.score(images, brightness, batch_size=3)
    assert scores.dtype == np.float64
    assert sizes == [3, 3, 1]
    np.testing.assert_allclose(scores, images.mean((1, 2, 3)) / 127.5 - 1, atol=1e-6)


@pytest.fixture
def smoothed(monkeypatch):
    """Before: noisy pictures; after: smoother ones, with smaller files."""
    noise = np.random.default_rng(0).normal(0, 1, (20, 16, 16, 3))
    strength = np.linspace(20, 60, 20).reshape(-1, 1, 1, 1)
    before = (128 + strength * noise).clip(0, 255).astype(np.uint8)
    after = (128 + strength / 4 * noise).clip(0, 255).astype(np.uint8)
    base = {False: before}  # the runs of these tests are in float32
    monkeypatch.setattr(evaluation, "pretrained_pictures", lambda profile, name, bf16: base[bf16])
    monkeypatch.setattr(evaluation, "finetuned_pictures", lambda profile, run: after)
    kilobytes = [evaluation.score(images, rewards.jpeg_kilobytes) for images in (before, after)]
    return kilobytes


def test_table_5_1(profile, new_run, smoothed):
    before, after = smoothed
    tasks = ["jpeg_compressibility", "jpeg_incompressibility"]
    table = evaluation.table_5_1(
        profile, [dataclasses.replace(new_run(), task=task[5:], reward=task) for task in tasks]
    )

    assert table.columns.tolist() == [
        "policy", "task", "n", "baseline_mean", "baseline_sd", "baseline_se",
        "ddpo_mean", "ddpo_se", "effect_size",
    ]  # fmt: skip
    assert table.policy.tolist() == ["tiny", "tiny"]
    assert table.task.tolist() == ["compressibility", "incompressibility"]
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


def test_finish_scores_the_best_checkpoint(profile, new_run, new_policy):
    run = new_run()
    home = runs.open_folder(run)
    best = new_policy(seed=5)
    policies.save(best, home / "best")

    result = evaluation.finish(profile, run)

    x_0 = sampler.sample(best, sampler.noise(best, 5, seed=7), 4)
    expected = rewards.from_uint8(rewards.to_uint8(x_0)).mean((1, 2, 3)).double()
    assert json.loads((home / "evaluation.json").read_text()) == result
    assert result["n"] == 5
    assert result["reward_mean"] == pytest.approx(expected.mean().item(), abs=1e-6)
    assert result["reward_sd"] == pytest.approx(expected.std().item(), rel=1e-3)
    assert result["reward_se"] == pytest.approx(expected.std().item() / math.sqrt(5), rel=1e-3)


def test_published_policy_stands_in_for_a_run_that_was_never_begun(
    profile, new_run, new_policy, monkeypatch
):
    run = new_run()
    published = run.source + "-published"
    policies.save(new_policy(seed=5, widths=(8,)), published)
    both = dataclasses.replace(profile, finetuned={"tiny": {"brighter": published}})
    expected = evaluation.pictures(published, SMALL, paths.RUNS / "x.npz", bf16=False)
    started = []
    monkeypatch.setattr(notebook.finetune, "finetune", started.append)

    notebook.finetuned_or_published(both, [run])
    assert not started
    assert (evaluation.finetuned_pictures(both, run) == expected).all()
    notebook.finetuned_or_published(profile, [run])
    assert started == [run]

    policies.save(policies.load(run.source), runs.open_folder(run) / "best")
    notebook.finetuned_or_published(both, [run])
    assert started == [run, run]
    assert not (evaluation.finetuned_pictures(both, run) == expected).all()


def test_published_weights_of_the_thesis_code_find_their_base(profile, new_run, new_policy):
    run = new_run()
    file = run.source + ".pth"
    learner = new_policy(seed=5, widths=(8,))
    torch.save({"model_state_dict": learner.unet.state_dict()}, file)
    published = dataclasses.replace(profile, finetuned={"tiny": {"brighter": file}})
    folder = run.source + "-as-folder"
    policies.save(learner, folder)
    expected = evaluation.pictures(folder, SMALL, paths.RUNS / "x.npz", bf16=False)
    assert (evaluation.finetuned_pictures(published, run) == expected).all()


def test_evaluation_set_of_a_run_and_of_its_origin_start_from_the_same_noise(profile, new_run):
    run = new_run()
    home = runs.open_folder(run)
    policies.save(policies.load(run.source), home / "best")
    before = evaluation.pretrained_pictures(profile, "tiny")
    after = evaluation.finetuned_pictures(profile, run)
    # One in bf16, one (the run's setting) in float32: the same pictures but for rounding.
    assert np.abs(before.astype(int) - after).mean() < 3
    assert (paths.RUNS / "test/tiny-pretrained/evaluation.npz").exists()
    assert (home / "evaluation.npz").exists()


def test_share_over_50(monkeypatch):
    """By the most likely class: classes 6, 7 and 8 are 50 or more."""
    ages = [0, 5, 6, 7, 8, 3, 5, 2]
    logits = torch.nn.functional.one_hot(torch.tensor(ages), 9).float()
    monkeypatch.setattr(encoders, "load_age_classifier", lambda source, device=None: "classifier")
    monkeypatch.setattr(encoders, "age_logits", lambda classifier, images: logits)
    images = np.zeros((8, 4, 4, 3), np.uint8)
    share, error = evaluation.share_over_50(images, Models("no/clip", "no/aesthetic", "no/age"))
    assert share == 3 / 8
    assert error == pytest.approx(math.sqrt(3 / 8 * 5 / 8 * 8 / 7) / math.sqrt(8))
