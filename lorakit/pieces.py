"""Everything that an adapter or a full fine-tuning changed, matrix by matrix, none of it computed yet.

A LoRA is read from its file alone; its base's weights, where they are on this machine, one tensor at a time
from their files. The base is loaded as a model where nothing else tells what its weights are: in 4 or 8 bits,
where transformers puts experts together, and under PEFT's other tuners, whose change is what their merge
makes of a weight, less that weight (in fp32: it is known to 1e-7 of the weight's entries).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from lorakit import adapter_file, anatomy, base_model, model_files
from lorakit.adapter_file import ROWS, AdapterFile, kind_of
from lorakit.adapters.lora_files import PREFIX, Contents, Factors, read_adapter
from lorakit.anatomy import Update
from lorakit.errors import LorakitError
from lorakit.layers import matrix_of
from lorakit.merge import keys_of, stored_names
from lorakit.recipe import load_recipe
from lorakit.recipe.methods import auto_alpha
from lorakit.recipe.model import Model
from lorakit.recipe.traits import is_exported
from lorakit.saved import Saved, base_section, check_base, locate_base, open_saved
from lorakit.shapes import Layer, Shapes
from lorakit.targets import matches
from lorakit.tokenizer import quiet

Read = Callable[[str], Tensor]  # parameter name -> the base's tensor, as a model stores it


@dataclass(frozen=True)
class Piece:
    """A matrix that was trained: of a layer, of one expert of it, some rows of an embedding, or a parameter
    trained whole. All (O, I), whatever the model stores; what is no matrix is (O, 1)."""

    name: str  # of the layer, or of the parameter
    expert: int | None
    trained_as: str  # lora, dora, rows, whole, full, or the tuner's name
    sides: tuple[int, int]  # (O, I)
    rank: int  # 0: it has none
    alpha: float | None
    scale: float | None
    update: Callable[[], Update]
    weight: Callable[[], Tensor] | None  # None: the base is not here

    @property
    def key(self) -> tuple[str, int]:
        return self.name, -1 if self.expert is None else self.expert


@dataclass(frozen=True)
class Changes:
    folder: Path
    method: str
    base: Path | None  # None: not here
    without_base: str | None  # why its weights are not
    pieces: Sequence[Piece]
    notes: Mapping[str, dict[str, Any]]  # layer -> what the run knows of it


def read(saved: Saved, base: str | None) -> Changes:
    """What was trained in `saved`. `base`: in place of the recorded one.

    Raises: LorakitError for files that do not fit, and without the base where the change cannot be told.
    """
    quiet()
    method, notes = saved.provenance.get("method", ""), _notes(saved)
    if saved.full:
        before, pieces = _of_full(saved, base)
        return Changes(saved.folder, "full", before, None, pieces, notes)
    if (kind := kind_of(saved.folder)) != "LORA":
        opened = open_saved(saved, base, torch.device("cpu"), exact=True)
        assert opened.contents is not None
        pieces = _of_tuner(kind, opened.base.model, opened.base.layers, opened.contents)
        return Changes(saved.folder, kind, opened.folder, None, pieces, notes)
    home, section, why = _home(saved, base)
    shapes = model_files.shapes(home) if home else None
    file = adapter_file.read(saved.folder)
    contents = read_adapter(saved.folder, shapes.layers if shapes else _layers_in(file))
    get = None
    if home and shapes and section and not why:
        names = [item.target.layer.weight for item in contents.factors]
        names += [*contents.whole, *(f"{name}.weight" for name in file.rows(shapes.layers))]
        get = _reader(home, section, shapes, names)
    if get is None and contents.method == "dora":
        raise LorakitError(f"{saved.folder}: the change of a DoRA depends on its base: {why}", _NAME_BASE)
    pieces = [piece for item in contents.factors for piece in _of_factors(item, contents.method, get)]
    if get is not None and shapes is not None:
        of_weight = {layer.weight: layer for layer in shapes.layers}
        pieces += _of_rows(file, contents, shapes, get)
        for name, tensor in contents.whole.items():
            new = partial(_given, contents.whole)
            pieces += _whole(name, "whole", of_weight.get(name), tensor.shape, get, new)
    elif beside := len(contents.whole) + bool(contents.tokens):
        why = f"{why}; {beside} tensors trained beside the adapter are left out"
    return Changes(saved.folder, method or contents.method, home, why, pieces, notes)


_NAME_BASE = "Name it: --base PATH."


def _notes(saved: Saved) -> dict[str, dict[str, Any]]:
    """What params.json of the run around it says of a layer's rank, and why it is that."""
    if saved.run is None or not (saved.run / "params.json").is_file():
        return {}
    told = ("rank", "init_rank", "explained", "importance", "shared_with")
    modules = model_files.read_json(saved.run / "params.json").get("modules", [])
    try:
        section: Any = load_recipe(saved.run / "resolved.yaml").adapter
    except LorakitError:
        section = None
    own = section if section and is_exported(section) and not getattr(section, "start_from", None) else None
    return {
        entry["name"]: {key: entry[key] for key in told if key in entry} | _of_method(own, entry)
        for entry in modules
    }


