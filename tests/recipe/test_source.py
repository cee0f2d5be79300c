"""YAML text -> values and places: what a scalar is, what is refused and where, `extends`, `--set`."""

import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lorakit.cli.app import load
from lorakit.errors import LorakitError, RecipeError
from lorakit.recipe import Recipe, load_recipe, source
from lorakit.recipe.source import Source

MINIMAL = "model: {path: m}\ndata: {train: d.jsonl}\noutput: o\n"


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, so that places read as a user sees them: r.yaml:3:7."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(text: str | bytes, *overrides: str) -> Source:
    Path("r.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    return source.read(Path("r.yaml"), overrides)


def refusal(text: str | bytes, *overrides: str) -> str:
    """What a user is told about a recipe that must not load."""
    Path("r.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(LorakitError) as caught:
        load_recipe("r.yaml", overrides)
    return str(caught.value)


def write(**files: str) -> None:
    """write(base="...") writes base.yaml."""
    for name, text in files.items():
        Path(f"{name}.yaml").write_text(text)


# ------------------------------------------------------------------------------------------------------------
# Scalars


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E-4", 1e-4),
        ("1e4", 1e4),
        ("+2.5e+3", 2500.0),
        (".5", 0.5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("2.0", 2.0),
        ("-3", -3),
        ("+5", 5),
        ("0", 0),
        ("010", 10),  # YAML 1.2: no octal
        ("9223372036854775807", 2**63 - 1),
        (".inf", math.inf),
        ("-.inf", -math.inf),
        ("true", True),
        ("True", True),
        ("TRUE", True),
        ("false", False),
        ("False", False),
        ("FALSE", False),
        ("null", None),
        ("Null", None),
        ("NULL", None),
        ("~", None),
        ("", None),
    ],
)
def test_yaml_1_2_scalar_becomes_its_value_and_type(text: str, value: Any) -> None:
    found = read(f"a: {text}\n").values["a"]
    assert found == value
    assert type(found) is type(value)


def test_nan_is_a_number() -> None:
    assert math.isnan(read("a: .nan\n").values["a"])


@pytest.mark.parametrize(
    "texts",
    [
        ["no", "No", "on", "off", "yes", "y", "n"],
        ["0x10", "0o17", "0b1", "1_000"],
        ["12:30", "1:02:03", "2026-11-20"],
        ["tRUE", "nULL", "inf", "nan"],
        ["1e", "e4", ".", "1.2.3", "1e-4x", "--", "="],
    ],
    ids=["booleans", "number systems", "times", "words", "nearly numbers"],
)
def test_what_yaml_1_1_would_convert_stays_text(texts: list[str]) -> None:
    assert read(f"a: [{', '.join(texts)}]\n").values["a"] == tuple(texts)


@pytest.mark.parametrize("text", [".INF", "-.Inf", "+.INF", ".NaN", ".NAN"])
def test_infinity_in_capitals_is_a_number_too(text: str) -> None:
    assert not math.isfinite(read(f"a: {text}\n").values["a"])


@pytest.mark.parametrize("quoted", ["'{}'", '"{}"', "|-\n  {}", ">-\n  {}"])
@pytest.mark.parametrize("text", ["8", "1e-4", "true", "null", "~", ".5"])
def test_quoted_and_block_scalars_stay_text(text: str, quoted: str) -> None:
    assert read(f"a: {quoted.format(text)}\n").values["a"] == text


@pytest.mark.parametrize("empty", ["''", '""'])
def test_empty_quotes_are_empty_text_and_not_null(empty: str) -> None:
    assert read(f"a: {empty}\n").values["a"] == ""


def test_sequences_become_tuples_at_every_depth() -> None:
    values = read("a: [1, [2, [3]], {b: [4]}]\nc:\n  - 5\n").values
    assert values == {"a": (1, (2, (3,)), {"b": (4,)}), "c": (5,)}


def test_keys_are_text_even_when_they_look_like_numbers_or_words() -> None:
    assert read("a: {1: x, true: y, ~: z}\n").values["a"] == {"1": "x", "true": "y", "~": "z"}


def test_every_key_and_item_has_the_line_and_column_where_it_was_written() -> None:
    places = read("model:\n  path: m\nadapter:\n  targets: [q, k]\n  rank_pattern: {a: 1}\n").places
    assert places == {
        ("model",): "r.yaml:1:1",
        ("model", "path"): "r.yaml:2:3",
        ("adapter",): "r.yaml:3:1",
        ("adapter", "targets"): "r.yaml:4:3",
        ("adapter", "targets", 0): "r.yaml:4:13",
        ("adapter", "targets", 1): "r.yaml:4:16",
        ("adapter", "rank_pattern"): "r.yaml:5:3",
        ("adapter", "rank_pattern", "a"): "r.yaml:5:18",
    }


def test_the_place_of_a_default_is_the_nearest_thing_around_it_that_was_written() -> None:
    found = read(MINIMAL)
    assert found.place(("data", "eval")) == "r.yaml:2:1"
    assert found.place(("adapter", "rank")) == "r.yaml"


def test_a_byte_order_mark_is_no_part_of_the_first_key() -> None:
    found = read(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert list(found.values) == ["model", "data", "output"]
    assert found.places["model",] == "r.yaml:1:1"


def test_windows_line_ends_change_neither_values_nor_places() -> None:
    found = read(MINIMAL.replace("\n", "\r\n"))
    assert found.values == read(MINIMAL).values
    assert found.places["output",] == "r.yaml:3:1"


# ------------------------------------------------------------------------------------------------------------
# Refused


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "adapter: {rank: 8}\nadapter: {rank: 4}\n",
            "r.yaml:5:1  adapter: written twice (first at r.yaml:4:1); which one is meant?",
        ),
        (
            "adapter: {rank: 8, rank: 8}\n",
            "r.yaml:4:20  adapter.rank: written twice (first at r.yaml:4:11); which one is meant?",
        ),
        (
            "adapter:\n  rank_pattern:\n    q: 1\n    'q': 2\n",
            "r.yaml:7:5  adapter.rank_pattern.q: written twice (first at r.yaml:6:5); which one is meant?",
        ),
        (
            "adapter:\n  <<: {rank: 4}\n",
            "r.yaml:5:3  adapter.<<: merge keys are not supported; use `extends: other.yaml`",
        ),
        ("adapter: {? [a, b] : 3}\n", "r.yaml:4:13  adapter: a key must be plain text"),
    ],
    ids=["section twice", "field twice", "quoted twice", "merge key", "list as key"],
)
def test_what_one_could_overlook_is_refused_where_it_stands(text: str, message: str) -> None:
    assert refusal(MINIMAL + text) == message


