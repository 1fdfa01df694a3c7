"""DDIM inversion against diffusers' inverse scheduler, exact round trips, closed forms."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, DDPMScheduler
from torch.testing import assert_close

from ddpo_lib import sampler
from ddpo_lib.inversion import invert, unclamped
from ddpo_lib.policy import Policy, steps

N, STEPS = 4, 10


class NoiseOf:
    """In the network's place: predicts f(x_t, t)."""

    device = torch.device("cpu")
    config = SimpleNamespace(sample_size=4, in_channels=1)

    def __init__(self, f):
        self.f = f

    def __call__(self, x_t, t):
        return SimpleNamespace(sample=self.f(x_t, t))


def blind(scheduler=None) -> Policy:
    """Its noise depends on the timestep alone, a different one at each."""
    bank = torch.randn(1000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    scheduler = scheduler or DDPMScheduler(1000, clip_sample=False)
    return Policy(NoiseOf(lambda x_t, t: bank[t]), scheduler, bf16=False)


def gaussian(s) -> Policy:
    """The exact denoiser of pictures that are N(0, s² I)."""
    scheduler = DDPMScheduler(1000, clip_sample=False)

    def noise(x_t, t):
        a_t = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
        return x_t * (1 - a_t).sqrt() / (a_t * s**2 + 1 - a_t)

    return Policy(NoiseOf(noise), scheduler, bf16=False)


def pictures(policy, seed=3):
    return 0.4 * torch.randn(N, *policy.image_shape, generator=torch.Generator().manual_seed(seed))


def rms(difference):
    return difference.square().mean().sqrt().item()


@pytest.mark.filterwarnings("ignore:.*starts from pure noise")
@pytest.mark.parametrize("n_steps", [1, 10, 30, 50])
def test_states_are_a_chain_of_diffusers_inverse_steps(policy, n_steps):
    """Theirs asks the network for the noise of the *coming* timestep, as one evaluation here does.

    Theirs clamps x~ where its configuration says so; ours never does.
    """
    inverse = DDIMInverseScheduler.from_config(policy.scheduler.config, clip_sample=False)
    inverse.set_timesteps(n_steps)
    states = [pictures(policy)]
    with torch.no_grad():
        for t in inverse.timesteps:
            eps = policy.unet(states[-1], t).sample
            states.append(inverse.step(eps, t, states[-1]).prev_sample)

    ours = invert(policy, states[0], n_steps)

    assert inverse.timesteps.flip(0).equal(steps(policy, n_steps)[0])
    assert_close(ours, torch.stack(states[::-1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDPMScheduler(1000, clip_sample=False),
        DDPMScheduler(1000, clip_sample=True, clip_sample_range=2),
        DDPMScheduler(1000, clip_sample=False, timestep_spacing="trailing"),
        DDIMScheduler(100, 0.05, 0.1, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    ],
)
@pytest.mark.parametrize("n_evaluations", [1, 3])
def test_round_trip_is_exact_where_the_noise_does_not_depend_on_the_state(n_evaluations, scheduler):
    policy = unclamped(blind(scheduler))
    x_0 = pictures(policy)

    states = invert(policy, x_0, STEPS, n_evaluations)

    assert states.shape == (STEPS + 1, N, 1, 4, 4)
    assert states[-1].equal(x_0)
    forward = sampler.rollout(policy, states[0], STEPS, None, eta=0.0).states
    assert_close(forward, states, rtol=1e-4, atol=2e-4)  # x_0 is x_T's rounding over √ᾱ_T
    for skip in range(STEPS):
        x = sampler.sample(policy, states[skip], STEPS, skip=skip)
        assert_close(x, x_0, rtol=1e-4, atol=2e-4)


def test_more_evaluations_lead_to_the_exact_inverse():
    policy = gaussian(0.5)
    x_0 = pictures(policy)
    errors = []
    for n_evaluations in (1, 3, 30):
        x_T = invert(policy, x_0, STEPS, n_evaluations)[0]
        errors.append(rms(sampler.sample(policy, x_T, STEPS) - x_0))
    assert errors[0] > 3 * errors[1] > 9 * errors[2]
    assert errors[2] < 1e-3


def test_more_steps_make_the_usual_inversion_better():
    policy = gaussian(0.5)
    x_0 = pictures(policy)
    errors = [
        rms(sampler.sample(policy, invert(policy, x_0, n_steps)[0], n_steps) - x_0)
        for n_steps in (10, 50, 200, 1000)
    ]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 8 * errors[3]


def test_inverted_gaussian_pictures_are_unit_noise():
    """The flow of N(0, s² I) to N(0, I) multiplies by √(ᾱ_T s² + 1 - ᾱ_T) / s."""
    s = 0.5
    policy = gaussian(s)
    x_0 = pictures(policy)
    t = steps(policy, 1000)[0][0]
    a_T = policy.alpha_bar[t]
    expected = x_0 * (a_T * s**2 + 1 - a_T).sqrt() / s
    assert_close(invert(policy, x_0, 1000)[0], expected, rtol=0.02, atol=0.005)


def test_inversion_does_not_clamp(new_policy):
    clamping, free = new_policy(clip_sample=True), new_policy(clip_sample=False)
    x_0 = 3 * pictures(free)
    assert invert(clamping, x_0, STEPS).equal(invert(free, x_0, STEPS))


def test_unclamped(policy):
    free = unclamped(policy)
    assert policy.scheduler.config.clip_sample and not free.scheduler.config.clip_sample
    assert free.alpha_bar.equal(policy.alpha_bar)
    assert free.unet is policy.unet and free.bf16 == policy.bf16
    x_T = sampler.noise(policy, [0, 1])
    assert sampler.sample(policy, x_T, STEPS).abs().max() <= 1
    assert sampler.sample(free, x_T, STEPS).abs().max() > 1


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batch_size_changes_nothing(policy, batch_size):
    x_0 = pictures(policy)
    whole = invert(policy, x_0, STEPS, 2)
    split = invert(policy, x_0, STEPS, 2, batch_size=batch_size)
    assert_close(split, whole, rtol=1e-4, atol=1e-4)


def test_no_gradient_is_kept(policy):
    x_0 = pictures(policy).requires_grad_()
    assert not invert(policy, x_0, STEPS)[0].requires_grad
