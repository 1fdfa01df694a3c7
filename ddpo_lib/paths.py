"""Where things are. Nothing else in the project knows a path.

The root is the checkout that holds this package, so notebooks and tests find the same files from
any working directory. `DDPO_ROOT` moves it, for instance to a mounted drive in Colab.
"""

import os
from pathlib import Path

ROOT = Path(os.environ.get("DDPO_ROOT", Path(__file__).resolve().parents[1]))

CONFIG = ROOT / "config"
NOTEBOOKS = ROOT / "notebooks"
DATA = ROOT / "data"
TOY = DATA / "toy"
THESIS = DATA / "thesis"
RUNS = DATA / "runs"
FIGURES = ROOT / "figures"


def resolve(source: str) -> str:
    """A model's source as loaders want it: a folder under data/ if there is one, else unchanged.

    "toy/faces" becomes the folder's absolute path; a Hub id such as "google/ddpm-church-256" or an
    absolute path stays as it is.
    """
    folder = DATA / source
    return str(folder) if source and folder.exists() else source
