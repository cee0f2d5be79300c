"""Where rows come from: files, directories, globs, several sources with weights, a share that is held out."""

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.data import Loaded, account_lines, check_ends, load, load_parts
from lorakit.data.batches import drawn, order, samples_of, steps_per_epoch
from lorakit.data.tokens import Part
from lorakit.errors import LorakitError, RecipeError
from lorakit.recipe import load_recipe
from lorakit.recipe.data import Data, Source, files_of, sources


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pairs(name: str, *numbers: int) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": f"{n} ", "completion": str(n)}) for n in numbers]
    Path(name).write_text("\n".join(lines) + "\n")


def recipe(tiny: Path, data: str, more: str = "") -> Any:
    Path("r.yaml").write_text(f"model: {{path: {tiny / 'model'}}}\ndata: {data}\noutput: out\n{more}")
    return load_recipe("r.yaml")


def parts(tiny: Path, tokenizer: Any, data: str) -> tuple[Loaded, Loaded | None]:
    return load_parts(recipe(tiny, data), tokenizer)


def places(found: Loaded) -> list[str]:
    return list(found.tokens.places)


# ------------------------------------------------------------------------------------------------------------
# Files


def test_a_directory_is_all_data_files_below_it_in_the_order_of_their_names(
    tiny: Path, tokenizer: Any
) -> None:
    pairs("d/b.jsonl", 1)
    pairs("d/a/z.jsonl", 2, 3)
    pairs("d/.hidden/x.jsonl", 4)
    pairs("d/.x.jsonl", 4)
    Path("d/README.md").write_text("no rows")
    Path("d/dataset_info.json").write_text("{}")
    Path("d/c.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "5", "completion": "6"}'))
    Path("d/again").symlink_to(Path("d").absolute())
    Path("d/link.jsonl").symlink_to(Path("d/b.jsonl").absolute())
    assert [str(file) for file in files_of("d")] == ["d/a/z.jsonl", "d/b.jsonl", "d/c.jsonl.gz"]
    found, _ = parts(tiny, tokenizer, "{train: d}")
    assert places(found) == ["d/a/z.jsonl:1", "d/a/z.jsonl:2", "d/b.jsonl:1", "d/c.jsonl.gz:1"]


def test_a_directory_of_several_kinds_is_refused_with_the_glob_of_one(tiny: Path, cli: Any) -> None:
    """A licence beside the rows would be trained as text."""
    pairs("d/a.jsonl", 1)
    Path("d/LICENSE.txt").write_text("Apache")
    recipe(tiny, "{train: d}")
    code, out, _ = cli("validate", "r.yaml")
    assert code == 2
    assert ".jsonl and .txt files in this directory: name those you mean: " in out
    assert "/d/**/*.jsonl" in out
    recipe(tiny, "{train: 'd/**/*.jsonl'}")
    assert cli("validate", "r.yaml")[0] == 0


def test_a_split_may_stand_in_the_name_of_a_hub_data_set() -> None:
    plain, mapped = sources(("o/n:test", Source(path="o/n:test[:5%]", config="c")), None)
    assert (plain.path, plain.split) == ("o/n", "test")
    assert (mapped.path, mapped.split, mapped.config) == ("o/n", "test[:5%]", "c")


def test_a_glob_is_the_data_files_it_matches(tiny: Path, tokenizer: Any) -> None:
    pairs("d/2.jsonl", 2)
    pairs("d/1.jsonl", 1)
    pairs("d/sub/3.jsonl", 3)
    Path("d/1.txt~").write_text("")
    assert places(parts(tiny, tokenizer, "{train: 'd/*.jsonl'}")[0]) == ["d/1.jsonl:1", "d/2.jsonl:1"]
    assert len(places(parts(tiny, tokenizer, "{train: 'd/**/*.jsonl'}")[0])) == 3
    assert places(parts(tiny, tokenizer, "{train: 'd/[1]*'}")[0]) == ["d/1.jsonl:1"]


def test_a_directory_with_the_characters_of_a_glob_in_its_name_is_a_directory(
    tiny: Path, tokenizer: Any
) -> None:
    pairs("d[1]/a.jsonl", 1)
    assert places(parts(tiny, tokenizer, "{train: 'd[1]'}")[0]) == ["d[1]/a.jsonl:1"]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("empty", "no data file in this directory: {here}/empty (.jsonl, "),
        ("gone.jsonl", "no such file: {here}/gone.jsonl"),
        ("'*.csv'", "no data file matches {here}/*.csv"),
        ("'*.md'", "no data file matches {here}/*.md (notes.md is none: .jsonl, "),
        ("notes.md", "not a data file lorakit reads: {here}/notes.md (.jsonl, "),
        ("[a.jsonl, gone.csv]", "no such file: {here}/gone.csv"),
        ("{path: gone.csv, limit: 3}", "no such file: {here}/gone.csv"),
        ("x.parquet.gz", "not a data file lorakit reads"),
    ],
)
def test_validate_names_what_is_not_there(tiny: Path, here: Path, train: str, words: str, cli: Any) -> None:
    (here / "empty").mkdir()
    for name in ("notes.md", "x.parquet.gz"):
        Path(name).write_text("")
    pairs("a.jsonl", 1)
    recipe(tiny, f"{{train: {train}}}")
    code, out, _ = cli("validate", "r.yaml")
    assert code == 2
    assert "r.yaml:2:8  data.train: " in out
    assert words.format(here=here) in out


