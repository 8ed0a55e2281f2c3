"""The zoo: models by name, and where the files come from that models and recipes need.

The table is zoo.yaml beside this file; ``python -m ris_d2.zoo`` prints the tables of
docs/weights.md.
"""

import functools
import os
from typing import Any

from tabulate import tabulate

from .yaml_files import read_yaml

_COLUMNS = ("recipe", "weights", "tokenizer")
_PACKAGE = os.path.dirname(os.path.abspath(__file__))


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Any]]]:
    return read_yaml(os.path.join(_PACKAGE, "zoo.yaml"))


def models() -> dict[str, dict[str, Any]]:
    """name -> ``about``, ``licence``, and either ``folder`` (a model folder in this package) or
    ``recipe`` (see :func:`config_file`), ``set`` (further keys), ``weights`` and ``tokenizer``."""
    return _table()["models"]


def known_files() -> dict[str, dict[str, str]]:
    """File name -> ``url``, ``page`` and ``licence`` of what recipes name in pretrained/."""
    return _table()["files"]


def config_file(name: str) -> str:
    """The path of a recipe of ris_d2's: ``deris_swin_b.yaml``, ``papers/deris.yaml:deris_l``.

    Raises:
        FileNotFoundError: there is none of that name.
    """
    path = os.path.join(_PACKAGE, "configs", name)
    if not os.path.isfile(path.rpartition(":")[0] if ".yaml:" in name else path):
        raise FileNotFoundError(f"{name}: no such recipe in {os.path.join(_PACKAGE, 'configs')}")
    return path


def how_to_get(path: str) -> str:
    """The command that puts a published file where it is looked for; "" for an unknown file."""
    name = os.path.basename(path)
    if path.startswith("hf://"):
        organisation, repository, file = path[len("hf://") :].split("/", 2)
        return f"hf download {organisation}/{repository} {file} --local-dir pretrained"
    if name in known_files():
        return f"curl -L --create-dirs -o pretrained/{name} {known_files()[name]['url']}"
    return ""


def tables() -> str:
    """The zoo in Markdown, as it stands in docs/weights.md."""
    trained = [
        (f"`{name}`", m["about"], *(f"`{m[k]}`" if k in m else "" for k in _COLUMNS), m["licence"])
        for name, m in models().items()
    ]
    files = [
        (f"`{name}`", file["page"], file["licence"], f"`{how_to_get(name)}`")
        for name, file in known_files().items()
    ]
    headers = ("name", "what it is", *_COLUMNS, "licence")
    return "\n\n".join(
        [
            tabulate(trained, headers, "github"),
            tabulate(files, ("file", "published with", "licence", "to get it"), "github"),
        ]
    )


if __name__ == "__main__":
    print(tables())
