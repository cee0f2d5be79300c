"""VeRA: y = W x + b * B (d * A dropout(x)), with A and B drawn once, shared by all layers and never trained.

A is (rank, widest in) and B is (widest out, rank); a layer reads the first of A's columns and of B's rows, as
many as it has inputs and outputs. d (rank) starts at d_initial and b (out) at zero, so that step 0 is the
base model exactly; they are all that is trained and all that a checkpoint holds: A and B are a function of
the seed. There is no scale. Source: Kopiczko et al. 2023, arXiv 2310.11454, equation 2 and section 3.2.

It is a LoRA with A' = d * A and B' = b * B of the same rank, and is written as one: exact, larger on the disk
(rank * (in + out) numbers per layer instead of rank + out), and loaded by what knows no VeRA.

The layers are PEFT's. Two things of theirs are put right here: beside a bf16 base they round A and B to bf16,
all layers' at once; and under autocast they return the dtype of their input where the base layer returns
bf16, so that step 0 is not the base model. Not here: Embedding, which PEFT has no VeRA layer for.
"""

import hashlib
import math
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, VeraConfig, get_peft_model
from torch import Tensor

from lorakit.adapters import Adapter, Role, Trained, base_alone, copy_into, in_dtype_of_base
from lorakit.adapters.lora_files import write_plain
from lorakit.errors import LorakitError
from lorakit.recipe.methods import Vera
from lorakit.targets import Target

_SUM = "projections"  # in state(): SHA-256 of A and B


def projections(seed: int, rank: int, widest_in: int, widest_out: int) -> tuple[Tensor, Tensor]:
    """(A, B) in fp32 on the CPU, Kaiming-uniform for a ReLU, U(±sqrt(6 / columns)), as PEFT draws them from
    the same seed."""
    draw = torch.Generator("cpu").manual_seed(seed)

    def kaiming(rows: int, columns: int) -> Tensor:
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
        return torch.empty(rows, columns).uniform_(-bound, bound, generator=draw)

    return kaiming(rank, widest_in), kaiming(widest_out, rank)


class VeraAdapter(Adapter):
    def __init__(
        self,
        section: Vera,
        model: Any,
        targets: Sequence[Target],
        seed: int,
        train_also: Sequence[str] = (),
    ) -> None:
        """Attaches in place: `model` computes with the adapter from here on."""
        self.targets, self.train_also = tuple(targets), list(train_also)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # fan_in_fan_out of Conv1D, tied weights: decided and tested here
            self.peft: PeftModel = get_peft_model(model, _config(section, targets, train_also, seed))
        base = self.peft.get_base_model()
        self.layers: dict[str, Any] = {t.layer.name: base.get_submodule(t.layer.name) for t in targets}
        for item in self.trained():
            item.parameter.data = item.parameter.data.float()
        widest_in = max(target.layer.in_features for target in targets)
        widest_out = max(target.layer.out_features for target in targets)
        self.a, self.b = projections(seed, section.rank, widest_in, widest_out)
        self._sum = _digest(self.a, self.b)
        for layer in self.layers.values():
            device = layer.vera_lambda_d["default"].device
            self.a, self.b = self.a.to(device), self.b.to(device)
            layer.vera_A["default"], layer.vera_B["default"] = self.a, self.b
            layer.register_forward_hook(in_dtype_of_base)

    def trained(self) -> list[Trained]:
        base = self.peft.get_base_model()
        return [Trained(name, p, _role(name)) for name, p in base.named_parameters() if p.requires_grad]

    def disabled(self) -> AbstractContextManager[None]:
        return base_alone(self.peft)

    def state(self) -> dict[str, Tensor]:
        """d and b, what is trained whole, and the SHA-256 of A and B, which are not stored."""
        return {item.name: item.parameter.detach() for item in self.trained()} | {_SUM: self._sum}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Raises: LorakitError when names or shapes differ, and where the seed gives other A and B."""
        if _SUM in tensors and not torch.equal(tensors[_SUM].cpu(), self._sum):
            raise LorakitError(
                "the adapter was trained with other projections A and B than its seed gives here",
                "The seed, the targets or what torch draws from a seed changed: go back to those of the run.",
            )
        with torch.no_grad():
            copy_into(tensors, self.state(), "the adapter")

    def write(self, folder: Path, base_name: str) -> None:
        """Plain LoRA, exactly: A = d * A and B = b * B, both of the layer's own size."""
        factors = {}
        for name, layer in self.layers.items():
            d, b = (vector["default"].detach() for vector in (layer.vera_lambda_d, layer.vera_lambda_b))
            factors[name] = (
                d[:, None] * self.a[:, : layer.in_features],
                b[:, None] * self.b[: layer.out_features],
            )
        write_plain(folder, self, factors, self.train_also, base_name)


def _digest(a: Tensor, b: Tensor) -> Tensor:
    """(32,) bytes of the SHA-256 of both."""
    found = hashlib.sha256(a.numpy().tobytes() + b.numpy().tobytes()).digest()
    return torch.tensor(list(found), dtype=torch.uint8)


def _role(name: str) -> Role:
    return Role.SCALE if ".vera_lambda_" in name else Role.HEAD


def _config(section: Vera, targets: Sequence[Target], train_also: Sequence[str], seed: int) -> VeraConfig:
    return VeraConfig(
        r=section.rank,
        projection_prng_key=seed,
        save_projection=False,
        d_initial=section.d_initial,
        vera_dropout=section.dropout,
        target_modules=[target.layer.name for target in targets],
        modules_to_save=list(train_also) or None,
        fan_in_fan_out=any(target.layer.kind == "conv1d" for target in targets),
        task_type="CAUSAL_LM",
    )
