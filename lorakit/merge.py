"""Fold an adapter into its base: for LoRA W' = W + scale * B A, computed in fp32, rounded once, and proved.

Works on the files: what the adapter does not touch is copied as it is, what it touches keeps the dtype that
it has in its file. A base that was trained in 4 or 8 bits is first dequantized, because that is what the
adapter was trained on (adding to the original weights would be another model), and is written in bf16.

What was written is read back and compared with base and adapter (proof.py) before it gets its name. Not
here: models larger than memory; base and result are held in fp32.
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from lorakit import __version__, model_files, proof
from lorakit.adapters import write_tensors
from lorakit.base_model import DTYPES
from lorakit.checkpoint import sha256, sync
from lorakit.errors import LorakitError, RunError
from lorakit.proof import Parity
from lorakit.saved import Opened, Saved, find, open_saved
from lorakit.signals import listen, uninterrupted
from lorakit.terminal import say, track

_BESIDE = ("*.json", "*.jinja", "*.txt", "*.model")  # of a model's directory, apart from its weights


@dataclass(frozen=True)
class Merged:
    folder: Path
    num_layers: int  # that changed
    num_bytes: int
    dtype: str
    parity: Parity
    other_base: str  # the base, when it is not the one that the adapter was trained on

    def __str__(self) -> str:
        p = self.parity
        return "\n".join(
            [
                f"merged    {self.num_layers} layers, {self.num_bytes / 1e6:,.1f} MB in {self.dtype}",
                f"parity    logits differ by {p.largest_difference:.1e} at most, {p.mean_difference:.1e} on"
                f" average; the adapter moves them by up to {p.largest_effect:.1f}",
                *(
                    [f"warning   not the base it was trained on: {self.other_base}"]
                    if self.other_base
                    else []
                ),
                f"model     {self.folder}",
            ]
        )


def merge(place: str | Path, output: str | Path, base: str | None = None, dtype: str | None = None) -> Merged:
    """Write the model that base and adapter are together, as a directory that transformers loads.

    `place`: a run or an adapter. `dtype`: fp32, bf16 or fp16 for all weights; by default each keeps its own.
    Raises: LorakitError before anything is written; RunError when the merged model is not what was trained.
    """
    saved = find(Path(place))
    if saved.full:
        raise LorakitError(
            f"{saved.folder}: there is nothing to merge: full fine-tuning moved the model itself",
            f"{saved.folder} is the whole model; load it as it is.",
        )
    output = Path(output).expanduser().absolute()
    staged = output.parent / f".{output.name}.{os.getpid()}.new"
    check_output(output)
    with listen():  # whatever the signal, what was half written goes
        try:
            opened = open_saved(saved, base, torch.device("cpu"), exact=True)
            everywhere = DTYPES[dtype] if dtype else torch.bfloat16 if opened.dequantized else None
            _check_space(opened.folder, output, everywhere)
            staged.mkdir()
            merged = _merge(saved, opened, staged, output, everywhere)
            check_output(output)
            staged.rename(output)
        except (OSError, SafetensorError) as error:
            raise RunError(f"{output}: cannot be written: {error}") from None
        finally:
            with uninterrupted():
                shutil.rmtree(staged, ignore_errors=True)
        sync(output.parent)
    return merged


def check_output(output: Path) -> None:
    """Raises: LorakitError when there is something in the way, or nowhere to write."""
    try:
        if output.exists() or output.is_symlink():
            raise LorakitError(f"--output: {output} exists", "Choose another place, or remove it.")
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LorakitError(f"--output: {output} cannot be written: {error.strerror}") from None
    if not os.access(output.parent, os.W_OK):
        raise LorakitError(f"--output: no permission to write to {output.parent}", "Choose another place.")


def _merge(
    saved: Saved, opened: Opened, staged: Path, output: Path, everywhere: torch.dtype | None
) -> Merged:
    assert opened.adapter is not None and opened.contents is not None
    ids = proof.probes(opened)
    with opened.adapter.disabled():
        before = proof.logits(opened.base.model, ids)
    wanted = proof.logits(opened.base.model, ids)

    dtypes = write_weights(opened, everywhere, staged)
    _copy_beside(opened, staged, everywhere)

    model = _read_back(staged)
    if wrong := proof.different_tensor(opened, model, dtypes, everywhere or torch.float32):
        raise RunError(f"the merged model is not base and adapter: {wrong}; nothing was written")
    parity = proof.compare(before, wanted, proof.logits(model, ids))
    coarsest = max([*dtypes.values(), torch.float32], key=lambda kind: torch.finfo(kind).eps)
    if parity.largest_difference > 0.25 * parity.largest_effect:
        share = 100 * parity.largest_difference / max(parity.largest_effect, 1e-30)
        say(
            f"warning: rounding to {_name(coarsest)} moves logits by {share:.0f} % of what the adapter does;"
            " --dtype fp32 keeps all of it"
        )
    report = {
        "lorakit": __version__,
        "method": "merge",
        "adapter_sha256": sha256(saved.folder / "adapter_model.safetensors"),
        "base_fingerprint": opened.base.fingerprint,
        "dtype": _name(everywhere) if everywhere else None,
        "parity": asdict(parity),
    }
    (staged / "lorakit.json").write_text(json.dumps(report, indent=2, sort_keys=True) + "\n")
    for path in [*staged.iterdir(), staged]:
        sync(path)
    size = sum(path.stat().st_size for path in staged.glob("*.safetensors"))
    told = _name(everywhere) if everywhere else f"the base's own dtype ({_name(coarsest)})"
    trained_on = saved.provenance.get("base", {}).get("fingerprint", opened.base.fingerprint)
    other = "" if trained_on == opened.base.fingerprint else str(opened.folder)
    layers = {name.removesuffix(".bias").removesuffix(".weight") for name in opened.contents.changes}
    return Merged(output, len(layers), size, told, parity, other)


# ------------------------------------------------------------------------------------------------------------
# Weights


def write_weights(opened: Opened, everywhere: torch.dtype | None, staged: Path) -> dict[str, torch.dtype]:
    """The base's weight files with the adapter in them, file by file; returns the dtypes of what changed.

    A tensor that the adapter or quantization changes is computed in fp32 and rounded once.
    """
    contents = opened.contents
    assert contents is not None
    changes = contents.changes
    files = model_files.weight_files(opened.folder)
    keys = keys_of(files)
    experts = experts_as_stored(opened, keys)
    changed = {*changes, *contents.whole, *opened.dequantized} - {name for name, _ in experts.values()}
    outputs = layout(opened, changed, keys)
    dtypes: dict[str, torch.dtype] = {}
    index: dict[str, str] = {}
    for path in track(files, "merging", total=len(files)):
        tensors = {}
        with safe_open(path, "pt") as file:
            for stored in file.keys():  # noqa: SIM118
                old = file.get_tensor(stored)
                for key, name in outputs[stored]:
                    dtype = everywhere if everywhere and old.is_floating_point() else old.dtype
                    if key in experts:
                        name, weight = experts[key]
                        tensors[key], dtypes[name] = weight.to(dtype), dtype
                        continue
                    if name is None:
                        tensors[key] = old.to(dtype)
                        continue
                    weight = contents.whole.get(name, opened.dequantized.get(name, old)).float()
                    if weight.shape != old.shape:
                        shapes = f"{tuple(weight.shape)} in the adapter, {tuple(old.shape)} in the base"
                        raise LorakitError(f"{name} is {shapes}")
                    weight = changes[name](weight) if name in changes else weight
                    tensors[key], dtypes[name] = weight.to(dtype), dtype
        write_tensors(staged / path.name, tensors)
        index |= dict.fromkeys(tensors, path.name)
    if [path.name for path in files] != ["model.safetensors"]:
        size = sum(path.stat().st_size for path in staged.glob("*.safetensors"))
        listing = {"metadata": {"total_size": size}, "weight_map": dict(sorted(index.items()))}
        (staged / "model.safetensors.index.json").write_text(json.dumps(listing, indent=2) + "\n")
    return dtypes


def experts_as_stored(opened: Opened, keys: Sequence[str]) -> dict[str, tuple[str, Tensor]]:
    """Tensor in the base's files -> (the expert weights that it is a part of, its new value in fp32).

    The files of most mixtures hold each matrix of each expert by itself; transformers, which put them
    together, takes them apart. Raises: LorakitError where that are other tensors than those in the files.
    """
    assert opened.contents is not None
    model, found = opened.base.model, {}
    for item in opened.contents.factors:
        if item.target.layer.kind != "experts":
            continue
        name = item.target.layer.weight
        module, _, leaf = name.rpartition(".")
        weight = item.applied(getattr(model.get_submodule(module).get_base_layer(), leaf).float())
        parts = revert_weight_conversion(model, {name: weight})
        if odd := sorted(parts.keys() - set(keys)):
            raise LorakitError(
                f"{name} is {odd[0]} in files, and the base's have none of that name",
                "PEFT's merge_and_unload() and save_pretrained() merge in memory.",
            )
        found.update({key: (name, part) for key, part in parts.items()})
    return found


Outputs = dict[str, list[tuple[str, str | None]]]


def layout(opened: Opened, changed: set[str], keys: Sequence[str]) -> Outputs:
    """Tensor in the base's files -> the tensors made of it: (key to write, the changed parameter or None).

    That is one each, but where input and output embedding share a tensor and only one of them is adapted:
    from then on they are two.
    """
    ends, absent = _ends(opened), None
    if _comes_apart(opened):
        absent = next((end for end in ends if not model_files.nearest(end, model_files.by_leaf(keys))), None)
    names = {key: name for name, key in stored_names(sorted(changed - {absent}), keys).items()}
    outputs: Outputs = {key: [(key, names.get(key))] for key in keys}
    if absent is not None:
        twin = ends[0] if absent == ends[1] else ends[1]
        outputs[stored_names([twin], keys)[twin]].append((absent, absent))
    return outputs


def stored_names(parameters: Sequence[str], keys: Sequence[str]) -> dict[str, str]:
    """Parameter name in the model -> its name in the files, whose beginning may be another.

    Raises: LorakitError for a parameter that is in no file, or that two tensors could be.
    """
    index, found = model_files.by_leaf(keys), {}
    for name in parameters:
        near = model_files.nearest(name, index)
        if len(near) != 1:
            what = f"could be {near[0]} or {near[1]}" if near else "is in none of the base's files"
            raise LorakitError(
                f"{name} {what}, so that the files cannot be merged",
                "PEFT's merge_and_unload() and save_pretrained() merge in memory.",
            )
        found[name] = near[0]
    return found


def keys_of(files: Sequence[Path]) -> list[str]:
    return [key for path in files for key in model_files.header(path) if key != "__metadata__"]


def _ends(opened: Opened) -> tuple[str, str]:
    """Parameter names of the input embedding and of the output head."""
    model = opened.base.model
    names = {id(module): f"{name}.weight" for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    return names[id(model.get_input_embeddings())], names.get(id(head), "")


def _comes_apart(opened: Opened) -> bool:
    """Whether the two ends share their weights in the base, and will not any more."""
    assert opened.contents is not None
    changed = opened.contents.changes.keys() | opened.contents.whole.keys()
    if opened.contents.tokens:  # rows that both ends have
        changed = changed - {_ends(opened)[0]}
    return bool(opened.base.config.get_text_config().tie_word_embeddings and changed & set(_ends(opened)))


# ------------------------------------------------------------------------------------------------------------
# What lies beside the weights


def _copy_beside(opened: Opened, staged: Path, everywhere: torch.dtype | None) -> None:
    """Configuration, tokenizer and template; with what the weights have become said in config.json."""
    for pattern in _BESIDE:
        for path in opened.folder.glob(pattern):
            if not path.name.endswith(".index.json") and path.name not in ("README.md", "lorakit.json"):
                shutil.copyfile(path, staged / path.name)
    config = json.loads((opened.folder / "config.json").read_text())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if everywhere and (key in part or (part is config and key == "dtype")):
                part[key] = str(everywhere).removeprefix("torch.")
        if _comes_apart(opened) and (part is config or "tie_word_embeddings" in part):
            part["tie_word_embeddings"] = False
    (staged / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    template = getattr(opened.tokenizer, "chat_template", None)
    if isinstance(template, str):
        (staged / "chat_template.jinja").write_text(template)


def _check_space(base: Path, output: Path, everywhere: torch.dtype | None) -> None:
    """Raises: LorakitError when the disk cannot hold the merged model."""
    needed = 0
    for path in model_files.weight_files(base):
        tensors = (entry for key, entry in model_files.header(path).items() if key != "__metadata__")
        for entry in tensors:
            start, end = entry["data_offsets"]
            needed += prod(entry["shape"]) * everywhere.itemsize if everywhere else end - start
    free = shutil.disk_usage(output.parent).free
    if free < 1.02 * needed + (1 << 24):
        raise LorakitError(
            f"--output: {output.parent} has {free / 1e9:,.2f} GB free, the model takes {needed / 1e9:,.2f}",
            "Choose another place; --dtype bf16 takes half of fp32.",
        )


def _read_back(folder: Path) -> Any:
    """The model as anyone would load it, then in fp32."""
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise RunError(f"the merged model lacks {sorted(info['missing_keys'])[0]}; nothing was written")
    return model.eval()


def _name(dtype: torch.dtype) -> str:
    return next((name for name, value in DTYPES.items() if value == dtype), str(dtype))
