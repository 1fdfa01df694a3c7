"""Batches that a GPU's memory does not hold are halved until it does."""

from collections.abc import Callable
from weakref import WeakKeyDictionary

import torch
from tqdm.auto import tqdm

_held: WeakKeyDictionary = WeakKeyDictionary()
"""Network → kind of work → the batch that memory held, since `start_over`."""


def start_over(network: torch.nn.Module) -> None:
    """Try full batches again: what filled the memory may be gone."""
    _held.pop(network, None)


def fit(network: torch.nn.Module, work: str, call: Callable, batch_size: int):
    """call(batch_size), and again with half as much for as long as a GPU runs out of memory.

    The next call for the same network and work begins where this one ended, until `start_over`.
    `work` is a label, shown when a batch is halved; `call` must start anew each time, whatever a
    failed one left. torch.OutOfMemoryError if a batch of one does not fit either.
    """
    held = _held.setdefault(network, {})
    batch_size = min(batch_size, held.get(work, batch_size))
    while True:
        try:
            return call(batch_size)
        except torch.OutOfMemoryError:
            if batch_size == 1:
                raise
        # Not in the except clause: there the traceback still holds the tensors of the failed call.
        torch.cuda.empty_cache()
        batch_size = held[work] = batch_size // 2
        tqdm.write(f"{work}: out of GPU memory, going on with batches of {batch_size}")
