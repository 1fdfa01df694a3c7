"""Rollouts against a chain of diffusers' own steps; seeds, streams, batches, and refusals."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from ddpo_lib import rewards, sampler
from ddpo_lib.log_probs import log_prob
from ddpo_lib.policy import Context, Policy, sigma, steps, transition

N, STEPS = 7, 10
SEEDS = [3, 1, 4, 15, 9, 2, 6]


def rollout(policy, seeds=SEEDS, eta=1.0, **options):
    return sampler.rollout(policy, sampler.noise(policy, seeds), STEPS, seeds, eta, **options)


def generators(stream, seeds=SEEDS):
    """The recipe: MT19937, seeded by a hash of the sample's seed and the stream's number."""
    mixed = [np.random.SeedSequence([seed, stream]).generate_state(1)[0] for seed in seeds]
    return [torch.Generator().manual_seed(int(seed)) for seed in mixed]


def draw(generators, shape=(3, 8, 8)):
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


@pytest.fixture
def linear() -> Policy:
    """Its network works pixel by pixel, so nothing rounds differently in another batch. (25 pixels,
    for the generator works in blocks of 16.)"""

    class Linear:
        device = torch.device("cpu")
        config = SimpleNamespace(sample_size=5, in_channels=1)

        def __call__(self, x_t, t):
            return SimpleNamespace(sample=0.3 * x_t)

    return Policy(Linear(), DDPMScheduler(1000), bf16=False)


# ------------------------------------------------------------------------------- the chain


@pytest.mark.parametrize(
    "scheduler",
    [
        {},
        {"clip_sample": False, "timestep_spacing": "trailing"},
        {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"},
    ],
)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_states_are_a_chain_of_diffusers_steps(new_policy, eta, scheduler):
    policy = new_policy(**scheduler)
    chain_of_diffusers(policy, DDIMScheduler.from_config(policy.scheduler.config), eta)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_last_step_may_stay_on_the_schedule(policy, eta):
    """Where it goes from timestep 1 to alpha_bar_0, it is stochastic like any other."""
    ddim = DDIMScheduler(1000, set_alpha_to_one=False, steps_offset=1)
    trajectory = chain_of_diffusers(Policy(policy.unet, ddim, bf16=False), ddim, eta)
    assert trajectory.timesteps[-1] == 1
    assert (trajectory.stds[-1] > 0) == (eta > 0)


def chain_of_diffusers(policy, ddim, eta):
    ddim.set_timesteps(STEPS)
    noise, states = generators(stream=1), [draw(generators(stream=0))]
    with torch.no_grad():
        for t in ddim.timesteps:
            output = policy.unet(states[-1], t).sample
            step = ddim.step(output, t, states[-1], eta=eta, variance_noise=draw(noise))
            states.append(step.prev_sample)

    trajectory = rollout(policy, eta=eta)

    assert trajectory.timesteps.equal(ddim.timesteps)
    assert trajectory.t_prev.equal(ddim.timesteps - 1000 // STEPS)
    assert_close(trajectory.states, torch.stack(states), rtol=1e-4, atol=1e-4)
    assert trajectory.x_0.equal(trajectory.states[STEPS])
    return trajectory


def test_shapes(policy):
    trajectory = rollout(policy)
    assert trajectory.states.shape == (STEPS + 1, N, 3, 8, 8)
    assert trajectory.means.shape == (STEPS, N, 3, 8, 8)
    assert trajectory.log_probs.shape == (STEPS, N)
    for each in (trajectory.stds, trajectory.timesteps, trajectory.t_prev):
        assert each.shape == (STEPS,)
    for each in (trajectory.states, trajectory.means, trajectory.stds):
        assert each.dtype == torch.float32 and not each.requires_grad
    assert trajectory.timesteps.dtype == trajectory.t_prev.dtype == torch.int64
    assert trajectory.log_probs.dtype == torch.float64 and not trajectory.log_probs.requires_grad
    assert (trajectory.eta, trajectory.reduction, trajectory.context) == (1.0, "mean", None)
    assert all(p.grad is None for p in policy.unet.parameters())


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_means_and_stds_are_those_of_the_transitions(policy, eta):
    trajectory = rollout(policy, eta=eta)
    t, t_prev = steps(policy, STEPS)
    assert trajectory.timesteps.equal(t) and trajectory.t_prev.equal(t_prev)
    assert trajectory.stds.equal(sigma(policy, t, t_prev, eta))
    assert (trajectory.stds[:-1] > 0).all() == (eta > 0)
    assert trajectory.stds[-1] == 0
    with torch.no_grad():
        for k in range(STEPS):
            expected = transition(
                policy, trajectory.states[k], t[k].expand(N), t_prev[k].expand(N), eta
            )
            assert trajectory.means[k].equal(expected.mean)
    z = draw(generators(stream=1))
    assert_close(trajectory.states[1], trajectory.means[0] + trajectory.stds[0] * z)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_log_probs_are_those_of_what_is_stored(policy, eta, reduction):
    trajectory = rollout(policy, eta=eta, reduction=reduction, batch_size=3)
    assert trajectory.reduction == reduction
    for k in range(STEPS):
        std = trajectory.stds[k].expand(N)
        expected = log_prob(trajectory.states[k + 1], trajectory.means[k], std, reduction)
        assert trajectory.log_probs[k].equal(expected)
    assert (trajectory.log_probs[:-1] != 0).all()
    assert (trajectory.log_probs[-1] == 0).all()


def test_log_probs_are_those_of_the_noise_that_was_drawn(policy):
    """log N(mean + std z; mean, std) = -z²/2 - log std - log √2π, averaged over the pixels."""
    trajectory, noise = rollout(policy), generators(stream=1)
    for k in range(STEPS - 1):
        z, std = draw(noise), trajectory.stds[k]
        expected = (-(z**2) / 2).mean((1, 2, 3)) - std.log() - 0.5 * math.log(2 * math.pi)
        assert_close(trajectory.log_probs[k], expected.double(), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------- seeds


def test_seeds_are_a_function_of_seed_and_place():
    ten = sampler.seeds(5, 10)
    assert all(type(each) is int for each in ten)
    assert sampler.seeds(5, 10) == ten
    for n in (0, 1, 3, 9):
        assert sampler.seeds(5, n) == ten[:n]
    everywhere = [each for seed in range(20) for each in sampler.seeds(seed, 50)]
    assert len(set(everywhere)) == 1000


def test_noise_is_standard_normal_and_a_function_of_the_seeds_alone(policy):
    torch.manual_seed(1)
    noise = sampler.noise(policy, SEEDS)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert noise.equal(sampler.noise(policy, SEEDS))
    assert torch.get_rng_state().equal(state)
    assert noise.shape == (N, 3, 8, 8) and noise.dtype == torch.float32
    assert noise.equal(draw(generators(stream=0)))
    many = sampler.noise(policy, sampler.seeds(0, 500))
    assert abs(many.mean()) < 0.02
    assert abs(many.std() - 1) < 0.02
    assert abs(torch.corrcoef(many.flatten(1)[:, :50].T).triu(1)).max() < 0.25
    assert len(many.flatten(1).unique(dim=0)) == 500


def test_streams_of_one_seed_are_independent(policy):
    seeds = sampler.seeds(0, 100)
    x_T = sampler.noise(policy, seeds)
    trajectory = sampler.rollout(policy, x_T, 3, seeds)
    z = [
        (trajectory.states[k + 1] - trajectory.means[k]) / trajectory.stds[k]
        for k in range(len(trajectory.stds) - 1)
    ]
    drawn = torch.stack([x_T.flatten(), *(each.flatten() for each in z)])
    assert_close(drawn.std(1), torch.ones(3), rtol=0.02, atol=0)
    correlations = torch.corrcoef(drawn)
    assert_close(correlations, torch.eye(3), rtol=0, atol=0.03)


@pytest.mark.parametrize("batch_size", [1, 2, 3, N, 100])
def test_sample_is_the_same_alone_among_many_and_in_any_order(linear, batch_size):
    """To the bit."""
    x_T, whole = sampler.noise(linear, SEEDS), rollout(linear)
    for picked in ([0], [4], [6, 5, 4, 3, 2, 1, 0], [2, 2, 5], range(1, 6)):
        picked = list(picked)
        seeds = [SEEDS[i] for i in picked]
        assert sampler.noise(linear, seeds).equal(x_T[picked])
        part = rollout(linear, seeds, batch_size=batch_size)
        assert part.states.equal(whole.states[:, picked])
        assert part.means.equal(whole.means[:, picked])
        assert part.log_probs.equal(whole.log_probs[:, picked])


@pytest.mark.parametrize("batch_size", [1, 3])
def test_sample_of_a_network_is_the_same_alone_and_among_many(policy, batch_size):
    whole, picked = rollout(policy), [5, 0, 3]
    part = rollout(policy, [SEEDS[i] for i in picked], batch_size=batch_size)
    assert_close(part.states, whole.states[:, picked], rtol=1e-4, atol=1e-4)
    assert_close(part.log_probs, whole.log_probs[:, picked], rtol=1e-4, atol=1e-4)


def test_other_seeds_give_other_steps(policy):
    x_T = sampler.noise(policy, SEEDS)
    one, other = (sampler.rollout(policy, x_T, STEPS, s) for s in (SEEDS, [s + 1 for s in SEEDS]))
    assert one.states[0].equal(other.states[0])
    assert one.means[0].equal(other.means[0])
    assert (one.states[1] != other.states[1]).any((1, 2, 3)).all()


# ------------------------------------------------------------------------------- samples


def test_deterministic_sampler_is_a_function_of_the_noise(policy):
    trajectory = rollout(policy, eta=0.0)
    x_T = sampler.noise(policy, SEEDS)
    assert sampler.rollout(policy, x_T, STEPS, None, 0.0).states.equal(trajectory.states)
    assert (trajectory.log_probs == 0).all() and (trajectory.stds == 0).all()
    assert sampler.sample(policy, x_T, STEPS).equal(trajectory.x_0)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_sample_is_the_end_of_the_rollout(policy, eta):
    x_T = sampler.noise(policy, SEEDS)
    x_0 = sampler.sample(policy, x_T, STEPS, eta, SEEDS)
    assert x_0.equal(rollout(policy, eta=eta).x_0)
    assert x_0.shape == x_T.shape and not x_0.requires_grad


def test_sample_draws_the_pictures_of_diffusers_pipeline(policy):
    pipeline = DDIMPipeline(policy.unet, DDIMScheduler.from_config(policy.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        N, generators(stream=0), eta=0.0, num_inference_steps=STEPS, output_type="np"
    ).images

    ours = sampler.sample(policy, sampler.noise(policy, SEEDS), STEPS)

    rescaled = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert_close(rescaled, torch.from_numpy(theirs), rtol=1e-5, atol=1e-5)
    difference = rewards.to_uint8(ours).int() - torch.from_numpy(theirs * 255).round().int()
    assert difference.abs().max() <= 1  # a value at a rounding edge


@pytest.mark.parametrize("skip", [0, 4])
def test_samples_of_a_batch_may_differ_in_eta(linear, skip):
    etas, x_T = torch.tensor([0, 1, 0.3, 0, 1, 0.7, 0]), sampler.noise(linear, SEEDS)
    mixed = sampler.sample(linear, x_T, STEPS, etas, SEEDS, batch_size=3, skip=skip)
    alone = [
        sampler.sample(linear, x[None], STEPS, eta.item(), [seed], skip=skip)
        for x, eta, seed in zip(x_T, etas, SEEDS, strict=True)
    ]
    assert mixed.equal(torch.cat(alone))
    with pytest.raises(ValueError, match="must lie between"):
        sampler.sample(linear, x_T, STEPS, etas * 2, SEEDS)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_denoised_states(policy, eta):
    trajectory = rollout(policy, eta=eta)
    expected = sampler.denoised(policy, trajectory, batch_size=3)
    assert expected.shape == (STEPS, N, 3, 8, 8) and not expected.requires_grad
    assert_close(expected[-1], trajectory.x_0, rtol=1e-5, atol=1e-5)
    x_t, t = trajectory.states[2], trajectory.timesteps[2]
    with torch.no_grad():
        eps = policy.unet(x_t, t).sample
    a_t = policy.alpha_bar[t]
    by_hand = ((x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()).clamp(-1, 1)
    assert_close(expected[2], by_hand, rtol=1e-4, atol=1e-4)  # divided by √ᾱ_t ≈ 0.1


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("skip", [0, 1, STEPS - 1])
def test_sampling_from_the_middle_is_the_end_of_the_chain(policy, eta, skip):
    whole = rollout(policy, eta=eta)
    x_0 = sampler.sample(policy, whole.states[skip], STEPS, eta, SEEDS, skip=skip)
    assert x_0.equal(whole.x_0)


def test_conditions_go_with_their_samples(policy, monkeypatch):
    """In batches, and in the trajectory."""
    context = Context(tuple("abcdefg"), torch.arange(N).view(N, 1, 1).float())
    seen = []

    def blind(policy, x_t, t, t_prev, eta, context):
        seen.append((context.prompts, context.embeddings.flatten().tolist()))
        return transition(policy, x_t, t, t_prev, eta)

    monkeypatch.setattr(sampler, "transition", blind)
    trajectory = rollout(policy, context=context, batch_size=3)
    batches = [(tuple("abc"), [0, 1, 2]), (tuple("def"), [3, 4, 5]), (("g",), [6])]
    assert seen == batches * STEPS
    assert trajectory.context is context
    seen.clear()
    sampler.sample(policy, trajectory.states[4], STEPS, context=context, batch_size=3, skip=4)
    assert seen == batches * (STEPS - 4)
    seen.clear()
    sampler.denoised(policy, trajectory, batch_size=3)
    assert seen == batches * STEPS


# ------------------------------------------------------------------------------- memory


def test_states_move_to_the_cpu_where_a_gpu_has_no_room(monkeypatch):
    gpu = SimpleNamespace(device=torch.device("cuda:0"), image_shape=(3, 256, 256))
    gigabytes = 4 * 81 * 100 * 3 * 256**2 / 1e9  # states and means of 100 trajectories of 40 steps
    for free, expected in ((4.1 * gigabytes, "cuda:0"), (3.9 * gigabytes, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, f=free: (f * 1e9, 0))
        assert sampler.roomy_device(gpu, 100, 40) == torch.device(expected)


def test_states_stay_on_a_cpu(policy):
    assert sampler.roomy_device(policy, 10**9, 40) == torch.device("cpu")
