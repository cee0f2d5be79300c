"""lorakit chat: the conversation it keeps, its commands, and what Ctrl-C does."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lorakit import chat
from tests.test_score import answer_by_hand, models_by_hand

FIRST, SECOND = "When does Ada open the bakery?", "When does Bruno open the museum?"


@pytest.fixture
def say_lines(cli, monkeypatch: pytest.MonkeyPatch) -> Any:
    """say_lines(run, [line, ...], *options) -> (answers as lines, notes) of a chat that is piped in."""

    def talk(run: Path, lines: list[str], *options: str) -> tuple[list[str], str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        code, out, err = cli("chat", run, "--max-new-tokens", "24", *options)
        assert code == 0, err
        return out.removesuffix("\n").split("\n"), err

    return talk


@pytest.fixture
def asked(chats_run, tiny, tokenizer) -> Any:
    """asked([user, assistant, user, ...], base=False) -> the answer, without lorakit."""
    base, adapted = models_by_hand(tiny, chats_run / "adapter")

    def ask(turns: list[str], of_base: bool = False, system: str = "") -> str:
        messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
        first = [{"role": "system", "content": system}] if system else []
        text = tokenizer.apply_chat_template(first + messages, tokenize=False, add_generation_prompt=True)
        return answer_by_hand(base if of_base else adapted, tokenizer, text.removeprefix("<s>"), limit=24)

    return ask


def test_the_whole_conversation_is_given(chats_run, say_lines, asked) -> None:
    one = asked([FIRST])
    two = asked([FIRST, one, SECOND])
    out, err = say_lines(chats_run, [FIRST, SECOND, "/reset", SECOND])
    assert out == [one, two, asked([SECOND])]
    assert out[0] == "Ada opens the bakery after lunch."
    head = err.splitlines()
    assert head[0] == f"the adapter of {chats_run} answers; /reset, /base, /adapter, /help, /exit"
    assert head[1:] == ["the conversation is forgotten"]
    out, _ = say_lines(chats_run, [FIRST], "--system", "Be brief.")
    assert out == [asked([FIRST], system="Be brief.")]


def test_commands(chats_run, say_lines, asked) -> None:
    one = asked([FIRST])
    out, err = say_lines(chats_run, [FIRST, "/adapter", "/nothing", " /exit ", FIRST])
    assert out == [one]
    assert "/nothing: no such command" in err
    assert "/reset    forget the conversation" in err
    out, err = say_lines(chats_run, ["/base", FIRST, "", "/reset", "/adapter", FIRST])
    assert "\n".join(out) == f"{asked([FIRST], of_base=True)}\n{one}"
    assert "the base answers from here on" in err


def test_where_no_conversation_was_trained_each_line_stands_alone(
    pairs_run, tiny, tokenizer, say_lines
) -> None:
    _, adapted = models_by_hand(tiny, pairs_run / "adapter")
    out, err = say_lines(pairs_run, [FIRST, SECOND])
    assert out == [answer_by_hand(adapted, tokenizer, line) for line in (FIRST, SECOND)]
    assert "each line is a prompt of its own: it was trained on prompt-completion rows" in err


def test_a_conversation_that_outgrows_the_context_forgets_its_oldest_turns(
    chats_run, say_lines, asked
) -> None:
    """Of 256 tokens: one long turn and its answer fit, two do not; what alone is too long changes nothing."""
    long = " ".join([FIRST] * 14)
    out, err = say_lines(
        chats_run, [FIRST, long, "x" * 400, long, SECOND, "x" * 400], "--system", "Be brief."
    )
    one = asked([FIRST], system="Be brief.")
    two = asked([FIRST, one, long], system="Be brief.")
    three = asked([long], system="Be brief.")
    assert out == [one, two, three, asked([long, three, SECOND], system="Be brief.")]
    assert err.count("the conversation outgrew the context: its oldest 4 turns are forgotten") == 1
    assert "tokens; the model's context is 256" in err


def test_interrupt_stops_the_answer_and_not_the_chat(
    chats_run, say_lines, asked, monkeypatch: pytest.MonkeyPatch
) -> None:
    show, shown = chat._show, []

    def interrupting(text: str) -> None:
        shown.append(text)
        show(text)
        if len(shown) == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(chat, "_show", interrupting)
    before = signal.getsignal(signal.SIGINT)
    out, err = say_lines(chats_run, [FIRST, SECOND])
    whole = asked([FIRST])
    assert out[0] != whole and whole.startswith(out[0]) and out[0]
    assert "stopped" in err
    assert out[1] == asked([FIRST, out[0], SECOND])
    assert signal.getsignal(signal.SIGINT) == before


def test_interrupt_at_the_prompt_leaves(chats_run) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "lorakit", "chat", chats_run],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr
    while "answers; /reset" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.endswith("lorakit: interrupted\n")
    assert "Traceback" not in err


def test_the_end_of_input_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def closed(prompt: str) -> str:
        raise EOFError

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", closed)
    assert chat._read_line() is None
