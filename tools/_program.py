"""What all programs share: the command line, the configuration that it names, errors in one line.

Nothing heavy is imported before a command line has been understood, so that --help and a mistyped
option are answered at once. A program therefore parses before its own imports, and again in main().
"""

import argparse
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from detectron2.config import CfgNode

# torch says it while detectron2 is imported; nobody who starts a program can do anything about it.
warnings.filterwarnings("ignore", r".*torch\.jit\.script", FutureWarning)


class Parser(argparse.ArgumentParser):
    """A parser whose help begins with ``doc``, the program's docstring."""

    def __init__(self, doc: str) -> None:
        super().__init__(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-5 is a value, too
        self.add_argument("--debug", action="store_true", help="show where in the code an error is")

    def add_config_file(self, **settings: Any) -> None:
        """Take --config-file, and what :meth:`add_changes` takes."""
        settings = {"metavar": "FILE", "help": "a yaml as in configs/", **settings}
        self.add_argument("--config-file", **settings)
        self.add_changes()

    def add_model(self, **settings: Any) -> None:
        """Take --model."""
        self.add_argument(
            "--model",
            **settings,
            help="a model folder, a name of docs/weights.md, or organisation/repository on the Hugging Face "
            "hub (default: the small model that comes with ris_d2)",
        )

    def add_changes(self) -> None:
        """Take --import and, anywhere in the line, KEY VALUE pairs."""
        self.add_import()
        self.add_argument(
            "opts", nargs="*", metavar="KEY VALUE", help="changes to the configuration"
        )

    def add_import(self) -> None:
        self.add_argument(
            "--import",
            dest="modules",
            action="append",
            default=[],
            metavar="MODULE",
            help="your own module or file.py, imported first: it may register models and datasets; "
            "its add_config(cfg), if it has one, adds keys; may be given several times",
        )

    def parse_args(self, arguments: Sequence[str] | None = None) -> argparse.Namespace:
        # Intermixed: else the pairs would have to stand together.
        args = self.parse_intermixed_args(arguments)
        for key in getattr(args, "opts", [])[::2]:
            if not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", key):
                self.error(f"{key!r} is neither an option nor a KEY (KEY VALUE ...)")
        if len(getattr(args, "opts", [])) % 2:
            self.error(f"{args.opts[-1]!r} has no value (KEY VALUE ...)")
        return args


def load(
    args: argparse.Namespace, config_file: str | None = None, options: Sequence[str] = ()
) -> "CfgNode":
    """The configuration that a command line names, or ``config_file`` with the line's changes.

    ``options`` are further KEY VALUE pairs, after the line's.
    """
    from ris_d2 import load_config

    config_file = config_file or getattr(args, "config_file", None) or ""
    return load_config(config_file, [*args.opts, *options], modules=args.modules)


def repeated(args: argparse.Namespace) -> list[str]:
    """The words that give another program the same modules and KEY VALUE pairs."""
    return [word for module in args.modules for word in ("--import", module)] + list(args.opts)


def run(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call ``function``. What the user can mend is said in one line (status 1), without --debug.

    That is a ValueError, OSError or FloatingPointError raised by code of ris_d2 or of a program; an
    error from below keeps its traceback.
    """
    try:
        return function(*arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        if "--debug" in sys.argv or not _is_said_by_us(error):
            raise
        fail(error)


def fail(error: object) -> NoReturn:
    """End the program with one line and status 1."""
    sys.exit(f"{os.path.basename(sys.argv[0])}: {error}")


def _is_said_by_us(error: Exception) -> bool:
    import ris_d2

    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    file = os.path.abspath(frame.f_code.co_filename)
    programs = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    folders = [os.path.join(programs, name) for name in ("tools", "datasets")]
    ours = (os.path.dirname(ris_d2.__file__), *folders)
    return file.startswith(ours) or file == os.path.join(programs, "train_net.py")
