"""The transition against diffusers' own DDIM step; loading and saving."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from torch.testing import assert_close

from ddpo_lib import policy as policies
from ddpo_lib.policy import Policy, predict_noise, timesteps, transition


class FixedNoise:
    """In the network's place: predicts the noise that it was given."""

    device = torch.device("cpu")

    def __init__(self, eps):
        self.eps = eps

    def __call__(self, x_t, t):
        return SimpleNamespace(sample=self.eps)


def setting(n_steps, clip_sample=True):
    """Every step of a schedule at once: policy, diffusers' scheduler, x_t, t, t_prev and noise."""
    scheduler = DDPMScheduler(1000, clip_sample=clip_sample)
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(n_steps)
    random = torch.randn(3, n_steps, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t, eps, z = random
    policy = Policy(FixedNoise(eps), scheduler, bf16=False)
    t = ddim.timesteps
    return policy, ddim, x_t, t, torch.cat([t[1:], torch.tensor([-1])]), z


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n_steps", [40, 20])
def test_transition_is_diffusers_ddim_step_at_every_step(n_steps, eta, clip_sample):
    policy, ddim, x_t, t, t_prev, z = setting(n_steps, clip_sample)
    eps = policy.unet.eps

    ours = transition(policy, x_t, t, t_prev, eta)

    for i in range(n_steps):
        one = slice(i, i + 1)

        def step(noise, one=one, i=i):
            return ddim.step(eps[one], t[i], x_t[one], eta=eta, variance_noise=noise)

        mean, sampled = step(torch.zeros_like(z[one])), step(z[one])
        assert_close(ours.mean[one], mean.prev_sample, rtol=1e-5, atol=1e-6)
        assert_close(ours.denoised[one], mean.pred_original_sample, rtol=1e-5, atol=1e-6)
        drawn = ours.mean[one] + ours.std[i] * z[one]
        assert_close(drawn, sampled.prev_sample, rtol=1e-5, atol=1e-6)
    assert ours.std[-1] == 0
    assert (ours.std[:-1] > 0).all() == (eta > 0)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_transition_passes_the_gradient_that_diffusers_step_passes(eta):
    """Saturated pixels pass none through the clamped picture, all pixels pass the direct term."""
    policy, ddim, x_t, t, t_prev, weight = setting(20)
    eps = policy.unet.eps.requires_grad_()

    (transition(policy, x_t, t, t_prev, eta).mean * weight).sum().backward()
    ours, eps.grad = eps.grad, None
    for i in range(20):
        one = slice(i, i + 1)
        nothing = torch.zeros_like(x_t[one])
        step = ddim.step(eps[one], t[i], x_t[one], eta=eta, variance_noise=nothing)
        (step.prev_sample * weight[one]).sum().backward()

    assert_close(ours, eps.grad, rtol=1e-4, atol=1e-6)
    saturated = transition(policy, x_t, t, t_prev, eta).denoised.abs() == 1
    assert 0.1 < saturated.float().mean() < 0.9


def test_mixed_timesteps_equal_one_by_one(policy):
    generator = torch.Generator().manual_seed(1)
    x_t = torch.randn(12, 3, 8, 8, generator=generator)
    t = torch.randint(0, 1000, (12,), generator=generator)
    t_prev = t - 50

    mixed = transition(policy, x_t, t, t_prev)

    for i in range(12):
        one = slice(i, i + 1)
        alone = transition(policy, x_t[one], t[one], t_prev[one])
        assert_close(mixed.mean[one], alone.mean, rtol=1e-5, atol=1e-5)
        assert_close(mixed.denoised[one], alone.denoised, rtol=1e-5, atol=1e-5)
        assert_close(mixed.std[one], alone.std)


def test_network_sees_its_own_timestep(policy):
    x_t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0, 500, 999])
    assert_close(predict_noise(policy, x_t, t), policy.unet(x_t, t).sample)
    other = predict_noise(policy, x_t, t + torch.tensor([50, -50, -50]))
    assert ((other - predict_noise(policy, x_t, t)).abs().amax((1, 2, 3)) > 1e-3).all()


