"""What is trained: settings, a model of random weights, its tokenizer, rows; and what a step must compute.

All of it is a function of a setting. Only the standard library is imported until something is made, so that
the process that starts the others stays small (a child's peak memory begins at its parent's).
"""

import hashlib
import json
import math
import random
import statistics
import time
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

RANK, ALPHA, LEARNING_RATE, SEED = 8, 16, 2e-4, 0
SPECIAL = ("<pad>", "</s>", "<unk>")


@dataclass(frozen=True)
class Setting:
    """A model shape, rows, and how they are trained."""

    name: str
    rows: int = 400
    shortest: int = 20  # tokens of a row, the end token among them
    longest: int = 500
    all_trained: bool = False  # text rows; else prompts and completions, of which completions are trained
    batch_size: int = 8  # rows per step
    dtype: str = "bf16"
    quantize: str = "none"
    checkpointing: bool = False
    everyone: bool = False  # run by every contestant; else by lorakit and the plain loop
    hidden: int = 512
    intermediate: int = 1408
    layers: int = 8
    heads: int = 8
    kv_heads: int = 8
    vocabulary: int = 32_000

    @property
    def steps(self) -> int:
        """Optimizer steps of one epoch."""
        return self.rows // self.batch_size


_SHORT = Setting("short", everyone=True)
_LONG = replace(_SHORT, rows=24, shortest=1500, longest=2000, batch_size=2, everyone=False)
_SOME = replace(_SHORT, rows=160, everyone=False)
_FULL = replace(_LONG, rows=12, shortest=2048, longest=2048, all_trained=True, batch_size=1)
CPU = (
    _SHORT,
    replace(_LONG, name="long"),
    replace(_FULL, name="packed"),
    replace(_SHORT, name="nf4", quantize="nf4"),
    replace(_SOME, name="fp32", dtype="fp32"),
    replace(_SOME, name="vocabulary", vocabulary=128_256),
    replace(_SOME, name="checkpointing", checkpointing=True),
)
_1B = replace(
    _FULL,
    hidden=2048,
    intermediate=8192,
    layers=16,
    heads=32,
    vocabulary=128_256,
    rows=80,
    batch_size=4,
    everyone=True,
)
_8B = replace(_1B, hidden=4096, intermediate=14_336, layers=32, checkpointing=True)
CUDA = tuple(
    replace(
        shape,
        name=f"{name}-{method}-{tokens}",
        quantize=quantize,
        shortest=tokens,
        longest=tokens,
        rows=shape.rows * 2048 // tokens,
        batch_size=shape.batch_size * 2048 // tokens,
    )
    for name, shape in (("1b", _1B), ("8b", _8B))
    for method, quantize in (("lora", "none"), ("qlora", "nf4"))
    for tokens in (2048, 8192)
)


# ------------------------------------------------------------------------------------------------------------
# Making it


def make(setting: Setting, folder: Path, device: str) -> dict[str, str]:
    """Model and rows of a setting below `folder`, each made once; returns their places.

    {"model": folder, "rows": folder}. The rows are rows.jsonl, which lorakit reads; ordered.jsonl and
    alpaca.json, the same in the order in which lorakit trains them; and lengths.json, [tokens, trained
    tokens] of every row in that order.
    """
    shape = {key: value for key, value in asdict(setting).items() if key in _SHAPE}
    model = _once(folder, f"model-{setting.hidden}-{setting.vocabulary}", shape, _make_model, device)
    wanted = {key: value for key, value in asdict(setting).items() if key in _ROWS}
    rows = _once(folder, f"rows-{setting.name}", wanted, _make_rows, str(model))
    return {"model": str(model), "rows": str(rows)}


_SHAPE = ("hidden", "intermediate", "layers", "heads", "kv_heads", "vocabulary")
_ROWS = ("rows", "shortest", "longest", "all_trained", "batch_size", "vocabulary")


def _once(folder: Path, name: str, wanted: dict[str, Any], maker: Any, *more: Any) -> Path:
    place, mark = folder / name, folder / name / "made.json"
    told = json.dumps([wanted, hashlib.sha256(Path(__file__).read_bytes()).hexdigest()])
    if not mark.exists() or mark.read_text() != told:
        place.mkdir(parents=True, exist_ok=True)
        maker(place, wanted, *more)
        mark.write_text(told)
    return place


def _make_model(folder: Path, shape: dict[str, int], device: str) -> None:
    """A Llama of random weights in bf16, untied, and a tokenizer with a token per word."""
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

    logging.disable_progress_bar()
    config = LlamaConfig(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        max_position_embeddings=8192,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        tie_word_embeddings=False,
    )
    torch.manual_seed(SEED)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        LlamaForCausalLM(config).save_pretrained(folder)
    words = (*SPECIAL, *(f"w{number}" for number in range(len(SPECIAL), shape["vocabulary"])))
    vocabulary = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[2]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    pad, end, unknown = SPECIAL
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token=unknown
    ).save_pretrained(folder)