def test_columns_without_a_header_are_named_by_the_recipe(tiny: Path, tokenizer: Any) -> None:
    Path("d.CSV").write_text('one,"a, b",3\ntwo,c,4.5\n')
    found, _ = parts(tiny, tokenizer, "{train: d.CSV, header: [sentence1, sentence2, score]}")
    assert (found.format, places(found)) == ("sentence-pair", ["d.CSV:1", "d.CSV:2"])


def test_a_compressed_file_is_read_like_the_plain_one(tiny: Path, tokenizer: Any) -> None:
    pairs("a.jsonl", 1, 2, 3)
    Path("b.jsonl.gz").write_bytes(gzip.compress(Path("a.jsonl").read_bytes()))
    plain, packed = (parts(tiny, tokenizer, f"{{train: {name}}}")[0] for name in ("a.jsonl", "b.jsonl.gz"))
    assert plain.tokens.fingerprint() == packed.tokens.fingerprint()
    assert places(packed) == ["b.jsonl.gz:1", "b.jsonl.gz:2", "b.jsonl.gz:3"]


# ------------------------------------------------------------------------------------------------------------
# Several sources


def test_sources_follow_each_other_each_with_its_own_limit(tiny: Path, tokenizer: Any) -> None:
    pairs("a.jsonl", 1, 2, 3)
    pairs("b.jsonl", 4, 5, 6)
    data = "{train: [a.jsonl, {path: b.jsonl, limit: 1}], limit: 2}"
    assert places(parts(tiny, tokenizer, data)[0]) == ["a.jsonl:1", "a.jsonl:2", "b.jsonl:1"]


def test_each_source_has_the_format_of_its_own_rows(tiny: Path, tokenizer: Any) -> None:
    pairs("a.jsonl", 1)
    Path("b.txt").write_text("12\n")
    found, _ = parts(tiny, tokenizer, "{train: [a.jsonl, b.txt]}")
    assert (found.format, found.why) == ("auto", "a.jsonl: prompt-completion; b.txt: text")
    weights = [found.tokens.sample(i)[1].tolist() for i in range(2)]
    assert weights == [[0, 0, 0, 1, 1], [0, 1, 1, 1]]


def test_a_mixed_run_trains_and_its_resolved_recipe_is_a_recipe(tiny: Path, cli: Any, here: Path) -> None:
    pairs("a.jsonl", *range(5))
    Path("b.txt").write_text("12\n34\n")
    recipe(
        tiny, "{train: [a.jsonl, {path: b.txt, weight: 0.5}]}", "training: {max_steps: 2, batch_size: 2}\n"
    )
    code, _, err = cli("train", "r.yaml")
    assert code == 0, err
    resolved = load_recipe(here / "out" / "resolved.yaml")
    assert resolved.data.format == "auto"
    assert json.loads((here / "out" / "run.json").read_text())["account"]["train"]["kept"] == 7


