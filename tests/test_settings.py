"""Hyperparameters: ranges of every field, what decides a run, and the learning rate's schedule."""

import dataclasses
import math
import re

import pytest

from ddpo_lib import settings as own
from ddpo_lib.objectives import ddpo
from ddpo_lib.settings import SPEED_ONLY, Finetune, learning_rate

EPS = 1e-9
"""Next to a bound."""

NUMBERS = {
    # name: (allowed values, refused values, the range in the message)
    "n_iterations": ([1, 10**6], [0, -3], ">= 1"),
    "n_samples": ([10, 30], [1, 0, -10], ">= 2"),
    "n_steps": ([2, 1000], [1, 0, -40], ">= 2"),
    "eta": ([EPS, 0.5, 1, 1.0], [0, 0.0, -0.5, 1 + EPS, 3], "> 0 and <= 1"),
    "min_std": ([0, 0.0, 0.02, 1 - EPS], [-EPS, 1, 5], ">= 0 and < 1"),
    "minibatch_size": ([1, 100], [0, -10], ">= 1"),
    "n_inner_epochs": ([1, 7], [0, -1], ">= 1"),
    "micro_batch": ([1, 10**6], [0, -1], ">= 1"),
    "timestep_fraction": ([EPS, 0.5, 1], [0, -0.5, 1 + EPS], "> 0 and <= 1"),
    "learning_rate": ([1e-12, 1], [-1e-5, 1 + EPS], ">= 0 and <= 1"),
    "peak_learning_rate": ([1e-12, 1], [0, -1e-5, 1 + EPS], "> 0 and <= 1"),
    "warmup": ([0, 0.5, 1], [-EPS, 1 + EPS], ">= 0 and <= 1"),
    "final_lr_fraction": ([0, 0.5, 1], [-EPS, 1 + EPS], ">= 0 and <= 1"),
    "weight_decay": ([0, 1], [-EPS, 1 + EPS], ">= 0 and <= 1"),
    "samples_per_prompt": ([2, 100], [1, 0, -2], ">= 2"),
    "adapter_rank": ([0, 1, 64], [-1], ">= 0"),
    "adapter_alpha": ([EPS, 32], [0, -1.0], "> 0"),
    "max_grad_norm": ([EPS, 1e9], [0, 0.0, -1.0], "> 0"),
    "n_development": ([2, 1000], [1, 0, -1], ">= 2"),
}
CHOICES = {
    "log_prob_reduction": ("mean", "sum"),
    "lr_schedule": ("constant", "warmup_cosine"),
    "select_by": ("development", "stochastic", "latest"),
}
SWITCHES = ("gradient_checkpointing", "bf16")
TEXTS = ("prompts", "unseen_prompts")
TYPES = {field.name: field.type for field in dataclasses.fields(Finetune)}


def message(name, value, needed):
    """A pattern: the field, the value that was given, and what it needs."""
    return re.escape(f"{name}={value!r}: must be {needed}")


def cases(column):
    return [(name, value) for name, row in NUMBERS.items() for value in row[column]]


def test_every_field_has_a_range_or_choices():
    assert set(TYPES) == {*NUMBERS, *CHOICES, *SWITCHES, *TEXTS}
    for field in dataclasses.fields(Finetune):
        assert field.metadata or field.type in (bool, tuple), field.name


def test_defaults_are_the_hyperparameters_of_table_a_2():
    settings = Finetune()
    assert (settings.n_steps, settings.eta) == (40, 1.0)
    assert (settings.n_iterations, settings.n_samples, settings.minibatch_size) == (72, 100, 10)
    assert (settings.n_inner_epochs, settings.n_updates) == (1, 720)
    assert (settings.learning_rate, settings.lr_schedule) == (9e-8, "constant")
    assert (settings.weight_decay, settings.max_grad_norm) == (1e-4, 1.0)
    assert (settings.warmup, settings.final_lr_fraction) == (0.25, 0.1)
    assert (settings.log_prob_reduction, settings.timestep_fraction) == ("mean", 1.0)
    assert (ddpo.Settings().clip_range, ddpo.Settings().advantage_clip) == (1e-4, 4.5)
    assert ddpo.Settings().estimator == "is"


@pytest.mark.parametrize("name, value", cases(0))
def test_value_at_the_edge_of_its_range_is_allowed(name, value):
    change = {name: value} | ({"n_samples": value} if name == "minibatch_size" else {})
    change["n_samples"] = max(2, change.get("n_samples", 100))
    assert getattr(Finetune(**change), name) == value


@pytest.mark.parametrize("name, value", cases(1))
def test_value_beyond_its_range_is_refused(name, value):
    with pytest.raises(ValueError, match=message(name, value, NUMBERS[name][2] + " and finite")):
        Finetune(**{name: value})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_value_that_is_not_finite_is_refused(name, value):
    needed = "of type int" if TYPES[name] is int else NUMBERS[name][2] + " and finite"
    with pytest.raises(ValueError, match=message(name, value, needed)):
        Finetune(**{name: value})


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("value", [True, False, 1, 2.0, "2", "3e-5", "", None, [2], 2j])
def test_value_of_another_type_is_refused(name, value):
    """A bool is no number, a float no int, and a string neither."""
    kind = TYPES[name]
    if type(value) is kind or (kind is float and type(value) is int):
        return
    if name in TEXTS and type(value) is list:
        return  # a list does for a tuple; what is in it, tests/test_text.py looks at
    with pytest.raises(ValueError, match=message(name, value, f"of type {kind.__name__}")):
        Finetune(**{name: value})


