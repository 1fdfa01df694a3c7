"""A GPU that runs out of memory, played by functions that refuse large batches."""

import gc
import weakref

import pytest
import torch
from torch.testing import assert_close

from ddpo_lib import memory, sampler
from ddpo_lib.experience import learnable_steps, pairs, rescore
from ddpo_lib.policy import transition
from ddpo_lib.update import update


class Small:
    """Calls a function for batches up to `limit`, and says what it was asked for."""

    def __init__(self, function, size, limit):
        self.function, self.size, self.limit, self.asked = function, size, limit, []

    def __call__(self, *arguments):
        self.asked.append(self.size(*arguments))
        if self.asked[-1] > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return self.function(*arguments)


@pytest.fixture
def network():
    return torch.nn.Linear(1, 1)


def test_batch_is_halved_until_it_fits_and_that_is_remembered(network, capsys):
    work = Small(lambda n: f"done with {n}", int, limit=5)
    assert memory.fit(network, "work", work, 40) == "done with 5"
    assert work.asked == [40, 20, 10, 5]
    assert "work: out of GPU memory, going on with batches of 5\n" in capsys.readouterr().out
    assert memory.fit(network, "work", work, 40) == "done with 5"
    assert memory.fit(network, "work", work, 3) == "done with 3"
    assert memory.fit(network, "work", work, 40) == "done with 5"
    assert work.asked[4:] == [5, 3, 5]


def test_kinds_of_work_and_networks_do_not_share_a_limit(network):
    memory.fit(network, "work", Small(lambda n: n, int, limit=5), 40)
    roomy = Small(lambda n: n, int, limit=100)
    assert memory.fit(network, "other work", roomy, 40) == 40
    assert memory.fit(torch.nn.Linear(1, 1), "work", roomy, 40) == 40
    assert memory.fit(network, "work", roomy, 40) == 5


def test_start_over_tries_the_full_batch_again(network):
    other = torch.nn.Linear(1, 1)
    for each in (network, other):
        memory.fit(each, "work", Small(lambda n: n, int, limit=5), 40)
    memory.start_over(network)
    memory.start_over(network)  # what was never held back may start over too
    roomy = Small(lambda n: n, int, limit=100)
    assert memory.fit(network, "work", roomy, 40) == 40
    assert memory.fit(other, "work", roomy, 40) == 5


def test_no_network_is_kept_alive():
    network = torch.nn.Linear(1, 1)
    memory.fit(network, "work", Small(lambda n: n, int, limit=5), 40)
    gone = weakref.ref(network)
    del network
    gc.collect()
    assert gone() is None


def test_nothing_fits(network):
    work = Small(lambda n: n, int, limit=0)
    with pytest.raises(torch.OutOfMemoryError):
        memory.fit(network, "work", work, 7)
    assert work.asked == [7, 3, 1]


def test_tensors_of_the_failed_call_are_gone_when_the_cache_is_emptied(network, monkeypatch):
    class Large:
        pass

    kept, alive = [], []

    def work(n):
        tensor = Large()
        kept.append(weakref.ref(tensor))
        if n > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: alive.append(kept[-1]() is not None))
    memory.fit(network, "work", work, 4)
    assert alive == [False, False]


def test_other_errors_are_not_retried(network):
    def broken(n):
        asked.append(n)
        raise RuntimeError("a bug")

    asked = []
    with pytest.raises(RuntimeError, match="a bug"):
        memory.fit(network, "work", broken, 8)
    assert asked == [8]


# ------------------------------------------------------------------------------- sampling


def test_samples_are_those_of_the_whole_batch(policy, monkeypatch):
    seeds = sampler.seeds(1, 10)
    x_T = sampler.noise(policy, seeds)
    whole = sampler.rollout(policy, x_T, 3, seeds)
    small = Small(transition, lambda policy, x_t, *rest: len(x_t), limit=3)
    monkeypatch.setattr(sampler, "transition", small)
    halved = sampler.rollout(policy, x_T, 3, seeds)
    assert_close(halved.states, whole.states, rtol=1e-4, atol=1e-5)
    assert_close(halved.log_probs, whole.log_probs, rtol=1e-4, atol=1e-5)
    assert small.asked == [10, 5, *[2] * 5 * 3]


def test_each_sampling_tries_the_full_batch_again(policy, monkeypatch):
    small = Small(transition, lambda policy, x_t, *rest: len(x_t), limit=3)
    monkeypatch.setattr(sampler, "transition", small)
    x_T = sampler.noise(policy, range(4))
    sampler.sample(policy, x_T, 3)
    assert small.asked == [4, *[2] * 2 * 3]
    small.limit = 4  # what had filled the memory is gone
    small.asked.clear()
    sampler.sample(policy, x_T, 3)
    assert small.asked == [4, 4, 4]


# ------------------------------------------------------------------------------- update


class Score:
    """A loss with a gradient; its call number `fail_at` runs out of memory."""

    def __init__(self, policy, fail_at=None):
        seeds = sampler.seeds(1, 6)
        self.policy, self.fail_at, self.asked = policy, fail_at, []
        self.trajectory = sampler.rollout(policy, sampler.noise(policy, seeds), 4, seeds)
        self.advantage = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3, 0.1])

    def __call__(self, rows):
        step, sample = rows[:, 0].unbind(-1)
        self.asked.append(len(rows))
        new = rescore(self.policy, self.trajectory, step, sample)
        if len(self.asked) == self.fail_at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return -self.advantage[sample] * new.log_ratio.exp(), {"log_prob": new.log_prob}

    def update(self):
        rows = pairs(learnable_steps(self.trajectory.stds), torch.arange(6))
        network = self.policy.unet
        start = [p.detach().clone() for p in network.parameters()]
        metrics = update(
            network,
            torch.optim.SGD(network.parameters(), lr=1.0),
            rows,
            self,
            n_units=len(rows),
            micro_batch=5,
            max_grad_norm=1e9,
            rate=0.1,
        )
        moves = [p.detach() - q for p, q in zip(network.parameters(), start, strict=True)]
        return metrics, torch.cat([move.reshape(-1) for move in moves])


def test_update_that_ran_out_of_memory_half_way_is_the_same_update(new_policy):
    """Neither gradient nor metrics of the batches that did fit may count twice."""
    expected_metrics, expected = Score(new_policy()).update()
    halved = Score(new_policy(), fail_at=3)
    metrics, move = halved.update()
    assert halved.asked == [5, 5, 5, *[2] * 9]
    assert expected.abs().max() > 1e-4
    assert_close(move, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    assert metrics == pytest.approx(expected_metrics, rel=1e-4, abs=1e-9)


def test_rollout_and_update_have_limits_of_their_own(new_policy):
    """A network that samples 6 at a time may still learn from no more than 2."""
    score = Score(new_policy(), fail_at=1)
    score.update()
    assert score.asked == [5, *[2] * 9]
    score.asked.clear()
    score.fail_at = None
    score.update()
    assert score.asked == [2] * 9
    memory.start_over(score.policy.unet)
    score.asked.clear()
    score.update()
    assert score.asked == [5, 5, 5, 3]
