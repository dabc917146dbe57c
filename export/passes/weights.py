"""Weights of a graph that are in files until they are written to the graph's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor, from_torch_dtype

from ..checkpoints.streamed import Stored


class StoredTensor(ir.LazyTensor):
    """A weight that is read from its file whenever its numbers are asked for."""

    def __init__(self, load: Callable[[], torch.Tensor], dtype: torch.dtype, shape: Sequence[int]) -> None:
        super().__init__(lambda: TorchTensor(load()), from_torch_dtype(dtype), ir.Shape(shape))
        self._load, self._type, self._sizes = load, dtype, list(shape)

    def turned(self) -> StoredTensor:
        """Return the weight transposed, all its axes in the other order."""
        axes = range(len(self.shape))[::-1]
        return StoredTensor(lambda: self._load().permute(*axes).contiguous(), self._type, self._sizes[::-1])


def attach(model: ir.Model, stored: Mapping[int, Stored]) -> None:
    """Put what is stored in place of the tensors that stood for it in a trace, by their addresses."""
    for value in model.graph.initializers.values():
        tensor: Any = getattr(value.const_value, "raw", None)
        if not isinstance(tensor, torch.Tensor) or (found := stored.get(tensor.data_ptr())) is None:
            continue
        if tensor.dtype != found.dtype or tuple(tensor.shape) != found.shape:
            raise ValueError(f"weight {value.name} is a part of another, which cannot be read from its file alone")
        value.const_value = StoredTensor(found.load, found.dtype, found.shape)


def transpose(model: ir.Model) -> None:
    """Store transposed what a graph transposes first: a weight keeps its name, with `.T` behind it."""
    graph = model.graph
    for node in list(graph):
        weight = node.inputs[0] if node.op_type == "Transpose" and not node.domain else None
        if weight is None or not isinstance(weight.const_value, StoredTensor):
            continue
        backwards = list(range(len(weight.const_value.shape)))[::-1]
        if list(node.attributes.get_ints("perm", backwards)) != backwards:
            continue
        name = f"{weight.name}.T"
        if name not in graph.initializers:
            turned = weight.const_value.turned()
            graph.register_initializer(ir.val(name, turned.dtype, turned.shape, const_value=turned))
        ir.convenience.replace_all_uses_with(node.outputs[0], graph.initializers[name])
        graph.remove(node, safe=True)
        if not weight.uses() and weight.name is not None:
            del graph.initializers[weight.name]
