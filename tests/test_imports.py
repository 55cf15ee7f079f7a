"""What comes with an import is out of the way of collections; what comes later is collected as ever."""

import gc
import subprocess
import sys

import pytest

SCRIPT = """
import gc, weakref
from actors.imports import lasting_imports

class Ring:
    def __init__(self):
        self.itself = self

with lasting_imports():
    library = Ring()
    assert not gc.isenabled()
assert gc.isenabled() and gc.get_freeze_count()
assert not any(found is library for found in gc.get_objects())
garbage = weakref.ref(Ring())
gc.collect()
assert garbage() is None
"""


def test_collections_pass_over_what_was_imported():
    subprocess.run([sys.executable, "-c", SCRIPT], check=True)


def test_an_import_that_fails_leaves_collections_on():
    from actors.imports import lasting_imports

    with pytest.raises(ImportError), lasting_imports():
        raise ImportError
    assert gc.isenabled()
    gc.unfreeze()
