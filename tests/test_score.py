"""lorakit eval: the numbers of base, adapter and merged model, against PEFT and transformers alone."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import trained


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def models_by_hand(tiny: Path, adapter: Path) -> tuple[Any, Any]:
    """(base, base with adapter) without lorakit."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def base() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32).eval()

    return base(), PeftModel.from_pretrained(base(), adapter).eval()


@torch.no_grad()
def loss_by_hand(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Mean over completions and their end token, one row at a time."""
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = [*tokenizer(row["prompt"] + row["completion"])["input_ids"], tokenizer.eos_token_id]
        assert ids[: len(prompt)] == prompt
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        for place in range(len(prompt), len(ids)):
            total -= float(log_p[place - 1, ids[place]])
            count += 1
    return total / count


@torch.no_grad()
def answer_by_hand(model: Any, tokenizer: Any, prompt: str, limit: int = 60) -> str:
    """Greedy, without a cache and without a batch."""
    ids = tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + limit and (len(ids) == start or ids[-1] != tokenizer.eos_token_id):
        ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return str(tokenizer.decode(ids[start:], skip_special_tokens=True))


def test_the_numbers_are_those_of_the_run_and_of_peft(pairs_run, tiny, tokenizer, cli) -> None:
    code, out, err = cli("eval", pairs_run, "--json", "--exact-match")
    assert code == 0, err
    found = json.loads(out)
    assert list(found) == ["data", "rows", "tokens", "prompts", "base", "adapter", "merged"]
    assert (found["data"], found["rows"], found["prompts"]) == (str(tiny / "eval.jsonl"), 40, 40)
    assert found["merged"] is None
    record = json.loads((pairs_run / "adapter" / "lorakit.json").read_text())
    assert found["adapter"]["loss"] == pytest.approx(record["eval_loss"], rel=1e-6)
    assert found["base"]["loss"] == pytest.approx(record["base_eval_loss"], rel=1e-6)

    rows = rows_of(tiny / "eval.jsonl")
    ends = [len(tokenizer(row["prompt"] + row["completion"])["input_ids"]) + 1 for row in rows]
    starts = [len(tokenizer(row["prompt"])["input_ids"]) for row in rows]
    assert found["tokens"] == sum(ends) - sum(starts)
    base, adapted = models_by_hand(tiny, pairs_run / "adapter")
    for name, model in (("base", base), ("adapter", adapted)):
        assert found[name]["loss"] == pytest.approx(loss_by_hand(model, tokenizer, rows), rel=1e-5)
        assert found[name]["perplexity"] == pytest.approx(math.exp(found[name]["loss"]))
        answers = [answer_by_hand(model, tokenizer, row["prompt"]) for row in rows]
        right = [a.strip() == row["completion"].strip() for a, row in zip(answers, rows, strict=True)]
        assert found[name]["exact_match"] == sum(right) / 40
    assert found["base"]["exact_match"] == 0 < 0.8 < found["adapter"]["exact_match"]
    assert "warning" not in err


def test_text_is_a_table_and_the_merged_model_is_found(pairs_run, tmp_path: Path, cli) -> None:
    run = tmp_path / "run"
    shutil.copytree(pairs_run, run)
    assert cli("merge", run, "--output", run / "merged")[0] == 0
    code, out, err = cli("eval", run)
    assert code == 0, err
    head, blank, *table = out.splitlines()
    assert head.endswith("eval.jsonl: 40 rows, 320 tokens scored")
    assert blank == ""
    assert [line.split()[0] for line in table] == ["loss", "base", "adapter", "merged"]
    assert len({len(line) for line in table}) == 1
    assert table[2].split()[1:] == table[3].split()[1:]
    elsewhere = tmp_path / "elsewhere"
    (run / "merged").rename(elsewhere)
    assert json.loads(cli("eval", run, "--json")[1])["merged"] is None
    found = json.loads(cli("eval", run / "adapter", "--json", "--merged", elsewhere)[1])
    assert found["merged"]["loss"] == pytest.approx(found["adapter"]["loss"], rel=1e-5)


def test_chats_are_asked_for_their_last_answer(chats_run, cli) -> None:
    found = json.loads(cli("eval", chats_run, "--json", "--exact-match")[1])
    record = json.loads((chats_run / "adapter" / "lorakit.json").read_text())
    assert found["adapter"]["loss"] == pytest.approx(record["eval_loss"], rel=1e-6)
    assert found["adapter"]["exact_match"] > 0.7
    assert found["base"]["exact_match"] == 0


def test_other_rows(pairs_run, tiny, tokenizer, tmp_path: Path, cli) -> None:
    """The recipe's format where they have it, else what they are."""
    rows = rows_of(tiny / "train.jsonl")[:7]
    same = tmp_path / "same.jsonl"
    same.write_text("\n".join(map(json.dumps, rows)) + "\n")
    base, adapted = models_by_hand(tiny, pairs_run / "adapter")
    found = json.loads(cli("eval", pairs_run, "--data", same, "--json")[1])
    assert found["rows"] == 7
    assert found["adapter"]["loss"] == pytest.approx(loss_by_hand(adapted, tokenizer, rows), rel=1e-5)
    cut = json.loads(cli("eval", pairs_run, "--data", same, "--json", "--set", "data.limit=3")[1])
    assert cut["rows"] == 3
    assert cut["adapter"]["loss"] == pytest.approx(loss_by_hand(adapted, tokenizer, rows[:3]), rel=1e-5)

    plain = tmp_path / "plain.txt"
    plain.write_text("Ada opens the bakery.\nThe end is near.\n")
    found = json.loads(cli("eval", pairs_run, "--data", plain, "--json")[1])
    whole = [{"prompt": "", "completion": line} for line in plain.read_text().splitlines()]
    assert found["base"]["loss"] == pytest.approx(loss_by_hand(base, tokenizer, whole), rel=1e-5)
    code, _, err = cli("eval", pairs_run, "--data", plain, "--exact-match")
    assert code == 2
    assert "plain text has no answers" in err


def test_a_worse_adapter_and_changed_rows_are_told(pairs_run, tiny, tmp_path: Path, cli) -> None:
    run = tmp_path / "run"
    shutil.copytree(pairs_run, run)
    weights = run / "adapter" / "adapter_model.safetensors"
    turned = {k: -4 * v if "lora_B" in k else v for k, v in load_file(weights).items()}
    save_file(turned, weights, metadata={"format": "pt"})
    other = tmp_path / "eval.jsonl"
    other.write_text("".join((tiny / "eval.jsonl").read_text().splitlines(keepends=True)[:5]))
    resolved = run / "resolved.yaml"
    resolved.write_text(resolved.read_text().replace(str(tiny / "eval.jsonl"), str(other)))
    code, _, err = cli("eval", run)
    assert code == 0
    assert "warning: the adapter is worse than the base: loss " in err
    assert f"warning: {other} has other rows than when {run} was trained" in err


def test_an_adapter_of_peft(pairs_run, tiny, tokenizer, tmp_path: Path, cli) -> None:
    """No run around it, no lorakit.json: base and rows must be said."""
    _, adapted = models_by_hand(tiny, pairs_run / "adapter")
    adapted.save_pretrained(tmp_path / "foreign")
    code, _, err = cli("eval", tmp_path / "foreign", "--base", tiny / "model")
    assert code == 2
    assert "lies in no run" in err and "--data FILE" in err
    arguments = (tmp_path / "foreign", "--data", tiny / "eval.jsonl")
    code, _, err = cli("eval", *arguments)
    assert code == 2
    assert "--base" in err
    found = json.loads(cli("eval", *arguments, "--base", tiny / "model", "--json")[1])
    expected = loss_by_hand(adapted, tokenizer, rows_of(tiny / "eval.jsonl"))
    assert found["adapter"]["loss"] == pytest.approx(expected, rel=1e-5)
    assert "lies in none" in cli("eval", *arguments, "--set", "data.limit=3")[2]


def test_full_fine_tuning_against_the_model_that_it_began_with(tiny, tmp_path: Path, cli) -> None:
    full = ["adapter={method: full}", "optimizer.lr=1e-3", "training.epochs=1"]
    run = trained(tiny, tmp_path, full)
    found = json.loads(cli("eval", run, "--json")[1])
    record = json.loads((run / "model" / "lorakit.json").read_text())
    assert found["model"]["loss"] == pytest.approx(record["eval_loss"], rel=1e-6)
    assert found["base"]["loss"] == pytest.approx(record["base_eval_loss"], rel=1e-6)
    assert "adapter" not in found
    assert "whole model" in cli("eval", run, "--merged", tiny / "model")[2]


def test_four_bits(tiny, tmp_path: Path, cli) -> None:
    run = trained(tiny, tmp_path, ["model.quantize=nf4", "training.epochs=1"])
    found = json.loads(cli("eval", run, "--json", "--exact-match")[1])
    record = json.loads((run / "adapter" / "lorakit.json").read_text())
    assert found["adapter"]["loss"] == pytest.approx(record["eval_loss"], rel=5e-3)
    assert found["base"]["loss"] == pytest.approx(record["base_eval_loss"], rel=5e-3)


def test_bad_calls(pairs_run, tiny, tmp_path: Path, cli) -> None:
    def refused(*arguments: Any) -> str:
        code, out, err = cli("eval", *arguments)
        assert (code, out) == (2, "")
        return str(err)

    assert "no such directory" in refused(tmp_path / "nothing")
    assert "neither a run nor an adapter" in refused(tiny)
    assert "no such file" in refused(pairs_run, "--data", tmp_path / "no.jsonl")
    assert "has no effect on a score" in refused(pairs_run, "--set", "optimizer.lr=1")
    assert "is no model directory" in refused(pairs_run, "--merged", tmp_path)
    run = tmp_path / "run"
    shutil.copytree(pairs_run, run)
    resolved = run / "resolved.yaml"
    text = resolved.read_text()
    resolved.write_text(text.replace(str(tiny / "eval.jsonl"), "/gone/eval.jsonl"))
    assert "the held-out rows are not where they were: no such file: /gone/eval.jsonl" in refused(run)
    record = run / "adapter" / "lorakit.json"
    record.write_text(record.read_text().replace(str(tiny / "model"), "/gone/model"))
    assert "the base model is not where it was" in refused(run, "--data", tiny / "eval.jsonl")
    assert cli("eval", run, "--data", tiny / "eval.jsonl", "--base", tiny / "model")[0] == 0


def test_a_run_without_held_out_rows(tiny, tmp_path: Path, write_recipe, cli) -> None:
    recipe = write_recipe(training={"max_steps": 1, "batch_size": 4})
    assert cli("train", recipe)[0] == 0
    code, _, err = cli("eval", tmp_path / "run")
    assert code == 2
    assert "without held-out rows (data.eval)" in err
    assert cli("eval", tmp_path / "run", "--data", tiny / "eval.jsonl")[0] == 0


def test_a_run_that_adapts_embeddings_is_scored(write_recipe, tiny: Path, cli, tmp_path: Path) -> None:
    data = {"train": str(tiny / "train.jsonl"), "eval": str(tiny / "eval.jsonl"), "max_length": 128}
    adapter = {"targets": ["embed_tokens", "q_proj"], "rank": 4}
    assert cli("train", write_recipe(adapter=adapter, data=data))[0] == 0
    code, out, err = cli("eval", tmp_path / "run", "--json")
    assert code == 0, err
    said = json.loads((tmp_path / "run" / "adapter" / "lorakit.json").read_text())
    assert json.loads(out)["adapter"]["loss"] == pytest.approx(said["eval_loss"], rel=1e-6)


def test_every_model_is_computed_in_the_precision_of_the_adapter(
    tiny: Path, tokenizer, tmp_path: Path, cli
) -> None:
    """An adapter of PEFT on a bf16 base: the base itself, given as merged, has the base's loss to the bit."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shutil.copytree(tiny / "model", tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    in_fp32 = loss_by_hand(base.float(), tokenizer, rows_of(tiny / "eval.jsonl"))
    get_peft_model(base, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    options = ("--data", tiny / "eval.jsonl", "--base", tmp_path / "base", "--merged", tmp_path / "base")
    code, out, err = cli("eval", tmp_path / "adapter", *options, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["merged"]["loss"] == found["base"]["loss"] == found["adapter"]["loss"]
    assert found["base"]["loss"] != pytest.approx(in_fp32, rel=1e-6)
    assert found["base"]["loss"] == pytest.approx(in_fp32, rel=1e-2)


def test_a_base_too_large_for_the_memory_is_not_called_damaged(pairs_run, cli, monkeypatch) -> None:
    from transformers import AutoModelForCausalLM

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    code, out, err = cli("eval", pairs_run)
    assert (code, out) == (1, "")
    assert err.startswith("lorakit: out of memory: [enforce fail")