def test_a_key_written_three_times_is_reported_for_each_repetition() -> None:
    lines = refusal(MINIMAL + "adapter: {rank: 1, rank: 2, rank: 3}\n").splitlines()
    assert [line.split("  ")[0] for line in lines] == ["r.yaml:4:20", "r.yaml:4:29"]
    assert all("first at r.yaml:4:11" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "tag"),
    [
        (
            "!!python/object/apply:os.system ['touch pwned']",
            "tag:yaml.org,2002:python/object/apply:os.system",
        ),
        ("!!binary aGk=", "tag:yaml.org,2002:binary"),
        ("!!set {a, b}", "tag:yaml.org,2002:set"),
        ("!mine hi", "!mine"),
        ("!mine [a]", "!mine"),
        ("!mine {a: 1}", "!mine"),
    ],
)
def test_a_tag_is_refused_and_never_executed(value: str, tag: str, here: Path) -> None:
    message = refusal(MINIMAL + f"adapter:\n  targets: {value}\n")
    assert message == f"r.yaml:5:12  YAML tags are not allowed in a recipe: {tag}"
    assert not (here / "pwned").exists()


@pytest.mark.parametrize(
    "value", ["!mine 'hi'", "!!binary 'aGk='", "!!python/name:os.system hi", "!!nosuch hi", "!!timestamp hi"]
)
def test_no_tag_before_a_scalar_is_ignored(value: str) -> None:
    assert "r.yaml:5:12  YAML tags are not allowed in a recipe: " in refusal(
        MINIMAL + f"adapter:\n  targets: {value}\n"
    )


