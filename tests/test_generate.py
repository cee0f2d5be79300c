"""lorakit generate: greedy answers against PEFT and transformers alone, draws against numpy, bad calls."""

import copy
import io
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.data.prompts import end_of_turn, prompt_ids, style_of, text_ids
from lorakit.decoding import Settings, _Stream, decode, draw
from tests.architectures import CONFIGS, UNPACKED, build
from tests.conftest import trained
from tests.test_score import answer_by_hand, models_by_hand

PROMPTS = (
    "When does Ada open the bakery?",
    "When",
    "When does Bruno open the museum? When does Bruno open the museum?",
    "When does Greta open the harbour?",
    "Ada",
    "When does Hugo open the garden?",
    "When does Farid open the bridge",
    "the",
)


def ask(cli: Any, run: Path, *options: str | Path, prompts: tuple[str, ...] = PROMPTS) -> Any:
    """The value of --json."""
    asked = [word for prompt in prompts for word in ("-p", prompt)]
    code, out, err = cli("generate", run, "--json", "--max-new-tokens", "24", *asked, *options)
    assert code == 0, err
    assert err == ""
    return json.loads(out)


@torch.no_grad()
def by_hand(model: Any, tokenizer: Any, prompt: str) -> str:
    return answer_by_hand(model, tokenizer, prompt, limit=24)


def test_greedy_answers_are_those_of_peft_in_any_batch(pairs_run, tiny, tokenizer, cli) -> None:
    base, adapted = models_by_hand(tiny, pairs_run / "adapter")
    expected = [{"prompt": p, "answer": by_hand(adapted, tokenizer, p)} for p in PROMPTS]
    assert expected[0]["answer"] == " Ada opens the bakery after lunch."
    assert ask(cli, pairs_run) == expected
    assert ask(cli, pairs_run, "--batch-size", "1") == expected
    assert ask(cli, pairs_run, "--batch-size", "3") == expected
    both = ask(cli, pairs_run, "--compare")
    assert [list(row) for row in both] == [["prompt", "base", "adapter"]] * 8
    assert [row["adapter"] for row in both] == [row["answer"] for row in expected]
    of_base = [by_hand(base, tokenizer, p) for p in PROMPTS]
    assert [row["base"] for row in both] == of_base
    assert [row["answer"] for row in ask(cli, pairs_run, "--base")] == of_base


def test_greedy_means_greedy_whatever_the_base_says(pairs_run, tiny, tmp_path: Path, cli) -> None:
    """Sampling, penalties and length limits of its generation_config have no part."""
    shutil.copytree(tiny / "model", tmp_path / "model")
    odd = {"do_sample": True, "temperature": 1.9, "top_p": 0.9, "repetition_penalty": 3.0, "max_length": 22}
    config = {**odd, "min_new_tokens": 20, "eos_token_id": [1, 7], "num_beams": 1}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(config))
    known = PROMPTS[:1]
    assert ask(cli, pairs_run, prompts=known) == ask(
        cli, pairs_run, "--base-path", tmp_path / "model", prompts=known
    )


def test_draws_repeat_with_their_seed_and_in_any_batch(pairs_run, cli) -> None:
    hot = ("--temperature", "3", "--seed", "5")
    first = ask(cli, pairs_run, *hot)
    assert ask(cli, pairs_run, *hot, "--batch-size", "3") == first
    assert ask(cli, pairs_run, "--temperature", "3", "--seed", "6") != first
    assert ask(cli, pairs_run, "--temperature", "3") == ask(
        cli, pairs_run, "--temperature", "3", "--seed", "0"
    )
    same = ask(cli, pairs_run, *hot, prompts=(PROMPTS[0],) * 4)
    assert len({row["answer"] for row in same}) > 1  # each prompt has random numbers of its own
    cold = ask(cli, pairs_run, "--temperature", "1", "--top-p", "1e-9")
    assert cold == ask(cli, pairs_run)


