"""The toy world's alignment: what a prompt states, and whether a drawing shows it."""

import numpy as np
import pytest
import torch

from ddpo_lib import rewards
from ddpo_lib.toy import alignment, training


@pytest.mark.parametrize(
    ("prompt", "domain", "said"),
    [
        ("a person, no glasses", "faces", {"no glasses"}),
        ("an old man with a beard and glasses", "faces", {"old", "man", "beard", "glasses"}),
        ("a young woman with long red hair", "faces", {"young", "woman", "long"}),
        ("a church, few round trees", "churches", {"few trees"}),
        ("a church at night, many trees, lit windows", "churches",
         {"at night", "many trees", "lit windows"}),
        ("a church, plain walls, few windows, no clouds", "churches",
         {"few windows", "no clouds"}),
    ],
)  # fmt: skip
def test_statements_of_a_prompt(prompt, domain, said):
    found = alignment.statements(prompt)
    assert found[0] == domain
    assert set(found[1]) == said


def test_prompt_that_states_nothing_is_refused():
    with pytest.raises(ValueError, match="'a person' states nothing"):
        alignment.statements("a person")


@pytest.mark.parametrize("domain", training.DOMAINS)
def test_captions_hold_of_their_drawings_and_not_of_others(domain):
    drawn = training.draw(domain, 200, seed=7)
    artist = training.DOMAINS[domain]
    captions = artist.captions(drawn.factors, np.random.default_rng(0))
    images = rewards.from_uint8(torch.from_numpy(drawn.pictures))
    told = [i for i, text in enumerate(captions) if text.count(",") > 2]
    images, captions = images[told], [captions[i] for i in told]
    for judge in (alignment.reward, alignment.truth):
        own = judge(images, captions)
        other = judge(images.roll(1, 0), captions)
        assert own.mean() > 0.93
        assert other.mean() < own.mean() - 0.2
        assert ((own >= 0) & (own <= 1)).all()
