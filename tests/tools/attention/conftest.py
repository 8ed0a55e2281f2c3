"""The small models of the methods' own tests."""

import runpy
from pathlib import Path

TESTS = Path(__file__).parents[2]


def _fixtures(room: str) -> dict:
    return runpy.run_path(str(TESTS / "modeling" / room / "conftest.py"))


make_inputs = _fixtures(".")["make_inputs"]
tiny_cfg = _fixtures(".")["tiny_cfg"]
make_square = _fixtures("risam")["make_square"]
risam_cfg = _fixtures("risam")["risam_cfg"]
vipa_cfg = _fixtures("vipa")["vipa_cfg"]
asda_cfg = _fixtures("asda")["tiny_cfg"]
