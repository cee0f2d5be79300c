"""Values and kinds of values in the words of a recipe: `a whole number >= 1 or "auto"`."""

import json
from typing import Any


def show(value: Any) -> str:
    """A value as a message shows it."""
    if isinstance(value, str) and _looks_like_number(value):
        return f'the text "{value}" (delete the quotes)'
    if isinstance(value, dict):
        return "a mapping"
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _looks_like_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def expected(field: dict[str, Any], definitions: dict[str, Any]) -> str:
    """A JSON Schema in words: `a whole number >= 1 or "auto"`."""
    if "$ref" in field:
        return expected(definitions[field["$ref"].rsplit("/", 1)[-1]], definitions)
    if "anyOf" in field:
        return " or ".join(expected(option, definitions) for option in field["anyOf"])
    if "const" in field or "enum" in field:
        return " or ".join(show(value) for value in field.get("enum", [field.get("const")]))
    if field.get("minimum") is not None and field.get("minimum") == field.get("maximum"):
        return str(field["minimum"])
    words = {
        "integer": "a whole number",
        "number": "a number",
        "string": "text",
        "boolean": "true or false",
        "null": "null",
        "array": "a list",
        "object": "a mapping",
    }[field.get("type", "object")]
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [f"{sign} {_bound(field[key])}" for key, sign in bounds.items() if key in field]
    if "prefixItems" in field:
        words += f" of {len(field['prefixItems'])}"
    elif "items" in field:
        words += f" of {expected(field['items'], definitions)}"
    if isinstance(field.get("additionalProperties"), dict):
        words += f" from text to {expected(field['additionalProperties'], definitions)}"
    return " ".join([words, " and ".join(limits)]).rstrip()


def _bound(number: float) -> str:
    return f"{number:g}" if abs(number) < 2**53 else f"2**{int(number).bit_length() - 1}"
