"""Functions that a client declares by JSON schema, as the tool specs that a model reads, and its calls as JSON.

Invariants: pure; a schema that the call grammar cannot hold is Refused with the keyword or type that is in the way, it
is never loosened in silence. What may be null is an argument that may be left out, and is null in the JSON when its
schema requires it. `minimum` and `maximum` are shown to the model and not forced on it.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence
from typing import Any

import msgspec

from edge_agent.agent.calls import MAX_DEPTH, RESERVED, Answer, Call, CallError, parse, validate
from edge_agent.agent.tool import Kind, Param, ToolSpec
from edge_agent.errors import Refused

MAX_FUNCTIONS, MAX_PARAMS, MAX_FIELDS = 128, 512, 64
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,62}")
_KINDS: dict[str, Kind] = {"integer": "int", "number": "float", "boolean": "bool", "string": "str"}
_KINDS |= {"array": "list", "object": "dict"}


class Schema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"ref": "$ref", "defs": "$defs"}):
    """The JSON Schema keywords that a tool spec can hold, and those that only annotate."""

    type: str | list[str] = ""
    enum: list[Any] | None = None
    const: Any = msgspec.UNSET
    minimum: float | None = None
    maximum: float | None = None
    items: Schema | None = None
    properties: dict[str, Schema] = {}
    required: list[str] = []
    additionalProperties: bool = True
    anyOf: list[Schema] = []
    ref: str = ""
    defs: dict[str, Schema] = {}
    description: str = ""
    title: Any = None
    default: Any = None
    examples: Any = None
    format: Any = None
    deprecated: Any = None


class Function(msgspec.Struct, frozen=True):
    """A function as clients declare it."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Functions:
    """The functions of one request. Raises Refused for one that cannot be called through the grammar."""

    def __init__(self, functions: Sequence[Function]) -> None:
        if len(functions) > MAX_FUNCTIONS or len({f.name for f in functions}) < len(functions):
            raise Refused(f"{len(functions)} functions", f"at most {MAX_FUNCTIONS}, each name once")
        self._schemas = {function.name: _schema(function) for function in functions}
        self._room = MAX_PARAMS
        self.specs = [self._spec(function, self._schemas[function.name]) for function in functions]

    def read(self, text: str) -> tuple[str | None, list[tuple[str, str]]]:
        """The answer in what a model emitted (None: there is none), and its calls: name, arguments as JSON.

        A last line that was cut short is left out.
        """
        content, calls = None, list[tuple[str, str]]()
        for line in text.split("\n"):
            try:
                said = parse(line)
            except CallError:
                break
            if isinstance(said, Call):
                calls.append((said.name, self._arguments(said)))
            else:
                content = said.text if isinstance(said, Answer) else ""
        return content, calls

    def _spec(self, function: Function, root: Schema) -> ToolSpec:
        whole = self._param(function.name, root, root, True, 0)
        if whole.kind != "dict":
            raise Refused(f"the parameters of {function.name} are a {whole.kind}", "an object with properties")
        return ToolSpec(function.name, " ".join((function.description or "").split()), whole.fields)

    def _param(self, name: str, schema: Schema, root: Schema, required: bool, depth: int, where: str = "") -> Param:
        where = f"{where}.{name}" if where else name
        schema, nullable = _plain(schema, root)
        if not _NAME.fullmatch(name):
            raise Refused(f"{where}: a parameter cannot be named {name!r}", "letters, digits and _, at most 63")
        self._room -= 1
        if depth > MAX_DEPTH or self._room < 0 or len(schema.properties) > MAX_FIELDS:
            bounds = f"{MAX_DEPTH} deep, {MAX_FIELDS} fields in an object, {MAX_PARAMS} parameters in all"
            raise Refused(f"{where} is too deep or too large", f"at most {bounds}")
        about, required = " ".join(schema.description.split()), required and not nullable
        choices = schema.enum if schema.const is msgspec.UNSET else [schema.const]
        if choices is not None:
            texts = [choice for choice in choices if isinstance(choice, str) and choice.isprintable()]
            if not texts or len(texts) < len(choices) - nullable:
                raise Refused(f"{where}: an enum has printable texts only", "write numbers as texts")
            return Param(name, "choice", choices=texts, required=required, about=about)
        kind = _KINDS.get(str(schema.type) or ("object" if schema.properties or not depth else ""))
        if kind is None:
            raise Refused(
                f"{where} has the type {schema.type or 'any'!r}", f"one of {', '.join(_KINDS)}, or it and null"
            )
        item = schema.items
        items = self._param("item", item, root, True, depth + 1, where) if item and item != Schema() else None
        parts = schema.properties.items()
        fields = [self._param(key, part, root, key in schema.required, depth + 1, where) for key, part in parts]
        return Param(
            name,
            kind,
            low=schema.minimum,
            high=schema.maximum,
            required=required,
            about=about,
            items=items,
            fields=fields,
        )

    def _arguments(self, call: Call) -> str:
        with contextlib.suppress(CallError):  # a number out of range: the client decides
            call = validate(call, self.specs)
        root = self._schemas[call.name]
        return msgspec.json.encode(_filled(root, call.args, root)).decode()


def _schema(function: Function) -> Schema:
    if not _NAME.fullmatch(function.name) or function.name in RESERVED:
        hint = f"letters, digits and _, at most 63, not {' or '.join(RESERVED)}"
        raise Refused(f"a function cannot be named {function.name!r}", hint)
    try:
        return msgspec.convert(function.parameters or {}, Schema)
    except (msgspec.ValidationError, RecursionError) as error:
        hint = "leave it out; such values can be checked after the call"
        raise Refused(f"the function {function.name} cannot be expressed: {error}", hint) from error


def _plain(schema: Schema, root: Schema) -> tuple[Schema, bool]:
    """The schema without references and null, and whether it may be null. Raises Refused."""
    nullable, replace = schema.enum is not None and None in schema.enum, msgspec.structs.replace
    for _ in range(MAX_DEPTH):
        if schema.ref:
            target = root.defs.get(schema.ref.removeprefix("#/$defs/"))
            if target is None:
                raise Refused(f"the reference {schema.ref!r} leads nowhere", "#/$defs/NAME of the same schema")
            schema = replace(target, description=schema.description or target.description)
        elif schema.anyOf:
            others = [one for one in schema.anyOf if one.type != "null"]
            if len(others) != 1 or schema.type:
                raise Refused("anyOf of several types cannot be expressed", "one type, or one type and null")
            nullable = nullable or len(others) < len(schema.anyOf)
            schema = replace(others[0], description=schema.description or others[0].description)
        elif isinstance(schema.type, list):
            types = [one for one in schema.type if one != "null"]
            nullable = nullable or len(types) < len(schema.type)
            if len(types) != 1:
                raise Refused(f"the type {schema.type} cannot be expressed", "one type, or one type and null")
            schema = replace(schema, type=types[0])
        else:
            return schema, nullable
    raise Refused(f"references and anyOf are more than {MAX_DEPTH} deep", "a flatter schema")


def _filled(schema: Schema, value: Any, root: Schema) -> Any:
    """The value with null for what its schema requires and the model left out."""
    schema, _ = _plain(schema, root)
    if isinstance(value, list) and schema.items:
        return [_filled(schema.items, item, root) for item in value]
    if isinstance(value, dict) and schema.properties:
        parts = {key: part for key, part in schema.properties.items() if key in value or key in schema.required}
        return {key: _filled(part, value[key], root) if key in value else None for key, part in parts.items()}
    return value