def test_a_draw_is_the_inverse_of_the_cumulative_distribution() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0, 0.5]], dtype=torch.float64)
    uniforms = np.random.default_rng(0).random(20_000)

    def shares(temperature: float, top_p: float) -> np.ndarray:
        drawn = draw(logits.expand(20_000, 5), torch.from_numpy(uniforms), temperature, top_p)
        return np.bincount(drawn.numpy(), minlength=5) / 20_000

    def softmax(temperature: float) -> np.ndarray:
        powers = np.exp(logits[0].numpy() / temperature)
        return powers / powers.sum()

    for temperature in (0.5, 1.0, 4.0):
        assert shares(temperature, 1.0) == pytest.approx(softmax(temperature), abs=0.012)
    p = softmax(1.0)
    nucleus = np.where(np.isin(np.arange(5), [1, 2]), p, 0)
    assert 0.8 < nucleus.sum() < 0.9
    assert shares(1.0, float(nucleus.sum()) - 1e-6) == pytest.approx(nucleus / nucleus.sum(), abs=0.012)
    assert shares(1.0, 1e-12).tolist() == [0, 1, 0, 0, 0]
    edges = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    assert draw(logits.expand(2, 5), edges, 1.0, 1.0).tolist() == [1, 3]


class Numbers:
    """Of a tokenizer, what decoding needs: the text of tokens is their numbers."""

    bos_token_id, eos_token_id, pad_token_id, chat_template = 1, 2, None, None

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.mark.parametrize("name", [*CONFIGS, *UNPACKED])
@torch.no_grad()
def test_a_batch_is_padded_as_the_architecture_needs(name: str) -> None:
    model = build((CONFIGS | UNPACKED)[name]())
    base, cpu = SimpleNamespace(model=model, config=model.config), torch.device("cpu")
    opened: Any = SimpleNamespace(base=base, tokenizer=Numbers(), autocast=nullcontext, device=cpu)
    prompts, limits = [[1, 5, 9, 11, 4, 8, 22, 31, 7], [1, 6], [1, 33, 21, 9, 13]], [12, 7, 12]
    expected = []
    for prompt, limit in zip(prompts, limits, strict=True):
        ids = list(prompt)
        while len(ids) < len(prompt) + limit and (ids == prompt or ids[-1] != 2):
            ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        expected.append(" ".join(str(token) for token in ids[len(prompt) :] if token != 2))
    assert decode(opened, prompts, Settings(), limits, numbers=[0, 1, 2]) == expected


