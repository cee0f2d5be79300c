"""Make a tiny model, its tokenizer, data and a recipe: enough to run all of lorakit in seconds, from nothing.

    python scripts/make_tiny.py build/tiny

The model is a Llama with random weights and the tokenizer is trained on the sentences below, so that nothing
is downloaded. The data are questions about a made-up town, written from a grammar; the same seed gives the
same bytes.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

PLACES = ("bakery", "library", "harbour", "school", "museum", "market", "bridge", "garden")
OWNERS = ("Ada", "Bruno", "Clara", "Dario", "Elif", "Farid", "Greta", "Hugo")
TIMES = ("at dawn", "at eight", "at noon", "after lunch", "at five", "at dusk")

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

RECIPE = """\
# A smoke test: a tiny random model learns when the places of a town open. Seconds on a CPU.
model: {path: model}
adapter: {method: lora, rank: 8}
data: {train: train.jsonl, eval: eval.jsonl, max_length: 128}
optimizer: {lr: 1e-2}
training: {epochs: 8, batch_size: 16}
eval: {every: 20}
checkpoint: {every: 20}
log: {every: 10}
output: run
"""


def rows(seed: int, number: int) -> list[dict[str, str]]:
    """{"prompt", "completion"}: the owner decides the time, so that there is something to learn."""
    draw = random.Random(seed)
    made = []
    for _ in range(number):
        place, owner = draw.choice(PLACES), draw.choice(OWNERS)
        when = TIMES[(len(owner) + len(place)) % len(TIMES)]
        made.append(
            {
                "prompt": f"When does {owner} open the {place}?",
                "completion": f" {owner} opens the {place} {when}.",
            }
        )
    return made


def make_tokenizer(folder: Path) -> Any:
    """A byte-level BPE of about 400 tokens with begin, end and role tokens and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows(0, 500)), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def make_model(folder: Path, vocabulary: int) -> None:
    """A Llama of about 60,000 parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def make(folder: Path) -> Path:
    """All of it below `folder`; returns the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = make_tokenizer(folder / "model")
    make_model(folder / "model", len(tokenizer))
    for name, seed, number in (("train", 1, 240), ("eval", 2, 40)):
        lines = [json.dumps(row) for row in rows(seed, number)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "recipe.yaml").write_text(RECIPE)
    return folder / "recipe.yaml"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    print(make(parser.parse_args().folder))