@pytest.mark.parametrize("weight", [0.25, 0.3, 1.0, 1.5, 2.0, 3.7])
def test_a_weight_is_how_often_a_row_is_seen_in_an_epoch(weight: float) -> None:
    """Over many epochs every row as often as every other, but for one; and never twice before all once."""
    part = Part(10, 30, weight)
    seen = np.zeros(20, int)
    for epoch in range(40):
        found = drawn(part, 3, seed=1, epoch=epoch)
        assert len(found) == part.num_draws == round(20 * weight)
        assert found.min() >= 10 and found.max() < 30
        np.add.at(seen, found - 10, 1)
        assert seen.max() - seen.min() <= 1
    assert seen.sum() == 40 * round(20 * weight)


def test_an_epoch_mixes_the_parts_and_its_steps_are_the_whole_of_it() -> None:
    parts = (Part(0, 8), Part(8, 12, 2.0), Part(12, 20, 0.5))
    number = steps_per_epoch(parts, 5)
    assert number == 4  # 8 + 8 + 4 samples
    for epoch in range(3):
        steps = [samples_of(epoch * number + place, parts, 5, seed=7) for place in range(number)]
        together = np.concatenate(steps)
        assert together.tolist() == order(parts, 7, epoch).tolist()
        counts = np.bincount(together, minlength=20)
        assert counts[:8].tolist() == [1] * 8
        assert counts[8:12].tolist() == [2] * 4
        assert counts[12:].sum() == 4 and counts[12:].max() == 1
        assert together.tolist() != sorted(together.tolist())


def test_a_weight_changes_the_fingerprint_and_the_steps(tiny: Path, tokenizer: Any) -> None:
    pairs("a.jsonl", 1, 2)
    plain, weighed = (
        parts(tiny, tokenizer, f"{{train: {{path: a.jsonl, weight: {weight}}}}}")[0].tokens
        for weight in ("1.0", "2.0")
    )
    assert (plain.num_draws, weighed.num_draws) == (2, 4)
    assert plain.fingerprint() != weighed.fingerprint()


# ------------------------------------------------------------------------------------------------------------
# A share that is held out


def test_a_share_is_held_out_by_the_seed(tiny: Path, tokenizer: Any) -> None:
    pairs("a.jsonl", *range(100))

    def split(seed: int) -> tuple[list[str], list[str]]:
        found = recipe(tiny, "{train: a.jsonl, eval: 0.2}", f"training: {{seed: {seed}}}\n")
        rows, held_out = load_parts(found, tokenizer)
        assert held_out
        return places(rows), places(held_out)

    train, held_out = split(0)
    assert (len(train), len(held_out)) == (80, 20)
    assert sorted(train + held_out) == sorted(f"a.jsonl:{n}" for n in range(1, 101))
    assert split(0) == (train, held_out)
    assert split(1) != (train, held_out)


def test_equal_rows_are_never_on_both_sides(tiny: Path, tokenizer: Any) -> None:
    pairs("a.jsonl", *[n % 10 for n in range(100)])
    rows, held_out = parts(tiny, tokenizer, "{train: a.jsonl, eval: 0.3}")
    assert held_out and len(held_out.tokens) == 30
    assert held_out.account.also_in_train == 0
    assert (rows.account.duplicates, held_out.account.duplicates) == (63, 27)


def test_a_large_group_of_equal_rows_is_not_held_out_for_a_small_share(tiny: Path, tokenizer: Any) -> None:
    pairs("a.jsonl", *[0] * 60, *range(1, 41))
    for seed in range(20):
        found = recipe(tiny, "{train: a.jsonl, eval: 0.1}", f"training: {{seed: {seed}}}\n")
        _, held_out = load_parts(found, tokenizer)
        assert held_out and len(held_out.tokens) == 10
    pairs("a.jsonl", *[0] * 60, *[1] * 40)
    _, held_out = parts(tiny, tokenizer, "{train: a.jsonl, eval: 0.1}")
    assert held_out and len(held_out.tokens) == 40  # the smallest there is