def lengths_of(number: int, shortest: int, longest: int, draw: random.Random) -> list[int]:
    """Tokens of each row: log-normal around 120 where rows are short, even where they are long."""
    places = [(index + 0.5) / number for index in range(number)]
    if longest > 1000:
        found = [round(shortest + (longest - shortest) * place) for place in places]
    else:
        normal = statistics.NormalDist()
        found = [round(120 * math.exp(0.5 * normal.inv_cdf(place))) for place in places]
        found = [min(longest, max(shortest, length)) for length in found]
    draw.shuffle(found)
    return found


def _make_rows(folder: Path, wanted: dict[str, Any], model: str) -> None:
    """Words are drawn by Zipf's law; 53 % of a row's tokens are its completion."""
    from lorakit.data.batches import order
    from lorakit.data.tokens import Part

    draw, number = random.Random(SEED), wanted["rows"]
    words = [f"w{index}" for index in range(len(SPECIAL), wanted["vocabulary"])]
    weights = list(accumulate(1 / (rank + 3) for rank in range(len(words))))
    made: list[tuple[dict[str, str], list[int]]] = []
    for length in lengths_of(number, wanted["shortest"], wanted["longest"], draw):
        text = draw.choices(words, cum_weights=weights, k=length - 1)  # and the end token
        if wanted["all_trained"]:
            made.append(({"text": " ".join(text)}, [length, length - 1]))
            continue
        cut = min(length - 2, max(1, round(length * (1 - draw.uniform(0.24, 0.84)))))
        row = {"prompt": " ".join(text[:cut]), "completion": " " + " ".join(text[cut:])}
        made.append((row, [length, length - cut]))
    ordered = [made[index] for index in order((Part(0, number),), SEED, 0)]
    for name, rows in (("rows.jsonl", made), ("ordered.jsonl", ordered)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row, _ in rows))
    alpaca = [
        {"instruction": row.get("prompt", ""), "input": "", "output": row.get("completion", "") + SPECIAL[1]}
        for row, _ in ordered
    ]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "alpaca.json"}}))
    (folder / "lengths.json").write_text(json.dumps([counts for _, counts in ordered]))


# ------------------------------------------------------------------------------------------------------------
# What it costs


def parameters(setting: Setting) -> dict[str, int]:
    """Numbers of parameters: body (the linear layers), head, adapter."""
    heads_width = setting.hidden * setting.kv_heads // setting.heads
    layer = [(setting.hidden, setting.hidden)] * 2 + [(setting.hidden, heads_width)] * 2
    layer += [(setting.hidden, setting.intermediate)] * 3
    return {
        "body": setting.layers * sum(inside * outside for inside, outside in layer),
        "head": setting.hidden * setting.vocabulary,
        "adapter": setting.layers * sum(RANK * (inside + outside) for inside, outside in layer),
    }


def flops(setting: Setting, rows: list[list[int]]) -> float:
    """FLOPs that training on `rows` ([tokens, trained tokens] each) needs, with the base frozen:

    tokens (4 body + 6 adapter) + trained tokens 4 head + sum over rows of 6 layers hidden tokens^2

    A product with a frozen weight costs 2 per parameter forward and 2 for the gradient of its input; one with
    a trained weight 2 more. Causal attention has 2 products forward and 4 backward of 2 hidden tokens^2 / 2.
    Neither padding, nor prompts in the output head, nor anything that is computed twice counts.
    """
    number = parameters(setting)
    tokens, trained = sum(row[0] for row in rows), sum(row[1] for row in rows)
    attention = 6 * setting.layers * setting.hidden * sum(row[0] ** 2 for row in rows)
    return tokens * (4 * number["body"] + 6 * number["adapter"]) + trained * 4 * number["head"] + attention


def product_rate(dtype: str, device: str) -> float:
    """FLOP/s of a matrix product (2048 x 4096 x 4096; on CUDA 8192 each way): the best in two seconds."""
    import torch

    rows, inner = (2048, 4096) if device == "cpu" else (8192, 8192)
    options: dict[str, Any] = {
        "dtype": torch.bfloat16 if dtype == "bf16" else torch.float32,
        "device": device,
    }
    a, b = torch.randn(rows, inner, **options), torch.randn(inner, inner, **options)
    out, best = torch.empty(rows, inner, **options), math.inf
    start = time.perf_counter()
    while (began := time.perf_counter()) < start + 2:
        torch.mm(a, b, out=out)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * rows * inner * inner / best
