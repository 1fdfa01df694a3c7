"""The diagrams: nothing clipped, nothing on top of something else, the right pictures shown."""

from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.patches import Circle, FancyBboxPatch

from ddpo_lib.book import diagrams, figures, shapes

K, N = 10, 4
STATES = np.random.default_rng(0).integers(256, size=(K + 1, N, 8, 8, 3)).astype(np.uint8)
REWARDS = [0.81, -0.4, 12.25, 3.0]

DIAGRAMS = {
    "loop": diagrams.loop,
    "loop of pictures": lambda: diagrams.loop(STATES[-1], REWARDS),
    "reparameterisation": diagrams.reparameterisation,
    "ddim_chain": diagrams.ddim_chain,
    "ddim_chain of pictures": lambda: diagrams.ddim_chain(STATES[:4, 0]),
    "mdp": diagrams.mdp,
    "denoising_mdp": lambda: diagrams.denoising_mdp(STATES[:, 0]),
    "reward_finetuning": diagrams.reward_finetuning,
    "reward_finetuning of pictures": lambda: diagrams.reward_finetuning(STATES, REWARDS),
}


@pytest.fixture(autouse=True)
def style():
    figures.use_style()
    yield
    plt.close("all")


def boxes(fig, artists):
    return [artist.get_window_extent(fig.canvas.get_renderer()) for artist in artists]


def texts(fig):
    return [text for text in fig.axes[0].texts if text.get_text()]


def shown(fig):
    """Pictures of a diagram, in the order of drawing."""
    return [image.get_array() for image in fig.axes[0].images]


@pytest.mark.parametrize("name", DIAGRAMS)
def test_no_text_is_clipped_or_on_another_text_or_picture(name):
    fig = DIAGRAMS[name]()
    fig.canvas.draw()
    page = fig.bbox
    written = texts(fig)
    extents = boxes(fig, written)
    for text, extent in zip(written, extents, strict=True):
        assert page.x0 < extent.x0 and extent.x1 < page.x1, text
        assert page.y0 < extent.y0 and extent.y1 < page.y1, text
    for (a, first), (b, second) in combinations(zip(written, extents, strict=True), 2):
        assert not first.overlaps(second), (a, b)
    for picture in boxes(fig, fig.axes[0].images):
        assert not picture.count_overlaps(extents)


def test_saving_says_nothing(tmp_path, recwarn, caplog):
    """A warning would stand in the notebook."""
    fig = diagrams.reparameterisation()
    for name in ("diagram.png", "diagram.pdf", "again.png"):
        fig.savefig(tmp_path / name)
    assert not recwarn.list and not caplog.records
    assert (tmp_path / "diagram.png").read_bytes() == (tmp_path / "again.png").read_bytes()


@pytest.mark.parametrize("name", DIAGRAMS)
def test_text_in_a_box_or_circle_fits_into_it(name):
    fig = DIAGRAMS[name]()
    fig.canvas.draw()
    nodes = [p for p in fig.axes[0].patches if isinstance(p, (Circle, FancyBboxPatch))]
    for text, extent in zip(texts(fig), boxes(fig, texts(fig)), strict=True):
        for node in boxes(fig, nodes):
            inside = node.x0 <= extent.x0 and extent.x1 <= node.x1
            centred = abs(node.x0 + node.x1 - extent.x0 - extent.x1) < 4
            level = node.y0 < (extent.y0 + extent.y1) / 2 < node.y1
            assert inside or not (centred and level), text


def test_an_inch_is_an_inch():
    fig, ax = shapes.canvas(4, 2)
    shape = shapes.picture(ax, 1.0, 0.5, STATES[0, 0], size=0.5)
    fig.canvas.draw()
    frame = shape.patch.get_window_extent()
    assert np.allclose(frame.bounds, np.array([0.75, 0.25, 0.5, 0.5]) * fig.dpi)
    assert np.allclose(ax.images[0].get_window_extent().bounds, frame.bounds)
    assert (ax.get_xlim(), ax.get_ylim()) == ((0, 4), (0, 2))


@pytest.mark.parametrize("bend", [0, 0.5, -0.5])
def test_arrows_touch_what_they_join_and_their_text_is_beside_them(bend):
    fig, ax = shapes.canvas(4, 4)
    a, b = shapes.circle(ax, 1, 2, radius=0.25), shapes.box(ax, 3, 2, width=0.5, height=0.5)
    shapes.arrow(ax, a, b, "text", at=(0, 0), bend=bend, shrinkA=0, shrinkB=0)
    fig.canvas.draw()
    drawn = ax.patches[-1].get_path().vertices
    assert np.isclose(np.hypot(*(drawn - (1, 2)).T).min(), 0.25, atol=0.03)
    assert np.isclose(abs(drawn - (3, 2)).max(1).min(), 0.25, atol=0.03)
    # A quadratic curve's middle is half-way to its control point.
    assert ax.texts[-1].get_position() == (2, 2 - bend)


def test_loop_shows_pictures_with_their_rewards():
    fig = diagrams.loop(STATES[-1], REWARDS)
    assert np.array_equal(shown(fig), STATES[-1, :3])
    labels = [text.get_text() for text in texts(fig)]
    assert [label for label in labels if "r =" in label] == [
        "$r = 0.81$", "$r = -0.40$", "$r = 12.25$",
    ]  # fmt: skip


@pytest.mark.parametrize("steps, expected", [(4, [0, 1, 2, 3, 4]), (10, [0, 1, 8, 9, 10])])
def test_denoising_mdp_shows_neighbours(steps, expected):
    states = STATES[: steps + 1, 0]
    assert np.array_equal(shown(diagrams.denoising_mdp(states)), states[expected])


def test_reward_finetuning_shows_whole_trajectories():
    fig = diagrams.reward_finetuning(STATES, REWARDS)
    expected = [STATES[k, n] for n in range(3) for k in (0, 7, K)]
    assert np.array_equal(shown(fig), expected)
    labels = [text.get_text() for text in texts(fig)]
    assert "$-0.40$" in labels and "$3.00$" not in labels
