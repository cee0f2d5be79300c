"""YAML text -> plain values, each with the line and column it came from.

Stricter than YAML where YAML hurts: duplicate keys, tags, several documents and merge keys are refused;
`1e-4` is a number; `no`, `on` and `12:30` are text (YAML 1.2). Sequences become tuples, so that a recipe
cannot be changed later. Not here: what the keys mean (the sections beside this file).
"""

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import LorakitError, Problem

Key = tuple[str | int, ...]  # ("adapter", "rank")

# Two ways to say one thing: one of them, written over a recipe that has the other, replaces it.
ALTERNATIVES = (("training.epochs", "training.max_steps"),)

# A section of one kind says nothing about another kind: who names another method (type, name) writes it anew.
KINDS = {"adapter": ("method", "lora"), "task": ("type", "causal-lm"), "optimizer": ("name", "adamw")}

MAX_BYTES, MAX_DEPTH, MAX_NODES = 1 << 20, 64, 50_000
_INT = re.compile(r"[-+]?[0-9]+$")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?$|[-+]?\.inf$|\.nan$", re.IGNORECASE)
_WORDS = {"": None, "~": None, "null": None, "true": True, "false": False}


@dataclass
class Source:
    """The values of a recipe after `extends` and `--set`, and where each of them was written."""

    name: str
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Key, str] = field(default_factory=dict)  # -> "recipe.yaml:14:3"
    folders: dict[Key, Path] = field(default_factory=dict)  # -> what a relative path there is relative to
    problems: list[Problem] = field(default_factory=list)

    def place(self, key: Key) -> str:
        """Where `key`, or else the nearest thing around it, was written."""
        while key and key not in self.places:
            key = key[:-1]
        return self.places.get(key, self.name)

    def folder(self, key: Key) -> Path:
        while key and key not in self.folders:
            key = key[:-1]
        return self.folders.get(key, Path.cwd())

    def get(self, dotted: str) -> Any:
        """The value written at a dotted name, or None."""
        node: Any = self.values
        for part in dotted.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return node

    def drop(self, dotted: str) -> None:
        """Forget what was written at a dotted name."""
        section, _, field = dotted.partition(".")
        if isinstance(self.values.get(section), dict):
            self.values[section].pop(field, None)
            self.places.pop((section, field), None)

    def problem(self, key: Key, message: str) -> None:
        self.problems.append(Problem(self.place(key), ".".join(map(str, key)), message))


def read(path: Path, overrides: tuple[str, ...] = ()) -> Source:
    """The recipe at `path` merged over what it extends, then `--set KEY=VALUE` overrides, in order.

    Raises: LorakitError when a file cannot be read or is no YAML; anything else is collected in `problems`.
    """
    return override(_read_file(path, seen=()), overrides)


def override(source: Source, overrides: tuple[str, ...]) -> Source:
    """`source` with `--set KEY=VALUE` overrides applied, in order."""
    for text in overrides:
        _set(source, text)
    return source


def _read_file(path: Path, seen: tuple[Path, ...]) -> Source:
    source = Source(name=str(path))
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise LorakitError(f"{path}: cannot read this recipe: {getattr(error, 'strerror', error)}") from None
    if len(raw) > MAX_BYTES:
        raise LorakitError(f"{path}: {len(raw):,} bytes is no recipe (the limit is {MAX_BYTES:,})")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        place = f"{path}:{_line_column(error.object[: error.start].decode())}"
        raise LorakitError(f"{place}  not UTF-8 text (byte {error.start})") from None
    source.values = _parse(text, str(path), source, path.parent, ())
    parent = source.values.pop("extends", None)
    if parent is None:
        return source
    if not isinstance(parent, str):
        source.problem(("extends",), "expected the path of another recipe")
        return source
    place = source.place(("extends",))
    base_path = path.parent / parent
    try:
        if not base_path.exists():
            raise LorakitError(f"{place}  extends: no such file: {base_path}")
        if base_path.resolve() in (*seen, path.resolve()):
            raise LorakitError(f"{place}  extends: {parent} extends this recipe in a circle")
        base = _read_file(base_path, (*seen, path.resolve()))
    except (OSError, ValueError, RuntimeError) as error:  # no name of a file, links in a circle
        raise LorakitError(f"{place}  extends: {parent!r} cannot be read: {error}") from None
    return _merge(base, source)


def _merge(base: Source, over: Source) -> Source:
    """`over` on top of `base`: mappings merge key by key, everything else is replaced."""

    for one, other in ALTERNATIVES:
        if over.get(one) is not None or over.get(other) is not None:
            base.drop(one)
            base.drop(other)

    for section, (tag, default) in KINDS.items():
        kind, other = over.get(f"{section}.{tag}"), base.get(f"{section}.{tag}") or default
        if kind is not None and kind != other:
            base.values.pop(section, None)

    def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
        merged = dict(low)
        for key, value in high.items():
            both = isinstance(value, dict) and isinstance(low.get(key), dict)
            merged[key] = merge(low[key], value) if both else value
        return merged

    return Source(
        name=over.name,
        values=merge(base.values, over.values),
        places={**base.places, **over.places},
        folders={**base.folders, **over.folders},
        problems=base.problems + over.problems,
    )


