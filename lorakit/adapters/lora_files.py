"""The files of a LoRA or DoRA: what PEFT, transformers and vLLM load, written and read whole.

One rank and one scale for all layers where a method other than LoRA is exported (`write_plain`): vLLM ignores
patterns. A is (rank, in), B is (out, rank); for an Embedding A is (rank, vocabulary). DoRA has a third
tensor, the lengths m (out) of the rows of its weight.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftConfig
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, linalg

from lorakit import adapter_file
from lorakit.adapter_file import ROWS, AdapterFile
from lorakit.adapters import Adapter, Role, write_tensors
from lorakit.errors import LorakitError
from lorakit.shapes import Layer
from lorakit.targets import Target

PREFIX = "base_model.model."  # of every name in PEFT's files
_NAMES, _EMBEDDING_NAMES = ("A.weight", "B.weight"), ("embedding_A", "embedding_B")
_MAGNITUDE = "magnitude_vector"


def config_as_json(config: PeftConfig, base_name: str) -> dict[str, Any]:
    """adapter_config.json, with sets in a fixed order."""
    values = config.to_dict() | {"base_model_name_or_path": base_name, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    text: dict[str, Any] = json.loads(json.dumps(plain, default=str))
    return text


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / "adapter_model.safetensors", tensors)


def write_plain(
    folder: Path,
    adapter: Adapter,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    train_also: Sequence[str],
    base_name: str,
) -> None:
    """A method that other tools do not know, as the LoRA that it is: layer -> (A, B) with every scale in B.

    One rank for all layers, what a layer has less filled with zeros, and a scale of one: other tools ignore
    patterns.
    """
    rank = max(1, *(len(a) for a, _ in factors.values()))
    tensors: dict[str, Tensor] = {}
    for target in adapter.targets:
        name, (a, b) = target.layer.name, factors[target.layer.name]
        wide_a, wide_b = a.new_zeros(rank, a.shape[1]), b.new_zeros(len(b), rank)
        wide_a[: len(a)], wide_b[:, : len(a)] = a, b
        names = _EMBEDDING_NAMES if target.layer.kind == "embedding" else _NAMES
        tensors |= {f"{PREFIX}{name}.lora_{names[0]}": wide_a, f"{PREFIX}{name}.lora_{names[1]}": wide_b}
    for item in adapter.trained():
        if item.role is Role.HEAD:
            name = item.name.replace(".modules_to_save.default", "")
            tensors[f"{PREFIX}{name}"] = item.parameter.detach()
    uniform = [replace(target, rank=rank, alpha=float(rank)) for target in adapter.targets]
    write_adapter(folder, config_as_json(lora_config(uniform, train_also), base_name), tensors)


def lora_config(
    targets: Sequence[Target],
    train_also: Sequence[str] = (),
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    init: bool | str = True,
    dora: bool = False,
    tokens: Mapping[str, Sequence[int]] | None = None,
) -> LoraConfig:
    """The most frequent rank and alpha in general, the others as patterns on whole names. `tokens`: embedding
    -> its rows that are trained."""
    rank = Counter(target.rank for target in targets).most_common(1)[0][0]
    alpha = Counter(target.alpha for target in targets).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=_plain(alpha),
        rank_pattern={t.layer.name: t.rank for t in targets if t.rank != rank},
        alpha_pattern={t.layer.name: _plain(t.alpha) for t in targets if t.alpha != alpha},
        target_modules=[target.layer.name for target in targets if target.layer.kind != "experts"],
        target_parameters=[t.layer.name for t in targets if t.layer.kind == "experts"] or None,
        modules_to_save=list(train_also) or None,
        trainable_token_indices={name: list(rows) for name, rows in (tokens or {}).items()} or None,
        lora_dropout=dropout,
        use_rslora=rank_stabilized,
        use_dora=dora,
        init_lora_weights=init,  # type: ignore[arg-type]
        fan_in_fan_out=any(target.layer.kind == "conv1d" for target in targets),
        task_type="CAUSAL_LM",
    )


def _plain(number: float) -> float | int:
    return int(number) if float(number).is_integer() else number


# ------------------------------------------------------------------------------------------------------------
# Adapters from a directory

# What else may stand in a configuration without changing what the layer computes.
_PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal")  # the others move the base's weights
_CHANGES_NOTHING = {
    *("alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying", "exclude_modules"),
    *("fan_in_fan_out", "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform"),
    *("lora_alpha", "lora_dropout", "lora_ga_config", "loftq_config", "eva_config", "corda_config"),
    *(
        "megatron_config",
        "megatron_core",
        "modules_to_save",
        "peft_type",
        "peft_version",
        "qalora_group_size",
    ),
    *("r", "rank_pattern", "revision", "runtime_config", "target_modules", "target_parameters"),
    *("task_type", "trainable_token_indices", "use_dora"),
    "use_rslora",
}


Change = Callable[[Tensor], Tensor]  # the base's weight -> the adapted one; both fp32, in the same layout


@dataclass(frozen=True)
class Factors:
    """What an adapter does to one layer: V = W + scale * B A; in DoRA m V / |V|, row by row. W is (out, in)
    here, whatever the base stores. E experts have their A one after the other and their B interleaved: row
    e * rank + k of A goes with column k * E + e of B."""

    target: Target
    a: Tensor  # (rank, in); of experts (E * rank, in)
    b: Tensor  # (out, rank); of experts (out, rank * E)
    scale: float
    magnitude: Tensor | None = None  # (out): m

    def applied(self, weight: Tensor) -> Tensor:
        """The layer's new weight from the base's, in fp32 and in the weight's own layout."""
        moved = weight + self.update()
        if self.magnitude is None:
            return moved
        row = 1 if self.target.layer.kind == "linear" else 0  # along which dimension a row of W lies
        lengths: Tensor = linalg.vector_norm(moved, dim=row, keepdim=True)
        return moved * (self.magnitude.float().unsqueeze(row) / lengths)

    def update(self) -> Tensor:
        """scale * B A, in fp32 and in the weight's own layout."""
        layer = self.target.layer
        if layer.kind == "experts":
            a = self.a.float().unflatten(0, (layer.num_experts, -1))  # (E, rank, in)
            b = self.b.float().unflatten(1, (-1, layer.num_experts)).permute(2, 0, 1)  # (E, out, rank)
            products: Tensor = self.scale * (b @ a)
            return products.mT if layer.transposed else products
        product = self.scale * (self.b.float() @ self.a.float())
        # A Conv1D stores (in, out). An Embedding looks rows up: its A is (rank, vocabulary).
        return product if self.target.layer.kind == "linear" else product.T


