"""Large libraries, imported for the life of a process."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def lasting_imports() -> Iterator[None]:
    """What comes to be meanwhile is not looked through for garbage: not now, and not by collections later.

    Half a million objects of libraries make an import take a fifth longer, and each later collection most of its time;
    Megatron collects at every checkpoint.
    """
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
