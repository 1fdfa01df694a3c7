"""Timesteps and transition against diffusers' own DDIM; what loads, is refused and is saved."""

import json
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    LDMPipeline,
    PNDMScheduler,
    UNet2DModel,
    VQModel,
)
from torch.testing import assert_close

from ddpo_lib import policy as policies
from ddpo_lib.policy import Context, Policy, predict_noise, sigma, steps, transition

SPACINGS = ("leading", "trailing", "linspace")


class FixedOutput:
    """In the network's place: gives what it was given."""

    device = torch.device("cpu")

    def __init__(self, output):
        self.output = output

    def __call__(self, x_t, t):
        return SimpleNamespace(sample=self.output)


# ----------------------------------------------------------------------------------- timesteps


@pytest.mark.filterwarnings("ignore:n_steps=")
@pytest.mark.parametrize("n_steps", [1, 7, 13, 40, 50, 501, 999, 1000])
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_are_diffusers_ddim_timesteps(new_policy, spacing, offset, n_steps):
    policy = new_policy(timestep_spacing=spacing, steps_offset=offset)
    ddim = DDIMScheduler.from_config(policy.scheduler.config)
    ddim.set_timesteps(n_steps)
    if ddim.timesteps[0] == 1000:  # diffusers' own step would fail there
        with pytest.raises(ValueError, match="n_steps=1000: .* run from 1000 to 1, which leaves"):
            steps(policy, n_steps)
        return

    t, t_prev = steps(policy, n_steps)

    assert t.dtype == t_prev.dtype == torch.int64 and t.shape == t_prev.shape == (n_steps,)
    assert t.equal(ddim.timesteps)
    went_to, variance = [], ddim._get_variance
    ddim._get_variance = lambda at, to: went_to.append(to) or variance(at, to)
    for one in t:
        ddim.step(torch.zeros(1), one, torch.zeros(1))
    assert t_prev.equal(torch.stack(went_to))


def test_timesteps_known_by_heart(policy):
    t, t_prev = steps(policy, 40)
    assert t.tolist() == list(range(975, -1, -25))
    assert t_prev.tolist() == list(range(950, -26, -25))


@pytest.mark.filterwarnings("ignore:n_steps=")
def test_settings_given_by_position_count(policy):
    """diffusers takes them for defaults: its from_config would make 1000 timesteps of these 100."""
    t, t_prev = steps(Policy(policy.unet, DDPMScheduler(100)), 4)
    assert t.tolist() == [75, 50, 25, 0] and t_prev.tolist() == [50, 25, 0, -25]


def test_steps_leave_the_policys_scheduler_alone(policy):
    before = policy.scheduler.timesteps.clone()
    steps(policy, 40)
    assert policy.scheduler.timesteps.equal(before)
    assert policy.scheduler.num_inference_steps is None


def test_number_of_steps_at_which_diffusers_leaves_the_schedule_is_an_error(new_policy):
    """A rounding error gives it one timestep more than it was asked for, -1."""
    policy = new_policy(timestep_spacing="trailing")
    with pytest.raises(ValueError, match="n_steps=61: .* run from 999 to -1, which leaves"):
        steps(policy, 61)


@pytest.mark.parametrize(
    "n_steps, t, signal", [(1, 0, "1.00"), (2, 500, "0.28"), (501, 500, "0.28")]
)
def test_chain_that_starts_too_late_warns(policy, n_steps, t, signal):
    with pytest.warns(UserWarning, match=f"timestep {t} of 1000, where {signal} of the image"):
        steps(policy, n_steps)


def test_usual_chains_do_not_warn(policy, new_policy):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n_steps in (3, 20, 40, 50, 999, 1000):
            steps(policy, n_steps)
        steps(new_policy(timestep_spacing="trailing"), 501)


# ---------------------------------------------------------------------------------- transition


