"""What every method costs beside LoRA of the same rank: time of a step, memory, bytes on the disk.

    python scripts/bench_methods.py [--only NAME,...] [--turns 3] [--steps 10] [--work DIR] [--json FILE]
                                    [--quick]

Contestants are the recipes in recipes/methods/, each with its own `adapter` section and lr_ratio, on a Llama
of random weights and rows of 256 tokens (bench_rivals/workload.py makes both). Each run is `lorakit train` in
a process of its own; the methods take turns, LoRA first, and what is compared is of the same turn. Run it on
a machine that does nothing else: a line says so where others used more than a twentieth of it. --quick takes
a model so small that nothing is measured, and shows that all of them run.

step       seconds of a step, mean over those after the first two, what a method does every few steps among
           them; a probe before step 0 is not
memory     most memory of the process (ru_maxrss): base, activations, adapter and the libraries
trained    parameters that move
adapter    bytes of adapter_model.safetensors as it ships (full: of the model)
checkpoint bytes of a checkpoint: the method's own state and the optimizer's

Medians over the turns. The JSON file (docs/bench_methods-DATE.json) holds every run;
scripts/make_method_table.py brings its figures into the README and the headers of the recipes.
"""

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from bench_rivals import workload
from bench_rivals.workload import Setting

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes" / "methods"
CORES = len(os.sched_getaffinity(0))
NOT_COUNTED = 2  # first steps, left out of what is steady
QUIET = 0.05  # of the processors, used by other processes
LONGEST_RUN = 300.0  # seconds
SETTING = Setting("methods", rows=120, shortest=256, longest=256, batch_size=6, layers=4, vocabulary=8192)
QUICK = Setting(
    "quick",
    rows=16,
    shortest=16,
    longest=16,
    batch_size=2,
    hidden=64,
    intermediate=96,
    layers=2,
    heads=2,
    kv_heads=2,
    vocabulary=512,
)
QUANTITIES = ("step_s", "peak_bytes", "trained", "adapter_bytes", "checkpoint_bytes")
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
Run = dict[str, Any]


def contestants() -> dict[str, Run]:
    """Name of a method's recipe -> its sections adapter and optimizer, LoRA first, and how its base is held;
    without those that need a mixture."""
    found = {path.stem: yaml.safe_load(path.read_text()) for path in RECIPES.glob("*.yaml")}
    names = [name for name in found if "target_parameters" not in found[name]["adapter"]]
    names.sort(key=lambda name: (name != "lora", name))
    return {
        name: {key: found[name][key] for key in ("adapter", "optimizer")}
        | {"model": {key: value for key, value in found[name]["model"].items() if key != "path"}}
        for name in names
    }


def recipe_of(sections: Run, made: dict[str, str], setting: Setting, steps: int, output: Path) -> Run:
    """A method's recipe on the benchmark's model and rows. The learning rate is one that harms none: it has
    no part in what is measured. AdaLoRA's interval is for longer runs."""
    ratio = sections["optimizer"].get("lr_ratio")
    adapter = {field: value for field, value in sections["adapter"].items() if field != "interval"}
    return {
        "model": {"path": made["model"]} | sections["model"],
        "adapter": adapter,
        "data": {"train": str(Path(made["rows"]) / "rows.jsonl"), "format": "prompt-completion"},
        "optimizer": {"lr": 1e-4} | ({} if ratio is None else {"lr_ratio": ratio}),
        "training": {"max_steps": steps, "batch_size": setting.batch_size},
        "checkpoint": {"every": steps},
        "log": {"every": 1},
        "output": str(output),
    }


