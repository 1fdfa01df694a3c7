"""Where things are. Nothing else in the project knows a path.

What is read, profiles, notebooks and the toy world, is in the checkout that holds this package.
What is written, runs and figures, goes there too, or under the folder that DDPO_ROOT names.
"""

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIG, NOTEBOOKS, DATA = ROOT / "config", ROOT / "notebooks", ROOT / "data"
TOY, THESIS = DATA / "toy", DATA / "thesis"
OUTPUT = Path(os.environ.get("DDPO_ROOT") or ROOT).absolute()
RUNS, FIGURES = OUTPUT / "data" / "runs", OUTPUT / "figures"

if not (CONFIG.is_dir() and NOTEBOOKS.is_dir()):
    del ROOT, CONFIG, NOTEBOOKS, DATA, TOY, THESIS, OUTPUT, RUNS, FIGURES


def __getattr__(name: str):
    if name.isupper() and "ROOT" not in globals():
        advice = "clone it and pip install -e <folder>. The rest of ddpo_lib does without"
        raise RuntimeError(f"ddpo_lib.book needs a checkout of the project: {advice}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def resolve(source: str) -> str:
    """A model's source as loaders want it: a path, relative to data/, becomes absolute, a Hub id
    stays. What does not exist counts as a path if it starts with a ".", "/" or "~"."""
    path = globals().get("DATA") or __getattr__("DATA")
    path /= os.path.expanduser(source)
    return str(path) if source.startswith((".", "/", "~")) or path.exists() else source


def shown(path: str | Path) -> str:
    """A path as people read it, from the folder on that holds the checkout or what is written."""
    inside = [folder for folder in (OUTPUT, ROOT) if Path(path).is_relative_to(folder)]
    return Path(path).relative_to(inside[0]).as_posix() if inside else str(path)