def _of_method(section: Any, entry: Mapping[str, Any]) -> dict[str, float]:
    """alpha and scale of a layer of params.json where a method is shipped as another's files, in which the
    scale is 1; nothing where `section` is None or has no scale."""
    rank = entry.get("init_rank", entry.get("rank"))
    if not rank or not hasattr(section, "alpha"):
        return {}
    stabilized = getattr(section, "scaling", "") == "rank_stabilized"
    alpha = auto_alpha(section)[0] if section.alpha == "auto" and stabilized else section.alpha
    patterns = getattr(section, "alpha_pattern", {}).items()
    alpha = [alpha, *(value for pattern, value in patterns if matches(pattern, entry["name"]))][-1]
    alpha = 2.0 * rank if alpha == "auto" else alpha
    return {"alpha": alpha, "scale": alpha / (math.sqrt(rank) if stabilized else rank)}


# ------------------------------------------------------------------------------------------------------------
# The base


def _home(saved: Saved, base: str | None) -> tuple[Path | None, Model | None, str | None]:
    """(the base's directory, how to load it, why its weights are not known); all that is on this machine.

    Raises: LorakitError for a `base` that is none.
    """
    home = None
    try:
        section = base_section(saved, base)
        if base is None and not Path(section.path).is_absolute():  # nothing is fetched without being asked
            cached = model_files.cached_config(section.path, section.revision)
            if cached is None:
                raise LorakitError(f"{section.path} is not on this machine")
            home = cached.parent
        else:
            home = locate_base(section, base is not None, weights=False, tokenizer=False)
        model_files.weight_files(home)
        check_base(saved, home, given=base is not None)
    except LorakitError as error:
        if base is not None and home is None:
            raise
        return home, None, error.message
    return home, section, None


def _layers_in(file: AdapterFile) -> list[Layer]:
    """The layers of a LoRA as its file alone knows them.

    Raises: LorakitError where it takes the model to know them.
    """
    if file.config.get("target_parameters") or file.trained_rows:
        what = "experts" if file.config.get("target_parameters") else "rows of an embedding"
        raise LorakitError(f"{file.folder}: it adapts {what}, which takes its base to read", _NAME_BASE)
    found = []
    for name, tensors in sorted(file.adapted.items(), key=lambda item: _by_number(item[0])):
        inside, outside, _ = file.sides(name)
        kind: Any = "embedding" if "lora_embedding_A" in tensors else "linear"
        found.append(Layer(name, kind, inside, outside))
    return found


def _by_number(name: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in name.split(".")]


def _reader(folder: Path, section: Model, shapes: Shapes, names: Sequence[str]) -> Read:
    """Reads single tensors of the files where each of `names` is one of theirs, else of the loaded model."""
    if section.quantize == "none" and (found := _in_files(folder, shapes, names)):
        return partial(_from_file, found)
    dtype = model_files.stored_dtype(folder)
    return partial(
        _from_model,
        base_model.load(folder, section, "AutoModelForCausalLM", dtype, torch.device("cpu")).model,
    )


def _in_files(folder: Path, shapes: Shapes, names: Sequence[str]) -> dict[str, tuple[Path, str]]:
    """Parameter -> (file, key); empty where not each is there in the model's own shape."""
    files = model_files.weight_files(folder)
    tensors = {key: (file, entry) for file in files for key, entry in model_files.header(file).items()}
    own = {name: shapes.aliases.get(name, name) for name in names}
    try:
        keys = stored_names(sorted(set(own.values())), keys_of(files))
    except LorakitError:
        return {}
    if any(tuple(tensors[key][1]["shape"]) != shapes.parameters.get(name) for name, key in keys.items()):
        return {}
    return {name: (tensors[keys[same]][0], keys[same]) for name, same in own.items()}


