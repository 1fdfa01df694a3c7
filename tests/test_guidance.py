"""Classifier guidance: closed forms, finite differences, and a Gaussian world solved exactly."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDPMScheduler
from torch.testing import assert_close

from ddpo_lib import encoders, guidance, sampler
from ddpo_lib import policy as policies
from ddpo_lib.policy import Context, Policy, predict_noise

N = 5
CLIP = Path(__file__).parents[1] / "data/toy/clip"


def away_from(target):
    """Squared distance to `target`, a loss with curvature."""
    return lambda images: ((images - target) ** 2).sum((1, 2, 3))


def noisy(policy, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_t = torch.randn(N, *policy.image_shape, generator=generator)
    return x_t, torch.tensor([0, 100, 400, 700, 999])


class Linear:
    """Predicts k x_t."""

    device = torch.device("cpu")
    config = SimpleNamespace(sample_size=4, in_channels=1)

    def __init__(self, k):
        self.k = k

    def __call__(self, x_t, t):
        return SimpleNamespace(sample=self.k * x_t)


def gaussian(s) -> Policy:
    """The exact denoiser of images that are N(0, s² I)."""
    scheduler = DDPMScheduler(1000, clip_sample=False)

    class Exact(Linear):
        def __call__(self, x_t, t):
            a_t = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
            return SimpleNamespace(sample=x_t * (1 - a_t).sqrt() / (a_t * s**2 + 1 - a_t))

    return Policy(Exact(None), scheduler, bf16=False)


@pytest.fixture
def v_policy(new_policy):
    return new_policy(prediction_type="v_prediction")


def test_gradient_in_closed_form():
    """x~ = x_t (1 - k √(1 - ᾱ)) / √ᾱ, so the gradient of w · x~ is w times that factor."""
    policy = Policy(Linear(0.3), DDPMScheduler(1000), bf16=False)
    x_t, t = noisy(policy)
    w = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1))

    grad, eps = guidance.gradient(policy, lambda images: (images * w).sum((1, 2, 3)), x_t, t)

    a_t = policy.alpha_bar[t].view(-1, 1, 1, 1)
    assert_close(grad, (w * (1 - 0.3 * (1 - a_t).sqrt()) / a_t.sqrt()))
    assert_close(eps, 0.3 * x_t)


def test_gradient_passes_through_the_network(policy):
    """Central differences of loss(x~(x_t)), the whole way."""
    x_t, t = noisy(policy)
    target = torch.full((3, 8, 8), 0.5)
    direction = torch.randn(x_t.shape, generator=torch.Generator().manual_seed(2))

    def value(x):
        a_t = policy.alpha_bar[t].view(-1, 1, 1, 1)
        with torch.no_grad():
            denoised = (x - (1 - a_t).sqrt() * policy.unet(x, t).sample) / a_t.sqrt()
        return away_from(target)(denoised).double()

    grad, _ = guidance.gradient(policy, away_from(target), x_t, t)

    h = 1e-3
    expected = (value(x_t + h * direction) - value(x_t - h * direction)) / (2 * h)
    assert_close((grad * direction).sum((1, 2, 3)).double(), expected, rtol=5e-3, atol=1e-2)


def test_saturated_pixels_have_a_gradient(policy):
    x_t, t = noisy(policy)
    grad, _ = guidance.gradient(policy, lambda images: images.sum((1, 2, 3)), 10 * x_t, t)
    assert (grad != 0).all()


def test_samples_do_not_mix(policy):
    x_t, t = noisy(policy)
    loss = away_from(torch.zeros(3, 8, 8))
    together, _ = guidance.gradient(policy, loss, x_t, t)
    for i in range(N):
        alone, _ = guidance.gradient(policy, loss, x_t[i : i + 1], t[i : i + 1])
        assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0, 0.7, 20])
def test_guided_noise_is_equation_2_23(policy, scale):
    x_t, t = noisy(policy)
    loss = away_from(torch.ones(3, 8, 8))
    grad, eps = guidance.gradient(policy, loss, x_t, t)

    guided = guidance.guide(policy, loss, scale)

    with torch.no_grad():
        ours = predict_noise(guided, x_t, t)
    score = -eps / (1 - policy.alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
    guided_score = -ours / (1 - policy.alpha_bar[t]).sqrt().view(-1, 1, 1, 1)
    assert_close(guided_score, score + scale * -grad, rtol=1e-3, atol=1e-3)
    assert guided.image_shape == policy.image_shape and guided.device == policy.device


@pytest.mark.parametrize("which", ["policy", "v_policy"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_scale_zero_changes_nothing(request, which, eta):
    """Also where the network gives v: the guided one gives eps, which is not turned again."""
    policy = request.getfixturevalue(which)
    x_T = sampler.noise(policy, [0, 1, 2])
    guided = guidance.guide(policy, away_from(torch.ones(3, 8, 8)), 0)
    ours, plain = (sampler.sample(p, x_T, 5, eta, [3, 4, 5]) for p in (guided, policy))
    assert_close(ours, plain, rtol=1e-5, atol=1e-5)


def test_guided_v_is_equation_2_23(v_policy):
    x_t, t = noisy(v_policy)
    loss = away_from(torch.ones(3, 8, 8))
    grad, eps = guidance.gradient(v_policy, loss, x_t, t)
    with torch.no_grad():
        assert_close(eps, predict_noise(v_policy, x_t, t))
        guided = predict_noise(guidance.guide(v_policy, loss, 0.7), x_t, t)
    towards = 0.7 * (1 - v_policy.alpha_bar[t]).sqrt().view(-1, 1, 1, 1) * grad
    assert_close(guided, eps + towards)


def test_all_but_the_network_and_what_it_gives_is_the_policys(new_policy):
    schedule = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    policy = new_policy(prediction_type="v_prediction", clip_sample_range=2.0, **schedule)
    guided = guidance.guide(policy, away_from(torch.ones(3, 8, 8)), 0.5)
    assert guided.alpha_bar.equal(policy.alpha_bar)
    different = {
        name for name, value in policy.scheduler.config.items()
        if name[0] != "_" and guided.scheduler.config[name] != value
    }  # fmt: skip
    assert different == {"prediction_type"}
    assert policy.scheduler.config.prediction_type == "v_prediction"


def test_guided_policy_takes_no_text_and_has_nothing_to_save(policy, tmp_path):
    x_t, t = noisy(policy)
    loss = away_from(torch.ones(3, 8, 8))
    context = Context(("a cat",) * N, torch.zeros(N, 77, 8))
    for call in (
        lambda: predict_noise(guidance.guide(policy, loss, 1), x_t, t, context),
        lambda: guidance.gradient(policy, loss, x_t, t, context),
    ):
        with pytest.raises(ValueError, match="takes no text"):
            call()
    with pytest.raises(ValueError, match="no network of its own: save the policy it guides"):
        policies.save(guidance.guide(policy, loss, 1), tmp_path / "p")
    assert not (tmp_path / "p").exists()


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_linear_guidance_shifts_a_gaussian_as_bayes_says(scale):
    """If images are N(0, s² I) and the loss is -w · x_0, the guided images are N(γ s² w, s² I).

    The denoiser of that world is known, and so p(y | x_t) ∝ E[exp(γ w · x_0) | x_t] is exactly
    exp(γ w · x~) up to a constant: classifier guidance is then no approximation.
    """
    s = 0.3
    policy = gaussian(s)
    x_T = sampler.noise(policy, range(4))
    w = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(1))
    guided = guidance.guide(policy, lambda images: -(images * w).sum((1, 2, 3)), scale)

    shift = sampler.sample(guided, x_T, 500) - sampler.sample(policy, x_T, 500)

    assert_close(shift, (scale * s**2 * w).expand(4, 1, 4, 4), rtol=0.03, atol=0.003)


def test_guided_samples_have_a_lower_loss():
    """In every image, and lower for a larger scale: the world is Gaussian and the loss convex."""
    policy = gaussian(0.5)
    x_T = sampler.noise(policy, range(N))
    loss = away_from(torch.full((1, 4, 4), 0.3))
    values = [
        loss(sampler.sample(guidance.guide(policy, loss, scale), x_T, 50)) for scale in (0, 0.5, 2)
    ]
    assert (values[0] > values[1]).all() and (values[1] > values[2]).all()
    assert values[2].mean() < 0.5 * values[0].mean()


def test_network_and_loss_run_in_float32(new_policy):
    """In bfloat16 the derivative at high noise would be rounding."""
    policy, half = new_policy(), new_policy(bf16=True)
    seen = []

    def loss(images):
        seen.append((images.dtype, torch.is_autocast_enabled("cpu")))
        return (images @ images).sum((1, 2, 3))

    x_T = sampler.noise(policy, range(2))
    full = sampler.sample(guidance.guide(policy, loss, 0.1), x_T, 4)
    assert sampler.sample(guidance.guide(half, loss, 0.1), x_T, 4).equal(full)
    assert set(seen) == {(torch.float32, False)}


def test_nothing_is_left_on_the_network(policy):
    x_t, t = noisy(policy)
    grad, eps = guidance.gradient(policy, away_from(torch.zeros(3, 8, 8)), x_t, t)
    assert not grad.requires_grad and not eps.requires_grad and not x_t.requires_grad
    assert all(p.grad is None for p in policy.unet.parameters())


def test_clip_distance_is_one_minus_the_cosine():
    clip = encoders.load_clip(CLIP)
    images = 2 * torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0)) - 1
    with torch.no_grad():
        texts = encoders.embed_texts(clip, ["an old person", "a young person"])
        expected = 1 - encoders.embed_images(clip, images) @ texts.T
    loss = guidance.clip_distance(clip, "an old person")
    assert_close(loss(images), expected[:, 0])
    assert not torch.allclose(loss(images), expected[:, 1], atol=1e-2)
    x = images.clone().requires_grad_()
    loss(x).sum().backward()
    assert (x.grad.abs().amax((1, 2, 3)) > 0).all()
    assert not any(p.requires_grad for p in clip.model.parameters())
