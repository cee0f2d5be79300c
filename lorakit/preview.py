"""What trains is what you saw: the tokens of samples, which of them are trained, and the account of the
rows."""

from dataclasses import dataclass
from typing import Any

from lorakit import base_model, data, model_files
from lorakit.data.render import check_tokenizer
from lorakit.recipe import Recipe


@dataclass(frozen=True)
class Preview:
    rows: dict[str, int]
    eval_rows: dict[str, int] | None
    samples: list[dict[str, Any]]  # {"source", "ids", "weights", "text", "tokens"}
    format: str
    why: str
    num_tokens: int
    num_trained: int

    def as_dict(self) -> dict[str, Any]:
        samples = [
            {key: sample[key] for key in ("source", "ids", "weights", "text")} for sample in self.samples
        ]
        return {"rows": self.rows, "eval_rows": self.eval_rows, "samples": samples}

    def as_text(self) -> str:
        """Trained tokens stand in [brackets], as runs; line ends are shown as arrows."""
        lines = [
            f"format   {self.format} ({self.why})",
            "rows     " + ", ".join(f"{name} {count:,}" for name, count in self.rows.items()),
        ]
        if self.eval_rows:
            lines.append(
                "held out " + ", ".join(f"{name} {count:,}" for name, count in self.eval_rows.items())
            )
        share = 100 * self.num_trained / self.num_tokens
        lines.append(
            f"tokens   {self.num_tokens:,}, of which {self.num_trained:,} are trained ({share:.1f} %)"
        )
        for sample in self.samples:
            trained = sum(sample["weights"])
            lines += [
                "",
                f"--- {sample['source']}: {len(sample['ids'])} tokens, {trained} trained, in [[ ]]",
                sample["marked"],
            ]
        return "\n".join(lines)


def preview(recipe: Recipe, number: int) -> Preview:
    """The first `number` samples in file order, and the account of all rows. Loads no weights."""
    base_model.quiet()
    folder = model_files.locate(recipe.model, weights=False)
    tokenizer = base_model.load_tokenizer(folder, recipe.model, recipe.data.chat_template)
    check_tokenizer(tokenizer)
    rows = data.load(recipe.data.train, recipe.data, tokenizer, recipe.task.train_on)
    held_out = None
    if recipe.data.eval is not None:
        same_format = recipe.data.model_copy(update={"format": rows.format})
        held_out = data.load(recipe.data.eval, same_format, tokenizer, recipe.task.train_on)
    samples = []
    for index in range(min(number, len(rows.tokens))):
        ids, weights = (array.tolist() for array in rows.tokens.sample(index))
        samples.append(
            {
                "source": rows.tokens.places[index],
                "ids": ids,
                "weights": weights,
                "text": tokenizer.decode(ids, skip_special_tokens=False),
                "marked": _marked(tokenizer, ids, weights),
            }
        )
    return Preview(
        rows.account.rows(),
        held_out.account.rows() if held_out else None,
        samples,
        rows.format,
        rows.why,
        len(rows.tokens.ids),
        int(rows.tokens.weights.sum()),
    )


def _marked(tokenizer: Any, ids: list[int], weights: list[int]) -> str:
    """The decoded text with every run of trained tokens in [[double brackets]]."""
    parts, start = [], 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or weights[end] != weights[start]:
            text = tokenizer.decode(ids[start:end], skip_special_tokens=False)
            parts.append(f"[[{text}]]" if weights[start] else text)
            start = end
    return "".join(parts)
