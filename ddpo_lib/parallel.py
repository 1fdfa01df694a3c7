"""One finetuning in several processes, started by `accelerate launch`; alone, nothing changes.

Every process holds the whole policy and rolls out its share of the trajectories. Rewards are
gathered before advantages are taken, and gradients are summed before the optimizer steps, so all
processes make the same update. The main one writes the run's folder.
"""

import functools

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object


@functools.cache
def _state() -> PartialState:
    return PartialState()


def n_processes() -> int:
    return _state().num_processes


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return _state().is_main_process


def wait() -> None:
    """Until every process has come here."""
    _state().wait_for_everyone()


def share(n: int) -> slice:
    """This process's part of n samples: consecutive ones, at least one.

    Raises:
        ValueError: there are more processes than samples.
    """
    size, rank = n_processes(), _state().process_index
    if n < size:
        raise ValueError(f"{n} samples cannot be shared by {size} processes: start fewer")
    return slice(n * rank // size, n * (rank + 1) // size)


def gather(values: torch.Tensor) -> torch.Tensor:
    """The processes' tensors, one after the other along their first dimension, in all of them."""
    if n_processes() == 1:
        return values
    return torch.cat(gather_object([values.cpu()])).to(values.device)


def total(value: float) -> float:
    """Sum over the processes."""
    return sum(gather_object([value])) if n_processes() > 1 else value


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over the processes."""
    if n_processes() == 1:
        return
    for p in parameters:
        if p.grad is None:  # this process had no sample in the mini-batch
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    dist.all_reduce(flat)
    for p, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(summed.view_as(p))
