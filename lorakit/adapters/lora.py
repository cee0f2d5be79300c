"""LoRA and rank-stabilised LoRA through PEFT's layers: y = W x + scale * B A dropout(x).

A is (rank, in), B is (out, rank) and starts at zero, so that step 0 is the base model exactly. scale = alpha
/ rank, or alpha / sqrt(rank) when rank-stabilised. For an Embedding A is (rank, vocabulary) and starts at
zero, B at random. Sources: Hu et al. 2021, arXiv 2106.09685, equation 3; Kalajdzievski 2023, arXiv
2312.03732. What lorakit adds to PEFT: exact targets (its own presets adapt routers), and files in a fixed
order.
"""

import json
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lorakit import adapter_file
from lorakit.adapters import Role, Trained, copy_into, write_tensors
from lorakit.errors import LorakitError
from lorakit.recipe.adapter import Lora
from lorakit.shapes import Layer
from lorakit.targets import Target

_PREFIX = "base_model.model."  # of every name in PEFT's files
_INIT: dict[str, bool | str] = {"default": True, "gaussian": "gaussian"}


class LoraAdapter:
    def __init__(
        self, section: Lora, model: Any, targets: Sequence[Target], seed: int, train_also: Sequence[str] = ()
    ) -> None:
        """Attaches in place: `model` computes with the adapter from here on."""
        self.targets = tuple(targets)
        # get_peft_model draws A (and an Embedding's B) from the global generator, on the layer's device.
        torch.manual_seed(seed)
        stabilized = section.scaling == "rank_stabilized"
        config = lora_config(self.targets, train_also, section.dropout, stabilized, _INIT[section.init])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, tied weights: decided and tested here
            self.peft: PeftModel = get_peft_model(model, config)
        adapted = {item.name.split(".lora_")[0] for item in self.trained() if ".lora_" in item.name}
        assert adapted == {target.layer.name for target in targets}, (
            "PEFT adapted other layers than it was told"
        )
        for trained in self.trained():
            trained.parameter.data = trained.parameter.data.float()

    def trained(self) -> list[Trained]:
        base = self.peft.get_base_model()
        return [Trained(name, p, _role(name)) for name, p in base.named_parameters() if p.requires_grad]

    def penalty(self) -> Tensor | None:
        return None

    def before_step(self, step: int) -> None:
        return None

    def after_step(self, step: int) -> None:
        return None

    def ranks(self) -> dict[str, int]:
        return {target.layer.name: target.rank for target in self.targets}

    def settled(self, step: int) -> bool:
        return True

    def measures(self) -> dict[str, float]:
        return {}

    def disabled(self) -> AbstractContextManager[None]:
        context: AbstractContextManager[None] = self.peft.disable_adapter()
        return context

    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        return tensors

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            copy_into(tensors, self.state(), "the adapter")

    def config(self, base_name: str) -> dict[str, Any]:
        return config_as_json(self.peft.peft_config["default"], base_name)

    def write(self, folder: Path, base_name: str) -> None:
        write_adapter(folder, self.config(base_name), self.state())


def config_as_json(config: LoraConfig, base_name: str) -> dict[str, Any]:
    """adapter_config.json, with sets in a fixed order."""
    values = config.to_dict() | {"base_model_name_or_path": base_name, "inference_mode": True}
    plain = {key: sorted(value) if isinstance(value, set) else value for key, value in values.items()}
    text: dict[str, Any] = json.loads(json.dumps(plain, default=str))
    return text


def write_adapter(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """adapter_config.json and adapter_model.safetensors."""
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    write_tensors(folder / "adapter_model.safetensors", tensors)


def _role(name: str) -> Role:
    for mark, role in (
        ("lora_A", Role.A),
        ("lora_embedding_A", Role.A),
        ("lora_B", Role.B),
        ("lora_embedding_B", Role.B),
    ):
        if f".{mark}." in name:
            return role
    return Role.HEAD


def lora_config(
    targets: Sequence[Target],
    train_also: Sequence[str] = (),
    dropout: float = 0.0,
    rank_stabilized: bool = False,
    init: bool | str = True,
) -> LoraConfig:
    """The most frequent rank and alpha in general, the others as patterns on whole names."""
    rank = Counter(target.rank for target in targets).most_common(1)[0][0]
    alpha = Counter(target.alpha for target in targets).most_common(1)[0][0]
    return LoraConfig(
        r=rank,
        lora_alpha=_plain(alpha),
        rank_pattern={t.layer.name: t.rank for t in targets if t.rank != rank},
        alpha_pattern={t.layer.name: _plain(t.alpha) for t in targets if t.alpha != alpha},
        target_modules=[target.layer.name for target in targets],
        modules_to_save=list(train_also) or None,
        lora_dropout=dropout,
        use_rslora=rank_stabilized,
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
    *("r", "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora"),
}


@dataclass(frozen=True)
class Factors:
    """The update of one layer: scale * B A, of the shape (out, in) for a Linear whatever its base stores."""

    target: Target
    a: Tensor  # (rank, in)
    b: Tensor  # (out, rank)
    scale: float

    def update(self) -> Tensor:
        """What is added to the layer's weight, in fp32 and in the weight's own layout."""
        product = self.scale * (self.b.float() @ self.a.float())
        # A Conv1D stores (in, out). An Embedding looks rows up: its A is (rank, vocabulary).
        return product if self.target.layer.kind == "linear" else product.T


@dataclass(frozen=True)
class Contents:
    """A LoRA in a directory, read whole."""

    factors: tuple[Factors, ...]  # in the order of the model's layers
    whole: dict[str, Tensor]  # parameter name in the model -> its new value
    copies: dict[str, Tensor]  # parameter name -> the base's own value: PEFT saves adapted embeddings whole
    tensors: dict[str, Tensor]  # all but the copies, under the names of the file: what load_state() takes
    train_also: tuple[str, ...]  # the modules trained whole
    scaling: str

    @property
    def targets(self) -> list[Target]:
        return [item.target for item in self.factors]


def read_adapter(folder: Path, layers: Sequence[Layer]) -> Contents:
    """The LoRA that PEFT or lorakit wrote to `folder`, as it applies to a model of these `layers`.

    Raises: LorakitError when there is none, when it is no plain LoRA, and when it does not fit the model.
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
            f"{folder} is not plain LoRA ({', '.join(different)})",
            "PEFT converts some: save_pretrained(path_initial_model_for_weight_conversion=...); it merges the"
            " others: merge_and_unload().",
        )
    try:
        tensors = load_file(folder / "adapter_model.safetensors")
    except (OSError, SafetensorError) as error:
        raise LorakitError(f"{folder / 'adapter_model.safetensors'}: cannot be read: {error}") from None
    factors = []
    for target in file.targets(layers):
        names = ("A.weight", "B.weight")
        if target.layer.kind == "embedding":
            names = ("embedding_A", "embedding_B")
        a, b = (tensors[f"{_PREFIX}{target.layer.name}.lora_{name}"] for name in names)
        divisor = math.sqrt(target.rank) if file.scaling == "rank_stabilized" else target.rank
        factors.append(Factors(target, a, b, target.alpha / divisor))
    kept = {name for inside in file.whole.values() for name in inside}
    copies, own, whole = {}, {}, {}
    for key, tensor in tensors.items():
        name = key.removeprefix(_PREFIX)
        if ".lora_" not in name and name not in kept:
            copies[name.replace(".base_layer.", ".")] = tensor
            continue
        own[key] = tensor
        if name in kept:
            whole[name] = tensor
    return Contents(tuple(factors), whole, copies, own, tuple(file.train_also), file.scaling)
