"""A LoRA as its files describe it, PEFT's or lorakit's: names, shapes and scales, without a tensor. No torch.

A is (R, I), B is (O, R); of an Embedding I is the vocabulary.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.model_files import header, read_json
from lorakit.shapes import Layer, embedding_of
from lorakit.targets import Target, modules_above

Shape = tuple[int, ...]
ROWS = ".token_adapter.trainable_tokens_delta"  # of some rows of an embedding, behind its name
_OTHER_BASE = "It was trained on another base: name that one: --base PATH (generate and chat: --base-path)."


@dataclass(frozen=True)
class AdapterFile:
    folder: Path
    config: Mapping[str, Any]  # adapter_config.json
    adapted: Mapping[
        str, Mapping[str, Shape]
    ]  # place of a layer in the file -> tensor (lora_A, lora_magnitude_vector, ...) -> shape
    whole: Mapping[str, Mapping[str, Shape]]  # module trained whole -> parameter -> shape
    trained_rows: Mapping[str, Shape]  # tensor with rows of an embedding -> shape

    @property
    def method(self) -> str:
        """lora or dora, whose tensors are read alike."""
        return "dora" if self.config.get("use_dora") else "lora"

    @property
    def scaling(self) -> str:
        return "rank_stabilized" if self.config.get("use_rslora") else "standard"

    @property
    def train_also(self) -> list[str]:
        """The innermost modules trained whole."""
        return sorted({name.rpartition(".")[0] for inside in self.whole.values() for name in inside})

    def rows(self, layers: Sequence[Layer]) -> dict[str, tuple[int, ...]]:
        """Input embedding -> the rows of it that are trained; empty where there are none.

        Raises: LorakitError for rows of another layer, or that do not fit.
        """
        told = self.config.get("trainable_token_indices")
        if not told:
            return {}
        table = embedding_of(layers)
        named = told if isinstance(told, dict) else {table.name if table else "": told}
        name, ids = next(iter(named.items()))
        if table is None or len(named) > 1 or not f".{table.name}".endswith(f".{name}"):
            why = "lorakit reads trainable_token_indices of the input embedding alone"
            raise LorakitError(f"{self.folder}: {why}, not of {', '.join(named)}")
        ids = ids if isinstance(ids, list) else [ids]
        known = all(type(n) is int and 0 <= n < table.in_features for n in ids)
        shape = self.trained_rows.get(f"{table.name}{ROWS}")
        if not known or shape != (len(ids), table.out_features):
            raise LorakitError(
                f"{self.folder}: its trained tokens do not fit {table.name} of this model", _OTHER_BASE
            )
        return {table.name: tuple(ids)}

    def layers_at(self, layers: Sequence[Layer]) -> dict[str, Layer]:
        """Place in the file -> the layer whose tensors are there, if any are.

        That is the layer's own name, but for experts. PEFT wraps a module once for each of its parameters
        that it adapts, in their order: the last one is at the module, the one before at module.base_layer.
        """
        found = {layer.name: layer for layer in layers if layer.kind != "experts"}
        named = self.config.get("target_parameters") or []
        ends = tuple(f".{end}" for end in named if isinstance(end, str)) if isinstance(named, list) else ()
        wrapped: dict[str, list[Layer]] = {}
        for layer in layers:
            if layer.kind == "experts" and f".{layer.name}".endswith(ends):
                wrapped.setdefault(layer.name.rpartition(".")[0], []).append(layer)
        for module, inside in wrapped.items():
            found |= {module + ".base_layer" * depth: layer for depth, layer in enumerate(reversed(inside))}
        return found

    def sides(self, name: str, num_experts: int = 1) -> tuple[int, int, int]:
        """(in, out, rank) of what is at `name`."""
        tensors = self.adapted[name]
        a = tensors.get("lora_A") or tensors.get("lora_embedding_A") or ()
        b = tensors.get("lora_B") or tensors.get("lora_embedding_B") or ()
        if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] == 0 or a[0] % num_experts:
            raise LorakitError(f"{self.folder}: {name} has no A and B that belong together")
        return a[1], b[0], a[0] // num_experts

    def targets(self, layers: Sequence[Layer]) -> list[Target]:
        """What it adapts, in the model's order. The first pattern that fits the end of a name has its alpha.

        Raises: LorakitError naming the first layer that the model does not have in that shape.
        """
        there = self.layers_at(layers)
        found: dict[str, Target] = {}
        for name in self.adapted:
            layer = there.get(name)
            if layer is None:
                raise LorakitError(
                    f"{self.folder}: it adapts {name}, which this model does not have", _OTHER_BASE
                )
            inside, outside, rank = self.sides(name, layer.num_experts)
            if (layer.in_features, layer.out_features) != (inside, outside):
                ours = f"{layer.out_features} x {layer.in_features}"
                raise LorakitError(
                    f"{self.folder}: {name} is {outside} x {inside} there, but {ours} in this model",
                    _OTHER_BASE,
                )
            found[layer.name] = Target(layer, rank, self.alpha(layer.name))
        return [found[layer.name] for layer in layers if layer.name in found]

    def alpha(self, name: str) -> float:
        """The first pattern that fits the end of a name says it, else lora_alpha.

        Raises: LorakitError for a pattern that is none, or an alpha that is no number.
        """
        patterns = self.config.get("alpha_pattern") or {}
        file = self.folder / "adapter_config.json"
        try:
            fitting = [key for key in patterns if re.match(rf"(.*\.)?({key})$", name)]
            value = patterns[fitting[0]] if fitting else self.config.get("lora_alpha", 8)
        except (re.error, TypeError, KeyError) as error:
            raise LorakitError(f"{file}: alpha_pattern: {error}") from None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise LorakitError(f"{file}: lora_alpha: expected a number, got {value!r}")
        return float(value)


def kind_of(folder: Path) -> str:
    """What PEFT calls the tuner of the adapter in `folder`."""
    kind = read_json(folder / "adapter_config.json").get("peft_type", "LORA")
    if not isinstance(kind, str):
        raise LorakitError(f"{folder / 'adapter_config.json'}: peft_type: expected text, got {kind!r}")
    return kind


def weights_of(folder: Path) -> Path:
    """The file of its weights. Raises: LorakitError when there is none that is safe to read."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        pickled = (folder / "adapter_model.bin").is_file()
        why = " (adapter_model.bin is a pickle, which can run code: lorakit does not read it)"
        raise LorakitError(f"{folder}: no adapter_model.safetensors{why if pickled else ''}")
    return file


