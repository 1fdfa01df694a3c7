"""One style, and one way to the disk: every figure is saved with its provenance."""

import contextlib
import hashlib
import importlib.metadata
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from ddpo_lib import disk
from ddpo_lib.book import paths
from ddpo_lib.settings import check_whole

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "matplotlib")

PALETTE = {
    "pretrained": "#5e6472", "aesthetic": "#aa4499", "compressibility": "#0077bb",
    "incompressibility": "#ee7733", "over50": "#117733",
}  # fmt: skip
"""One colour a task, distinguishable in colour-blind eyes (Paul Tol's palettes)."""

MAIN, OTHER, THIRD, FOURTH = "#332288", "#cc6677", "#44aa99", "#999933"
"""Chapters 2 and 3 have no tasks, so they use none of the tasks' colours: what a figure is about,
and what it is set beside. What is exact or true is black."""


@dataclass(frozen=True)
class Page:
    """A running notebook, for the provenance of what it saves: its file's stem, its profile, every
    parameter with its value in this run, and the names of those that papermill was given."""

    notebook: str
    profile: str
    parameters: dict
    given: frozenset = frozenset()


def use_style() -> None:
    """The style of every figure, whatever a matplotlibrc says: see config/figures.mplstyle."""
    import seaborn as sns  # takes a second

    plt.rcdefaults()
    sns.set_theme(context="paper", style="ticks", font_scale=1.1)
    plt.style.use(paths.CONFIG / "figures.mplstyle")


def save(fig: plt.Figure, name: str, page: Page, source_runs: list[str] = ()) -> Path:
    """Save a figure as PNG and PDF under figures/<profile>/ and enter it in the manifest.

    The name is a public one, see `identifier`; the page is what `notebook.begin` gave; source_runs
    are the names of the runs whose data the figure shows. Returns the PNG's path.
    """
    # Without a date the same figure is the same file.
    writers = {
        "png": lambda file: fig.savefig(file, metadata={"Software": None}),
        "pdf": lambda file: fig.savefig(file, metadata={"CreationDate": None}),
    }
    return _save(name, writers, page, source_runs)


def save_table(table, name: str, page: Page, source_runs: list[str] = ()) -> Path:
    """Save a DataFrame as <name>.csv under figures/<profile>/ and enter it in the manifest."""
    writers = {"csv": lambda file: table.to_csv(file, index=False, encoding="utf-8")}
    return _save(name, writers, page, source_runs)


def picture_grid(ax: plt.Axes, pictures: np.ndarray, columns: int) -> None:
    """Draw uint8 pictures (N, H, W, C) side by side on an axis, `columns` in a row."""
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255}  # of one channel; of three nobody looks at it
    ax.imshow(tile(pictures, columns), interpolation=interpolation(pictures[0]), **grey)
    ax.set_axis_off()


def interpolation(picture: np.ndarray) -> str:
    """For imshow of a picture (H, W, C): small ones show their pixels, of large ones there are more
    than a figure has."""
    return "nearest" if picture.shape[0] <= 64 else "antialiased"


def tile(pictures: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """uint8 pictures (N, H, W, C) → one, `columns` in a row, with `gap` white pixels between."""
    check_whole("columns", columns, 1)
    check_whole("number of pictures", len(pictures), 1)
    n, height, width, channels = pictures.shape
    rows = -(-n // columns)
    missing = ((0, rows * columns - n), (0, gap), (0, gap), (0, 0))
    tiles = np.pad(pictures, missing, constant_values=255).reshape(rows, columns, height + gap, -1)
    canvas = tiles.swapaxes(1, 2).reshape(rows * (height + gap), -1, channels)
    return canvas[: len(canvas) - gap, : canvas.shape[1] - gap]


def identifier(name: str) -> str:
    """The artefact's number in the thesis: "fig_5_3_learning_curves" → "5.3", "table_5_1" →
    "table 5.1", "fig_b_1_…" → "B.1". What the thesis does not have is named after its notebook:
    "extra_54_factor_shifts" → "extra 54", "table_60_methods" → "table 60". ValueError for other
    names."""
    if match := re.fullmatch(r"(extra|table)_([0-9][0-9])_[a-z0-9_]+", name):
        return f"{match[1]} {match[2]}"
    if match := re.fullmatch(r"(fig|table)_([0-9]+|[a-d])_([0-9]+)(_[a-z0-9_]+)?", name):
        return f"{'table ' if match[1] == 'table' else ''}{match[2].upper()}.{match[3]}"
    forms = "<fig|table>_<chapter>_<number>_<slug> or <extra|table>_<notebook>_<slug>"
    raise ValueError(f"{name!r} is no artefact's name: use {forms}")


def code_hash(notebook: str) -> str:
    """sha256 of a notebook's code cells: whether a figure is what the notebook now draws."""
    file = paths.NOTEBOOKS / f"{notebook}.ipynb"
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
    code = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def manifest() -> list[dict]:
    """The entries of figures/manifest.json whose files are there. ValueError if it is damaged."""
    file = paths.FIGURES / "manifest.json"
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file.exists() else []
        return [e for e in entries if all((paths.FIGURES / name).exists() for name in e["files"])]
    except (ValueError, TypeError, KeyError) as error:
        advice = "take it from git, or delete it"
        raise ValueError(f"{file} is damaged ({error!r}): {advice}") from error


def _save(name: str, writers: dict[str, Callable], page: Page, source_runs) -> Path:
    """Write the artefact's files, all or none, and replace its entry in the manifest."""
    number, code, folder = identifier(name), code_hash(page.notebook), paths.FIGURES / page.profile
    manifest()  # a damaged one is an error before anything is written
    files = [folder / f"{name}.{kind}" for kind in writers]
    with contextlib.ExitStack() as drafts:
        for file, write in zip(files, writers.values(), strict=True):
            write(drafts.enter_context(disk.replacing(file)))
    entry = {
        "id": number,
        "name": name,
        "files": [file.relative_to(paths.FIGURES).as_posix() for file in files],
        "notebook": page.notebook,
        "code": code,
        "profile": page.profile,
        "parameters": page.parameters,
        "seed": page.parameters.get("seed"),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "source_runs": list(source_runs),
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    file = paths.FIGURES / "manifest.json"
    with disk.locked(file, limit=60):  # notebooks may run side by side
        others = [e for e in manifest() if (e["name"], e["profile"]) != (name, page.profile)]
        ordered = sorted([*others, entry], key=lambda e: (e["profile"], e["name"]))
        disk.write_json(file, ordered)
    return files[0]
