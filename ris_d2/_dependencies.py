"""Says how to get the two dependencies that setup.py cannot name, where one is missing.

Imported first by the package, so that a missing detectron2 is explained, beyond "No module named
detectron2".
"""

import importlib
import warnings

_ADVICE = {
    # First: where libGL is missing, a broken cv2 makes ``import detectron2`` fail too.
    "cv2": (
        "pip install opencv-python-headless (or opencv-python on a desktop; on a machine without "
        "libGL, pip uninstall opencv-python first)"
    ),
    "detectron2": (
        "python tools/install_detectron2.py (pure Python, from a checkout of ris_d2), or build "
        "official main: pip install --no-build-isolation "
        "'git+https://github.com/facebookresearch/detectron2.git'"
    ),
}


def check_dependencies() -> None:
    """Import cv2 and detectron2.

    Raises:
        ImportError: one is missing or does not load; the text says which, why and what to do.
    """
    for module, advice in _ADVICE.items():
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"ris_d2 needs {module}, which does not import here: {error}\nTo get it: {advice}",
                name=module,
            ) from error
    # torch says it of detectron2's and fvcore's code; nobody who imports ris_d2 can mend it.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*torch\.jit\.script", FutureWarning)
        importlib.import_module("detectron2.modeling")


check_dependencies()
