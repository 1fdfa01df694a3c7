"""What every notebook does first: check its parameters, say where it runs."""

import ast
import importlib.metadata
import platform
from dataclasses import dataclass

import torch

SHOWN = ("torch", "diffusers", "transformers", "open_clip_torch")


@dataclass(frozen=True)
class Page:
    """A running notebook, for the provenance of what it saves."""

    notebook: str
    """Its file's stem, for instance "51_learning_curves"."""
    profile: str
    parameters: dict
    """Every parameter and its value in this run."""


def begin(notebook: str) -> Page:
    """Check the notebook's parameters and print versions and device.

    The parameters cell, and the one that papermill injects after it, start with "# Parameters".
    Papermill only warns about a misspelled name; this raises before anything runs.

    Raises:
        ValueError: a parameter was injected that the notebook does not have.
    """
    from IPython import get_ipython

    space = get_ipython().user_ns
    cells = [cell for cell in space["In"] if cell.lstrip().startswith("# Parameters")]
    known = assigned_names(cells[0])
    unknown = sorted({name for cell in cells[1:] for name in assigned_names(cell)} - set(known))
    if unknown:
        raise ValueError(f"unknown parameter {unknown}: notebook {notebook} takes {known}")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"Python {platform.python_version()}, {versions}; "
          f"device: {device}, {torch.get_num_threads()} threads")
    return Page(notebook, space["profile"], {name: space[name] for name in known})


def assigned_names(source: str) -> list[str]:
    """Names that a cell of literals assigns, in order."""
    targets = [node.targets[0] for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
