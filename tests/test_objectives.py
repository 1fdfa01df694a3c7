"""The methods beside DDPO: each gradient against a closed form, each in the loop, to the bit."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from ddpo_lib import experience as experiences
from ddpo_lib import finetune as loop
from ddpo_lib import objectives, runs, sampler
from ddpo_lib import policy as policies
from ddpo_lib.experience import Experience, pairs, rescore
from ddpo_lib.log_probs import kl
from ddpo_lib.objectives import d3po, ddpo, dense, dpok, hrf, nft, promise, rwr, sft, tdpo, value
from ddpo_lib.settings import Finetune

NAMES = ("ddpo", "rwr", "sft", "dpok", "d3po", "dense", "tdpo", "hrf", "nft", "promise")
VARIANTS = {
    **{name: (name, {}) for name in NAMES},
    "dense": ("dense", {"clip_range": 0.1}),  # a step of this loop would leave 1e-4 for good
    "groups": ("ddpo", {"group_size": 4}),
    "ddpo-kl": ("ddpo", {"kl_weight": 0.1}),
    "sparse": ("rwr", {"weights": "sparse"}),
    "sft-kl": ("sft", {"kl_weight": 0.5}),
    "tdpo-r": ("tdpo", {"reset_every": 2, "steps_per_update": 2}),
    "hrf-anywhere": ("hrf", {"window": "anywhere"}),
    "nft-kl": ("nft", {"kl_weight": 0.5, "beta": 0.3}),
}
every = pytest.mark.parametrize("variant", VARIANTS)
LOOP = {
    "n_iterations": 3, "n_samples": 8, "n_steps": 8, "minibatch_size": 4, "micro_batch": 5,
    "n_development": 2, "learning_rate": 1e-3, "bf16": False,
}  # fmt: skip


@pytest.fixture
def method(new_policy):
    """method(variant, **loop): a Training of it on a tiny policy."""

    def make(variant, **changes):
        name, own = VARIANTS[variant]
        objective = objectives.load(name)
        settings = Finetune(**LOOP | changes)
        policy = new_policy(widths=(8,))
        return loop.prepare(
            policy, brightness, objective, settings, 0, objective.Settings(**own), None
        )

    return make


def brightness(images):
    return images.mean((1, 2, 3))


def experience_of(training, iteration=1):
    """What the loop would hand to the objective, and its units."""
    objective, settings, own = training.objective, training.settings, training.own
    generator = torch.Generator().manual_seed(7)
    seeds = sampler.seeds(iteration, settings.n_samples)
    asked = (training.learner, own, settings, training.helpers)
    if hasattr(objective, "rollout"):
        trajectory = objective.rollout(*asked, seeds, None, iteration, generator)
    else:
        trajectory = experiences.roll_out(training.learner, settings, seeds)
    steps = experiences.learnable_steps(trajectory.stds)
    seen = Experience(trajectory, training.reward(trajectory.x_0), steps)
    expected = sampler.denoised(training.learner, trajectory)
    seen = dataclasses.replace(seen, denoised=torch.stack([*map(training.reward, expected)]))
    credit = objective.credit(seen, *asked[1:])
    return seen, credit, objective.units(seen, own, settings, generator)


def losses(training, seen, credit, rows):
    own, helpers = training.own, training.helpers
    return training.objective.loss(training.learner, seen, rows, credit, own, helpers)


def gradient(training, value):
    unet = training.learner.unet
    unet.zero_grad()
    value.backward()
    return torch.cat([p.grad.flatten() for p in unet.parameters() if p.grad is not None])


def move(training, size=0.02):
    """Weights a little off those that drew the samples."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in training.learner.unet.parameters():
            p += size * torch.randn(p.shape, generator=generator) * p.abs().mean()


# ------------------------------------------------------------------------------- in the loop


