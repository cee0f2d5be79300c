"""The material of the comparison: a tokenizer, a base of 1.3M parameters trained once, rows of two tasks.

All is made from the files named on the command line and the numbers in `BaseSize`, and kept in the work
directory, where base.json says what it was made from.
"""

import csv
import hashlib
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from claims.files import read_json, write_json

SPECIAL = ("<s>", "</s>")
HELD_OUT = 20  # every so many pieces of text is kept for the held-out loss
KEYS, VALUES = 64, 128  # words that keys, and values, are made of


@dataclass(frozen=True)
class BaseSize:
    """The base and what it is trained on."""

    hidden: int = 128
    layers: int = 4
    heads: int = 4
    mlp: int = 512
    vocabulary: int = 1024
    piece: int = 400  # characters of a row of text, at least
    steps: int = 1200
    batch: int = 16
    lr: float = 3e-3
    longest: int = 200  # characters of a row of the task; longer ones are left out


QUICK = BaseSize(hidden=64, layers=1, heads=2, mlp=64, vocabulary=300, steps=3, batch=4, longest=200)


# ------------------------------------------------------------------------------------------------------------
# Rows


def pieces(text: str, length: int) -> list[str]:
    """`text` cut at ends of lines into pieces of at least `length` characters, without a shorter last one."""
    found, held = [], ""
    for line in text.splitlines(keepends=True):
        held += line
        if len(held) >= length:
            found.append(held.strip())
            held = ""
    return found


def text_of(file: Path) -> str:
    """The text of a file; of a .json file, which holds a list of rows, all their strings, line by line."""
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".json":
        return text
    return "\n".join(value for row in json.loads(text) for value in row.values() if isinstance(value, str))


def task_rows(file: Path, longest: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(training rows, held-out rows) of a .csv file whose first column is the prompt and whose second one is
    the completion, without those of more than `longest` characters. No prompt is in both: an eighth of them,
    by their hash, is held out."""
    with file.open(newline="", encoding="utf-8") as opened:
        lines = list(csv.reader(opened))[1:]
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for prompt, completion, *_ in lines:
        row = {"prompt": f"{prompt} =", "completion": f" {completion}"}
        if len(row["prompt"] + row["completion"]) <= longest:
            parts[int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 8 == 0].append(row)
    return parts


def whole_words(tokens: Iterable[str]) -> list[str]:
    """The words of small letters that are one token each with the space before them, in byte-level tokens."""
    words = (token[1:] for token in tokens if token[0] == "Ġ")
    return sorted(word for word in words if word.isalpha() and word.islower())


def random_pairs(words: Sequence[str], number: int, length: int) -> list[dict[str, str]]:
    """`number` different keys of two random words of KEYS, each with `length` random words of VALUES: nothing
    can be learned but the pairs themselves, log2(VALUES) * length bits each."""
    draw = random.Random(0)
    keys = draw.sample([f" {one} {other}" for one in words[:KEYS] for other in words[:KEYS]], number)
    values = [" ".join(draw.choices(words[-VALUES:], k=length)) for _ in keys]
    return [{"prompt": key, "completion": f" {value}"} for key, value in zip(keys, values, strict=True)]


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------------------
# The base


def make_tokenizer(folder: Path, texts: Sequence[str], vocabulary: int) -> int:
    """Train a byte-level BPE with begin and end tokens, save it, and return its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder
    )
    return tokenizer.get_vocab_size()


def make_model(folder: Path, size: BaseSize, vocabulary: int) -> None:
    """A Llama of random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def base_recipe(size: BaseSize, work: Path) -> dict[str, Any]:
    """Pre-training: every weight moves, on rows of text."""
    return {
        "model": {"path": str(work / "random")},
        "adapter": {"method": "full"},
        "data": {
            "train": str(work / "text.jsonl"),
            "eval": str(work / "text-held-out.jsonl"),
            "format": "text",
            "max_length": 512,
            "on_long": "truncate",
        },
        "optimizer": {"lr": size.lr},
        "training": {"max_steps": size.steps, "batch_size": size.batch, "precision": "fp32"},
        "eval": {"every": size.steps},
        "checkpoint": {"every": size.steps},
        "output": str(work / "base-run"),
    }


def make(texts: Sequence[Path], tasks: Path, work: Path, size: BaseSize) -> dict[str, Any]:
    """Everything below `work`, unless it is there; returns what base.json holds, with the hash of the base.

    Raises: SystemExit where `work` holds a base of other files or sizes: its cells would be of another base.
    """
    sources = [hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in (*texts, tasks)]
    wanted = {"sources": sources, "size": asdict(size)}
    record = work / "base.json"
    if record.exists():
        found: dict[str, Any] = read_json(record)
        if {key: found[key] for key in wanted} != wanted:
            raise SystemExit(f"{work} was made from other files or sizes: name another --work, or delete it")
        return found
    work.mkdir(parents=True, exist_ok=True)
    text = [piece for file in texts for piece in pieces(text_of(file), size.piece)]
    train, held_out = task_rows(tasks, size.longest)
    write_rows(work / "text.jsonl", ({"text": p} for i, p in enumerate(text) if i % HELD_OUT))
    write_rows(work / "text-held-out.jsonl", ({"text": p} for p in text[::HELD_OUT]))
    write_rows(work / "task.jsonl", train)
    write_rows(work / "task-held-out.jsonl", held_out)
    # Of the text alone: a token that the base never saw could not be learned by an adapter of its layers.
    make_model(work / "random", size, make_tokenizer(work / "random", text, size.vocabulary))
    return _pretrained(work, size, wanted)


def _pretrained(work: Path, size: BaseSize, wanted: dict[str, Any]) -> dict[str, Any]:
    import lorakit

    recipe = work / "base.recipe.yaml"
    recipe.write_text(json.dumps(base_recipe(size, work)))  # JSON is YAML
    run = lorakit.train(recipe, resume="auto")
    shutil.rmtree(work / "base", ignore_errors=True)
    shutil.copytree(run / "model", work / "base")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in sorted((work / "base").glob("*.safetensors"))))
    params = read_json(run / "params.json")
    made = wanted | {
        "hash": digest.hexdigest()[:16],
        "parameters": params["total"],
        "held_out_loss": {"random": losses[0], "trained": losses[-1]},
    }
    write_json(work / "base.json", made)
    return made
