"""pydantic's findings in the words of a recipe: which field, what was expected, what stands there, what was
meant."""

from collections.abc import Iterator
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import ValidationError

from lorakit.errors import Problem, did_you_mean
from lorakit.recipe import adapter, optimizer, schedule
from lorakit.recipe.inits import INITS
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

# What users call a method, an optimizer, a schedule, or a setting of one -> what to write.
_ADAM, _LION = "Write name: adamw.", "Write name: lion; its state is one number of 32 bits."
KNOWN_AS = {
    "rslora": "Write method: lora with scaling: rank_stabilized.",
    "lora+": "Write method: lora with optimizer.lr_ratio: lora+.",
    "qlora": "Write method: lora with model.quantize: nf4.",
    "bitfit": "Write method: full with train_only: [bias].",
    "freeze": "Write method: full with train_only.",
    "oft": "Write method: peft with type: OFT.",
    "ia3": "Write method: peft with type: IA3.",
    "loha": "Write method: peft with type: LOHA.",
    "lokr": "Write method: peft with type: LOKR.",
    **{name: f"Write method: lora with init: {name}." for name in INITS},
    **dict.fromkeys(("adam", "adamw_torch", "adamw_torch_fused", "adamw_hf", "fused_adamw"), _ADAM),
    **dict.fromkeys(("adam8bit", "adamw8bit", "adamw_bnb_8bit", "adam_8bit"), "Write name: adamw_8bit."),
    **dict.fromkeys(
        ("paged_adamw", "paged_adamw_32bit", "pagedadamw8bit"), "What pages is called paged_adamw_8bit."
    ),
    **dict.fromkeys(("lion_32bit", "lion_8bit", "paged_lion_8bit", "paged_lion_32bit"), _LION),
    **dict.fromkeys(("sophiag", "sophia-g", "sophia_g"), "Write name: sophia."),
    **dict.fromkeys(("sophiah", "sophia-h", "sophia_h"), "Sophia-G is here: name: sophia."),
    **dict.fromkeys(
        ("cosine_with_min_lr", "cosine_warmup_with_min_lr"), "Write name: cosine with a floor above 0."
    ),
    "constant_with_warmup": "Write name: constant; every schedule has a warmup.",
    "polynomial": "Write name: linear with a floor.",
    **dict.fromkeys(("inverse_sqrt", "rsqrt"), "Write name: inverse-sqrt."),
    **dict.fromkeys(("warmup_stable_decay", "trapezoid", "trapezoidal"), "Write name: wsd."),
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
            hint = ""
            if isinstance(tag, str):
                hint = KNOWN_AS.get(tag.lower()) or did_you_mean(tag, tagged.types)
            message = f"expected {known}, got {show(tag)}. {hint}".rstrip()
        elif kind == "extra_forbidden":
            message = _unknown(path, written, recipe)
        elif kind in empty:
            message = "must not be empty"
        elif path and (found := _field(path, written, recipe)):
            message = f"expected {expected(*found)}, got {show(_value(path, written))}"
            if path == ("adapter", "init") and (hint := _start(_value(path, written))):
                message += f". {hint}"
        else:
            message = str(item["msg"])
        problems.setdefault(path, Problem(written.place(path), ".".join(map(str, path)), message))
    deep = {key[:depth] for key in problems for depth in range(2, len(key))}
    return [problem for key, problem in problems.items() if key not in deep]


def _start(value: Any) -> str:
    """What to write for a start as PEFT spells it, or one that is near it."""
    text = str(value).lower()
    if text.startswith("pissa_niter"):
        return "Write init: pissa with init_svd: fast."
    if text in ("true", "kaiming", "kaiming_uniform"):
        return "Write init: default."
    return did_you_mean(text, INITS)


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
    if len(path) == 1:
        names = [*recipe.model_fields, "extends"]
        return f"not a section. {did_you_mean(name, names) or 'Sections: ' + ', '.join(names)}".rstrip()
    section, label = _section_of(path, written, recipe)
    if section and (inner := _inner(path, section)):
        section, label = inner, f"{path[0]}.{path[1]}"
    known = list(section.model_fields) if section else []
    if reason := getattr(section, "lacks", {}).get(name):
        return f"not a field of {label}: {reason}"
    homes = []
    for home, types in sorted(_sections(recipe).items(), key=lambda item: (item[0] != path[0], len(item[1]))):
        having = [t for t in types if name in t.model_fields and t is not section]
        if having and len(having) == len(types):
            homes.append(f'section "{home}"')
        elif having:
            tagged = TAGGED[home]
            tag = next(tag for tag, section_type in tagged.types.items() if section_type is having[0])
            homes.append(f'{tagged.word} "{tag}"')
    hint = f"It is a field of {homes[0]}." if homes else did_you_mean(name, known)
    return f"not a field of {label}. {hint or 'Fields: ' + ', '.join(known) + '.'}"


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
