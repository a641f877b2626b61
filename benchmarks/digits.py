"""Every `digits` recipe, run from the command line, one after the other: how much better than the untrained encoder?

    python benchmarks/digits.py [--only=dino,mae] [--workdir=DIR]

Prints a row for each recipe: linear probe and kNN (top-1, in per cent) of the untrained and of the trained encoder, and
minutes of CPU time, all cores together (two idle ones take about half as long). Finished ones (a workdir with `seconds`)
are not run again.
"""

from __future__ import annotations

import argparse
import json
import re
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def recipes() -> list[str]:
    """`FILE:NAME` of all recipes on digits."""
    keys = re.compile(r'^    "(digits[\w-]*)":', re.MULTILINE)  # of RECIPES
    files = sorted((ROOT / "configs").glob("*.py"))
    return [f"{file.name}:{name}" for file in files for name in keys.findall(file.read_text())]


def run(recipe: str, workdir: Path) -> None:
    """Trains, unless that is done."""
    done = workdir / "seconds"
    if done.exists():
        return
    begin = cpu_seconds()
    command = [sys.executable, "-m", "jaxpretrain.main", f"--config=configs/{recipe}", f"--workdir={workdir}"]
    with open(workdir.with_suffix(".log"), "w") as log:
        subprocess.run(command, cwd=ROOT, stdout=log, stderr=log, check=True)
    done.write_text(f"{cpu_seconds() - begin:.1f}")


def cpu_seconds() -> float:
    """Of all finished child processes."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def row(recipe: str, workdir: Path) -> str:
    """A row of the table."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    scores = [record for record in records if record["phase"] == "eval"]
    cells = [recipe]
    for name in ("linear/top1", "knn/top1"):
        first, last = (record.get(name, float("nan")) for record in (scores[0], scores[-1]))
        cells.append(f"{first:.1f}, {'**' * (last > first)}{last:.1f}{'**' * (last > first)}")
    cells.append(f"{float((workdir / 'seconds').read_text()) / 60:.1f}")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="parts of recipe names, separated by commas")
    parser.add_argument("--workdir", type=Path, default=Path("runs/digits"))
    args = parser.parse_args()
    args.workdir.mkdir(parents=True, exist_ok=True)
    print("| recipe | linear probe, untrained and trained | kNN | CPU minutes |\n|---|---|---|---|", flush=True)
    for recipe in recipes():
        if any(part in recipe for part in args.only.split(",")):
            workdir = args.workdir / recipe.replace(".py:", "-")
            try:
                run(recipe, workdir)
                print(row(recipe, workdir), flush=True)
            except subprocess.CalledProcessError:
                print(f"| {recipe} | failed, see {workdir.with_suffix('.log')} | | |", flush=True)


if __name__ == "__main__":
    main()
