"""LoRA, rank-stabilised LoRA and DoRA through PEFT's layers: y = W x + scale * B A dropout(x).

A is (rank, in), B is (out, rank) and starts at zero, so that step 0 is the base model exactly. scale = alpha
/ rank, or alpha / sqrt(rank) when rank-stabilised. For an Embedding A is (rank, vocabulary) and starts at
zero, B at random. Sources: Hu et al. 2021, arXiv 2106.09685, equation 3; Kalajdzievski 2023, arXiv
2312.03732. What lorakit adds to PEFT: exact targets (its own presets adapt routers), and files in a fixed
order.

DoRA scales every row of W + scale * B A, what one output is made of, to the trained length m, which starts at
that of W's row (Liu et al. 2024, arXiv 2402.09353, equation 5; the length is held constant in the backward
pass, section 4.3). With n =
|W + scale * B A| a layer computes, as PEFT does,

    y = W x + bias + (m / n - 1) W dropout(x) + m / n * scale * B A dropout(x),

so that dropout leaves the base's own output whole. m starts at the lengths in fp32, also of a bf16 or 4-bit
base: PEFT's are rounded to the base's dtype, by which step 0 is another model. A row of zeros is refused.

Experts of a mixture that are one 3-D parameter have an A and a B each. PEFT adds scale * B A to the parameter
for the time of each forward pass, so all of its experts are computed with, and in its dtype: beside a bf16
base what an update adds is rounded to bf16 with the weight (an update of 0.2 % of the weight is off by 60 %
of itself, one of 1.7 % by 10 %; model.dtype: fp32 keeps it), and the gradient of the whole parameter exists
for a moment. Rows of the input embedding, and of a head that shares them, are PEFT's trainable tokens: the
row itself is trained, not what is added to it; the table is copied once per forward pass.
"""

import re
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from math import hypot
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor

from lorakit.adapters import Adapter, Probe, Role, Trained, base_alone, copy_into, eva, inits
from lorakit.adapters.lora_files import PREFIX, config_as_json, lora_config, write_adapter, write_plain
from lorakit.adapters.pairs import NAME, activate, add_frozen, as_one, base_matrix, factors, resize
from lorakit.errors import LorakitError
from lorakit.recipe.inits import highest_rank
from lorakit.recipe.methods import DeltaLora, Dora, Lora, LoraDrop, LoraFa
from lorakit.recipe.traits import init_of
from lorakit.targets import Target
from lorakit.terminal import progress, say

_START = "start"  # the adapter of B_0 A_0, where it is taken away (inits.py)