def shapes_of(folder: Path) -> dict[str, Shape]:
    """Name in the file of weights -> shape, from its header."""
    file, found = weights_of(folder), {}
    for key, tensor in header(file).items():
        if key == "__metadata__":
            continue
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        if not isinstance(shape, list) or not all(type(size) is int for size in shape):
            raise LorakitError(f"{file}: damaged safetensors header: {key} has no shape")
        found[key] = tuple(shape)
    return found


def read(folder: Path) -> AdapterFile:
    """The adapter in a directory, from its configuration and the header of its weights.

    Raises: LorakitError when a file is missing or damaged, and for adapters other than LoRA.
    """
    config = read_json(folder / "adapter_config.json")
    if (kind := kind_of(folder)) != "LORA":
        raise LorakitError(f"{folder}: an adapter of the kind {kind}, where only LoRA can be taken")
    adapted: dict[str, dict[str, Shape]] = {}
    whole: dict[str, dict[str, Shape]] = {}
    rows: dict[str, Shape] = {}
    ends = tuple(config.get("modules_to_save") or ())  # PEFT: "norm" is also the end of "input_layernorm"
    for key, shape in shapes_of(folder).items():
        name = key.removeprefix("base_model.model.")
        layer, found, rest = name.partition(".lora_")
        if found:
            adapted.setdefault(layer, {})[f"lora_{rest.partition('.')[0]}"] = shape
            continue
        if name.endswith(ROWS):
            rows[name] = shape
            continue
        owners = [module for module in modules_above(name) if module.endswith(ends)]
        if owners:  # any other weight is a copy of the base's, such as an embedding beside its adapter
            whole.setdefault(owners[0], {})[name] = shape
    return AdapterFile(folder, config, adapted, whole, rows)
