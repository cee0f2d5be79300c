"""Which published claims about LoRA hold on a small model, every method at its own best learning rate.

    python scripts/compare_methods.py --text FILE... --tasks FILE [--work DIR] [--output FILE]
                                      [--only R1,R3] [--jobs 2] [--seeds 3] [--quick]
    python scripts/compare_methods.py --table docs/compare_methods-DATE.json

--text   natural text (.txt, or .json with a list of rows): a Llama of 1.3M parameters is trained on it once,
         by lorakit
--tasks  a .csv file whose first column is a prompt and whose second one is its completion (the E2E NLG
         challenge: a meaning and a sentence that says it); no held-out prompt is trained
--quick  sizes at which nothing is measured: shows that all of it runs

What is expected was written down before it was run (scripts/claims/registered.py) and is judged as it was
written. Every cell is a real run of lorakit in fp32 on one thread of the CPU; its result is a file in --work,
so that a call that was stopped goes on where it was. Learning rates are swept per method, and the grid grows
until the best does not lie at its edge. Then all seeds run around the best rate.

The JSON file (docs/compare_methods-DATE.json) holds verdicts and every cell; --table brings the newest one's
verdicts into the README and draws R1 beside it.
"""

import argparse
import contextlib
import multiprocessing
import os
import platform
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from claims import cells, made, registered, told
from claims.cells import Cell, Runs, Sections
from claims.registered import CLAIMS, Results

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "tokenizers")


def begin_worker(log: Path) -> None:
    """One thread, what lorakit says in a file, and an end with the process that asks for cells."""
    import torch

    torch.set_num_threads(1)
    parent = os.getppid()

    def follow() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    sys.stdout = sys.stderr = (log / f"said-{os.getpid()}.txt").open("a", buffering=1)


def run_all(
    names: Sequence[str], seeds: int, jobs: int, base: Sections, work: Path, sizes: made.BaseSize, runs: Runs
) -> Results:
    """Run what the claims need and has not run, `jobs` at a time; what is needed next depends on results."""
    from tqdm import tqdm

    methods = registered.methods(sizes)
    results = Results({}, range(seeds), runs.pairs)
    under_way: dict[Future[Sections], Cell] = {}
    context = multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(jobs, context, begin_worker, (work,)) as pool,
        tqdm(unit="cell", smoothing=0.05) as bar,
    ):
        while True:
            waiting = [c for c in registered.needed(results, names) if c not in under_way.values()]
            for cell in waiting:
                method = methods.get(cell.method, {})
                found = cells.done(cell, cells.wanted_of(cell, method, runs, base["hash"]), work)
                if found is not None:
                    results.cells[cell] = found
                elif len(under_way) < jobs:
                    under_way[pool.submit(cells.run, cell, method, runs, base["hash"], work)] = cell
            if not under_way:
                if not waiting:
                    return results
                continue  # all of them had run before: what do they ask for?
            bar.total = bar.n + len(under_way) + len(waiting)
            for future in wait(under_way, return_when=FIRST_COMPLETED).done:
                cell = under_way.pop(future)
                results.cells[cell] = found = future.result()
                bar.update()
                bar.write(f"{found['seconds']:7.1f} s  {cell.name}  {found.get('held_out', '')}", sys.stderr)


def summary(results: Results, names: Sequence[str]) -> dict[str, Any]:
    """Claim -> its verdicts and what every sweep found."""
    found: dict[str, Any] = {}
    for name in names:
        claim = CLAIMS[name]
        sweeps = []
        for sweep in claim.sweeps:
            best = results.best(sweep)
            at_best = results.cells[Cell(sweep.kind, sweep.method, best.number, results.seeds[0])]
            sweeps.append(
                {
                    "kind": sweep.kind,
                    "method": sweep.method,
                    "trained": at_best["trained"],
                    "lr": best.lr,
                    "mean": best.mean,
                    "sd": best.sd,
                    "losses": best.losses,
                    "rates": registered.curve(results.losses(sweep)),
                    "widened_to": [registered.rate(number) for number in best.widened],
                    "at_edge": best.at_edge,
                }
            )
        found[name] = {
            "hypothesis": claim.hypothesis,
            "published": claim.published,
            "verdicts": [vars(verdict) for verdict in claim.judge(results)],
            "afterwards": [vars(note) for note in claim.afterwards(results)],
            "sweeps": sweeps,
        }
    return found


def processor() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.machine()


def main() -> None:
    today = datetime.now(UTC).date().isoformat()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, nargs="+", metavar="FILE")
    parser.add_argument("--tasks", type=Path, metavar="FILE")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "compare_methods")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / f"compare_methods-{today}.json")
    parser.add_argument("--only", help=f"with commas, of {', '.join(CLAIMS)}")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="sizes at which nothing is measured")
    parser.add_argument("--table", type=Path, metavar="JSON", help="bring these results into the README")
    chosen = parser.parse_args()
    if chosen.table:
        told.bring(chosen.table, ROOT)
        return
    if not (chosen.text and chosen.tasks):
        parser.error("--text and --tasks name the data")
    names = chosen.only.split(",") if chosen.only else list(CLAIMS)
    if odd := [name for name in names if name not in CLAIMS]:
        parser.error(f"--only: {odd[0]} is none of {', '.join(CLAIMS)}")
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    work = chosen.work.absolute()
    os.environ["LORAKIT_CACHE"] = str(work / "cache")
    sizes, runs = (made.QUICK, cells.QUICK) if chosen.quick else (made.BaseSize(), Runs())
    work.mkdir(parents=True, exist_ok=True)
    with (
        (work / "base.txt").open("a") as said,
        contextlib.redirect_stdout(said),
        contextlib.redirect_stderr(said),
    ):
        base = made.make(chosen.text, chosen.tasks, work, sizes)
    cells.make_pairs(runs, work)
    results = run_all(names, chosen.seeds, chosen.jobs, base, work, sizes, runs)
    about = {
        "date": today,
        "python": platform.python_version(),
        "versions": {package: version(package).partition("+")[0] for package in PACKAGES},
        "machine": f"{processor()}, {len(os.sched_getaffinity(0))} cores, {chosen.jobs} runs at a time",
        "cell_minutes": round(sum(result["seconds"] for result in results.cells.values()) / 60, 1),
        "seeds": chosen.seeds,
        "runs": vars(runs),
        "base": base,
    }
    result = {"about": about, "claims": summary(results, names), "cells": list(results.cells.values())}
    chosen.output.write_text(told.as_json(result))
    print("\n".join([*told.lines(result), f"written to {chosen.output}"]))


if __name__ == "__main__":
    main()
