"""One optimizer step on the mean loss of some units. It knows no objective."""

import math
from collections.abc import Callable

import torch

from ddpo_lib import memory, parallel

Loss = Callable[[torch.Tensor], tuple[torch.Tensor, dict[str, torch.Tensor]]]
"""Units (U, D, 2) of decisions to their losses (U,), with a gradient, and to what is logged of
them, name → (U,)."""


def update(
    network: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    rows: torch.Tensor,
    loss: Loss,
    *,
    n_units: int,
    micro_batch: int,
    max_grad_norm: float,
    rate: float,
) -> dict[str, float]:
    """Accumulate the gradient in micro-batches, check it, rescale it, take the step.

    Processes that hold parts of the units make one step together, see `parallel`.

    Args:
        network: whose memory the micro-batches must fit, see `memory.fit`.
        optimizer: holds what is learned.
        rows: (U, D, 2) int64, this process's units.
        n_units: of all processes; the loss is the mean over them.
        micro_batch: decisions per forward and backward; fewer where a GPU's memory holds no more.
        max_grad_norm: the gradient is rescaled to at most this norm.
        rate: this step's learning rate.

    Returns:
        Means over all units: "loss" and what `loss` logs; "grad_norm" before it was rescaled, and
        "learning_rate".

    Raises:
        FloatingPointError: the gradient is not finite; the weights are left as they were.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]

    def accumulate(size: int) -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        sums: dict[str, float] = {}
        for part in rows.split(size) if len(rows) else []:
            values, logged = loss(part)
            (values.sum() / n_units).backward()
            for name, value in {"loss": values.detach(), **logged}.items():
                sums[name] = sums.get(name, 0.0) + value.double().sum().item()
        return sums

    size = max(1, min(micro_batch // rows.shape[1], len(rows)))
    sums = parallel.add(memory.fit(network, "update", accumulate, size))
    parallel.sum_gradients(parameters)
    grad_norm = torch.nn.utils.clip_grad_norm_(parameters, max_grad_norm).item()
    if not math.isfinite(grad_norm):
        raise FloatingPointError(
            f"the gradient's norm is {grad_norm}: nothing was updated. Lower the learning rate "
            f"({rate:.3g}), or set bf16 to false"
        )
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    means = {name: value / n_units for name, value in sums.items()}
    return {**means, "grad_norm": grad_norm, "learning_rate": rate}
