"""Answers of a trained model, of its base, or of both side by side.

How a prompt becomes tokens is data/prompts.py's matter, how tokens become an answer decoding.py's.
"""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.data.prompts import Style, prompt_ids, style_of
from lorakit.decoding import Settings, answer, context_of
from lorakit.devices import pick_device
from lorakit.errors import LorakitError
from lorakit.saved import Opened, Saved, find, open_saved
from lorakit.signals import listen

Which = Literal["trained", "base", "both"]


@dataclass(frozen=True)
class Answers:
    """Of one model to all prompts, or of two."""

    prompts: tuple[str, ...]
    by: dict[str, list[str]]  # "base", "adapter" or "model" -> an answer to each prompt, as it came

    def as_list(self) -> list[dict[str, str]]:
        alone = next(iter(self.by)) if len(self.by) == 1 else None
        names = {name: "answer" if name == alone else name for name in self.by}
        return [
            {"prompt": prompt, **{names[name]: answers[i] for name, answers in self.by.items()}}
            for i, prompt in enumerate(self.prompts)
        ]

    def as_text(self) -> str:
        """The answer alone where there is one, else a block for each prompt; outer white space left out."""
        if len(self.prompts) == 1 and len(self.by) == 1:
            return next(iter(self.by.values()))[0].strip()
        blocks = []
        for i, prompt in enumerate(self.prompts):
            lines = [("prompt", prompt), *((name, answers[i]) for name, answers in self.by.items())]
            blocks.append("\n".join(f"{name:<9} " + _indented(text.strip()) for name, text in lines))
        return "\n\n".join(blocks)


def _indented(text: str) -> str:
    return text.replace("\n", "\n" + " " * 10)


def generate(
    place: Path,
    prompts: Sequence[str],
    settings: Settings,
    which: Which = "trained",
    base: str | None = None,
    raw: bool = False,
    system: str | None = None,
) -> Answers:
    """The answers of what lies at `place` (a run or an adapter), of its base, or of both.

    `base`: where the base model is, if not where it was. `raw`: prompts as they stand, whatever it was
    trained on. Raises: LorakitError for a call that cannot be answered, before anything is generated.
    """
    saved = find(place)
    if saved.full and which != "trained":
        raise LorakitError(
            f"{saved.folder}: full fine-tuning moved the base model itself: there is no base in it to ask",
            "Leave out --base and --compare. lorakit eval compares the two.",
        )
    with listen():  # a Ctrl-C is never dropped
        return _generate(saved, prompts, settings, which, base, raw, system)


def _generate(
    saved: Saved,
    prompts: Sequence[str],
    settings: Settings,
    which: Which,
    base: str | None,
    raw: bool,
    system: str | None,
) -> Answers:
    opened = open_to_ask(saved, base)
    style = choose_style(saved, opened, raw, system)
    ids = [prompt_ids(prompt, style, opened.tokenizer, system) for prompt in prompts]
    limits = [room(opened, ids_, settings, prompt) for prompt, ids_ in zip(prompts, ids, strict=True)]
    by = {}
    if which != "trained":
        assert opened.adapter is not None
        with opened.adapter.disabled():
            by["base"] = answer(opened, ids, settings, limits, "base")
    if which != "base":
        name = "model" if saved.full else "adapter"
        by[name] = answer(opened, ids, settings, limits, name)
    return Answers(tuple(prompts), by)


# ------------------------------------------------------------------------------------------------------------
# Before


def settings_of(
    max_new_tokens: int, temperature: float, top_p: float | None, seed: int | None, batch_size: int = 1
) -> Settings:
    """Settings as a user gave them. Raises: LorakitError for an option that has no effect, or no meaning."""
    for name, value in (("--top-p", top_p), ("--seed", seed)):
        if value is not None and temperature == 0:
            raise LorakitError(f"{name}: has no effect on greedy answers", "Add --temperature, e.g. 0.7.")
    if top_p is not None and not 0 < top_p <= 1:
        raise LorakitError(f"--top-p {top_p}: expected a probability above 0, 1 at most")
    if not math.isfinite(temperature):
        raise LorakitError(f"--temperature {temperature}: expected a number")
    return Settings(max_new_tokens, temperature, 1.0 if top_p is None else top_p, seed or 0, batch_size)


def read_prompts(texts: Sequence[str], file: str | None) -> list[str]:
    """`texts`, then the lines of `file` ("-": standard input) that are not blank.

    Raises: LorakitError when there is none, or the file cannot be read.
    """
    found = list(texts)
    if file is not None:
        try:
            raw = sys.stdin.read() if file == "-" else Path(file).expanduser().read_text("utf-8-sig")
        except OSError as error:
            raise LorakitError(f"-f {file}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise LorakitError(f"-f {file}: not UTF-8 text") from None
        found += [line for line in raw.split("\n") if line.strip()]
    if not found:
        what = f"-f {file}: no prompt in it" if file is not None else "no prompt"
        raise LorakitError(what, "Give -p TEXT, or -f FILE with one prompt per line.")
    return found


def open_to_ask(saved: Saved, base: str | None) -> Opened:
    """The trained model, with a tokenizer. Raises: LorakitError, also where it has none."""
    if saved.full and base is not None:
        raise LorakitError(f"{saved.folder} is the whole model: another base has no effect on it")
    opened = open_saved(saved, base, pick_device())
    if opened.tokenizer is None:
        raise LorakitError(
            f"{opened.folder} has no tokenizer, so that it can be given no text",
            "Put tokenizer.json and tokenizer_config.json beside its config.json.",
        )
    return opened


def choose_style(saved: Saved, opened: Opened, raw: bool, system: str | None) -> Style:
    """As it was trained, unless `raw`. Raises: LorakitError for a system turn where there are no turns."""
    format_name = saved.provenance.get("format")
    style = "text" if raw else style_of(format_name, opened.tokenizer)
    if system is not None and style != "chat":
        trained = f"it was trained on {format_name} rows" if format_name else "it has no chat template"
        raise LorakitError(
            f"--system: the prompt is given as plain text ({'--raw' if raw else trained}), without turns"
        )
    return style


def room(opened: Opened, ids: Sequence[int], settings: Settings, prompt: str) -> int:
    """How many tokens the answer may have. Raises: LorakitError for a prompt that leaves room for none."""
    shown = prompt if len(prompt) <= 40 else prompt[:40] + "..."
    if not ids:
        raise LorakitError("the prompt has no tokens", "This tokenizer begins no text by itself: write some.")
    context = context_of(opened)
    if context is not None and len(ids) >= context:
        raise LorakitError(
            f'the prompt "{shown}" has {len(ids):,} tokens; the model\'s context is {context:,}, and the'
            " answer needs one at least",
            f"Shorten it by {len(ids) - context + 1:,} tokens or more.",
        )
    return settings.max_new_tokens if context is None else min(settings.max_new_tokens, context - len(ids))
