"""pydantic's findings in the words of a recipe: which field, what was expected, what stands there, what was
meant."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from lorakit.errors import Problem, did_you_mean, nearest
from lorakit.recipe import adapter, optimizer, schedule
from lorakit.recipe.inits import INITS
from lorakit.recipe.known_as import FIELDS, NAMES, STARTS, Known, cure_of_field
from lorakit.recipe.section import Section, Tagged
from lorakit.recipe.source import Key, Source
from lorakit.recipe.words import expected, show


def key_of(loc: tuple[Any, ...], values: Any) -> Key:
    """pydantic's location without the names of union members: the path of keys that really stand in the
    recipe."""
    path: list[Any] = []
    for part in loc:
        inside = (
            part in values if isinstance(values, dict) else isinstance(part, int) and part < len(values or ())
        )
        if inside:
            path.append(part)
            values = values[part]
            if not isinstance(values, dict | tuple | list):
                break
    return tuple(path)


TAGGED: dict[str, Tagged] = {
    "adapter": adapter.TAGGED,
    "optimizer": optimizer.TAGGED,
    "schedule": schedule.TAGGED,
}


def explain(error: ValidationError, written: Source, recipe: type[Section]) -> list[Problem]:
    """One problem per place: pydantic reports one per member of a union, here the deepest of a field
    counts."""
    problems: dict[Key, Problem] = {}
    empty = ("string_too_short", "too_short")  # what every other member of the union says misses the point
    for item in sorted(error.errors(), key=lambda item: item["type"] not in empty):
        path, kind = key_of(item["loc"], written.values), item["type"]
        if kind == "missing" and isinstance(item["loc"][-1], str):
            path = (*path, item["loc"][-1])
            message = "required: " + _description(path, recipe)
        elif kind in ("union_tag_invalid", "union_tag_not_found"):
            tagged = TAGGED[str(path[0])]
            path = (*path, tagged.field)
            tag, known = _value(path, written), " or ".join(f'"{name}"' for name in tagged.types)
            message = f"expected {known}, got {show(tag)}. {_meant(tag, tagged)[1]}".rstrip()
            for problem in _of_no_type(path, written, tagged):
                problems.setdefault((path[0], problem.field.partition(".")[2]), problem)
        elif kind == "extra_forbidden":
            message = _unknown(path, written, recipe)
        elif kind in empty:
            message = "must not be empty"
        elif path and (found := _field(path, written, recipe)):
            message = f"expected {expected(*found)}, got {show(_value(path, written))}"
            if hint := _of_value(path, written, recipe):
                message += f". {hint}"
        else:
            message = str(item["msg"])
        problems.setdefault(path, Problem(written.place(path), ".".join(map(str, path)), message))
    deep = {key[:depth] for key in problems for depth in range(2, len(key))}
    return [problem for key, problem in problems.items() if key not in deep]


def as_meant(written: Source) -> Source | None:
    """What was written with the unknown names of methods, optimizers and schedules replaced by what they
    surely mean, so that the rest of their sections can be checked; None where there is nothing to replace."""
    values = dict(written.values)
    for name, tagged in TAGGED.items():
        block = values.get(name)
        tag = tagged.tag(block) if isinstance(block, dict) else None
        if isinstance(block, dict) and tag not in list(tagged.types) and (meant := _meant(tag, tagged)[0]):
            values[name] = {**meant, **block, tagged.field: meant[tagged.field]}
    replaced = any(values[name] is not written.values[name] for name in values)
    return Source(written.name, values, written.places, written.folders) if replaced else None


def _meant(tag: Any, tagged: Tagged) -> Known:
    """(what a section with an unknown name is meant to be, or nothing; what to write)."""
    if not isinstance(tag, str):
        return {}, ""
    fields, hint = NAMES.get(tag.lower(), ({}, ""))
    if fields.get(tagged.field) in tagged.types:
        return fields, hint
    near = nearest(tag, tagged.types)
    return ({tagged.field: near}, f'Did you mean "{near}"?') if near else ({}, "")


def _of_no_type(path: Key, written: Source, tagged: Tagged) -> Iterator[Problem]:
    """The fields beside an unknown name (at `path`) that no type of its section has."""
    section, known = str(path[0]), {name for t in tagged.types.values() for name in t.model_fields}
    if _meant(_value(path, written), tagged)[0]:
        return  # they are checked as what is meant
    for name in (name for name in _value(path[:1], written) if name not in known):
        hint = cure_of_field(name, section) or did_you_mean(name, known)
        message = f"not a field of any {tagged.word}. {hint}".rstrip()
        yield Problem(written.place((section, name)), f"{section}.{name}", message)


def _of_value(path: Key, written: Source, recipe: type[Section]) -> str:
    """What to write in place of a value of the wrong kind, where that is known."""
    value = _value(path, written)
    section = _section_of(path, written, recipe)[0] if path == ("adapter", "init") else None
    if section:
        return _start(value, section)
    if path[0] in TAGGED and len(path) == 1 and isinstance(value, str):
        tagged = TAGGED[str(path[0])]
        return f"Write {{{tagged.field}: {value}}}." if value in tagged.types else _meant(value, tagged)[1]
    return ""


def _start(value: Any, section: type[Section]) -> str:
    """What to write for a start as others spell it, one that is near it, or one that only lora has."""
    text = str(value).lower()
    if text.startswith("pissa_niter"):
        return "Write init: pissa with init_svd: fast."
    if text in STARTS:
        return STARTS[text]
    near = nearest(text, INITS)
    if near and near not in get_args(section.model_fields["init"].annotation):
        return f"init: {near} is lora's; write method: lora, or init: default"
    return f'Did you mean "{near}"?' if near else ""


def _value(path: Key, written: Source) -> Any:
    value: Any = written.values
    for part in path:
        value = value[part]
    return value


def _sections(recipe: type[Section]) -> dict[str, tuple[type[Section], ...]]:
    """Section name -> its types: several for a tagged union such as `adapter`."""
    found = {}
    for name, field in recipe.model_fields.items():
        types = [t for t in _members(field.annotation) if isinstance(t, type) and issubclass(t, Section)]
        if types:
            found[name] = tuple(types)
    return found


def _members(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    else:
        yield annotation


def _section_of(path: Key, written: Source, recipe: type[Section]) -> tuple[type[Section] | None, str]:
    """The section type that `path` lies in, and how to call it: `method "lora"`, `section "data"`."""
    tagged = TAGGED.get(str(path[0]))
    if tagged is None:
        types = _sections(recipe).get(str(path[0]), ())
        return (types[0] if types else None), f'section "{path[0]}"'
    block = written.values.get(str(path[0]))
    tag = tagged.tag(block) if isinstance(block, dict) else None
    return tagged.types.get(str(tag)), f'{tagged.word} "{tag}"'


def _inner(path: Key, section: type[Section]) -> type[Section] | None:
    """The section type of a mapping within a field, where the field has one: an element of data.train."""
    found = list(_members(section.model_fields[str(path[1])].annotation)) if len(path) > 2 else []
    found += [part for member in found for part in get_args(member)]
    found += [part for member in found if get_origin(member) for part in _members(member)]
    return next((t for t in found if isinstance(t, type) and issubclass(t, Section)), None)


def _unknown(path: Key, written: Source, recipe: type[Section]) -> str:
    name = str(path[-1])
    cure = cure_of_field(name, str(path[0])) if len(path) < 3 else ""
    if len(path) == 1:
        names = [*recipe.model_fields, "extends"]
        cure = cure or did_you_mean(name, names) or "Sections: " + ", ".join(names)
        return f"not a section. {cure}"
    section, label = _section_of(path, written, recipe)
    if section and (inner := _inner(path, section)):
        section, label = inner, f"{path[0]}.{path[1]}"
    known = list(section.model_fields) if section else []
    called = ""
    if cure:
        home, _, field = FIELDS[name][0].partition(".")
        if home != path[0] or field in known:
            return f"not a field of {label}. {cure}"
        called, name = f"Here it is called {field}. ", field
    if reason := getattr(section, "lacks", {}).get(name):
        return f"not a field of {label}: {reason}"
    hint = _home(name, str(path[0]), section, recipe) or did_you_mean(name, known)
    return f"not a field of {label}. {called}{hint or 'Fields: ' + ', '.join(known) + '.'}"


def _home(name: str, here: str, section: type[Section] | None, recipe: type[Section]) -> str:
    """Where a field that `section`, one of the types of `here`, lacks belongs; empty where nothing has it."""
    for home, types in sorted(_sections(recipe).items(), key=lambda item: (item[0] != here, len(item[1]))):
        having = [t for t in types if name in t.model_fields and t is not section]
        if having and len(having) == len(types):
            return f'It is a field of section "{home}".'
        if having:
            tagged = TAGGED[home]
            tags = [f'"{tag}"' for tag, section_type in tagged.types.items() if section_type in having]
            names = " and ".join(filter(None, (", ".join(tags[:-1]), tags[-1])))
            cure = f"; delete it, or write another {home}.{tagged.field}" if home == here else ""
            return f"It is a field of {tagged.word} {names}{cure}."
    return ""


def _field(path: Key, written: Source, recipe: type[Section]) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """(JSON Schema of the field, all definitions) or None when the path is no field of a known section."""
    if len(path) == 1:
        if path[0] in _sections(recipe):
            return {"type": "object"}, {}
        schema = recipe.model_json_schema()
    else:
        section, _ = _section_of(path, written, recipe)
        if section is None:
            return {"enum": list(TAGGED[str(path[0])].types)}, {}
        schema = section.model_json_schema()
        path = path[1:]
    field = schema["properties"].get(str(path[0]))
    for part in path[1:]:
        field = _inside(field or {}, part, schema.get("$defs", {}))
    return (field, schema.get("$defs", {})) if field else None


def _inside(field: dict[str, Any], part: str | int, definitions: dict[str, Any]) -> dict[str, Any] | None:
    """The schema of an element of a list or of a value of a mapping."""
    for option in field.get("anyOf", [field]):
        if "$ref" in option:
            option = definitions[option["$ref"].rsplit("/", 1)[-1]]
        fixed = option.get("prefixItems", [])
        if isinstance(part, int) and (part < len(fixed) or "items" in option):
            inner: dict[str, Any] = fixed[part] if part < len(fixed) else option["items"]
            return inner
        if isinstance(part, str) and part in option.get("properties", {}):
            named: dict[str, Any] = option["properties"][part]
            return named
        if isinstance(part, str) and isinstance(option.get("additionalProperties"), dict):
            values: dict[str, Any] = option["additionalProperties"]
            return values
    return None


def _description(path: Key, recipe: type[Section]) -> str:
    if len(path) == 1:
        field = recipe.model_fields.get(str(path[0]))
    else:
        types = _sections(recipe).get(str(path[0]), ())
        inner = [_inner(path, t) or t for t in types if len(path) > 2] or types
        field = next((t.model_fields.get(str(path[1 if len(path) == 2 else -1])) for t in inner), None)
    return " ".join((field.description or "").split()).split(". ")[0] if field else ""
