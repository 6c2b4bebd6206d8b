"""GET /docs: the OpenAPI description as one static page (FastAPI's own would load a script from the network)."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

HEAD = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>edgemistral: HTTP interface</title>
<link rel="stylesheet" href="page/docs.css">
"""


def docs_page(spec: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI description: every operation with its fields, an example and its responses."""
    info = spec["info"]
    parts = [HEAD, f"<h1>{escape(info['title'])} {escape(info['version'])}</h1><p>{_prose(info['description'])}</p>",
             '<p>For programs: <a href="openapi.json">openapi.json</a>. The chat page: <a href="./">here</a>.</p>']
    for path, methods in spec["paths"].items():
        for method, operation in methods.items():
            parts += _operation(spec, path, method.upper(), operation)
    return "\n".join(parts)


def _operation(spec: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield f"<section><h2><code>{method} {escape(path)}</code></h2><p>{_prose(operation.get('description', ''))}</p>"
    content = operation.get("requestBody", {}).get("content", {}).get("application/json")
    if content is not None:
        schema = _resolved(spec, content["schema"])
        yield "<table><thead><tr><th>Field<th>Type<th>Meaning</thead>"
        required = schema.get("required", ())
        for name, field in schema.get("properties", {}).items():
            mark = " (required)" if name in required else ""
            yield (f"<tr><td><code>{escape(name)}</code>{mark}<td>{escape(_type(spec, field))}"
                   f"<td>{_prose(field.get('description', ''))}")
        yield "</table>"
        if "example" in schema:
            body = json.dumps(schema["example"], indent=2)
            command = f"curl http://127.0.0.1:8080{path} -H 'Content-Type: application/json' -d '{body}'"
            yield f"<pre>{escape(command)}</pre>"
    statuses = (f"<li><code>{status}</code> {escape(answer['description'])}"
                for status, answer in operation["responses"].items())
    yield f"<details><summary>Responses</summary><ul>{''.join(statuses)}</ul></details></section>"


def _prose(text: str) -> str:
    """HTML of a text with `code` in it."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _resolved(spec: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema that a reference into the description stands for."""
    reference = schema.get("$ref", "")
    return spec["components"]["schemas"][reference.rpartition("/")[2]] if reference else schema


def _type(spec: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    for key in ("anyOf", "oneOf"):
        if key in schema:
            kinds = dict.fromkeys(_type(spec, kind) for kind in schema[key])
            return " or ".join(kind for kind in kinds if kind != "null")
    if "enum" in schema or "const" in schema:
        return " or ".join(json.dumps(value) for value in schema.get("enum", [schema.get("const")]))
    kind = str(schema.get("type", "any"))
    if kind == "array" and "items" in schema:
        return f"list of {_type(spec, schema['items'])}"
    low, high = schema.get("minimum"), schema.get("maximum")
    return f"{kind} {low} to {high}" if low is not None and high is not None and abs(high) < 1 << 60 else kind
