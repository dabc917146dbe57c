"""Networks whose weights stay in their files: built without them, and read tensor by tensor where they are needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ...engines.errors import CheckpointError
from .configs import said_by

Find = Callable[[str], "torch.Tensor | None"]
"""Returns the tensor for a parameter name of a module, or None when the checkpoint has none."""


@dataclass(frozen=True)
class Stored:
    """A weight in a checkpoint's files."""

    read: Callable[[], torch.Tensor]
    """Returns it as float32: from the file without a copy where it is that, and only as long as it is used."""
    dtype: torch.dtype
    """What the network computes in."""
    shape: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """Return the weight in the network's type."""
        return self.read().to(self.dtype)


class _Unfilled(TorchFunctionMode):
    """Gives tensors that a network fills later no memory. Those that it computes at once, such as tables, have some."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.empty:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def unfilled_module(build: Callable[[], nn.Module], where: str) -> nn.Module:
    """Build a module whose weights have no memory; raises `CheckpointError` when it cannot be built."""
    try:
        with _Unfilled():
            return build().float()
    except Exception as error:  # configs come from outside, and their classes raise every kind
        raise CheckpointError(
            f"{where}: its config describes no network that can be built ({said_by(error)})"
        ) from error


def load_module(build: Callable[[], nn.Module], find: Find, where: str) -> nn.Module:
    """Build a module for inference whose weights, float32, are those that `find` returns, and stay where they are.

    Its parameters are on the meta device: `filled` and `blanked` make something of them. `where` names the source in
    errors. Raises `CheckpointError` when the module cannot be built, or when a weight is missing, has the wrong shape
    or is damaged.
    """
    module = unfilled_module(build, where)
    shared: dict[int, nn.Parameter] = {}
    for name, slot in module.state_dict(keep_vars=True).items():
        owner, _, own = name.rpartition(".")
        parent = module.get_submodule(owner)
        tensor = _checked(find, name, slot.shape, where, needed=id(slot) not in shared)
        if not isinstance(slot, nn.Parameter):
            if tensor is not None:
                parent.register_buffer(own, tensor.float() if slot.is_floating_point() else tensor)
            continue
        if id(slot) not in shared:
            unfilled = nn.Parameter(torch.empty_like(slot, device="meta"), requires_grad=False)
            unfilled.stored = lambda name=name: _found(find, name).float()  # type: ignore[attr-defined]
            shared[id(slot)] = unfilled
        parent.register_parameter(own, shared[id(slot)])
    return module.eval().requires_grad_(False)


def _checked(find: Find, name: str, shape: torch.Size, where: str, *, needed: bool) -> torch.Tensor | None:
    """Return a weight of a shape; a second name for one that is there may be missing."""
    tensor = find(name)
    if tensor is None:
        if not needed:
            return None
        raise CheckpointError(f"{where} has no weight {name!r}: the file is incomplete or does not fit its config")
    if tensor.shape != shape:
        raise CheckpointError(
            f"{where}: weight {name!r} has shape {list(tensor.shape)} where its config asks for {list(shape)}"
        )
    return tensor


def _found(find: Find, name: str) -> torch.Tensor:
    tensor = find(name)
    assert tensor is not None, f"{name} was there when the network was built"
    return tensor


@contextmanager
def filled(module: nn.Module) -> Iterator[None]:
    """Let a module compute inside the block: each of its layers has its weights in memory while it runs, no longer."""
    handles = []
    for child in module.modules():
        own = {name: p for name, p in child._parameters.items() if p is not None and hasattr(p, "stored")}
        if own:
            handles.append(child.register_forward_pre_hook(_filling(own)))
            handles.append(child.register_forward_hook(_emptying(own), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _filling(own: Mapping[str, Any]) -> Callable[[nn.Module, Any], None]:
    def fill(child: nn.Module, _: Any) -> None:
        for name, parameter in own.items():
            child._parameters[name] = nn.Parameter(parameter.stored().to(parameter.dtype), requires_grad=False)

    return fill


def _emptying(own: Mapping[str, Any]) -> Callable[[nn.Module, Any, Any], None]:
    def empty(child: nn.Module, *_: Any) -> None:
        child._parameters.update(own)

    return empty


def blanked(module: nn.Module) -> dict[int, Stored]:
    """Give a module's stored weights memory that nobody has written to, and so takes none, for a trace.

    Returns what belongs there, by the address of the tensor that stands for it.
    """
    stored: dict[int, Stored] = {}
    blank: dict[int, nn.Parameter] = {}
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is None or not hasattr(parameter, "stored"):
                continue
            if id(parameter) not in blank:
                empty = nn.Parameter(torch.empty(parameter.shape, dtype=parameter.dtype), requires_grad=False)
                blank[id(parameter)] = empty
                stored[empty.data_ptr()] = Stored(parameter.stored, parameter.dtype, tuple(parameter.shape))
            child._parameters[name] = blank[id(parameter)]
    return stored