def test_text_of_one_and_of_many(pairs_run, tmp_path: Path, cli, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli("generate", pairs_run, "-p", PROMPTS[0])[1] == "Ada opens the bakery after lunch.\n"
    file = tmp_path / "prompts.txt"
    file.write_text(f"\ufeff{PROMPTS[0]}\n\n   \nWhen does Bruno open the museum?\r\n", newline="")
    expected = (
        "prompt    When does Ada open the bakery?\nadapter   Ada opens the bakery after lunch.\n\n"
        "prompt    When does Bruno open the museum?\nadapter   Bruno opens the museum at dusk.\n"
    )
    assert cli("generate", pairs_run, "-f", file)[1] == expected
    monkeypatch.setattr(sys, "stdin", io.StringIO(file.read_text().lstrip("\ufeff")))
    assert cli("generate", pairs_run, "-f", "-")[1] == expected
    lines = cli("generate", pairs_run, "-p", PROMPTS[0], "--compare")[1].splitlines()
    assert lines[0] == expected.splitlines()[0]
    assert lines[1].startswith("base      ")
    assert lines[-1] == expected.splitlines()[1]


def test_chats_are_asked_in_their_template(chats_run, tiny, tokenizer, cli) -> None:
    _, adapted = models_by_hand(tiny, chats_run / "adapter")

    def expected(*turns: dict[str, str]) -> str:
        text = tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        return by_hand(adapted, tokenizer, text.removeprefix("<s>"))

    [question, *_] = PROMPTS
    user = {"role": "user", "content": question}
    [found] = ask(cli, chats_run, prompts=(question,))
    assert found["answer"] == expected(user) == "Ada opens the bakery after lunch."
    [found] = ask(cli, chats_run, "--system", "Be brief.", prompts=(question,))
    assert found["answer"] == expected({"role": "system", "content": "Be brief."}, user)
    [found] = ask(cli, chats_run, "--raw", prompts=(question,))
    assert found["answer"] == by_hand(adapted, tokenizer, question)
    code, _, err = cli("generate", chats_run, "--raw", "--system", "x", "-p", "y")
    assert code == 2
    assert "--system: the prompt is given as plain text (--raw)" in err


def test_how_a_prompt_becomes_tokens(tokenizer) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    assert [style_of(name, tokenizer) for name in ("messages", "alpaca", None, "prompt-completion")] == [
        *("chat", "chat", "chat"),
        "text",
    ]
    assert [style_of(name, plain) for name in ("alpaca", None, "text")] == ["instruction", "text", "text"]
    assert prompt_ids("Do it", "instruction", plain) == tokenizer("Do it\n")["input_ids"]
    assert text_ids("<s>Ada", tokenizer) == tokenizer("Ada")["input_ids"]

    class AddsAnEnd:
        """Some tokenizers end every text by themselves; a prompt goes on."""

        bos_token, eos_token, eos_token_id, bos_token_id = "<s>", "</s>", 1, 0

        def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
            return {"input_ids": [*tokenizer(text, **options)["input_ids"], 1]}

    assert text_ids("Ada", AddsAnEnd()) == tokenizer("Ada")["input_ids"]


def test_an_answer_ends_where_a_turn_ends(tokenizer) -> None:
    """Also where that is another token than the end of a text."""
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    other = copy.deepcopy(tokenizer)
    other.chat_template = (
        "{% for m in messages %}<|user|>{{ m.content }}<|tool|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    assert end_of_turn(other) == tokenizer.convert_tokens_to_ids("<|tool|>")
    other.chat_template = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
    assert end_of_turn(other) is None
    other.chat_template = "{{ raise_exception('no') }}"
    assert end_of_turn(other) is None
    other.chat_template = None
    assert end_of_turn(other) is None


def test_a_stream_never_shows_half_a_character(tokenizer) -> None:
    text = "Ada: \u00e4\u20ac\U0001f600 end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    shown: list[str] = []
    stream = _Stream(tokenizer, {1}, shown.append)
    stream.put(torch.tensor([[0, 5, 6]]))  # the prompt
    for token in [*ids, 1, 9, 9]:  # nothing past the end token
        stream.put(torch.tensor([token]))
    stream.end()
    assert "".join(shown) == text
    assert len(shown) > 5
    assert all("\ufffd" not in piece for piece in shown)


def test_the_context_holds_prompt_and_answer(pairs_run, tokenizer, cli) -> None:
    """256 positions: 255 tokens leave room for one, 256 for none."""
    word = tokenizer.decode(tokenizer(" Bruno", add_special_tokens=False)["input_ids"][:1])
    for number, code in ((254, 0), (255, 2), (300, 2)):
        prompt = word * number
        assert len(tokenizer(prompt)["input_ids"]) == number + 1
        found, out, err = cli("generate", pairs_run, "--json", "-p", prompt, "-p", "When")
        assert found == code
        if code:
            assert f'"{prompt[:40]}..." has {number + 1} tokens; the model\'s context is 256' in err
        else:
            answer = json.loads(out)[0]["answer"]
            assert len(tokenizer(answer, add_special_tokens=False)["input_ids"]) <= 1


def test_full_fine_tuning_answers_but_has_no_base(tiny, tmp_path: Path, tokenizer, cli) -> None:
    run = trained(tiny, tmp_path, ["adapter={method: full}", "optimizer.lr=1e-3", "training.epochs=1"])
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32).eval()
    assert ask(cli, run, prompts=PROMPTS[:1])[0]["answer"] == by_hand(model, tokenizer, PROMPTS[0])
    for option in ("--base", "--compare"):
        code, _, err = cli("generate", run, "-p", "x", option)
        assert code == 2
        assert "full fine-tuning moved the base model itself" in err
    assert cli("generate", run, "-p", "x", "--base-path", tiny / "model")[0] == 2


def test_bad_calls(pairs_run, tiny, tmp_path: Path, cli) -> None:
    def refused(*arguments: Any) -> str:
        code, out, err = cli("generate", *arguments)
        assert (code, out) == (2, "")
        return str(err)

    assert "no prompt" in refused(pairs_run)
    (tmp_path / "empty.txt").write_text("\n \n")
    assert "no prompt in it" in refused(pairs_run, "-f", tmp_path / "empty.txt")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert "not UTF-8 text" in refused(pairs_run, "-f", tmp_path / "latin.txt")
    assert "cannot be read" in refused(pairs_run, "-f", tmp_path / "none.txt")
    assert "keep the one you mean" in refused(pairs_run, "-p", "x", "--base", "--compare")
    assert "--top-p: has no effect on greedy" in refused(pairs_run, "-p", "x", "--top-p", "0.5")
    assert "--seed: has no effect on greedy" in refused(pairs_run, "-p", "x", "--seed", "1")
    assert "expected a probability" in refused(pairs_run, "-p", "x", "--temperature", "1", "--top-p", "1.5")
    assert "neither a run nor an adapter" in refused(tiny, "-p", "x")
    assert "trained on prompt-completion rows" in refused(pairs_run, "-p", "x", "--system", "y")
    assert "not UTF-8" in refused(pairs_run, "-p", "caf\udce9")
    shutil.copytree(tiny / "model", tmp_path / "mute")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / name).unlink()
    assert "has no tokenizer" in refused(pairs_run, "-p", "x", "--base-path", tmp_path / "mute")