def test_a_tag_is_one_problem_and_not_two() -> None:
    assert len(refusal(MINIMAL + "adapter:\n  targets: !mine hi\n").splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "place"),
    [(MINIMAL + "---\n" + MINIMAL, "r.yaml:4:1"), (MINIMAL + "...\n---\nadapter: {}\n", "r.yaml:5:1")],
    ids=["---", "..."],
)
def test_several_documents_are_refused_where_the_second_begins(text: str, place: str) -> None:
    assert refusal(text) == f"{place}  one recipe per file: here begins another YAML document"


@pytest.mark.parametrize(
    "text",
    ["", "\n\n", "# only a comment\n", "---\n", "null\n", "- a\n- b\n", "[a]\n", "3\n", "a recipe\n", "''\n"],
)
def test_what_is_no_mapping_is_refused_with_the_sections_that_are_expected(text: str) -> None:
    assert refusal(text) == "r.yaml:1:1  a recipe is a mapping of sections: model, adapter, data, ..."


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("model:\n\tpath: m\n", "r.yaml:2:1"),
        (MINIMAL + "adapter: @x\n", "r.yaml:4:10"),
        (MINIMAL + "adapter: {targets: *t}\n", "r.yaml:4:20"),
        (MINIMAL + 'adapter: {targets: "\\q"}\n', "r.yaml:4:21"),
        ("%YAML 3.0\n---\n" + MINIMAL, "r.yaml:1:1"),
        ("model: {path: m\n" + "data: {}\n", "r.yaml:2:5"),
        ("a: b: c\n", "r.yaml:1:5"),
    ],
    ids=["tab", "reserved", "undefined alias", "escape", "version", "unclosed", "two colons"],
)
def test_a_syntax_error_has_file_line_and_column(text: str, place: str) -> None:
    message = refusal(text)
    assert message.startswith(f"{place}  not YAML: "), message
    assert len(message) > len(f"{place}  not YAML: ")
    assert "\n" not in message


def test_a_few_aliases_are_fine_and_mean_the_same_value() -> None:
    found = read("a: &t [q, {k: 1}]\nb: *t\nc: {d: *t}\n")
    assert found.values == {"a": ("q", {"k": 1}), "b": ("q", {"k": 1}), "c": {"d": ("q", {"k": 1})}}
    assert not found.problems


NOT_HANGING = 30  # seconds: what is refused at the limit takes about one, what is not grows without end


def bomb() -> str:
    names = "abcdefghij"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for low, high in pairwise(names):
        lines.append(f"{high}: &{high} [{', '.join([f'*{low}'] * 9)}]")
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (bomb(), 1),
        ("a: &a [*a]\n", 1),
        ("a: &a {b: *a}\n", 1),
        ("a: &a x\nb: [" + "*a, " * 60_000 + "]\n", 1),
        ("a: 1\nb: [" + "1, " * 60_000 + "]\n", 2),
    ],
    ids=["billion laughs", "list in itself", "mapping in itself", "60,000 aliases", "60,000 values"],
)
def test_too_many_values_are_refused_quickly_also_those_that_aliases_make(text: str, line: int) -> None:
    start = time.perf_counter()
    place, message = refusal(text).split("  ")
    assert time.perf_counter() - start < NOT_HANGING
    assert place.startswith(f"r.yaml:{line}:")
    assert message == "more than 50,000 values or 64 levels, aliases written out: too much for a recipe"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("a: " + "[" * 65 + "]" * 65 + "\n", "r.yaml:1:67"),
        ("a: " + "{a: " * 65 + "}" * 65 + "\n", "r.yaml:1:256"),
        ("a: " + "[" * 3000, "r.yaml:1:67"),
    ],
    ids=["lists", "mappings", "never closed"],
)
def test_deep_nesting_is_refused_where_it_is_too_deep(text: str, place: str) -> None:
    assert refusal(text) == f"{place}  nested too deeply to be a recipe"


def test_four_hundred_kilobytes_of_nesting_are_refused_quickly() -> None:
    start = time.perf_counter()
    message = refusal("- " * 200_000)
    assert time.perf_counter() - start < NOT_HANGING
    assert message == "r.yaml:1:129  nested too deeply to be a recipe"