def setting(n_steps, make=DDPMScheduler, **config):
    """Every step of a chain at once: policy, diffusers' scheduler, x_t, t, t_prev and noise."""
    scheduler = make(1000, **config)
    ddim = DDIMScheduler.from_config(scheduler.config)
    ddim.set_timesteps(n_steps)
    random = torch.randn(3, n_steps, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x_t, output, z = random
    policy = Policy(FixedOutput(output), scheduler, bf16=False)
    return policy, ddim, x_t, *steps(policy, n_steps), z


def assert_same_steps(policy, ddim, x_t, t, t_prev, z, eta, atol=1e-6):
    """Our one transition of all against their `step`, one by one."""
    output = policy.unet.output
    ours = transition(policy, x_t, t, t_prev, eta)
    for i in range(len(t)):
        one = slice(i, i + 1)

        def step(noise, one=one, i=i):
            return ddim.step(output[one], t[i], x_t[one], eta=eta, variance_noise=noise)

        mean, sampled = step(torch.zeros_like(z[one])), step(z[one])
        assert_close(ours.mean[one], mean.prev_sample, rtol=1e-5, atol=atol)
        # x~ is a difference divided by this: the float error of a v that went through eps.
        scale = policy.alpha_bar[t[i]].sqrt()
        theirs = mean.pred_original_sample
        assert_close(ours.denoised[one] * scale, theirs * scale, rtol=1e-5, atol=atol)
        drawn = ours.mean[one] + ours.std[i] * z[one]
        assert_close(drawn, sampled.prev_sample, rtol=1e-5, atol=atol)
    return ours


@pytest.mark.parametrize("clip_sample", [True, False])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("n_steps", [40, 20])
def test_transition_is_diffusers_ddim_step_at_every_step(n_steps, eta, clip_sample):
    ours = assert_same_steps(*setting(n_steps, clip_sample=clip_sample), eta)
    assert ours.std[-1] == 0
    assert (ours.std[:-1] > 0).all() == (eta > 0)


@pytest.mark.parametrize("to_one", [True, False])
@pytest.mark.parametrize("clip", [{"clip_sample": False}, {"clip_sample_range": 2.0}])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("spacing, offset", [("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_transition_follows_every_field_of_the_scheduler(
    spacing, offset, eta, prediction, clip, to_one
):
    scheduler = {"timestep_spacing": spacing, "steps_offset": offset, "set_alpha_to_one": to_one}
    scheduler |= {"prediction_type": prediction, "beta_schedule": "scaled_linear"} | clip
    chain = setting(13, DDIMScheduler, **scheduler)
    ours = assert_same_steps(*chain, eta, atol=1e-5)
    limit = clip.get("clip_sample_range", float("inf"))
    assert ours.denoised.abs().max() <= limit
    assert ours.denoised.abs().max() > 1


def test_last_step_may_stop_short_of_the_clean_image():
    policy = setting(10, DDIMScheduler, set_alpha_to_one=False)[0]
    t, t_prev = torch.tensor([100, 0]), torch.tensor([-1, -100])
    assert (policy.alpha_bar_at(t_prev) == policy.alpha_bar[0]).all() and policy.alpha_bar[0] < 1
    std = sigma(policy, t, t_prev)
    assert std[0] > 0 and std[1] == 0
    policy = setting(10, DDPMScheduler)[0]
    assert (policy.alpha_bar_at(t_prev) == 1).all()
    assert sigma(policy, t, t_prev).equal(torch.zeros(2))


def test_v_is_turned_into_the_noise():
    """x_t = √ᾱ x_0 + √(1 - ᾱ) ε and v = √ᾱ ε - √(1 - ᾱ) x_0 give ε and x_0 back."""
    scheduler = DDPMScheduler(1000, prediction_type="v_prediction", clip_sample=False)
    x_0, eps = torch.randn(2, 5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 10, 300, 600, 900])
    a_t = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    x_t = a_t.sqrt() * x_0 + (1 - a_t).sqrt() * eps
    v = a_t.sqrt() * eps - (1 - a_t).sqrt() * x_0
    policy = Policy(FixedOutput(v), scheduler, bf16=False)
    assert_close(predict_noise(policy, x_t, t), eps, rtol=1e-5, atol=1e-5)
    assert_close(transition(policy, x_t, t, t - 1).denoised, x_0, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("spacing, offset", [("leading", 0), ("leading", 1), ("trailing", 0)])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_whole_chain_is_diffusers_loop(policy, eta, spacing, offset, prediction, make):
    """With a real network, from its timesteps to the image."""
    config = {"timestep_spacing": spacing, "steps_offset": offset, "prediction_type": prediction}
    policy = Policy(policy.unet, make(1000, **config), bf16=False)
    ddim = DDIMScheduler.from_config(policy.scheduler.config)
    ddim.set_timesteps(13)
    generator = torch.Generator().manual_seed(1)
    x_T, *z = torch.randn(14, 2, 3, 8, 8, generator=generator)
    ours = theirs = x_T
    with torch.no_grad():
        for t, noise in zip(ddim.timesteps, z, strict=True):
            output = policy.unet(theirs, t).sample
            theirs = ddim.step(output, t, theirs, eta=eta, variance_noise=noise).prev_sample
        for t, t_prev, noise in zip(*steps(policy, 13), z, strict=True):
            step = transition(policy, ours, t.expand(2), t_prev.expand(2), eta)
            ours = step.mean + step.std.view(-1, 1, 1, 1) * noise
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("eta", [0.5, 1.0])
def test_transition_passes_the_gradient_that_diffusers_step_passes(eta):
    """Saturated pixels pass none through the clamped image, all pixels pass the direct term."""
    policy, ddim, x_t, t, t_prev, weight = setting(20)
    eps = policy.unet.output.requires_grad_()

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


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_mixed_timesteps_equal_one_by_one(new_policy, prediction):
    policy = new_policy(prediction_type=prediction)
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


def test_a_long_leap_to_the_end_of_the_chain_is_finite(policy):
    """At eta = 1 nothing is left for the direction term there, and rounding makes it less."""
    t, t_prev = torch.arange(800, 1000).repeat(3), torch.arange(3).repeat_interleave(200)
    x_t = torch.zeros(len(t), 3, 2, 2)
    fixed = Policy(FixedOutput(torch.ones_like(x_t)), policy.scheduler, bf16=False)
    assert transition(fixed, x_t, t, t_prev).mean.isfinite().all()


def test_network_sees_its_own_timestep(policy):
    x_t = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    t = torch.tensor([0, 500, 999])
    assert_close(predict_noise(policy, x_t, t), policy.unet(x_t, t).sample)
    other = predict_noise(policy, x_t, t + torch.tensor([50, -50, -50]))
    assert ((other - predict_noise(policy, x_t, t)).abs().amax((1, 2, 3)) > 1e-3).all()


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_bf16_runs_the_network_only(new_policy, prediction):
    x_t = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(3))
    t = torch.tensor([975, 500])
    half, full = (
        transition(new_policy(bf16=on, prediction_type=prediction), x_t, t, t - 25)
        for on in (True, False)
    )
    assert predict_noise(new_policy(bf16=True), x_t, t).dtype == torch.float32
    assert half.mean.dtype == half.std.dtype == half.denoised.dtype == torch.float32
    assert not half.mean.equal(full.mean)
    assert_close(half.mean, full.mean, rtol=0.02, atol=0.02)
    assert half.std.equal(full.std)


FLOAT32 = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


@pytest.fixture
def tf32():
    """As a person may have allowed it, by each of torch's ways."""

    def legacy():
        torch.set_float32_matmul_precision("high")
        torch.backends.cudnn.allow_tf32 = True

    def single():
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        torch.backends.cudnn.conv.fp32_precision = "tf32"

    def general():
        torch.backends.fp32_precision = "tf32"

    yield {"legacy": legacy, "single": single, "general": general}
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = FLOAT32[0]


@pytest.mark.parametrize("way", ["legacy", "single", "general"])
def test_float32_is_no_tf32(new_policy, tf32, way):
    """Also after the call, for the backward pass; and without a warning."""
    if way != "legacy" and not hasattr(torch.backends.cudnn, "conv"):
        pytest.skip("this torch has one way only")
    x_t, t = torch.zeros(1, 3, 8, 8), torch.tensor([500])
    tf32[way]()
    predict_noise(new_policy(bf16=True), x_t, t)
    if way == "legacy":  # bf16 leaves it as it is
        assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predict_noise(new_policy(bf16=False), x_t, t)
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_tf32
    if hasattr(torch.backends.cudnn, "conv"):
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    if way != "general":  # where torch's own getter fails
        assert not torch.backends.cudnn.allow_tf32
        with torch.backends.cudnn.flags(enabled=True):  # fails where its settings contradict
            pass


# ------------------------------------------------------------------------------ shapes and text


@pytest.mark.parametrize("channels, size, shape", [(1, 8, (1, 8, 8)), (1, [8, 12], (1, 8, 12))])
def test_one_channel_and_oblong_images(new_policy, tmp_path, channels, size, shape):
    policy = new_policy(channels=channels, size=size)
    policies.save(policy, tmp_path / "p")
    loaded = policies.load(tmp_path / "p", "cpu", bf16=False)
    assert policy.image_shape == loaded.image_shape == shape
    x_t, t = (
        torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)),
        torch.tensor([9, 4]),
    )
    ours, theirs = (transition(p, x_t, t, t - 3) for p in (loaded, policy))
    assert ours.mean.shape == (2, *shape)
    assert_close(ours.mean, theirs.mean)


