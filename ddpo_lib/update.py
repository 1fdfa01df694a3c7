"""One optimizer step on the mean loss of some units. It knows no objective."""

import functools

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
    FloatingPointError where a norm is not finite, which names a tensor: the weights are left as
    they were.
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
    clip = functools.partial(torch.nn.utils.clip_grad_norm_, error_if_nonfinite=True)
    try:
        grad_norm, *_ = [clip(each, max_grad_norm).item() for each in groups]
    except RuntimeError as error:
        grads = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        bad = [name for name, grad in grads.items() if not grad.isfinite().all()]
        where = bad[0] if bad else "a helper, or all together,"
        said = f"the gradient of {where} is not finite: nothing was updated"
        advice = f"Lower the learning rate ({rate:.3g}), or set bf16 to false"
        raise FloatingPointError(f"{said}. {advice}") from error
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("factor", 1.0)
    optimizer.step()
    means = {name: value / n_units for name, value in sums.items()}
    return {**means, "grad_norm": grad_norm, "learning_rate": rate}