class LoraAdapter(Adapter):
    def __init__(
        self,
        section: Lora | Dora | LoraFa | DeltaLora | LoraDrop,
        model: Any,
        targets: Sequence[Target],
        seed: int,
        train_also: Sequence[str] = (),
        tokens: Sequence[int] = (),
    ) -> None:
        """Attaches in place: `model` computes with the adapter from here on. `tokens`: rows of the input
        embedding that are trained."""
        self.section, self.targets, self.train_also = section, tuple(targets), list(train_also)
        self.seed, self.init = seed, init_of(section)
        self.prepares = self.init.prepared
        # get_peft_model draws A (and an Embedding's B) from the global generator, on the layer's device.
        torch.manual_seed(seed)
        stabilized = section.scaling == "rank_stabilized"
        dropout, dora = getattr(section, "dropout", 0.0), section.method == "dora"
        rows = {_embedding(model): tokens} if tokens else None
        drawn = "gaussian" if section.init == "gaussian" else True
        config = lora_config(self.targets, train_also, dropout, stabilized, drawn, dora, rows)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, tied weights: decided and tested here
            self.peft: PeftModel = get_peft_model(model, config)
        modules = dict(self.peft.get_base_model().named_modules())
        self._wrapped = {name: m for name, m in modules.items() if isinstance(m, ParamWrapper)}
        adapted = {item.layer for item in self.trained() if item.role is not Role.HEAD}
        assert adapted == {target.layer.name for target in targets}, (
            "PEFT adapted other layers than it was told"
        )
        for trained in self.trained():
            trained.parameter.data = trained.parameter.data.float()
        if section.init == "orthogonal":
            for item in self.trained():
                if item.role is Role.A:
                    item.parameter.data = inits.orthogonal(item.parameter.data)
        if section.method == "dora":
            self._measure_rows()
        names = [target.layer.name for target in targets if target.layer.kind != "experts"]
        self.layers: dict[str, Any] = {name: modules[name] for name in names}
        self.moves_ranks = section.init == "eva"
        self.explained = torch.zeros(len(self.layers), dtype=torch.float64)  # of the inputs' variance, by A
        if self.init.pairs == 2:
            for layer in self.layers.values():
                add_frozen(layer, _START, -layer.scaling[NAME])
                activate(layer, _START)

    def _measure_rows(self) -> None:
        """m as the lengths of the base's rows in fp32; PEFT takes them in the base's dtype.

        Raises: LorakitError for a row of zeros, which has no direction.
        """
        base = self.peft.get_base_model()
        for target in self.targets:
            layer: Any = base.get_submodule(target.layer.name)
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            lengths = torch.linalg.vector_norm(weight, dim=1 if target.layer.kind == "linear" else 0)
            if not bool((lengths > 0).all()):
                row = int((lengths == 0).nonzero()[0])
                raise LorakitError(
                    f"adapter: row {row} of {target.layer.name} is zero; DoRA divides by its length",
                    "Leave this layer out of adapter.targets, or write method: lora.",
                )
            vector = layer.lora_magnitude_vector["default"]
            vector.weight.data = lengths.detach().clone()
            if target.layer.kind == "embedding":
                vector.get_weight_norm = _lengths_of_columns

    def trained(self) -> list[Trained]:
        base = self.peft.get_base_model()
        return [
            Trained(name, p, _role(name), self._layer(name))
            for name, p in base.named_parameters()
            if p.requires_grad
        ]

    def _layer(self, name: str) -> str:
        """The adapted layer that a parameter belongs to, or the empty string. Of experts it is the parameter
        that is wrapped, once or several times over."""
        place, found, _ = name.partition(".lora_")
        if found and place in self._wrapped:
            module, parameter = re.sub(r"(\.base_layer)+$", "", place), self._wrapped[place].parameter_name
            return f"{module}.{parameter}"
        return place if found else ""

    @torch.no_grad()
    def prepare(self, probe: Probe) -> None:
        """A and B from the weights or the data, where `init` says so; the base's weights stay as they
        are."""
        assert isinstance(self.section, Lora)
        if self.section.init == "eva":
            self._look(self.section, probe)
            return
        sizes = []
        with progress() as display:
            bar = display.add_task(self.section.init, total=len(self.layers))
            for name, layer in self.layers.items():
                sizes.append(self._from_weight(name, layer, probe))
                display.advance(bar)
        if self.section.init == "loftq":
            whole, before, now = (hypot(*column) for column in zip(*sizes, strict=True))
            told = f"quantization took {before / whole:.2%} of the adapted weights, of which A and B leave"
            say(f"loftq     {told} {now / whole:.2%}: step 0 is not the quantized base")

    def _from_weight(self, name: str, layer: Any, probe: Probe) -> tuple[float, float, float]:
        """Fills the factors of a layer. |.|_F of its weight, of what they start from, and of what they leave
        of it."""
        assert isinstance(self.section, Lora)
        weight, scale, weight_name = base_matrix(layer), layer.scaling[NAME], f"{name}.weight"
        source = weight
        if self.section.init == "loftq":
            source = inits.taken(weight_name, probe.stored(weight_name), weight)
        a, b = inits.from_weight(self.section, source, layer.r[NAME], scale, self.seed)
        dead = (a == 0).all(dim=1) & (b == 0).all(dim=0)  # a direction of nothing would never move
        a = torch.where(dead[:, None], factors(layer)[0], a)
        for each in (NAME, _START)[: self.init.pairs]:
            for factor, values in zip(factors(layer, each), (a, b), strict=True):
                factor.copy_(values)
        return float(weight.norm()), float(source.norm()), float((source - scale * b @ a).norm())

    def _look(self, section: Lora, probe: Probe) -> None:
        """EVA (eva.py)."""
        layers, number = list(self.layers.values()), probe.draw(section.probe)
        asked = [target.rank for target in self.targets]
        sides = [(target.layer.in_features, target.layer.out_features) for target in self.targets]
        most = [highest_rank(r, section.rank_spread, *s) for r, s in zip(asked, sides, strict=True)]
        found = eva.look(layers, most, probe)
        ranks = eva.redistributed([shares.tolist() for shares, _ in found], sum(asked))
        for layer, rank, (_, directions) in zip(layers, ranks, found, strict=True):
            resize(layer, rank)
            factors(layer)[0].copy_(directions[:rank])
        self.explained.copy_(torch.stack([s[:r].sum() for r, (s, _) in zip(ranks, found, strict=True)]))
        equal = sum(float(s[:r].sum()) for r, (s, _) in zip(asked, found, strict=True)) / len(layers)
        told = f"of {sum(ranks):,} ranks a layer gets {min(ranks)} to {max(ranks)}, which explain"
        shares = f"{float(self.explained.mean()):.1%} of its inputs on average; equal ranks {equal:.1%}"
        say(f"probe     {number:,} samples: {told} {shares}")

    def ranks(self) -> dict[str, int]:
        moved = {name: layer.r[NAME] for name, layer in self.layers.items()} if self.moves_ranks else {}
        return super().ranks() | moved

    def notes(self) -> dict[str, dict[str, Any]]:
        if not self.explained.any():
            return {}
        explained = zip(self.layers, self.explained.tolist(), strict=True)
        return {name: {"explained": share} for name, share in explained}

    def disabled(self) -> AbstractContextManager[None]:
        return base_alone(self.peft)

    def state(self) -> dict[str, Tensor]:
        """A and B, what is trained beside them, what is taken away where the start is (inits.py), and what
        was decided on (eva.py)."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*invalid shape")  # of a rank of 0, which is right
            tensors: dict[str, Tensor] = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        started = {
            f"start|{name}|{factor}": tensor.detach()
            for name, layer in self.layers.items()
            if self.init.pairs == 2
            for factor, tensor in zip("AB", factors(layer, _START), strict=True)
        }
        started |= {"explained": self.explained} if self.moves_ranks else {}
        # PEFT's own names for these hold for no file: it lists every adapter's, whichever it is asked for.
        return {name: t for name, t in tensors.items() if f".{_START}." not in name} | started

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Where `init` decides on the ranks they are those of the tensors; trained() is another from then
        on."""
        for name, layer in self.layers.items() if self.moves_ranks else ():
            a = tensors.get(f"{PREFIX}{name}.lora_A.weight")
            if a is not None and len(a) != layer.r[NAME]:
                resize(layer, len(a))
        with torch.no_grad():
            copy_into(tensors, self.state(), "the adapter")

    def config(self, base_name: str) -> dict[str, Any]:
        if self.init.exported:
            return {}
        return config_as_json(self.peft.peft_config[NAME], base_name)

    def write(self, folder: Path, base_name: str) -> None:
        """As PEFT writes it; as one plain LoRA where that is not all (`init` is exported)."""
        if not self.init.exported:
            write_adapter(folder, self.config(base_name), self.state())
            return
        taken_away = _START if self.init.pairs == 2 else None
        found = {name: as_one(layer, taken_away) for name, layer in self.layers.items()}
        write_plain(folder, self, found, self.train_also, base_name)


def _lengths_of_columns(weight: Tensor, lora_weight: Tensor, scaling: float, **_: Any) -> Tensor:
    """(out,) |weight + scaling * lora_weight.T|, in fp32 at least: of an embedding's (vocabulary, out) PEFT
    takes them in the base's dtype."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    moved = weight.to(wide).T + scaling * lora_weight.to(wide)
    lengths: Tensor = torch.linalg.vector_norm(moved, dim=1)
    return lengths


def _embedding(model: Any) -> str:
    """Name of the input embedding. Raises: LorakitError for one whose rows PEFT cannot train."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is not None and head.weight is table.weight and getattr(head, "bias", None) is not None:
        raise LorakitError(
            "adapter.train_tokens: the output head shares the embedding and has a bias, which PEFT would drop"
        )
    name: str = next(name for name, module in model.named_modules() if module is table)
    return name


def _role(name: str) -> Role:
    for mark, role in (
        ("lora_A", Role.A),
        ("lora_embedding_A", Role.A),
        ("lora_B", Role.B),
        ("lora_embedding_B", Role.B),
        ("lora_magnitude_vector", Role.SCALE),
    ):
        if f".{mark}." in name:
            return role
    return Role.HEAD