@every
def test_method_goes_on_to_the_bit(finetune, variant):
    """Also with the weights of its helpers and their moments."""
    name, own = VARIANTS[variant]
    own = objectives.load(name).Settings(**own)
    options = {"objective": name, "own": own, **{k: v for k, v in LOOP.items() if k != "bf16"}}
    whole = finetune("whole", **options)
    finetune("broken", **options | {"n_iterations": 1})
    broken = finetune("broken", **options)
    names = ["unet/diffusion_pytorch_model", "optimizer"]
    names += ["helpers"] if (whole / "last/helpers.safetensors").exists() else []
    for file in names:
        one, two = (load_file(home / f"last/{file}.safetensors") for home in (whole, broken))
        assert one.keys() == two.keys() and all(one[key].equal(two[key]) for key in one), file
    rows = [[{**row, "seconds": 0} for row in runs.metrics(home)] for home in (whole, broken)]
    assert rows[0] == rows[1]
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows[0][1:])


@every
def test_gradient_is_that_of_any_micro_batches(method, variant):
    """Units of several decisions too; and a unit's loss is its own, whatever stands beside it."""
    training = method(variant)
    seen, credit, batches = experience_of(training)
    move(training)
    rows = batches[0]
    values, logged = losses(training, seen, credit, rows)
    assert values.shape == (len(rows),)
    assert all(each.shape == (len(rows),) and not each.requires_grad for each in logged.values())
    whole = gradient(training, values.sum())
    parts = [losses(training, seen, credit, part)[0] for part in rows.split(3)]
    torch.testing.assert_close(torch.cat(parts), values, rtol=1e-4, atol=1e-6)
    apart = gradient(training, sum(part.sum() for part in parts))
    assert whole.norm() > 0
    torch.testing.assert_close(apart, whole, rtol=1e-3, atol=1e-4 * whole.abs().max().item())


@every
def test_units_are_the_iterations_samples(method, variant):
    training = method(variant)
    seen, credit, batches = experience_of(training)
    for rows in batches:
        assert rows.dtype == torch.int64 and rows.ndim == 3 and rows.shape[2] in (2, 3)
        assert len(rows[..., 1].unique()) == training.settings.minibatch_size
    drawn = torch.cat([rows[..., 1].flatten() for rows in batches])
    assert drawn.unique().tolist() == list(range(8))
    assert credit.shape[-1] == 8 and credit.isfinite().all()


# ------------------------------------------------------------------------------- denoising losses


def test_corrupted_samples_are_the_forward_process(method):
    training = method("rwr")
    seen, _, batches = experience_of(training)
    x_t, eps, t, _ = experiences.corrupt(training.learner, seen, batches[0])
    sample = batches[0][:, 0, 1]
    expected = training.learner.scheduler.add_noise(seen.trajectory.x_0[sample], eps, t)
    torch.testing.assert_close(x_t, expected)
    assert t.min() >= 0 and t.max() < 1000 and len(t.unique()) > 0.9 * len(t)
    again = experiences.corrupt(training.learner, seen, batches[0][::2])
    assert again[0].equal(x_t[::2])


