"""Run a notebook's code on the pretended GPU: python notebook_on_gpu.py FILE PROFILE"""

import sys

import matplotlib
import nbformat
from IPython.core.interactiveshell import InteractiveShell
from pretend_gpu import pretend_gpu


def main(file: str, profile: str) -> None:
    matplotlib.use("agg")
    shell = InteractiveShell.instance()
    with pretend_gpu():
        for cell in nbformat.read(file, as_version=4).cells:
            if cell.cell_type == "code":
                shell.run_cell(cell.source, store_history=True).raise_error()
            if "parameters" in cell.metadata.get("tags", []):
                shell.run_cell(f"# Parameters\nprofile = {profile!r}", store_history=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