def test_image_shape(policy, new_policy):
    assert policy.image_shape == (3, 8, 8)
    assert new_policy(size=(8, 16)).image_shape == (3, 8, 16)


def test_pixels_are_the_images_and_there_is_no_text(policy):
    x_t, t = torch.randn(1, 3, 8, 8), torch.tensor([500])
    assert policies.decode(policy, x_t) is x_t
    assert policies.encode(policy, None) is None
    with pytest.raises(ValueError, match="takes no text: prompts must be None"):
        policies.encode(policy, ["a cat"])
    context = Context(("a cat",), torch.zeros(1, 77, 8))
    with pytest.raises(ValueError, match="takes no text: context must be None"):
        transition(policy, x_t, t, t - 50, context=context)


def test_context_of_some_samples():
    context = Context(("a", "b", "c"), torch.arange(3.0).view(3, 1, 1))
    for index, prompts in ((slice(1, 3), ("b", "c")), (torch.tensor([2, 0, 2]), ("c", "a", "c"))):
        some = context.select(index)
        assert some.prompts == prompts
        assert some.embeddings.equal(context.embeddings[index])


def test_import_is_light():
    script = "import sys, ddpo_lib.policy, ddpo_lib.guidance; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    loaded = set(loaded.split())
    assert "torch" in loaded
    assert not loaded & {"diffusers", "transformers", "open_clip", "huggingface_hub", "accelerate"}