def test_bf16_runs_the_network_only(new_policy):
    x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([975, 500])
    half, full = (transition(new_policy(bf16=on), x_t, t, t - 25) for on in (True, False))
    assert predict_noise(new_policy(bf16=True), x_t, t).dtype == torch.float32
    assert half.mean.dtype == half.std.dtype == half.denoised.dtype == torch.float32
    assert not half.mean.equal(full.mean)
    assert_close(half.mean, full.mean, rtol=0.02, atol=0.02)
    assert half.std.equal(full.std)


@pytest.mark.parametrize("n_steps", [1, 20, 30, 40, 999, 1000])
def test_timesteps_are_diffusers_ddim_timesteps(policy, n_steps):
    ddim = DDIMScheduler.from_config(policy.scheduler.config)
    ddim.set_timesteps(n_steps)
    assert timesteps(policy, n_steps).equal(ddim.timesteps)


@pytest.mark.parametrize("n_steps", [0, 1001])
def test_impossible_number_of_steps_is_an_error(policy, n_steps):
    with pytest.raises(ValueError, match=f"n_steps={n_steps}: must lie between 1 and .* 1000"):
        timesteps(policy, n_steps)


def test_image_shape(policy, new_policy):
    assert policy.image_shape == (3, 8, 8)
    assert new_policy(channels=1).image_shape == (1, 8, 8)


def test_saved_policy_loads_here_and_in_plain_diffusers(new_policy, tmp_path):
    policy = new_policy(seed=5, clip_sample=False)
    policies.save(policy, tmp_path / "p")

    ours = policies.load(tmp_path / "p", device="cpu", bf16=False)
    theirs = DDPMPipeline.from_pretrained(tmp_path / "p")

    for unet in (ours.unet, theirs.unet):
        for name, value in policy.unet.state_dict().items():
            assert unet.state_dict()[name].equal(value), name
    for scheduler in (ours.scheduler, theirs.scheduler):
        assert scheduler.alphas_cumprod.equal(policy.alpha_bar)
        assert scheduler.config.clip_sample is False
    assert not ours.unet.training
    assert not ours.bf16
    assert (tmp_path / "p/unet/diffusion_pytorch_model.safetensors").exists()


def test_missing_folder_is_one_clear_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="the folder does not exist"):
        policies.load(tmp_path / "nothing")


def test_unreachable_hub_id_is_one_clear_error():
    with pytest.raises(FileNotFoundError, match=r"'nobody/nothing'.*id of a model on the Hugging"):
        policies.load("nobody/nothing")


@pytest.mark.parametrize("damage", ["truncated", "empty", "removed", "no index", "no scheduler"])
def test_incomplete_folder_is_one_clear_error(policy, tmp_path, damage):
    policies.save(policy, tmp_path / "p")
    weights = tmp_path / "p/unet/diffusion_pytorch_model.safetensors"
    if damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "removed":
        weights.unlink()
    elif damage == "no index":
        (tmp_path / "p/model_index.json").unlink()
    else:
        (tmp_path / "p/scheduler/scheduler_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"cannot load a policy from .*Cause: \w+"):
        policies.load(tmp_path / "p")


@pytest.mark.parametrize(
    "config",
    [{"prediction_type": "v_prediction"}, {"clip_sample_range": 2.0}, {"thresholding": True}],
)
def test_other_kind_of_model_is_one_clear_error(policy, tmp_path, config):
    policies.save(Policy(policy.unet, DDPMScheduler(1000, **config)), tmp_path / "p")
    with pytest.raises(ValueError, match="only models that predict the noise"):
        policies.load(tmp_path / "p")


def test_model_with_a_learned_variance_is_one_clear_error(policy, tmp_path):
    config = dict(policy.unet.config) | {"out_channels": 6}
    policies.save(Policy(UNet2DModel.from_config(config), policy.scheduler), tmp_path / "p")
    with pytest.raises(ValueError, match="'learned variance': True"):
        policies.load(tmp_path / "p")


def test_a_long_leap_to_the_end_of_the_chain_is_finite(policy):
    """At eta = 1 nothing is left for the direction term there, and rounding makes it less."""
    t, t_prev = torch.arange(800, 1000).repeat(3), torch.arange(3).repeat_interleave(200)
    x_t = torch.zeros(len(t), 3, 2, 2)
    fixed = Policy(FixedNoise(torch.ones_like(x_t)), policy.scheduler, bf16=False)
    assert transition(fixed, x_t, t, t_prev).mean.isfinite().all()
