"""Two programs that run in turn: each side has a process of its own, and runs what it is told, one line at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any


def serve(build: Callable[[], dict[str, Callable[[], Any]]]) -> None:
    """A side's whole life: builds its functions, then runs what each line of stdin names, and answers in JSON.

    An answer has `value` (which JSON must be able to say), `wall` and `cpu` seconds.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes elsewhere
    functions = build()
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        value = functions[line.strip()]()
        answer = dict(wall=time.perf_counter() - wall, cpu=time.process_time() - cpu, value=value)
        print(json.dumps(answer), file=answers, flush=True)


class Side:
    """One side's process, with a number of threads."""

    def __init__(self, command: Sequence[str], threads: int):
        environment = dict(os.environ, OMP_WAIT_POLICY="passive", OMP_NUM_THREADS=str(threads))  # spinning is no work
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=environment)
        self._read()

    def run(self, what: str) -> dict[str, Any]:
        """Runs one of its functions once."""
        assert self.process.stdin is not None
        print(what, file=self.process.stdin, flush=True)
        return json.loads(self._read())

    def close(self) -> None:
        self.process.communicate()

    def _read(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{' '.join(map(str, self.process.args))} ended early; its message is above")  # type: ignore
        return line
