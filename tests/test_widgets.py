"""The sliders: alive under a hand, a line of text elsewhere."""

import io

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import pytest
from PIL import Image

from ddpo_lib.book import widgets

FRAMES = {
    name: np.full((4, 10, 3), value, np.uint8) for name, value in (("0", 0), ("5", 90), ("9", 200))
}


@pytest.fixture
def shown(monkeypatch) -> list:
    """What was displayed."""
    things = []
    monkeypatch.setattr(widgets, "display", things.append)
    return things


def test_slider_leafs_through_its_frames(monkeypatch, shown, capsys):
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/notebook.ipynb")
    widgets.slide(FRAMES, "γ")

    [box] = shown
    slider, picture = box.children
    assert isinstance(slider, ipywidgets.SelectionSlider) and slider.description == "γ"
    assert [name for name, _ in slider.options] == list(FRAMES)
    for name, frame in FRAMES.items():
        slider.label = name
        seen = np.asarray(Image.open(io.BytesIO(picture.value)))
        assert seen.shape == (320, 800, 3)
        assert (seen == frame[0, 0]).all()
    assert capsys.readouterr().out == ""


def test_without_a_hand_a_line_of_text(monkeypatch, shown, capsys):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    widgets.slide(FRAMES, "γ")
    assert shown == []
    assert capsys.readouterr().out == "[In JupyterLab a slider for γ is here, from 0 to 9.]\n"


def squares(side=2, shade="dark"):
    """A figure of which only the colour says what it was drawn with."""
    fig = plt.figure(figsize=(1, 1), dpi=50)
    fig.patch.set_facecolor((side / 10, 0.5, 0 if shade == "dark" else 1))
    squares.drawn.append((side, shade))
    return fig


@pytest.mark.usefixtures("figures_closed")
def test_live_figure_is_drawn_from_its_sliders(monkeypatch, shown, capsys):
    monkeypatch.setenv("JPY_SESSION_NAME", "/home/notebook.ipynb")
    squares.drawn = []
    widgets.live(squares, side=[1, 2, 5], shade=["dark", "light"])

    [box] = shown
    side, shade, picture = box.children
    assert (side.description, side.value, shade.value) == ("side", 2, "dark")
    assert [name for name, _ in side.options] == ["1", "2", "5"]
    side.value = 5
    shade.value = "light"
    assert squares.drawn == [(2, "dark"), (5, "dark"), (5, "light")]
    seen = np.asarray(Image.open(io.BytesIO(picture.value)).convert("RGB"))
    assert np.allclose(seen[0, 0], (127, 127, 255), atol=1)
    assert plt.get_fignums() == []  # or each would be shown again below the cell
    assert capsys.readouterr().out == ""


@pytest.mark.usefixtures("figures_closed")
def test_live_figure_stands_still_without_a_hand(monkeypatch, shown, capsys):
    monkeypatch.delenv("JPY_SESSION_NAME", raising=False)
    squares.drawn = []
    widgets.live(squares, side=[1, 2, 5])
    assert shown == [] and squares.drawn == [(2, "dark")] and len(plt.get_fignums()) == 1
    assert capsys.readouterr().out == "[In JupyterLab this figure has a slider for side.]\n"


@pytest.fixture
def figures_closed(monkeypatch):
    """No figure open before and after; `show` as in a notebook, where it waits for nothing."""
    monkeypatch.setattr(plt, "show", lambda: None)
    plt.close("all")
    yield
    plt.close("all")
