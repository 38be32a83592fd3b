"""The parts of the service's OpenAPI schema that no annotation yields; the schema is what the fuzz test reads."""

from __future__ import annotations

from typing import Any

from verl.retrieval.auth import OPEN_PATHS
from verl.retrieval.service import SearchService
from verl.retrieval.wire import RefusedRequest

Schema = dict[str, Any]

NOT_BLANK = r"[^\t-\r\u001c-\u0020\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
"""A character that is no space, as Python sees it; dialects of regular expressions differ in what they call a space."""

_TEXT: Schema = {"type": "string"}
_COUNT: Schema = {"type": "integer", "minimum": 0}


def _object(properties: Schema, optional: tuple[str, ...] = ()) -> Schema:
    return {
        "type": "object",
        "required": [name for name in properties if name not in optional],
        "properties": properties,
        "additionalProperties": False,
    }


def _answer(description: str, schema: Schema) -> Schema:
    return {"description": description, "content": {"application/json": {"schema": schema}}}


_OR_NONE = {"type": ["integer", "null"], "minimum": 0}
_QUERY_ERRORS = {"type": "array", "items": _object({"query_index": _COUNT, "message": _TEXT})}
_FAULT = _object(
    {"code": _TEXT, "message": _TEXT, "query_index": _COUNT, "query_errors": _QUERY_ERRORS},
    optional=("query_index", "query_errors"),
)
_ERROR = _object({"error": _FAULT})
_DOCUMENT = {
    "anyOf": [
        _object({"id": _TEXT, "contents": _TEXT, "title": _TEXT, "text": _TEXT}),
        _object({"id": _TEXT}),  # with ids_only
    ]
}
_HIT = {"anyOf": [_DOCUMENT, _object({"document": _DOCUMENT, "score": {"type": "number"}})]}
_RESULT = _object({"result": {"type": "array", "items": {"type": "array", "items": _HIT}}})

ERROR = _answer("Not done; the message says why and what to do.", _ERROR)
HEALTH = _answer(
    "The index is loaded.", _object({"status": _TEXT, "retriever": _TEXT, "documents": _OR_NONE, "fingerprint": _TEXT})
)
READY = _answer("Whether requests should be sent here.", _object({"status": _TEXT}))
INFO = _answer(
    "What is served.",
    _object(
        {
            "engine": _TEXT,
            "documents": _OR_NONE,
            "max_topk": _COUNT,
            "corpus": _TEXT,
            "fingerprint": _TEXT,
            "details": {"type": "object"},
            "topk": _COUNT,
            "limits": {"type": "object", "additionalProperties": _COUNT},
            "version": _TEXT,
        }
    ),
)


def with_retrieve(schema: Schema, service: SearchService, secured: bool) -> Schema:
    """Return the schema of the ordinary routes with `POST /retrieve` added, and with the token where one is needed."""
    limits = service.config.limits
    try:
        most = min(service.info.max_topk, limits.max_topk)
    except RefusedRequest:  # no engine yet
        most = limits.max_topk
    query = {"type": "string", "minLength": 1, "maxLength": limits.max_query_chars, "pattern": NOT_BLANK}
    body = _object(
        {
            "queries": {"type": "array", "minItems": 1, "maxItems": limits.max_queries, "items": query},
            "topk": {"type": ["integer", "null"], "minimum": 1, "maximum": most},
            "return_scores": {"type": "boolean", "default": False},
            "ids_only": {"type": "boolean", "default": False},
        },
        optional=("topk", "return_scores", "ids_only"),
    )
    statuses = ("400", "408", "413", "422", "500", "502", "503")
    operation: Schema = {
        "summary": "Search",
        "operationId": "retrieve",
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {"200": _answer("The hits of each query, best first.", _RESULT)} | dict.fromkeys(statuses, ERROR),
    }
    paths = {**schema["paths"], "/retrieve": {"post": operation}}
    if not secured:
        return {**schema, "paths": paths}
    for path, methods in paths.items():
        for method in methods.values():
            if path in OPEN_PATHS:
                method["security"] = []
            else:
                method["responses"]["401"] = ERROR
    components = {**schema.get("components", {}), "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}}
    return {**schema, "paths": paths, "components": components, "security": [{"token": []}]}
