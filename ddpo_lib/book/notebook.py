"""What every notebook does first: check its parameters, say where it runs."""

import ast
import contextlib
import importlib.metadata
import io
import math
import platform
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from IPython import get_ipython
from IPython.display import clear_output

from ddpo_lib.book import batch, finetuning, profiles
from ddpo_lib.book.figures import Page
from ddpo_lib.book.profiles import Profile, Run
from ddpo_lib.settings import check_whole

SHOWN = ("torch", "diffusers", "transformers", "open_clip_torch")


def begin(notebook: str) -> Page:
    """Check the notebook's parameters and print versions and device.

    The parameters cell, and the one that papermill injects after it, start with "# Parameters".
    ValueError for one that the notebook lacks, about which papermill only warns, or cannot use.
    """
    space = get_ipython().user_ns
    cells = [cell for cell in space["In"] if cell.lstrip().startswith("# Parameters")]
    # nbval keeps no history, and runs the notebook's own file.
    known = list(batch.assigned(cells[0]) if cells else batch.parameters(notebook))
    if not set(known) <= set(space):
        raise ValueError(f"run the parameters cell of notebook {notebook} first")
    given = {name for cell in cells if cell != cells[0] for name in batch.assigned(cell)}
    if unknown := sorted(given - set(known)):
        raise ValueError(f"unknown parameter {unknown}: notebook {notebook} takes {known}")
    policies = [*profiles.load(space["profile"]).policies]
    if "policy" in known and space["policy"] not in policies:
        raise ValueError(f"unknown policy {space['policy']!r}: {space['profile']} has {policies}")
    for name, node in batch.parameters(notebook).items():
        default = ast.literal_eval(node)
        _check_like(name, space.get(name, default), default)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in SHOWN)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    threads = torch.get_num_threads()
    print(f"Python {platform.python_version()}, {versions}; device: {device}, {threads} threads")
    return Page(notebook, space["profile"], {name: space[name] for name in known}, given)


def _check_like(name: str, value, default) -> None:
    """ValueError unless a parameter is of its default's kind: a seed, a count, a finite number."""
    if type(default) is int or (name.startswith("n_") and value is not None):
        check_whole(name, value, int(name != "seed"))
    elif type(default) is float and not (type(value) in (int, float) and math.isfinite(value)):
        raise ValueError(f"{name}={value!r}: must be a finite number")


def shorten(page: Page, **values) -> None:
    """In profile smoke, give parameters these values, in the notebook and in the page's record; but
    not those that papermill was given."""
    if page.profile == "smoke":
        chosen = {name: value for name, value in values.items() if name not in page.given}
        get_ipython().user_ns.update(chosen)
        page.parameters.update(chosen)


def finetuned(profile: Profile, wanted: list[Run]) -> list[Path]:
    """The runs' folders. What is missing is finetuned first, so that every notebook runs alone."""
    missing = [run for run in wanted if finetuning.iterations_done(run) < run.settings.n_iterations]
    if missing:
        minutes = batch.seconds(profile, missing, {}, cores=1) / 60
        about = f", about {minutes:.0f} min" if profile.is_toy else ""
        print(f"to be finetuned first{about}: {', '.join(run.name for run in missing)}")
    with bars():
        return [finetuning.finetune(run) for run in wanted]


def finetuned_or_published(profile: Profile, wanted: list[Run]) -> None:
    """As `finetuned`, but where a run was never begun, a policy that the profile names as published
    will do for `results.finetuned_pictures`."""
    finetuned(profile, [r for r in wanted if finetuning.begun(r) or not profile.published(r)])


@contextlib.contextmanager
def bars() -> Iterator[None]:
    """Show progress bars inside, then clear the cell's output: saved bars would be dead widgets.
    What was printed inside stays; so begin a cell with this."""
    if "diffusers" in sys.modules:  # reading a pipeline shows a bar, saved ones are dead
        sys.modules["diffusers"].utils.logging.disable_progress_bar()
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
