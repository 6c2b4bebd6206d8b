"""Constraints on an answer: a JSON schema, a regular expression, a choice or a grammar, under all field names in use."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edgemistral.errors import BadRequest

ANY_OBJECT = {"type": "object"}
MAX_CHOICES = 1000


@dataclass(frozen=True)
class Constraint:
    """kind: "json" with a schema, or "text" with a grammar in Lark or GBNF. field: the request's field that asked for it."""

    kind: str
    value: Any
    field: str


def constraint_of(fields: Mapping[str, Any]) -> Constraint | None:
    """The constraint that a request's fields ask for. BadRequest: it is invalid, or there are two."""
    found = [one for one in (
        _response_format(fields.get("response_format")), _structured(fields.get("structured_outputs")),
        _format(fields.get("format")), _json(fields.get("json_schema"), "json_schema"),
        _json(fields.get("guided_json"), "guided_json"),
        _regex(fields.get("guided_regex"), "guided_regex"), _choice(fields.get("guided_choice"), "guided_choice"),
        _text(fields.get("guided_grammar"), "guided_grammar"), _text(fields.get("grammar"), "grammar"),
    ) if one is not None]
    if len(found) > 1:
        raise BadRequest(f"{found[1].field} and {found[0].field} exclude each other", found[1].field)
    return found[0] if found else None


def closed(schema: Any) -> Any:
    """A copy of a JSON schema. An object with `properties` allows no others, unless the schema says so.

    BadRequest: it is nested too deeply.
    """
    try:
        return _closed(schema)
    except RecursionError:
        raise BadRequest("the JSON schema is nested too deeply") from None


def _closed(schema: Any) -> Any:
    if isinstance(schema, list):
        return [_closed(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    made = dict(schema)
    for name in ("properties", "$defs", "definitions", "patternProperties", "dependentSchemas"):
        if isinstance(made.get(name), Mapping):
            made[name] = {key: _closed(value) for key, value in made[name].items()}
    for name in ("items", "prefixItems", "anyOf", "oneOf", "additionalProperties", "contains", "then", "else"):
        if isinstance(made.get(name), (Mapping, list)):
            made[name] = _closed(made[name])
    composed = any(name in made for name in ("allOf", "$ref", "anyOf", "oneOf", "if", "patternProperties"))
    if "properties" in made and "additionalProperties" not in made and "unevaluatedProperties" not in made and not composed:
        made["additionalProperties"] = False
    return made


def _json(schema: Any, field: str) -> Constraint | None:
    if schema is None:
        return None
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError):
            raise BadRequest(f"{field} is not a JSON schema", field) from None
    if not isinstance(schema, Mapping):
        raise BadRequest(f"{field} must be a JSON schema, an object", field)
    return Constraint("json", closed(schema), field)


def _response_format(value: Any) -> Constraint | None:
    if value is None:
        return None
    field = "response_format"
    if not isinstance(value, Mapping):
        raise BadRequest(f"{field} must be an object with a type", field)
    kind = value.get("type")
    given = value.get("json_schema")
    inner: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    schema = inner.get("schema", value.get("schema", value.get("value")))
    where = f"{field}.json_schema.schema" if "schema" in inner else f"{field}.schema"
    if kind in (None, "text"):
        if schema is not None:
            raise BadRequest(f"{field} has a schema, but its type is text", f"{field}.type")
        return None
    if kind == "json_object":
        return _json(ANY_OBJECT if schema is None else schema, where)
    if kind in ("json_schema", "json"):
        if schema is None:
            raise BadRequest(f"{field}.json_schema.schema is missing", f"{field}.json_schema.schema")
        return _json(schema, where)
    if kind in ("regex", "grammar"):
        pattern = value.get("pattern", value.get("regex", value.get("value", value.get("grammar"))))
        return _regex(pattern, field) if kind == "regex" else _text(pattern, field)
    raise BadRequest(f"{field}.type is {str(kind)[:40]!r}: it must be text, json_object or json_schema", f"{field}.type")


def _structured(value: Any) -> Constraint | None:
    """vLLM's newer field, which holds any of these constraints."""
    if value is None:
        return None
    field = "structured_outputs"
    if not isinstance(value, Mapping):
        raise BadRequest(f"{field} must be an object", field)
    makers = {"json": _json, "regex": _regex, "choice": _choice, "grammar": _text}
    given = {name: one for name, one in value.items() if one is not None}
    if given.pop("json_object", None):
        given.setdefault("json", ANY_OBJECT)
    if unknown := sorted(set(given) - set(makers)):
        raise BadRequest(f"{field}.{unknown[0]} is not supported", f"{field}.{unknown[0]}")
    if len(given) > 1:
        raise BadRequest(f"{field} has {' and '.join(sorted(given))}, which exclude each other", field)
    return next((makers[name](one, f"{field}.{name}") for name, one in given.items()), None)


def _format(value: Any) -> Constraint | None:
    """Ollama's: "json", or a schema."""
    if value in (None, "", "text"):
        return None
    return _json(ANY_OBJECT if value == "json" else value, "format")


def _regex(value: Any, field: str) -> Constraint | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{field} must be a regular expression", field)
    # Some clients have escaped slashes already: escaped characters are kept.
    inside = re.sub(r"\\.|/", lambda found: "\\/" if found[0] == "/" else found[0], value, flags=re.DOTALL)
    return Constraint("text", f"start: /{inside}/", field)


def _choice(value: Any, field: str) -> Constraint | None:
    if value is None:
        return None
    texts = isinstance(value, list) and all(isinstance(one, str) and one for one in value)
    if not texts or not 0 < len(value) <= MAX_CHOICES:
        raise BadRequest(f"{field} must be a list of texts", field)
    return Constraint("text", "start: " + " | ".join(map(json.dumps, value)), field)


def _text(value: Any, field: str) -> Constraint | None:
    if value is None:
        return None
    if not isinstance(value, str) or not value:
        raise BadRequest(f"{field} must be a grammar in Lark or GBNF", field)
    return Constraint("text", value, field)
