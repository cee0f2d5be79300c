"""Where a model's files are found, and what they say before anything is loaded."""

import json
import shutil
from pathlib import Path

import pytest

from lorakit import base_model, model_files
from lorakit.errors import LorakitError
from lorakit.recipe.model import Model


def model_copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny / "model", tmp_path / "model"))


def test_a_directory_without_weights(tiny: Path, tmp_path: Path) -> None:
    folder = model_copy(tiny, tmp_path)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(LorakitError, match=r"no model\.safetensors.*pickle"):
        model_files.locate(Model(path=str(folder)))


def test_a_missing_directory_and_one_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(LorakitError, match="no such directory"):
        model_files.locate(Model(path=str(tmp_path / "nowhere")))
    with pytest.raises(LorakitError, match=r"no config\.json"):
        model_files.locate(Model(path=str(tmp_path)))


def test_the_hub_is_named_when_it_cannot_be_reached() -> None:
    with pytest.raises(LorakitError, match="hub cannot be reached") as caught:
        model_files.locate(Model(path="no-such-owner/no-such-model"))
    assert "HF_HUB_OFFLINE" in str(caught.value)


@pytest.mark.parametrize(
    ("error", "text"),
    [
        ("GatedRepoError", "is gated"),
        ("RepositoryNotFoundError", "neither"),
        ("RevisionNotFoundError", "no revision"),
    ],
)
def test_what_the_hub_answers_becomes_one_message(
    error: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub
    from huggingface_hub import errors

    def refuse(*args: object, **kwargs: object) -> None:
        raise getattr(errors, error).__new__(getattr(errors, error))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(LorakitError, match=text):
        model_files.locate(Model(path="owner/name", revision="v1"))


def test_the_hub_is_asked_for_safetensors_only_and_no_code(
    monkeypatch: pytest.MonkeyPatch, tiny: Path
) -> None:
    asked = {}

    def download(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(tiny / "model")

    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert model_files.locate(Model(path="owner/name", revision="v1")) == tiny / "model"
    assert asked["revision"] == "v1"
    assert not [p for p in asked["allow_patterns"] if p.endswith((".py", ".bin", "*"))]
    model_files.locate(Model(path="owner/name"), weights=False)
    assert "*.safetensors" not in asked["allow_patterns"]


def test_a_sharded_model_lacking_a_shard(tiny: Path, tmp_path: Path) -> None:
    folder = model_copy(tiny, tmp_path)
    (folder / "model.safetensors").rename(folder / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(LorakitError, match=r"lacks model-1\.safetensors"):
        model_files.locate(Model(path=str(folder)))
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"a": "../../etc/x.safetensors"}})
    )
    with pytest.raises(LorakitError, match="outside its own directory"):
        model_files.locate(Model(path=str(folder)))


@pytest.mark.parametrize(
    "stranger", ["adapter_model.safetensors", "consolidated.safetensors", "model.safetensors.index.json"]
)
def test_what_lies_beside_the_weights_is_not_the_model(stranger: str, tiny: Path, tmp_path: Path) -> None:
    """transformers loads model.safetensors alone, whatever is there; a stranger is not even opened."""
    from transformers import AutoModelForCausalLM

    folder = model_copy(tiny, tmp_path)
    before = model_files.fingerprint(folder), model_files.stored_dtype(folder)
    (folder / stranger).write_bytes(b"not weights")
    assert model_files.weight_files(folder) == [folder / "model.safetensors"]
    assert (model_files.fingerprint(folder), model_files.stored_dtype(folder)) == before
    AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)


def test_weights_of_another_name_are_not_a_model(tiny: Path, tmp_path: Path) -> None:
    folder = model_copy(tiny, tmp_path)
    (folder / "model.safetensors").rename(folder / "consolidated.safetensors")
    with pytest.raises(LorakitError, match=r"no model\.safetensors and no index"):
        model_files.locate(Model(path=str(folder)))


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_the_stored_dtype_is_read_from_the_weights(dtype: str, tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=base_model.DTYPES[dtype])
    model.save_pretrained(tmp_path / "stored")
    assert model_files.stored_dtype(tmp_path / "stored") == dtype


def test_the_fingerprint_sees_weights_and_configuration(tiny: Path, tmp_path: Path) -> None:
    folder = model_copy(tiny, tmp_path)
    before = model_files.fingerprint(folder)
    assert before == model_files.fingerprint(tiny / "model")
    raw = bytearray((folder / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (folder / "model.safetensors").write_bytes(raw)
    assert model_files.fingerprint(folder) != before
