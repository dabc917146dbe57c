"""Bodies of requests: JSON or forms in, checked fields and work out; and what OpenAPI says of them."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from fastapi import Request
from python_multipart.exceptions import FormParserError
from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser

from ..service import Work
from ..service.errors import RefusedError
from .errors import ApiError
from .schema import IGNORED, Edit, Generation, ignored, work_of
from .watch import Workers

FILES = {"image": "image", "image[]": "image", "mask": "mask"}
"""Fields of a form that are files, and what they are called."""
MAX_FIELDS, MAX_FILES = 300, 8
"""Of a form; each value of a list is a field."""
NUMBER = re.compile(r"-?(0|[1-9][0-9]{0,19})(\.[0-9]{1,20})?([eE][+-]?[0-9]{1,3})?")
"""A number in a list of a form."""
MAX_VALUES = 100_000
"""Of a body of JSON, those in lists and objects included; a picture is one."""
ESCAPED = re.compile(rb"(?:%[0-9A-Fa-f]{2}|[^%]+|%){1,4096}")
"""A part of a value of an urlencoded form: reading an escape takes 200 bytes, for as many as are read at once."""

Body = TypeVar("Body", bound=Generation)
Read = TypeVar("Read")


def context_of(request: Request) -> dict[str, str]:
    """Return whose request it is, and its id."""
    state = request.scope.get("state", {})
    return {"owner": state.get("owner", ""), "request_id": state.get("request_id", "")}


async def read_body(
    request: Request, schema: type[Body], workers: Workers
) -> tuple[Body, Work, list[str], list[bytes]]:
    """Return a request's fields, its work, the fields that are ignored, and the bytes that it came as.

    Raises `ApiError` for another content type, `ValidationError` and `RefusedError` for fields that are wrong.
    """
    fields: dict[str, str | list[Any]] | None = None
    files: dict[str, bytes] = {}
    kind = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if kind in ("multipart/form-data", "application/x-www-form-urlencoded") and issubclass(schema, Edit):
        fields, files = await _form(request, kind, workers)
        came = [json.dumps(fields).encode(), json.dumps(list(files)).encode(), *files.values()]
    elif kind == "application/json" or kind.endswith("+json"):
        came = [await request.body()]
    else:
        raise ApiError(415, f"content-type is {kind[:60]!r}: send application/json", "unsupported_media_type")

    def read() -> tuple[Body, Work]:
        body = read_json(schema.model_validate_json, came[0]) if fields is None else read_fields(schema, fields)
        if schema is Edit and not (files.get("image") or getattr(body, "image", None)):
            raise RefusedError("image is missing: give the picture to start from", "image")
        return body, work_of(body, files=files, **context_of(request))

    body, work = await workers.run(read)
    return body, work, ignored(body), came


def read_json(validate: Callable[[bytes], Read], data: bytes) -> Read:
    """Return what pydantic reads in a body, not on an event loop; raises `ApiError` and `ValidationError`.

    A body of many small values is not read at all: Python's lock is held for as long as that takes.
    """
    if sum(map(data.count, (b",", b"[", b"{"))) > MAX_VALUES:
        raise ApiError(400, f"the body has more than {MAX_VALUES} values: send fewer", "invalid_request")
    return validate(data)


def read_fields(schema: type[Body], fields: Mapping[str, str | list[Any]]) -> Body:
    """Return what pydantic reads in a form: texts, and lists as JSON has them; raises `ValidationError`."""
    body = schema.model_validate_strings({name: each for name, each in fields.items() if isinstance(each, str)})
    lists = {name: each for name, each in fields.items() if isinstance(each, list)}
    return schema.model_validate({**body.model_dump(exclude_unset=True), **lists}) if lists else body


class _InMemory(MultiPartParser):
    """Keeps files in memory, which the limit of a body bounds: pictures of clients are not written to a disk.

    It alone bounds a field too, which may be a picture in base64.
    """

    spool_max_size = 1 << 40

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], **most: int) -> None:
        super().__init__(headers, stream, **most)
        self.max_part_size = self.spool_max_size


def _urlencoded(data: bytes) -> FormData:
    """Return the fields of an urlencoded form, which may be pictures in base64; raises `MultiPartException`."""
    if data.count(b"&") >= MAX_FIELDS:
        raise MultiPartException(f"Too many fields. Maximum number of fields is {MAX_FIELDS}.")
    pairs = (pair.replace(b"+", b" ").partition(b"=") for pair in data.split(b"&") if pair)
    return FormData([(_unescaped(name), _unescaped(value)) for name, _, value in pairs])


def _unescaped(text: bytes) -> str:
    return b"".join(unquote_to_bytes(part[0]) for part in ESCAPED.finditer(text)).decode(errors="replace")


async def _read_form(request: Request, kind: str, workers: Workers) -> FormData:
    try:
        if kind == "multipart/form-data":
            async with aclosing(request.stream()) as stream:
                parser = _InMemory(request.headers, stream, max_files=MAX_FILES, max_fields=MAX_FIELDS)
                return await parser.parse()
        came = await request.body()
        return await workers.run(lambda: _urlencoded(came))
    except (MultiPartException, FormParserError) as error:
        why = str(getattr(error, "message", None) or error or "it is damaged").rstrip(".")
        said = f"the body is no form that can be read: {why[0].lower()}{why[1:]}"
        raise ApiError(400, said, "invalid_request") from error


async def _form(request: Request, kind: str, workers: Workers) -> tuple[dict[str, str | list[Any]], dict[str, bytes]]:
    fields: dict[str, str | list[Any]] = {}
    files: dict[str, bytes] = {}
    form = await _read_form(request, kind, workers)
    try:
        for name, value in form.multi_items():
            field = FILES.get(name, name)
            base, _, inside = name.partition("[")  # OpenAI's client writes NAME[] for each value of a list
            if isinstance(value, UploadFile):
                if field == "markup":
                    fields[field] = "a file"
                    continue
                if name not in FILES:
                    raise RefusedError(f"{name[:60]!r} is a file: give a text", name[:60])
                if field in files:
                    raise RefusedError(f"{field} was given twice: give one picture", field)
                files[field] = await value.read()
            elif inside and base in IGNORED:  # and NAME[FIELD] for an object
                fields.setdefault(base, value)
            elif inside == "]" and field == name and isinstance(values := fields.setdefault(base, []), list):
                values.append(_number(value))
            elif field in fields:
                raise RefusedError(f"{field[:60]} was given twice: give it once", field[:60])
            else:
                fields[field] = value
    finally:
        await form.close()
    return fields, files


def _number(text: str) -> Any:
    """Return the number in a text as JSON has it, or the text."""
    return json.loads(text) if NUMBER.fullmatch(text) else text


def described(schema: type[Generation], *, form: bool = False) -> dict[str, Any]:
    """Return what OpenAPI says of a body that is read by hand."""
    content: dict[str, Any] = {"application/json": {"schema": schema.model_json_schema()}}
    if form:
        said = schema.model_json_schema()
        for name in ("image", "mask"):
            said["properties"][name] = {"type": "string", "format": "binary"}
        content["multipart/form-data"] = {"schema": said}
    return {"requestBody": {"required": True, "content": content}}
