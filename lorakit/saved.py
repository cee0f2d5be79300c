"""What was trained, taken up again: a run or an adapter directory, and the base that it belongs to.

Every verb that reads a finished run begins here: find() says what lies there, open_saved() loads it.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lorakit import base_model, model_files, runs
from lorakit.adapter_file import kind_of
from lorakit.adapters import Adapter, attach, lora_files
from lorakit.base_model import Base
from lorakit.devices import autocast_for
from lorakit.errors import LorakitError
from lorakit.layers import layers_of, matrix_of
from lorakit.recipe import is_hub_id, load_recipe
from lorakit.recipe.methods import Dora, Lora
from lorakit.recipe.model import Model
from lorakit.terminal import say
from lorakit.tokenizer import load_tokenizer, quiet, template_text

_SAY_BASE = "--base PATH (generate and chat: --base-path)"
_SAFE_PARTS = ("path", "revision", "quantize", "double_quant", "compute_dtype")


@dataclass(frozen=True)
class Saved:
    """A place that holds something trained."""

    folder: Path  # adapter/, a checkpoint, a directory that PEFT wrote; model/ of full fine-tuning
    run: Path | None  # the run directory around it
    provenance: dict[str, Any]  # lorakit.json; empty for an adapter of other tools
    full: bool  # the folder is a whole model


@dataclass(frozen=True)
class Opened:
    """A base model in memory with its adapter attached, in eval mode."""

    base: Base
    folder: Path  # of the base
    adapter: Adapter | None  # None: full fine-tuning, the base is what was trained
    contents: lora_files.Contents | None
    tokenizer: Any | None  # None where there is none
    precision: str  # fp32 or bf16: what products are computed in
    autocast: Callable[[], AbstractContextManager[Any]]  # as it was trained
    device: torch.device
    dequantized: Mapping[str, Tensor] = field(default_factory=dict)  # exact: parameter -> the matrix it meant


# ------------------------------------------------------------------------------------------------------------
# Finding


def find(place: Path) -> Saved:
    """What lies at `place`: a run, its adapter/ or model/, one of its checkpoints, or an adapter of PEFT's.

    Raises: LorakitError when it is none of these, or a run that has not written its adapter yet.
    """
    place = place.expanduser().absolute()
    runs.must_exist(place)
    if (place / "run.json").is_file():
        return _find_in_run(place)
    around = place.parent.parent if place.parent.name == "checkpoints" else place.parent
    run = around if (around / "run.json").is_file() else None
    provenance = _provenance(place)
    if provenance.get("method") == "full":
        return Saved(place, run, provenance, full=True)
    if not (place / "adapter_config.json").is_file():
        if run is not None and place.parent.name == "checkpoints":
            raise LorakitError(
                f"{place}: a checkpoint of this method is for resuming only", runs.continue_hint(run)
            )
        raise LorakitError(
            f"{place} is neither a run nor an adapter: it has no run.json and no adapter_config.json",
            "Give a run directory, RUN/adapter, or a directory that PEFT's save_pretrained wrote.",
        )
    if not provenance and run is not None and place.parent.name == "checkpoints":
        provenance = _provenance_of_run(run)
    return Saved(place, run, provenance, full=False)


def _find_in_run(run: Path) -> Saved:
    for name in ("adapter", "model"):
        if (run / name).is_dir():
            return Saved(run / name, run, _provenance(run / name), full=name == "model")
    status = runs.read_record(run).get("status", "unfinished")
    saved = sorted(file.parent for file in run.glob("checkpoints/step-*/adapter_config.json"))
    hint = f"Or give a checkpoint of it: {saved[-1]}" if saved else ""
    raise LorakitError(
        f"{run} has no adapter yet: the run is {status}", f"{runs.continue_hint(run)}\n  {hint}".rstrip()
    )


def _provenance(folder: Path) -> dict[str, Any]:
    """The content of lorakit.json, or nothing where there is none.

    It may come from anywhere. Raises: LorakitError for a value that is not what lorakit writes there.
    """
    file = folder / "lorakit.json"
    if not file.is_file():
        return {}
    values = model_files.read_json(file)
    if values.get("method") == "merge":
        raise LorakitError(
            f"{folder} is a merged model: there is no adapter in it",
            "transformers loads it as any other model. This verb wants the run, or the adapter.",
        )
    base: Any = values.get("base")
    texts = [values.get("format"), values.get("chat_template")]
    try:
        Model(**{key: base[key] for key in _SAFE_PARTS if base.get(key) is not None})
        known = base["dtype"] in base_model.DTYPES and values["precision"] in ("fp32", "bf16")
        texts.append(base["fingerprint"])
    except (ValidationError, AttributeError, KeyError, TypeError):
        known = False
    if not known or not all(text is None or isinstance(text, str) for text in texts):
        raise LorakitError(f"{file}: not as lorakit wrote it", "Restore it, or copy the adapter again.")
    return values


def _provenance_of_run(run: Path) -> dict[str, Any]:
    """What lorakit.json would say, for a checkpoint: from the run around it."""
    record, recipe = runs.read_record(run), load_recipe(run / "resolved.yaml")
    decided = {name: decision["value"] for name, decision in record["decisions"].items()}
    base = {name: getattr(recipe.model, name) for name in _SAFE_PARTS}
    facts = {"fingerprint": record["fingerprints"]["model"], "dtype": decided["model.dtype"]}
    return {
        "method": recipe.adapter.method,
        "base": base | facts,
        "precision": decided["training.precision"],
        "format": decided["data.format"],
        "chat_template": template_text(recipe.data.chat_template),
    }


# ------------------------------------------------------------------------------------------------------------
# Its base


def base_section(saved: Saved, base: str | None) -> Model:
    """How to load the base of `saved`; `base`: a directory or hub id in place of the one it was trained on.

    Raises: LorakitError when the base is not where it was, or nothing that may be trusted says where it is.
    """
    told = {k: v for k, v in saved.provenance.get("base", {}).items() if k in _SAFE_PARTS and v is not None}
    if base is not None:
        local = Path(base).expanduser()
        there = str(local.absolute()) if local.is_dir() or not is_hub_id(base) else base
        return Model(**{**told, "path": there, "revision": None})
    if not saved.provenance:
        return _section_of_foreign(saved)
    section = Model(**told)
    if section.path.startswith("/") and not Path(section.path).is_dir():
        raise LorakitError(
            f"the base model is not where it was: {section.path}", f"If it was moved, add {_SAY_BASE}."
        )
    return section


def _section_of_foreign(saved: Saved) -> Model:
    """The base that an adapter of other tools names, when it is a hub model that is on this machine already:
    what somebody else's file says is neither followed as a path nor fetched."""
    config = model_files.read_json(saved.folder / "adapter_config.json")
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if isinstance(name, str) and is_hub_id(name) and not Path(name).exists():
        told = revision if isinstance(revision, str) else None
        if model_files.cached_config(name, told):
            return Model(path=name, revision=told)
    raise LorakitError(
        f"{saved.folder}: which base it was trained on must be said (its file names {name})",
        f"Add {_SAY_BASE}.",
    )


