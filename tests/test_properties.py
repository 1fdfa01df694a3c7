"""What holds for every shape, size, seed and type: `hypothesis` looks for a case where it does not.

The examples are the same in every run, and none is kept on the disk.
"""

import dataclasses
import json
import math
import re
import warnings

import numpy as np
import pytest
import torch
import yaml
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributions import Normal, kl_divergence

from ddpo_lib import diversity, evaluation, experience, log_probs, rewards, runs, sampler
from ddpo_lib.book import figures, profiles
from ddpo_lib.objectives import ddpo, dense
from ddpo_lib.policy import Policy, steps
from ddpo_lib.settings import Finetune, check_whole, learning_rate

quick = settings(max_examples=50, deadline=None, derandomize=True, database=None)

sizes = st.integers(1, 6)
seeds = st.integers(0, 2**32)
shares = st.floats(0, 1)
numbers = st.floats(-100, 100).map(lambda x: round(x, 3))  # none that float64 would lose beside 100


def random(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)


def unit_rows(seed, n, size):
    rows = np.random.default_rng(seed).normal(size=(n, size))
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


# ------------------------------------------------------------------------------- images


@quick
@given(
    seeds,
    sizes,
    sizes,
    sizes,
    sizes,
    st.sampled_from([torch.float16, torch.float32, torch.float64]),
)
def test_levels_survive_the_way_to_floats_and_back(seed, n, height, width, channels, dtype):
    levels = torch.from_numpy(pictures_of(seed, n, height, width, channels))
    images = rewards.from_uint8(levels)
    assert images.shape == (n, channels, height, width) and images.dtype == torch.float32
    assert images.min() >= -1 and images.max() <= 1
    assert rewards.to_uint8(images.to(dtype)).equal(levels)


@quick
@given(seeds, sizes, st.floats(0.1, 3))
def test_floats_come_back_within_half_a_level_and_clamped(seed, n, scale):
    images = scale * random(seed, n, 3, 4, 5)
    back = rewards.from_uint8(rewards.to_uint8(images)).double()
    assert (back - images.clamp(-1, 1)).abs().max() <= 1 / 255 + 1e-6


@quick
@given(
    st.lists(st.floats(-1, 1, width=32), min_size=2, max_size=50),
    st.sampled_from(rewards.ENCODINGS),
)
def test_brighter_never_becomes_darker(values, encoding):
    levels = rewards.to_uint8(torch.tensor(sorted(values)).view(-1, 1, 1, 1), encoding)
    assert (levels.flatten().int().diff() >= 0).all()


@quick
@given(
    st.lists(numbers, min_size=1, max_size=6),
    st.sampled_from([list, np.array, torch.tensor, lambda x: torch.tensor(x).half().float()]),
)
def test_a_rewards_numbers_are_float32_whatever_they_come_in(values, kind):
    judged = rewards.checked(lambda images: kind(values))(torch.zeros(len(values), 3, 2, 2))
    assert judged.dtype == torch.float32 and judged.shape == (len(values),)
    torch.testing.assert_close(judged, torch.tensor(values), rtol=1e-3, atol=1e-3)


@quick
@given(seeds, sizes, sizes, sizes, sizes, st.integers(0, 3), st.sampled_from([1, 3, 4]))
def test_tiles_have_their_size_and_every_picture_its_place(seed, n, columns, h, w, gap, channels):
    pictures = pictures_of(seed, n, h, w, channels)
    canvas, rows = figures.tile(pictures, columns, gap), math.ceil(n / columns)
    assert canvas.shape == (rows * (h + gap) - gap, columns * (w + gap) - gap, channels)
    for i, picture in enumerate(pictures):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        assert (canvas[y : y + h, x : x + w] == picture).all()
    assert (canvas == 255).sum() == (pictures == 255).sum() + canvas.size - pictures.size


# ------------------------------------------------------------------------------- sampling