# ------------------------------------------------------------------------- saved and loaded again


def same_weights(unet, state):
    return all(unet.state_dict()[name].equal(value) for name, value in state.items())


def test_saved_policy_loads_here_and_in_plain_diffusers(new_policy, tmp_path):
    policy = new_policy(seed=5, clip_sample=False)
    policies.save(policy, tmp_path / "p")

    ours = policies.load(tmp_path / "p", device="cpu", bf16=False)
    theirs = DDPMPipeline.from_pretrained(tmp_path / "p")

    for unet in (ours.unet, theirs.unet):
        assert same_weights(unet, policy.unet.state_dict())
    for scheduler in (ours.scheduler, theirs.scheduler):
        assert type(scheduler) is DDPMScheduler
        assert scheduler.alphas_cumprod.equal(policy.alpha_bar)
        assert scheduler.config.clip_sample is False
    assert not ours.unet.training
    assert not ours.bf16
    assert (tmp_path / "p/unet/diffusion_pytorch_model.safetensors").exists()


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o077, 0o600)])
def test_saved_files_have_the_users_permissions(new_policy, tmp_path, umask, mode):
    """Which safetensors does not ask for."""
    old = os.umask(umask)
    try:
        policies.save(new_policy(widths=(8,)), tmp_path / "p")
    finally:
        os.umask(old)
    files = [file for file in (tmp_path / "p").rglob("*") if file.is_file()]
    assert {file.stat().st_mode & 0o777 for file in files} == {mode}