def test_reasonable_nesting_is_read() -> None:
    value: Any = read("a: " + "[" * 60 + "1" + "]" * 60 + "\n").values["a"]
    for _ in range(60):
        (value,) = value
    assert value == 1


@pytest.mark.parametrize("text", ["- ", "[", "? "])
def test_nesting_as_deep_as_the_file_is_long_does_not_kill_the_process(text: str) -> None:
    Path("r.yaml").write_text(text * 200_000)
    code = "from pathlib import Path; from lorakit.recipe import source; source.read(Path('r.yaml'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.returncode  # -11 is a segmentation fault
    assert "LorakitError" in done.stderr


def test_a_file_of_more_than_a_mebibyte_is_refused_with_both_sizes() -> None:
    exactly = "#" * (2**20 - len(MINIMAL) - 1) + "\n" + MINIMAL
    assert list(read(exactly).values) == ["model", "data", "output"]
    assert refusal("#" + exactly) == "r.yaml: 1,048,577 bytes is no recipe (the limit is 1,048,576)"


@pytest.mark.parametrize(
    ("raw", "place", "byte"),
    [
        (b"# caf\xe9\n" + MINIMAL.encode(), "1:6", 5),
        (MINIMAL.encode("utf-16"), "1:1", 0),
        ("# é\n# größe ".encode() + b"\xff\n", "2:9", 15),
        (b"\xef\xbb\xbfa: \xff\n", "1:4", 3),
        (b"a: \xc3", "1:4", 3),
    ],
    ids=["latin-1", "16", "after wide characters", "after a byte-order mark", "cut"],
)
def test_a_file_that_is_not_utf_8_is_refused_with_line_column_and_byte(
    raw: bytes, place: str, byte: int
) -> None:
    assert refusal(raw) == f"r.yaml:{place}  not UTF-8 text (byte {byte})"


@pytest.mark.parametrize(
    ("text", "place", "character"),
    [
        (MINIMAL + "a: \x07\n", "4:4", "\\x07"),
        (MINIMAL + "# größe 😀\x00\n", "4:10", "\\x00"),
        ("\x1b[31m" + MINIMAL, "1:1", "\\x1b"),
    ],
)
def test_a_character_that_yaml_does_not_allow_is_refused_where_it_stands(
    text: str, place: str, character: str
) -> None:
    assert refusal(text) == f"r.yaml:{place}  not YAML: the character '{character}' is not allowed; delete it"


@pytest.mark.parametrize("character", ["\x07", "\udcff"])  # \udcff: a byte of the command line, not UTF-8
def test_a_character_that_yaml_does_not_allow_is_refused_in_set(character: str) -> None:
    message = refusal(MINIMAL, f"output=a{character}")
    cause = f"not YAML: the character {character!a} is not allowed; delete it"
    assert message == f"--set output=a{character}  {cause}"


def test_a_missing_file_is_named() -> None:
    with pytest.raises(
        LorakitError, match=r"^nosuch\.yaml: cannot read this recipe: No such file or directory$"
    ):
        load_recipe("nosuch.yaml")


def test_a_directory_is_no_recipe(here: Path) -> None:
    with pytest.raises(LorakitError, match="cannot read this recipe: Is a directory"):
        load_recipe(here)


@pytest.mark.parametrize(
    ("text", "place"),
    [
        (MINIMAL + "a: \x07\n", "r.yaml:4:4"),
        (MINIMAL + "---\n" + MINIMAL, "r.yaml:4:1"),
        (MINIMAL + "? [a, b]\n: 3\n", "r.yaml:4:3"),
        (MINIMAL + "a: " + "[" * 65 + "]" * 65, "r.yaml:4:"),
        (b"model:\n  path: \xff\n", "r.yaml:2:9"),
    ],
    ids=["control character", "second document", "list as key", "nesting", "not UTF-8"],
)
def test_every_refusal_of_a_file_says_where_in_it(text: str | bytes, place: str) -> None:
    assert refusal(text).startswith(place)


# ------------------------------------------------------------------------------------------------------------
# extends


