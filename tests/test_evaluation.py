"""Fixed-noise sets, their scores, and the arithmetic of effect sizes and intervals."""

import math

import numpy as np
import pytest
import torch

from ddpo_lib import evaluation, rewards, sampler
from ddpo_lib import policy as policies


def brightness(images):
    return images.mean((1, 2, 3))


# ------------------------------------------------------------------------------- draw


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pictures_come_from_the_noise_of_the_seed_alone(policy, eta):
    seeds = sampler.seeds(7, 5)
    x_0 = sampler.sample(policy, sampler.noise(policy, seeds), 4, eta, seeds)
    torch.manual_seed(1)
    pictures = evaluation.draw(policy, 5, 4, seed=7, eta=eta)
    assert pictures.dtype == np.uint8 and pictures.shape == (5, 8, 8, 3)
    np.testing.assert_array_equal(pictures, rewards.to_uint8(x_0).numpy())
    torch.manual_seed(2)
    np.testing.assert_array_equal(evaluation.draw(policy, 5, 4, seed=7, eta=eta), pictures)
    assert (evaluation.draw(policy, 5, 4, seed=8, eta=eta) != pictures).any((1, 2, 3)).all()


def test_draws_without_further_chance_unless_told(policy):
    pictures = evaluation.draw(policy, 3, 4, seed=7)
    np.testing.assert_array_equal(pictures, evaluation.draw(policy, 3, 4, seed=7, eta=0.0))
    assert (evaluation.draw(policy, 3, 4, seed=7, eta=1.0) != pictures).any((1, 2, 3)).all()


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_first_pictures_are_the_same_for_every_number(policy, eta):
    many = evaluation.draw(policy, 7, 4, seed=7, eta=eta).astype(int)
    for n, batch_size in ((1, 100), (4, 3), (7, 2)):
        few = evaluation.draw(policy, n, 4, seed=7, eta=eta, batch_size=batch_size)
        assert abs(few - many[:n]).max() <= 1  # a network may round differently in another batch


def test_diverged_policy_draws_nothing(policy):
    policy.unet.conv_out.bias.data[0] = math.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        evaluation.draw(policy, 2, 4, seed=7)


# ------------------------------------------------------------------------------- score


@pytest.fixture
def pictures():
    return np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)


def test_score_is_that_of_the_pictures_a_viewer_sees(pictures):
    sizes = []

    def reward(batch):
        sizes.append(len(batch))
        return brightness(batch)

    scores = evaluation.score(pictures, reward, batch_size=3)
    assert scores.dtype == np.float64
    assert sizes == [3, 3, 1]
    np.testing.assert_allclose(scores, pictures.mean((1, 2, 3)) / 127.5 - 1, atol=1e-6)


def test_score_of_drawn_pictures_is_near_that_of_the_samples(policy):
    seeds = sampler.seeds(7, 5)
    x_0 = sampler.sample(policy, sampler.noise(policy, seeds), 4)
    scores = evaluation.score(evaluation.draw(policy, 5, 4, seed=7), brightness)
    np.testing.assert_allclose(scores, brightness(x_0), atol=1 / 255)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_reward_that_is_not_finite_is_refused(pictures, value):
    def broken(images):
        values = brightness(images)
        if len(images) == 1:  # the last batch
            values[0] = value
        return values

    with pytest.raises((ValueError, FloatingPointError), match="broken.*finite"):
        evaluation.score(pictures, broken, batch_size=3)


def test_reward_of_another_shape_is_refused(pictures):
    with pytest.raises(ValueError, match=r"returned .* for 3 images"):
        evaluation.score(pictures, lambda images: images.mean(), batch_size=3)


# ------------------------------------------------------------------------------- statistics


def test_standard_error():
    assert evaluation.standard_error(np.array([1.0, 2.0, 3.0, 6.0])) == pytest.approx(
        math.sqrt((4 + 1 + 0 + 9) / 3) / 2
    )


def pairs(n=400, rise=0.5, seed=0):
    """Scores before and after, of the same noise: both share most of what varies."""
    own, *noise = np.random.default_rng(seed).normal(size=(3, n))
    return 2 * own + 0.2 * noise[0], 2 * (own + rise) + 0.2 * noise[1]


def test_bootstrap_of_a_mean_is_the_classical_interval():
    before, _ = pairs()
    value, low, high = evaluation.bootstrap(np.mean, before, seed=0, n_bootstrap=4000)
    width = 1.96 * evaluation.standard_error(before)
    assert value == pytest.approx(before.mean())
    assert low == pytest.approx(value - width, abs=0.1 * width)
    assert high == pytest.approx(value + width, abs=0.1 * width)


