"""Prompts as tokens -> answers as text, in batches or word by word.

Decoding is greedy unless a temperature is given; the base's own generation_config (its temperature, its
penalties) has no part in it. A prompt is padded on the left, and has random numbers of its own: a function of
the seed and its place among the prompts. So a batch does not decide what is answered; in 16 bits it may still
decide a rounding.

Shapes: B prompts of a batch, T tokens with padding, V vocabulary.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from lorakit.data.prompts import end_of_turn
from lorakit.saved import Opened
from lorakit.terminal import track


@dataclass(frozen=True)
class Settings:
    max_new_tokens: int = 256
    temperature: float = 0.0  # 0: greedy
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    seed: int = 0
    batch_size: int = 16


def context_of(opened: Opened) -> int | None:
    """Most tokens of prompt and answer together; None: the configuration knows no limit."""
    return getattr(opened.base.config.get_text_config(), "max_position_embeddings", None)


def answer(
    opened: Opened,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    limits: Sequence[int],
    what: str,
) -> list[str]:
    """The model's answer to each prompt, of at most limits[i] >= 1 tokens, without special tokens.

    `what`: what the progress bar says.
    """
    answers = [""] * len(prompts)
    batches = batches_of([len(prompt) for prompt in prompts], limits, settings.batch_size, context_of(opened))
    for batch in track(batches, f"answers of {what}", total=len(batches)):
        told = decode(
            opened, [prompts[i] for i in batch], settings, [limits[i] for i in batch], numbers=batch
        )
        for i, text in zip(batch, told, strict=True):
            answers[i] = text
    return answers


def batches_of(
    lengths: Sequence[int], limits: Sequence[int], size: int, context: int | None
) -> list[list[int]]:
    """Indices of the prompts in batches of at most `size`, long prompts first.

    A row that has its answer goes on until the last one has: the longest prompt and the longest answer of a
    batch fit into the context together.
    """
    found: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        batch = found[-1] if found else []
        longest = lengths[batch[0]] if batch else 0
        most = max([limits[i], *(limits[other] for other in batch)])
        if not batch or len(batch) == size or (context is not None and longest + most > context):
            found.append([i])
        else:
            batch.append(i)
    return found


@torch.no_grad()
def decode(
    opened: Opened,
    prompts: Sequence[Sequence[int]],
    settings: Settings,
    limits: Sequence[int],
    numbers: Sequence[int],
    on_text: Callable[[str], None] | None = None,
    stopped: Callable[[], bool] = lambda: False,
) -> list[str]:
    """The answers to one batch. `numbers`: the random numbers of each prompt are those of its number.

    `on_text` gets the answer piece by piece (one prompt only); `stopped` is asked after each token.
    """
    model, tokenizer = opened.base.model, opened.tokenizer
    assert tokenizer is not None
    stops = stop_tokens(opened)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    input_ids, mask = left_padded(prompts, 0 if pad is None else pad)
    width = input_ids.shape[1]
    settled = GenerationConfig(
        do_sample=False,
        max_new_tokens=max(limits),
        eos_token_id=sorted(stops) or None,
        pad_token_id=0 if pad is None else pad,
        bos_token_id=tokenizer.bos_token_id,
    )
    streamer = None if on_text is None else _Stream(tokenizer, stops, on_text)
    with opened.autocast(), _in_place_of(model, settled):
        found = model.generate(
            input_ids=input_ids.to(opened.device),
            attention_mask=mask.to(opened.device),
            logits_processor=[_Draws(settings, numbers)] if settings.temperature > 0 else [],
            stopping_criteria=[_Limits(width, limits, stopped)],
            streamer=streamer,
        )
    rows = found[:, width:].tolist()
    return [_text(tokenizer, _until(row[:limit], stops)) for row, limit in zip(rows, limits, strict=True)]


def stop_tokens(opened: Opened) -> set[int]:
    """What ends an answer: the tokenizer's end, the model's, and the end of a turn in the chat template."""
    own = getattr(getattr(opened.base.model, "generation_config", None), "eos_token_id", None)
    tokenizer: Any = opened.tokenizer
    ends = [tokenizer.eos_token_id, end_of_turn(tokenizer), *(own if isinstance(own, list) else [own])]
    return {int(end) for end in ends if end is not None}


def left_padded(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """(token ids, 1 at real tokens), both (B, T): every prompt ends in the last column."""
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def draw(logits: Tensor, uniforms: Tensor, temperature: float, top_p: float) -> Tensor:
    """A token for each row, (B,), from softmax(logits / temperature) cut to its `top_p` likeliest mass.

    `logits` (B, V); `uniforms` (B,) in [0, 1), one per token: the inverse of the cumulative distribution
    there, tokens in order of falling probability. The likeliest token is never cut.
    """
    probabilities, order = torch.softmax(logits.double() / temperature, dim=-1).sort(dim=-1, descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities
    kept = probabilities.where((before < top_p) | (before == 0), 0.0)
    cumulative = kept.cumsum(dim=-1)
    place = (cumulative <= uniforms[:, None] * cumulative[:, -1:]).sum(dim=-1)
    place = place.clamp(max=(kept > 0).sum(dim=-1) - 1)
    return order.gather(1, place[:, None])[:, 0]


def _until(ids: Sequence[int], stops: set[int]) -> list[int]:
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids))
    return list(ids[:end])


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


@contextmanager
def _in_place_of(model: Any, config: GenerationConfig) -> Iterator[None]:
    """generate() fills what a configuration leaves open from the model's own, so that must go meanwhile."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


class _Draws:
    """A logits processor that leaves one token: the one that was drawn."""

    def __init__(self, settings: Settings, numbers: Sequence[int]) -> None:
        self.settings = settings
        self.sources = [random.Random(f"{settings.seed} {number}") for number in numbers]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        uniforms = torch.tensor([source.random() for source in self.sources], dtype=torch.float64)
        chosen = draw(scores, uniforms.to(scores.device), self.settings.temperature, self.settings.top_p)
        return torch.full_like(scores, float("-inf")).scatter(1, chosen[:, None], 0.0)


class _Limits:
    """A stopping criterion: the row has its tokens, or somebody asked to stop."""

    def __init__(self, width: int, limits: Sequence[int], stopped: Callable[[], bool]) -> None:
        self.width, self.limits, self.stopped = width, torch.tensor(limits), stopped

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = (input_ids.shape[1] - self.width >= self.limits) | self.stopped()
        return done.to(input_ids.device)


class _Stream:
    """A streamer: text as its tokens come, held back while its last character may be incomplete."""

    def __init__(self, tokenizer: Any, stops: set[int], on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.on_text = tokenizer, stops, on_text
        self.ids: list[int] | None = None  # None: the prompt comes first
        self.num_shown = 0

    def put(self, tokens: Tensor) -> None:
        if self.ids is None:
            self.ids = []
            return
        self.ids += tokens.flatten().tolist()
        text = _text(self.tokenizer, _until(self.ids, self.stops))
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        self._show(_text(self.tokenizer, _until(self.ids or [], self.stops)))

    def _show(self, text: str) -> None:
        if len(text) > self.num_shown:
            self.on_text(text[self.num_shown :])
            self.num_shown = len(text)
