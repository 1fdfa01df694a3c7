"""The methods beside DDPO, term by term: each loss, credit and unit against what is written down
here, so that no part of a formula can change unnoticed. `test_objectives` has their gradients."""

import dataclasses
import math
import types
from types import SimpleNamespace

import pytest
import test_objectives
import torch
from diffusers import DDPMScheduler
from test_objectives import LOOP, brightness, experience_of, losses, move
from torch.testing import assert_close

from ddpo_lib import experience as experiences
from ddpo_lib import finetune as loop
from ddpo_lib import parallel, sampler
from ddpo_lib.experience import Experience, rescore, standardise
from ddpo_lib.log_probs import kl
from ddpo_lib.objectives import d3po, ddpo, dense, hrf, nft, promise, rwr, tdpo, value
from ddpo_lib.policy import Policy
from ddpo_lib.settings import Finetune

method = test_objectives.method


@pytest.mark.parametrize("name", ["promise", "tdpo"])
def test_decision_is_worth_the_credit_of_its_own_step(method, name):
    """Where the ratio is 1 the surrogate is -A of (step, sample), times the steps."""
    training = method(name)
    if name == "promise":
        training = dataclasses.replace(training, own=promise.Settings(kl_weight=0.0))
    else:
        torch.nn.init.normal_(
            training.helpers.out.weight, generator=torch.Generator().manual_seed(0)
        )
    seen, credit, batches = experience_of(training)
    of_step = credit if name == "promise" else credit[0]
    assert (of_step[0] != of_step[1]).all()
    rows = batches[0]
    step, sample = rows[:, 0].unbind(1)
    found, logged = losses(training, seen, credit, rows)
    found = found - logged.get("value_error", 0)
    assert_close(
        found.detach().float(), -len(seen.steps) * of_step[step, sample], rtol=1e-4, atol=1e-4
    )


# ------------------------------------------------------------------------------ denoising losses


