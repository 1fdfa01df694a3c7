"""One optimizer step on the mean loss of some units. It knows no objective."""

import torch

from ddpo_lib import memory, parallel


def update(network, optimizer, rows, loss, *, n_units, micro_batch, max_grad_norm, rate) -> dict:
    """Accumulate the gradient in micro-batches, check it, rescale it, take the step.

    Args:
        network: whose memory the micro-batches must fit, see `memory.fit`.
        rows: (U, D, 2) int64, this process's units; all processes make one step together.
        loss: of some units, their losses (U,) and what to log of them, name → (U,).
        n_units: of all processes; the loss is the mean over them.
        micro_batch: decisions per forward and backward; fewer where a GPU's memory holds no more.
        rate: this step's learning rate.

    Returns the means over all units of the loss and what is logged, the norm of the policy's
    gradient before it was rescaled to `max_grad_norm`, as that of helpers is, and the rate.
    FloatingPointError where a norm is not finite: the weights are left as they were.
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
    groups = [group["params"] for group in optimizer.param_groups]
    norms = [torch.nn.utils.clip_grad_norm_(each, max_grad_norm) for each in groups]
    grad_norm = norms[0].item()
    if not all(norm.isfinite() for norm in norms):
        advice = f"Lower the learning rate ({rate:.3g}), or set bf16 to false"
        raise FloatingPointError(f"gradient's norm {grad_norm}: nothing was updated. {advice}")
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    optimizer.step()
    means = {name: value / n_units for name, value in sums.items()}
    return {**means, "grad_norm": grad_norm, "learning_rate": rate}