def test_extends_merges_mappings_and_replaces_everything_else() -> None:
    write(
        base="adapter: {rank: 8, targets: [q, k, v], rank_pattern: {q: 1, k: 2}}\n"
        "optimizer: {lr: 1e-3}\n"
        "seed: x\n"
    )
    values = read(
        "extends: base.yaml\nadapter: {targets: [o], rank_pattern: {k: 3, v: 4}}\nseed: {a: 1}\n"
    ).values
    assert values == {
        "adapter": {"rank": 8, "targets": ("o",), "rank_pattern": {"q": 1, "k": 3, "v": 4}},
        "optimizer": {"lr": 1e-3},
        "seed": {"a": 1},
    }


def test_extends_is_a_chain_in_which_the_nearest_recipe_wins() -> None:
    write(
        grand="a: {x: grand, y: grand, z: grand}\n",
        base="extends: grand.yaml\na: {x: base, y: base}\n",
    )
    assert read("extends: base.yaml\na: {x: mine}\n").values == {
        "a": {"x": "mine", "y": "base", "z": "grand"}
    }


def test_a_value_can_be_replaced_by_null() -> None:
    write(base="data: {eval: e.jsonl}\n")
    assert read("extends: base.yaml\ndata: {eval: null}\n").values == {"data": {"eval": None}}


def test_a_problem_points_into_the_recipe_that_wrote_it() -> None:
    write(base=MINIMAL + "adapter:\n  rank: true\n  alhpa: 3\n")
    lines = refusal("extends: base.yaml\noptimizer: {lr: -1}\n").splitlines()
    assert [line.split("  ")[0] for line in lines] == ["base.yaml:5:3", "base.yaml:6:3", "r.yaml:2:13"]


def test_what_the_recipe_replaces_in_its_base_is_placed_in_the_recipe() -> None:
    write(base=MINIMAL + "adapter: {rank: 8}\n")
    assert refusal("extends: base.yaml\nadapter:\n\n  rank: 0\n").startswith("r.yaml:4:3  adapter.rank:")


def test_paths_are_relative_to_the_recipe_that_names_them(here: Path) -> None:
    (here / "base").mkdir()
    (here / "sub").mkdir()
    (here / "base" / "base.yaml").write_text(
        "model: {path: ./m}\n"
        "data: {train: d.jsonl, eval: e.jsonl, chat_template: t.jinja}\n"
        "adapter: {start_from: old}\n"
        "output: run\n"
    )
    (here / "sub" / "r.yaml").write_text("extends: ../base/base.yaml\ndata: {eval: mine.jsonl}\n")
    recipe = load_recipe("sub/r.yaml")
    found = {
        "m": recipe.model.path,
        "d.jsonl": recipe.data.train,
        "t.jinja": recipe.data.chat_template,
        "old": recipe.adapter.start_from,
    }
    assert all(Path(path).is_absolute() for path in found.values())
    for name, path in found.items():
        assert Path(path).resolve() == (here / "base" / name).resolve()
    assert recipe.data.eval == str(here / "sub" / "mine.jsonl")
    assert recipe.output == "run"  # relative to the current directory, wherever the recipe lies


def test_extends_itself_is_relative_to_the_recipe_that_writes_it(here: Path) -> None:
    (here / "a" / "b").mkdir(parents=True)
    (here / "a" / "top.yaml").write_text("x: 1\n")
    (here / "a" / "b" / "mid.yaml").write_text("extends: ../top.yaml\ny: 2\n")
    assert read("extends: a/b/mid.yaml\n").values == {"x": 1, "y": 2}


@pytest.mark.parametrize("link", ["r.yaml", "./r.yaml", "../{here}/r.yaml"])
def test_a_recipe_that_extends_itself_is_refused_where_it_says_so(link: str, here: Path) -> None:
    link = link.format(here=here.name)
    message = refusal(MINIMAL + f"extends: {link}\n")
    assert message == f"r.yaml:4:1  extends: {link} extends this recipe in a circle"