@quick
@given(seeds, st.integers(1, 40), st.integers(1, 40))
def test_more_seeds_begin_with_the_fewer_ones(seed, n, m):
    few, many = sorted([sampler.seeds(seed, n), sampler.seeds(seed, m)], key=len)
    assert many[: len(few)] == few and len(many) == max(n, m)
    assert all(type(each) is int and 0 <= each < 2**32 for each in many)


@quick
@given(
    st.integers(-5, 1100), st.sampled_from([4, 10, 100, 999, 1000]), st.integers(0, 1),
    st.sampled_from(["leading", "trailing", "linspace"]),
)  # fmt: skip
def test_steps_are_diffusers_or_refused(n_steps, T, offset, spacing):
    schedule = {"timestep_spacing": spacing, "steps_offset": offset}
    try:
        with warnings.catch_warnings(action="ignore"):  # of chains that begin too late
            t, t_prev = steps(Policy(None, DDPMScheduler(T, **schedule)), n_steps)
    except ValueError as error:
        assert f"n_steps={n_steps}" in str(error)
        if not 1 <= n_steps <= T:
            return
    reference = DDIMScheduler(T, **schedule)
    reference.set_timesteps(n_steps)
    expected = reference.timesteps
    if expected.max() >= T or expected.min() < 0:  # diffusers itself would fail, or wrap around
        with pytest.raises(ValueError, match="take another n_steps"):
            steps(Policy(None, DDPMScheduler(T, **schedule)), n_steps)
    else:
        assert t.equal(expected) and t_prev.equal(expected - T // n_steps)
        assert len(t) == n_steps and (t.diff() < 0).all()


@quick
@given(
    seeds, sizes, sizes, sizes, st.floats(1e-3, 10), st.sampled_from([torch.float32, torch.float64])
)
def test_log_densities_are_those_of_torch(seed, n, channels, size, std, dtype):
    x, mean = random(seed, 2, n, channels, size, size).to(dtype)
    std = torch.full((n,), std, dtype=dtype)
    gaussian = Normal(mean.double(), std.double().view(-1, 1, 1, 1))
    density = gaussian.log_prob(x.double()).flatten(1)
    for reduction, expected in (("sum", density.sum(1)), ("mean", density.mean(1))):
        found = log_probs.log_prob(x, mean, std, reduction)
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    other = Normal(x.double(), std.double().view(-1, 1, 1, 1))
    expected = kl_divergence(gaussian, other).flatten(1).sum(1)
    torch.testing.assert_close(log_probs.kl(mean, x, std), expected, rtol=1e-9, atol=1e-9)
    assert log_probs.kl(x, mean, std).equal(log_probs.kl(mean, x, std))
    assert not log_probs.log_prob(x, mean, 0 * std).any()


# ------------------------------------------------------------------------------- learning


@quick
@given(st.lists(numbers, min_size=2, max_size=12), st.floats(0.1, 100), numbers, seeds)
def test_standardised_rewards_know_no_unit_no_zero_and_no_order(values, scale, shift, seed):
    values = torch.tensor(values, dtype=torch.float64)
    assume(values.std() > 1e-2)
    found = experience.standardise(values)
    assert abs(found.mean()) < 1e-6 and abs(found.std(correction=0) - 1) < 1e-4
    close = {"rtol": 1e-4, "atol": 1e-4}  # the 1e-8 that keeps it from dividing by 0
    torch.testing.assert_close(experience.standardise(scale * values + shift), found, **close)
    order = torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(experience.standardise(values[order]), found[order])


@quick
@given(st.lists(st.tuples(numbers, st.integers(0, 2)), min_size=1, max_size=12))
def test_each_group_is_standardised_as_if_it_were_alone(pairs):
    values, groups = (torch.tensor(each) for each in zip(*pairs, strict=True))
    found = experience.standardise(values, groups)
    for label in groups.unique():
        alone = experience.standardise(values[groups == label])
        torch.testing.assert_close(found[groups == label], alone)


@quick
@given(st.integers(1, 50), st.floats(1e-3, 1), seeds)
def test_a_share_of_the_steps_has_none_twice(n, fraction, seed):
    all_steps = torch.arange(n) + 7
    drawn = experience.draw_steps(all_steps, fraction, torch.Generator().manual_seed(seed))
    assert len(drawn) == len(set(drawn.tolist())) == max(1, round(fraction * n))
    assert set(drawn.tolist()) <= set(all_steps.tolist())


@quick
@given(st.floats(-3, 3), st.floats(-5, 5), st.floats(1e-4, 1))
def test_the_clip_only_ever_makes_ddpo_more_careful(log_ratio, advantage, clip_range):
    log_ratio, advantage = torch.tensor(log_ratio), torch.tensor(advantage)
    clipped = ddpo.is_loss(log_ratio, advantage, clip_range)
    assert clipped >= ddpo.is_loss(log_ratio, advantage, math.inf)
    assert ddpo.is_loss(torch.tensor(0.0), advantage, clip_range) == -advantage


@quick
@given(seeds, sizes, sizes)
def test_an_order_without_preference_costs_the_log_of_how_many_there_are(seed, n, size):
    scores, worth = torch.zeros(n, size, dtype=torch.float64), random(seed, n, size)
    expected = torch.full((n,), math.lgamma(size + 1), dtype=torch.float64)
    torch.testing.assert_close(dense.plackett_luce(scores, worth), expected)


rates = st.floats(1e-9, 1)


@quick
@given(rates, rates, shares, shares, shares)
def test_rate_stays_between_its_ends_and_its_peak(start, peak, warmup, final, progress):
    given_ = {"learning_rate": start, "peak_learning_rate": peak}
    one = Finetune(lr_schedule="warmup_cosine", warmup=warmup, final_lr_fraction=final, **given_)
    low, high = sorted([start, peak])
    rate, slack = learning_rate(progress, one), 1 + 1e-9
    assert min(low, final * start) / slack <= rate <= max(high, final * start) * slack
    assert learning_rate(progress, Finetune(learning_rate=start)) == start
    if warmup > 0:
        assert learning_rate(0, one) == start


valid = st.builds(
    Finetune,
    n_iterations=st.integers(1, 500), n_steps=st.integers(2, 999), eta=st.floats(0.01, 1),
    min_std=st.floats(0, 0.99), n_samples=st.sampled_from([10, 20, 70]),
    timestep_fraction=st.floats(0.01, 1), log_prob_reduction=st.sampled_from(["mean", "sum"]),
    learning_rate=st.floats(1e-9, 1), lr_schedule=st.sampled_from(["constant", "warmup_cosine"]),
    warmup=shares, weight_decay=shares, bf16=st.booleans(),
)  # fmt: skip


@quick
@given(valid)
def test_settings_survive_json_and_yaml(one):
    content = dataclasses.asdict(one)
    assert Finetune(**json.loads(json.dumps(content))) == one
    assert Finetune(**yaml.load(yaml.safe_dump(content), profiles.Loader)) == one
    assert one.decisive.items() <= content.items()
    record = {"settings": one.decisive, "seed": 0}
    assert runs.differences(json.loads(json.dumps(record)), record) == []


@quick
@given(valid, valid)
def test_what_makes_two_runs_different_is_named_once_each(one, other):
    assume(one.lr_schedule == other.lr_schedule)
    found = runs.differences({"settings": one.decisive}, {"settings": other.decisive})
    unequal = [k for k, v in one.decisive.items() if v != other.decisive[k]]
    assert [line.split()[0] for line in found] == [f"settings.{name}" for name in unequal]


# ------------------------------------------------------------------------------- measures


@quick
@given(seeds, st.integers(1, 12), st.integers(2, 12))
def test_vendi_score_lies_between_one_and_n_and_knows_no_order(seed, n, size):
    rows = unit_rows(seed, n, size)
    score, rng = diversity.vendi_score(rows), np.random.default_rng(seed)
    assert 1 - 1e-9 <= score <= min(n, size) + 1e-9
    assert diversity.vendi_score(rng.permutation(rows)) == pytest.approx(score)
    assert diversity.vendi_score(np.concatenate([rows, rows])) == pytest.approx(score)  # shares
    turn, _ = np.linalg.qr(rng.normal(size=(size, size)))
    assert diversity.vendi_score(rows @ turn) == pytest.approx(score)


@quick
@given(seeds, sizes, sizes)
def test_spread_knows_no_order_and_is_nothing_for_copies(seed, n, size):
    pictures = pictures_of(seed, n, size, size, 3)
    spread, rng = diversity.spread(pictures), np.random.default_rng(seed)
    assert 0 <= spread <= 1
    assert diversity.spread(rng.permutation(pictures)) == pytest.approx(spread)
    assert diversity.spread(pictures[:1].repeat(4, 0)) == 0


@quick
@given(st.lists(numbers, min_size=1, max_size=20), st.sets(numbers, min_size=1, max_size=8))
def test_entropy_lies_between_nothing_and_the_log_of_the_levels(values, levels):
    found = diversity.entropy(np.array(values), np.array(sorted(levels)))
    assert 0 <= found <= math.log2(min(len(levels), len(values))) + 1e-9


@quick
@given(st.lists(numbers, min_size=2, max_size=20), st.integers(0, 100))
def test_interval_lies_inside_the_sample_and_is_the_seeds(values, seed):
    sample = np.array(values)
    value, low, high = evaluation.bootstrap(np.mean, sample, seed=seed, n_bootstrap=30)
    slack = 1e-9 * (1 + np.abs(sample).max())
    assert value == sample.mean()
    assert sample.min() - slack <= low <= high <= sample.max() + slack
    assert evaluation.bootstrap(np.mean, sample, seed=seed, n_bootstrap=30) == (value, low, high)


@quick
@given(st.lists(numbers, min_size=2, max_size=20), st.floats(0.1, 10), numbers)
def test_effect_size_knows_no_unit(values, scale, shift):
    before = np.array(values)
    assume(before.std() > 1e-2)
    after = before[::-1] + 1
    found = evaluation.change(before, after)
    again = evaluation.change(scale * before + shift, scale * after + shift)
    assert again == pytest.approx(found, rel=1e-6) and found > 0


# ------------------------------------------------------------------------------- names

NAME = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9._-]*", re.ASCII)


