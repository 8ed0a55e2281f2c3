"""RefShapes, the synthetic benchmark: scenes, what is said about them, and their files.

Nothing of the library imports this room: its files are read as any other dataset's, under the names
that ``ris_d2.data.catalog`` registers.
"""

from .language import Scene
from .scenes import BENCHMARKS, SPLITS, Options, generate, polygon, render
from .tokenizer import write_tokenizer
from .writing import instances, references, write

__all__ = [
    "BENCHMARKS",
    "SPLITS",
    "Options",
    "Scene",
    "generate",
    "instances",
    "polygon",
    "references",
    "render",
    "write",
    "write_tokenizer",
]
