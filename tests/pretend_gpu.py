"""A GPU played by the CPU: what is on the wrong device fails, as it would on a machine with one.

Inside `pretend_gpu()` torch says that there is a GPU. Tensors on it are computed by the CPU, but
say that they are on cuda:0, do not mix with CPU tensors, and make no numpy array. So the results
are those of the CPU, bit for bit, and nothing is said about a GPU's speed, memory or rounding.
"""

import contextlib
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only

aten = torch.ops.aten

PRETENDED = {
    "_lazy_init": lambda: None,
    "current_device": lambda: 0,
    "device_count": lambda: 1,
    "empty_cache": lambda: None,
    "get_device_name": lambda device=None: "a pretended GPU",
    "is_available": lambda: True,
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "is_bf16_supported": lambda *args, **kwargs: True,
    "mem_get_info": lambda device=None: (10**10, 10**10),
    "synchronize": lambda device=None: None,
}


@contextlib.contextmanager
def pretend_gpu():
    torch._C._ensureCUDADeviceGuardSet()  # lets C++ speak of cuda without a driver
    torch._C._set_only_lift_cpu_tensors(True)  # lets the mode see torch.tensor(…, device="cuda")
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with contextlib.ExitStack() as stack:
            for name, value in PRETENDED.items():
                stack.enter_context(mock.patch.object(torch.cuda, name, value))
            stack.enter_context(_Mode())
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)


class GpuTensor(torch.Tensor):
    """Holds a CPU tensor and says that it is on a GPU."""

    @staticmethod
    def __new__(cls, held: torch.Tensor):
        # To C++, autograd above all, it is on "meta", which needs no driver.
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device="meta", requires_grad=held.requires_grad,
        )  # fmt: skip

    def __init__(self, held: torch.Tensor):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: torch.device("cuda:0"))
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def new_tensor(self, data, dtype=None) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device="cuda")

    def __getitem__(self, key) -> torch.Tensor:
        keys = key if isinstance(key, tuple) else (key,)
        listed = (list, np.ndarray)
        keys = tuple(torch.as_tensor(k) if isinstance(k, listed) else k for k in keys)
        return super().__getitem__(keys)

    def tolist(self) -> list:
        return self.held.tolist()

    def __format__(self, form: str) -> str:
        return format(self.held.detach(), form)

    def __repr__(self) -> str:
        return f"GpuTensor({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


class _Mode(TorchDispatchMode):
    """Sees what is made without any tensor, such as torch.ones(3, device="cuda")."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {})


def _compute(func, args, kwargs):
    tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
    was_on_gpu = any(isinstance(x, GpuTensor) for x in tensors)
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if asked == "meta" and (was_on_gpu or func is aten.scalar_tensor.default):
        asked = "cuda"  # asked for by C++, which takes a GpuTensor's device for meta
    on_gpu = was_on_gpu if asked is None else asked == "cuda"
    _check(func, args, kwargs, tensors, on_gpu)
    held_args, held_kwargs = tree_map_only(GpuTensor, lambda x: x.held, (args, kwargs))
    if asked == "cuda" or (was_on_gpu and asked == "cpu"):
        held_kwargs = held_kwargs | {"device": torch.device("cpu")}
    out = func(*held_args, **held_kwargs)
    if not on_gpu:
        return out
    out = tree_map_only(torch.Tensor, GpuTensor, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if was_on_gpu else out


def _check(func, args, kwargs, tensors, on_gpu) -> None:
    if func in (aten.copy_.default, aten._to_copy.default):
        return
    if on_gpu and any(x.device.type == "meta" for x in tensors):
        raise NotImplementedError(f"{func}: C++ has made a tensor without values; see GpuTensor")
    generator = kwargs.get("generator")
    if on_gpu and generator is not None and generator.device.type == "cpu":
        raise RuntimeError(f"{func}: expected a generator on cuda, found one on cpu")
    indexed = func in (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
    if indexed and isinstance(args[0], GpuTensor):
        tensors = [args[0], *args[2:3]]  # the indices may be on the CPU
    shaped = {isinstance(x, GpuTensor) for x in tensors if x.dim() > 0}
    numbers = {isinstance(x, GpuTensor) for x in tensors if x.dim() == 0}
    if len(shaped) == 2 or (shaped == {False} and True in numbers):
        raise RuntimeError(f"{func}: expected all tensors on one device, found cuda:0 and cpu")
