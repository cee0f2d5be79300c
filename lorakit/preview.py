"""What trains is what you saw: the tokens of samples, which of them are trained, and the account of the
rows.

A piece is what can be shown of tokens: one token, or several that share a character. The pieces of a sample
together are its decoded text. Data are the work of others: what a terminal or a browser would act on instead
of showing it is written as an escape.
"""

import io
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit import data, model_files
from lorakit.data.account import Account, table
from lorakit.data.render import check_tokenizer
from lorakit.recipe import Recipe
from lorakit.terminal import signs, visible
from lorakit.tokenizer import load_tokenizer, quiet
from lorakit.validate import check_code

if TYPE_CHECKING:
    from rich.text import Text

STYLES = {  # of rich, for a terminal
    "plain": "",
    "head": "bold",
    "sign": "cyan",
    "masked": "dim",
    "masked special": "yellow reverse",
    "masked sign": "dim cyan",
    "trained": "bold green",
    "trained special": "bold green reverse",
    "trained sign": "bold cyan",
}
BEGIN, END, CUT = "⊢", "⊣", "⋯"
_HALF = "\N{REPLACEMENT CHARACTER}"  # what an unfinished character is decoded to


@dataclass(frozen=True)
class Piece:
    text: str
    ids: tuple[int, ...]
    weights: tuple[int, ...]
    special: bool  # one of the tokenizer's added tokens, not made of bytes or letters

    @property
    def kind(self) -> str:
        return "trained" if any(self.weights) else "masked"


@dataclass(frozen=True)
class Shown:
    """One sample."""

    source: str  # file:row
    which: str  # "first", "longest", "shortest", "random", or nothing where all are shown
    ids: list[int]
    weights: list[int]
    text: str  # as decoded, special tokens included
    pieces: list[Piece]
    cut: bool  # data.on_long: truncate took its end
    ends: bool  # an end token is trained

    def facts(self) -> str:
        trained, number = sum(self.weights), len(self.ids)
        share = f"{number:,} tokens, {trained:,} trained ({100 * trained / number:.1f} %)"
        cut = "; cut at data.max_length" if self.cut else ""
        return share + cut + ("" if self.ends else "; no end token is trained")


@dataclass(frozen=True)
class Preview:
    name: str  # of the recipe
    train: data.Loaded
    held_out: data.Loaded | None
    samples: list[Shown]  # in the order of the rows

    def parts(self) -> list[tuple[str, Account]]:
        found = [("training", self.train.account)]
        return [*found, ("held out", self.held_out.account)] if self.held_out else found

    def facts(self) -> list[str]:
        """What a row looks like and, of a stream, how much of it was read."""
        found = [f"format  {self.train.format} ({self.train.why})"]
        first = f"stream  counted and shown are its first {self.train.account.read:,} rows"
        return [*found, first] if self.train.stream else found

    def as_dict(self) -> dict[str, Any]:
        keys = ("source", "ids", "weights", "text")
        return {
            "rows": self.train.account.rows(),
            "eval_rows": self.held_out.account.rows() if self.held_out else None,
            "samples": [{key: getattr(sample, key) for key in keys} for sample in self.samples],
        }

    def as_text(self) -> str:
        """Without colours: trained tokens stand in [[double brackets]], as runs."""
        shown, inside = [], False
        for text, style in self._parts("[[trained]]"):
            trained = style.startswith("trained")
            shown += [("[[" if trained else "]]") if trained is not inside else "", text]
            inside = trained
        return "".join(shown)

    def styled(self) -> "Text":
        """The same in colours, for a terminal."""
        from rich.text import Text

        runs = groupby(self._parts(""), lambda part: part[1])
        return Text.assemble(*(("".join(text for text, _ in run), STYLES[style]) for style, run in runs))

    def show(self) -> None:
        """To stdout, in colours where somebody looks and has not set NO_COLOR."""
        if isinstance(sys.stdout, io.TextIOWrapper):  # one that cannot say ⊢ says \u22a2
            sys.stdout.reconfigure(errors="backslashreplace")
        dumb = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
        if dumb or not sys.stdout.isatty():
            print(self.as_text())
            return
        from rich.console import Console

        Console(force_terminal=True, highlight=False).print(self.styled(), soft_wrap=True)

    def _parts(self, brackets: str) -> Iterator[tuple[str, str]]:
        """(text, its style), of which the whole preview is made. `brackets`: how trained tokens are known
        where there are no colours."""
        for line in (*self.facts(), "", *table(self.parts())):
            yield f"{visible(line)}\n", "plain"
        if brackets:
            yield f"\n{brackets}", "plain"
        else:
            yield "\n", "plain"
            for style in ("trained", "masked", "masked special"):
                yield style.removeprefix("masked "), style
                yield "  ", "plain"
        yield f"  {BEGIN} begin  {END} end  {CUT} cut  ↵ line end  → tab  \\x1b what cannot be seen", "sign"
        for sample in self.samples:
            which = f" ({sample.which})" if sample.which else ""
            yield f"\n\n--- {visible(sample.source)}{which}: {sample.facts()}\n", "head"
            yield BEGIN, "sign"
            for piece in sample.pieces:
                for text, is_sign in signs(piece.text):
                    kind = " sign" if is_sign else " special" if piece.special else ""
                    yield text, piece.kind + kind
            yield CUT if sample.cut else END, "sign"


