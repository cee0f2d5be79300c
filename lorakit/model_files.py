"""The files of a model: found here or on the hub, and what they say without a tensor being loaded. No torch.

A hub model is first brought to this machine as a directory, so that there is one way to load a model. Weights
are safetensors only. `shapes` is how a model is known before it is there: config.json is enough.
"""

import hashlib
import json
import os
import struct
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lorakit.errors import LorakitError
from lorakit.recipe.model import Model
from lorakit.shapes import Shapes, shapes_of

_STORED = {"F32": "fp32", "BF16": "bf16", "F16": "fp16", "F64": "fp32"}


def locate(section: Model, weights: bool = True, tokenizer: bool = True) -> Path:
    """The directory that holds the model; a hub model is downloaded into the hub's cache first.

    Without `weights` and `tokenizer` that is config.json alone.

    Raises: LorakitError for a missing directory, a directory without weights, an unreachable hub, a gated
    model.
    """
    path = Path(section.path)
    if not path.is_absolute():
        return _download(section, weights, tokenizer)
    if not path.is_dir():
        raise LorakitError(f"model.path: no such directory: {path}", "A hub id has the form owner/name.")
    if not (path / "config.json").is_file():
        raise LorakitError(f"model.path: {path} has no config.json, so it is not a model directory")
    if weights:
        weight_files(path)
    return path


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that transformers loads from a model directory, all of them there.

    model.safetensors comes before an index, and whatever else lies in the directory is not the model's.
    """
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.is_file():
        return [whole]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise LorakitError(f"{index}: not an index of weights") from None
        if odd := [name for name in names if Path(name).name != name]:
            raise LorakitError(f"{index}: names a file outside its own directory: {odd[0]}")
        if missing := [name for name in names if not (path / name).is_file()]:
            raise LorakitError(
                f"model.path: {path} lacks {missing[0]}, which its index names", "Copy it there."
            )
        return [path / name for name in names]
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in (".bin", ".pt", ".pth"))
    hint = (
        "Load it once with transformers and save_pretrained() it: that writes safetensors." if pickled else ""
    )
    found = f" ({pickled[0]} is a pickle, which can run code: lorakit does not load it)" if pickled else ""
    message = f"model.path: {path} has no weights: no model.safetensors and no index of shards{found}"
    raise LorakitError(message, hint)


def _download(section: Model, weights: bool, tokenizer: bool) -> Path:
    from huggingface_hub import errors as hub
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] if tokenizer else ["config.json"]
    patterns += ["*.safetensors"] if weights else []
    patterns += ["*.py"] if section.trust_remote_code else []
    name = section.path + (f" (revision {section.revision})" if section.revision else "")
    try:
        found = Path(
            snapshot_download(
                section.path,
                revision=section.revision,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
            )
        )
    except hub.GatedRepoError:
        raise LorakitError(
            f"model.path: {name} is gated",
            f"Accept its licence on its hub page ({section.path}), then set HF_TOKEN or run `hf auth login`.",
        ) from None
    except hub.RevisionNotFoundError:
        raise LorakitError(f"model.revision: {section.path} has no revision {section.revision}") from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise LorakitError(
            f"model.path: {name} is neither a directory nor a model on the hub that you may see",
            "A directory is relative to the recipe; a private model needs HF_TOKEN.",
        ) from None
    except (hub.LocalEntryNotFoundError, hub.OfflineModeIsEnabled):
        offline = (
            "HF_HUB_OFFLINE is set"
            if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
            else "no connection"
        )
        raise LorakitError(
            f"model.path: {name} is not on this machine, and the hub cannot be reached ({offline})",
            "A local directory must be absolute or relative to the recipe, for example ./models/tiny.",
        ) from None
    except (OSError, hub.HfHubHTTPError) as error:
        raise LorakitError(f"model.path: cannot fetch {name}: {str(error).splitlines()[0]}") from None
    if not (found / "config.json").is_file():
        raise LorakitError(f"model.path: {name} has no config.json on the hub")
    if weights:
        weight_files(found)
    return found


def cached_config(name: str, revision: str | None = None) -> Path | None:
    """config.json of a hub model in the hub's cache on this machine, or None; the hub is not asked."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises: LorakitError when the file holds none."""
    try:
        value = json.loads(path.read_text())
    except OSError as error:
        raise LorakitError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise LorakitError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise LorakitError(f"{path}: expected a JSON object")
    return value


def header(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name -> dtype, shape, offsets."""
    with path.open("rb") as file:
        first = file.read(8)
        size = struct.unpack("<Q", first)[0] if len(first) == 8 else 0
        if not 0 < size <= 100_000_000 or size + 8 > path.stat().st_size:
            raise LorakitError(f"{path}: not a safetensors file, or cut short")
        try:
            return dict(json.loads(file.read(size)))
        except ValueError:
            raise LorakitError(f"{path}: damaged safetensors header") from None


def by_leaf(keys: Iterable[str]) -> dict[str, list[str]]:
    """Last two parts of a name -> the keys that end so."""
    index: dict[str, list[str]] = {}
    for key in keys:
        index.setdefault(".".join(key.split(".")[-2:]), []).append(key)
    return index


def nearest(name: str, index: dict[str, list[str]]) -> list[str]:
    """The keys that share most with `name`: the longest common end, then most of the other parts. The reader
    proves what it read: this is a guess."""
    candidates = index.get(".".join(name.split(".")[-2:]), [])
    if name in candidates:
        return [name]

    def shared(key: str) -> tuple[int, int]:
        ours, theirs = name.split("."), key.split(".")
        same = 0
        while same < min(len(ours), len(theirs)) and ours[-1 - same] == theirs[-1 - same]:
            same += 1
        return same, len({*ours[: len(ours) - same]} & {*theirs[: len(theirs) - same]})

    most = max(map(shared, candidates), default=(0, 0))
    return [key for key in candidates if shared(key) == most]


def stored_dtype(folder: Path) -> str:
    """fp32, bf16 or fp16: in which most of the model's parameters are stored."""
    sizes: Counter[str] = Counter()
    for file in weight_files(folder):
        for name, tensor in header(file).items():
            if name != "__metadata__" and tensor["dtype"] in _STORED:
                start, end = tensor["data_offsets"]
                sizes[_STORED[tensor["dtype"]]] += end - start
    if not sizes:
        raise LorakitError(
            f"model.path: {folder} holds no fp32, bf16 or fp16 weights", "Give the unquantized model."
        )
    return sizes.most_common(1)[0][0]


def fingerprint(folder: Path) -> str:
    """SHA-256 over config.json and, of every weight file, its size and its first and last MiB."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            digest.update(file.read(1 << 20))
            file.seek(max(0, size - (1 << 20)))
            digest.update(file.read(1 << 20))
    return digest.hexdigest()


def shapes(folder: Path) -> Shapes:
    """Layers and parameters of the model in a directory, of which only config.json is read.

    From the table of shapes.py, else from the model on the meta device (which imports torch). Raises:
    LorakitError when config.json does not describe a model.
    """
    found = shapes_from_table(folder)
    if found is None:
        from lorakit.layers import shapes_on_meta

        found = shapes_on_meta(folder)
    return found


def shapes_from_table(folder: Path) -> Shapes | None:
    """The same, or None for a type that is not in the table of shapes.py. No torch."""
    file = folder / "config.json"
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise LorakitError(
            f"{file}: model_type is missing", 'It names the architecture, for example "model_type": "llama".'
        )
    return shapes_of(config, str(file))