@pytest.mark.parametrize("name", CHOICES)
def test_choices(name):
    for value in CHOICES[name]:
        assert getattr(Finetune(**{name: value}), name) == value
    for value in ("nonsense", "Mean", "mean "):
        with pytest.raises(ValueError, match=message(name, value, f"one of {CHOICES[name]}")):
            Finetune(**{name: value})


def test_number_of_updates():
    assert Finetune(n_iterations=7, n_inner_epochs=3, n_samples=6, minibatch_size=2).n_updates == 63


@dataclasses.dataclass(frozen=True)
class Own:
    """As an objective of one's own has them; written under `from __future__ import annotations`,
    types are text."""

    beta: "float" = own.number(0.1, above=0, below=2)
    depth: "int" = own.number(3)
    scale: "float" = own.number(1.0)
    kind: "str" = own.choice("a", "b")

    def __post_init__(self):
        own.check(self)


def test_own_settings():
    assert Own() == Own(0.1, 3, 1.0, "a")
    assert Own(beta=1).beta == 1
    for change, needed in (
        ({"beta": 2}, "must be > 0 and < 2 and finite"),
        ({"beta": True}, "must be of type float"),
        ({"depth": 2.0}, "must be of type int"),
        ({"scale": math.inf}, "scale=inf: must be finite"),
        ({"kind": "c"}, r"must be one of \('a', 'b'\)"),
    ):
        with pytest.raises(ValueError, match=needed):
            Own(**change)


# ------------------------------------------------------------------------------- decisive

OTHER = {
    name: next(v for v in [0.5, 4] if isinstance(v, TYPES[name]) and v != getattr(Finetune(), name))
    for name in NUMBERS
} | {"log_prob_reduction": "sum", "gradient_checkpointing": True, "bf16": False}
OTHER["select_by"] = "stochastic"
"""Each field, changed; a schedule is no number, and apart below."""


def changes_run(name, **common):
    one = Finetune(minibatch_size=2, **common)
    return one.decisive != dataclasses.replace(one, **{name: OTHER[name]}).decisive


@pytest.mark.parametrize("name", sorted(set(OTHER) - {"minibatch_size"}))
def test_what_decides_a_run(name):
    """Memory settings never do. At a constant rate a longer run goes on from a shorter one."""
    of_the_schedule = {"n_iterations", "peak_learning_rate", "warmup", "final_lr_fraction"}
    assert changes_run(name) == (name not in {*SPEED_ONLY, *of_the_schedule})
    assert changes_run(name, lr_schedule="warmup_cosine") == (name not in SPEED_ONLY)


def test_the_schedule_itself_decides():
    assert set(SPEED_ONLY) == {"micro_batch", "gradient_checkpointing"}
    constant, cosine = Finetune(), Finetune(lr_schedule="warmup_cosine")
    assert constant.decisive != cosine.decisive
    assert set(cosine.decisive) == set(TYPES) - set(SPEED_ONLY)
    assert Finetune(minibatch_size=5).decisive != Finetune().decisive


# ------------------------------------------------------------------------------- learning rate


def test_constant_rate():
    for progress in (0, 0.3, 1):
        assert learning_rate(progress, Finetune(learning_rate=2e-5)) == 2e-5


@pytest.mark.parametrize(
    "progress, expected",
    [
        (0.0, 1.0e-5),
        (0.1, 1.0e-5 + 0.4 * 8e-5),  # two fifths of the way up to 9e-5
        (0.25, 9.0e-5),
        (0.4375, 2e-6 + 8.8e-5 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (0.625, 2e-6 + 8.8e-5 / 2),  # half of it
        (0.8125, 2e-6 + 8.8e-5 * (1 - math.sqrt(0.5)) / 2),
        (1.0, 0.2e-5),
    ],
)
def test_warm_up_and_cosine(progress, expected):
    settings = Finetune(
        lr_schedule="warmup_cosine", learning_rate=1e-5, peak_learning_rate=9e-5, warmup=0.25,
        final_lr_fraction=0.2,
    )  # fmt: skip
    assert learning_rate(progress, settings) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("warmup, first, last", [(0, 9e-5, 1e-6), (1, 1e-5, 9e-5)])
def test_no_warm_up_and_nothing_else(warmup, first, last):
    settings = Finetune(
        lr_schedule="warmup_cosine", learning_rate=1e-5, peak_learning_rate=9e-5, warmup=warmup
    )
    assert learning_rate(0, settings) == pytest.approx(first)
    assert learning_rate(1, settings) == pytest.approx(last)


def test_warm_up_may_start_at_nothing():
    settings = Finetune(lr_schedule="warmup_cosine", learning_rate=0)
    assert learning_rate(0, settings) == 0 < learning_rate(0.1, settings)
    assert learning_rate(1, settings) == 0