def test_saved_folder_names_no_path_of_this_machine(policy, tmp_path):
    policies.save(policy, tmp_path / "a")
    policies.save(policies.load(tmp_path / "a", "cpu"), tmp_path / "b")
    files = sorted((tmp_path / "b").rglob("*.json"))
    assert len(files) == 3
    for file in files:
        assert str(tmp_path) not in file.read_text(encoding="utf-8")
        again = (tmp_path / "a" / file.relative_to(tmp_path / "b")).read_text(encoding="utf-8")
        assert file.read_text(encoding="utf-8") == again


CHAINS = [
    (DDPMScheduler, {"timestep_spacing": "trailing"}),
    (DDPMScheduler, {"prediction_type": "v_prediction", "clip_sample_range": 3.0}),
    (DDIMScheduler, {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}),
    (DDIMScheduler, {"timestep_spacing": "linspace", "beta_schedule": "squaredcos_cap_v2"}),
]


@pytest.mark.parametrize("make, config", CHAINS)
def test_saved_folder_draws_in_plain_diffusers_what_the_policy_draws(
    policy, tmp_path, make, config
):
    policies.save(Policy(policy.unet, make(1000, **config)), tmp_path / "a")
    ours = policies.load(tmp_path / "a", "cpu", bf16=False)
    policies.save(ours, tmp_path / "b")
    pipeline = DDIMPipeline.from_pretrained(tmp_path / "b")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    theirs = pipeline(2, generator, eta=0.0, num_inference_steps=7, output_type="np").images

    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for t, t_prev in zip(*steps(ours, 7), strict=True):
            x = transition(ours, x, t.expand(2), t_prev.expand(2), eta=0.0).mean

    assert type(ours.scheduler) is make
    x = (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert_close(x, torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)


def test_ddim_pipeline_loads_and_draws_as_a_ddpm_pipeline_too(policy, tmp_path):
    scheduler = DDIMScheduler(1000, beta_schedule="squaredcos_cap_v2", clip_sample=False)
    DDIMPipeline(policy.unet, scheduler).save_pretrained(tmp_path / "ddim")
    loaded = policies.load(tmp_path / "ddim", "cpu", bf16=False)
    assert same_weights(loaded.unet, policy.unet.state_dict())
    assert loaded.alpha_bar.equal(scheduler.alphas_cumprod)
    assert loaded.scheduler.config.clip_sample is False

    policies.save(loaded, tmp_path / "again")
    assert json.loads((tmp_path / "again/model_index.json").read_text())["_class_name"] == (
        "DDIMPipeline"
    )
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "again")
    assert pipeline.scheduler.alphas_cumprod.equal(scheduler.alphas_cumprod)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline(2, num_inference_steps=3, output_type="np").images
    assert drawn.shape == (2, 8, 8, 3) and np.isfinite(drawn).all()


# ------------------------------------------------------------------------------------ refusals


