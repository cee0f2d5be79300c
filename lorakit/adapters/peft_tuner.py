"""Any tuner of PEFT's in lorakit's loop: `method: peft`, `type: OFT`, `config: {...}`.

What a layer computes is the tuner's own matter (OFT: W R x with R orthogonal and block-diagonal, Qiu et al.
2023, arXiv 2306.07280; IA3: l * (W x), or W (l * x) in feedforward_modules, Liu et al. 2022, arXiv
2205.05638; ...). PEFT draws the start, computes and names the tensors of the file; targets, fp32, seeds,
steps, checkpoints and counts are lorakit's as for every method. recipe/peft_types.py says which types do not
go, and why.

Different from PEFT: targets are whole names, never ends of names; what a tuner would leave alone, train
beside its layers or take from the base is refused here, before a step; so are a pattern that fits no layer
and a size that PEFT would round (OFT's blocks, where they do not divide a layer: a warning there). A layer
answers in the dtype of its base layer, also where PEFT's does not (OFT's under autocast, IA3's on 4 and 8
bits): else step 0 would not be the base model.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from lorakit.adapters import Adapter, Role, Trained, base_alone, copy_into, in_dtype_of_base
from lorakit.adapters.lora_files import config_as_json, write_adapter
from lorakit.errors import LorakitError, out_of_memory
from lorakit.recipe.methods import PeftTuner
from lorakit.recipe.peft_types import config_class, first_line, keywords
from lorakit.targets import Target, candidates, matches
from lorakit.terminal import say


class PeftTunerAdapter(Adapter):
    def __init__(
        self,
        section: PeftTuner,
        model: Any,
        targets: Sequence[Target],
        seed: int,
        train_also: Sequence[str] = (),
        config: PeftConfig | None = None,
    ) -> None:
        """Attaches in place. `config`: that of an adapter's file, in place of the section's and the targets'.

        Raises: LorakitError when PEFT refuses this model, or would do other than it was told.
        """
        self.targets, self.tuner = tuple(targets), section.type
        of_base = {id(parameter) for parameter in model.parameters()}
        told = _config(section, self.targets, train_also) if config is None else config
        torch.manual_seed(seed)
        shaped = any(parameter.is_meta for parameter in model.parameters())
        with (
            _told(self.tuner, "before the weights are there" if shaped else "here"),
            warnings.catch_warnings(record=True) as noticed,
        ):
            warnings.simplefilter("always")
            self.peft: PeftModel = get_peft_model(model, told)
        if config is None:
            _judge(noticed, section.config)
        found = tuner_layers(model)
        if odd := sorted(found.keys() ^ {target.layer.name for target in targets}) if targets else []:
            raise LorakitError(f"adapter: {self.tuner} and adapter.targets differ in {odd[0]}")
        for layer in found.values():
            layer.register_forward_hook(in_dtype_of_base)
        trained = self.trained()
        if not any(item.role is not Role.HEAD for item in trained):
            raise LorakitError(f"adapter: {self.tuner} trains nothing on these layers", _OTHER_LAYERS)
        if base := [item.name for item in trained if id(item.parameter) in of_base]:
            raise LorakitError(f"adapter: {self.tuner} would train the base itself: {base[0]}")
        for item in trained:
            item.parameter.data = item.parameter.data.float()

    def trained(self) -> list[Trained]:
        base = self.peft.get_base_model()
        return [Trained(name, p, _role(name, p)) for name, p in base.named_parameters() if p.requires_grad]

    def ranks(self) -> dict[str, int]:
        """None: what PEFT calls `r` is a rank in some tuners, a number of blocks or of layers in others."""
        return {target.layer.name: 0 for target in self.targets}

    def try_out(self, model: Any, autocast: Callable[[], AbstractContextManager[Any]]) -> None:
        """A few tokens forward and backward; nothing stays of them. Says by how much the tuner does not start
        at the base.

        Raises: LorakitError where the tuner cannot compute on this model, or nothing of it would move.
        """
        ids = torch.arange(8, device=next(model.parameters()).device)[None] % 7
        training = model.training
        model.train()
        try:
            with _told(self.tuner):
                with autocast():
                    logits = model(input_ids=ids, use_cache=False).logits
                logits.float().square().mean().backward()
            moves = any(item.parameter.grad is not None for item in self.trained())
        finally:
            model.train(training)
            for item in self.trained():
                item.parameter.grad = None
        if not moves:
            raise LorakitError(f"adapter: nothing of {self.tuner} has a gradient here", _OTHER_LAYERS)
        with torch.no_grad(), autocast():
            start = model(input_ids=ids, use_cache=False).logits
            with self.disabled():
                base = model(input_ids=ids, use_cache=False).logits
        off = float((start.float() - base.float()).abs().max())
        if off > _ROUNDING[base.dtype == torch.float32] * float(base.abs().max()):
            what = f"{self.tuner} does not start at the base model"
            say(f"note      {what}: its first logits are up to {off:.2g} away (PEFT's init)")

    def notes(self) -> dict[str, dict[str, Any]]:
        return {target.layer.name: {"tuner": self.tuner} for target in self.targets}

    def disabled(self) -> AbstractContextManager[None]:
        return base_alone(self.peft)

    def state(self) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        first = {(t.data_ptr(), t.shape): name for name, t in reversed(tensors.items())}
        # A file holds no tensor twice; RandLoRA's layers share their projections.
        return {
            name: t.detach() if first[t.data_ptr(), t.shape] == name else t.detach().clone()
            for name, t in tensors.items()
        }

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        with torch.no_grad():
            copy_into(tensors, self.state(), "the adapter")

    def config(self, base_name: str) -> dict[str, Any]:
        return config_as_json(self.peft.peft_config["default"], base_name)

    def write(self, folder: Path, base_name: str) -> None:
        write_adapter(folder, self.config(base_name), self.state())


_ROUNDING = {True: 1e-4, False: 0.02}  # of the largest logit, in fp32 and in 16 bits
_OTHER_LAYERS = "Change adapter.config or adapter.targets, or choose another adapter.type."


@contextmanager
def _told(kind: str, where: str = "here") -> Iterator[None]:
    """Raises: LorakitError in place of what PEFT raises where the tuner `kind` cannot do something."""
    try:
        yield
    except Exception as error:
        if out_of_memory(error):
            raise
        message = f"adapter: PEFT's {kind} does not go {where}: {first_line(error)}"
        raise LorakitError(message, _OTHER_LAYERS) from None


def _judge(noticed: Sequence[warnings.WarningMessage], written: Mapping[str, Any]) -> None:
    """Say what PEFT warned of. Raises: LorakitError where it took another value than the one written.

    OFT rounds the size of its blocks layer by layer; BOFT without its CUDA extension drops a factor.
    """
    texts = list(dict.fromkeys(str(item.message) for item in noticed if item.category is not FutureWarning))
    for text in texts:
        changed = re.search(r"Setting (\w+) to (\w+)", text)
        dropped = changed and str(written.get(changed[1], changed[2])) != changed[2]
        if dropped or "Adjusted" in text:
            raise LorakitError(f"adapter.config: PEFT would not do as it is told: {text}", _OTHER_LAYERS)
        say(f"warning: PEFT: {text}")


def tuner_layers(model: Any) -> dict[str, Any]:
    """Name -> module of every layer that PEFT adapted."""
    return {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def _role(name: str, parameter: Tensor) -> Role:
    """A vector, however it lies, is a scale: weight decay would pull it to zero, where few of them start."""
    if ".modules_to_save." in name:
        return Role.HEAD
    return Role.SCALE if parameter.numel() == max(parameter.shape, default=1) else Role.OTHER


def _config(section: PeftTuner, targets: Sequence[Target], train_also: Sequence[str]) -> Any:
    """The section as PEFT's configuration, with the layers that lorakit chose.

    Raises: LorakitError for a pattern that fits none of them.
    """
    config = config_class(section.type)(**keywords(section.type, section.config))
    config.target_modules = {target.layer.name for target in targets}
    config.modules_to_save = list(train_also) or None
    config.task_type = "CAUSAL_LM"
    if hasattr(config, "fan_in_fan_out"):
        config.fan_in_fan_out = any(target.layer.kind == "conv1d" for target in targets)
    if (wanted := section.config.get("feedforward_modules")) is not None:
        config.feedforward_modules = _named("feedforward_modules", wanted, targets)
    for field, patterns in section.config.items():
        if field.endswith("_pattern") and isinstance(patterns, Mapping):
            for pattern in patterns:
                if not any(re.match(rf"(.*\.)?({pattern})$", target.layer.name) for target in targets):
                    raise _matches_nothing(field, pattern, targets)
    return config


def _named(field: str, wanted: str | Sequence[str], targets: Sequence[Target]) -> set[str]:
    """The adapted layers that `wanted` names, as adapter.targets would."""
    found: set[str] = set()
    for pattern in [wanted] if isinstance(wanted, str) else wanted:
        names = {target.layer.name for target in targets if matches(pattern, target.layer.name)}
        if not names:
            raise _matches_nothing(field, pattern, targets)
        found |= names
    return found


def _matches_nothing(field: str, pattern: str, targets: Sequence[Target]) -> LorakitError:
    known = candidates([target.layer for target in targets], pattern).replace("of this model", "adapted")
    return LorakitError(f'adapter.config.{field}: "{pattern}" matches none of the adapted layers', known)