def locate_base(section: Model, given: bool, weights: bool = True, tokenizer: bool = True) -> Path:
    """model_files.locate, for a base that the user named on the command line if `given`, and in no recipe."""
    try:
        return model_files.locate(section, weights, tokenizer)
    except LorakitError as error:
        if not given:
            raise
        hint = error.hint.replace("relative to the recipe", "relative to the current directory")
        hint = f"It was given as the base: {_SAY_BASE}. {hint}".rstrip()
        raise LorakitError(error.message.removeprefix("model.path: "), hint) from None


def warn_of_other_base(one: Saved, other: Saved) -> None:
    """A warning where the bases that two adapters were trained on are known to be of other files."""
    bases = [saved.provenance.get("base", {}).get("fingerprint") for saved in (one, other)]
    if None not in bases and bases[0] != bases[1]:
        say(f"warning: {other.folder} was trained on another base than {one.folder}")


def check_base(saved: Saved, folder: Path, given: bool) -> None:
    """Raises: LorakitError when the base's files are others than those trained on; where the user named the
    base, a warning."""
    before = saved.provenance.get("base", {}).get("fingerprint")
    if saved.full or before is None or before == model_files.fingerprint(folder):
        return
    if not given:
        raise LorakitError(
            f"{folder}: the base model's files are not those that {saved.folder} was trained on",
            f"Restore them; or, to use these all the same, name {folder}: {_SAY_BASE}",
        )
    say(f"warning: {folder} has other files than the base that {saved.folder} was trained on")


