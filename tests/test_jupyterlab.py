"""Every notebook in JupyterLab, in a real browser: opened, run with Run All Cells, looked at, every
slider moved.

Slow, and needs Chromium (`apt-get install chromium`):

    .venv/bin/python -m pytest -m slow tests/test_jupyterlab.py
"""

import ast
import os
import socket
import subprocess
import sys
import urllib.request

import browser
import pytest

from ddpo_lib.book import paths

NOTEBOOKS = sorted(file.stem for file in paths.NOTEBOOKS.glob("*.ipynb"))
pytestmark = [pytest.mark.slow, browser.needs_chromium]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """Address of a JupyterLab on the notebooks, set to profile smoke as a reader would by hand."""
    root = tmp_path_factory.mktemp("project")
    (root / "notebooks").mkdir()
    for name in NOTEBOOKS:
        text = (paths.NOTEBOOKS / f"{name}.ipynb").read_text()
        text = text.replace('profile = \\"toy\\"', 'profile = \\"smoke\\"')
        (root / "notebooks" / f"{name}.ipynb").write_text(text)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "jupyter", "lab", "--no-browser", "--allow-root", f"--port={port}",
        "--IdentityProvider.token=", "--LabApp.expose_app_in_browser=True", str(root / "notebooks"),
    ]  # fmt: skip
    env = os.environ | {"DDPO_ROOT": str(root)}
    env.pop("MPLBACKEND", None)  # the kernel's own, which shows figures in the notebook
    env.pop("TQDM_DISABLE", None)  # with its progress bars
    with open(root / "lab.log", "w") as log:
        server = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        address = f"http://localhost:{port}"
        browser.wait_for(lambda: urllib.request.urlopen(f"{address}/api/status"))
        yield address
        server.terminate()
        server.wait(30)


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with browser.tab(tmp_path_factory.mktemp("chromium")) as tab:
        yield tab


def sliders(cells):
    """Number of a cell → how many sliders its calls of the book's `widgets` make."""
    made = {}
    for number, cell in enumerate(cells):
        source = "".join(cell["source"]) if cell["cell_type"] == "code" else ""
        if "widgets." not in source:
            continue
        for node in ast.walk(ast.parse(source)):
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if called in ("widgets.slide", "widgets.live"):
                made[number] = len(node.keywords) if called == "widgets.live" else 1
    return made


def move(tab, number, n_sliders):
    """Move each slider of a cell by a key; its picture must become another."""
    cell = f"{CURRENT}.content.widgets[{number}]"
    tab.evaluate(f"{CURRENT}.content.scrollToCell({cell}, 'start')")
    handles = f"[...{cell}.node.querySelectorAll('.noUi-handle')]"
    tab.wait_for(f"{handles}.length === {n_sliders}", 20)
    picture = f"{cell}.node.querySelector('img.widget-image').src"
    for k in range(n_sliders):
        before, value = tab.evaluate(picture), f"{handles}[{k}].ariaValueNow"
        start = tab.evaluate(value)
        for key, code in (("ArrowRight", 39), ("ArrowLeft", 37)):  # left where it is at its end
            if tab.evaluate(value) == start:
                tab.evaluate(f"{handles}[{k}].focus()")
                about = {"key": key, "code": key, "windowsVirtualKeyCode": code}
                tab.call("Input.dispatchKeyEvent", type="keyDown", **about)
                tab.call("Input.dispatchKeyEvent", type="keyUp", **about)
        tab.wait_for(f"{handles}[{k}].ariaValueNow !== {start!r}", 20)
        tab.wait_for(f"{picture} !== {before!r}", 60)


CURRENT = "[...jupyterapp.shell.widgets('main')][0]"


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook_runs_in_jupyterlab(lab, tab, name, tmp_path):
    tab.call("Page.navigate", url=f"{lab}/doc/tree/{name}.ipynb?reset")
    tab.wait_for(f"typeof jupyterapp === 'object' && {CURRENT}?.context?.path === '{name}.ipynb'")
    tab.wait_for(f"{CURRENT}.context.isReady && {CURRENT}.sessionContext.isReady")
    tab.evaluate(f"jupyterapp.shell.activateById({CURRENT}.id)")
    tab.wait_for("jupyterapp.commands.isEnabled('notebook:run-all-cells')")
    tab.evaluate("jupyterapp.commands.execute('notebook:clear-all-cell-outputs')")
    tab.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")

    cells = tab.evaluate(f"{CURRENT}.content.model.toJSON().cells")
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert all(cell["execution_count"] for cell in code)
    declared = sum("image/png" in output.get("data", {}) for output in outputs)
    assert declared or any("text/html" in output.get("data", {}) for output in outputs)
    shown = f"[...{CURRENT}.node.querySelectorAll('.jp-OutputArea img')]"
    tab.wait_for(f"{shown}.filter(image => image.naturalWidth > 100).length >= {declared}", 20)
    if declared:
        tab.evaluate(f"{shown}[0].scrollIntoView({{block: 'center'}})")
    tab.photograph(tmp_path / f"{name}.png")
    for number, n_sliders in sliders(cells).items():
        move(tab, number, n_sliders)
        tab.photograph(tmp_path / f"{name}-{number}.png")
    tab.evaluate(f"{CURRENT}.sessionContext.shutdown()")
    tab.evaluate(f"{CURRENT}.context.save()")
