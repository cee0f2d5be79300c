"""Tokens per second, memory and time to the first step of lorakit's training, beside rivals on the same work.

    python scripts/bench_step.py [--only NAME,...] [--setting NAME,...] [--repeat 3] [--steps 50] [--quick]
                                 [--device cpu|cuda] [--work DIR] [--json FILE] [--profile]

A model of random weights, its tokenizer and rows are made from nothing (bench_rivals/workload.py: on a CPU
58.5M parameters, 400 alpaca-like rows, 50 steps of 8; LoRA of rank 8 on all linear layers but the head,
completions trained). Every contestant (bench_rivals/contestants.py) trains on them in a process of its own,
in turns, with as many threads; TRL and LLaMA-Factory live in virtual environments that this script makes. The
losses must be the plain PEFT loop's: the first to 1 %, the mean of the last ten to 3 %.

useful tok/s    tokens of real rows, prompts among them, per second, without the first three steps
trained tok/s   tokens that have a loss, likewise
first step      seconds from the start of the process to the end of its first optimizer step
peak            most memory of the process (ru_maxrss; on CUDA: allocated by PyTorch)
limit           FLOPs that the steps need (workload.flops has the formula) per second, over the rate of one
                large matrix product in the same precision: the best of all turns, each of which measures it

Tables are medians, the range of the useful tokens in brackets. The JSON file holds every run, and is written
anew after each. `--profile` writes where the time of lorakit's step goes, by operator, and measures nothing.
"""

import argparse
import json
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bench_rivals import contestants, ours, workload
from bench_rivals.environments import interpreter, last_words
from bench_rivals.job import Job
from bench_rivals.workload import Setting

ROOT = Path(__file__).resolve().parent.parent
CORES = len(os.sched_getaffinity(0))
NAMES = {
    "cpu": ("lorakit", "lorakit-off", "plain", "trl", "llama-factory"),
    "cuda": ("lorakit", "lorakit-off", "plain", "plain-flash", "unsloth", "liger"),
}
ONLY_WHERE_EVERYONE_RUNS = ("trl", "llama-factory", "unsloth", "liger")
NOT_COUNTED = 3  # first steps, left out of what is steady
LONGEST_RUN = 3600.0  # seconds
QUIET = 0.05  # of the processors used by other processes
Run = dict[str, Any]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ------------------------------------------------------------------------------------------------------------
# One run


@dataclass
class Ended:
    """A process that ended."""

    began: float  # time.time()
    code: int
    peak_bytes: int
    others_share: float  # of the machine's processor time in the meantime that went to other processes
    first_step: float  # when lorakit told of its first step
    said: str


def launch(command: list[str], folder: Path) -> Ended:
    """Run a contestant's process to its end; what it says is kept in `folder`."""
    offline = {"HF_HUB_OFFLINE": "1", "LORAKIT_CACHE": str(folder), "HF_DATASETS_CACHE": str(folder)}
    environment = os.environ | offline | {"OMP_NUM_THREADS": str(CORES)}
    lines, first_step, busy, began = [], 0.0, busy_seconds(), time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    timer = threading.Timer(LONGEST_RUN, process.kill)
    timer.start()
    assert process.stdout
    try:
        for line in process.stdout:
            if not first_step and re.match(r"step\s+1/\d+\s+loss", line):
                first_step = time.time()
            lines.append(line)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        timer.cancel()
        if process.returncode is None:  # this process was told to stop: the contestant stops with it
            process.kill()
    others = busy_seconds() - busy - usage.ru_utime - usage.ru_stime
    share = max(0.0, others / (CORES * (time.time() - began)))
    said = "".join(lines)
    (folder / "said.txt").write_text(said)
    return Ended(began, process.returncode, usage.ru_maxrss * 1024, share, first_step, said)


def busy_seconds() -> float:
    """Processor time that all of this machine has spent so far, the time a hypervisor took away included."""
    user, nice, system, _, _, *more = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    return (user + nice + system + sum(more)) / os.sysconf("SC_CLK_TCK")


