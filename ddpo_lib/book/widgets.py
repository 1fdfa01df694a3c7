"""Sliders for readers with a kernel; whoever reads without one has the static figure beside it."""

import io
import os
import sys

import ipywidgets
import numpy as np
from IPython import get_ipython
from IPython.display import display
from PIL import Image
from traitlets import link

WIDTH = 800
"""Frames are enlarged to about this many screen pixels."""


def slide(frames: dict[str, np.ndarray], label: str) -> None:
    """Show a slider, of what the label says, that leafs through pictures which are drawn already.

    Frames are what the slider says, to its picture, uint8 (H, W, 3). Saved by papermill or nbval it
    would be a dead widget, so without a hand that can reach it a line of text stands for it.
    """
    if not is_live():
        ends = " to ".join([next(iter(frames)), next(reversed(frames))])
        print(f"[In JupyterLab a slider for {label} is here, from {ends}.]")
        return
    options = [(name, _png(picture)) for name, picture in frames.items()]
    layout = {"width": f"{WIDTH}px"}
    slider = ipywidgets.SelectionSlider(options=options, description=label, layout=layout)
    picture = ipywidgets.Image(value=slider.value, format="png")
    link((slider, "value"), (picture, "value"))
    display(ipywidgets.VBox([slider, picture]))


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
