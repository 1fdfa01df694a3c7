"""Sliders for readers with a kernel; whoever reads without one has the static figure beside it."""

import io
import os
import sys

import ipywidgets
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
