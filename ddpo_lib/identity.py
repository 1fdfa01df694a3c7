"""What tells one reward, policy or objective from another: a changed one makes another run."""

import copyreg
import dis
import functools
import hashlib
import json
import re
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CellType, CodeType, FunctionType, ModuleType

import numpy as np
import torch
from torch import nn

from ddpo_lib.policy import Policy, configuration

CONSTANTS = (type(None), type(...), bool, int, float, complex, str, bytes)
METHODS = (FunctionType, staticmethod, classmethod, property)


def fingerprint(thing: object) -> str:
    """sha256, 64 hexadecimal digits, of what decides the results of a reward, policy, objective …

    The same in every process, folder and file format, and on every device.

    - A function, class or module of this library or of an installed package: its name, and of a
      function the defaults and the closure.
    - Any other function: its compiled code, without its docstring, and all that it uses, in turn,
      but for what it imports in its own body. Any other class or module: its members.
    - A network of a package's layers: these, weights and configuration. A policy: network and
      schedule, not `bf16`, a setting of the run. A dataclass: its fields, but for `compare=False`.
    - Any other object: its class and what pickle would keep of it, a counter or a cache unless
      `__getstate__` leaves it out. Of what cannot be read, such as a lock: its type's name.
    """
    return _digest(thing, {}).hex()


def _digest(thing: object, known: dict) -> bytes:
    """known: id → the object, which so keeps its id, and its digest."""
    if type(thing) in CONSTANTS:
        return hashlib.sha256(repr(thing).encode()).digest()
    if id(thing) not in known:
        known[id(thing)] = thing, b"a cycle"
        try:
            kind, content = _describe(thing, lambda *of: b"".join(_digest(p, known) for p in of))
        except Exception:
            kind, content = _name(type(thing)), b""
        digest = hashlib.sha256(kind.encode() + b"\0")
        digest.update(content)
        known[id(thing)] = thing, digest.digest()
    return known[id(thing)][1]


def _describe(thing: object, parts: Callable[..., bytes]) -> tuple[str, bytes | memoryview]:
    """What kind of thing it is, and its content: raw, or the digests of its parts, in a row."""
    match thing:
        case torch.Tensor():
            raw = thing.detach().cpu().resolve_conj().contiguous().flatten().view(torch.uint8)
            return f"tensor {thing.dtype} {tuple(thing.shape)}", raw.numpy().data
        case np.ndarray() | np.generic() if not thing.dtype.hasobject:
            return f"array {thing.dtype.str} {thing.shape}", thing.tobytes()
        case dict():
            return "dict", b"".join(sorted(parts(*pair) for pair in thing.items()))
        case set() | frozenset():
            return "set", b"".join(sorted(map(parts, thing)))
        case list() | tuple():  # a configuration's tuples come back from JSON as lists
            return "sequence", parts(*thing)
        case torch.device():  # where something runs decides nothing
            return "device", b""
        case FunctionType():
            # An empty cell, which nothing is in yet, has no contents.
            closure = [c.cell_contents for c in thing.__closure__ or () if c != CellType()]
            bound = parts(thing.__defaults__, thing.__kwdefaults__, *closure)
            home = thing.__globals__.get("__name__", "")
            if _is_installed(home):  # its __module__ may be that of a function which it wraps
                return f"{home}.{thing.__code__.co_qualname}", bound
            return "function", bound + parts(*_code(thing.__code__, thing.__doc__), _globals(thing))
        case CodeType():  # of a function inside a function
            return "code", parts(*_code(thing))
        case type() | ModuleType():
            if _is_installed(getattr(thing, "__module__", thing.__name__)):
                return _name(thing), b""
            # Not what Python itself puts there, such as the docstring or a module's path.
            own = {k: v for k, v in vars(thing).items() if isinstance(v, METHODS) or k[:2] != "__"}
            return "members", parts(getattr(thing, "__bases__", ()), own)
        case property() | functools._lru_cache_wrapper() | staticmethod() | classmethod():
            return _name(type(thing)), parts(getattr(thing, "__wrapped__", None) or thing.fget)
        case nn.Module() if all(_is_installed(type(layer).__module__) for layer in thing.modules()):
            layers = re.sub(r"0x[0-9a-f]+", "", repr(thing))  # without addresses in memory
            weights = thing.state_dict() | dict(thing.named_buffers())
            config = configuration(thing) if hasattr(thing, "register_to_config") else None
            return "network", parts(layers, weights, config)
        case _ if is_dataclass(thing):
            values = {f.name: getattr(thing, f.name) for f in fields(thing) if f.compare}
            if isinstance(thing, Policy):
                del values["bf16"]
                if thing.text is None:  # as runs have it that are older than these fields
                    del values["text"], values["guidance"]
            return "dataclass", parts(type(thing), values)
        case _ if hasattr(type(thing), "register_to_config"):
            return "scheduler", parts(type(thing), configuration(thing))
        case _ if hasattr(thing, "backend_tokenizer"):  # not its folder, nor how it padded last
            rules = json.loads(thing.backend_tokenizer.to_str())
            del rules["truncation"], rules["padding"]
            return "tokenizer", parts(rules, thing.special_tokens_map, thing.model_max_length)
    reduce = copyreg.dispatch_table.get(type(thing))
    state = reduce(thing) if reduce else thing.__reduce_ex__(4)
    if isinstance(state, str):  # the name of what pickle would import
        return f"{getattr(thing, '__module__', None)}.{state}", b""
    return "object", parts(*state[:3], *(list(items or ()) for items in state[3:5]))


def _code(code: CodeType, docstring: str | None = None) -> tuple:
    """What runs, and not the source, which may have been edited since it was imported."""
    constants = [constant for constant in code.co_consts if constant not in (None, docstring)]
    arguments = code.co_argcount, code.co_kwonlyargcount, code.co_flags & 0x0C  # 0x0C: *, **
    return code.co_code, code.co_names, code.co_exceptiontable, constants, *arguments


def _globals(function: FunctionType) -> dict[str, object]:
    """The global names in a function's code and the functions in it, and what they stand for."""
    codes = [function.__code__]
    for code in codes:  # which grows meanwhile
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    steps = (step for code in codes for step in dis.get_instructions(code))
    used = {step.argval for step in steps if step.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    scope = function.__globals__
    # __file__ and __name__ say where it lies, which decides nothing.
    return {name: scope[name] for name in sorted(used & scope.keys()) if name[:2] != "__"}


def _is_installed(module: str) -> bool:
    """Whether a module is Python's, this library's or an installed package's."""
    root = module.partition(".")[0]
    if root in sys.stdlib_module_names or root == __name__.partition(".")[0]:
        return True
    files = [getattr(sys.modules.get(name), "__file__", None) or "" for name in (module, root)]
    found = any({"site-packages", "dist-packages"} & set(Path(file).parts) for file in files)
    return found and root != "__main__"  # whatever was started, a notebook is not installed


def _name(thing: object) -> str:
    return f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', thing.__name__)}"
