"""The tools are scripts, not a package: tests load them from their files."""

import importlib.util
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def load_tool():
    """``load_tool("demo")`` returns tools/demo.py as a module."""

    def load(name):
        path = (REPOSITORY / "tools" / f"{name}.py").resolve()
        spec = importlib.util.spec_from_file_location(f"tools_{path.stem}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tiny_config(tmp_path):
    """A SharedRIS small enough for tests, and the tokenizer of RefShapes, in one yaml file."""
    from ris_d2.refshapes import write_tokenizer

    write_tokenizer(str(tmp_path / "tokenizer"))
    path = tmp_path / "tiny.yaml"
    path.write_text(f"""
VERSION: 2
MODEL:
  DEVICE: cpu
  META_ARCHITECTURE: SharedRIS
  WEIGHTS: ""
  PIXEL_MEAN: [127.5, 127.5, 127.5]
  PIXEL_STD: [127.5, 127.5, 127.5]
  RIS: {{NO_TARGET: head, BEIT3: {{EMBED_DIM: 32, DEPTH: 2, NUM_HEADS: 2, VOCAB_SIZE: 300}}}}
  SHARED_RIS: {{DIM: 32, NUM_HEADS: 2, STAGES: [1, 2]}}
INPUT:
  RIS:
    SIZE: [64, 64]
    UNIT: image
    TOKENIZER: {{KIND: hf, PATH: "{tmp_path / 'tokenizer'}"}}
""")
    return str(path)
