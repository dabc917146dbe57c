"""A model's configuration, read by protobuf's own parser: names and types are those of Triton's model_config.proto.

See https://github.com/triton-inference-server/common/blob/main/protobuf/model_config.proto; its text format has no
field numbers.
"""

from __future__ import annotations

from typing import Any

import pytest

TYPES = {"INVALID": 0, "BOOL": 1, "UINT8": 2, "UINT64": 5, "INT32": 8, "INT64": 9, "FP64": 12, "STRING": 13}
KINDS = {"AUTO": 0, "GPU": 1, "CPU": 2}

MESSAGES: dict[str, dict[str, str]] = {
    "ModelInput": {"name": "string", "data_type": "DataType", "dims": "int64 *", "optional": "bool"},
    "ModelOutput": {"name": "string", "data_type": "DataType", "dims": "int64 *"},
    "ModelInstanceGroup": {"name": "string", "count": "int32", "kind": "Kind"},
    "ModelTransactionPolicy": {"decoupled": "bool"},
    "ModelParameter": {"string_value": "string"},
    "Entry": {"key": "string", "value": "ModelParameter"},
    "ModelConfig": {
        "name": "string",
        "backend": "string",
        "max_batch_size": "int32",
        "input": "ModelInput *",
        "output": "ModelOutput *",
        "instance_group": "ModelInstanceGroup *",
        "parameters": "Entry *",
        "model_transaction_policy": "ModelTransactionPolicy",
    },
}


def parsed(text: str) -> Any:
    """Return the message that a configuration says; raises protobuf's `ParseError`."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

    kinds = {"int64": 3, "int32": 5, "bool": 8, "string": 9}
    file = descriptor_pb2.FileDescriptorProto(name="model_config.proto", package="inference")
    for enum, prefix, values in (("DataType", "TYPE", TYPES), ("Kind", "KIND", KINDS)):
        described = file.enum_type.add(name=enum)
        for name, number in values.items():
            described.value.add(name=f"{prefix}_{name}", number=number)
    for message, fields in MESSAGES.items():
        made = file.message_type.add(name=message)
        for number, (name, said) in enumerate(fields.items(), 1):
            kind, many = said.removesuffix(" *"), said.endswith("*")
            field = made.field.add(name=name, number=number, label=3 if many else 1)
            if kind in kinds:
                field.type = kinds[kind]
            else:
                field.type, field.type_name = (11 if kind in MESSAGES else 14), f".inference.{kind}"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    config = message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
    return text_format.Parse(text, config())