def child(role: str, task: dict[str, Any], folder: Path, python: str = sys.executable) -> tuple[Run, Ended]:
    """What a process of this script returns that plays `role`. Raises: RuntimeError with its last words."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "task.json"
    file.write_text(json.dumps(task))
    ended = launch([python, __file__, "--child", role, str(file)], folder)
    if ended.code:
        raise RuntimeError(f"exit code {ended.code}: {last_words(ended.said)}")
    return json.loads((folder / "result.json").read_text()), ended


def play(role: str, file: Path) -> None:
    """The other side of `child`."""
    task = json.loads(file.read_text())
    setting = Setting(**task.pop("setting"))
    result: Any
    if role == "make":
        result = workload.make(setting, Path(task["folder"]), task["device"])
    elif role == "rate":
        result = {"flops_per_s": workload.product_rate(setting.dtype, task["device"])}
    elif role == "profile":
        result = {"table": ours.profile(Job(setting, **task))}
    else:
        result = contestants.run(role, Job(setting, **task))
    (file.parent / "result.json").write_text(json.dumps(result))


def compete(name: str, job: Job, work: Path) -> Run:
    """A run of a contestant: its steps' stamps and losses, peak and first step. Raises: RuntimeError."""
    folder = Path(job.output)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name.startswith("lorakit") and job.device == "cpu":
        recipe = ours.write_recipe(job)
        off = ["--set", "training.fast=off"] if name == "lorakit-off" else []
        ended = launch([sys.executable, "-m", "lorakit", "train", str(recipe), *off], folder)
        if ended.code:
            raise RuntimeError(f"exit code {ended.code}: {last_words(ended.said)}")
        found = {"versions": contestants.versions(), "threads": str(CORES)}
    else:
        found, ended = child(name, asdict(job), folder, interpreter(name, work))
    if name.startswith("lorakit"):
        found |= ours.result_of(job, ended.first_step)
    found["first_step_s"] = found["stamps"][0] - ended.began
    found["peak_bytes"] = found.pop("bytes", ended.peak_bytes)
    found["others_share"] = ended.others_share
    return found


# ------------------------------------------------------------------------------------------------------------
# What a run says


def measured(run: Run, setting: Setting, lengths: list[list[int]], rate: float) -> Run:
    """Rates of the steady steps. Tokens are those that the contestant counted, where it did."""
    stamps, size = run["stamps"], setting.batch_size
    start = min(NOT_COUNTED, len(stamps) - 1)
    seconds = stamps[-1] - stamps[start - 1]
    steps = [lengths[step * size : (step + 1) * size] for step in range(len(stamps))]
    sums = {"tokens": [sum(row[0] for row in step) for step in steps]}
    sums["trained"] = [sum(row[1] for row in step) for step in steps]
    for name, expected in sums.items():
        counted = run.get(name) or expected
        run[name] = counted
        run[f"{name}_as_made"] = counted == expected
    rows = lengths[start * size : len(stamps) * size]
    return run | {
        "useful_per_s": sum(run["tokens"][start:]) / seconds,
        "trained_per_s": sum(run["trained"][start:]) / seconds,
        "flops_per_s": workload.flops(setting, rows) / seconds,
        "product_flops_per_s": rate,
    }


def disagreement(run: Run, plain: Run) -> str:
    """Where losses are not the plain loop's; empty when they agree."""
    last = min(10, len(run["losses"]))
    pairs = (("first step", 1, 0.01, slice(0, 1)), (f"last {last} steps", last, 0.03, slice(-last, None)))
    found = []
    for what, number, tolerance, part in pairs:
        mine, theirs = sum(run["losses"][part]) / number, sum(plain["losses"][part]) / number
        if not abs(mine - theirs) <= tolerance * abs(theirs):
            found.append(f"{what} {mine:.4f}, plain {theirs:.4f}")
    return "; ".join(found)


QUANTITIES = ("useful_per_s", "trained_per_s", "first_step_s", "peak_bytes", "limit")