def test_timesteps_are_uniform_over_all_of_them(method):
    training = method("rwr", n_samples=4000, minibatch_size=4000, n_steps=2)
    trajectory = sampler.Trajectory(*[torch.zeros(1)] * 6, 1.0, "mean")
    trajectory = dataclasses.replace(trajectory, states=torch.zeros(3, 4000, 3, 1, 1))
    seen = Experience(trajectory, torch.zeros(4000), torch.tensor([0]))
    generator = torch.Generator().manual_seed(0)
    (rows,) = experiences.corruptions(seen, training.settings, 1, generator)
    _, eps, t, _ = experiences.corrupt(training.learner, seen, rows)
    counts = torch.bincount(t // 100, minlength=10)
    assert counts.min() > 320 and counts.max() < 480
    assert abs(eps.mean()) < 0.03 and abs(eps.std() - 1) < 0.03


def test_rwr_with_equal_weights_is_the_ddpm_loss(method):
    training = method("rwr")
    training = dataclasses.replace(training, own=rwr.Settings(inverse_temperature=0.0))
    seen, credit, batches = experience_of(training)
    assert credit.equal(torch.ones(8))
    value, _ = losses(training, seen, credit, batches[0])
    x_t, eps, t, _ = experiences.corrupt(training.learner, seen, batches[0])
    expected = F.mse_loss(training.learner.unet(x_t, t).sample, eps)
    assert value.mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_rwr_weights_are_the_softmax_of_standardised_rewards():
    rewards = torch.tensor([1.0, 2.0, 4.0, 9.0])
    seen = Experience(None, rewards, None)
    weights = rwr.credit(seen, rwr.Settings(inverse_temperature=0.5), None, None)
    scaled = 0.5 * (rewards - rewards.mean()) / rewards.std(correction=0)
    torch.testing.assert_close(weights, 4 * scaled.exp() / scaled.exp().sum())
    assert weights.mean().item() == pytest.approx(1)


def test_sparse_keeps_exactly_the_tenth():
    rewards = torch.randperm(50, generator=torch.Generator().manual_seed(0)).float()
    weights = rwr.credit(Experience(None, rewards, None), rwr.Settings("sparse"), None, None)
    assert (weights > 0).sum() == 5 and set(rewards[weights > 0].tolist()) == {45, 46, 47, 48, 49}
    assert weights.mean() == 1
    tied = rwr.credit(Experience(None, torch.zeros(7), None), rwr.Settings("sparse"), None, None)
    assert (tied > 0).sum() == 1


def test_sft_never_changes_its_data(method):
    training = method("sft")
    before, _, _ = experience_of(training)
    move(training, 0.5)
    after, _, _ = experience_of(training)
    assert after.trajectory.states.equal(before.trajectory.states)
    moved = experiences.roll_out(training.learner, training.settings, sampler.seeds(1, 8))
    assert not moved.states.equal(before.trajectory.states)


def test_sft_weights_are_rewards_between_0_and_1():
    weights = sft.credit(Experience(None, torch.tensor([-3.0, 1.0, 5.0]), None), None, None, None)
    assert weights.tolist() == [0, 0.5, 1]
    alike = sft.credit(Experience(None, torch.ones(3), None), None, None, None)
    assert alike.tolist() == [0, 0, 0]


def test_sft_pays_for_leaving_the_pretrained_policy(method):
    training = method("sft-kl")
    seen, credit, batches = experience_of(training)
    _, logged = losses(training, seen, credit, batches[0])
    assert logged["distance"].max() == 0  # nothing has been learned yet
    old = {k: v.clone() for k, v in training.learner.unet.state_dict().items()}
    move(training)
    value, logged = losses(training, seen, credit, batches[0])
    x_t, eps, t, _ = experiences.corrupt(training.learner, seen, batches[0])
    new = training.learner.unet(x_t, t).sample
    training.learner.unet.load_state_dict(old)
    distance = (new - training.learner.unet(x_t, t).sample).square().mean((1, 2, 3))
    error = (new - eps).square().mean((1, 2, 3))
    torch.testing.assert_close(logged["distance"], distance.detach(), rtol=1e-4, atol=1e-7)
    expected = credit[batches[0][:, 0, 1]] * error + 0.5 * distance
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)


def test_nft_implicit_policies_average_to_the_old_one():
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 3, 4, generator=generator)
    for beta in (0.1, 1.0, 2.0):
        toward, away = nft.implicit(new, old, beta)
        torch.testing.assert_close((toward + away) / 2, old)
        torch.testing.assert_close(toward - old, beta * (new - old))


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_nft_gradient_at_the_old_policy_is_u_weighted(method, beta):
    """There it is (2u - 1) times that of the plain denoising loss: good samples attract, bad ones
    repel, mean ones do neither."""
    training = method("nft")
    training = dataclasses.replace(training, own=nft.Settings(beta=beta))
    seen, credit, batches = experience_of(training)
    rows = batches[0]
    u = credit[rows[:, 0, 1]]
    found = gradient(training, losses(training, seen, credit, rows)[0].sum())
    error = rwr.denoising_error(training.learner, seen, rows)
    expected = gradient(training, ((2 * u - 1) * error).sum())
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * found.abs().max().item())
    assert credit.min() >= 0 and credit.max() <= 1 and credit.mean().item() == pytest.approx(0.5)


