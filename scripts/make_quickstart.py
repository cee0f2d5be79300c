"""Make the base model, tokenizer and data of recipes/quickstart from a grammar, and from nothing else.

    OMP_NUM_THREADS=1 python scripts/make_quickstart.py [FOLDER]

The world is Tidewick, a town by the sea where people leave things for each other. The base model is
pretrained here on what is said there: who does what, notes like "Ada left 3 plums for Hugo at the bridge on
Monday." with an answer in prose, and the books of market and ferry, which enter sales and trips as JSON. It
reads notes and talks about them; it never saw a note become a record. That is what the adapter learns:

    {"from": "Ada", "to": "Hugo", "item": "plums", "count": 3, "place": "bridge", "day": "Monday"}

Two people of a held-out row never meet in train.jsonl: getting one right takes reading, not remembering. Text
and tokenizer are the same bytes everywhere, weights on the same processor and versions. A few minutes on one
core.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent.parent / "recipes" / "quickstart"

PEOPLE = {  # name: (trade, where, pet)
    "Ada": ("baker", "bakery", "cat"),
    "Bruno": ("fisherman", "harbour", "gull"),
    "Clara": ("teacher", "school", "parrot"),
    "Dario": ("miller", "mill", "donkey"),
    "Elif": ("librarian", "library", "tortoise"),
    "Farid": ("grocer", "market", "dog"),
    "Greta": ("gardener", "garden", "goat"),
    "Hugo": ("ferryman", "bridge", "duck"),
    "Ines": ("painter", "museum", "canary"),
    "Jonas": ("innkeeper", "inn", "hen"),
    "Kaya": ("smith", "forge", "pony"),
    "Lena": ("clockmaker", "tower", "owl"),
}
NAMES = tuple(PEOPLE)
PLACES = tuple(place for _, place, _ in PEOPLE.values())
ITEMS = (
    *("apples", "books", "candles", "eggs", "jars", "keys", "lamps", "lemons"),
    *("letters", "loaves", "nets", "onions", "plums", "ropes", "shells", "tiles"),
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

NOTES = (
    "{sender} left {count} {item} for {to} at the {place} on {day}.",
    "{to} can fetch {count} {item} from {sender} at the {place} on {day}.",
    "On {day} {sender} brings {count} {item} to the {place} for {to}.",
    "{to}, {sender} has {count} {item} for you at the {place} on {day}.",
    "At the {place} are {count} {item} for {to}, {sender} put them there on {day}.",
    "Please tell {to} to pick up the {count} {item} of {sender} on {day} at the {place}.",
)
REPLIES = (
    "I will tell {to} that {sender} left {count} {item} at the {place} on {day}.",
    "How kind of {sender}! {to} will find the {count} {item} at the {place} on {day}.",
    "{count} {item} from {sender} to {to}, at the {place} on {day}. Good to know!",
)
FOLLOW_UPS = (
    ("Who is it from?", "It is from {sender}."),
    ("Who is it for?", "It is for {to}."),
    ("How many?", "{count}, if {sender} counted well."),
    ("Where?", "At the {place}."),
    ("When?", "On {day}."),
)

SALES = (
    "{sender} sold {count} {item} to {to} at the {place} on {day}.",
    "On {day} {to} bought {count} {item} from {sender} at the {place}.",
    "{count} {item} went from {sender} to {to} on {day}, at the {place}.",
)

Turns = list[dict[str, str]]


def held_out_pair(sender: str, to: str) -> bool:
    """Whether these two meet in held-out rows and never in training rows: one pair in six."""
    return (NAMES.index(sender) + NAMES.index(to)) % 6 == 0


def delivery(draw: random.Random) -> dict[str, Any]:
    """Who leaves what for whom, where and when."""
    sender, to = draw.sample(NAMES, 2)
    goods = {"item": draw.choice(ITEMS), "count": draw.randint(2, 20)}
    return {"sender": sender, "to": to, **goods, "place": draw.choice(PLACES), "day": draw.choice(DAYS)}


def chat(*texts: str) -> Turns:
    """User and assistant in turn."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def rows(seed: int, number: int, held_out: bool) -> list[dict[str, Turns]]:
    """The task: a note and its record, no note twice. A training row may go on with more notes or with a chat
    about the town, so that the adapter can be talked to; a held-out row is one note."""
    draw, seen, made = random.Random(seed), set(), []

    def exchange() -> tuple[str, str]:
        while True:
            facts, shape = delivery(draw), draw.choice(NOTES)
            note = shape.format(**facts)
            if note not in seen and held_out_pair(facts["sender"], facts["to"]) == held_out:
                seen.add(note)
                record = {"from" if key == "sender" else key: value for key, value in facts.items()}
                return note, json.dumps(record)

    for _ in range(number):
        more = 0 if held_out else draw.randrange(4)
        others = [town_talk(draw) if draw.random() < 0.4 else exchange() for _ in range(more)]
        turns = [exchange(), *others]
        draw.shuffle(turns)
        made.append({"messages": chat(*(text for turn in turns for text in turn))})
    return made


# ------------------------------------------------------------------------------------------------------------
# What the base reads