def test_a_longer_circle_is_refused_at_the_recipe_that_closes_it() -> None:
    write(b="extends: c.yaml\n", c="x: 1\nextends: r.yaml\n")
    assert refusal("extends: b.yaml\n") == "c.yaml:2:1  extends: r.yaml extends this recipe in a circle"


def test_two_recipes_may_share_a_base() -> None:
    write(base="a: 1\n", mid="extends: base.yaml\nb: 2\n")
    assert read("extends: mid.yaml\nc: 3\n").values == {"a": 1, "b": 2, "c": 3}


def test_a_missing_base_is_named() -> None:
    assert refusal("extends: nosuch.yaml\n") == "r.yaml:1:1  extends: no such file: nosuch.yaml"


def test_a_missing_base_is_reported_at_the_line_that_extends_it() -> None:
    write(mid="x: 1\nextends: sub/nosuch.yaml\n")
    assert refusal(MINIMAL + "extends: mid.yaml\n") == "mid.yaml:2:1  extends: no such file: sub/nosuch.yaml"


@pytest.mark.parametrize("value", ["3", "[a.yaml]", "{a: b}", "true"])
def test_extends_must_be_a_path(value: str) -> None:
    assert (
        refusal(MINIMAL + f"extends: {value}\n") == "r.yaml:4:1  extends: expected the path of another recipe"
    )


@pytest.mark.parametrize("value", ['"a\\0b"', "loop.yaml"])
def test_extends_of_a_path_that_cannot_be_is_refused(value: str) -> None:
    os.symlink("loop.yaml", "loop.yaml")
    assert "extends" in refusal(MINIMAL + f"extends: {value}\n")


@pytest.mark.parametrize("path", ["~nosuchuser/m", "a" * 300])
@pytest.mark.parametrize(
    "line", ["model: {{path: {}}}\ndata: {{train: d}}", "model: {{path: m}}\ndata: {{train: {}}}"]
)
def test_a_path_that_cannot_be_is_no_traceback(path: str, line: str) -> None:
    Path("r.yaml").write_text(line.format(path) + "\noutput: o\n")
    try:
        load_recipe("r.yaml")
    except LorakitError as error:
        assert "r.yaml:" in str(error)


# ------------------------------------------------------------------------------------------------------------
# --set


def overridden(*overrides: str, more: str = "") -> Recipe:
    Path("r.yaml").write_text(MINIMAL + more)
    return load_recipe("r.yaml", overrides)


FIELDS: list[tuple[str, Callable[[Recipe], Any], Any]] = [
    ("optimizer.lr=1e-4", lambda r: r.optimizer.lr, 1e-4),
    ("adapter.rank=4", lambda r: r.adapter.rank, 4),
    (" adapter.rank = 4 ", lambda r: r.adapter.rank, 4),
    ("adapter.targets=[q, k]", lambda r: r.adapter.targets, ("q", "k")),
    ("adapter.targets=mlp", lambda r: r.adapter.targets, "mlp"),
    ("adapter.rank_pattern={q: 2}", lambda r: r.adapter.rank_pattern, {"q": 2}),
    ("adapter.rank_pattern.q=2", lambda r: r.adapter.rank_pattern, {"q": 2}),
    ("adapter={rank: 4}", lambda r: (r.adapter.rank, r.adapter.targets), (4, "all-linear")),
    ("optimizer.max_grad_norm=null", lambda r: r.optimizer.max_grad_norm, None),
    ("optimizer.max_grad_norm=", lambda r: r.optimizer.max_grad_norm, None),
    ("output=a=b", lambda r: r.output, "a=b"),
    ('output="12"', lambda r: r.output, "12"),
    ("data.columns.prompt=question", lambda r: r.data.columns, {"prompt": "question"}),
]


@pytest.mark.parametrize(("override", "field", "value"), FIELDS, ids=[item[0] for item in FIELDS])
def test_set_replaces_a_field_as_if_the_file_said_so(
    override: str, field: Callable[[Recipe], Any], value: Any
) -> None:
    assert field(overridden(override, more="adapter: {targets: [v]}\n")) == value


def test_the_last_set_of_a_field_wins() -> None:
    assert overridden("adapter.rank=4", "adapter.rank=5").adapter.rank == 5