def test_nft_old_policy_is_the_rollouts(method):
    training = method("nft")
    move(training)
    experience_of(training)
    old, new = training.helpers["old"].state_dict(), training.learner.unet.state_dict()
    assert all(old[name].equal(new[name]) for name in new)
    reference = training.helpers["reference"].state_dict()
    assert not all(reference[name].equal(new[name]) for name in new)


# ------------------------------------------------------------------------------- DPOK


def test_dpok_without_kl_and_value_is_its_clamped_surrogate(method):
    training = method("dpok")
    own = dpok.Settings(kl_weight=0.0, value_weight=0.0, clip_range=1e-3)
    training = dataclasses.replace(training, own=own)
    seen, credit, batches = experience_of(training)
    assert credit[0].equal(credit[1])  # a new critic expects nothing
    move(training)
    rows = batches[0]
    value, _ = losses(training, seen, credit, rows)
    step, sample = rows[:, 0].unbind(1)
    ratio = rescore(training.learner, seen.trajectory, step, sample).log_ratio.exp()
    rewards = experiences.standardise(seen.rewards)[sample]
    expected = -rewards * ratio.clamp(1 - 1e-3, 1 + 1e-3) * len(seen.steps)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)
    outside = (ratio - 1).abs() > 1e-3
    assert 0 < outside.sum() < len(ratio)
    assert gradient(training, losses(training, seen, credit, rows[outside])[0].sum()).norm() == 0


