"""A stream: the samples of a step are a function of seed and step alone, however one came there."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorakit.data import load_parts, stream
from lorakit.data.batches import StreamBatches
from lorakit.data.reading import Reading
from lorakit.data.stream import Endless, Stream
from lorakit.data.tokenize import Setting
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


# ------------------------------------------------------------------------------------------------------------
# The journal


def test_a_journal_saves_the_counting_and_changes_nothing(tokenizer: Any, monkeypatch) -> None:
    pairs("d.jsonl", range(NUMBER), bad=(3, 70, 71, 200))
    first = opened(tokenizer, on_bad_row="skip")
    first.open_journal(Path("stream.jsonl"), writes=True)
    expected = rows(first.samples_at(300, 40))
    noted = [json.loads(line) for line in Path("stream.jsonl").read_text().splitlines()]
    assert [note["samples"] for note in noted[:4]] == [63, 62, 64, 62]  # row 3 comes again
    assert first.rows()["bad"] == sum(64 - note["samples"] for note in noted)

    second = opened(tokenizer, on_bad_row="skip")
    second.open_journal(Path("stream.jsonl"), writes=False)
    made = []
    real = Stream.block
    monkeypatch.setattr(Stream, "block", lambda self, n: made.append(n) or real(self, n))
    assert rows(second.samples_at(300, 40)) == expected
    assert set(made) == {4, 5}  # the blocks before were not tokenized again
    assert second.rows() == first.rows()


@pytest.mark.parametrize("tail", ['{"block": 5, "sam', "[]\n", '{"block": 9, "samples": 3}\n', "\0\0"])
def test_a_journal_that_a_kill_cut_short_is_used_as_far_as_it_goes(tokenizer: Any, tail: str) -> None:
    first = opened(tokenizer)
    first.open_journal(Path("stream.jsonl"), writes=True)
    expected = rows(first.samples_at(200, 100))
    with Path("stream.jsonl").open("a") as file:
        file.write(tail)
    second = opened(tokenizer)
    second.open_journal(Path("stream.jsonl"), writes=True)
    assert rows(second.samples_at(200, 100)) == expected
    blocks = [json.loads(line)["block"] for line in Path("stream.jsonl").read_text().splitlines()]
    assert blocks == list(range(len(blocks)))


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
    code, _, err = cli("train", "r.yaml", "--resume", "auto", "--set", "data.on_bad_row=skip")
    assert code == 0, err
    assert cli("train", "r.yaml", "--output", "whole", "--set", "data.on_bad_row=skip")[0] == 0
    assert adapter("out") == adapter("whole")
    assert json.loads(Path("out/run.json").read_text())["rows"]["bad"] == 1


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