def busy_seconds() -> float:
    """Processor time that all of this machine has spent so far."""
    user, nice, system, _, _, *more = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def train(recipe: Run, folder: Path) -> Run:
    """What a run of `recipe` cost. Raises: RuntimeError with its last words."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "LORAKIT_CACHE": str(folder),
        "OMP_NUM_THREADS": str(CORES),
    }
    environment["PYTHONPATH"] = str(ROOT)
    command = [sys.executable, "-m", "lorakit", "train", str(folder / "recipe.yaml")]
    busy, began = busy_seconds(), time.time()
    with (folder / "said.txt").open("w") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=environment)
        timer = threading.Timer(LONGEST_RUN, process.kill)
        timer.start()
        _, status, usage = os.wait4(process.pid, 0)
        timer.cancel()
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError((folder / "said.txt").read_text().strip().splitlines()[-1])
    others = busy_seconds() - busy - usage.ru_utime - usage.ru_stime
    return measured(folder / "run") | {
        "peak_bytes": usage.ru_maxrss * 1024,
        "others_share": max(0.0, others / (CORES * (time.time() - began))),
    }


def measured(run: Path) -> Run:
    """What the files of a finished run say of its cost."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = [line["seconds"] for line in lines if "loss" in line]
    checkpoint = max((run / "checkpoints").iterdir())  # a probe leaves one before step 0
    weights = [file for name in ("adapter", "model") for file in (run / name).glob("*.safetensors")]
    return {
        "step_s": (seconds[-1] - seconds[NOT_COUNTED - 1]) / (len(seconds) - NOT_COUNTED),
        "trained": json.loads((run / "params.json").read_text())["trainable"],
        "adapter_bytes": sum(file.stat().st_size for file in weights),
        "checkpoint_bytes": sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()),
    }


def summary(runs: list[Run]) -> dict[str, Run]:
    """Method -> median of every quantity, and median of its ratios to LoRA's of the same turn."""
    plain = {run["turn"]: run for run in runs if run["method"] == "lora"}
    found: dict[str, Run] = {}
    for method in dict.fromkeys(run["method"] for run in runs):
        own = [run for run in runs if run["method"] == method and run["turn"] in plain]
        found[method] = {name: median(run[name] for run in own) for name in QUANTITIES} | {
            "against_lora": {
                name: median(run[name] / plain[run["turn"]][name] for run in own) for name in QUANTITIES
            },
            "others_share": max(run["others_share"] for run in own),
        }
    return found


def table(found: dict[str, Run]) -> list[str]:
    lines = [f"{'method':<14}{'step':>18}{'memory':>20}{'trained':>13}{'adapter':>13}{'checkpoint':>14}"]
    for method, line in found.items():
        ratio = line["against_lora"]
        step = f"{line['step_s'] * 1e3:,.0f} ms  x {ratio['step_s']:.2f}"
        memory = f"{line['peak_bytes'] / 1e6:,.0f} MB  x {ratio['peak_bytes']:.2f}"
        disk = f"{line['adapter_bytes']:>13,}{line['checkpoint_bytes']:>14,}"
        lines.append(f"{method:<14}{step:>18}{memory:>20}{line['trained']:>13,}{disk}")
    loud = [
        f"{method} {line['others_share']:.0%}"
        for method, line in found.items()
        if line["others_share"] > QUIET
    ]
    return [*lines, f"NOT QUIET: others used of the machine: {', '.join(loud)}"] if loud else lines


def main() -> None:
    today = datetime.now(UTC).date().isoformat()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="recipes of recipes/methods/, with commas; lora always runs")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench_methods")
    parser.add_argument("--json", type=Path, default=ROOT / "docs" / f"bench_methods-{today}.json")
    parser.add_argument("--quick", action="store_true", help="a model so small that nothing is measured")
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    setting = QUICK if chosen.quick else SETTING
    if chosen.make:
        print(json.dumps(workload.make(setting, chosen.work / "made", "cpu")))
        return
    every = contestants()
    names = [name for name in every if not chosen.only or name in ("lora", *chosen.only.split(","))]
    # In a process of its own: a child's peak memory begins at its parent's, which is to stay small.
    make = [sys.executable, __file__, "--make", "--work", chosen.work, *(["--quick"] if chosen.quick else [])]
    made = json.loads(subprocess.check_output(make))
    runs: list[Run] = []
    for turn in range(chosen.turns):
        for name in names:
            folder = chosen.work / name
            cost = train(recipe_of(every[name], made, setting, chosen.steps, folder / "run"), folder)
            runs.append({"method": name, "turn": turn} | cost)
            print(
                f"turn {turn + 1}, {name}: {cost['step_s'] * 1e3:,.0f} ms a step", file=sys.stderr, flush=True
            )
    about = {
        "date": today,
        "threads": CORES,
        "python": platform.python_version(),
        "versions": {package: version(package).partition("+")[0] for package in PACKAGES},
        "turns": chosen.turns,
        "steps": chosen.steps,
        "setting": {key: value for key, value in vars(setting).items() if key != "name"},
    }
    found = summary(runs)
    result = {
        "about": about,
        "summary": found,
        "adapters": {n: every[n]["adapter"] for n in names},
        "runs": runs,
    }
    chosen.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join([*table(found), f"written to {chosen.json}"]))


if __name__ == "__main__":
    main()
