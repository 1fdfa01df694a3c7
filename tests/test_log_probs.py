"""The Gaussian log-probability against torch.distributions and finite differences."""

import pytest
import torch
from torch.distributions import Normal
from torch.testing import assert_close

from ddpo_lib.log_probs import log_prob


def draws(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x, mean = torch.randn(2, 5, 3, 4, 4, generator=generator, dtype=dtype)
    std = torch.tensor([0.01, 0.1, 0.5, 1.0, 3.0], dtype=dtype)
    return x, mean, std


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_equals_torch_distributions(reduction):
    x, mean, std = draws()
    density = Normal(mean, std.view(-1, 1, 1, 1)).log_prob(x)
    expected = getattr(density, reduction)((1, 2, 3))
    assert expected.shape == (5,)
    assert_close(log_prob(x, mean, std, reduction), expected, rtol=1e-5, atol=1e-5)


def test_reduces_by_the_mean_unless_told():
    x, mean, std = draws()
    assert log_prob(x, mean, std).equal(log_prob(x, mean, std, "mean"))


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gradient_by_finite_differences(reduction):
    x, mean, std = (value[1:].requires_grad_() for value in draws(torch.float64))
    assert torch.autograd.gradcheck(lambda *a: log_prob(*a, reduction), (x, mean, std))


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
    for gradient in (x.grad, mean.grad):
        assert gradient.isfinite().all()
        assert (gradient[2] == 0).all()
        assert (gradient[[0, 1, 3, 4]] != 0).any((1, 2, 3)).all()


def test_unknown_reduction_is_an_error():
    with pytest.raises(ValueError, match="'median': must be one of"):
        log_prob(*draws(), "median")
