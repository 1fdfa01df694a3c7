"""Saving with provenance, and what a notebook checks before it starts."""

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from ddpo_lib.book import figures, notebook, paths
from ddpo_lib.book.figures import Page

PAGE = Page("51_what_the_seeds_agree_on", "toy", {"profile": "toy", "seed": 3})


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Figures of a test go to a folder of their own."""
    folder = tmp_path / "figures"
    monkeypatch.setattr(paths, "FIGURES", folder)
    monkeypatch.setattr(paths, "RUNS", tmp_path / "data" / "runs")
    yield folder
    plt.close("all")


def drawing(height=1.0):
    figures.use_style()
    fig, ax = plt.subplots(figsize=(2, 2))
    ax.plot([0, 1], [0, height])
    return fig


def manifest():
    return json.loads((paths.FIGURES / "manifest.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    "name, expected",
    [
        ("fig_5_3_learning_curves", "5.3"),
        ("fig_5_12_samples", "5.12"),
        ("fig_2_1", "2.1"),
        ("fig_b_1_more_samples", "B.1"),
        ("table_5_1", "table 5.1"),
        ("table_a_2", "table A.2"),
        ("extra_54_factor_shifts", "extra 54"),
    ],
)
def test_identifier(name, expected):
    assert figures.identifier(name) == expected


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
    assert entry["notebook"] == "51_what_the_seeds_agree_on"
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


@pytest.mark.parametrize("kind", ["png", "pdf"])
def test_failure_while_saving_leaves_the_figure_as_it_was(folder, monkeypatch, kind):
    """Half a PNG in the place of the good one, under the old hash, is worse than none."""
    figures.save(drawing(), "fig_5_3_learning_curves", PAGE)
    before = {file: file.read_bytes() for file in folder.rglob("*.*")}
    fig = drawing(height=-1.0)
    savefig = fig.savefig

    def fail(file, **options):
        savefig(file, **options)
        if str(file).endswith(kind):
            os.truncate(file, 100)
            raise OSError("No space left on device")

    monkeypatch.setattr(fig, "savefig", fail)
    with pytest.raises(OSError, match="No space left"):
        figures.save(fig, "fig_5_3_learning_curves", PAGE)
    assert {file: file.read_bytes() for file in folder.rglob("*.*")} == before


def test_failure_while_saving_leaves_the_table_as_it_was(folder, monkeypatch):
    file = figures.save_table(pd.DataFrame({"a": [1]}), "table_5_1", PAGE)
    table = pd.DataFrame({"a": [2]})

    def fail(draft, **_):
        draft.write_text("a")
        raise KeyboardInterrupt

    monkeypatch.setattr(pd.DataFrame, "to_csv", lambda _, draft, **options: fail(draft))
    with pytest.raises(KeyboardInterrupt):
        figures.save_table(table, "table_5_1", PAGE)
    assert file.read_text() == "a\n1\n"
    assert [each.name for each in file.parent.iterdir()] == ["table_5_1.csv"]


def test_manifest_forgets_a_figure_whose_files_are_gone(folder):
    for name in ("fig_5_3_a", "fig_5_4_b", "fig_5_5_c"):
        figures.save(drawing(), name, PAGE)
    (folder / "toy/fig_5_4_b.png").unlink()
    figures.save(drawing(), "fig_5_5_c", PAGE)
    assert [entry["name"] for entry in manifest()] == ["fig_5_3_a", "fig_5_5_c"]
    assert figures.manifest() == manifest()


def test_matplotlibrc_of_the_user_changes_nothing(tmp_path):
    """Nor does an installed font that others lack."""
    code = (
        "import sys; from ddpo_lib.book import figures; figures.use_style()\n"
        "import matplotlib.pyplot as plt; fig, ax = plt.subplots(); ax.plot([0, 1]); "
        "ax.set_title('title'); fig.savefig(sys.argv[1], metadata={'Software': None})"
    )
    (tmp_path / "matplotlibrc").write_text(
        "lines.marker: o\nfigure.facecolor: red\naxes.grid: True\nfont.family: serif\n"
    )
    (tmp_path / "empty").mkdir()
    for name, folder in (("a", tmp_path), ("b", tmp_path / "empty")):
        command = [sys.executable, "-c", code, tmp_path / f"{name}.png"]
        subprocess.run(command, cwd=folder, env=os.environ | {"MATPLOTLIBRC": folder}, check=True)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    figures.use_style()
    assert plt.rcParams["font.sans-serif"] == ["DejaVu Sans"]


def test_page_needs_no_notebook_and_notebook_no_heavy_library():
    """They take seconds, which most notebooks would pay for nothing."""
    heavy = ("diffusers", "transformers", "open_clip", "accelerate", "huggingface_hub", "pandas",
             "sklearn", "seaborn", "papermill", "nbformat")  # fmt: skip
    for modules, absent in {
        "figures": (*heavy, "ddpo_lib.book.notebook", "ddpo_lib.finetune", "ddpo_lib.encoders"),
        "notebook, figures, profiles, results, batch, model_cards, diagrams": heavy,
    }.items():
        code = f"from ddpo_lib.book import {modules}; import sys; "
        code += f"print([name for name in {absent} if name in sys.modules])"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout == "[]\n", done.stdout + done.stderr


def test_worlds_and_figures_keep_their_own_entries(folder):
    other_world = Page("51_what_the_seeds_agree_on", "thesis", {"profile": "thesis"})
    table = pd.DataFrame({"policy": ["faces"], "n": [10]})
    figures.save(drawing(), "fig_5_3_learning_curves", PAGE)
    figures.save(drawing(), "fig_5_3_learning_curves", other_world)
    file = figures.save_table(table, "table_5_1", PAGE)
    assert file.read_text() == "policy,n\nfaces,10\n"
    assert [(entry["profile"], entry["id"]) for entry in manifest()] == [
        ("thesis", "5.3"), ("toy", "5.3"), ("toy", "table 5.1"),
    ]  # fmt: skip
    assert manifest()[0]["seed"] is None


def test_full_disk_is_one_line_with_the_path(folder, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=f"cannot write {folder}.*No space left.*free some space"):
        figures.save_table(pd.DataFrame(), "table_1_0", PAGE)
    assert not [file for file in folder.rglob("*") if file.is_file()]


def test_notebooks_that_save_side_by_side_keep_each_others_entries(folder, monkeypatch):
    figures.save_table(pd.DataFrame(), "table_1_0", PAGE)
    loads = json.loads

    def slow(text, **options):
        time.sleep(0.05)  # long enough for the others to read what this one will replace
        return loads(text, **options)

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
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells), tmp_path / "51_what_the_seeds_agree_on.ipynb"
        )

    write("draw()")
    figures.save_table(pd.DataFrame(), "table_5_1", PAGE)
    (entry,) = manifest()
    write("draw()", "Other prose.")
    assert entry["code"] == figures.code_hash("51_what_the_seeds_agree_on")
    write("draw(2)")
    assert entry["code"] != figures.code_hash("51_what_the_seeds_agree_on")


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


# ------------------------------------------------------------------------------- notebook


@pytest.fixture
def kernel(monkeypatch):
    """kernel(*cells): runs cells in a pretended IPython; gives its names."""

    def run(*cells):
        space = {"In": ["", *cells]}
        for cell in cells:
            exec(cell, space)
        monkeypatch.setattr(notebook, "get_ipython", lambda: SimpleNamespace(user_ns=space))
        return space

    return run


CELL = "# Parameters\nprofile = 'toy'\nseed = 0\nsettings = {'eta': 0.5}\n"


def test_page_carries_the_parameters_of_this_run(kernel, capsys):
    kernel("import math", CELL, "# Parameters\nseed = 5\n", "derived = seed + 1")
    page = notebook.begin("51_what_the_seeds_agree_on")
    parameters = {"profile": "toy", "seed": 5, "settings": {"eta": 0.5}}
    assert page == Page("51_what_the_seeds_agree_on", "toy", parameters, {"seed"})
    shown = capsys.readouterr().out
    assert f"torch {importlib.metadata.version('torch')}" in shown
    assert "device: " in shown


def test_notebook_without_injected_parameters(kernel):
    kernel(CELL + "b = seed / 3", CELL + "b = seed / 3")  # run twice by hand
    page = notebook.begin("51_what_the_seeds_agree_on")
    assert page.parameters["seed"] == 0 and not page.given


def test_without_history_the_parameters_are_the_files(kernel):
    space = kernel("profile = 'toy'; n_pictures = 8; seed = 4")
    page = notebook.begin("51_what_the_seeds_agree_on")
    assert page.parameters == {"profile": "toy", "n_pictures": 8, "seed": 4}
    del space["n_pictures"]
    with pytest.raises(ValueError, match="run the parameters cell of notebook 51_what"):
        notebook.begin("51_what_the_seeds_agree_on")


def test_profile_smoke_shortens_what_nobody_gave_and_the_record_is_what_runs(kernel, folder):
    """`-p profile smoke -p n_walks 5000` runs 5000."""
    cell = "# Parameters\nprofile = 'toy'\nn_walks = 9000\nn_runs = 99\n"
    given = "# Parameters\nprofile = 'smoke'\nn_walks = 5000\n"
    space = kernel(cell, given)
    for _ in range(2):  # the cell may be run again
        page = notebook.begin("51_what_the_seeds_agree_on")
        notebook.shorten(page, n_walks=20, n_runs=2)
        assert (space["n_walks"], space["n_runs"]) == (5000, 2)
        assert page.parameters == {"profile": "smoke", "n_walks": 5000, "n_runs": 2}
    figures.save_table(pd.DataFrame(), "table_5_1", page)
    assert manifest()[0]["parameters"] == page.parameters

    space = kernel(cell)
    page = notebook.begin("51_what_the_seeds_agree_on")
    notebook.shorten(page, n_walks=20, n_runs=2)
    assert (space["n_walks"], page.parameters["n_walks"]) == (9000, 9000)


def test_bars_leave_what_was_printed(capsys, monkeypatch):
    cleared = []
    monkeypatch.setattr(notebook, "clear_output", lambda: cleared.append(True))
    with notebook.bars():
        print("said")
    assert capsys.readouterr().out == "said\nsaid\n" and cleared


def test_bars_of_loading_pipelines_are_off(monkeypatch):
    monkeypatch.setattr(notebook, "clear_output", lambda: None)
    import diffusers

    diffusers.utils.logging.enable_progress_bar()
    with notebook.bars():
        pass
    assert not diffusers.utils.logging.is_progress_bar_enabled()


# ----------------------------------------------------------------------------------------- tiles


def test_tile_keeps_every_pixel_and_leaves_gaps_and_missing_places_white():
    pictures = np.arange(1, 4, dtype=np.uint8).reshape(3, 1, 1, 1).repeat(2, 1)  # 2 high, 1 wide
    assert figures.tile(pictures, columns=2, gap=0)[..., 0].tolist() == [
        [1, 2], [1, 2], [3, 255], [3, 255],
    ]  # fmt: skip
    row = [1, 255, 255, 2, 255, 255, 3]
    assert figures.tile(pictures, columns=3, gap=2)[..., 0].tolist() == [row, row]
    assert figures.tile(pictures, columns=1).dtype == np.uint8