# ------------------------------------------------------------------------------------------------------------
# What is shown


def preview(recipe: Recipe, number: int, trust_remote_code: bool = False) -> Preview:
    """`number` samples of the training rows and the account of all rows. Loads no weights.

    All samples where `number` covers them; the first for 1; else the longest, the shortest and random ones,
    drawn by training.seed.
    """
    check_code(recipe, trust_remote_code)
    quiet()
    folder = model_files.locate(recipe.model, weights=False)
    tokenizer = load_tokenizer(folder, recipe.model, recipe.data.chat_template)
    check_tokenizer(tokenizer)
    train, held_out = data.load_parts(recipe, tokenizer)
    tokens = train.tokens
    chosen = choose(tokens.lengths, number, recipe.training.seed)
    cut, ends = tokens.column("cut"), tokens.column("ends")
    special = set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)

    def decode(ids: Sequence[int]) -> str:
        return str(
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            if ids
            else ""
        )

    samples = []
    for index, which in chosen.items():
        ids, weights = (array.tolist() for array in tokens.sample(index))
        pieces = pieces_of(decode, ids, weights, special)
        place, text = tokens.places[index], decode(ids)
        samples.append(Shown(place, which, ids, weights, text, pieces, bool(cut[index]), bool(ends[index])))
    return Preview(recipe.file.name, train, held_out, samples)


def choose(lengths: np.ndarray, number: int, seed: int) -> dict[int, str]:
    """Sample -> why it is shown, in ascending order; a pure function of its arguments."""
    samples = range(len(lengths))
    if number == 1 or len(samples) == 1:
        return {0: "first"}
    longest, shortest = int(np.argmax(lengths)), int(np.argmin(lengths))
    if longest == shortest:  # all alike
        longest, shortest = 0, 1
    chosen = {longest: "longest", shortest: "shortest"}
    if number >= len(samples):
        chosen = dict.fromkeys(samples, "") | chosen
    else:
        drawn = random.Random(seed).sample(samples, number)
        others = [i for i in drawn if i not in chosen][: number - 2]
        chosen |= dict.fromkeys(others, "random")
    return dict(sorted(chosen.items()))


def pieces_of(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], weights: Sequence[int], special: Set[int]
) -> list[Piece]:
    """The pieces of a sample: each id is in one of them, and their texts together are decode(ids).

    A token is decoded with a few before it, which is what nearly every decoder looks at; where that does not
    add up to the whole text, with all before it.
    """
    spans = _spans(decode, ids, special, whole=False)
    if "".join(text for _, _, text in spans) != decode(ids):
        spans = _spans(decode, ids, special, whole=True)
    return [
        Piece(text, tuple(ids[a:b]), tuple(weights[a:b]), b - a == 1 and ids[a] in special)
        for a, b, text in spans
    ]


def _spans(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], special: Set[int], whole: bool
) -> list[tuple[int, int, str]]:
    """(first token, one past the last, what they add to the text before them) of every piece.

    `whole`: a later token may change the text of earlier ones, which then become one piece with it.
    """
    found: list[tuple[int, int, str]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        first = 0 if whole or len(found) < 3 else found[-3][0]
        before, after = decode(ids[first:start]), decode(ids[first:end])
        while whole and not after.startswith(before):
            start = found.pop()[0]
            before = decode(ids[:start])
        text = after.removeprefix(before)
        complete = after.startswith(before) and text != "" and not text.endswith(_HALF)
        if complete or end == len(ids) or ids[end] in special:
            found.append((start, end, text))
            start = end
    return found
