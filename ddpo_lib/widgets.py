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
    """Show a slider that leafs through pictures which are drawn already.

    Only where a hand can reach it: saved by papermill or nbval it would be a dead widget, so there
    a line of text stands for it.

    Args:
        frames: what the slider says, to its picture, uint8 (H, W, 3).
        label: what the slider sets.
    """
    if not is_live():
        print(f"[In JupyterLab a slider for {label} is here, from {' to '.join(_ends(frames))}.]")
        return
    options = [(name, _png(picture)) for name, picture in frames.items()]
    slider = ipywidgets.SelectionSlider(
        options=options, description=label, layout={"width": f"{WIDTH}px"}
    )
    picture = ipywidgets.Image(value=slider.value, format="png")
    link((slider, "value"), (picture, "value"))
    display(ipywidgets.VBox([slider, picture]))


def is_live() -> bool:
    """Does this notebook run in JupyterLab, Jupyter Notebook, VS Code or Colab?"""
    shell = get_ipython()
    in_editor = shell is not None and "__vsc_ipynb_file__" in shell.user_ns
    return "JPY_SESSION_NAME" in os.environ or "google.colab" in sys.modules or in_editor


def _ends(frames: dict) -> tuple[str, str]:
    names = list(frames)
    return names[0], names[-1]


def _png(picture: np.ndarray) -> bytes:
    image = Image.fromarray(picture)
    zoom = max(1, WIDTH // image.width)
    buffer = io.BytesIO()
    image.resize((zoom * image.width, zoom * image.height), Image.Resampling.NEAREST).save(
        buffer, format="PNG"
    )
    return buffer.getvalue()