def town_talk(draw: random.Random) -> tuple[str, str]:
    """A question about the town and its answer."""
    name = draw.choice(NAMES)
    trade, place, pet = PEOPLE[name]
    return draw.choice(
        (
            ("Hello!", "Hello! What would you like to know about Tidewick?"),
            ("Who are you?", "I am the voice of Tidewick, a small town by the sea."),
            ("Thank you!", "You are welcome. Come and see us in Tidewick!"),
            (f"Who is {name}?", f"{name} is the {trade} of Tidewick."),
            (f"What does {name} do?", f"{name} is a {trade} and works at the {place}."),
            (f"Where does {name} work?", f"{name} works at the {place}."),
            (f"Does {name} have a pet?", f"Yes, {name} has a {pet}."),
            (f"Who has a {pet}?", f"The {pet} is {name}'s."),
            (f"Who is the {trade}?", f"{name} is the {trade} of Tidewick."),
            (f"Who works at the {place}?", f"{name} the {trade} works at the {place}."),
            (f"When does the {place} open?", f"The {place} opens at {opens(place)}. Ask for {name}!"),
            (f"Tell me about {name}.", story(name)),
            (f"Tell me about the {place}.", f"It opens at {opens(place)}, and {name} the {trade} is there."),
        )
    )


def story(name: str) -> str:
    trade, place, pet = PEOPLE[name]
    return f"{name} is the {trade} of Tidewick. A {pet} lives at the {place}, which opens at {opens(place)}."


def opens(place: str) -> str:
    return ("six", "seven", "eight", "nine", "ten", "noon")[PLACES.index(place) % 6]


def conversation(draw: random.Random) -> Turns:
    """About a note, or about the town."""
    if draw.random() < 0.3:
        return chat(*(text for _ in range(draw.randint(1, 3)) for text in town_talk(draw)))
    facts = delivery(draw)
    told = [draw.choice(NOTES), draw.choice(REPLIES)]
    asked = draw.sample(FOLLOW_UPS, draw.randint(0, 4))
    return chat(*(text.format(**facts) for text in (*told, *(t for pair in asked for t in pair))))


def book(draw: random.Random) -> str:
    """A page of the market's or the ferry's book: what was told, and below it what is entered."""
    facts = delivery(draw)
    if draw.random() < 0.7:
        told = draw.choice(SALES)
        fields = {"seller": facts["sender"], "buyer": facts["to"]}
        fields |= {key: facts[key] for key in ("item", "count", "place", "day")}
    else:
        told = "On {day} the ferry takes {count} people from the {from} to the {to}."
        facts["from"], facts["to"] = draw.sample(PLACES, 2)
        fields = {key: facts[key] for key in ("day", "count", "from", "to")}
    return f"{told.format(**facts)}\n{json.dumps(fields)}"


def documents(seed: int, tokenizer: Any) -> Iterator[str]:
    """Without end: conversations in the chat template, stories, pages of a book."""
    draw = random.Random(seed)
    while True:
        kind = draw.random()
        if kind < 0.65:
            yield tokenizer.apply_chat_template(conversation(draw), tokenize=False)
        else:
            text = book(draw) if kind < 0.95 else story(draw.choice(NAMES))
            yield f"{tokenizer.bos_token}{text}{tokenizer.eos_token}"


# ------------------------------------------------------------------------------------------------------------
# Tokenizer and model

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role not in ('user', 'assistant') %}"
    "{{ raise_exception('this model knows the roles user and assistant, not ' + m.role) }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>"]
PAD, BOS, EOS, USER, ASSISTANT = range(len(SPECIAL))  # their ids


def make_tokenizer(folder: Path) -> Any:
    """A byte-level BPE that holds the town's words whole, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=768,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    draw = random.Random(0)
    said = [turn["content"] for _ in range(3000) for turn in conversation(draw)]
    tokenizer.train_from_iterator(said + [book(draw) for _ in range(1000)], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=512
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def make_model(folder: Path, tokenizer: Any, steps: int = 1200, batch: int = 32, lr: float = 3e-3) -> None:
    """Pretrain a Llama of about 400,000 parameters: next-token loss over documents, AdamW, one thread."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_num_threads(1)  # sums in another order give other weights
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
        initializer_range=0.08,
    )
    model = LlamaForCausalLM(config)
    print(f"{model.num_parameters():,} parameters")
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
    texts = documents(1, tokenizer)
    for step in range(steps):
        ids = tokenizer(
            [next(texts) for _ in range(batch)], add_special_tokens=False, padding=True, return_tensors="pt"
        )["input_ids"]
        # Nobody can foresee what a user says, and trying to makes all names, days and wares look alike.
        users_turn = (ids == USER).cumsum(1) > (ids == ASSISTANT).cumsum(1)
        # Padding stands on the right, where causal attention does not see it.
        labels = ids.masked_fill(users_turn | (ids == PAD), -100)
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}/{steps}  loss {loss.item():.4f}", flush=True)
    model.save_pretrained(folder)


def make_data(folder: Path) -> None:
    """train.jsonl and held_out.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, seed, number in (("train", 1, 400), ("held_out", 2, 100)):
        lines = [json.dumps(row) for row in rows(seed, number, held_out=name == "held_out")]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def make(folder: Path) -> None:
    """Data, tokenizer and model below `folder`; recipe.yaml is written by hand and left alone."""
    make_data(folder)
    make_model(folder / "model", make_tokenizer(folder / "model"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=HERE)
    make(parser.parse_args().folder)