def test_set_is_applied_after_extends() -> None:
    write(base="adapter: {rank: 8}\n")
    assert overridden("adapter.rank=4", more="extends: base.yaml\n").adapter.rank == 4


@pytest.mark.parametrize("bad", ["a", "", "=1", "=", "a..b=1", ".a=1", "a.=1"])
def test_set_of_a_bad_form_is_refused_with_an_example(bad: str) -> None:
    assert refusal(MINIMAL, bad) == f"--set {bad}: expected KEY=VALUE, for example --set optimizer.lr=1e-4"


@pytest.mark.parametrize(
    ("override", "field", "told"),
    [
        ("adapter.rank=true", "adapter.rank", "got true"),
        ("adapter.rank='8'", "adapter.rank", "delete the quotes"),
        ("adapter.rnk=8", "adapter.rnk", 'Did you mean "rank"?'),
        ("adapter={rank: 8, rnk: 9}", "adapter.rnk", 'Did you mean "rank"?'),
        ("nosuch=1", "nosuch", "not a section"),
        ("model.double_quant=true", "model.double_quant", "has no effect"),
        ("adapter.rank_pattern={a: 1, a: 2}", "adapter.rank_pattern.a", "written twice"),
    ],
)
def test_the_place_of_what_was_set_is_the_option_itself(override: str, field: str, told: str) -> None:
    message = refusal(MINIMAL, override)
    assert message.startswith(f"--set {override}  {field}: ")
    assert told in message


@pytest.mark.parametrize("text", ["[1", "*a", '"\\q"', "{a: b: c}"])
def test_set_of_what_is_no_yaml_is_refused(text: str) -> None:
    assert refusal(MINIMAL, f"adapter.rank={text}").startswith(f"--set adapter.rank={text}  not YAML: ")


def test_set_cannot_reach_into_a_list() -> None:
    message = refusal(MINIMAL + "adapter: {targets: [q, k]}\n", "adapter.targets.1=3")
    assert message == (
        "--set adapter.targets.1=3: adapter.targets holds no fields; give all of it:"
        " --set adapter.targets=[a, b]"
    )


def test_the_form_that_is_suggested_for_a_list_works() -> None:
    message = refusal(MINIMAL + "adapter: {targets: [q, k]}\n", "adapter.targets.1=3")
    suggested = message.split("give all of it: --set ")[1]
    assert overridden(suggested, more="adapter: {targets: [q, k]}\n").adapter.targets == ("a", "b")


@pytest.mark.parametrize("override", ["nosuch.x=1", "adapter.x.y=1"])
def test_a_section_that_only_set_names_is_placed_at_the_option(override: str) -> None:
    assert refusal(MINIMAL + "adapter: {rank: 8}\n", override).startswith(f"--set {override}  ")


def test_a_path_of_set_is_relative_to_the_current_directory(here: Path) -> None:
    (here / "sub").mkdir()
    (here / "sub" / "r.yaml").write_text(
        "model: {path: ./m}\ndata: {train: d.jsonl, eval: e.jsonl}\noutput: o\n"
    )
    recipe = load_recipe("sub/r.yaml", ["data.train=x.jsonl", "model={path: ./n}"])
    assert recipe.data.train == str(here / "x.jsonl")
    assert recipe.model.path == str(here / "n")
    assert recipe.data.eval == str(here / "sub" / "e.jsonl")


@pytest.mark.parametrize("name", ["läufe/größe", "実行 😀", "run: #1", "12", "null", "a\\b"])
def test_the_output_option_takes_any_name_as_it_is(name: str) -> None:
    Path("r.yaml").write_text("model: {path: o/m}\ndata: {train: o/d}\noutput: o\n")
    assert load(Path("r.yaml"), None, Path(name)).output == name


def test_problems_of_the_file_and_of_set_come_out_together() -> None:
    Path("r.yaml").write_text(MINIMAL + "adapter: {rank: 0}\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml", ["optimizer.lr=-1"])
    assert [(p.where, p.field) for p in caught.value.problems] == [
        ("--set optimizer.lr=-1", "optimizer.lr"),
        ("r.yaml:4:11", "adapter.rank"),
    ]