def summary(runs: list[Run]) -> list[Run]:
    """Median, least and most of every quantity, by setting and contestant, beside the plain loop's."""
    found: list[Run] = []
    for key in dict.fromkeys((run["setting"], run["contestant"]) for run in runs):
        own = [run for run in runs if (run["setting"], run["contestant"]) == key]
        good = [run for run in own if "failed" not in run]
        line: Run = {"setting": key[0], "contestant": key[1], "runs": len(good)}
        if failed := [run["failed"] for run in own if "failed" in run]:
            line["failed"] = failed[0]
        rates = [run["product_flops_per_s"] for run in runs if run["setting"] == key[0] and "stamps" in run]
        for name in QUANTITIES if good else ():
            values = [run["flops_per_s"] / max(rates) if name == "limit" else run[name] for run in good]
            line[name] = {"median": statistics.median(values), "min": min(values), "max": max(values)}
        plain = [run for run in runs if (run["setting"], run["contestant"]) == (key[0], "plain")]
        plain = [run for run in plain if "failed" not in run]
        if good:
            line["others_share"] = max(run["others_share"] for run in good)
            last = min(10, len(good[0]["losses"]))
            line["losses"] = [good[0]["losses"][0], sum(good[0]["losses"][-last:]) / last]
            odd = [name for name in ("tokens", "trained") if not good[0][f"{name}_as_made"]]
            line["odd_counts"] = {name: sum(good[0][name]) for name in odd}
        if good and plain:
            line["disagrees"] = disagreement(good[0], plain[0])
            pairs = zip(good[0]["losses"], plain[0]["losses"], strict=True)
            line["largest_loss_gap"] = max(abs(mine / theirs - 1) for mine, theirs in pairs)
        found.append(line)
    return found


def table(lines: list[Run]) -> Iterator[str]:
    """The summary in columns, and below it all that is not as it should be."""
    plain = {line["setting"]: line for line in lines if line["contestant"] == "plain" and line["runs"]}
    columns = ("useful tok/s", "trained tok/s", "first step", "peak", "limit", "speed", "memory", "losses")
    widths = (24, 13, 10, 8, 7, 7, 7, 16)
    shown = "".join(f"  {name:>{width}}" for name, width in zip(columns, widths, strict=True))
    yield f"{'setting':<14} {'contestant':<14}{shown}"
    for line in lines:
        if not line["runs"]:
            continue
        useful, beside = line["useful_per_s"], plain.get(line["setting"])
        middle = {name: line[name]["median"] for name in QUANTITIES}
        cells = [f"{useful['median']:,.0f} ({useful['min']:,.0f}-{useful['max']:,.0f})"]
        cells += [f"{middle['trained_per_s']:,.0f}", f"{middle['first_step_s']:.1f} s"]
        cells += [f"{middle['peak_bytes'] / 1e9:.2f} GB", f"{middle['limit']:.1%}"]
        for name in ("useful_per_s", "peak_bytes"):
            cells.append(f"x {middle[name] / beside[name]['median']:.2f}" if beside else "")
        cells.append(f"{line['losses'][0]:.3f} {line['losses'][1]:.3f}")
        shown = "".join(f"  {cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
        yield f"{line['setting']:<14} {line['contestant']:<14}{shown}"
    for line in lines:
        name = f"{line['setting']}, {line['contestant']}"
        if "failed" in line:
            yield f"{name}: skipped: {line['failed']}"
        if line.get("disagrees"):
            yield f"{name}: LOSSES DISAGREE: {line['disagrees']}"
        if line.get("others_share", 0.0) > QUIET:
            yield f"{name}: NOT QUIET: other processes used up to {line['others_share']:.0%} of the machine"
        if line.get("odd_counts"):
            yield f"{name}: other tokens than the rows have: {line['odd_counts']}"


# ------------------------------------------------------------------------------------------------------------


def about(device: str) -> Run:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": cpu[1] if cpu else platform.processor(),
        "threads": CORES,
        "device": device,
        "python": platform.python_version(),
        "rank": workload.RANK,
        "first_steps_left_out": NOT_COUNTED,
    }