def _set(source: Source, override: str) -> None:
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    label = f"--set {override}"
    key: Key = tuple(dotted.split("."))
    if not equals or not all(key):
        raise LorakitError(f"{label}: expected KEY=VALUE, for example --set optimizer.lr=1e-4")
    if key == ("extends",):
        raise LorakitError(f"{label}: extends belongs in the file; give that recipe's path instead")
    node = source.values
    for depth, part in enumerate(key[:-1], 1):
        if str(part) not in node:
            node[str(part)] = {}
            source.places[key[:depth]] = label
        node = node[str(part)]
        if not isinstance(node, dict):
            whole = ".".join(map(str, key[:depth]))
            raise LorakitError(f"{label}: {whole} holds no fields; give all of it: --set {whole}=[a, b]")
    source.places[key] = label
    source.folders[key] = Path.cwd()
    value = node[str(key[-1])] = _parse(text, label, source, Path.cwd(), key)
    for one, other in ALTERNATIVES:
        if dotted in (one, other) and value is not None:
            source.drop(other if dotted == one else one)


def _parse(text: str, name: str, source: Source, folder: Path, under: Key) -> Any:
    """The values of `text`; places and problems go to `source`, below the key `under`."""
    loader = yaml.CSafeLoader if yaml.__with_libyaml__ else yaml.SafeLoader

    def place(mark: Any) -> str:
        return f"{name}:{mark.line + 1}:{mark.column + 1}" if mark and not under else name

    if odd := yaml.reader.Reader.NON_PRINTABLE.search(text):
        where = name if under else f"{name}:{_line_column(text[: odd.start()])}"
        raise LorakitError(f"{where}  not YAML: the character {odd.group()!a} is not allowed; delete it")
    try:
        _check_events(yaml.parse(text, Loader=loader), place)
        node = yaml.compose(text, Loader=loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise LorakitError(f"{place(mark)}  not YAML: {error.problem or error.context}") from None
    if under:
        source.places[under] = name
        return _Builder(source, name, folder, inline=True).build(node, under, 0) if node else None
    if not isinstance(node, yaml.MappingNode):
        raise LorakitError(f"{name}:1:1  a recipe is a mapping of sections: model, adapter, data, ...")
    return _Builder(source, name, folder, inline=False).build(node, (), 0)


def _line_column(before: str) -> str:
    """Line and column, from 1, of what follows the text `before`."""
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def _check_events(events: Iterable[yaml.Event], place: Callable[[Any], str]) -> None:
    """Raises: LorakitError for what must not reach the composer: depth that would overflow its stack, a
    second document, and tags, which ask for Python objects."""
    depth = documents = 0
    for event in events:
        where = place(event.start_mark)
        documents += isinstance(event, yaml.DocumentStartEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise LorakitError(f"{where}  nested too deeply to be a recipe")
        if documents > 1:
            raise LorakitError(f"{where}  one recipe per file: here begins another YAML document")
        if tag := getattr(event, "tag", None):
            raise LorakitError(f"{where}  YAML tags are not allowed in a recipe: {tag}")


@dataclass
class _Builder:
    source: Source
    name: str
    folder: Path
    inline: bool  # values of --set have no line and column of their own
    num_nodes: int = 0

    def note(self, key: Key, node: yaml.Node) -> None:
        mark = node.start_mark
        self.source.places[key] = (
            self.name if self.inline else f"{self.name}:{mark.line + 1}:{mark.column + 1}"
        )
        self.source.folders[key] = self.folder

    def build(self, node: yaml.Node, key: Key, depth: int) -> Any:
        self.num_nodes += 1
        if depth > MAX_DEPTH or self.num_nodes > MAX_NODES:
            size = f"more than {MAX_NODES:,} values or {MAX_DEPTH} levels, aliases written out"
            raise LorakitError(f"{self.source.place(key)}  {size}: too much for a recipe")
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self.note((*key, index), item)
            return tuple(self.build(item, (*key, i), depth + 1) for i, item in enumerate(node.value))
        return dict(self.pairs(node, key, depth))

    def pairs(self, node: yaml.Node, key: Key, depth: int) -> Iterator[tuple[str, Any]]:
        seen: dict[str, str] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                mark = key_node.start_mark
                where = self.name if self.inline else f"{self.name}:{mark.line + 1}:{mark.column + 1}"
                message = "a key must be plain text"
                self.source.problems.append(Problem(where, ".".join(map(str, key)), message))
                continue
            name = key_node.value
            here = (*key, name)
            first = seen.get(name)
            self.note(here, key_node)
            if first is not None:
                self.source.problem(here, f"written twice (first at {first}); which one is meant?")
                continue
            seen[name] = self.source.places[here]
            if name == "<<":
                self.source.problem(here, "merge keys are not supported; use `extends: other.yaml`")
                continue
            yield name, self.build(value_node, here, depth + 1)

    def scalar(self, node: yaml.ScalarNode) -> Any:
        return node.value if node.style in ("'", '"', "|", ">") else plain(node.value)


def plain(text: str) -> Any:
    """What unquoted text means: YAML 1.2 core scalars, and nothing cleverer."""
    if text.lower() in _WORDS and text in (text.lower(), text.title(), text.upper()):
        return _WORDS[text.lower()]
    if _INT.match(text):
        return int(text) if len(text) < 20 else float(text)
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan")) if _FLOAT.match(text) else text
