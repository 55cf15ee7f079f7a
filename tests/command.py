"""The command line as a user types it, in a process of its own that never joins another Ray cluster."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
MAIN = ROOT / "rlhf" / "main.py"


def start(*arguments: Any, log: Path, address: str = "local", **environment: str) -> subprocess.Popen:
    """Start `python rlhf/main.py ARGUMENTS` on a Ray of its own, or on the one at `address`; its output in `log`."""
    return _start([sys.executable, str(MAIN), *map(str, arguments)], log, {"RAY_ADDRESS": address} | environment)


def start_in_shell(line: str, *, log: Path, address: str = "local", **environment: str) -> subprocess.Popen:
    """Start what a user types, variables in front and `megaray` as the program; otherwise as `start`."""
    megaray = shlex.join([sys.executable, str(MAIN)])
    return _start(["bash", "-c", f'megaray() {{ exec {megaray} "$@"; }}; {line}'], log, {"RAY_ADDRESS": address} | environment)


def _start(command: list[str], log: Path, environment: dict[str, str]) -> subprocess.Popen:
    with open(log, "w") as file:
        return subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | environment,
            cwd=log.parent,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # whoever runs the tests may have it ignored
        )


def run(*arguments: Any, log: Path, timeout: float = 300, address: str = "local", lines: str = "") -> tuple[int, str]:
    """Run to the end, `lines` on its standard input: (exit status, output)."""
    return ended(start(*arguments, log=log, address=address), log=log, timeout=timeout, lines=lines)


def ended(process: subprocess.Popen, *, log: Path, timeout: float = 300, lines: str = "") -> tuple[int, str]:
    """Wait for a started command's end, `lines` on its standard input: (exit status, output)."""
    try:
        process.stdin.write(lines)
        process.stdin.close()
        return process.wait(timeout), log.read_text()
    finally:
        process.kill()


def wait_until(condition: Callable[[], Any], process: subprocess.Popen, *, log: Path, timeout: float = 240) -> Any:
    """Poll until `condition()` is true; fails with the log when the process ends or time runs out first."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert process.poll() is None, f"ended with {process.returncode}:\n{log.read_text()[-4000:]}"
        assert time.monotonic() < deadline, f"nothing after {timeout} s:\n{log.read_text()[-4000:]}"
        time.sleep(0.1)
    return value


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a run's metrics."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def actors(ray_owner: subprocess.Popen | psutil.Process, kind: str) -> list[int]:
    """Process ids of the Ray actors of one class, below the process that started Ray."""
    found = []
    for child in psutil.Process(ray_owner.pid).children(recursive=True):
        try:
            if child.cmdline()[:1] and child.cmdline()[0].startswith(f"ray::{kind}"):
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return sorted(found)
