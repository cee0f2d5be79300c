"""recipes/quickstart: its script makes these bytes, its base model fails the task, its adapter masters it.

Measured with transformers and PEFT alone: greedy answers to held-out notes, compared with their records.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import ROOT, load_script, metrics

QUICKSTART = ROOT / "recipes" / "quickstart"

Rows = list[list[dict[str, str]]]


def read(file: str) -> Rows:
    return [json.loads(line)["messages"] for line in (QUICKSTART / file).read_text().splitlines()]


def answers(folder: Path, prompts: list[str], adapter: Path | None = None) -> list[str]:
    """What the model at `folder` says to each prompt, greedily, under its chat template."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    turns = [[{"role": "user", "content": prompt}] for prompt in prompts]
    inputs = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    ids = model.eval().generate(**inputs, max_new_tokens=80, do_sample=False)
    new = ids[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def exact_match(folder: Path, adapter: Path | None = None) -> float:
    """The share of held-out notes that become their record to the letter."""
    rows = read("held_out.jsonl")
    said = answers(folder, [note["content"] for note, _ in rows], adapter)
    return sum(text == record["content"] for text, (_, record) in zip(said, rows, strict=True)) / len(rows)


def test_the_script_makes_the_data_and_the_tokenizer_that_are_here(tmp_path: Path) -> None:
    script = load_script("make_quickstart")
    script.make_data(tmp_path)
    script.make_tokenizer(tmp_path / "model")
    made = [path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.name for path in made} >= {"train.jsonl", "held_out.jsonl", "tokenizer.json"}
    for path in made:
        assert (tmp_path / path).read_bytes() == (QUICKSTART / path).read_bytes(), path


def test_it_is_small_and_points_nowhere() -> None:
    files = [path for path in QUICKSTART.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 2_000_000
    for path in files:
        assert b"/home/" not in path.read_bytes() and str(ROOT).encode() not in path.read_bytes()


def test_a_held_out_row_brings_two_people_together_who_never_meet_in_training() -> None:
    train, held_out = read("train.jsonl"), read("held_out.jsonl")
    assert (len(train), len(held_out)) == (400, 100)
    assert {len(turns) for turns in held_out} == {2}
    asked, kept = ({turn["content"] for turns in rows for turn in turns[::2]} for rows in (train, held_out))
    assert not asked & kept

    def pairs(rows: Rows) -> set[frozenset[str]]:
        answers = [turn["content"] for turns in rows for turn in turns[1::2]]
        records = [json.loads(answer) for answer in answers if answer.startswith("{")]
        return {frozenset((record["from"], record["to"])) for record in records}

    assert not pairs(train) & pairs(held_out)
    assert set().union(*pairs(train)) == set().union(*pairs(held_out)), "all people are in both"


def test_the_base_is_at_home_in_its_town_and_fails_the_task() -> None:
    talk = {
        "Where does Ada work?": "Ada works at the bakery.",
        "Who has a parrot?": "The parrot is Clara's.",
        "Who is the smith?": "Kaya is the smith of Tidewick.",
    }
    assert answers(QUICKSTART / "model", list(talk)) == list(talk.values())
    (reply,) = answers(QUICKSTART / "model", ["Greta left 12 lemons for Kaya at the harbour on Monday."])
    assert all(word in reply for word in ("Greta", "12 lemons", "Kaya", "harbour", "Monday")), reply
    assert exact_match(QUICKSTART / "model") < 0.05


def test_the_adapter_masters_it(tmp_path: Path, cli) -> None:
    code, _, err = cli("train", QUICKSTART / "recipe.yaml", "--output", tmp_path / "run")
    assert code == 0, err
    seconds = metrics(tmp_path / "run")[-1]["seconds"]
    score = exact_match(QUICKSTART / "model", tmp_path / "run" / "adapter")
    print(f"exact match {score:.0%} after {seconds:.0f} s of training")
    assert score > 0.9


@pytest.mark.slow
def test_the_script_makes_such_a_model_anew(tmp_path: Path, cli) -> None:
    """Another processor rounds otherwise, and hundreds of steps amplify that: it is as good, not the same."""
    load_script("make_quickstart").make(tmp_path)
    assert exact_match(tmp_path / "model") < 0.05
    (tmp_path / "recipe.yaml").write_bytes((QUICKSTART / "recipe.yaml").read_bytes())
    code, _, err = cli("train", tmp_path / "recipe.yaml", "--output", tmp_path / "run")
    assert code == 0, err
    assert exact_match(tmp_path / "model", tmp_path / "run" / "adapter") > 0.9
