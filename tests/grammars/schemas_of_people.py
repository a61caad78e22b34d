"""200 JSON schemas of the kinds that people send: pydantic's, parameters of tools, bodies of APIs."""

from typing import Any

Schema = dict[str, Any]
STRING, INTEGER, NUMBER, BOOLEAN, NULL = (
    {"type": t} for t in ("string", "integer", "number", "boolean", "null")
)
SHORT = {"type": "string", "maxLength": 12}
DRAFT = "https://json-schema.org/draft/2020-12/schema"


def closed(properties: Schema, **more: Any) -> Schema:
    """As OpenAI's strict mode wants it: every property required, no other."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


def _scalars() -> list[Schema]:
    bounds: list[Schema] = [
        *({"minimum": low, "maximum": low + 10} for low in (-100, -5, 0, 7, 1000)),
        *({"exclusiveMinimum": low, "exclusiveMaximum": low + 3} for low in (-1, 0, 41)),
        *({"multipleOf": step, "minimum": 0, "maximum": 100} for step in (2, 5, 10)),
        {"minimum": 18},
        {"maximum": -1},
    ]
    strings: list[Schema] = [
        {"maxLength": 5},
        {"minLength": 3, "maxLength": 8},
        *({"pattern": pattern} for pattern in PATTERNS),
        *({"format": name} for name in FORMATS),
        *({"format": name, "maxLength": 10} for name in NOTES),
    ]
    return [
        *(closed({"value": {"type": "integer", **bound}}) for bound in bounds),
        *(closed({"value": {"type": "number", **bound}}) for bound in bounds if "multipleOf" not in bound),
        *(closed({"value": {"type": "string", **limits}}) for limits in strings),
        *(closed({"flag": kind, "other": kind}) for kind in (BOOLEAN, NULL, {"type": ["integer", "null"]})),
        *(
            closed({"value": {"const": constant}})
            for constant in (1, "one", True, None, 1.5, [1, "a"], {"a": 1})
        ),
    ]


PATTERNS = (
    r"^[A-Z]{2}-\d{4}$",
    r"^\d{5}(-\d{4})?$",
    r"^(red|green|blue)$",
    r"^#[0-9a-fA-F]{6}$",
    r"^[a-z0-9]+(-[a-z0-9]+){0,3}$",
    r"^\+[1-9][0-9]{7,14}$",
    r"^v\d+\.\d+\.\d+$",
    r"^(0[1-9]|1[0-2])/[0-9]{2}$",
    r"^[^\s@]{1,8}@[a-z]{1,8}\.(com|org)$",
    r"^$|^none$",
)
FORMATS = ("date", "time", "date-time", "duration", "email", "uuid", "ipv4", "ipv6", "hostname", "uri")
# Which say nothing of what is valid.
NOTES = ("password", "byte", "binary", "int64", "color", "phone", "regex", "json-pointer", "markdown", "path")


def _enums() -> list[Schema]:
    values: list[list[Any]] = [
        ["a"],
        ["low", "medium", "high"],
        ["positive", "negative", "neutral", "mixed"],
        [1, 2, 3],
        [True, False],
        ["mixed", 1, None, True, 1.5],
        ["ünïcode", "日本", "🎉", 'with "quotes"', "line\nbreak", "back\\slash"],
        [f"option-{index}" for index in range(60)],
        ["prefix", "prefix-long", "prefix-longer"],
        ["", "empty or not"],
    ]
    return [
        *(closed({"choice": {"enum": entries}}) for entries in values),
        *(closed({"choice": {"type": "string", "enum": entries}}) for entries in values[1:3]),
        *({"enum": entries} for entries in values[:4]),
        *(
            {"type": "array", "items": {"enum": entries}, "minItems": 1, "maxItems": 4}
            for entries in values[:5]
        ),
    ]


def _arrays() -> list[Schema]:
    items: list[Schema] = [INTEGER, SHORT, BOOLEAN, closed({"x": INTEGER, "y": INTEGER})]
    return [
        *({"type": "array", "items": item, "maxItems": 3} for item in items),
        *({"type": "array", "items": item, "minItems": 2, "maxItems": 2} for item in items),
        *(
            closed({"items": {"type": "array", "items": item, "minItems": 1, "maxItems": 5}})
            for item in items
        ),
        *({"type": "array", "prefixItems": [INTEGER, item], "items": False, "minItems": 2} for item in items),
        {"type": "array", "items": {"type": "array", "items": INTEGER, "maxItems": 3}, "maxItems": 3},
        {"type": "array", "maxItems": 0},
        {"type": "array", "prefixItems": [SHORT], "items": INTEGER, "maxItems": 4},
    ]


def _objects() -> list[Schema]:
    person = {"name": SHORT, "age": {"type": "integer", "minimum": 0, "maximum": 120}}
    address = closed({"street": SHORT, "city": SHORT, "zip": {"type": "string", "pattern": r"^\d{5}$"}})
    nested: Schema = closed({"value": INTEGER})
    for level in range(8):
        nested = closed({f"level{level}": nested})
    return [
        closed(person),
        {"type": "object", "properties": person},
        {"type": "object", "properties": person, "required": ["age"]},
        {"type": "object", "properties": person, "required": ["name"], "additionalProperties": False},
        {"type": "object", "properties": person, "additionalProperties": INTEGER, "required": ["name"]},
        {"type": "object", "additionalProperties": INTEGER, "maxProperties": 3},
        {"type": "object", "additionalProperties": SHORT, "minProperties": 1, "maxProperties": 2},
        {"type": "object", "patternProperties": {"^x_": INTEGER}, "additionalProperties": False},
        {"type": "object"},
        closed({**person, "address": address}),
        closed({**person, "addresses": {"type": "array", "items": address, "maxItems": 2}}),
        nested,
        closed({"": INTEGER, "with space": INTEGER, 'with "quote"': INTEGER, "日本": INTEGER}),
        closed({f"field_{index:02}": BOOLEAN for index in range(40)}),
        {
            "$schema": DRAFT,
            "$id": "https://example.com/x",
            "title": "X",
            "description": "An x.",
            **closed(person),
        },
        closed(
            {"name": {**SHORT, "default": "x", "examples": ["y"], "description": "A name", "title": "Name"}}
        ),
        closed({"deprecated": {**INTEGER, "deprecated": True, "readOnly": True, "$comment": "old"}}),
    ]


def _unions() -> list[Schema]:
    cat = closed({"kind": {"const": "cat"}, "lives": {"type": "integer", "minimum": 1, "maximum": 9}})
    dog = closed({"kind": {"const": "dog"}, "name": SHORT})
    optional: list[Schema] = [
        {"anyOf": [kind, NULL]}
        for kind in (INTEGER, SHORT, BOOLEAN, cat, {"type": "array", "maxItems": 2, "items": INTEGER})
    ]
    return [
        *(closed({"maybe": entry}) for entry in optional),
        *(
            {"type": "object", "properties": {"maybe": entry}, "additionalProperties": False}
            for entry in optional
        ),
        {"anyOf": [cat, dog]},
        {"oneOf": [cat, dog]},
        closed({"pet": {"anyOf": [cat, dog]}}),
        closed({"pet": {"oneOf": [cat, dog], "discriminator": {"propertyName": "kind"}}}),
        closed({"pets": {"type": "array", "items": {"anyOf": [cat, dog]}, "maxItems": 3}}),
        closed({"value": {"anyOf": [INTEGER, SHORT, BOOLEAN, NULL]}}),
        closed({"value": {"type": ["string", "integer"], "maxLength": 4}}),
        closed({"value": {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]}}),
        {
            "allOf": [
                {"type": "object", "properties": {"a": INTEGER}, "required": ["a"]},
                {"type": "object", "properties": {"b": SHORT}, "required": ["b"]},
            ]
        },
    ]


def _references() -> list[Schema]:
    point = closed({"x": NUMBER, "y": NUMBER})
    tree = {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": closed(
                {
                    "value": {"type": "integer", "minimum": 0, "maximum": 9},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}, "maxItems": 2},
                }
            )
        },
    }
    linked = {
        "$defs": {"list": closed({"head": BOOLEAN, "tail": {"anyOf": [{"$ref": "#/$defs/list"}, NULL]}})},
        "$ref": "#/$defs/list",
    }
    expression = {
        "$defs": {
            "expression": {
                "anyOf": [
                    INTEGER,
                    closed(
                        {
                            "op": {"enum": ["+", "*"]},
                            "left": {"$ref": "#/$defs/expression"},
                            "right": {"$ref": "#/$defs/expression"},
                        }
                    ),
                ]
            }
        },
        **closed({"root": {"$ref": "#/$defs/expression"}}),
    }
    return [
        {
            "$defs": {"point": point},
            **closed({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
        },
        {"definitions": {"point": point}, **closed({"at": {"$ref": "#/definitions/point"}})},
        {"$defs": {"color": {"enum": ["red", "blue"]}}, **closed({"color": {"$ref": "#/$defs/color"}})},
        {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": INTEGER}, **closed({"a": {"$ref": "#/$defs/a"}})},
        {"$defs": {"maybe": {"anyOf": [SHORT, NULL]}}, **closed({"m": {"$ref": "#/$defs/maybe"}})},
        {"$defs": {"point": point}, "type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 3},
        tree,
        linked,
        expression,
        closed(
            {"self": {"anyOf": [{"$ref": "#"}, NULL]}, "n": {"type": "integer", "minimum": 0, "maximum": 9}}
        ),
    ]


def _tools() -> list[Schema]:
    """Parameters of functions and answers of pipelines, as in guides and benchmarks."""
    unit = {"type": "string", "enum": ["celsius", "fahrenheit"]}
    step = closed({"explanation": SHORT, "output": SHORT})
    event = closed(
        {
            "name": SHORT,
            "date": {"type": "string", "format": "date"},
            "participants": {"type": "array", "items": SHORT, "maxItems": 3},
        }
    )
    row = closed({"id": {"type": "integer", "minimum": 1}, "amount": {"type": "number", "minimum": 0}})
    return [
        closed({"location": SHORT, "unit": unit}),
        {"type": "object", "properties": {"location": SHORT, "unit": unit}, "required": ["location"]},
        closed({"steps": {"type": "array", "items": step, "maxItems": 3}, "final_answer": SHORT}),
        event,
        closed({"events": {"type": "array", "items": event, "maxItems": 2}}),
        closed({"rows": {"type": "array", "items": row, "minItems": 1, "maxItems": 3}, "total": NUMBER}),
        closed(
            {"sentiment": {"enum": ["pos", "neg"]}, "score": {"type": "number", "minimum": 0, "maximum": 1}}
        ),
        closed({"is_spam": BOOLEAN, "reason": {"type": ["string", "null"], "maxLength": 20}}),
        closed(
            {
                "query": SHORT,
                "top_k": {"type": "integer", "minimum": 1, "maximum": 50},
                "filters": {"type": "object", "additionalProperties": SHORT, "maxProperties": 2},
            }
        ),
        closed({"sql": {"type": "string", "pattern": r"^SELECT [a-z]{1,8} FROM [a-z]{1,8};$"}}),
        closed(
            {"url": {"type": "string", "format": "uri", "maxLength": 40}, "method": {"enum": ["GET", "POST"]}}
        ),
        closed({"type": {"const": "invoice"}, "lines": {"type": "array", "items": row, "maxItems": 2}}),
        closed(
            {
                "entities": {
                    "type": "array",
                    "maxItems": 3,
                    "items": closed(
                        {
                            "text": SHORT,
                            "label": {"enum": ["PER", "ORG", "LOC"]},
                            "start": {"type": "integer", "minimum": 0, "maximum": 999},
                        }
                    ),
                }
            }
        ),
        closed(
            {
                "thought": SHORT,
                "action": {
                    "anyOf": [
                        closed({"tool": {"const": "search"}, "query": SHORT}),
                        closed({"tool": {"const": "stop"}}),
                    ]
                },
            }
        ),
        closed(
            {
                "matrix": {
                    "type": "array",
                    "minItems": 2,
                    "maxItems": 2,
                    "items": {
                        "type": "array",
                        "minItems": 2,
                        "maxItems": 2,
                        "items": {"type": "integer", "minimum": -9, "maximum": 9},
                    },
                }
            }
        ),
        closed(
            {
                "latitude": {"type": "number", "minimum": -90, "maximum": 90},
                "longitude": {"type": "number", "minimum": -180, "maximum": 180},
            }
        ),
    ]


def _combined(singles: list[Schema]) -> list[Schema]:
    """Pairs, in an object and in a list, so that each kind also stands within others."""
    plain = [schema for schema in singles if "$defs" not in schema and "definitions" not in schema]
    first, second = plain[::3], plain[1::3]
    return [
        closed({"first": one, "rest": {"type": "array", "items": other, "maxItems": 2}})
        for one, other in zip(first, second, strict=False)
        if "#" not in str(one) + str(other)
    ]


def _all() -> list[Schema]:
    singles = [
        *(*_scalars(), *_enums(), *_arrays(), *_objects(), *_unions(), *_references(), *_tools()),
    ]
    return [*singles, *_combined(singles)][:200]


SCHEMAS: list[Schema] = _all()