def measure(setting: Setting, names: list[str], chosen: argparse.Namespace, store: Any) -> None:
    """All turns of a setting; `store` is called with every run as soon as it has ended."""
    work, device = chosen.work, chosen.device
    given = {"setting": asdict(setting), "device": device}
    made, _ = child("make", given | {"folder": str(work / "made")}, work / "tasks" / "make")
    lengths = json.loads((Path(made["rows"]) / "lengths.json").read_text())
    steps = min(chosen.steps, setting.steps)
    failed: set[str] = set()
    for turn in range(chosen.repeat):
        rate = child("rate", given, work / "tasks" / "rate")[0]["flops_per_s"]
        say(f"{setting.name}, turn {turn + 1} of {chosen.repeat}: {rate / 1e9:,.0f} GFLOP/s {setting.dtype}")
        for name in names:
            if name in failed:
                continue
            said: Run = {"setting": setting.name, "contestant": name, "turn": turn}
            output = work / "runs" / f"{setting.name}-{name}"
            try:
                run = compete(
                    name, Job(setting, **made, steps=steps, device=device, output=str(output)), work
                )
                said |= measured(run, setting, lengths, rate)
                first, peak = said["first_step_s"], said["peak_bytes"] / 1e9
                say(f"  {name}: {said['useful_per_s']:,.0f} tokens/s, first {first:.1f} s, {peak:.2f} GB")
            except RuntimeError as error:
                failed.add(name)
                said["failed"] = str(error)
                say(f"  {name}: skipped: {error}")
            store(said)


def profile(setting: Setting, chosen: argparse.Namespace) -> None:
    work, device = chosen.work, chosen.device
    given = {"setting": asdict(setting), "device": device}
    made, _ = child("make", given | {"folder": str(work / "made")}, work / "tasks" / "make")
    folder = work / "runs" / f"{setting.name}-profile"
    shutil.rmtree(folder, ignore_errors=True)
    job = Job(setting, **made, steps=min(chosen.steps, 4), device=device, output=str(folder))
    found, _ = child("profile", asdict(job), folder)
    file = work / f"profile-{setting.name}.txt"
    file.write_text(found["table"])
    print(f"{setting.name}: {job.steps} steps, also in {file}\n{found['table']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help="contestants, with commas; these run in every setting")
    parser.add_argument("--setting", help="settings, with commas (default: all)")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="at most; a setting may have fewer rows")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "bench_step")
    parser.add_argument("--json", type=Path, help="default: results.json in the work directory")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--quick", action="store_true", help="short rows, five steps, once")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.child:
        play(chosen.child[0], Path(chosen.child[1]))
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    chosen.work = chosen.work.absolute()
    known = {setting.name: setting for setting in (workload.CPU if chosen.device == "cpu" else workload.CUDA)}
    if chosen.quick:
        chosen.steps, chosen.repeat = min(chosen.steps, 5), 1
        chosen.setting = chosen.setting or next(iter(known))
    names = chosen.only.split(",") if chosen.only else list(NAMES[chosen.device])
    settings = chosen.setting.split(",") if chosen.setting else list(known)
    if odd := [*({*names} - {*NAMES[chosen.device]}), *({*settings} - {*known})] or chosen.steps < 2:
        parser.error(f"steps: at least 2; contestants: {NAMES[chosen.device]}; settings: {(*known,)}: {odd}")
    file, runs = chosen.json or chosen.work / "results.json", []

    def store(run: Run) -> None:
        runs.append(run)
        stored = {"about": about(chosen.device), "summary": summary(runs), "runs": runs}
        file.parent.mkdir(parents=True, exist_ok=True)
        fresh = file.with_suffix(".new")
        fresh.write_text(json.dumps(stored, indent=1) + "\n")
        fresh.replace(file)

    for setting in map(known.__getitem__, settings):
        if chosen.profile:
            profile(setting, chosen)
            continue
        here = [
            name for name in names if chosen.only or setting.everyone or name not in ONLY_WHERE_EVERYONE_RUNS
        ]
        measure(setting, here, chosen, store)
    if runs:
        print("\n".join([*table(summary(runs)), f"every run: {file}"]))


if __name__ == "__main__":
    main()
