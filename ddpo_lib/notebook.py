"""What every notebook does first: check its parameters, say where it runs."""

import ast
import contextlib
import importlib.metadata
import io
import platform
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch
import transformers

from ddpo_lib import batch, finetune, runs
from ddpo_lib.config import Profile, Run

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
        ValueError: a parameter was injected that the notebook does not have, or the parameters cell
            has not run.
    """
    from IPython import get_ipython

    space = get_ipython().user_ns
    cells = [cell for cell in space["In"] if cell.lstrip().startswith("# Parameters")]
    # nbval keeps no history, and runs the notebook's own file.
    known = assigned_names(cells[0]) if cells else batch.parameters(notebook)
    if not set(known) <= set(space):
        raise ValueError(f"run the parameters cell of notebook {notebook} first")
    unknown = sorted({name for cell in cells[1:] for name in assigned_names(cell)} - set(known))
    if unknown:
        raise ValueError(f"unknown parameter {unknown}: notebook {notebook} takes {known}")
    # A bar for every model that is loaded would bury the bars that say something.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"Python {platform.python_version()}, {versions}; "
        f"device: {device}, {torch.get_num_threads()} threads"
    )
    return Page(notebook, space["profile"], {name: space[name] for name in known})


def finetuned(profile: Profile, wanted: list[Run]) -> list[Path]:
    """The runs' folders. What is missing is finetuned first, so that every notebook runs alone."""
    missing = [run for run in wanted if batch.iterations_done(run) < run.settings.n_iterations]
    if missing:
        minutes = ""
        if profile.is_toy:
            minutes = f", about {batch.seconds(profile, missing, {}, cores=1) / 60:.0f} min"
        print(f"to be finetuned first{minutes}: {', '.join(run.name for run in missing)}")
    with bars():
        return [finetune.finetune(run) for run in wanted]


def finetuned_or_published(profile: Profile, wanted: list[Run]) -> None:
    """See to it that `evaluation.finetuned_pictures` has a policy for each run.

    As `finetuned`, but where a run was never begun, a policy that the profile names as published
    will do.
    """
    begun = [run for run in wanted if (runs.folder(run) / "best").exists()]
    finetuned(profile, [run for run in wanted if run in begun or not profile.published(run)])


@contextlib.contextmanager
def bars() -> Iterator[None]:
    """Show progress bars inside, then clear the cell's output: saved bars would be dead widgets.

    What was printed inside stays; so begin a cell with this.
    """
    from IPython.display import clear_output

    printed = _Echo()
    with contextlib.redirect_stdout(printed):
        yield
    clear_output()
    print(printed.getvalue(), end="")


class _Echo(io.StringIO):
    """Keeps what is printed, and prints it."""

    def __init__(self):
        super().__init__()
        self.screen = sys.stdout

    def write(self, text: str) -> int:
        self.screen.write(text)
        return super().write(text)


def assigned_names(source: str) -> list[str]:
    """Names that a cell of literals assigns, in order."""
    targets = [node.targets[0] for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]