def test_a_batch_never_runs_past_the_context() -> None:
    """Learned positions end there: a short prompt with a long answer is not laid beside a long prompt."""
    from lorakit.decoding import batches_of

    assert batches_of([50, 1, 1], [14, 63, 63], 8, 64) == [[0], [1, 2]]
    assert batches_of([50, 1, 2], [14, 14, 14], 8, 64) == [[0, 2, 1]]
    assert batches_of([50, 1, 2], [14, 63, 62], 2, None) == [[0, 2], [1]]
    assert batches_of([], [], 2, 64) == []


def test_gpt2_answers_short_and_long_prompts_together(tiny: Path, tokenizer, cli, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    base = GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / "model" / file, tmp_path / "base" / file)
    adapter = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    get_peft_model(base, adapter).save_pretrained(tmp_path / "adapter")
    long = "When does Ada open the bakery? " * 5
    prompts = ["-p", long, "-p", "When"]
    place = (tmp_path / "adapter", "--base-path", tmp_path / "base", "--raw", "--json")
    together = cli("generate", *place, *prompts)
    assert together[0] == 0, together[2]
    alone = cli("generate", *place, *prompts, "--batch-size", "1")
    assert together[1] == alone[1]

    pairs = [(long, " No."), ("When", " Ada opens the bakery." * 5)]  # twice the second is above what is left
    rows = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    lengths = [len(tokenizer(text)["input_ids"]) for pair in pairs for text in pair]
    assert lengths[0] + 8 + 2 * lengths[3] > 64 > max(lengths[0] + lengths[1], lengths[2] + lengths[3])
    options = ("--data", tmp_path / "rows.jsonl", "--base", tmp_path / "base", "--exact-match", "--json")
    code, out, err = cli("eval", tmp_path / "adapter", *options)
    assert code == 0, err
    assert json.loads(out)["prompts"] == 2
