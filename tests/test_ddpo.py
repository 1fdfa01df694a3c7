"""Advantages, the losses by hand, the policy gradient in closed form, and one update."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from ddpo_lib import experience, objectives, sampler
from ddpo_lib.experience import Experience, learnable_steps, pairs, rescore
from ddpo_lib.log_probs import log_prob
from ddpo_lib.objectives import ddpo
from ddpo_lib.policy import Policy, transition
from ddpo_lib.settings import Finetune
from ddpo_lib.toy.policies import new_unet
from ddpo_lib.update import update as take_step

# ------------------------------------------------------------------------------- advantages


def test_advantages_are_standardised_over_the_iteration():
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    expected = (values - 4) / math.sqrt((9 + 4 + 1 + 36) / 4)
    assert_close(ddpo.advantages(values, clip=5), expected)


def test_advantages_are_standardised_within_each_group():
    """Groups are mini-batches or prompts, and need not be contiguous."""
    values = torch.tensor([1.0, 100.0, 3.0, 200.0, 5.0])
    groups = torch.tensor([7, 2, 7, 2, 7])
    expected = torch.tensor([-math.sqrt(1.5), -1.0, 0.0, 1.0, math.sqrt(1.5)])
    assert_close(ddpo.advantages(values, 5, groups), expected)


def test_advantages_are_clamped_on_both_sides():
    values = torch.cat([torch.zeros(50), torch.tensor([-100.0, 100.0])])
    advantage = ddpo.advantages(values, clip=4.5)
    assert advantage[-2:].tolist() == [-4.5, 4.5]
    assert ddpo.advantages(values, clip=10)[-1] == pytest.approx(math.sqrt(26), rel=1e-4)


@pytest.mark.parametrize("value", [0.0, 0.1, 1e6, -16.776])
def test_equal_rewards_have_no_advantage(value):
    assert (ddpo.advantages(torch.full((7,), value), clip=4.5) == 0).all()


def test_group_of_equal_rewards_leaves_the_others_alone():
    values = torch.tensor([5.0, 5.0, 1.0, 3.0])
    advantage = ddpo.advantages(values, 5, torch.tensor([0, 0, 1, 1]))
    assert_close(advantage, torch.tensor([0.0, 0.0, -1.0, 1.0]))


# ------------------------------------------------------------------------------- losses

CASES = [
    # advantage, ratio, loss, d loss / d log p; the clip range is 0.2
    (2.0, 1.5, -2.4, 0.0),  # good and already likelier: stop
    (2.0, 0.5, -1.0, -1.0),  # good but less likely: go on
    (-2.0, 1.5, 3.0, 3.0),  # bad but likelier: go on
    (-2.0, 0.5, 1.6, 0.0),  # bad and already less likely: stop
    (2.0, 1.1, -2.2, -2.2),  # inside the range both ways
    (-2.0, 0.9, 1.8, 1.8),
    (3.0, 1.0, -3.0, -3.0),  # before the first step
]


@pytest.mark.parametrize("advantage, ratio, loss, gradient", CASES)
def test_clipped_loss_by_hand(advantage, ratio, loss, gradient):
    log_ratio = torch.tensor([math.log(ratio)]).requires_grad_()
    value = ddpo.is_loss(log_ratio, torch.tensor([advantage]), 0.2)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-5)
    if gradient == 0:
        assert log_ratio.grad.item() == 0
    else:
        assert log_ratio.grad.item() == pytest.approx(gradient, rel=1e-5)


def test_score_function_loss():
    new = torch.tensor([-1.0, -2.0, 3.0]).requires_grad_()
    advantage = torch.tensor([2.0, -3.0, 0.5])
    loss = ddpo.sf_loss(new, advantage)
    loss.sum().backward()
    assert_close(loss.detach(), torch.tensor([2.0, -6.0, -1.5]))
    assert_close(new.grad, -advantage)


# ------------------------------------------- the policy gradient on a one-dimensional chain
#
# The network predicts the same noise theta everywhere, so that with DDIM's step
# x_{t-1} = A_t x_t + B_t theta + sigma_t z is a linear Gaussian chain, x_0 is Gaussian, and the
# gradient of E[reward] is known. The last step is deterministic and no action: theta's part in it
# belongs to the world, not to the policy.

THETA, ETA, K, N = 0.4, 0.8, 5, 40_000
BETAS = 0.1, 0.5  # a schedule so coarse that no action's gradient drowns the others in noise


class Constant(torch.nn.Module):
    device = torch.device("cpu")
    config = SimpleNamespace(sample_size=1, in_channels=1)

    def __init__(self):
        super().__init__()
        self.theta = torch.nn.Parameter(torch.tensor(THETA))

    def forward(self, x_t, t):
        return SimpleNamespace(sample=self.theta.expand_as(x_t))


def coefficients():
    """A, B and sigma of each step, written from the DDIM paper in float64."""
    alpha_bar = np.cumprod(1 - np.linspace(*BETAS, K))[::-1]
    now, then = alpha_bar, np.append(alpha_bar[1:], 1.0)
    sigma = ETA * np.sqrt((1 - then) / (1 - now)) * np.sqrt(1 - now / then)
    A = np.sqrt(then / now)
    B = np.sqrt(1 - then - sigma**2) - np.sqrt(then / now) * np.sqrt(1 - now)
    return A, B, sigma


def moments():
    """Of x_0: its mean, its variance, and how the actions move its mean, d E[x_0] / d theta."""
    A, B, sigma = coefficients()
    after = np.array([np.prod(A[k + 1 :]) for k in range(K)])  # from x after step k to x_0
    mean, variance = THETA * (B * after).sum(), np.prod(A) ** 2 + ((sigma * after) ** 2).sum()
    return mean, variance, (B * after)[:-1].sum()


def linear(x_0):
    """Its reward and its gradient, d E[x_0]/d theta."""
    return x_0, moments()[2]


def quadratic(x_0):
    """E[−(x_0 − c)²] = −Var − (E x_0 − c)², and the variance does not depend on theta."""
    mean, variance, slope = moments()
    c = mean - 1.5 * math.sqrt(variance)
    return -((x_0 - c) ** 2), -2 * (mean - c) * slope


@pytest.fixture(scope="module")
def chain():
    policy = Policy(
        Constant(),
        DDPMScheduler(
            num_train_timesteps=K, beta_start=BETAS[0], beta_end=BETAS[1], clip_sample=False
        ),
        bf16=False,
    )
    x_T = torch.randn(N, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    return policy, sampler.rollout(policy, x_T, K, range(N), ETA, batch_size=N)


def test_chain_has_the_moments_of_the_closed_form(chain):
    _, trajectory = chain
    mean, variance, _ = moments()
    x_0 = trajectory.x_0.view(-1)
    assert x_0.mean().item() == pytest.approx(mean, abs=4 * math.sqrt(variance / N))
    assert x_0.var().item() == pytest.approx(variance, rel=4 * math.sqrt(2 / N))


@pytest.mark.parametrize("reward", [linear, quadratic])
@pytest.mark.parametrize("estimator", ["sf", "is"])
def test_policy_gradient_equals_the_closed_form(chain, estimator, reward):
    policy, trajectory = chain
    _, B, sigma = coefficients()
    rewards, truth = reward(trajectory.x_0.view(-1))
    advantage = ddpo.advantages(rewards, clip=1e9)
    update(policy, trajectory, advantage, micro_batch=30_000, estimator=estimator)
    ours = -policy.unet.theta.grad.item() * rewards.std(correction=0).item()

    # Exactly: theta's score is the sum over the actions of B z / sigma.
    z = (trajectory.states[1:] - trajectory.means).view(K, N)[:-1].numpy() / sigma[:-1, None]
    score = (B[:-1, None] / sigma[:-1, None] * z).sum(0)
    per_sample = (rewards - rewards.mean()).double().numpy() * score
    assert ours == pytest.approx(per_sample.mean(), rel=1e-3)

    # On average: the derivative of the expected reward.
    error = per_sample.std() / math.sqrt(N)
    assert abs(ours - truth) < 4 * error
    assert error < 0.03 * abs(truth)


@pytest.mark.parametrize("estimator", ["sf", "is"])
def test_policy_gradient_of_an_autoregressive_chain(estimator):
    """The same with the losses alone: x_{t-1} = a x_t + theta + sigma z, reward −(x_0 − c)²."""
    n, steps, a, c = 100_000, 4, 0.8, 2.0
    sigma = torch.tensor(0.5)
    theta = torch.tensor(0.3, requires_grad=True)
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(steps, n, 1, 1, 1, generator=generator)
    x = [torch.zeros(n, 1, 1, 1)]
    for k in range(steps):
        x.append(a * x[-1] + theta.item() + sigma * z[k])
    reach = sum(a**k for k in range(steps))
    truth = -2 * (theta.item() * reach - c) * reach
    rewards = -((x[-1] - c) ** 2).view(-1)
    baselined = rewards - rewards.mean()

    loss = 0
    for k in range(steps):
        old = log_prob(x[k + 1], a * x[k] + theta.item(), sigma.expand(n), "sum")
        new = log_prob(x[k + 1], a * x[k] + theta, sigma.expand(n), "sum")
        terms = {
            "is": ddpo.is_loss(new - old, baselined, 1e-4),
            "sf": ddpo.sf_loss(new, baselined),
        }
        loss = loss + terms[estimator].sum() / n
    loss.backward()

    per_sample = baselined * (z / sigma).sum(0).view(-1)
    assert -theta.grad.item() == pytest.approx(per_sample.mean().item(), rel=1e-3)
    error = (per_sample.std() / math.sqrt(n)).item()
    assert abs(-theta.grad.item() - truth) < 4 * error
    assert error < 0.02 * abs(truth)


# ------------------------------------------------------------------------------- ratios


@pytest.mark.parametrize("micro_batch", [7, 200])
@pytest.mark.parametrize("bf16", [False, True])
def test_every_ratio_is_one_before_the_first_step(bf16, micro_batch):
    """The toy architecture; the rollout's batches and the update's differ in size and in steps."""
    torch.manual_seed(0)
    policy = Policy(new_unet().eval(), DDPMScheduler(1000, clip_sample=True), bf16)
    x_T = sampler.noise(policy, range(4))
    trajectory = sampler.rollout(policy, x_T, 20, range(4), batch_size=4)
    rows = pairs(learnable_steps(trajectory.stds), torch.arange(4))[:, 0]
    assert len(rows) == 19 * 4
    with torch.no_grad():
        for part in rows.split(micro_batch):
            new = rescore(policy, trajectory, *part.unbind(-1))
            assert (new.log_ratio.exp() - 1).abs().max() < 1e-5
            assert new.kl.max() < 1e-2


# ------------------------------------------------------------------------------- update

n, STEPS = 6, 5


def rollout(policy, reduction="mean", eta=1.0):
    return sampler.rollout(policy, sampler.noise(policy, range(n)), STEPS, range(n), eta, reduction)


def shift(trajectory, by):
    """As if the rollout's policy had been another: log-ratios of an update become `by` (K, N)."""
    return dataclasses.replace(trajectory, log_probs=trajectory.log_probs - by)


