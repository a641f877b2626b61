"""Start-up over a folder of a million images: the time until the data set is listed, and the memory that takes.

    python benchmarks/listing.py [--files=1000000] [--classes=1000] [--folder=/tmp]

Makes empty files in class folders (about 20 s and no space but for their names), lists them in a process of its own by
`CustomDataset`, with labels and without, reads the paths of a hundred samples, and removes the files. The peak is that of
the whole process, Python and NumPy (about 40 MB) included. The file system has just made the files, so their names are
in its memory: on a cold disk it is the disk that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import resource
import shutil
import subprocess
import sys
import tempfile
import time


def make(root: str, files: int, classes: int) -> None:
    """`files` empty files, spread over class folders as ImageNet's are."""
    for label in range(classes):
        folder = os.path.join(root, f"n{label:08d}")
        os.mkdir(folder)
        for i in range(label, files, classes):
            os.close(os.open(os.path.join(folder, f"n{label:08d}_{i}.JPEG"), os.O_CREAT | os.O_WRONLY))


def measure(root: str, with_label: bool) -> dict[str, float]:
    """In a child process: seconds, MB at the peak, and MB that a worker process is sent."""
    from jaxpretrain.data.sources import CustomDataset

    begin = time.perf_counter()
    data = CustomDataset(root, with_label=with_label)
    seconds = time.perf_counter() - begin
    for i in range(0, len(data), max(1, len(data) // 100)):
        data.name(i)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "files": len(data),
        "seconds": round(seconds, 2),
        "peak_mb": round(peak / 1e6),
        "pickled_mb": round(len(pickle.dumps(data)) / 1e6, 1),
    }


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--folder", help="where to make them (default: the system's temporary folder)")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--without-labels", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.measure:
        print(json.dumps(measure(args.measure, not args.without_labels)))
        return
    root = tempfile.mkdtemp(prefix="listing-", dir=args.folder)
    try:
        make(root, args.files, args.classes)
        for name, flags in (("class folders", []), ("without labels", ["--without-labels"])):
            command = [sys.executable, __file__, f"--measure={root}", *flags]
            result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            print(f"{name}: {result.stdout.strip()}", flush=True)
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
