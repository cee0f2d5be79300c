"""What a run will write, told before it writes: byte for byte what lies on the disk in the end."""

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

HEAD = {"train_also": ["lm_head"]}
# Delta-LoRA writes two A and two B where it follows late; lora-drop a copy for every layer that shares.
SECTIONS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4, "rank_pattern": {"q_proj": 8}, "train_tokens": [3], **HEAD},
    "dora": {"method": "dora", "rank": 4},
    "lora-fa": {"method": "lora-fa", "rank": 4},
    "adalora": {"method": "adalora", "init_rank": 4, "target_rank": 4, **HEAD},
    "vera": {"method": "vera", "rank": 32, **HEAD},
    "delta-lora": {"method": "delta-lora", "rank": 4, "start": 1},
    "delta-lora from the start": {"method": "delta-lora", "rank": 4, "rank_pattern": {"q_proj": 8}},
    "lora-drop": {"method": "lora-drop", "rank": 4, "probe": 8, "threshold": 0.5},
    "pissa": {"rank": 4, "init": "pissa", "rank_pattern": {"q_proj": 8}, **HEAD},  # two pairs in every file
    "olora": {"rank": 4, "init": "olora"},
    "eva": {
        "rank": 4,
        "init": "eva",
        "probe": 8,
        "rank_pattern": {"q_proj": 8},
        **HEAD,
    },  # one rank in its file
    "full": {"method": "full", "train_only": ["norm"]},
    "randlora": {"method": "peft", "type": "RANDLORA", "config": {"r": 4}},  # with its projections
}


def bytes_of(folder: Path) -> int:
    """Of all tensors but the counters of the optimizer."""
    return sum(
        tensor.numel() * tensor.element_size()
        for file in folder.glob("*.safetensors")
        for name, tensor in load_file(file).items()
        if not name.startswith("step|")
    )


@pytest.mark.parametrize("name", SECTIONS)
def test_the_disk_that_a_run_asks_for_is_what_it_takes(
    name: str, write_recipe: Any, cli: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two checkpoints are kept while a third is staged; what was trained is there twice while it is
    replaced."""
    asked: list[int] = []
    monkeypatch.setattr("lorakit.runs.check_space", lambda output, needed, product: asked.append(needed))
    training = {"max_steps": 3, "batch_size": 2}
    recipe = write_recipe(adapter=SECTIONS[name], training=training, checkpoint={"every": 1, "keep": 2})
    code, _, err = cli("train", recipe)
    assert code == 0, err
    run = tmp_path / "run"
    product = bytes_of(run / ("model" if name == "full" else "adapter"))
    assert asked == [3 * bytes_of(run / "checkpoints" / "step-000003") + 2 * product + (1 << 20)]
