"""The API's document at /openapi.json, with errors that really come, and its page, which loads nothing."""

from collections.abc import Mapping
from html import escape
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse
from pydantic.json_schema import models_json_schema

from baton_router.http.answer_models import AnthropicError, ChatCompletionChunk, ErrorBody
from baton_router.http.errors import ANTHROPIC_PATH

_REF = "#/components/schemas/{model}"
_ANYWHERE = {"default": "Any other error, such as 405 for another method"}
_OF_BODIES = {
    "400": "A field is wrong; `param` names it",
    "404": "There is no such model",
    "413": "The body is too large",
    "503": "No worker is there, or the queue is full: see the header Retry-After",
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Baton's API</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }}
td, th {{ text-align: left; padding: .2rem .8rem .2rem 0; vertical-align: top; }}
code {{ font-size: .9em; }} h2 {{ margin-top: 2.5rem; }}
</style></head><body><h1>Baton's API</h1>
<p>Version {version}. For programs: <a href="openapi.json">openapi.json</a>.</p>{routes}</body></html>
"""


def install(app: FastAPI) -> None:
    """Serve the document and its page, in the place of FastAPI's pages, which load from elsewhere."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, routes=app.routes)
            _put_in_errors(made)
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]

    @app.get("/docs", include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(_page(document()))


def _put_in_errors(document: dict[str, Any]) -> None:
    """OpenAI's errors in the place of FastAPI's, which no route answers with."""
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    extra = (ErrorBody, AnthropicError, ChatCompletionChunk)
    _, defined = models_json_schema([(model, "serialization") for model in extra], ref_template=_REF)
    schemas |= {name: schema for name, schema in defined["$defs"].items() if name not in schemas}
    for path, operations in document["paths"].items():
        error = AnthropicError if path.startswith(ANTHROPIC_PATH) else ErrorBody
        content = {"application/json": {"schema": {"$ref": _REF.format(model=error.__name__)}}}
        for operation in operations.values():
            operation["responses"].pop("422", None)
            errors = dict(_ANYWHERE)
            if "requestBody" in operation:
                errors |= _OF_BODIES
            elif "{" in path:
                errors["404"] = _OF_BODIES["404"]
            operation["responses"] |= {
                status: {"description": text, "content": content} for status, text in errors.items()
            }


def _page(document: Mapping[str, Any]) -> str:
    routes = [
        f"<h2><code>{escape(method.upper())} {escape(path)}</code></h2>"
        f"<p>{escape(operation.get('description', ''))}</p>{_fields(operation, document)}"
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    ]
    return _PAGE.format(version=escape(document["info"]["version"]), routes="".join(routes))


def _fields(operation: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """A table of what the body of a request may hold."""
    if "requestBody" not in operation:
        return ""
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    properties = _resolved(schema, document).get("properties", {})
    required = _resolved(schema, document).get("required", ())
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(_type(field))}</td>"
        f"<td>{'required' if name in required else ''}</td></tr>"
        for name, field in properties.items()
    ]
    return f"<table><tr><th>field</th><th>type</th><th></th></tr>{''.join(rows)}</table>"


def _resolved(schema: Mapping[str, Any], document: Mapping[str, Any]) -> Mapping[str, Any]:
    name = schema.get("$ref", "").rpartition("/")[2]
    found: Mapping[str, Any] = document["components"]["schemas"][name] if name else schema
    return found


def _type(field: Mapping[str, Any]) -> str:
    """In words."""
    if "anyOf" in field:
        return " or ".join(dict.fromkeys(_type(one) for one in field["anyOf"] if one.get("type") != "null"))
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if field.get("type") == "array":
        return f"list of {_type(field.get('items', {}))}"
    return str(field.get("type", "anything"))