def update(
    policy, trajectory, advantage, rate=0.0, steps=None, min_std=0.0, micro_batch=200,
    max_grad_norm=1e9, optimizer=None, **changes,
):  # fmt: skip
    """One update and the gradient that it used, flat; with rate 0 the weights stay."""
    optimizer = optimizer or torch.optim.AdamW(policy.unet.parameters(), weight_decay=0.0)
    learnable = learnable_steps(trajectory.stds, min_std)
    seen = Experience(trajectory, advantage, learnable)
    settings = ddpo.Settings(**{"clip_range": 0.1} | changes)
    rows = pairs(learnable if steps is None else steps, torch.arange(len(advantage)))
    metrics = take_step(
        policy.unet,
        optimizer,
        rows,
        lambda part: ddpo.loss(policy, seen, part, advantage, settings, None),
        n_units=len(rows),
        micro_batch=micro_batch,
        max_grad_norm=max_grad_norm,
        rate=rate,
    )
    return metrics, flat(policy)


def flat(policy):
    return torch.cat([p.grad.reshape(-1) for p in policy.unet.parameters()])


ADVANTAGE = torch.tensor([1.5, -0.5, 0.2, -2.0, 1.0, 0.8])


def off_policy(seed=5, scale=0.2):
    return scale * torch.randn(STEPS, n, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("micro_batch", [1, 7, 200])
@pytest.mark.parametrize("estimator", ["is", "sf"])
def test_folded_update_equals_the_loop_over_timesteps(policy, estimator, micro_batch):
    trajectory = shift(rollout(policy), off_policy())

    policy.unet.zero_grad()
    total = 0.0
    for k in range(STEPS - 1):
        t, t_prev = (value[k].expand(n) for value in (trajectory.timesteps, trajectory.t_prev))
        step = transition(policy, trajectory.states[k], t, t_prev)
        new = log_prob(trajectory.states[k + 1], step.mean, step.std)
        if estimator == "is":
            rho = (new - trajectory.log_probs[k]).exp()
            terms = torch.max(-ADVANTAGE * rho, -ADVANTAGE * rho.clip(0.9, 1.1))
        else:
            terms = -ADVANTAGE * new
        terms.mean().backward()
        total += terms.mean().item()
    expected = flat(policy)

    metrics, ours = update(
        policy, trajectory, ADVANTAGE, estimator=estimator, micro_batch=micro_batch
    )
    assert_close(ours, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    assert metrics["loss"] == pytest.approx(total, rel=1e-4)
    assert metrics["grad_norm"] == pytest.approx(expected.norm().item(), rel=1e-4)


@pytest.mark.parametrize("estimator", ["is", "sf"])
def test_mean_over_timesteps_is_the_sum_divided_by_the_actions(policy, estimator):
    trajectory = rollout(policy)
    (total, summed), (average, averaged) = (
        update(policy, trajectory, ADVANTAGE, loss_reduction=how, estimator=estimator)
        for how in ("sum", "mean")
    )
    assert average["loss"] == pytest.approx(total["loss"] / (STEPS - 1), rel=1e-5)
    assert_close(averaged, summed / (STEPS - 1), rtol=1e-4, atol=1e-7)


def test_last_step_carries_no_gradient(policy):
    """Whatever the last step's picture and stored log-probability, nothing changes."""
    trajectory = rollout(policy)
    before, gradient = update(policy, trajectory, ADVANTAGE)
    states, log_probs = trajectory.states.clone(), trajectory.log_probs.clone()
    states[-1] += 1e-3
    log_probs[-1] = 50.0
    trajectory = dataclasses.replace(trajectory, states=states, log_probs=log_probs)
    after, same = update(policy, trajectory, ADVANTAGE)
    assert after == before
    assert same.equal(gradient)
    assert gradient.abs().max() > 0


@pytest.mark.parametrize("micro_batch", [7, 200])
def test_metrics_by_hand(policy, micro_batch):
    """Clip fraction, ratio and KL count every timestep, not only the last one."""
    by = torch.zeros(STEPS, n)
    by[0, 0], by[0, 1], by[1, 2], by[2, 3] = 0.3, -0.3, 0.05, 1.0
    n_pairs = n * (STEPS - 1)
    metrics, _ = update(policy, shift(rollout(policy), by), ADVANTAGE, micro_batch=micro_batch)

    ratios = [math.exp(x) for x in (0.3, -0.3, 0.05, 1.0)]
    assert metrics["clip_fraction"] == pytest.approx(3 / n_pairs)
    assert metrics["mean_ratio"] == pytest.approx(
        1 + sum(r - 1 for r in ratios) / n_pairs, rel=1e-5
    )
    clipped = [1.1, 0.9, ratios[2], ratios[3]]  # for advantages of 1.5, −0.5, 0.2 and −2.0
    terms = -ADVANTAGE.sum() * (STEPS - 1)
    terms -= sum(a * (r - 1) for a, r in zip(ADVANTAGE[:4], clipped, strict=True))
    assert metrics["loss"] == pytest.approx(terms.item() / n, rel=1e-4)


def test_on_policy_metrics(policy):
    metrics, _ = update(policy, rollout(policy), ADVANTAGE, rate=1e-3, clip_range=1e-4)
    assert metrics["mean_ratio"] == pytest.approx(1, abs=1e-6)
    assert metrics["clip_fraction"] == 0
    assert 0 <= metrics["kl"] < 1e-6
    assert metrics["learning_rate"] == 1e-3


def test_update_makes_good_actions_likelier_and_bad_ones_less_likely(policy):
    """And the next update of the same trajectories sees it."""
    trajectory = rollout(policy)
    optimizer = torch.optim.AdamW(policy.unet.parameters())
    same = {"optimizer": optimizer, "clip_range": 1e-4, "max_grad_norm": 1.0, "rate": 1e-4}
    update(policy, trajectory, ADVANTAGE, **same)
    k, i = pairs(learnable_steps(trajectory.stds), torch.arange(n))[:, 0].unbind(-1)
    with torch.no_grad():
        change = rescore(policy, trajectory, k, i)
    assert (change.log_ratio * ADVANTAGE[i]).sum() > 0
    second, _ = update(policy, trajectory, ADVANTAGE, **same)
    assert second["clip_fraction"] > 0.1
    assert second["kl"] == pytest.approx(change.kl.sum().item() / n, rel=1e-3)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_kl_is_exact_and_in_nats_whatever_the_reduction(policy, new_policy, reduction):
    """Of the whole trajectory, against torch's own divergence of two Gaussians."""
    trajectory, other = rollout(policy, reduction), new_policy(seed=1)
    metrics, _ = update(other, trajectory, ADVANTAGE)
    expected = 0.0
    for k in range(STEPS - 1):
        t, t_prev = (value[k].expand(n) for value in (trajectory.timesteps, trajectory.t_prev))
        old, new = (transition(each, trajectory.states[k], t, t_prev) for each in (policy, other))
        old, new = (torch.distributions.Normal(p.mean, trajectory.stds[k]) for p in (old, new))
        expected += torch.distributions.kl_divergence(old, new).sum().item() / n
    assert metrics["kl"] == pytest.approx(expected, rel=1e-3)
    assert expected > 1


@pytest.mark.parametrize("limit, scaled", [(1e9, False), (1e-3, True)])
def test_gradient_is_rescaled_to_the_largest_norm(policy, limit, scaled):
    metrics, gradient = update(policy, rollout(policy), ADVANTAGE, max_grad_norm=limit)
    assert metrics["grad_norm"] > 1e-3  # reported as it was before
    norm = limit if scaled else metrics["grad_norm"]
    assert gradient.norm().item() == pytest.approx(norm, rel=1e-3)


def test_rate_of_the_update_is_the_one_given(policy):
    before = [p.detach().clone() for p in policy.unet.parameters()]
    update(policy, rollout(policy), ADVANTAGE, rate=1e-3)
    moved = max(
        (p - q).abs().max().item() for p, q in zip(policy.unet.parameters(), before, strict=True)
    )
    assert moved == pytest.approx(1e-3, rel=0.01)  # Adam's first step


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_gradient_that_is_not_finite_is_an_error_and_updates_nothing(policy, bad):
    before = {name: p.clone() for name, p in policy.unet.state_dict().items()}
    optimizer = torch.optim.AdamW(policy.unet.parameters())
    advantage = ADVANTAGE.clone()
    advantage[2] = bad
    with pytest.raises(FloatingPointError, match=r"nothing was updated. Lower the learning rate"):
        update(policy, rollout(policy), advantage, rate=1e-3, optimizer=optimizer)
    for name, value in policy.unet.state_dict().items():
        assert value.equal(before[name]), name
    assert not optimizer.state


def test_deterministic_trajectories_are_an_error(policy):
    with pytest.raises(ValueError, match="roll out with eta > 0"):
        update(policy, rollout(policy, eta=0.0), ADVANTAGE)


def test_steps_up_to_min_std_are_not_learned_from(policy):
    """Their terms are missing from the sum, whatever their log-probabilities were."""
    trajectory = rollout(policy)
    std = trajectory.stds.tolist()
    threshold = sorted(std)[2]  # the deterministic step, and the two least noisy ones
    left = [k for k, value in enumerate(std) if value > threshold]
    assert len(left) == len(std) - 3
    assert learnable_steps(trajectory.stds, threshold).tolist() == left

    _, gradient = update(policy, trajectory, ADVANTAGE, min_std=threshold)
    policy.unet.zero_grad()
    k, i = pairs(torch.tensor(left), torch.arange(n))[:, 0].unbind(-1)
    new = rescore(policy, trajectory, k, i)
    ddpo.is_loss(new.log_ratio, ADVANTAGE[i], 1e9).sum().div(n).backward()
    expected = torch.cat([p.grad.view(-1) for p in policy.unet.parameters()])
    assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_min_std_above_every_step_is_an_error(policy):
    with pytest.raises(ValueError, match=r"sigma_t > 2.0.*lower min_std"):
        update(policy, rollout(policy), ADVANTAGE, min_std=2.0)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_gradient_of_drawn_steps_is_right_on_average(policy, reduction):
    """Over all ways to draw one step: without bias."""
    trajectory = shift(rollout(policy), off_policy())
    steps = learnable_steps(trajectory.stds)
    whole, expected = update(policy, trajectory, ADVANTAGE, loss_reduction=reduction)
    parts = [
        update(policy, trajectory, ADVANTAGE, steps=step.view(1), loss_reduction=reduction)
        for step in steps
    ]
    mean = sum(gradient for _, gradient in parts) / len(steps)
    assert_close(mean, expected, rtol=0, atol=1e-4 * expected.abs().max().item())
    for name in ("loss", "kl", "mean_ratio"):
        values = [metrics[name] for metrics, _ in parts]
        assert np.mean(values) == pytest.approx(whole[name], rel=1e-4, abs=1e-6)


def test_drawn_steps_are_a_random_share():
    steps = torch.tensor([2, 3, 5, 7, 11])
    assert experience.draw_steps(steps, 1, None) is steps
    generator = torch.Generator().manual_seed(0)
    draws = [experience.draw_steps(steps, 0.4, generator).tolist() for _ in range(100)]
    assert all(len(set(draw)) == len(draw) == 2 for draw in draws)
    assert set(sum(draws, [])) == set(steps.tolist())
    assert experience.draw_steps(steps, 0.01, generator).tolist()[0] in steps


def test_checkpointed_gradient_is_the_same(policy):
    trajectory = rollout(policy)
    _, expected = update(policy, trajectory, ADVANTAGE)
    policy.unet.enable_gradient_checkpointing()
    assert policy.unet.is_gradient_checkpointing
    _, gradient = update(policy, trajectory, ADVANTAGE)
    assert_close(gradient, expected, rtol=1e-5, atol=1e-7)


# ------------------------------------------------------------------------------- units


def units_of(n_samples, **changes):
    loop = Finetune(n_samples=n_samples, n_steps=6, **changes)
    own = ddpo.Settings(advantage_scope=changes.pop("scope", "iteration"))
    seen = Experience(None, torch.arange(n_samples).float(), torch.tensor([0, 1, 3]))
    return ddpo.units(seen, own, loop, torch.Generator().manual_seed(0))


def test_every_decision_is_a_unit_of_one_mini_batch():
    batches = units_of(12, minibatch_size=4)
    assert [rows.shape for rows in batches] == [(12, 1, 2)] * 3
    decisions = [tuple(row) for rows in batches for row in rows[:, 0].tolist()]
    assert sorted(decisions) == [(k, i) for k in (0, 1, 3) for i in range(12)]
    samples = [rows[:, 0, 1].unique().tolist() for rows in batches]
    assert [len(each) for each in samples] == [4, 4, 4]
    assert sum(samples, []) != list(range(12))  # in random order


def test_mini_batches_of_the_published_scope_are_consecutive_samples():
    seen = Experience(None, torch.arange(12).float(), torch.tensor([0]))
    own, loop = ddpo.Settings(advantage_scope="minibatch"), Finetune(n_samples=12, minibatch_size=4)
    order = [ddpo.units(seen, own, loop, torch.Generator().manual_seed(seed)) for seed in range(9)]
    starts = {tuple(rows[0, 0, 1].item() for rows in batches) for batches in order}
    assert all(sorted(each) == [0, 4, 8] for each in starts) and len(starts) > 2
    for batches in order:
        for rows in batches:
            samples = rows[:, 0, 1].tolist()
            assert samples == list(range(samples[0], samples[0] + 4))


def test_credit_of_both_scopes():
    rewards = torch.tensor([1.0, 3.0, 10.0, 30.0])
    seen, loop = Experience(None, rewards, None), Finetune(n_samples=4, minibatch_size=2)
    over_all = ddpo.credit(seen, ddpo.Settings(), loop, None)
    assert_close(over_all, ((rewards - rewards.mean()) / rewards.std(correction=0)))
    within = ddpo.credit(seen, ddpo.Settings(advantage_scope="minibatch"), loop, None)
    assert_close(within, torch.tensor([-1.0, 1.0, -1.0, 1.0]))
    grouped = Experience(None, rewards, None, groups=torch.tensor([0, 1, 0, 1]))
    assert_close(ddpo.credit(grouped, ddpo.Settings(), loop, None), torch.tensor([-1, -1, 1, 1.0]))


def test_settings_that_do_not_go_together_are_refused_before_anything_runs():
    many, one = Finetune(n_samples=4, minibatch_size=2), Finetune(n_samples=4, minibatch_size=4)
    with pytest.raises(
        ValueError, match="one update per rollout: set minibatch_size to n_samples, 4"
    ):
        ddpo.helpers(None, ddpo.Settings(estimator="sf"), many)
    assert ddpo.helpers(None, ddpo.Settings(estimator="sf"), one) is None
    single = Finetune(n_samples=4, minibatch_size=1)
    told = Finetune(n_samples=4, minibatch_size=2, prompts=("a cat", "a cow"))
    for loop, size in ((single, 1), (told, 1), (many, 2)):
        own = ddpo.Settings(advantage_scope="minibatch", group_size=size)
        with pytest.raises(ValueError, match="minibatch_size > 1, group_size=1, no prompts"):
            ddpo.helpers(None, own, loop)
    assert ddpo.helpers(None, ddpo.Settings(advantage_scope="minibatch"), many) is None
    assert ddpo.helpers(None, ddpo.Settings(), single) is None


def test_a_helpers_gradient_is_rescaled_apart_from_the_policys():
    network, helper = (torch.nn.Linear(1, 1, bias=False) for _ in range(2))
    with torch.no_grad():
        network.weight.zero_(), helper.weight.zero_()
    groups = [
        {"params": [network.weight], "factor": 1.0},
        {"params": [helper.weight], "factor": 20.0},
    ]

    def loss(part):
        value = 3 * network.weight + 400 * helper.weight
        return value.view(1).expand(len(part)), {}

    limits = {"n_units": 4, "micro_batch": 3, "max_grad_norm": 0.5, "rate": 0.1}
    optimizer = torch.optim.SGD(groups, lr=9.0)
    done = take_step(network, optimizer, torch.zeros(4, 1, 2, dtype=torch.int64), loss, **limits)
    assert done["grad_norm"] == pytest.approx(3) and done["learning_rate"] == 0.1
    assert network.weight.item() == pytest.approx(-0.1 * 0.5, rel=1e-4)
    assert helper.weight.item() == pytest.approx(-2.0 * 0.5, rel=1e-4)


def test_score_function_allows_no_second_epoch():
    twice = Finetune(n_samples=4, minibatch_size=4, n_inner_epochs=2)
    with pytest.raises(ValueError, match="n_inner_epochs to 1"):
        ddpo.helpers(None, ddpo.Settings(estimator="sf"), twice)


# ------------------------------------------------------------------------------- modules


def test_objectives_by_name_and_as_modules():
    assert objectives.load("ddpo") is ddpo
    assert objectives.load("ddpo_lib.objectives.ddpo") is ddpo
    assert objectives.load(ddpo) is ddpo
