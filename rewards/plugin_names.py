"""`python -m rewards.plugin_names FOLDER WANTED PATH...`: which reward functions do these plug-ins define?

Run by the controller as a process of its own, because importing a plug-in runs the user's code. FOLDER/importing names
the file being imported; FOLDER/names.json is the answer, or the error of one that does not import.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rewards.calling import describe
from rewards.loading import import_plugin, names_defined


def main(folder: str, wanted: str, *paths: str) -> None:
    """Import every file of `paths`; `wanted` is a JSON list of names that may also be functions the files import."""
    modules = []
    try:
        for path in paths:
            Path(folder, "importing").write_text(path)
            modules.append(import_plugin(path))
        result = {"names": names_defined(modules, json.loads(wanted))}
    except BaseException as error:  # noqa: BLE001 also SystemExit: the answer is this process's only purpose
        result = {"error": describe(error)}
    Path(folder, "names.part").write_text(json.dumps(result))
    os.replace(Path(folder, "names.part"), Path(folder, "names.json"))
    os._exit(0)  # not held up by threads that a plug-in has started


if __name__ == "__main__":
    main(*sys.argv[1:])
