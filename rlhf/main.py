"""Entry point: `python rlhf/main.py TASK [--config FILE] [--key value ...]`, TASK as in --help; the console script `megaray`."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

ROOT = str(Path(__file__).resolve().parent.parent)
if sys.path[0] != ROOT:  # `python rlhf/main.py` puts rlhf/ first: the project's root belongs there
    sys.path[:] = [ROOT, *(path for path in sys.path if Path(path or ".").resolve() != Path(ROOT, "rlhf"))]


def main(argv: list[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 when a run failed, 2 for what the user can mend in the command, 130 interrupted.

    A ValueError is told in one line; one that is not of this project's code, a bug perhaps, prints its traceback before.
    """
    from rlhf.error_origin import is_ours
    from rlhf.options import help_of, load_config

    argv = sys.argv[1:] if argv is None else argv
    if not argv or {"-h", "--help"} & set(argv):
        try:
            print(help_of(argv), flush=True)
        except BrokenPipeError:  # of `megaray --help | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        return 0
    try:
        if argv[0] == "check":
            from rlhf.check import check

            return check()
        if argv[0] == "plan":
            from rlhf.plan import print_plan

            return print_plan(load_config(argv, weights=False))
        config = load_config(argv)
        if config.task == "export":
            from rlhf.export import export

            return export(config)
        from rlhf.run import run

        return run(config)
    except ValueError as error:
        if not is_ours(error):
            traceback.print_exception(error)
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:  # training says what it has saved
        print(": ".join(["interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
