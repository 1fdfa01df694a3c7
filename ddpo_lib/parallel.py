"""One finetuning in several processes, started by `accelerate launch` or `torchrun`.

Every process holds the whole policy and rolls out its share of the trajectories. Rewards are
gathered before credit is given, and gradients are summed before the optimizer steps, so all
processes make the same update. The main one writes the run's folder. Alone, nothing changes.
"""

import functools
import os

import torch


@functools.cache
def _state():
    from accelerate import PartialState  # takes a second

    # Without `cpu`, on a machine without a GPU, each of a launcher's processes thinks it is alone.
    return PartialState(cpu=not torch.cuda.is_available())


def n_processes() -> int:
    """As many as the launcher says; 1 without one."""
    return _state().num_processes if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 1


def is_main() -> bool:
    """Whether this process writes files and shows progress."""
    return n_processes() == 1 or _state().is_main_process


def wait() -> None:
    """Until every process has come here."""
    if n_processes() > 1:
        _state().wait_for_everyone()


def share(n: int) -> slice:
    """This process's part of n samples: consecutive ones, at least one."""
    size = n_processes()
    rank = _state().process_index if size > 1 else 0
    if n < size:
        raise ValueError(f"{n} samples cannot be shared by {size} processes: start fewer")
    return slice(n * rank // size, n * (rank + 1) // size)


def everywhere(value):
    """The main process's value, in all of them."""
    return _gather_objects(value)[0]


def gather(values: torch.Tensor) -> torch.Tensor:
    """The processes' tensors, one after the other along their first dimension, in all of them."""
    if n_processes() == 1:
        return values
    return torch.cat(_gather_objects(values.cpu())).to(values.device)


def add(values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes, name by name; a process may lack names."""
    everyone = _gather_objects(values)
    names = dict.fromkeys(name for each in everyone for name in each)
    return {name: sum(each.get(name, 0.0) for each in everyone) for name in names}


def sum_gradients(parameters: list[torch.nn.Parameter]) -> None:
    """Replace every gradient by its sum over the processes."""
    if n_processes() == 1:
        return
    for p in parameters:
        if p.grad is None:  # this process had no sample in the mini-batch
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.reshape(-1) for p in parameters])
    torch.distributed.all_reduce(flat)
    for p, summed in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad.copy_(summed.view_as(p))


def _gather_objects(value) -> list:
    if n_processes() == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def local(rows: torch.Tensor, share: slice) -> torch.Tensor:
    """The units (U, D, 2) whose samples this process holds, counted from its first."""
    mine = rows[((rows[..., 1] >= share.start) & (rows[..., 1] < share.stop)).all(1)].clone()
    mine[..., 1] -= share.start
    return mine
