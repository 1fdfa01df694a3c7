"""A GPU that runs out of memory, played by functions that refuse large batches."""

import pytest
import torch
from torch.testing import assert_close

from ddpo_lib import memory, ppo, sampler
from ddpo_lib.config import Finetune
from ddpo_lib.policy import transition


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.setattr(memory, "_held", {})


class Small:
    """Calls a function for batches up to `limit`, and says what it was asked for."""

    def __init__(self, function, size, limit):
        self.function, self.size, self.limit, self.asked = function, size, limit, []

    def __call__(self, *arguments):
        self.asked.append(self.size(*arguments))
        if self.asked[-1] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.function(*arguments)


def test_batch_is_halved_until_it_fits_and_that_is_remembered(capsys):
    work = Small(lambda n: f"done with {n}", int, limit=5)
    assert memory.fit("work", work, 40) == "done with 5"
    assert work.asked == [40, 20, 10, 5]
    assert "work: out of GPU memory, going on with batches of 5;" in capsys.readouterr().out
    assert memory.fit("work", work, 40) == "done with 5"
    assert memory.fit("work", work, 3) == "done with 3"
    assert work.asked[4:] == [5, 3]
    other = Small(lambda n: n, int, limit=100)
    assert memory.fit("other work", other, 40) == 40


def test_nothing_fits():
    work = Small(lambda n: n, int, limit=0)
    with pytest.raises(torch.OutOfMemoryError):
        memory.fit("work", work, 7)
    assert work.asked == [7, 3, 1]


def test_other_errors_are_not_retried():
    def broken(n):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        memory.fit("work", broken, 8)


def test_pictures_are_those_of_the_whole_batch(policy, monkeypatch):
    x_T = sampler.noise(policy, 10, seed=1)
    whole = sampler.sample(policy, x_T, 3)
    small = Small(transition, lambda policy, x_t, *rest: len(x_t), limit=3)
    monkeypatch.setattr(sampler, "transition", small)
    assert_close(sampler.sample(policy, x_T, 3), whole, rtol=1e-4, atol=1e-5)
    assert small.asked == [10, 5, *[2] * 5 * 3]


def test_update_that_ran_out_of_memory_half_way_is_the_same_update(new_policy, monkeypatch):
    """The gradient of the batches that did fit must not count twice."""
    advantage = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, 0.1])
    settings = Finetune(n_samples=6, minibatch_size=6, micro_batch=5)

    def update():
        policy = new_policy()
        noise = sampler.noise(policy, 6, seed=1)
        trajectory = sampler.rollout(policy, noise, 4, torch.Generator().manual_seed(0))
        optimizer = torch.optim.AdamW(policy.unet.parameters())
        metrics = ppo.update(policy, optimizer, trajectory, advantage, settings, rate=1e-3)
        return metrics, torch.cat([p.grad.reshape(-1) for p in policy.unet.parameters()])

    expected_metrics, expected = update()
    asked, score = [], ppo.score

    def refuse_the_third_batch(policy, trajectory, k, i):
        asked.append(len(k))
        if len(asked) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return score(policy, trajectory, k, i)

    monkeypatch.setattr(ppo, "score", refuse_the_third_batch)
    metrics, gradient = update()
    assert asked == [5, 5, 5, *[2] * 9]
    assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert metrics.grad_norm == pytest.approx(expected_metrics.grad_norm, rel=1e-4)
    assert metrics.loss == pytest.approx(expected_metrics.loss, rel=1e-4, abs=1e-6)
