"""The tokenizer of a model directory. It needs no torch."""

import logging
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError, did_you_mean
from lorakit.recipe.data import is_template
from lorakit.recipe.model import Model


def quiet() -> None:
    """Say only what a user must act on; lorakit reports what it does itself."""
    logging.disable(logging.WARNING)  # it speaks while it is imported
    import transformers

    logging.disable(logging.NOTSET)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"(peft|bitsandbytes|transformers|torch|accelerate)\..*")


def without_torch(section: Model) -> None:
    """This process never imports torch, and starts in a second instead of three.

    transformers imports torch for a tokenizer too, wherever it finds it. None in sys.modules is Python's own
    way to say that there is no such module. Nothing is done where one of the two is imported already, or
    where the model's own code may want torch.
    """
    if not section.trust_remote_code and not {"torch", "transformers"} & set(sys.modules):
        sys.modules["torch"] = None  # type: ignore[assignment]


def load_tokenizer(folder: Path, section: Model, chat_template: str | None) -> Any:
    """The tokenizer of a model directory, with the recipe's chat template (text or a file) in place of its
    own."""
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=section.trust_remote_code
        )
    except Exception as error:  # the tokenizers library raises bare Exception
        raise LorakitError(
            f"model.path: no tokenizer can be loaded from {folder}: {str(error).splitlines()[0][:200]}",
            "tokenizer.json and tokenizer_config.json must lie beside config.json.",
        ) from None
    if chat_template is not None:
        tokenizer.chat_template = template_text(chat_template)
    _check_template(tokenizer, "the tokenizer's own" if chat_template is None else chat_template)
    return tokenizer


def token_ids(tokenizer: Any, tokens: Sequence[str | int]) -> tuple[list[int], list[str]]:
    """(the numbers of `tokens`, in order; what is wrong with them): each is a text that is one token, or a
    number."""
    vocabulary: dict[str, int] = tokenizer.get_vocab() if tokens else {}
    found: dict[int, str | int] = {}
    problems = []
    for token in tokens:
        number = token if isinstance(token, int) else _number_of(tokenizer, vocabulary, token)
        if number is None:
            # Of a vocabulary of 150,000 only what begins alike and is as long.
            alike = [t for t in vocabulary if t[:1] == str(token)[:1] and abs(len(t) - len(str(token))) < 3]
            larger = "A token that it lacks needs a larger vocabulary, which lorakit does not make."
            told = [f'"{token}" is not one token of this tokenizer.', did_you_mean(str(token), alike), larger]
            problems.append(" ".join(filter(None, told)))
        elif number in found:
            problems.append(f"{token!r} and {found[number]!r} are the same token")
        else:
            found[number] = token
    return list(found), problems


def _number_of(tokenizer: Any, vocabulary: Mapping[str, int], text: str) -> int | None:
    if text in vocabulary:
        return vocabulary[text]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]  # " the" is "Ġthe" in the vocabulary
    return int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _check_template(tokenizer: Any, name: str) -> None:
    """Raises: LorakitError for a chat template that is no Jinja, which no row is to blame for."""
    from jinja2 import TemplateSyntaxError

    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "A"}], tokenize=False)
    except TemplateSyntaxError as error:
        name = "as the recipe writes it" if is_template(name) else name
        raise LorakitError(f"data.chat_template: {name}: line {error.lineno}: {error.message}") from None
    except Exception:  # none at all, or one that refuses this conversation
        return


def template_text(chat_template: str | None) -> str | None:
    """A recipe's chat template as text: as it stands, or out of the file that it names."""
    if chat_template is None or is_template(chat_template):
        return chat_template
    try:
        return Path(chat_template).read_text()
    except OSError as error:
        raise LorakitError(f"data.chat_template: {chat_template}: {error.strerror}") from None