def test_dpok_kl_is_zero_at_the_pretrained_policy_and_exact_off_it(method):
    training = method("dpok")
    seen, credit, batches = experience_of(training)
    rows = batches[0]
    assert losses(training, seen, credit, rows)[1]["kl_pretrained"].max() == 0
    before = gradient(training, losses(training, seen, credit, rows)[0].sum())
    free = dataclasses.replace(training, own=dataclasses.replace(training.own, kl_weight=0.0))
    without = gradient(free, losses(free, seen, credit, rows)[0].sum())
    torch.testing.assert_close(before, without)  # a minimum, so it has no gradient there
    old = {k: v.clone() for k, v in training.learner.unet.state_dict().items()}
    move(training)
    step, sample = rows[:, 0].unbind(1)
    told = losses(training, seen, credit, rows)[1]["kl_pretrained"] / len(seen.steps)
    new = rescore(training.learner, seen.trajectory, step, sample)
    training.learner.unet.load_state_dict(old)
    base = rescore(training.learner, seen.trajectory, step, sample)
    by_torch = torch.distributions.kl_divergence(
        torch.distributions.Normal(new.mean.double(), new.std.double().view(-1, 1, 1, 1)),
        torch.distributions.Normal(base.mean.double(), new.std.double().view(-1, 1, 1, 1)),
    ).sum((1, 2, 3))
    torch.testing.assert_close(told, by_torch.detach(), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_dpok_kl_is_weighed_in_the_unit_of_the_log_probability(method, reduction):
    training = method("dpok", log_prob_reduction=reduction)
    seen, credit, batches = experience_of(training)
    move(training)
    rows = batches[0]
    step, sample = rows[:, 0].unbind(1)
    values = []
    for weight in (0.0, 2.0):
        own = dataclasses.replace(training.own, kl_weight=weight)
        values.append(losses(dataclasses.replace(training, own=own), seen, credit, rows)[0])
    logged = losses(training, seen, credit, rows)[1]["kl_pretrained"]
    per = 192 if reduction == "mean" else 1
    torch.testing.assert_close(values[1] - values[0], 2 * logged / per, rtol=1e-3, atol=1e-6)


def test_value_network_learns_the_standardised_reward(method):
    training = method("dpok")
    critic = training.helpers["critic"]
    seen, credit, _ = experience_of(training)
    rows = pairs(seen.steps, torch.arange(8))
    step, sample = rows[:, 0].unbind(1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    first = None
    for _ in range(150):
        error = (value.value_of(critic, seen, step, sample) - credit[1][step, sample]).square()
        first = first or error.mean().item()
        optimizer.zero_grad()
        error.mean().backward()
        optimizer.step()
    assert first == pytest.approx(1) and error.mean() < 0.3
    after = dpok.credit(seen, training.own, training.settings, training.helpers)
    assert after[0][seen.steps].square().mean() < 0.3 and after[1].equal(credit[1])


# ------------------------------------------------------------------------------- D3PO


def test_d3po_pairs_share_their_initial_noise_alone(method):
    seen, credit, batches = experience_of(method("d3po"))
    states = seen.trajectory.states
    assert states[0, ::2].equal(states[0, 1::2])
    assert not (states[1, ::2] == states[1, 1::2]).all()
    assert credit.view(-1, 2).sum(1).tolist() == [0] * 4 and set(credit.tolist()) == {-1, 1}
    better = seen.rewards.view(-1, 2).argmax(1)
    assert credit.view(-1, 2).argmax(1).equal(better)
    for rows in batches:
        assert (rows[:, 0, 0] == rows[:, 1, 0]).all()
        assert (rows[:, 0, 1] % 2 == 0).all() and (rows[:, 1, 1] == rows[:, 0, 1] + 1).all()


def test_d3po_loss_is_antisymmetric_in_its_pair_and_bounded():
    settings = d3po.Settings()
    generator = torch.Generator().manual_seed(0)
    log_ratio = torch.randn(200, 2, generator=generator, dtype=torch.float64)
    h = torch.tensor([1.0, -1.0]).expand(200, 2)
    value = d3po.pair_loss(log_ratio, h, settings)
    torch.testing.assert_close(value, d3po.pair_loss(log_ratio.flip(1), h.flip(1), settings))
    # -log sigmoid(z) + log sigmoid(-z) = -z: exchanging the better for the worse turns z round.
    other = d3po.pair_loss(log_ratio, -h, settings)
    clamped = log_ratio.exp().clamp(0.9, 1.1).log()
    torch.testing.assert_close(value - other, -0.1 * (clamped[:, 0] - clamped[:, 1]))
    low = -math.log(1 / (1 + math.exp(-0.1 * (math.log(1.1) - math.log(0.9)))))
    high = -math.log(1 / (1 + math.exp(0.1 * (math.log(1.1) - math.log(0.9)))))
    assert (round(low, 3), round(high, 3)) == (0.683, 0.703)
    assert value.min() == pytest.approx(low) and value.max() == pytest.approx(high)
    tie = d3po.pair_loss(log_ratio, torch.zeros(200, 2), settings)
    torch.testing.assert_close(tie, torch.full((200,), math.log(2), dtype=torch.float64))


def test_d3po_compares_with_the_pretrained_policy(method):
    training = method("d3po")
    seen, credit, batches = experience_of(training)
    at_first, _ = losses(training, seen, credit, batches[0])
    assert torch.allclose(at_first, torch.tensor(math.log(2), dtype=at_first.dtype))
    step, sample = batches[0][:, 0].unbind(1)
    found = gradient(training, at_first.sum())
    new = rescore(training.learner, seen.trajectory, *batches[0].flatten(0, 1).unbind(1))
    expected = -0.1 * (credit[batches[0].flatten(0, 1)[:, 1]] * new.log_prob).sum() / 2
    expected = gradient(training, expected)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * found.abs().max().item())


# ------------------------------------------------------------------------------- dense reward


def test_two_trajectories_are_compared_by_bradley_and_terry():
    score = torch.tensor([[0.3, -0.2], [0.3, -0.2]], dtype=torch.float64)
    rewards = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    value = dense.plackett_luce(score, rewards)
    expected = torch.stack([-F.logsigmoid(score[0, 0] - score[0, 1]),
                            -F.logsigmoid(score[1, 1] - score[1, 0])])  # fmt: skip
    torch.testing.assert_close(value, expected)


def test_dense_loss_does_not_see_a_common_shift():
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    rewards = torch.randn(5, 4, generator=generator)
    value = dense.plackett_luce(score, rewards)
    torch.testing.assert_close(value, dense.plackett_luce(score + 7, rewards))
    torch.testing.assert_close(value, dense.plackett_luce(score, 3 * rewards - 1))
    by_hand = 0.0
    order = rewards[0].argsort(descending=True)
    for i in range(4):
        by_hand += score[0, order[i:]].exp().sum().log() - score[0, order[i]]
    assert value[0].item() == pytest.approx(by_hand.item())
    probabilities = [(-dense.plackett_luce(score[:1], each[None])).exp() for each in orders(4)]
    assert sum(probabilities).item() == pytest.approx(1)


def orders(n):
    import itertools

    return [torch.tensor(each, dtype=torch.float32) for each in itertools.permutations(range(n))]


@pytest.mark.parametrize("discount", [1.0, 0.5])
def test_dense_steps_are_drawn_by_the_discount(method, discount):
    training = method("dense", n_steps=6)
    seen, _, _ = experience_of(training)
    own = dense.Settings(discount=discount, n_draws=1, n_comparisons=3000)
    generator = torch.Generator().manual_seed(0)
    batches = dense.units(seen, own, training.settings, generator)
    drawn = torch.bincount(batches[0][:, 0, 0]).double()
    weights = discount ** torch.arange(len(seen.steps)).double()
    torch.testing.assert_close(drawn / drawn.sum(), weights / weights.sum(), atol=0.03, rtol=0)


def test_dense_unit_is_a_group_at_the_same_steps(method):
    training = method("dense")
    seen, credit, batches = experience_of(training)
    for unit in batches[0]:
        by_sample = unit.view(4, 3, 2)
        assert (by_sample[:, :, 0] == by_sample[0, :, 0]).all()  # the steps are shared
        assert len(by_sample[0, :, 0].unique()) == 3  # and differ
        assert by_sample[:, 0, 1].tolist() == list(range(unit[0, 1], unit[0, 1] + 4))
    move(training)
    unit = batches[0][:1]
    value, _ = losses(training, seen, credit, unit)
    step, sample = unit[0].unbind(1)
    new = rescore(training.learner, seen.trajectory, step, sample)
    pretrained = dataclasses.replace(training.learner, unet=training.helpers)
    old = rescore(pretrained, seen.trajectory, step, sample)
    score = 10 * (new.log_prob - old.log_prob).view(4, 3).clamp(-0.1, 0.1).mean(1)
    expected = dense.plackett_luce(score[None], seen.rewards[sample.view(4, 3)[:, 0]][None])
    torch.testing.assert_close(value, expected)


# ------------------------------------------------------------------------------- TDPO


def test_tdpo_with_a_zero_critic_is_ddpo(method):
    training = method("tdpo")
    seen, credit, batches = experience_of(training)
    assert credit[2].abs().max() == 0
    plain = ddpo.credit(seen, ddpo.Settings(advantage_clip=10), training.settings, None)
    for k in seen.steps:
        torch.testing.assert_close(credit[0][k], plain, rtol=1e-5, atol=1e-6)
    move(training)
    rows = batches[0]
    found = gradient(training, losses(training, seen, credit, rows)[0].sum())
    own = ddpo.Settings(clip_range=training.own.clip_range)
    expected = ddpo.loss(training.learner, seen, rows, plain, own, None)[0].sum()
    expected = gradient(training, expected)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_tdpo_goes_through_the_chain_in_turns(method):
    training = method("tdpo")
    training = dataclasses.replace(training, own=tdpo.Settings(steps_per_update=3))
    seen, _, batches = experience_of(training)
    turns = [sorted(rows[:, 0, 0].unique().tolist()) for rows in batches]
    assert turns == [[0, 1, 2], [3, 4, 5], [6]] * 2  # the last of 8 steps is no decision


def test_tdpo_critics_error_is_clipped_around_the_old_value(method):
    training = method("tdpo")
    seen, credit, batches = experience_of(training)
    rows = batches[0]
    step, sample = rows[:, 0].unbind(1)
    with torch.no_grad():
        training.helpers.out.bias.fill_(0.5)  # the old value was 0, the critic may move by 0.2
    error = losses(training, seen, credit, rows)[1]["value_error"]
    R = credit[1][step, sample]
    expected = 0.5 * torch.maximum((0.5 - R).square(), (0.2 - R).square())
    torch.testing.assert_close(error, expected)


def test_reset_touches_active_units_alone_and_their_moments(method):
    training = method("tdpo")
    critic, optimizer = training.helpers, training.optimizer
    for p in critic.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    active = torch.arange(64) % 3 == 0
    critic.activity.copy_(active.float())
    before = {name: p.clone() for name, p in critic.named_parameters()}
    tdpo.reset_active(critic, optimizer, torch.Generator().manual_seed(0))
    after = dict(critic.named_parameters())
    assert (after["hidden.weight"] != before["hidden.weight"])[active].all()
    assert (after["out.weight"] != before["out.weight"])[:, active].all()
    assert after["hidden.bias"][active].abs().max() == 0
    for name, dormant in (("hidden.weight", ~active), ("hidden.bias", ~active)):
        assert after[name][dormant].equal(before[name][dormant])
    assert after["out.weight"][:, ~active].equal(before["out.weight"][:, ~active])
    assert all(p.equal(before[name]) for name, p in after.items() if name.startswith("eye"))
    moments = {name: optimizer.state[p]["exp_avg"] for name, p in after.items()}
    assert moments["hidden.weight"][active].abs().max() == 0
    assert (moments["hidden.weight"][~active] != 0).all()
    assert moments["out.weight"][:, active].abs().max() == 0
    assert (moments["out.weight"][:, ~active] != 0).all() and (moments["out.bias"] != 0).all()
    deviation = after["hidden.weight"][active].std().item()
    assert deviation == pytest.approx(81**-0.5, rel=0.1)  # of 80 inputs


def test_helpers_learn_at_their_own_rate(method):
    training = method("tdpo")
    unet, critic = training.optimizer.param_groups
    assert (unet["factor"], critic["factor"]) == (1.0, 20.0)
    loop.iterate(training, 1)
    assert (unet["lr"], critic["lr"]) == (1e-3, pytest.approx(2e-2))


# ------------------------------------------------------------------------------- HRF


@pytest.mark.parametrize("window", ["moving", "fixed", "anywhere"])
def test_hrf_start_lies_in_its_window(window):
    own, generator = hrf.Settings(window=window, move_at=3), torch.Generator().manual_seed(0)
    for iteration, late in ((1, False), (3, False), (4, window == "moving")):
        drawn = {hrf.start_step(own, 20, iteration, generator) for _ in range(400)}
        low, high = (10, 17) if late else (0, 17 if window == "anywhere" else 10)
        assert drawn == set(range(low, high))


def test_hrf_segments_start_at_the_renoised_parent_and_learn_from_nothing_before(method):
    training = method("hrf", n_steps=12)
    learner, settings = training.learner, training.settings
    seeds = sampler.seeds(1, 8)
    generator = torch.Generator().manual_seed(3)
    start = hrf.start_step(training.own, 12, 1, torch.Generator().manual_seed(3))
    assert start > 0
    trajectory = hrf.rollout(learner, training.own, settings, None, seeds, None, 1, generator)
    t, t_prev = policies.steps(learner, 12)
    assert trajectory.timesteps.equal(t[start:]) and trajectory.t_prev.equal(t_prev[start:])
    assert len(trajectory.states) == 12 - start + 1
    parents = experiences.roll_out(learner, settings, [seed + 1 for seed in seeds[::4]]).x_0
    first = trajectory.states[0]
    assert first[:4].equal(first[:1].expand(4, -1, -1, -1)) and not first[4].equal(first[0])
    a_t = learner.alpha_bar[t[start]]
    left = (first[::4] - a_t.sqrt() * parents) / (1 - a_t).sqrt()
    torch.testing.assert_close(left, sampler.noise(learner, seeds[::4]), rtol=0, atol=1e-5)
    # Replay: the segment is the learner's own chain from there.
    again = sampler.rollout(learner, first, 12, seeds, skip=start, batch_size=5)
    assert again.states.equal(trajectory.states)
    assert again.log_probs.equal(trajectory.log_probs)


def test_hrf_compares_siblings(method):
    training = method("hrf")
    seen, credit, _ = experience_of(training)
    for group in (slice(0, 4), slice(4, 8)):
        rewards = seen.rewards[group].double()
        expected = (rewards - rewards.mean()) / rewards.std(correction=0)
        torch.testing.assert_close(credit[group].double(), expected, rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- ours


def test_promise_is_rewarded_for_what_was_still_to_be_earned(method):
    training = method("promise")
    seen, credit, _ = experience_of(training)
    expected = sampler.denoised(training.learner, seen.trajectory)
    to_go = (seen.rewards - brightness(expected.flatten(0, 1)).view(8, 8))[seen.steps]
    centred = to_go - to_go.mean(1, keepdim=True)
    scale = centred.square().mean().sqrt()
    torch.testing.assert_close(credit[seen.steps], centred / scale, rtol=1e-4, atol=1e-5)
    assert credit[-1].abs().max() == 0  # the last step is no decision


def test_promise_without_price_and_promise_is_ddpo(method):
    training = method("promise")
    training = dataclasses.replace(training, own=promise.Settings(kl_weight=0.0))
    seen, _, batches = experience_of(training)
    flat = dataclasses.replace(seen, denoised=torch.zeros_like(seen.denoised))
    credit = promise.credit(flat, training.own, training.settings, training.helpers)
    plain = ddpo.credit(seen, ddpo.Settings(), training.settings, None)
    move(training)
    found = losses(training, seen, credit, batches[0])[0]
    expected = ddpo.loss(training.learner, seen, batches[0], plain, ddpo.Settings(), None)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("variant", ["promise", "ddpo-kl"])
def test_leaving_the_pretrained_policy_costs_the_exact_kl(method, variant):
    training = method(variant)
    seen, credit, batches = experience_of(training)
    move(training)
    step, sample = batches[0][:, 0].unbind(1)
    new = rescore(training.learner, seen.trajectory, step, sample)
    pretrained = dataclasses.replace(training.learner, unet=training.helpers)
    old = rescore(pretrained, seen.trajectory, step, sample)
    paid = losses(training, seen, credit, batches[0])[0]
    free = dataclasses.replace(training.own, kl_weight=0.0)
    free = dataclasses.replace(training, own=free)
    paid = paid - losses(free, seen, credit, batches[0])[0]
    distance = kl(new.mean, old.mean, new.std) / 192 * len(seen.steps)
    torch.testing.assert_close(paid, 0.1 * distance, rtol=1e-3, atol=1e-6)


# ------------------------------------------------------------------------------- groups


def test_groups_share_noise_and_are_compared_alone(method):
    training = method("groups")
    seen, credit, _ = experience_of(training)
    first = seen.trajectory.states[0]
    assert first[:4].equal(first[:1].expand(4, -1, -1, -1)) and not first[4].equal(first[0])
    for group in (slice(0, 4), slice(4, 8)):
        rewards = seen.rewards[group].double()
        expected = (rewards - rewards.mean()) / rewards.std(correction=0)
        torch.testing.assert_close(credit[group].double(), expected, rtol=1e-3, atol=1e-3)