def edit(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def assert_refused(folder, found, supported):
    """By name, with what is supported."""
    with pytest.raises(ValueError) as caught:
        policies.load(folder, "cpu")
    text = str(caught.value)
    assert text.startswith(f"{folder}: not supported are {{{found}")
    assert f"supported are {{{supported}" in text


@pytest.mark.parametrize("make", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    "name, value, supported",
    [
        ("prediction_type", "sample", "('epsilon', 'v_prediction')"),
        ("thresholding", True, "(False,)"),
        ("rescale_betas_zero_snr", True, "(False,)"),
    ],
)
def test_other_schedule_is_refused(policy, tmp_path, make, name, value, supported):
    policies.save(Policy(policy.unet, make(1000, **{name: value})), tmp_path / "p")
    assert_refused(tmp_path / "p", f"{name!r}: {value!r}", f"{name!r}: {supported}")


def test_schedule_that_diffusers_ddim_does_not_have_is_refused(policy, tmp_path):
    policies.save(Policy(policy.unet, DDPMScheduler(1000, beta_schedule="sigmoid")), tmp_path / "p")
    assert_refused(tmp_path / "p", "'beta_schedule': 'sigmoid'", "'beta_schedule': ('linear', ")
    policies.save(Policy(policy.unet, DDPMScheduler(1000, timestep_spacing="odd")), tmp_path / "q")
    assert_refused(tmp_path / "q", "'timestep_spacing': 'odd'", "'timestep_spacing': ('leading', ")


@pytest.mark.parametrize("beta", [float("nan"), 0.0, 1.0, -0.1, 1.5, 0.99])
def test_impossible_betas_are_refused(policy, tmp_path, beta):
    """0.99 at each of the steps leaves nothing that float32 could hold."""
    betas = [0.01] * 500 + [beta] * 2 + [0.01] * 498 if beta != 0.99 else [beta] * 1000
    policies.save(Policy(policy.unet, DDPMScheduler(1000, trained_betas=betas)), tmp_path / "p")
    assert_refused(tmp_path / "p", "'betas': ", "'betas': ('num_train_timesteps of them, inside (0")


def test_betas_of_another_number_of_timesteps_are_refused(policy, tmp_path):
    scheduler = DDPMScheduler(1000, trained_betas=[0.01] * 100)
    policies.save(Policy(policy.unet, scheduler), tmp_path / "p")
    assert_refused(tmp_path / "p", "'betas': ", "'betas': ('num_train_timesteps of them")


def test_other_scheduler_is_refused(policy, tmp_path):
    DDPMPipeline(policy.unet, PNDMScheduler(1000)).save_pretrained(tmp_path / "p")
    supported = "'scheduler': ('DDPMScheduler', 'DDIMScheduler')"
    assert_refused(tmp_path / "p", "'scheduler': 'PNDMScheduler'", supported)


def test_latent_diffusion_is_refused(policy, tmp_path):
    """Its network has three channels, and its latents would pass for images."""
    vqvae = VQModel(norm_num_groups=4, block_out_channels=(4,), num_vq_embeddings=4)
    LDMPipeline(vqvae, policy.unet, DDIMScheduler(1000)).save_pretrained(tmp_path / "p")
    supported = "'pipeline': ('DDPMPipeline', 'DDIMPipeline', 'StableDiffusionPipeline')"
    assert_refused(tmp_path / "p", "'pipeline': 'LDMPipeline'", supported)


def test_other_pipeline_or_network_is_refused_before_it_is_read(policy, tmp_path):
    policies.save(policy, tmp_path / "p")
    (tmp_path / "p/unet/diffusion_pytorch_model.safetensors").unlink()
    index = tmp_path / "p/model_index.json"
    edit(index, unet=["diffusers", "UNet2DConditionModel"])
    assert_refused(tmp_path / "p", "'unet': 'UNet2DConditionModel'", "'unet': ('UNet2DModel',)")
    edit(index, _class_name="StableDiffusionPipeline", unet=["diffusers", "UNet2DModel"])
    assert_refused(tmp_path / "p", "'text-to-image unet': 'UNet2DModel'", "'text-to")
    edit(index, _class_name="FluxPipeline", unet=None, transformer=["diffusers", "Flux"])
    assert_refused(tmp_path / "p", "'pipeline': 'FluxPipeline'", "'pipeline': ('DDPM")


@pytest.mark.parametrize(
    "config, found, supported",
    [
        ({"num_class_embeds": 10}, "'num_class_embeds': 10", "'num_class_embeds': (None,)"),
        ({"class_embed_type": "identity"}, "'class_embed_type': 'identity'", "'class_embed_type'"),
        ({"out_channels": 6}, "'variance': 'learned'", "'variance': ('fixed',)"),
        ({"sample_size": None}, "'image size': 'unknown'", "'image size': ('known',)"),
    ],
)  # fmt: skip
def test_other_network_is_refused(policy, tmp_path, config, found, supported):
    unet = UNet2DModel.from_config(policy.unet.config, **config)
    policies.save(Policy(unet, policy.scheduler), tmp_path / "p")
    assert_refused(tmp_path / "p", found, supported)


def test_learned_variance_is_refused_by_the_scheduler_too(policy, tmp_path):
    scheduler = DDPMScheduler(1000, variance_type="learned_range")
    policies.save(Policy(policy.unet, scheduler), tmp_path / "p")
    assert_refused(tmp_path / "p", "'variance': 'learned'", "'variance': ('fixed',)")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(policy, tmp_path, value):
    with torch.no_grad():
        policy.unet.conv_out.weight[0, 0, 0, 0] = value
    policies.save(policy, tmp_path / "p")
    assert_refused(tmp_path / "p", "'weights': 'not all finite'", "'weights': ('complete and fin")


@pytest.mark.parametrize("widths", [(8,), (8, 8), (8, 16, 16)])
def test_weights_of_another_network_are_refused(policy, new_policy, tmp_path, widths):
    """A smaller one, one of other widths, and a larger one."""
    policies.save(policy, tmp_path / "p")
    policies.save(new_policy(widths=widths), tmp_path / "other")
    weights = "unet/diffusion_pytorch_model.safetensors"
    (tmp_path / "other" / weights).replace(tmp_path / "p" / weights)
    assert_refused(
        tmp_path / "p", "'weights': \"another network's", "'weights': ('complete and fin"
    )


def test_all_that_is_wrong_is_said_at_once(policy, tmp_path):
    scheduler = DDPMScheduler(1000, thresholding=True, prediction_type="sample")
    policies.save(Policy(policy.unet, scheduler), tmp_path / "p")
    with pytest.raises(policies.Unsupported, match="'prediction_type': .*'thresholding': True"):
        policies.load(tmp_path / "p")


# ------------------------------------------------------------------------------- other formats


@pytest.fixture
def with_attention():
    """A network with the blocks, the config and the fields of google/ddpm-*, but tiny."""
    torch.manual_seed(7)
    return UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    ).eval()