def decompose(a: Tensor, b: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD of scale * B A in fp64, without the zero part: (out, k), (k,), (k, in). Never forms B A.

    a: (rank, in), b: (out, rank).
    """
    qb, rb = linalg.qr(b.double())
    qa, ra = linalg.qr(a.double().T)
    u, s, vh = linalg.svd(scale * rb @ ra.T)
    real = s > 1e-7 * (s[0] if len(s) else 1.0)
    return (qb @ u)[:, real], s[real], (vh @ qa.T)[real]


@dataclass(frozen=True)
class Contents:
    """An adapter in a directory, read whole."""

    method: str  # lora or dora
    factors: tuple[Factors, ...]  # in the order of the model's layers
    changes: Mapping[str, Change]  # parameter name in the model -> what the adapter makes of it
    whole: dict[str, Tensor]  # parameter name in the model -> its new value
    copies: dict[str, Tensor]  # parameter name -> the base's own value: PEFT saves adapted embeddings whole
    tensors: dict[str, Tensor]  # all but the copies, under the names of the file: what load_state() takes
    train_also: tuple[str, ...]  # the modules trained whole
    scaling: str
    tokens: tuple[int, ...] = ()  # rows of the input embedding that are trained

    @property
    def targets(self) -> list[Target]:
        return [item.target for item in self.factors]


def read_adapter(folder: Path, layers: Sequence[Layer]) -> Contents:
    """The LoRA or DoRA that PEFT or lorakit wrote to `folder`, as it applies to a model of these `layers`.

    Raises: LorakitError when there is none, when it is neither, and when it does not fit the model.
    """
    file = adapter_file.read(folder)
    different = [
        f"{key}: {value}"
        for key, value in file.config.items()
        if key not in _CHANGES_NOTHING and value not in (None, False, "none", {}, [])
    ]
    if (init := file.config.get("init_lora_weights", True)) not in _PLAIN_INIT:
        different.append(f"init_lora_weights: {init}, which changes the base's weights too")
    if different:
        raise LorakitError(
            f"{folder} is neither LoRA nor DoRA ({', '.join(different)})",
            "PEFT converts some: save_pretrained(path_initial_model_for_weight_conversion=...); it merges the"
            " others: merge_and_unload().",
        )
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise LorakitError(f"{folder / 'adapter_model.safetensors'}: cannot be read: {error}") from None
    places = {layer.name: place for place, layer in file.layers_at(layers).items()}
    factors = [_factors(target, places[target.layer.name], tensors, file) for target in file.targets(layers)]
    rows = file.rows(layers)
    kept = {name for inside in file.whole.values() for name in inside}
    copies, own, whole = {}, {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        if ".lora_" not in name and name not in kept and not name.endswith(ROWS):
            copies[name.replace(".base_layer.", ".")] = tensor
            continue
        own[key] = tensor
        if name in kept:
            whole[name] = tensor
    changes = {item.target.layer.weight: item.applied for item in factors}
    for embedding, ids in rows.items():
        changes[f"{embedding}.weight"] = partial(_with_rows, list(ids), own[f"{PREFIX}{embedding}{ROWS}"])
    also, scaling = tuple(file.train_also), file.scaling
    tokens = tuple(number for ids in rows.values() for number in ids)
    return Contents(file.method, tuple(factors), changes, whole, copies, own, also, scaling, tokens)


def _with_rows(ids: list[int], rows: Tensor, weight: Tensor) -> Tensor:
    """`weight` (V, H) with `rows` in the places `ids`."""
    changed = weight.clone()
    changed[ids] = rows.to(weight)
    return changed


def revived(tensors: Mapping[str, Tensor], drawn: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
    """(`tensors` of a file, where row i of A and column i of B are both zero with those of `drawn`; how many
    there were). Exports are filled up with zeros, and from A = B = 0 no gradient ever leads away.

    `drawn`: a fresh adapter under the same names, whose own update is zero.
    """
    found, number = dict(tensors), 0
    for a_name, a in tensors.items():
        b_name = a_name.replace("lora_A", "lora_B").replace("lora_embedding_A", "lora_embedding_B")
        if b_name == a_name or b_name not in tensors:
            continue
        b = tensors[b_name]
        dead = (a == 0).all(dim=1) & (b == 0).all(dim=0)
        number += int(dead.sum())
        found[a_name] = a.where(~dead[:, None], drawn[a_name].detach().to(a))
        found[b_name] = b.where(~dead, drawn[b_name].detach().to(b))
    return found, number


def _factors(target: Target, name: str, tensors: Mapping[str, Tensor], file: AdapterFile) -> Factors:
    """`name`: where the tensors are. Raises: LorakitError where magnitudes are there without DoRA, or DoRA
    without them."""
    ends = _EMBEDDING_NAMES if target.layer.kind == "embedding" else _NAMES
    a, b = (tensors[f"{PREFIX}{name}.lora_{end}"] for end in ends)
    magnitude = tensors.get(f"{PREFIX}{name}.lora_{_MAGNITUDE}")
    if (magnitude is not None) != (file.method == "dora"):
        what = "has no" if magnitude is None else "has a"
        raise LorakitError(f"{file.folder}: {name} {what} lora_{_MAGNITUDE}, and use_dora says otherwise")
    if magnitude is not None and magnitude.shape != b.shape[:1]:
        raise LorakitError(f"{file.folder}: {name} has a lora_{_MAGNITUDE} of {tuple(magnitude.shape)}")
    divisor = math.sqrt(target.rank) if file.scaling == "rank_stabilized" else target.rank
    return Factors(target, a, b, target.alpha / divisor, magnitude)
