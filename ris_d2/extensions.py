"""The user's own modules: methods, datasets and configuration keys from outside of ris_d2."""

import importlib
import importlib.util
import os
import sys
from types import ModuleType


def import_extension(name: str) -> ModuleType:
    """Import a module once, by its name (the working directory is searched last) or its file.

    A file is imported under its own name without ``.py``, and its folder is searched for what it
    imports itself.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no such module, or another module has the file's name already.
    """
    if name.endswith(".py"):
        return _import_file(os.path.abspath(os.path.expanduser(name)))
    _search_last(os.getcwd())
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not f"{name}.".startswith(f"{error.name}."):
            raise  # the module is there, what it imports is not
        raise ValueError(f"--import {name}: no such module (a file's name ends in .py)") from error


def _import_file(path: str) -> ModuleType:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"--import {path}: no such file")
    name = os.path.basename(path)[: -len(".py")]
    known = sys.modules.get(name)
    if known is not None:
        if os.path.abspath(getattr(known, "__file__", None) or "") == path:
            return known
        raise ValueError(f"--import {path}: there is another module {name!r}; rename the file")
    _search_last(os.path.dirname(path))
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    # Before it runs, as import does it: classes are pickled by the module's name.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _search_last(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
