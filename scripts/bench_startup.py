"""Seconds from the shell: each light verb, and the first optimizer step of the quickstart in full precision
and in NF4, with and without the evaluation at the start; then which packages the imports go to.

    python scripts/bench_startup.py --rounds 5

All commands of a round run one after the other, and medians over the rounds are printed, so that what else
the machine does meets all alike. The first round, which fills the page cache, is left out.
"""

import argparse
import os
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "recipes" / "quickstart" / "recipe.yaml"
LORAKIT = Path(sys.executable).with_name("lorakit")
ENVIRONMENT = os.environ | {"HF_HUB_OFFLINE": "1"}

VERBS = {
    "--help": ["--help"],
    "validate": ["validate", RECIPE],
    "count-params": ["count-params", RECIPE],
    "recipes list": ["recipes", "list"],
    "preview": ["preview", RECIPE, "-n", "1"],
}
NOT_AT_START = ["--set", "eval.at_start=false"]
RUNS = {
    "LoRA": NOT_AT_START,
    "LoRA, evaluated at start": [],
    "QLoRA NF4": [*NOT_AT_START, "--set", "model.quantize=nf4"],
    "QLoRA NF4, evaluated at start": ["--set", "model.quantize=nf4"],
}
GOALS = {"--help": 0.5, "validate": 0.5, "count-params": 0.5, "LoRA": 4.5, "QLoRA NF4": 6.0}  # seconds


def seconds_of(verb: list[str | Path]) -> float:
    """Of the whole command."""
    began = time.perf_counter()
    subprocess.run([LORAKIT, *verb], check=True, capture_output=True, env=ENVIRONMENT)
    return time.perf_counter() - began


def training(options: list[str], folder: str) -> list[str | Path]:
    short = ["--set", "training.max_steps=1", "--set", "log.every=1"]
    return ["train", RECIPE, "--output", f"{folder}/run", *short, *options]


def first_step(options: list[str]) -> float:
    """Until the line of step 1 is written."""
    with TemporaryDirectory() as folder:
        command = [LORAKIT, *training(options, folder)]
        began = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert process.stderr
        lines, seconds = [], 0.0
        for line in process.stderr:
            lines.append(line)
            if not seconds and re.match(r"step +1/1 +loss", line):
                seconds = time.perf_counter() - began
        if process.wait() or not seconds:
            raise SystemExit("".join(lines))
    return seconds


def import_seconds(options: list[str]) -> Counter[str]:
    """Seconds that the imports of a training spend in each package itself, as Python measures them, which
    makes them slower."""
    with TemporaryDirectory() as folder:
        command = [sys.executable, "-X", "importtime", "-m", "lorakit", *training(options, folder)]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=ENVIRONMENT)
    found: Counter[str] = Counter()
    for match in re.finditer(r"^import time: +(\d+) \| +\d+ \| +([\w]+)", done.stderr, re.MULTILINE):
        found[match[2]] += int(match[1]) / 1e6
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="besides the first, which is not counted")
    rounds = parser.parse_args().rounds
    seconds: dict[str, list[float]] = {name: [] for name in (*VERBS, *RUNS)}
    for _ in range(rounds + 1):
        for name, verb in VERBS.items():
            seconds[name].append(seconds_of(verb))
        for name, options in RUNS.items():
            seconds[name].append(first_step(options))
    print(
        f"median seconds of {rounds}; {len(os.sched_getaffinity(0))} cores, Python {sys.version.split()[0]}"
    )
    for name, all_of_it in seconds.items():
        counted = all_of_it[1:]
        goal = f"  goal {GOALS[name]:.1f}" if name in GOALS else ""
        print(f"  {name:30s} {median(counted):6.2f}  ({min(counted):.2f} to {max(counted):.2f}){goal}")
    for name in ("LoRA", "QLoRA NF4"):
        found = import_seconds(RUNS[name])
        print(f"imports of {name}: {sum(found.values()):.2f} s by Python's own measure")
        for package, spent in found.most_common(10):
            print(f"  {package:30s} {spent:6.2f}")


if __name__ == "__main__":
    main()
