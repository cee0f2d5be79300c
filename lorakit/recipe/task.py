"""Section `task`: what is minimised."""

from typing import Any, Literal

from lorakit.recipe.section import Conflicts, Section, Written


class CausalLm(Section):
    """Next-token prediction: mean cross-entropy over the trained tokens of the whole step."""

    type: Literal["causal-lm"] = "causal-lm"
    """What is minimised."""

    train_on: Literal["auto", "completion", "assistant", "each-turn", "last-turn", "all"] = "auto"
    """Which tokens are trained. auto: the completion of pairs, the assistant's turns of chats, all of plain
    text. each-turn: every turn of the assistant as a sample of its own, given all before it as the chat
    template renders it in a prompt; for templates that rewrite earlier turns (thinking blocks)."""


Task = CausalLm

# What `train_on: auto` means for each data format, and which other values fit it.
TRAIN_ON = {
    "alpaca": "completion",
    "prompt-completion": "completion",
    "messages": "assistant",
    "sharegpt": "assistant",
    "labelled-text": "completion",
    "sentence-pair": "completion",
    "text-to-text": "completion",
    "text": "all",
}
FITTING = {"completion": ("completion",), "assistant": ("assistant", "each-turn", "last-turn"), "all": ()}


def fits(train_on: str, format_name: str) -> bool:
    """Whether rows of this format have what `train_on` names; a format that no table knows has all."""
    return format_name not in TRAIN_ON or train_on in ("auto", "all", *FITTING[TRAIN_ON[format_name]])


def conflicts(recipe: Any, written: Written) -> Conflicts:
    train_on, format_name = recipe.task.train_on, recipe.data.format
    if format_name != "auto" and not fits(train_on, format_name):
        yield "task.train_on", f"{train_on} does not fit data.format: {format_name}; auto fits every one"
