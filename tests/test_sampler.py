"""Rollouts against a chain of diffusers' own steps, replay, seeds and batch sizes."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from ddpo_lib import ppo, rewards, sampler
from ddpo_lib.policy import Policy, transition

N, STEPS = 7, 10


def rollout(policy, seed=0, eta=1.0, **options):
    x_T = sampler.noise(policy, N, seed=11)
    generator = torch.Generator().manual_seed(seed)
    return sampler.rollout(policy, x_T, STEPS, generator, eta, **options)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_states_are_a_chain_of_diffusers_steps(policy, eta):
    ddim = DDIMScheduler.from_config(policy.scheduler.config)
    ddim.set_timesteps(STEPS)
    generator = torch.Generator().manual_seed(0)
    states = [sampler.noise(policy, N, seed=11)]
    with torch.no_grad():
        for t in ddim.timesteps:
            z = torch.randn(states[0].shape, generator=generator)
            eps = policy.unet(states[-1], t).sample
            step = ddim.step(eps, t, states[-1], eta=eta, variance_noise=z)
            states.append(step.prev_sample)

    trajectory = rollout(policy, eta=eta)

    assert trajectory.timesteps.equal(ddim.timesteps)
    assert trajectory.t_prev.tolist() == [*ddim.timesteps[1:].tolist(), -1]
    assert_close(trajectory.states, torch.stack(states), rtol=1e-5, atol=1e-5)
    assert trajectory.x_0.equal(trajectory.states[STEPS])


def test_shapes(policy):
    trajectory = rollout(policy)
    assert trajectory.states.shape == (STEPS + 1, N, 3, 8, 8)
    assert trajectory.timesteps.shape == (STEPS,)
    assert trajectory.log_probs.shape == (STEPS, N)
    assert not trajectory.states.requires_grad
    assert not trajectory.log_probs.requires_grad


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_replayed_trajectory_gives_the_stored_log_probs(policy, eta, reduction):
    trajectory = rollout(policy, eta=eta, reduction=reduction)
    every_k, every_i = torch.arange(STEPS).repeat_interleave(N), torch.arange(N).repeat(STEPS)
    shuffled = torch.randperm(STEPS * N, generator=torch.Generator().manual_seed(0))
    k, i = every_k[shuffled], every_i[shuffled]

    replayed = ppo.score(policy, trajectory, k, i)

    tolerance = 1e-5 if reduction == "mean" else 1e-3
    assert_close(replayed, trajectory.log_probs[k, i], rtol=1e-5, atol=tolerance)
    assert trajectory.log_probs[:-1].std() > 0


def test_log_probs_are_those_of_the_noise_that_was_drawn(policy):
    """log N(mean + std z; mean, std) = −z²/2 − log std − log √2π, averaged over the pixels."""
    trajectory = rollout(policy)
    generator = torch.Generator().manual_seed(0)
    for k in range(STEPS - 1):
        z = torch.randn(trajectory.x_0.shape, generator=generator)
        t, t_prev = trajectory.timesteps[k].view(1), trajectory.t_prev[k].view(1)
        std = transition(policy, trajectory.states[k, :1], t, t_prev).std
        expected = (-(z**2) / 2).mean((1, 2, 3)) - std.log() - 0.9189385
        assert_close(trajectory.log_probs[k], expected, rtol=1e-4, atol=1e-4)


def test_last_step_is_no_action(policy):
    trajectory = rollout(policy)
    assert (trajectory.log_probs[-1] == 0).all()
    assert (trajectory.log_probs[:-1] != 0).all()
    k, i = ppo.stochastic_pairs(policy, trajectory)
    assert sorted(zip(k.tolist(), i.tolist(), strict=True)) == [
        (k, i) for k in range(STEPS - 1) for i in range(N)
    ]


@pytest.mark.parametrize("batch_size", [1, 3, N])
def test_batch_size_changes_nothing(policy, batch_size):
    whole, split = rollout(policy), rollout(policy, batch_size=batch_size)
    assert_close(split.states, whole.states, rtol=1e-5, atol=1e-5)
    assert_close(split.log_probs, whole.log_probs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3, N])
def test_noise_is_the_same_to_the_bit_for_every_batch_size(batch_size):
    """With a network that works pixel by pixel nothing rounds differently. (25 pixels, for the
    generator works in blocks of 16.)"""

    class Linear:
        device = torch.device("cpu")
        config = SimpleNamespace(sample_size=5, in_channels=1)

        def __call__(self, x_t, t):
            return SimpleNamespace(sample=0.3 * x_t)

    policy = Policy(Linear(), DDPMScheduler(1000), bf16=False)
    assert rollout(policy, batch_size=batch_size).states.equal(rollout(policy).states)


def test_seeds(policy):
    assert rollout(policy, seed=0).states.equal(rollout(policy, seed=0).states)
    assert not rollout(policy, seed=0).states[1].equal(rollout(policy, seed=1).states[1])
    torch.manual_seed(1)
    zero = sampler.noise(policy, N, 0)
    torch.manual_seed(2)
    assert zero.equal(sampler.noise(policy, N, 0))
    assert not zero.equal(sampler.noise(policy, N, 1))
    assert zero.shape == (N, 3, 8, 8)
    assert_close(zero.std(), torch.tensor(1.0), rtol=0.1, atol=0)


def test_deterministic_sampler_is_a_function_of_the_noise(policy):
    trajectory = rollout(policy, seed=0, eta=0.0)
    assert trajectory.states.equal(rollout(policy, seed=1, eta=0.0).states)
    assert (trajectory.log_probs == 0).all()
    x_T = sampler.noise(policy, N, seed=11)
    assert sampler.sample(policy, x_T, STEPS).equal(trajectory.x_0)


def test_sample_is_the_end_of_the_rollout(policy):
    x_T = sampler.noise(policy, N, seed=11)
    x_0 = sampler.sample(policy, x_T, STEPS, 1.0, torch.Generator().manual_seed(0))
    assert x_0.equal(rollout(policy).x_0)


def test_sample_draws_the_pictures_of_diffusers_pipeline(policy):
    pipeline = DDIMPipeline(policy.unet, DDIMScheduler.from_config(policy.scheduler.config))
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        4, torch.Generator().manual_seed(0), eta=0.0, num_inference_steps=STEPS, output_type="np"
    ).images

    ours = sampler.sample(policy, sampler.noise(policy, 4, seed=0), STEPS)

    rescaled = (ours / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert_close(rescaled, torch.from_numpy(theirs), rtol=1e-5, atol=1e-5)
    difference = rewards.to_uint8(ours).int() - torch.from_numpy(theirs * 255).round().int()
    assert difference.abs().max() <= 1  # a value at a rounding edge


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_denoised_states(policy, eta):
    trajectory = rollout(policy, eta=eta)
    expected = sampler.denoised(policy, trajectory, batch_size=3)
    assert expected.shape == (STEPS, N, 3, 8, 8)
    assert_close(expected[-1], trajectory.x_0, rtol=1e-5, atol=1e-5)
    x_t, t = trajectory.states[2], trajectory.timesteps[2]
    with torch.no_grad():
        eps = policy.unet(x_t, t).sample
    a_t = policy.alpha_bar[t]
    by_hand = ((x_t - (1 - a_t).sqrt() * eps) / a_t.sqrt()).clamp(-1, 1)
    assert_close(expected[2], by_hand, rtol=1e-4, atol=1e-4)  # divided by √ᾱ_t ≈ 0.1


@pytest.mark.parametrize("shape", [(2, 3, 16, 16), (2, 1, 8, 8)])
def test_noise_that_does_not_fit_is_one_clear_error(policy, shape):
    with pytest.raises(ValueError, match=r"does not fit a policy .* shape \(3, 8, 8\)"):
        sampler.sample(policy, torch.randn(shape), STEPS)


def test_stochastic_sampler_needs_a_generator(policy):
    with pytest.raises(ValueError, match="needs a generator"):
        sampler.sample(policy, sampler.noise(policy, 2, 0), STEPS, eta=1.0)


def test_share_of_a_rollout_is_its_part_of_the_whole(policy):
    x_T = sampler.noise(policy, 5, seed=0)
    whole = sampler.rollout(policy, x_T, 4, torch.Generator().manual_seed(1))
    part = sampler.rollout(
        policy, x_T, 4, torch.Generator().manual_seed(1), share=slice(2, 4), batch_size=1
    )
    torch.testing.assert_close(part.states, whole.states[:, 2:4], rtol=0, atol=1e-5)
    torch.testing.assert_close(part.log_probs, whole.log_probs[:, 2:4], rtol=0, atol=1e-5)


def test_states_move_to_the_cpu_where_a_gpu_has_no_room(monkeypatch):
    gpu = SimpleNamespace(device=torch.device("cuda:0"), image_shape=(3, 256, 256))
    gigabytes = 4 * 41 * 100 * 3 * 256**2 / 1e9  # of 100 trajectories of 40 steps
    for free, expected in ((4.1 * gigabytes, "cuda:0"), (3.9 * gigabytes, "cpu")):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, f=free: (f * 1e9, 0))
        assert sampler.roomy_device(gpu, 100, 40) == torch.device(expected)


def test_states_stay_on_a_cpu(policy):
    assert sampler.roomy_device(policy, 10**9, 40) == torch.device("cpu")
