"""The Gaussian log-probability and KL against torch.distributions and exact formulas."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close

from ddpo_lib.log_probs import kl, log_prob

REDUCTIONS = ["mean", "sum"]


def draws(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, mean = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=dtype)
    std = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0], dtype=dtype)
    return x, mean, std


def normal(mean, std):
    return Normal(mean.double(), std.double().view(-1, 1, 1, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_equals_torch_distributions(reduction, dtype):
    x, mean, std = draws(dtype)
    density = normal(mean, std).log_prob(x.double())
    expected = getattr(density, reduction)((1, 2, 3))
    assert expected.shape == (5,)
    assert_close(log_prob(x, mean, std, reduction), expected, rtol=1e-12, atol=0)


def test_reduces_by_the_mean_unless_told():
    x, mean, std = draws()
    assert log_prob(x, mean, std).equal(log_prob(x, mean, std, "mean"))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_by_finite_differences(reduction):
    x, mean, std = (value[1:].requires_grad_() for value in draws(torch.float64))
    assert torch.autograd.gradcheck(lambda *a: log_prob(*a, reduction), (x, mean, std))


def test_gradient_reaches_float32_weights():
    """d/d mean log N = (x - mean) / std²."""
    x, mean, std = draws()
    log_prob(x, mean.requires_grad_(), std, "sum").sum().backward()
    assert mean.grad.dtype == torch.float32
    assert_close(mean.grad, (x - mean.detach()) / std.view(-1, 1, 1, 1) ** 2, rtol=1e-5, atol=0)


def test_deterministic_step_has_no_probability_and_no_gradient():
    """x differs from the mean by a rounding error, as in the last DDIM step of a real chain."""
    x, mean, std = draws()
    std[2] = 0
    x[2] = mean[2] + 1e-5
    mean.requires_grad_()
    x.requires_grad_()

    values = log_prob(x, mean, std, "sum")
    values.sum().backward()

    assert values[2] == 0
    assert (values[[0, 1, 3, 4]] != 0).all()
    for gradient in (x.grad, mean.grad):
        assert gradient.isfinite().all()
        assert (gradient[2] == 0).all()
        assert (gradient[[0, 1, 3, 4]] != 0).any((1, 2, 3)).all()


def test_unknown_reduction_is_an_error():
    with pytest.raises(ValueError, match="'median': must be one of"):
        log_prob(*draws(), "median")


# ------------------------------------------------------------------------------- at 256x256


def step_of_256(std, own_sd=0.036):
    """A step's x, its mean, and the mean after a small update: the log-ratio's sd is `own_sd`."""
    generator = torch.Generator().manual_seed(1)
    shape = (1, 3, 256, 256)
    old, z, direction = torch.randn(3, *shape, generator=generator)
    std = torch.tensor([std])
    x = old.clamp(-1, 1) + std * z
    new = old.clamp(-1, 1) + std * own_sd * direction / direction.norm()
    return x, old.clamp(-1, 1), new, std


def exact_log_ratio(x, old, new, std):
    """log N(x; new) - log N(x; old) = (new - old) · (2x - new - old) / (2 std²), in nats: without a
    difference of large numbers."""
    x, old, new, std = (value.double() for value in (x, old, new, std))
    return ((new - old) * (2 * x - new - old)).flatten(1).sum(1) / (2 * std**2)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("std", [0.0098, 0.03, 0.1, 0.3])
def test_small_log_ratio_of_large_images_is_exact(std, reduction):
    x, old, new, std = step_of_256(std)
    n_pixels = {"sum": 1, "mean": x[0].numel()}[reduction]
    expected = exact_log_ratio(x, old, new, std) / n_pixels
    ratio = log_prob(x, new, std, reduction) - log_prob(x, old, std, reduction)
    assert abs(expected) * n_pixels > 0.005
    assert_close(ratio, expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("std", [0.0098, 0.03, 0.1, 0.3])
def test_float32_would_lose_it(std):
    """It misses the test's tolerance above by far."""
    x, old, new, std = step_of_256(std)
    first, second = (
        Normal(mean, std.view(-1, 1, 1, 1)).log_prob(x).sum((1, 2, 3)) for mean in (new, old)
    )
    expected = exact_log_ratio(x, old, new, std)
    assert abs(first - second - expected) > 0.01 * abs(expected)


# ------------------------------------------------------------------------------- KL


def test_kl_equals_torch_distributions():
    mean, other, std = draws()
    expected = kl_divergence(normal(mean, std), normal(other, std)).sum((1, 2, 3))
    assert kl(mean, other, std).dtype == torch.float64
    assert_close(kl(mean, other, std), expected, rtol=1e-12, atol=0)
    assert kl(mean, other, std).equal(kl(other, mean, std))


def test_kl_is_the_mean_log_ratio_of_many_draws():
    std, n = torch.tensor([0.2]), 200_000
    mean, other = torch.tensor([0.5, 0.55]).double().view(2, 1, 1, 1, 1)
    x = mean + std * torch.randn(n, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    stds = std.expand(n)
    log_ratio = log_prob(x, mean, stds, "sum") - log_prob(x, other, stds, "sum")
    error = log_ratio.std() / math.sqrt(n)
    assert abs(log_ratio.mean() - kl(mean, other, std)[0]) < 4 * error < 0.1 * log_ratio.mean()


@pytest.mark.parametrize("own_sd", [5e-5, 1e-3, 0.036, 1.0])
def test_kl_of_a_small_update(own_sd):
    """Half the log-ratio's variance, so 1.25e-9 at 5e-5; an estimate from ratios loses that."""
    generator = torch.Generator().manual_seed(1)
    direction = torch.randn(1, 3, 32, 32, generator=generator, dtype=torch.float64)
    std = torch.tensor([0.1])
    old = torch.zeros_like(direction)
    new = std.double() * own_sd * direction / direction.norm()
    for dtype in (torch.float32, torch.float64):
        value = kl(new.to(dtype), old.to(dtype), std)
        assert_close(value, torch.tensor([own_sd**2 / 2]).double(), rtol=1e-5, atol=0)


def test_kl_is_never_negative_and_0_for_the_same_policy():
    x, mean, std = draws()
    near = torch.nextafter(mean, x)
    assert (kl(mean, near, std) > 0).all()
    assert (kl(mean, mean, std) == 0).all()


def test_kl_of_a_deterministic_step_is_0():
    mean, other, std = draws()
    std[[0, 3]] = 0
    values = kl(mean, other, std)
    assert (values[[0, 3]] == 0).all()
    assert (values[[1, 2, 4]] > 0).all()