def _from_file(found: Mapping[str, tuple[Path, str]], name: str) -> Tensor:
    file, key = found[name]
    try:
        with safe_open(file, "pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
    except (OSError, SafetensorError) as error:
        raise LorakitError(f"{file}: cannot be read: {error}") from None
    return tensor


def _from_model(model: Any, name: str) -> Tensor:
    """A parameter; of a layer in 4 or 8 bits the matrix that it means, as the layer would store it."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    tensor: Tensor = getattr(module, leaf)
    if tensor.is_floating_point():
        return tensor
    matrix = matrix_of(module)
    return matrix.T if issubclass(getattr(module, "source_cls", object), Conv1D) else matrix


def _matrix(layer: Layer | None, expert: int | None, tensor: Tensor) -> Tensor:
    """(O, I) of a parameter as it is stored, in fp32. `layer`: whose weight it is, if it is one."""
    if layer is None:
        return tensor.float().reshape(len(tensor), -1) if tensor.dim() else tensor.float().reshape(1, 1)
    if expert is not None:
        return (tensor[expert].T if layer.transposed else tensor[expert]).float()
    # A Conv1D stores (I, O); an Embedding is (vocabulary, O).
    return (tensor if layer.kind == "linear" else tensor.T).float()


# ------------------------------------------------------------------------------------------------------------
# What was trained


def _experts(layer: Layer | None) -> Sequence[int | None]:
    return range(layer.num_experts) if layer and layer.kind == "experts" else (None,)


def _of_factors(item: Factors, method: str, get: Read | None) -> list[Piece]:
    """One piece; of experts one for each."""
    target, layer = item.target, item.target.layer
    sides, found = (layer.out_features, layer.in_features), []
    for expert in _experts(layer):
        a, b = item.a, item.b
        if expert is not None:
            a = a.unflatten(0, (layer.num_experts, -1))[expert]
            b = b.unflatten(1, (-1, layer.num_experts))[..., expert]
        weight = partial(_weight, get, layer, expert, layer.weight) if get else None
        update = partial(anatomy.of_factors, a, b, item.scale)
        if item.magnitude is not None and weight:
            update = partial(_dora, weight, a, b, item.scale, item.magnitude)
        found.append(
            Piece(layer.name, expert, method, sides, target.rank, target.alpha, item.scale, update, weight)
        )
    return found


def _whole(
    name: str, how: str, layer: Layer | None, shape: Sequence[int], old: Read, new: Read
) -> list[Piece]:
    """How two tensors of `shape`, the parameter `name` before and after, differ. `layer`: whose weight it is,
    if it is one."""
    found = []
    for expert in _experts(layer):
        sides = _matrix(layer, expert, torch.empty(*shape, device="meta")).shape
        weight, moved = (partial(_weight, get, layer, expert, name) for get in (old, new))
        plain = name.removesuffix(".weight")
        update = partial(_difference, moved, weight)
        found.append(Piece(plain, expert, how, (sides[0], sides[1]), 0, None, None, update, weight))
    return found


def _of_rows(file: AdapterFile, contents: Contents, shapes: Shapes, get: Read) -> list[Piece]:
    """The trained rows of the input embedding, as a matrix of their own."""
    found = []
    for name, ids in file.rows(shapes.layers).items():
        rows = contents.tensors[f"{PREFIX}{name}{ROWS}"]
        table = Layer(name, "embedding", *rows.shape)

        old = partial(_some, get, list(ids))
        found += _whole(table.weight, "rows", table, rows.shape, old, partial(_given, {table.weight: rows}))
    return found


def _of_tuner(kind: str, model: Any, layers: Sequence[Layer], contents: Contents) -> list[Piece]:
    """What PEFT's merge makes of weights and biases; `model` has the adapter attached, in fp32."""
    of_weight = {layer.weight: layer for layer in layers}

    def old(name: str) -> Tensor:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        base = module.get_base_layer() if name in contents.changes else module.original_module
        tensor: Tensor = getattr(base, leaf)
        return tensor.detach()

    def new(name: str) -> Tensor:
        return contents.changes[name](old(name)) if name in contents.changes else contents.whole[name]

    return [
        piece
        for name in (*contents.changes, *contents.whole)
        for piece in _whole(
            name,
            kind if name in contents.changes else "whole",
            of_weight.get(name),
            old(name).shape,
            old,
            new,
        )
    ]


def _of_full(saved: Saved, base: str | None) -> tuple[Path, list[Piece]]:
    """Every parameter of a model against the one that it was before.

    Raises: LorakitError when that is not here, or is another model.
    """
    home, section, why = _home(saved, base)
    if home is None or section is None:
        what = "what full fine-tuning changed takes its base to see"
        raise LorakitError(f"{saved.folder}: {what}: {why}", _NAME_BASE)
    shapes, before = model_files.shapes(saved.folder), model_files.shapes(home)
    if shapes.parameters != before.parameters:
        raise LorakitError(f"{saved.folder} and {home} are models of different shapes", _NAME_BASE)
    of_weight = {layer.weight: layer for layer in shapes.layers}
    new = _reader(saved.folder, Model(path=str(saved.folder)), shapes, list(shapes.parameters))
    old = _reader(home, section, shapes, list(shapes.parameters))
    return home, [
        piece
        for name, shape in shapes.parameters.items()
        for piece in _whole(name, "full", of_weight.get(name), shape, old, new)
    ]


def _weight(get: Read, layer: Layer | None, expert: int | None, name: str) -> Tensor:
    return _matrix(layer, expert, get(name))


def _some(get: Read, ids: list[int], name: str) -> Tensor:
    return get(name)[ids]


def _given(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return tensors[name]


def _dora(weight: Callable[[], Tensor], a: Tensor, b: Tensor, scale: float, magnitude: Tensor) -> Update:
    return anatomy.of_dora(weight(), a, b, scale, magnitude)


def _difference(new: Callable[[], Tensor], old: Callable[[], Tensor]) -> Update:
    return anatomy.of_matrix(new().double() - old().double())