@quick
@given(st.text(max_size=8) | st.from_regex(NAME, fullmatch=True))
def test_names_are_of_the_alphabet_or_refused(name):
    if NAME.fullmatch(name):
        profiles._check_names([name])
        assert not name.startswith((".", "-")) and "/" not in name
    else:
        with pytest.raises(ValueError, match="must be of letters, digits"):
            profiles._check_names([name])


@quick
@given(
    st.from_regex(r"(fig|table)_([0-9]{1,2}|[a-d])_[0-9]{1,2}(_[a-z0-9_]{1,9})?", fullmatch=True),
    st.text(max_size=12),
)
def test_artefacts_names_have_a_number_or_are_refused(name, other):
    assert re.fullmatch(r"(table )?([0-9A-D]+\.[0-9]+|[0-9]{2})", figures.identifier(name))
    for wrong in (other, name + other):
        if re.search(r"[^a-z0-9_]", wrong):
            with pytest.raises(ValueError, match="no artefact's name"):
                figures.identifier(wrong)


@quick
@given(st.integers() | st.floats() | st.booleans() | st.text() | st.none(), st.integers(0, 3))
def test_whole_numbers_are_whole(value, low):
    if type(value) is int and value >= low:
        check_whole("n", value, low)
    else:
        with pytest.raises(ValueError, match=f"must be a whole number from {low} up"):
            check_whole("n", value, low)
