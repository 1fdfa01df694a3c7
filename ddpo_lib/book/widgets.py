"""Sliders for readers with a kernel; whoever reads without one has the static figure beside it."""

import inspect
import io
import os
import sys
from collections.abc import Callable, Sequence

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from IPython import get_ipython
from IPython.display import display
from PIL import Image

WIDTH = 800
"""Frames are enlarged to about this many screen pixels."""


def slide(frames: dict[str, np.ndarray], label: str) -> None:
    """Show a slider that leafs through frames, what it says → a picture, uint8 (H, W, 3).

    Saved by papermill it would be a dead widget: there a line of text stands for it.
    """
    if not is_live():
        names = list(frames)
        print(f"[In JupyterLab a slider for {label} is here, from {names[0]} to {names[-1]}.]")
        return
    options = [(name, _png(picture)) for name, picture in frames.items()]
    look = {"description": label, "layout": {"width": f"{WIDTH}px"}}
    slider = ipywidgets.SelectionSlider(options=options, **look)
    picture = ipywidgets.Image(value=slider.value, format="png")
    ipywidgets.link((slider, "value"), (picture, "value"))
    display(ipywidgets.VBox([slider, picture]))


def live(draw: Callable[..., plt.Figure], **values: Sequence) -> None:
    """Show a figure that is computed anew whenever a slider is moved: a slider for each of draw's
    parameters that is named here, with the values that it may take. They start at the defaults.

    Where nothing can be moved, the figure of the defaults is shown, and a line of text.
    """
    start = {name: inspect.signature(draw).parameters[name].default for name in values}
    if not is_live():
        draw(**start)
        plt.show()
        print(f"[In JupyterLab this figure has a slider for {', '.join(values)}.]")
        return
    look = {"continuous_update": False, "layout": {"width": f"{WIDTH}px"}}
    sliders = {}
    for name, own in values.items():
        options = [(v if isinstance(v, str) else f"{v:g}", v) for v in own]
        sliders[name] = ipywidgets.SelectionSlider(
            options=options, value=start[name], description=name, **look
        )
    picture = ipywidgets.Image(format="png")

    def redraw(_=None):
        fig, buffer = draw(**{name: slider.value for name, slider in sliders.items()}), io.BytesIO()
        fig.savefig(buffer, format="png")
        plt.close(fig)  # or the notebook would show it once more below
        picture.value = buffer.getvalue()

    redraw()
    for slider in sliders.values():
        slider.observe(redraw, "value")
    display(ipywidgets.VBox([*sliders.values(), picture]))


def is_live() -> bool:
    """Does this notebook run in JupyterLab, Jupyter Notebook, VS Code or Colab?"""
    shell = get_ipython()
    in_editor = shell is not None and "__vsc_ipynb_file__" in shell.user_ns
    return "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules or in_editor


def _png(picture: np.ndarray) -> bytes:
    image, zoom, buffer = Image.fromarray(picture), max(1, WIDTH // picture.shape[1]), io.BytesIO()
    large = image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST)
    large.save(buffer, format="PNG")
    return buffer.getvalue()
