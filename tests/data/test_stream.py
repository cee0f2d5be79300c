"""A stream: the samples of a step are a function of seed and step alone, however one came there."""

import copy
import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from accelerate import Accelerator

from lorakit.data import load_parts, stream
from lorakit.data.batches import StreamBatches
from lorakit.data.reading import Reading
from lorakit.data.rows import Chunk
from lorakit.data.stream import Endless, Stream
from lorakit.data.tokenize import Setting
from lorakit.errors import LorakitError
from lorakit.recipe import load_recipe
from lorakit.recipe.data import Data, Source
from tests.conftest import metrics

NUMBER = 250  # rows of a pass


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stream, "BLOCK", 64)
    monkeypatch.setattr(stream, "num_cores", lambda: 1)
    pairs("d.jsonl", range(NUMBER))
    return tmp_path


def pairs(name: str, numbers: Any, bad: tuple[int, ...] = ()) -> None:
    lines = [json.dumps({"prompt": f"{n} ", "completion": str(n)}) for n in numbers]
    for number in bad:
        lines[number - 1] = "{"
    Path(name).write_text("\n".join(lines) + "\n")


def opened(tokenizer: Any, *sources: Source, seed: int = 0, **fields: Any) -> Stream:
    found = sources or (Source(path=str(Path("d.jsonl").absolute())),)
    section = Data(train=found, streaming=True, **fields)
    return Stream(Reading(found, Setting(tokenizer, section, "auto")), seed)


def rows(data: Any) -> list[str]:
    return list(data.places)


def test_blocks_hold_the_rows_in_their_order_each_shuffled_and_the_source_begins_again(
    tokenizer: Any,
) -> None:
    found = opened(tokenizer)
    blocks = [rows(found.block(number)) for number in range(8)]  # two passes and a bit
    endless = [f"d.jsonl:{n % NUMBER + 1}" for n in range(8 * 64)]
    for number, block in enumerate(blocks):
        assert sorted(block) == sorted(endless[64 * number : 64 * (number + 1)])
        assert block != endless[64 * number : 64 * (number + 1)]


def test_steps_take_the_samples_one_after_another(tokenizer: Any) -> None:
    one, other = opened(tokenizer), opened(tokenizer)
    together = [place for number in range(5) for place in rows(one.block(number))]
    steps = [rows(other.samples_at(start, 23)) for start in range(0, 23 * 13, 23)]
    assert [place for step in steps for place in step] == together[: 23 * 13]
    wide = opened(tokenizer).samples_at(10, 200)  # over four blocks
    assert rows(wide) == together[10:210]
    ids = [tokenizer.decode(wide.sample(i)[0]) for i in range(200)]
    assert ids == [f"<s>{n} {n}</s>" for n in (int(p.split(":")[1]) - 1 for p in together[10:210])]


@pytest.mark.parametrize("start", [0, 64, 100, 333, 1000])
def test_any_place_can_be_asked_for_first(tokenizer: Any, start: int) -> None:
    walked = opened(tokenizer)
    for before in range(0, start, 50):
        walked.samples_at(before, 50)
    assert rows(walked.samples_at(start, 30)) == rows(opened(tokenizer).samples_at(start, 30))


def test_the_seed_decides_the_order(tokenizer: Any) -> None:
    first, again, other = (rows(opened(tokenizer, seed=seed).block(0)) for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)


