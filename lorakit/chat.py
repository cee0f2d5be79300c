"""A conversation with a trained model, line by line; its words appear as they are generated.

The whole conversation is given to the model each time, in the chat template. Where a model was trained on
plain text, or its tokenizer has no template, each line is a prompt of its own.
"""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from lorakit.data.prompts import Style, chat_ids, prompt_ids
from lorakit.decoding import Settings, context_of, decode
from lorakit.errors import LorakitError
from lorakit.generate import choose_style, open_to_ask, room
from lorakit.saved import Opened, find
from lorakit.terminal import say

_COMMANDS = {
    "/reset": "forget the conversation",
    "/base": "the base model answers",
    "/adapter": "the adapter answers",
    "/help": "this list",
    "/exit": "leave (also Ctrl-D)",
}


@dataclass
class Conversation:
    """The turns so far; a system turn, if there is one, stays."""

    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)  # user, assistant, user, ...

    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def add(self, role: str, text: str) -> None:
        self.turns.append({"role": role, "content": text})

    def fit(self, opened: Opened, wanted: int) -> tuple[list[int], int]:
        """(the prompt, how many of the oldest turns were forgotten so that `wanted` tokens may follow).

        At most a quarter of the context is kept free for the answer. The last turn is never forgotten.
        """
        context = context_of(opened)
        forgotten = 0
        ids = chat_ids(self.messages(), opened.tokenizer)
        while context is not None and len(self.turns) > 2 and len(ids) + min(wanted, context // 4) > context:
            del self.turns[:2]
            forgotten += 2
            ids = chat_ids(self.messages(), opened.tokenizer)
        return ids, forgotten


def chat(place: Path, settings: Settings, base: str | None = None, system: str | None = None) -> None:
    """Answers lines of standard input on standard output until they end; notes go to stderr.

    Raises: LorakitError when nothing trained lies at `place`; KeyboardInterrupt for Ctrl-C at the prompt.
    """
    saved = find(place)
    opened = open_to_ask(saved, base)
    style = choose_style(saved, opened, raw=False, system=system)
    talk = Talk(opened, settings, style, Conversation(system), speaker="model" if saved.full else "adapter")
    talk.prompt("A question")  # a template that refuses it is found now
    talk.conversation.turns.clear()
    say(f"the {talk.speaker} of {place} answers; {', '.join(_COMMANDS)}")
    if style != "chat":
        format_name = saved.provenance.get("format")
        why = f"it was trained on {format_name} rows" if format_name else "the tokenizer has no chat template"
        say(f"each line is a prompt of its own: {why}")
    while (line := _read_line()) is not None:
        if line.strip() and not talk.hear(line):
            return


@dataclass
class Talk:
    opened: Opened
    settings: Settings
    style: Style
    conversation: Conversation
    speaker: str  # who answers: adapter, base; model after full fine-tuning
    num_answers: int = 0

    def hear(self, line: str) -> bool:
        """Obey a command or answer; False: the user leaves."""
        word = line.strip()
        if not word.startswith("/"):
            self.answer(line)
        elif word == "/exit":
            return False
        elif word == "/reset":
            self.conversation.turns.clear()
            say("the conversation is forgotten")
        elif word in ("/base", "/adapter"):
            if self.opened.adapter is None:
                say(f"{word}: full fine-tuning moved the model itself; it alone can answer")
            else:
                self.speaker = word[1:]
                say(f"the {self.speaker} answers from here on")
        else:
            if word != "/help":
                say(f"{word}: no such command")
            say("\n".join(f"{name:<9} {what}" for name, what in _COMMANDS.items()))
        return True

    def prompt(self, line: str) -> tuple[list[int], int]:
        """(tokens to answer, turns forgotten for them); in a conversation `line` becomes its last turn."""
        if self.style != "chat":
            return prompt_ids(line, self.style, self.opened.tokenizer), 0
        self.conversation.add("user", line)
        return self.conversation.fit(self.opened, self.settings.max_new_tokens)

    def answer(self, line: str) -> None:
        """Print the answer as it comes. What was shown becomes part of the conversation, and nothing else."""
        before = list(self.conversation.turns)
        try:
            ids, forgotten = self.prompt(line)
            limit = room(self.opened, ids, self.settings, line)
        except LorakitError as error:
            say(str(error))
            self.conversation.turns = before
            return
        if forgotten:
            say(f"the conversation outgrew the context: its oldest {forgotten} turns are forgotten")
        adapter = self.opened.adapter if self.speaker == "base" else None
        with stoppable() as stop, adapter.disabled() if adapter else nullcontext():
            [text] = decode(
                self.opened,
                [ids],
                self.settings,
                [limit],
                numbers=[self.num_answers],
                on_text=_show,
                stopped=lambda: stop.requested,
            )
        _show("\n")
        self.num_answers += 1
        if stop.requested:
            say("stopped")
        if not text:
            say("the answer is empty")
            self.conversation.turns = before
        elif self.style == "chat":
            self.conversation.add("assistant", text)


def _show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _read_line() -> str | None:
    """A line of standard input, None at its end. A prompt is shown where somebody sits."""
    if not sys.stdin.isatty():
        line = sys.stdin.readline()
        return line.rstrip("\r\n") if line else None
    import readline  # noqa: F401  (line editing and history in input())

    try:
        return input("> ")
    except EOFError:
        _show("\n")
        return None


@dataclass
class Stopping:
    requested: bool = False


@contextmanager
def stoppable() -> Iterator[Stopping]:
    """Ctrl-C asks to stop after the next token; a second one is a KeyboardInterrupt at once."""
    stop = Stopping()

    def receive(number: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    before = signal.signal(signal.SIGINT, receive)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
