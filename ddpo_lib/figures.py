"""One style, and one way to the disk: every figure is saved with its provenance."""

import hashlib
import importlib.metadata
import json
import os
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import seaborn as sns
from filelock import FileLock

from ddpo_lib import paths
from ddpo_lib.notebook import Page

MANIFEST = paths.FIGURES / "manifest.json"
PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy", "matplotlib")

PALETTE = {
    "pretrained": "#5e6472",
    "aesthetic": "#aa4499",
    "compressibility": "#0077bb",
    "incompressibility": "#ee7733",
    "over50": "#117733",
}
"""One colour a task, distinguishable in colour-blind eyes (Paul Tol's palettes)."""


def use_style() -> None:
    """The style of every figure: legible in print, quiet axes."""
    sns.set_theme(context="paper", style="ticks", font_scale=1.1)
    plt.rcParams.update(
        {
            "figure.dpi": 110,
            "savefig.dpi": 200,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlelocation": "left",
            "legend.frameon": False,
            "figure.constrained_layout.use": True,
            "pdf.fonttype": 42,
        }
    )


def save(fig: plt.Figure, name: str, page: Page, source_runs: list[str] = ()) -> Path:
    """Save a figure as PNG and PDF under figures/<profile>/ and enter it in the manifest.

    Args:
        name: the figure's public name, see `identifier`.
        page: the notebook that draws it, from `notebook.begin`.
        source_runs: names of the runs whose data it shows.

    Returns:
        The PNG's path.
    """
    folder = _folder(page)
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    # Without a date the same figure is the same file.
    fig.savefig(png, metadata={"Software": None})
    fig.savefig(pdf, metadata={"CreationDate": None})
    _record(name, [png, pdf], page, source_runs)
    return png


def save_table(table, name: str, page: Page, source_runs: list[str] = ()) -> Path:
    """Save a DataFrame as <name>.csv under figures/<profile>/ and enter it in the manifest."""
    file = _folder(page) / f"{name}.csv"
    table.to_csv(file, index=False)
    _record(name, [file], page, source_runs)
    return file


def picture_grid(ax: plt.Axes, pictures: np.ndarray, columns: int) -> None:
    """Draw uint8 pictures (N, H, W, C) side by side on an axis, `columns` in a row."""
    ax.imshow(tile(pictures, columns), interpolation=interpolation(pictures[0]))
    ax.set_axis_off()


def interpolation(picture: np.ndarray) -> str:
    """For imshow of a picture (H, W, C): small ones show their pixels, of large ones there are more
    than a figure has."""
    return "nearest" if picture.shape[0] <= 64 else "antialiased"


def tile(pictures: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """uint8 pictures (N, H, W, C) → one, `columns` in a row, with `gap` white pixels between."""
    n, height, width, channels = pictures.shape
    rows = -(-n // columns)
    canvas = np.full(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), 255, np.uint8
    )
    for i, picture in enumerate(pictures):
        top, left = (i // columns) * (height + gap), (i % columns) * (width + gap)
        canvas[top : top + height, left : left + width] = picture
    return canvas


def identifier(name: str) -> str:
    """The artefact's number in the thesis: "fig_5_3_learning_curves" → "5.3", "table_5_1" →
    "table 5.1", "fig_b_1_…" → "B.1". What the thesis does not have is named after its notebook:
    "extra_54_factor_shifts" → "extra 54"."""
    if extra := re.fullmatch(r"extra_(\d\d)_[a-z0-9_]+", name):
        return f"extra {extra[1]}"
    match = re.fullmatch(r"(fig|table)_([0-9]+|[a-d])_([0-9]+)(_[a-z0-9_]+)?", name)
    if match is None:
        raise ValueError(
            f"{name!r} is no artefact's name: use fig_<chapter>_<number>_<slug>, "
            "table_<chapter>_<number> or extra_<notebook>_<slug>"
        )
    number = f"{match[2].upper()}.{match[3]}"
    return f"table {number}" if match[1] == "table" else number


def code_hash(notebook: str) -> str:
    """sha256 of a notebook's code cells: whether a figure is what the notebook now draws."""
    cells = json.loads((paths.NOTEBOOKS / f"{notebook}.ipynb").read_text())["cells"]
    code = "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    return hashlib.sha256(code.encode()).hexdigest()


def _folder(page: Page) -> Path:
    folder = paths.FIGURES / page.profile
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _record(name: str, files: list[Path], page: Page, source_runs) -> None:
    """Replace the artefact's entry in the manifest; notebooks may run side by side."""
    entry = {
        "id": identifier(name),
        "name": name,
        "files": [str(file.relative_to(paths.FIGURES)) for file in files],
        "notebook": page.notebook,
        "code": code_hash(page.notebook),
        "profile": page.profile,
        "parameters": page.parameters,
        "seed": page.parameters.get("seed"),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "source_runs": list(source_runs),
        "sha256": {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files},
    }
    with FileLock(paths.RUNS.parent / "manifest.lock"):
        entries = json.loads(MANIFEST.read_text()) if MANIFEST.exists() else []
        others = [e for e in entries if (e["name"], e["profile"]) != (name, page.profile)]
        ordered = sorted([*others, entry], key=lambda e: (e["profile"], e["name"]))
        draft = MANIFEST.with_suffix(".tmp")
        draft.write_text(json.dumps(ordered, indent=1) + "\n")
        os.replace(draft, MANIFEST)