def test_workers_make_no_difference(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = rows(opened(tokenizer).samples_at(0, 300))
    monkeypatch.setattr(stream, "num_cores", lambda: 3)
    assert rows(opened(tokenizer).samples_at(0, 300)) == alone


def test_sources_are_mixed_by_their_weights(tokenizer: Any) -> None:
    pairs("e.jsonl", range(10))
    paths = [str(Path(name).absolute()) for name in ("d.jsonl", "e.jsonl")]
    found = opened(tokenizer, Source(path=paths[0], weight=3.0), Source(path=paths[1], weight=1.0))
    counts = Counter(place.split(":")[0] for n in range(5) for place in rows(found.block(n)))
    assert counts == {"d.jsonl": 240, "e.jsonl": 80}
    assert set(Counter(p for n in range(5) for p in rows(found.block(n)) if p[0] == "e").values()) == {8}
    assert rows(found.block(3)) == rows(
        opened(tokenizer, *found.reading.sources).block(3)
    )  # sought, not walked to


@pytest.mark.parametrize("limit", [None, 1, 100, 249])
@pytest.mark.parametrize("position", [0, 1, 63, 249, 250, 251, 700])
def test_seeking_is_taking_and_forgetting(limit: int | None, position: int) -> None:
    source = Source(path=str(Path("d.jsonl").absolute()), limit=limit)
    section = Data(train=source, streaming=True)

    def taken(endless: Endless) -> list[int]:
        return [number for chunk in endless.take(300) for number in chunk.numbers]

    sought, walked = Endless(source, section), Endless(source, section)
    sought.seek(position)
    _ = list(walked.take(position))
    expected = [n % (limit or NUMBER) + 1 for n in range(position, position + 300)]
    assert taken(sought) == taken(walked) == expected
    assert sought.position == walked.position == position + 300
    assert sought.rounds == walked.rounds == (position + 299) // (limit or NUMBER)
    sought.seek(position)  # the length of a pass is known now
    assert taken(sought) == expected
    assert sought.rounds == (position + 299) // (limit or NUMBER)


def numbers_of(chunks: Any) -> list[int]:
    return [number for chunk in chunks for number in chunk.numbers]


@pytest.mark.parametrize("limit", [None, 260])
@pytest.mark.parametrize("position", [1, 120, 299, 300, 301, 820])
def test_rows_on_the_way_in_a_parquet_file_are_not_read(
    position: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = pa.table({"prompt": [f"{n}" for n in range(300)], "completion": ["x"] * 300})
    pyarrow.parquet.write_table(table, "p.parquet", row_group_size=50)
    source = Source(path=str(Path("p.parquet").absolute()), limit=limit)
    sought, length = Endless(source, Data(train=source, streaming=True)), limit or 300
    for known in (False, True):  # the length of a pass
        given: list[int] = []
        read_all, read_rest = stream.chunks_of, stream.read_chunks

        def counted(read: Any, given: list[int] = given) -> Any:
            def chunks(*arguments: Any, **options: Any) -> Iterator[Chunk]:
                for chunk in read(*arguments, **options):
                    given.append(len(chunk))
                    yield chunk

            return chunks

        with monkeypatch.context() as patch:
            patch.setattr(stream, "chunks_of", counted(read_all))
            patch.setattr(stream, "read_chunks", counted(read_rest))
            sought.seek(position)
            assert numbers_of(sought.take(20)) == [n % length + 1 for n in range(position, position + 20)]
        if known or position < length:
            before, after = 300 - position % length, 300 if position % length + 20 > length else 0
            assert sum(given) <= before + after
        _ = list(sought.take(300))  # over the end: its length is known from here on


@pytest.mark.parametrize("position", [1, 7, 29, 30, 31, 65])
def test_a_hub_data_set_is_asked_for_what_follows(position: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def chunks(name: str, config: Any, split: str, revision: Any, streaming: bool, skip: int = 0) -> Any:
        assert (name, config, split, revision, streaming) == ("o/n", "small", "test", "main", True)
        asked.append(skip)
        for first in range(skip, 30, 8):
            numbers = range(first + 1, min(first + 8, 30) + 1)
            yield Chunk(name, "", numbers, [{"text": str(n)} for n in numbers])

    monkeypatch.setattr(stream, "hub_chunks", chunks)
    monkeypatch.setattr("lorakit.data.reading.hub_chunks", chunks)
    source = Source(path="o/n", config="small", split="test", revision="main")
    sought = Endless(source, Data(train=source, streaming=True))
    sought.seek(position)
    assert asked[0] == position
    assert numbers_of(sought.take(70)) == [n % 30 + 1 for n in range(position, position + 70)]
    asked.clear()
    sought.seek(position)
    assert numbers_of(sought.take(9)) == [n % 30 + 1 for n in range(position, position + 9)]
    assert asked[0] == position % 30


@pytest.mark.parametrize("weights", [[0.1] * 10, [0.3, 0.3, 0.3, 1e-9], [1 / 3] * 7, [5.0]])
def test_every_block_has_all_of_its_rows_whatever_the_weights(tokenizer: Any, weights: list[float]) -> None:
    path = str(Path("d.jsonl").absolute())
    found = opened(tokenizer, *(Source(path=path, weight=weight) for weight in weights))
    stream.BLOCK = 8192  # given back by the fixture
    ends = [0] * len(weights)
    for block in range(5000):
        shares = found._shares(block)
        assert [before for before, _ in shares] == ends
        ends = [after for _, after in shares]
        assert sum(ends) == 8192 * (block + 1)


def test_a_step_asks_for_its_own_blocks_only(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opened(tokenizer)
    found.samples_at(64 * 40, 1)
    asked: list[int] = []
    real = Stream.num_samples
    monkeypatch.setattr(Stream, "num_samples", lambda self, n: asked.append(n) or real(self, n))
    for start in (64 * 40, 64 * 40 + 63, 64 * 41 - 30, 64 * 39 + 1):
        found.samples_at(start, 20)
    assert asked == [40, 40, 41, 40, 39]


# ------------------------------------------------------------------------------------------------------------
# A source shorter than a block


def test_a_source_that_begins_again_is_measured_once(tokenizer: Any) -> None:
    pairs("e.jsonl", range(20, 30), bad=(4,))
    paths = [str(Path(name).absolute()) for name in ("d.jsonl", "e.jsonl")]
    found = opened(tokenizer, *(Source(path=path) for path in paths), on_bad_row="skip")
    data, counts = found.first_pass()
    wanted = [f"d.jsonl:{n}" for n in range(1, 33)] + [f"e.jsonl:{n}" for n in (1, 2, 3, *range(5, 11))]
    assert rows(data) == wanted  # in the order of the files
    assert counts == {"read": 42, "kept": 41, "truncated": 0, "dropped": 0, "masked_out": 0, "bad": 1}
    assert found.rows()["read"] == 64 and found.rows()["bad"] == 3  # 32 rows of ten
    assert found.rounds() == [0, 3]
    assert found.lines() == [
        "e.jsonl is read again where it ends: 3 times in the first 64 rows of the stream"
    ]
    for number in range(1, 10):
        found.block(number)
    assert found.rounds() == [1, 31]
    assert rows(found.first_pass()[0]) == wanted


def test_a_file_that_is_named_twice_or_holds_a_row_twice_is_measured_as_it_is(tokenizer: Any) -> None:
    pairs("e.jsonl", [1, 2, 1])
    path = str(Path("e.jsonl").absolute())
    data, _ = opened(tokenizer, Source(path=path), Source(path=path)).first_pass()
    assert rows(data) == ["e.jsonl:1", "e.jsonl:2", "e.jsonl:3"] * 2
    assert len(set(data.column("hash").tolist())) == 2


# ------------------------------------------------------------------------------------------------------------
# The journal


def test_a_journal_saves_the_counting_and_changes_nothing(tokenizer: Any, monkeypatch) -> None:
    pairs("d.jsonl", range(NUMBER), bad=(3, 70, 71, 200))
    first = opened(tokenizer, on_bad_row="skip")
    first.keep_journal(Path("stream.jsonl"))
    expected = rows(first.samples_at(300, 40))
    noted = [json.loads(line) for line in Path("stream.jsonl").read_text().splitlines()]
    assert [note["samples"] for note in noted[:4]] == [63, 62, 64, 62]  # row 3 comes again
    assert first.rows()["bad"] == sum(64 - note["samples"] for note in noted)

    second = opened(tokenizer, on_bad_row="skip")
    second.open_journal(Path("stream.jsonl"))
    made = []
    real = Stream.block
    monkeypatch.setattr(Stream, "block", lambda self, n: made.append(n) or real(self, n))
    assert rows(second.samples_at(300, 40)) == expected
    assert set(made) == {4, 5}  # the blocks before were not tokenized again
    assert second.rows() == first.rows()


@pytest.mark.parametrize("tail", ['{"block": 5, "sam', "[]\n", '{"block": 9, "samples": 3}\n', "\0\0"])
def test_a_journal_that_a_kill_cut_short_is_used_as_far_as_it_goes(tokenizer: Any, tail: str) -> None:
    first = opened(tokenizer)
    first.keep_journal(Path("stream.jsonl"))
    expected = rows(first.samples_at(200, 100))
    with Path("stream.jsonl").open("a") as file:
        file.write(tail)
    second = opened(tokenizer)
    second.open_journal(Path("stream.jsonl"))
    second.keep_journal(Path("stream.jsonl"))
    assert rows(second.samples_at(200, 100)) == expected
    blocks = [json.loads(line)["block"] for line in Path("stream.jsonl").read_text().splitlines()]
    assert blocks == list(range(len(blocks)))


def test_the_journal_is_replaced_as_a_whole(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(tokenizer)
    first.keep_journal(Path("stream.jsonl"))
    first.samples_at(0, 200)
    before = Path("stream.jsonl").read_bytes()
    second = opened(tokenizer)
    second.open_journal(Path("stream.jsonl"))
    assert Path("stream.jsonl").read_bytes() == before  # who reads does not write

    def killed(_: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", killed)
        with pytest.raises(KeyboardInterrupt):
            opened(tokenizer).keep_journal(Path("stream.jsonl"))  # which knows of no block
    assert Path("stream.jsonl").read_bytes() == before
    second.keep_journal(Path("stream.jsonl"))
    assert Path("stream.jsonl").read_bytes() == before


def test_rows_that_are_not_what_was_counted_end_the_stream(tokenizer: Any) -> None:
    """Where nobody can tell from outside that they changed, as of a hub data set without a commit."""
    first = opened(tokenizer)
    first.keep_journal(Path("stream.jsonl"))
    first.samples_at(0, 200)
    pairs("d.jsonl", range(NUMBER), bad=(70,))
    second = opened(tokenizer, on_bad_row="skip")
    second.open_journal(Path("stream.jsonl"))
    assert len(second.samples_at(0, 64)) == 64
    with pytest.raises(LorakitError, match=r"rows 65 to 128 of the stream .* 63 samples now; they were 64"):
        second.samples_at(64, 10)


def test_the_first_row_of_a_kind_is_known_to_whoever_continues(tokenizer: Any) -> None:
    pairs("d.jsonl", range(NUMBER), bad=(70, 150))
    first = opened(tokenizer, on_bad_row="skip")
    first.keep_journal(Path("stream.jsonl"))
    first.samples_at(0, 200)
    second = opened(tokenizer, on_bad_row="skip")
    second.open_journal(Path("stream.jsonl"))
    second.samples_at(200, 40)
    account = second.account()
    assert account.first["bad"].startswith("d.jsonl:70: not JSON")
    assert (account.read, account.bad, account.kept, account.samples) == (256, 2, 254, 254)
    every = [first.block(number) for number in range(4)]
    assert account.tokens == sum(int(data.lengths.sum()) for data in every)
    assert account.trained_tokens == sum(int(data.num_targets.sum()) for data in every)


@pytest.mark.parametrize("revision", [None, "main", "f" * 40])
def test_a_hub_data_set_without_a_commit_is_told(
    revision: str | None, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    opened(tokenizer, Source(path="o/n", revision=revision)).open_journal(Path("stream.jsonl"))
    err = capsys.readouterr().err
    assert err.startswith("note      o/n: without a commit") if revision != "f" * 40 else not err


# ------------------------------------------------------------------------------------------------------------
# The fingerprint


def changed(tokenizer: Any, **attributes: Any) -> Any:
    other = copy.deepcopy(tokenizer)
    for name, value in attributes.items():
        setattr(other, name, value)
    return other


def test_the_fingerprint_covers_what_decides_the_samples(tokenizer: Any) -> None:
    same = opened(tokenizer).fingerprint()
    assert opened(changed(tokenizer)).fingerprint() == same
    assert opened(tokenizer, on_bad_row="skip").fingerprint() == same  # the journal sees to that
    more = changed(tokenizer)
    more.add_tokens(["<never seen>"])
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    source = str(Path("d.jsonl").absolute())
    others = [
        opened(more),
        opened(changed(tokenizer, chat_template=template)),
        opened(changed(tokenizer, bos_token="</s>")),
        opened(tokenizer, on_long="truncate"),
        opened(tokenizer, on_long="drop"),
        opened(tokenizer, seed=1),
        opened(tokenizer, Source(path=source, weight=2.0)),
        opened(tokenizer, Source(path=source, limit=9)),
    ]
    assert len({same, *(other.fingerprint() for other in others)}) == 1 + len(others)


@pytest.mark.parametrize("path", ["d.jsonl", "folder", "folder/*.jsonl", "folder/deep"])
def test_the_fingerprint_is_the_same_wherever_lorakit_is_started(
    path: str, tokenizer: Any, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("folder/deep").mkdir(parents=True)
    for name in ("folder/a.jsonl", "folder/b.jsonl", "folder/deep/c.jsonl"):
        pairs(name, range(3))
    found = opened(tokenizer, Source(path=str(here / path)))
    same = found.fingerprint()
    for place in (here / "folder", Path("/")):
        monkeypatch.chdir(place)
        assert found.fingerprint() == same
    if path == "folder":  # names are in it
        (here / "folder/b.jsonl").rename(here / "folder/z.jsonl")
        assert found.fingerprint() != same


# ------------------------------------------------------------------------------------------------------------
# Runs


def write_recipe(tiny: Path, data: str, steps: int = 12) -> None:
    Path("r.yaml").write_text(
        f"model: {{path: {tiny / 'model'}}}\ndata: {{train: d.jsonl, streaming: true, {data}}}\n"
        f"training: {{max_steps: {steps}, batch_size: 16}}\ncheckpoint: {{every: 3}}\n"
        "log: {every: 1}\noutput: out\n"
    )


def losses(run: str) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in metrics(Path(run)) if "loss" in line]


def adapter(run: str) -> bytes:
    return (Path(run) / "adapter" / "adapter_model.safetensors").read_bytes()


def test_a_resumed_stream_ends_in_the_same_bytes(tiny: Path, cli: Any, monkeypatch) -> None:
    write_recipe(tiny, "max_length: 64")
    code, _, err = cli("train", "r.yaml", "--output", "whole")
    assert code == 0, err
    real = StreamBatches.at

    def interrupted(self: StreamBatches, step: int) -> Any:
        if step == 7:
            raise OSError(5, "gone")
        return real(self, step)

    monkeypatch.setattr(StreamBatches, "at", interrupted)
    assert cli("train", "r.yaml")[0] == 1
    monkeypatch.setattr(StreamBatches, "at", real)
    code, _, err = cli("train", "r.yaml", "--resume", "auto")
    assert code == 0, err
    assert "step-000006" in err
    assert adapter("out") == adapter("whole")
    assert losses("out") == losses("whole")
    record = json.loads(Path("out/run.json").read_text())
    assert record["rows"]["read"] % 64 == 0 and record["rows"]["read"] >= 12 * 16
    assert record["rows"] == json.loads(Path("whole/run.json").read_text())["rows"]


def test_another_stream_is_no_continuation(tiny: Path, cli: Any) -> None:
    write_recipe(tiny, "max_length: 64", steps=3)
    assert cli("train", "r.yaml")[0] == 0
    with Path("d.jsonl").open("a") as file:
        file.write('{"prompt": "1", "completion": "2"}\n')
    write_recipe(tiny, "max_length: 64", steps=6)
    record = json.loads(Path("out/run.json").read_text())
    record["status"] = "running"
    Path("out/run.json").write_text(json.dumps(record))
    code, _, err = cli("train", "r.yaml", "--resume", "auto", "--set", "training.max_steps=3")
    assert code == 2
    assert "train: not the same rows or tokens" in err


def test_a_bad_row_far_on_costs_no_finished_step(tiny: Path, cli: Any) -> None:
    """Steps until it are checkpointed; --set data.on_bad_row=skip goes on from there."""
    pairs("d.jsonl", range(NUMBER), bad=(150,))
    write_recipe(tiny, "max_length: 64")
    code, _, err = cli("train", "r.yaml")
    assert code == 1
    assert "d.jsonl:150: not JSON" in err
    assert "data.on_bad_row: skip" in err and "--resume auto" in err
    done = sorted(path.name for path in Path("out/checkpoints").iterdir())
    assert done[-1] == "step-000008"  # 128 samples of the two blocks before
    assert json.loads(Path("out/run.json").read_text())["rows"] == {
        **dict.fromkeys(("truncated", "dropped", "masked_out", "bad"), 0),
        "read": 128,  # what was trained
        "kept": 128,
    }
    assert "stream    128 rows read, 128 kept" in err
    command = next(line for line in err.splitlines() if "Continue it: " in line).split("Continue it: ")[1]
    code, _, err = cli(*shlex.split(command)[1:])  # as it was printed
    assert code == 0, err
    assert cli("train", "r.yaml", "--output", "whole", "--set", "data.on_bad_row=skip")[0] == 0
    assert adapter("out") == adapter("whole")
    assert json.loads(Path("out/run.json").read_text())["rows"]["bad"] == 1


def test_rows_skipped_far_on_are_counted_named_and_said(tiny: Path, cli: Any) -> None:
    pairs("d.jsonl", range(NUMBER), bad=(150, 151))
    write_recipe(tiny, "max_length: 64, on_bad_row: skip")
    code, _, err = cli("train", "r.yaml")
    assert code == 0, err
    record = json.loads(Path("out/run.json").read_text())
    account = record["account"]["train"]
    assert record["rows"]["bad"] == account["bad"] == 2
    assert account["first"]["bad"].startswith("d.jsonl:150: not JSON")
    assert {name: account[name] for name in record["rows"]} == record["rows"]
    assert account["samples"] == account["kept"] and account["tokens"] > account["trained_tokens"] > 0
    assert record["account"]["first_rows"]["read"] == 64 and record["account"]["first_rows"]["lengths"]
    told = [line for line in err.splitlines() if line.startswith("stream ")]
    assert told[0].endswith(f"{record['rows']['read']} rows read, {record['rows']['kept']} kept, 2 bad")
    assert told[1].startswith("stream    first bad: d.jsonl:150: not JSON")


def test_a_row_too_long_far_on_says_that_its_cure_is_for_another_run(tiny: Path, cli: Any) -> None:
    pairs("d.jsonl", range(NUMBER))
    lines = Path("d.jsonl").read_text().splitlines()
    lines[149] = json.dumps({"prompt": "1", "completion": "2 " * 200})
    Path("d.jsonl").write_text("\n".join(lines) + "\n")
    write_recipe(tiny, "max_length: 64")
    code, _, err = cli("train", "r.yaml")
    assert code == 1
    assert "d.jsonl:150:" in err and "for a new run, with --output" in err
    assert "Continue it" not in err and "on_bad_row=skip" not in err
    code, _, err = cli("train", "r.yaml", "--resume", "auto", "--set", "data.on_long=drop")
    assert code == 2
    assert "train: not the same rows or tokens" in err
    assert cli("train", "r.yaml", "--output", "new", "--set", "data.on_long=drop")[0] == 0


def test_the_journal_is_replaced_after_all_ranks_have_read_it(
    tiny: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_recipe(tiny, "max_length: 64", steps=2)
    seen: list[str] = []

    def noting(name: str, owner: Any) -> None:
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *a: seen.append(name) or real(*a))

    noting("open_journal", Stream)
    noting("keep_journal", Stream)
    noting("wait_for_everyone", Accelerator)
    assert cli("train", "r.yaml")[0] == 0
    at = seen.index("open_journal")
    assert seen[at : at + 3] == ["open_journal", "wait_for_everyone", "keep_journal"]


def test_a_run_says_that_a_source_began_again_and_its_card_that_it_was_a_stream(tiny: Path, cli: Any) -> None:
    pairs("d.jsonl", range(10))
    write_recipe(tiny, "max_length: 64", steps=6)
    code, _, err = cli("train", "r.yaml")
    assert code == 0, err
    read = json.loads(Path("out/run.json").read_text())["rows"]["read"]
    again = (read - 1) // 10
    said = f"d.jsonl is read again where it ends: {again} times in the first {read} rows of the stream"
    assert f"stream    {said}" in err
    card = Path("out/adapter/README.md").read_text()
    assert "| trained on | 6 steps of 16 samples of a stream, prompt-completion, " in card


def test_a_bad_row_in_the_first_block_is_found_before_step_0(tiny: Path, cli: Any) -> None:
    pairs("d.jsonl", range(NUMBER), bad=(2, 5))
    write_recipe(tiny, "max_length: 64")
    code, _, err = cli("train", "r.yaml")
    assert code == 2
    assert "d.jsonl:2: not JSON" in err and "(also row 5)" in err


def test_a_stream_may_have_rows_held_out_and_is_shown_by_preview(tiny: Path, cli: Any, tokenizer) -> None:
    pairs("e.jsonl", range(3))
    write_recipe(tiny, "max_length: 64, eval: e.jsonl", steps=2)
    found, held_out = load_parts(load_recipe("r.yaml"), tokenizer)
    assert held_out and held_out.stream is None and len(held_out.tokens) == 3
    assert found.stream is not None and found.account.read == 64
    assert np.array_equal(np.sort(found.tokens.column("row")), np.arange(1, 65))
    code, out, err = cli("preview", "r.yaml", "--json", "-n", "2")
    assert code == 0, err
    assert json.loads(out)["rows"]["read"] == 64
    assert cli("train", "r.yaml")[0] == 0