def test_bootstrap_covers_the_truth_as_often_as_it_says():
    inside = 0
    for seed in range(300):
        sample = np.random.default_rng(seed).normal(3, 1, 60)
        _, low, high = evaluation.bootstrap(np.mean, sample, seed=seed, n_bootstrap=200)
        inside += low <= 3 <= high
    assert 0.90 <= inside / 300 <= 0.98


def test_resamples_take_the_same_rows_of_all_samples():
    before, after = pairs()

    def rise(a, b):
        return (b - a).mean()

    _, low, high = evaluation.bootstrap(rise, before, after, seed=0)
    assert high - low == pytest.approx(4 * evaluation.standard_error(after - before), rel=0.1)
    apart = np.sqrt(sum(evaluation.standard_error(each) ** 2 for each in (before, after)))
    assert high - low < 0.3 * 4 * apart


def test_bootstrap_takes_rows_of_any_shape(pictures):
    def levels(images):
        assert images.shape == pictures.shape
        return images.mean()

    value, low, high = evaluation.bootstrap(levels, pictures, seed=0)
    assert low < value == pictures.mean() < high
    assert all(type(each) is float for each in (value, low, high))


def test_bootstrap_is_a_function_of_its_seed():
    before, _ = pairs(20)
    results = [evaluation.bootstrap(np.mean, before, seed=seed) for seed in (0, 0, 1)]
    assert results[0] == results[1] != results[2]


def test_statistic_may_be_undefined_of_a_resample():
    assert all(map(math.isnan, evaluation.bootstrap(lambda own: math.nan, *pairs(9)[:1], seed=0)))


def test_effect_size():
    before, after = pairs()
    value, low, high = evaluation.effect_size(before, after, seed=0)
    assert value == pytest.approx((after.mean() - before.mean()) / before.std(ddof=1))
    assert value == pytest.approx(0.5, abs=0.05)
    assert low < 0.5 < high < low + 0.2
    assert evaluation.change(before, before) == 0
    assert evaluation.change(before, 3 * after) > value
    scaled = evaluation.effect_size(10 * before + 3, 10 * after + 3, seed=0)
    assert scaled == pytest.approx((value, low, high))


def test_effect_size_counts_in_deviations_before():
    before, after = np.array([0.0, 2.0, 4.0, 6.0]), np.array([5.0, 5.1, 5.2, 5.3])
    expected = (5.15 - 3) / math.sqrt(20 / 3)
    assert evaluation.change(before, after) == pytest.approx(expected)


# ------------------------------------------------------------------------------- KL


def test_kl_of_a_trajectory_is_the_sum_of_its_steps(new_policy):
    """Against torch.distributions, step by step; and nothing from a policy to itself."""
    one, two = new_policy(seed=0), new_policy(seed=1)
    found = evaluation.kl_nats(one, two, n=3, n_steps=5, seed=4)
    seeds = sampler.seeds(4, 3)
    chain = sampler.rollout(one, sampler.noise(one, seeds), 5, seeds)
    total = torch.zeros(3, dtype=torch.float64)
    for k in range(4):  # the last step is deterministic
        t, t_prev = (each[k].expand(3) for each in (chain.timesteps, chain.t_prev))
        p, q = (policies.transition(each, chain.states[k], t, t_prev) for each in (one, two))
        normals = [
            torch.distributions.Normal(x.mean.double(), x.std.double().view(-1, 1, 1, 1))
            for x in (p, q)
        ]
        total += torch.distributions.kl_divergence(*normals).sum((1, 2, 3)).detach()
    assert found == pytest.approx(total.mean().item(), rel=1e-5)
    assert evaluation.kl_nats(one, one, n=3, n_steps=5, seed=4) == 0


def test_kl_of_a_trajectory_is_of_the_sampler_that_is_asked_for(new_policy):
    one, two = new_policy(seed=0), new_policy(seed=1)
    seeds = sampler.seeds(4, 3)
    chain = sampler.rollout(one, sampler.noise(one, seeds), 5, seeds, 0.5)
    total = 0.0
    for k in range(4):
        t, t_prev = (each[k].expand(3) for each in (chain.timesteps, chain.t_prev))
        p, q = (policies.transition(each, chain.states[k], t, t_prev, 0.5) for each in (one, two))
        p, q = (
            torch.distributions.Normal(x.mean.double(), p.std.double().view(-1, 1, 1, 1))
            for x in (p, q)
        )
        total += torch.distributions.kl_divergence(p, q).sum().item() / 3
    assert evaluation.kl_nats(one, two, 3, 5, seed=4, eta=0.5) == pytest.approx(total, rel=1e-5)


def test_score_tells_every_part_its_own_prompts():
    pictures, seen = np.zeros((7, 8, 8, 3), np.uint8), []

    def reward(images, prompts):
        seen.extend(prompts)
        return torch.zeros(len(images))

    evaluation.score(pictures, reward, batch_size=3, prompts=("a", "b"))
    assert seen == ["a", "b", "a", "b", "a", "b", "a"]