def write_old_layout(folder, unet):
    """As on the Hub since 2022: all files at the root, a pickle, the attention's former names."""
    folder.mkdir()
    former = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value."}
    former |= {".to_out.0.": ".proj_attn."}
    state = {}
    for name, value in unet.state_dict().items():
        for now, then in former.items():
            name = name.replace(now, then)
        state[name] = value
    assert any("proj_attn" in name for name in state)
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    later = {"add_attention", "attn_norm_num_groups", "class_embed_type", "downsample_type"}
    later |= {"dropout", "mid_block_type", "num_class_embeds", "num_train_timesteps"}
    later |= {"time_embedding_dim", "upsample_type"}
    config = {"_class_name": "UNet2DModel", "_diffusers_version": "0.0.4"}
    config |= {name: v for name, v in unet.config.items() if name[0] != "_" and name not in later}
    schedule = {"_class_name": "DDPMScheduler", "_diffusers_version": "0.1.1", "beta_end": 0.02}
    schedule |= {"beta_schedule": "linear", "beta_start": 0.0001, "clip_sample": True}
    schedule |= {"num_train_timesteps": 1000, "trained_betas": None, "variance_type": "fixed_small"}
    index = {"_class_name": "DDPMPipeline", "_diffusers_version": "0.0.4"}
    index |= {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    for name, content in (
        ("config", config), ("scheduler_config", schedule), ("model_index", index),
    ):  # fmt: skip
        (folder / f"{name}.json").write_text(json.dumps(content))


def test_older_layout_loads(with_attention, tmp_path, capfd):
    write_old_layout(tmp_path / "old", with_attention)
    loaded = policies.load(tmp_path / "old", "cpu", bf16=False)
    assert same_weights(loaded.unet, with_attention.state_dict())
    assert loaded.alpha_bar.equal(DDPMScheduler(1000).alphas_cumprod)
    assert loaded.scheduler.config.clip_sample
    assert steps(loaded, 40)[0].tolist() == list(range(975, -1, -25))
    x_t, t = torch.zeros(1, 3, 8, 8), torch.tensor([500])
    assert_close(predict_noise(loaded, x_t, t), with_attention(x_t, t).sample)
    assert "unsafe" not in "".join(capfd.readouterr())

    policies.save(loaded, tmp_path / "new")
    again = DDPMPipeline.from_pretrained(tmp_path / "new", use_safetensors=True)
    assert same_weights(again.unet, with_attention.state_dict())


def test_of_a_pickle_and_safetensors_the_latter_is_read(policy, new_policy, tmp_path):
    policies.save(policy, tmp_path / "both")
    torch.save(
        new_policy(seed=4).unet.state_dict(), tmp_path / "both/unet/diffusion_pytorch_model.bin"
    )
    assert same_weights(policies.load(tmp_path / "both", "cpu").unet, policy.unet.state_dict())


class Attack:
    """A pickle that would write a file if it were trusted."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


def test_pickles_are_not_trusted(with_attention, tmp_path):
    write_old_layout(tmp_path / "old", with_attention)
    state = {"x": Attack(tmp_path / "trap")}
    torch.save(state, tmp_path / "old" / "diffusion_pytorch_model.bin")
    with pytest.raises(FileNotFoundError, match="cannot load a policy from"):
        policies.load(tmp_path / "old")
    torch.save({"model_state_dict": state}, tmp_path / "mine.pth")
    policies.save(Policy(with_attention, DDPMScheduler(1000)), tmp_path / "base")
    with pytest.raises(ValueError, match="no checkpoint of the thesis's code"):
        policies.load(tmp_path / "mine.pth", base=tmp_path / "base")
    assert not (tmp_path / "trap").exists()


@pytest.fixture
def checkpoint(policy, new_policy, tmp_path):
    """What the thesis's code saves: a finetuned network's weights, both optimizers, a reward."""
    finetuned = new_policy(seed=9)
    optimizer = torch.optim.AdamW(finetuned.unet.parameters())
    content = {
        "model_state_dict": finetuned.unet.state_dict(),
        "policy_optimizer_state_dict": optimizer.state_dict(),
        "value_optimizer_state_dict": optimizer.state_dict(),
        "best_reward": np.float64(5.58),
    }
    torch.save(content, tmp_path / "task-ckpt.pth")
    policies.save(policy, tmp_path / "base")
    return tmp_path / "task-ckpt.pth"


def test_checkpoint_of_the_thesis_code_loads_into_its_base(checkpoint, new_policy, tmp_path):
    loaded = policies.load(checkpoint, "cpu", base=tmp_path / "base")
    assert same_weights(loaded.unet, new_policy(seed=9).unet.state_dict())
    policies.save(loaded, tmp_path / "folder")
    folder = DDPMPipeline.from_pretrained(tmp_path / "folder")
    assert same_weights(folder.unet, new_policy(seed=9).unet.state_dict())


def test_checkpoint_written_under_numpy_1_loads(checkpoint, new_policy, tmp_path):
    """There the scalar's module had another name, which the archive's pickle holds as text."""
    import zipfile

    old = tmp_path / "old.pth"
    with zipfile.ZipFile(checkpoint) as source, zipfile.ZipFile(old, "w") as target:
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert b"numpy._core.multiarray" in content
                content = content.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
            target.writestr(entry.filename, content)
    loaded = policies.load(old, "cpu", base=tmp_path / "base")
    assert same_weights(loaded.unet, new_policy(seed=9).unet.state_dict())


def test_checkpoint_without_a_base_says_how_to_name_it(checkpoint):
    with pytest.raises(ValueError, match="weights alone: name the policy.*base='google/ddpm"):
        policies.load(checkpoint)


def test_checkpoint_of_another_network_or_file_is_one_clear_error(checkpoint, new_policy, tmp_path):
    policies.save(new_policy(widths=(8,)), tmp_path / "other")
    with pytest.raises(ValueError, match="no checkpoint of the thesis's code.*its base is another"):
        policies.load(checkpoint, base=tmp_path / "other")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with pytest.raises(ValueError, match="or it is damaged"):
        policies.load(checkpoint, base=tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="no policy at .*nothing.pth"):
        policies.load(tmp_path / "nothing.pth", base=tmp_path / "base")


def test_checkpoint_that_is_not_finite_is_refused(checkpoint, policy, tmp_path):
    state = policy.unet.state_dict() | {"conv_in.bias": torch.full((8,), torch.nan)}
    torch.save({"model_state_dict": state}, checkpoint)
    with pytest.raises(ValueError, match="task-ckpt.pth: .*'weights': 'not all finite'"):
        policies.load(checkpoint, base=tmp_path / "base")
