"""Saving with provenance, and what a notebook checks before it starts."""

import hashlib
import importlib.metadata
import json
import threading
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ddpo_lib import figures, notebook, paths
from ddpo_lib.notebook import Page

PAGE = Page("51_learning_curves", "toy", {"profile": "toy", "seed": 3})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Figures of a test go to a folder of their own."""
    folder = tmp_path / "figures"
    monkeypatch.setattr(paths, "FIGURES", folder)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(figures, "MANIFEST", folder / "manifest.json")
    yield folder
    plt.close("all")


def drawing(height=1.0):
    figures.use_style()
    fig, ax = plt.subplots(figsize=(2, 2))
    ax.plot([0, 1], [0, height])
    return fig


def manifest():
    return json.loads(figures.MANIFEST.read_text())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("fig_5_3_learning_curves", "5.3"),
        ("fig_5_12_samples", "5.12"),
        ("fig_2_1", "2.1"),
        ("fig_b_1_more_samples", "B.1"),
        ("table_5_1", "table 5.1"),
        ("table_a_2", "table A.2"),
    ],
)
def test_identifier(name, expected):
    assert figures.identifier(name) == expected


@pytest.mark.parametrize("name", ["learning_curves", "fig_5", "Fig_5_3", "fig_5_3-x", "plot_5_3"])
def test_other_names_are_an_error(folder, name):
    with pytest.raises(ValueError, match=r"no artefact's name: use fig_<chapter>_<number>_<slug>"):
        figures.identifier(name)


def test_save_writes_png_pdf_and_an_entry(folder):
    png = figures.save(drawing(), "fig_5_3_learning_curves", PAGE, ["faces-aesthetic-s0"])

    assert png == folder / "toy/fig_5_3_learning_curves.png"
    pixels = np.asarray(Image.open(png).convert("L"))
    assert pixels.shape == (400, 400)
    assert pixels.std() > 1  # not blank
    assert png.with_suffix(".pdf").read_bytes().startswith(b"%PDF")
    (entry,) = manifest()
    assert entry["id"] == "5.3"
    assert entry["name"] == "fig_5_3_learning_curves"
    assert entry["notebook"] == "51_learning_curves"
    assert entry["profile"] == "toy"
    assert entry["parameters"] == {"profile": "toy", "seed": 3}
    assert entry["seed"] == 3
    assert entry["source_runs"] == ["faces-aesthetic-s0"]
    assert entry["versions"]["torch"] == importlib.metadata.version("torch")
    assert entry["files"] == [f"toy/fig_5_3_learning_curves.{kind}" for kind in ("png", "pdf")]
    for file in entry["files"]:
        content = (folder / file).read_bytes()
        assert entry["sha256"][file.split("/")[1]] == hashlib.sha256(content).hexdigest()


def test_same_figure_is_the_same_file_and_a_changed_one_replaces_its_entry(folder):
    figures.save(drawing(), "fig_5_3_learning_curves", PAGE)
    (first,) = manifest()
    figures.save(drawing(), "fig_5_3_learning_curves", PAGE)
    assert manifest() == [first]
    assert b"CreationDate" not in (folder / "toy/fig_5_3_learning_curves.pdf").read_bytes()
    assert "Software" not in Image.open(folder / "toy/fig_5_3_learning_curves.png").info
    figures.save(drawing(height=-1.0), "fig_5_3_learning_curves", PAGE)
    (changed,) = manifest()
    for file, digest in first["sha256"].items():
        assert changed["sha256"][file] != digest


def test_worlds_and_figures_keep_their_own_entries(folder):
    other_world = Page("51_learning_curves", "thesis", {"profile": "thesis"})
    table = pd.DataFrame({"policy": ["faces"], "n": [10]})
    figures.save(drawing(), "fig_5_3_learning_curves", PAGE)
    figures.save(drawing(), "fig_5_3_learning_curves", other_world)
    file = figures.save_table(table, "table_5_1", PAGE)
    assert file.read_text() == "policy,n\nfaces,10\n"
    assert [(entry["profile"], entry["id"]) for entry in manifest()] == [
        ("thesis", "5.3"), ("toy", "5.3"), ("toy", "table 5.1"),
    ]  # fmt: skip
    assert manifest()[0]["seed"] is None


def test_notebooks_that_save_side_by_side_keep_each_others_entries(folder, monkeypatch):
    figures.save_table(pd.DataFrame(), "table_1_0", PAGE)
    loads = json.loads

    def slow(text):
        time.sleep(0.05)  # long enough for the others to read what this one will replace
        return loads(text)

    with monkeypatch.context() as patch:
        patch.setattr(figures.json, "loads", slow)
        threads = [
            threading.Thread(target=figures.save_table, args=(pd.DataFrame(), f"table_1_{i}", PAGE))
            for i in range(1, 6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [entry["name"] for entry in manifest()] == [f"table_1_{i}" for i in range(6)]


def test_entry_tells_a_figure_from_one_of_other_code(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "NOTEBOOKS", tmp_path)

    def write(code, prose="Some prose."):
        cells = [nbformat.v4.new_markdown_cell(prose), nbformat.v4.new_code_cell(code)]
        nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "51_learning_curves.ipynb")

    write("draw()")
    figures.save_table(pd.DataFrame(), "table_5_1", PAGE)
    (entry,) = manifest()
    write("draw()", "Other prose.")
    assert entry["code"] == figures.code_hash("51_learning_curves")
    write("draw(2)")
    assert entry["code"] != figures.code_hash("51_learning_curves")


def test_picture_grid():
    pictures = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, 1).repeat(2, 2)
    _, ax = plt.subplots()
    figures.picture_grid(ax, pictures.repeat(3, 3), columns=2)
    canvas = ax.images[0].get_array()[..., 0]
    w = 255
    assert canvas.tolist() == [
        [1, 1, w, 2, 2],
        [1, 1, w, 2, 2],
        [w, w, w, w, w],
        [3, 3, w, w, w],
        [3, 3, w, w, w],
    ]


# ------------------------------------------------------------------------------- notebook.begin


@pytest.fixture
def kernel(monkeypatch):
    """kernel(*cells): runs cells in a pretended IPython."""

    def run(*cells):
        space = {"In": ["", *cells]}
        for cell in cells:
            exec(cell, space)
        monkeypatch.setattr("IPython.get_ipython", lambda: SimpleNamespace(user_ns=space))

    return run


CELL = "# Parameters\nprofile = 'toy'\nseed = 0\nsettings = {'eta': 0.5}\n"


def test_page_carries_the_parameters_of_this_run(kernel, capsys):
    kernel("import math", CELL, "# Parameters\nseed = 5\n", "derived = seed + 1")
    page = notebook.begin("51_learning_curves")
    parameters = {"profile": "toy", "seed": 5, "settings": {"eta": 0.5}}
    assert page == Page("51_learning_curves", "toy", parameters)
    shown = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}" in shown
    assert "device: " in shown


def test_notebook_without_injected_parameters(kernel):
    kernel(CELL)
    assert notebook.begin("51_learning_curves").parameters["seed"] == 0


def test_misspelled_parameter_is_an_error(kernel):
    kernel(CELL, "# Parameters\nsede = 5\n")
    with pytest.raises(ValueError, match=r"unknown parameter \['sede'\]: notebook 51_l.*'seed'"):
        notebook.begin("51_learning_curves")


def test_assigned_names():
    assert notebook.assigned_names("# Parameters\na = 1\nb = {'c': 2}\nprint(a)\n") == ["a", "b"]


# ----------------------------------------------------------------------------------------- tiles


def test_tile_keeps_every_pixel_and_leaves_gaps_and_missing_places_white():
    pictures = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, 1)  # 2 high, 1 wide
    assert figures.tile(pictures, columns=2, gap=0)[..., 0].tolist() == [
        [1, 2], [1, 2], [3, 255], [3, 255],
    ]  # fmt: skip
    row = [1, 255, 255, 2, 255, 255, 3]
    assert figures.tile(pictures, columns=3, gap=2)[..., 0].tolist() == [row, row]
    assert figures.tile(pictures, columns=1).dtype == np.uint8