def test_corruption_is_what_its_row_says(method):
    """The noise is its seed's; the timestep its share of all 1000, both ends included."""
    training = method("rwr")
    seen, _, batches = experience_of(training)
    top = experiences.UNIFORM - 1
    rows = torch.tensor([[0, 1, 5], [top, 1, 6], [top // 2, 0, 5], [top, 3, 2**33]])[:, None]
    x_t, eps, t, _ = experiences.corrupt(training.learner, seen, rows)
    assert t.tolist() == [0, 999, 499, 999]
    for found, seed in zip(eps, (5, 6, 5, 2**33), strict=True):
        assert found.equal(torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(seed)))
    (u, sample, seed) = torch.cat(batches)[:, 0].unbind(1)
    assert len(u.unique()) == len(u) == 72 and len(seed.unique()) == 72  # draws share nothing
    assert sample.bincount().tolist() == [9] * 8


# ------------------------------------------------------------------------------ DPOK


def test_dpok_value_network_is_the_baseline_and_learns_the_reward(method):
    training = method("dpok")
    with torch.no_grad():
        training.helpers["critic"].out.bias.fill_(0.5)  # V is 0.5 everywhere
    seen, credit, batches = experience_of(training)
    R = standardise(seen.rewards).float().expand(8, -1)
    assert_close(credit, torch.stack([R - 0.5, R]))
    sample, found = batches[0][:, 0, 1], []
    for weight in (0.0, 3.0):
        own = dataclasses.replace(training.own, value_weight=weight)
        found.append(losses(dataclasses.replace(training, own=own), seen, credit, batches[0]))
    error = (0.5 - R[0, sample]).square() / 2
    assert_close((found[1][0] - found[0][0]).float(), 3 * error, rtol=1e-3, atol=1e-4)
    assert_close(found[1][1]["value_error"], error)


# ------------------------------------------------------------------------------ the critic


def test_value_is_of_the_state_and_the_time_of_a_decision(method):
    training = method("dpok")
    critic = training.helpers["critic"]
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(critic.out.weight, generator=generator)
    seen, _, batches = experience_of(training)
    states, times = seen.trajectory.states, seen.trajectory.timesteps
    features = torch.stack([critic.features(states[k], times[k].expand(8)) for k in range(8)])
    expected = critic.out(features).squeeze(-1).detach()  # (T, N)
    assert (expected.std(0) > 0).all() and (expected.std(1) > 0).all()
    assert_close(value.values(critic, seen), expected)
    step, sample = batches[0][:, 0].unbind(1)
    assert_close(value.value_of(critic, seen, step, sample).detach(), expected[step, sample])
    assert_close(critic.activity, features.detach().mean((0, 1)) / features.detach().mean())
    still = critic(states[:1, :1].expand(8, 1, -1, -1, -1)[:, 0], times)  # one state at all times
    assert len(still.unique()) == 8


# ------------------------------------------------------------------------------ D3PO


def test_d3po_learns_from_a_share_of_the_steps_of_every_pair(method):
    training = method("d3po", timestep_fraction=0.5)
    _, _, batches = experience_of(training)
    for rows in batches:
        assert len(rows[:, 0, 0].unique()) == 4 and len(rows) == 4 * 2  # 4 of 7 steps, 2 pairs


def test_d3po_tie_teaches_nothing():
    seen = Experience(None, torch.tensor([1.0, 1.0, 2.0, 3.0]), None)
    assert d3po.credit(seen, None, None, None).tolist() == [0, 0, -1, 1]


@pytest.mark.parametrize("name", ["d3po", "dense"])
def test_preferences_are_off_the_pretrained_policy_not_off_the_rollouts(method, name):
    """The rollout is of a policy that had left it already: there the ratio is not 1."""
    training = method(name)
    move(training)
    seen, credit, batches = experience_of(training)
    value, logged = losses(training, seen, credit, batches[0])
    assert logged["kl"].max() < 1e-6  # to the rollout's policy
    new = rescore(training.learner, seen.trajectory, *batches[0].flatten(0, 1).unbind(1)).log_prob
    pretrained = dataclasses.replace(training.learner, unet=training.helpers)
    old = rescore(pretrained, seen.trajectory, *batches[0].flatten(0, 1).unbind(1)).log_prob
    size = 2 if name == "d3po" else 4
    ratio = (new - old).view(len(batches[0]), size, -1)
    sample = batches[0].view(len(batches[0]), size, -1, 2)[:, :, 0, 1]
    if name == "d3po":
        expected = d3po.pair_loss(ratio[..., 0], credit[sample], training.own)
    else:
        score = 10 * ratio.clamp(-0.1, 0.1).mean(-1)
        expected = dense.plackett_luce(score, credit[sample])
    assert_close(value, expected)
    assert not torch.allclose(value, torch.full_like(value, math.lgamma(size + 1)), rtol=1e-5)


@pytest.mark.parametrize("variant", ["d3po", "dense"])
def test_logged_kl_is_a_whole_trajectorys_of_all_of_a_units_decisions(method, variant):
    training = method(variant)
    seen, credit, batches = experience_of(training)
    move(training)
    rows = batches[0]
    step, sample = rows.flatten(0, 1).unbind(1)
    new = rescore(training.learner, seen.trajectory, step, sample)
    divergence = kl(new.mean.detach(), seen.trajectory.means[step, sample], new.std)
    found = losses(training, seen, credit, rows)[1]["kl"]
    assert_close(found, 7 * divergence.view(len(rows), -1).mean(1))


# ------------------------------------------------------------------------------ dense reward


def test_dense_discount_counts_steps_of_the_chain():
    """Also where steps in between are not learned from; and K is at most their number."""
    own = dense.Settings(group_size=2, n_draws=1, n_comparisons=4000, discount=0.5)
    seen = Experience(None, torch.zeros(2), torch.tensor([1, 2, 5]))
    settings = Finetune(n_samples=2, minibatch_size=2)
    (rows,) = dense.units(seen, own, settings, torch.Generator().manual_seed(0))
    share = rows[:, 0, 0].bincount(minlength=6)[[1, 2, 5]] / 4000
    weights = torch.tensor([1.0, 0.5, 0.0625])
    assert_close(share, weights / weights.sum(), rtol=0, atol=0.03)
    few = dataclasses.replace(own, n_draws=9)
    assert dense.units(seen, few, settings, torch.Generator())[0].shape == (4000, 6, 2)


def test_dense_score_is_clamped_on_both_sides():
    ratio = torch.tensor([[[-0.5, 0.01, 0.5], [0.02, 0.02, 0.05]]], dtype=torch.float64)
    score = dense.trajectory_scores(ratio, dense.Settings(clip_range=0.03, scale=10.0))
    assert_close(score, torch.tensor([[10 * 0.01 / 3, 10 * 0.07 / 3]], dtype=torch.float64))


# ------------------------------------------------------------------------------ TDPO


def test_tdpo_credit_by_hand(method):
    """V differs from step to step: A is standardised over all decisions, not at each step."""
    training = method("tdpo")
    critic = training.helpers
    torch.nn.init.normal_(critic.out.weight, generator=torch.Generator().manual_seed(0))
    seen, _, _ = experience_of(training)
    V, R = value.values(critic, seen), standardise(seen.rewards).float()
    for steps, clip in ((seen.steps, 10.0), (seen.steps[:4], 0.7)):
        raw = (R - V)[steps]
        expected = torch.zeros_like(V)
        expected[steps] = ((raw - raw.mean()) / raw.std(correction=0)).clamp(-clip, clip)
        some, own = dataclasses.replace(seen, steps=steps), tdpo.Settings(advantage_clip=clip)
        found = tdpo.credit(some, own, training.settings, critic)
        assert_close(found, torch.stack([expected, R.expand_as(V), V]), rtol=1e-4, atol=1e-5)
    assert abs(raw.mean(1)).max() > 0.05  # the steps differ


@pytest.mark.parametrize("moved", [0.5, -0.5])
def test_tdpo_loss_is_ddpos_plus_the_critics_error(method, moved):
    """With its own clip range; and the critic's error is clipped on both sides."""
    training = method("tdpo")
    training = dataclasses.replace(training, own=tdpo.Settings(clip_range=0.01))
    seen, credit, batches = experience_of(training)
    rows = batches[0]
    step, sample = rows[:, 0].unbind(1)
    with torch.no_grad():
        training.helpers.out.bias.fill_(moved)
    move(training)
    found, logged = losses(training, seen, credit, rows)
    R = credit[1][step, sample]
    near = math.copysign(0.2, moved)
    error = 0.5 * torch.maximum((moved - R).square(), (near - R).square())
    assert_close(logged["value_error"], error)
    own = ddpo.Settings(clip_range=0.01)
    surrogate, _ = ddpo.loss(training.learner, seen, rows, credit[0], own, None)
    assert_close(found, surrogate + error, rtol=1e-4, atol=1e-5)


def test_tdpo_r_resets_every_so_often_and_each_time_anew(method, monkeypatch):
    calls = []

    def note(critic, optimizer, generator):
        calls.append(torch.randn(1, generator=generator))

    monkeypatch.setattr(tdpo, "reset_active", note)
    for every, expected in ((0, []), (3, [3, 6])):
        own, seen = tdpo.Settings(reset_every=every), []
        for iteration in range(1, 8):
            calls.clear()
            tdpo.tend(own, None, None, iteration)
            seen += [(iteration, *map(float, calls))] if calls else []
        assert [iteration for iteration, _ in seen] == expected
    assert len({drawn for _, drawn in seen}) == 2


def test_loop_tends_with_its_iteration(method, monkeypatch):
    training, seen = method("tdpo"), []
    monkeypatch.setattr(tdpo, "tend", lambda *given: seen.append(given))
    for iteration in (1, 2):
        loop.iterate(training, iteration)
    same = training.own, training.helpers, training.optimizer
    assert seen == [(*same, 1), (*same, 2)]


def test_reset_draws_by_the_inputs_and_forgets_both_moments(method):
    training = method("tdpo")
    critic = training.helpers
    critic.out = torch.nn.Linear(64, 400)  # enough weights to tell 1/65 from 1/81
    optimizer = torch.optim.AdamW(critic.parameters())
    for p in critic.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    active = torch.arange(64) < 60
    critic.activity.copy_(active.float())
    tdpo.reset_active(critic, optimizer, torch.Generator().manual_seed(0))
    assert critic.hidden.weight[active].std().item() == pytest.approx(81**-0.5, rel=0.04)
    assert critic.out.weight[:, active].std().item() == pytest.approx(65**-0.5, rel=0.03)
    for p, index in (
        (critic.hidden.weight, active),
        (critic.hidden.bias, active),
        (critic.out.weight, (slice(None), active)),
    ):
        for moment in ("exp_avg", "exp_avg_sq"):
            kept = optimizer.state[p][moment].clone()
            assert kept[index].abs().max() == 0
            kept[index] = 1
            assert (kept != 0).all()  # the dormant ones' are as they were


# ------------------------------------------------------------------------------ HRF


class Exact(torch.nn.Module):
    """The noise that is expected of data N(0, 1/4), so that everything is Gaussian."""

    device, config = torch.device("cpu"), SimpleNamespace(sample_size=8, in_channels=3)
    alpha_bar = DDPMScheduler(1000).alphas_cumprod

    def forward(self, x_t, t):
        a_t = self.alpha_bar[t].view(-1, 1, 1, 1)
        return SimpleNamespace(sample=(1 - a_t).sqrt() * x_t / (0.25 * a_t + 1 - a_t))


def segments(n=400, group_size=4, iteration=13, eta=1.0):
    policy = Policy(Exact(), DDPMScheduler(1000, clip_sample=False), bf16=False)
    settings = Finetune(n_samples=n, n_steps=20, minibatch_size=n, micro_batch=n, eta=eta)
    seeds, generator = sampler.seeds(1, n), torch.Generator().manual_seed(13)
    own = hrf.Settings(group_size=group_size)
    return hrf.rollout(policy, own, settings, None, seeds, None, iteration, generator)


def test_siblings_noise_has_nothing_to_do_with_where_they_start():
    """Otherwise a sibling is no sample of the policy from that state."""
    trajectory = segments()
    start = trajectory.states[0].view(100, 4, -1)
    for k in range(len(trajectory.stds) - 1):
        z = (trajectory.states[k + 1] - trajectory.means[k]) / trajectory.stds[k]
        for sibling in range(4):
            both = torch.stack(
                [z.view(100, 4, -1)[:, sibling].flatten(), start[:, sibling].flatten()]
            )
            assert abs(torch.corrcoef(both)[0, 1]) < 5 / both.shape[1] ** 0.5, (k, sibling)


@pytest.mark.parametrize("eta", [0.1, 1.0])
def test_renoised_parents_have_the_marginal_of_their_timestep(eta):
    """Of data of variance v: v a_t + 1 - a_t, at the timestep of the first step of the segment; at
    a small eta this also tells fresh noise from that which the parents came from."""
    policy = Policy(Exact(), DDPMScheduler(1000, clip_sample=False), bf16=False)
    seeds = sampler.seeds(2, 2000)
    x_0 = sampler.sample(policy, sampler.noise(policy, seeds), 20, eta, seeds, batch_size=2000)
    for iteration in (1, 13):
        trajectory = segments(4000, 2, iteration, eta)
        a_t = Exact.alpha_bar[trajectory.timesteps[0]].item()
        expected = x_0.var().item() * a_t + 1 - a_t
        assert trajectory.states[0].var().item() == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize("window", ["moving", "fixed", "anywhere"])
@pytest.mark.parametrize("n_steps", range(3, 12))
def test_hrf_leaves_a_step_of_short_chains_too(window, n_steps):
    own, generator = hrf.Settings(window=window, move_at=3), torch.Generator().manual_seed(0)
    for iteration in (1, 4):
        drawn = {hrf.start_step(own, n_steps, iteration, generator) for _ in range(60)}
        assert min(drawn) >= 0 and max(drawn) <= n_steps - 2
        late = window == "moving" and iteration == 4
        assert min(drawn) == (n_steps // 2 if late else 0)


@pytest.mark.parametrize(("n_steps", "min_std"), [(2, 0.0), (4, 0.05)])
def test_hrf_learns_from_a_step_of_the_shortest_chains(method, n_steps, min_std):
    training = method("hrf", n_steps=n_steps, min_std=min_std)
    _, updates = loop.iterate(training, training.own.move_at + 1)
    assert updates and updates[0]["grad_norm"] > 0


# ------------------------------------------------------------------------------ NFT


def test_nft_good_samples_attract_at_u_of_their_reward():
    rewards = torch.cat([torch.zeros(60), torch.tensor([-100.0, 100.0])])
    u = nft.credit(Experience(None, rewards, None), None, None, None)
    assert u[-2:].tolist() == [0, 1] and abs(u[:-2] - 0.5).max() < 1e-6
    groups = torch.tensor([0, 0, 1, 1])
    u = nft.credit(Experience(None, torch.tensor([1.0, 3, 10, 30]), None, groups), None, None, None)
    assert_close(u, torch.tensor([0.4, 0.6, 0.4, 0.6]))


def test_nft_loss_by_hand(method):
    training = method("nft-kl")
    pretrained = {k: v.clone() for k, v in training.learner.unet.state_dict().items()}
    move(training)
    seen, credit, batches = experience_of(training)
    old = {k: v.clone() for k, v in training.learner.unet.state_dict().items()}
    move(training)
    found, logged = losses(training, seen, credit, batches[0])
    x_t, eps, t, _ = experiences.corrupt(training.learner, seen, batches[0])
    outputs = [training.learner.unet(x_t, t).sample]
    for weights in (old, pretrained):
        training.learner.unet.load_state_dict(weights)
        outputs.append(training.learner.unet(x_t, t).sample)
    new, old, pretrained = outputs

    def error(a, b):
        return (a - b).square().mean((1, 2, 3))

    good, bad = error(0.3 * new + 0.7 * old, eps), error(1.3 * old - 0.3 * new, eps)
    u, distance = credit[batches[0][:, 0, 1]], error(new, pretrained)
    assert_close(logged["distance"], distance.detach(), rtol=1e-4, atol=1e-7)
    assert_close(found, (u * good + (1 - u) * bad) / 0.3 + 0.5 * distance, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------------- samples of a prompt


GROUPS = torch.tensor([0, 0, 1, 1, 0, 0, 1, 1])


@pytest.mark.parametrize("name", ["ddpo", "dpok", "tdpo", "nft", "rwr", "promise"])
def test_credit_compares_the_samples_of_a_prompt(method, name):
    """What the prompts' means differ by, and for all but `promise` their deviations, is nothing."""
    training = method(name)
    seen, _, _ = experience_of(training)
    scale = 1.0 if name == "promise" else 1 + 2.0 * GROUPS
    credits = []
    for rewards in (seen.rewards, scale * seen.rewards + 100 * GROUPS):
        promised = seen.denoised if name == "promise" else None
        one = dataclasses.replace(seen, rewards=rewards, groups=GROUPS, denoised=promised)
        credits.append(
            training.objective.credit(one, training.own, training.settings, training.helpers)
        )
    assert credits[0].std() > 0
    assert_close(*credits, rtol=1e-3, atol=1e-3)


def test_promise_by_hand_where_there_are_prompts(method):
    training = method("promise")
    seen, _, _ = experience_of(training)
    own = promise.Settings(advantage_clip=0.8)
    seen = dataclasses.replace(seen, groups=GROUPS)
    found = promise.credit(seen, own, training.settings, None)
    to_go = (seen.rewards - seen.denoised)[:7]
    for label in (0, 1):
        to_go[:, label == GROUPS] -= to_go[:, label == GROUPS].mean(1, keepdim=True)
    expected = (to_go / (to_go.square().sum() / 56).sqrt()).clamp(-0.8, 0.8)
    assert_close(found[:7], expected, rtol=1e-4, atol=1e-5)


def test_sparse_keeps_what_rounding_says():
    seen = Experience(None, torch.arange(8.0), None)
    for kept, n in ((0.1, 1), (0.2, 2), (0.3, 2), (0.9, 7)):
        weights = rwr.credit(seen, rwr.Settings("sparse", kept=kept), None, None)
        assert (weights > 0).sum() == n


def test_new_critic_is_the_same_whatever_was_drawn_before(method):
    training, critics = method("dpok"), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        critics.append(
            torch.cat([p.flatten() for p in value.new_value(training.learner).parameters()])
        )
    assert critics[0].equal(critics[1])


def test_promise_compares_within_groups_that_share_their_noise(method):
    training, own = method("promise"), promise.Settings(group_size=4)
    rewards = torch.tensor([0.0, 1, 2, 3, 100, 101, 102, 103])
    seen = Experience(None, rewards, torch.arange(7), denoised=torch.zeros(8, 8))
    found = promise.credit(seen, own, training.settings, None)[0]
    assert_close(found[:4], found[4:])
    assert abs(found[:4].sum()) < 1e-4 < found[3]


# ------------------------------------------------------------------------------ the whole


@pytest.mark.parametrize("name", ["groups", "d3po", "dense", "hrf"])
def test_groups_that_processes_would_share_are_refused(method, monkeypatch, name):
    """3 of 8 samples each: no process holds a whole group; by all of them, before anything runs."""
    monkeypatch.setattr(parallel, "n_processes", lambda: 3)
    with pytest.raises(ValueError, match="n_samples=8 in 3 processes: each must hold whole groups"):
        method(name)
    monkeypatch.setattr(parallel, "n_processes", lambda: 2)
    method(name)


def test_another_rollout_is_another_run(new_policy):
    policy, found = new_policy(widths=(8,)), []
    for source in ("return None", "return 1", "return 1"):
        module = types.ModuleType("own_objective")
        imported = "from ddpo_lib.objectives.ddpo import Settings, helpers, credit, units, loss"
        exec(f"{imported}\ndef rollout(*given):\n    {source}\n", vars(module))
        training = loop.prepare(policy, brightness, module, Finetune(**LOOP), 0)
        found.append(loop._identity(policy, brightness, training))
    assert found[0] != found[1] == found[2]


def test_loss_sees_what_its_process_holds(method, monkeypatch):
    """Groups and denoised rewards are of all processes, and for the credit alone."""
    training, seen = method("promise"), []

    def note(policy, experience, *given):
        seen.append(experience)
        return ddpo.loss(policy, experience, *given)

    monkeypatch.setattr(promise, "loss", note)
    loop.iterate(training, 1)
    assert {(each.groups, each.denoised) for each in seen} == {(None, None)}