def test_each_row_is_in_the_account_of_its_side(tiny: Path, tokenizer: Any) -> None:
    pairs("a.jsonl", *range(20))
    with Path("a.jsonl").open("a") as file:
        file.write("{\n" + json.dumps({"prompt": "1", "completion": "2" * 90}) + "\n")
    data = "{train: a.jsonl, eval: 0.5, on_bad_row: skip, max_length: 20, on_long: truncate}"
    rows, held_out = parts(tiny, tokenizer, data)
    assert held_out
    mine, theirs = rows.account.rows(), held_out.account.rows()
    assert {name: mine[name] + theirs[name] for name in mine} == {
        "read": 22,
        "kept": 20,
        "truncated": 1,
        "dropped": 0,
        "masked_out": 0,
        "bad": 1,
    }
    for account in (mine, theirs):
        assert sum(account.values()) == 2 * account["read"]
    assert mine["bad"] == 1


def test_one_sample_cannot_be_shared_out(tiny: Path, tokenizer: Any) -> None:
    pairs("a.jsonl", 1, 1, 1)
    with pytest.raises(LorakitError, match=r"data\.eval: 0\.5 of 3 samples cannot be held out"):
        parts(tiny, tokenizer, "{train: a.jsonl, eval: 0.5}")


def test_a_run_with_a_share_is_evaluated_and_scored_on_the_same_rows(tiny: Path, cli: Any) -> None:
    pairs("a.jsonl", *range(40))
    recipe(tiny, "{train: a.jsonl, eval: 0.25}", "training: {max_steps: 2, batch_size: 4}\n")
    code, _, err = cli("train", "r.yaml")
    assert code == 0, err
    code, out, err = cli("eval", "out", "--exact-match", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert (found["rows"], found["prompts"]) == (10, 10)
    assert "other rows" not in err
    code, _, err = cli("eval", "out", "--set", "data.limit=20")
    assert code == 2
    assert "--set data.limit=20: the held-out rows are a share of the training rows" in err
    pairs("more/b.jsonl", *range(50, 60))
    code, out, err = cli("eval", "out", "--data", "more", "--json")
    assert (code, json.loads(out)["rows"]) == (0, 10), err
    losses = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    last = [line["eval_loss"] for line in losses if "eval_loss" in line][-1]
    assert found["adapter"]["loss"] == pytest.approx(last, abs=1e-5)


# ------------------------------------------------------------------------------------------------------------
# The account


PLANTED = [
    {"id": 1, "prompt": "12 ", "completion": "34"},
    {"id": 2, "prompt": "12 ", "completion": "34"},  # a duplicate
    {"id": 1, "prompt": "56 ", "completion": "78"},  # an id again
    {"id": 4, "prompt": "9 ", "completion": "9" * 40},  # too long
    {"id": 5, "prompt": "9" * 40, "completion": "1"},  # nothing left to train on
    {"id": 6, "prompt": "1"},  # bad
    [7],  # bad
    {"id": 8, "prompt": "also ", "completion": "held out"},
]


def test_one_planted_row_of_each_kind_is_counted_and_told(tiny: Path, tokenizer: Any) -> None:
    Path("a.jsonl").write_text("\n".join(map(json.dumps, PLANTED)) + "\n")
    Path("e.jsonl").write_text(json.dumps(PLANTED[7]) + "\n" + json.dumps({"prompt": "x", "completion": "y"}))
    data = "{train: a.jsonl, eval: e.jsonl, max_length: 30, on_long: truncate, on_bad_row: skip}"
    rows, held_out = parts(tiny, tokenizer, data)
    assert held_out
    account = rows.account
    assert account.rows() == {
        "read": 8,
        "kept": 4,
        "truncated": 1,
        "dropped": 0,
        "masked_out": 1,
        "bad": 2,
    }
    assert (account.duplicates, account.repeated_ids, held_out.account.also_in_train) == (1, 1, 1)
    assert account.first["duplicates"] == "a.jsonl:2 repeats a.jsonl:1"
    assert account.first["repeated_ids"] == "a.jsonl:3 repeats a.jsonl:1"
    assert held_out.account.first["also_in_train"] == "e.jsonl:1 is a.jsonl:8"
    samples = [rows.tokens.sample(i) for i in range(len(rows.tokens))]
    assert account.tokens == sum(len(ids) for ids, _ in samples)
    assert account.trained_tokens == sum(int(weights.sum()) for _, weights in samples)
    assert account.trained_ends == 4  # the cut one has none
    assert sum(account.lengths.values()) == 5
    text = "\n".join(account_lines(rows, held_out))
    for words in (
        "first truncated: a.jsonl:4: ",
        "first masked out: a.jsonl:5: nothing left to train on",
        'first bad: a.jsonl:6: no field "completion"',
        "first duplicates: a.jsonl:2 repeats a.jsonl:1",
        "first also in training: e.jsonl:1 is a.jsonl:8",
        "data.on_bad_row: skip left them out",
        "data.on_long: truncate cut them",
        "the longest is a.jsonl:4 (30 tokens)",
    ):
        assert words in text


def test_lengths_are_counted_under_powers_of_two(tiny: Path, tokenizer: Any) -> None:
    Path("a.txt").write_text("".join("1" * n + "\n" for n in (2, 3, 6, 7, 14)))  # and two tokens each
    found = load(str(Path("a.txt").absolute()), Data(train="/"), tokenizer, "auto")
    assert found.tokens.lengths.tolist() == [4, 5, 8, 9, 16]
    assert found.account.lengths == {4: 1, 8: 2, 16: 2}


def test_samples_that_are_all_cut_would_never_teach_to_stop(tiny: Path, tokenizer: Any, cli: Any) -> None:
    pairs("a.jsonl", 123456, 123457)
    data = "{train: a.jsonl, max_length: 10, on_long: truncate}"
    rows, _ = parts(tiny, tokenizer, data)  # to look at, it may be loaded
    with pytest.raises(LorakitError) as caught:
        check_ends(rows, recipe(tiny, data).data)
    assert "a.jsonl: no end token is trained in any sample: 2 of 2 samples are cut" in caught.value.message
    assert "Write a data.max_length above 10." in caught.value.hint
    code, _, err = cli("train", "r.yaml")
    assert (code, "no end token is trained" in err) == (2, True)


def test_a_stream_without_an_end_is_refused_by_the_recipe(tiny: Path) -> None:
    with pytest.raises(RecipeError, match=r"data\.streaming: the end of a stream is not known"):
        recipe(tiny, "{train: a.jsonl, streaming: true}")


# ------------------------------------------------------------------------------------------------------------
# What no row is to blame for


def test_a_misspelt_file_is_a_file_and_no_hub_data_set(tiny: Path, cli: Any, here: Path) -> None:
    pairs("d/a.jsonl", 1)
    recipe(tiny, "{train: d/a.jsnol}")
    code, out, _ = cli("validate", "r.yaml")
    assert code == 2
    assert f"no such file: {here}/d/a.jsnol" in out


def test_a_template_that_is_not_there_is_found_by_validate(tiny: Path, cli: Any, here: Path) -> None:
    pairs("a.jsonl", 1)
    recipe(tiny, "{train: a.jsonl, chat_template: gone.jinja}")
    code, out, _ = cli("validate", "r.yaml")
    assert code == 2
    assert f"r.yaml:2:24  data.chat_template: no such file: {here}/gone.jinja" in out


def test_a_template_that_is_no_jinja_is_told_with_its_line_and_not_row_by_row(tiny: Path, cli: Any) -> None:
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    Path("a.jsonl").write_text((json.dumps({"messages": turns}) + "\n") * 5)
    Path("t.jinja").write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}")
    recipe(tiny, "{train: a.jsonl, chat_template: t.jinja}")
    code, _, err = cli("preview", "r.yaml")
    assert code == 2
    assert "t.jinja: line 2: unexpected '}'" in err
    assert "a.jsonl" not in err


def test_a_stream_may_not_be_longer_than_positions_that_are_learned(tiny: Path, cli: Any, here: Path) -> None:
    """Whatever its first rows are: a later one may be as long as data.max_length."""
    import shutil

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = here / "gpt2"
    GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=400, n_positions=64, eos_token_id=2)
    ).save_pretrained(model)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / "model" / name, model / name)
    pairs("a.jsonl", *range(30))
    text = "{train: a.jsonl, streaming: true, max_length: 128}"
    Path("r.yaml").write_text(
        f"model: {{path: {model}}}\ndata: {text}\noutput: out\ntraining: {{max_steps: 1}}\n"
    )
    code, _, err = cli("train", "r.yaml")
    assert code == 2
    assert "data.max_length: 128 tokens, the model was made for 64 at most" in err
