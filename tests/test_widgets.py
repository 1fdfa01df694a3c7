"""The slider: alive under a hand, a line of text elsewhere."""

import io

import ipywidgets
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