def open_saved(saved: Saved, base: str | None, device: torch.device, exact: bool = False) -> Opened:
    """The base with the adapter attached. `exact`: in fp32 throughout, for comparisons.

    Raises: LorakitError for a base that is not there, or that the adapter does not fit.
    """
    quiet()
    section = Model(path=str(saved.folder)) if saved.full else base_section(saved, base)
    folder = locate_base(section, given=base is not None)
    check_base(saved, folder, given=base is not None)
    stored = model_files.stored_dtype(folder)
    dtype = stored if saved.full else saved.provenance.get("base", {}).get("dtype", stored)
    if exact and section.quantize == "none":
        dtype = "fp32"
    loaded = base_model.load(folder, section, "AutoModelForCausalLM", dtype, device)
    if section.quantize == "none":
        loaded.model.to(device)
    dequantized = in_fp32(loaded.model) if exact else {}
    loaded = replace(loaded, layers=layers_of(loaded.model)[0]) if dequantized else loaded
    adapter, contents = (None, None) if saved.full else attach_saved(saved, loaded)
    loaded.model.eval()
    precision = saved.provenance.get("precision", "fp32" if stored == "fp32" else "bf16")
    precision = "fp32" if exact else precision
    autocast = nullcontext if precision == "fp32" else autocast_for(precision, device)
    tokenizer = _tokenizer(folder, section, saved.provenance.get("chat_template"))
    return Opened(loaded, folder, adapter, contents, tokenizer, precision, autocast, device, dequantized)


def attach_saved(saved: Saved, base: Base) -> tuple[Adapter, lora_files.Contents]:
    """The adapter's file on the base."""
    ours = dict(base.model.state_dict())
    if kind_of(saved.folder) != "LORA":
        from lorakit.adapters.tuner_files import read_tuner  # PEFT's classes, all of them

        tuner, contents = read_tuner(saved.folder, base.model, base.layers)
        _check_copies(saved.folder, contents, ours)
        base.model.requires_grad_(False)
        return tuner, contents
    contents = lora_files.read_adapter(saved.folder, base.layers)
    if not contents.factors:
        raise LorakitError(f"{saved.folder}: it adapts no layer", "Give the directory of a LoRA.")
    _check_copies(saved.folder, contents, ours)
    scaling: Any = contents.scaling
    section = Dora(method="dora", scaling=scaling) if contents.method == "dora" else Lora(scaling=scaling)
    also, tokens = contents.train_also, contents.tokens
    adapter = attach(section, base.model, contents.targets, seed=0, train_also=also, tokens=tokens)
    adapter.load_state(contents.tensors)
    base.model.requires_grad_(False)
    return adapter, contents


def _check_copies(folder: Path, contents: lora_files.Contents, ours: Mapping[str, Tensor]) -> None:
    """Raises: LorakitError where the adapter's file holds other weights than the base, `ours`."""
    for name, theirs in contents.copies.items():
        same = name in ours and theirs.shape == ours[name].shape
        if not (same and torch.allclose(theirs.to(ours[name]), ours[name], rtol=1e-2, atol=1e-3)):
            raise LorakitError(
                f"{folder}: it holds another {name} than this base",
                f"Give the base it was trained on, {_SAY_BASE}; PEFT itself merges new embeddings.",
            )


@torch.no_grad()
def in_fp32(model: Any) -> dict[str, Tensor]:
    """Every number and product in fp32, in place; a layer in 4 or 8 bits becomes the layer of the files, with
    the matrix it means.

    Returns these matrices: parameter name -> (out, in), or (in, out) of a Conv1D.
    """
    import bitsandbytes

    found: dict[str, Tensor] = {}
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    for name, module in [item for item in model.named_modules() if isinstance(item[1], kinds)]:
        transposed = issubclass(getattr(module, "source_cls", nn.Linear), Conv1D)
        matrix = matrix_of(module).float()
        with torch.device("meta"):
            plain: Any = Conv1D(*matrix.shape) if transposed else nn.Linear(*matrix.T.shape)
        plain.weight = nn.Parameter(matrix.T.contiguous() if transposed else matrix)
        plain.bias = module.bias
        model.set_submodule(name, plain)
        found[f"{name}.weight"] = plain.weight
    for tensor in (*model.parameters(), *model.buffers()):  # transformers refuses float() when quantized
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return found


def _tokenizer(folder: Path, section: Model, chat_template: str | None) -> Any | None:
    """`chat_template`: as text; what a file of others says is never opened."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
        return None
    tokenizer = load_tokenizer(folder, section, None)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    return tokenizer
