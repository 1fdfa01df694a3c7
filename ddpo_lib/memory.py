"""Batches that a GPU's memory does not hold are halved until it does."""

from collections.abc import Callable
from typing import TypeVar

import torch
from tqdm.auto import tqdm

T = TypeVar("T")

_held: dict[str, int] = {}
"""What was halved so far in this process: the kind of work, and the batch that memory held."""


def fit(work: str, call: Callable[[int], T], batch_size: int) -> T:
    """call(batch_size), and again with half as much for as long as a GPU runs out of memory.

    The next call for the same work begins where this one ended, so the search happens once.

    Args:
        work: a label, shown when a batch is halved.
        call: starts anew each time, whatever a failed one left.

    Raises:
        torch.OutOfMemoryError: a batch of one does not fit either.
    """
    batch_size = min(batch_size, _held.get(work, batch_size))
    while True:
        try:
            return call(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        # Not in the except clause: there the traceback still holds the tensors of the failed call.
        torch.cuda.empty_cache()
        batch_size = _held[work] = batch_size // 2
        tqdm.write(
            f"{work}: out of GPU memory, going on with batches of {batch_size}; set micro_batch to "
            "that, and rollout and update round alike"
        )
