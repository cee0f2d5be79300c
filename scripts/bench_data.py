"""Rows per second, memory and seconds to step 0 of lorakit's tokenization, beside TRL's on the same rows.

    python scripts/bench_data.py [--rows 1000000] [--trl-rows N] [--repeat 1]

Rows are chats of one question and one answer, over 100 tokens long, written by this script. lorakit reads the
JSONL file, renders, masks all but the answers, accounts for every row and writes its cache, on all cores.
TRL (pip install trl) is given the same rows as a `datasets` data set that is loaded already, and as many
processes: as prompts and completions, of which it masks the prompts (trl, the same work); and as messages, of
which it masks nothing, because it cannot with a template that has no generation marks (trl-unmasked). Each
runs in a process of its own, in turns; peak memory is that of the largest process above what imports take.
"""

import argparse
import json
import os
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODEL = ROOT / "recipes" / "quickstart" / "model"
WORDS = [
    first + last
    for first in ("mi", "har", "to", "bre", "lan", "s", "wi", "gre")
    for last in ("ll", "bour", "n", "ad")
]


def write_rows(path: Path, number: int) -> None:
    draw = random.Random(0)
    with path.open("w") as file:
        for _ in range(number):
            question = " ".join(draw.choices(WORDS, k=draw.randint(5, 40))) + "?"
            answer = " ".join(draw.choices(WORDS, k=draw.randint(5, 80))) + "."
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}) + "\n")


def peaks() -> int:
    """Most bytes held by this process or by one of its children."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return 1024 * max(resource.getrusage(kind).ru_maxrss for kind in kinds)


def run_lorakit(file: Path) -> None:
    from transformers import AutoTokenizer

    from lorakit import data
    from lorakit.recipe.data import Data

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    before, began = peaks(), time.perf_counter()
    loaded = data.load(str(file), Data(train=str(file)), tokenizer, "auto")
    report(len(loaded.tokens), loaded.tokens.num_tokens, time.perf_counter() - began, peaks() - before)


def run_trl(file: Path, number: int, cores: int, masked: bool) -> None:
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = tempfile.mkdtemp(dir=file.parent)
    datasets.config.HF_DATASETS_CACHE = folder
    rows = datasets.load_dataset("json", data_files=str(file), split=f"train[:{number}]", cache_dir=folder)
    if masked:
        rows = rows.map(
            lambda row: {"prompt": row["messages"][:1], "completion": row["messages"][1:]},
            remove_columns="messages",
        )
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL)
    settings = SFTConfig(
        folder, dataset_num_proc=cores, max_length=1024, report_to="none", use_cpu=True, bf16=False
    )
    before, began = peaks(), time.perf_counter()
    trainer = SFTTrainer(model, settings, train_dataset=rows, processing_class=tokenizer)
    seconds = time.perf_counter() - began
    report(len(trainer.train_dataset), 0, seconds, peaks() - before)


def report(rows: int, tokens: int, seconds: float, memory: int) -> None:
    print(json.dumps({"rows": rows, "tokens": tokens, "seconds": seconds, "bytes": memory}))


def to_step_0(file: Path, cache: Path) -> float:
    """Seconds from the start of `lorakit train` to the moment before its first step."""
    recipe = file.with_name("recipe.yaml")
    values = {
        "model": {"path": str(MODEL)},
        "data": {"train": str(file)},
        "training": {"max_steps": 1, "micro_batch_tokens": 1024},
        "output": str(file.with_name(f"run-{time.monotonic_ns()}")),
    }
    recipe.write_text(json.dumps(values))
    began = time.perf_counter()
    command = [sys.executable, "-m", "lorakit", "train", str(recipe)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(cache)
    )
    assert process.stderr
    for line in process.stderr:
        if line.startswith("plan "):
            break
    seconds = time.perf_counter() - began
    process.communicate()
    if process.wait():
        sys.exit("lorakit train failed")
    return seconds


def environment(cache: Path) -> dict[str, str]:
    return os.environ | {"LORAKIT_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}


def child(cache: Path, *arguments: object) -> dict[str, float]:
    command = [sys.executable, __file__, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(cache))
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--trl-rows", type=int, help="rows that TRL is given (default: as many)")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if chosen.child:
        name, file, number = chosen.child
        if name == "lorakit":
            run_lorakit(Path(file))
        else:
            run_trl(Path(file), int(number), cores, masked=name == "trl")
        return
    found: dict[str, list[dict[str, float]]] = {"lorakit": [], "trl": [], "trl-unmasked": []}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(file, chosen.rows)
        print(f"{chosen.rows:,} rows, {file.stat().st_size / 1e6:,.0f} MB, {cores} cores")
        for turn in range(chosen.repeat):
            cache = Path(folder) / f"cache-{turn}"
            found["lorakit"].append(child(cache, "--child", "lorakit", file, chosen.rows))
            if find_spec("trl"):
                number = chosen.trl_rows or chosen.rows
                for name in ("trl", "trl-unmasked"):
                    found[name].append(child(cache, "--child", name, file, number))
        for name, results in found.items():
            if not results:
                print(f"{name:<12} not installed")
                continue
            rate = statistics.median(result["rows"] / result["seconds"] for result in results)
            memory = max(result["bytes"] for result in results)
            rows, tokens = results[0]["rows"], results[0]["tokens"]
            told = f", {tokens:,.0f} tokens" if tokens else ""
            above = f"{memory / 2**20:>6,.0f} MiB above imports"
            print(f"{name:<12} {rate:>8,.0f} rows/s, {above} ({rows:,} rows{told})")
        if all(found.values()):
            pairs = zip(found["lorakit"], found["trl"], strict=True)
            ratios = [(a["rows"] / a["seconds"]) / (b["rows"] / b["seconds"]) for a, b in pairs]
            print(f"lorakit is {statistics.median(ratios):.1f} times as fast at the same work")
        cold = to_step_0(file, Path(folder) / "cold")
        warm = to_step_0(file, Path(folder) / "cold")
        print(f"step 0 after {cold:.1f} s with an empty cache, {warm:.1f} s with the tokens in it")


if __name__ == "__main__":
    main()
