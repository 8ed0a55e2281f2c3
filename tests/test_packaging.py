"""setup.py names what the code imports and packages every room; what it leaves out is explained."""

import ast
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = {"PIL": "Pillow", "yaml": "PyYAML", "sklearn": "scikit-learn"}
NOT_DECLARED = {"cv2", "detectron2"}  # see setup.py


@pytest.fixture(scope="module")
def declared():
    """The keyword arguments of setup()."""
    arguments = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(setuptools, "setup", lambda **keywords: arguments.update(keywords))
        runpy.run_path("setup.py")
    return arguments


def sources():
    folders = ("ris_d2", "tools", "datasets")
    yield from (path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    yield from ROOT.glob("*.py")


def third_party_imports(path):
    """Distributions that ``path`` imports anywhere, its own package and standard library aside."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        else:
            continue
        for module in (name.partition(".")[0] for name in modules):
            if module not in sys.stdlib_module_names and module not in ("ris_d2", "setuptools"):
                yield DISTRIBUTIONS.get(module, module)


def test_every_import_is_declared_and_every_declaration_imported(declared):
    requirements = {re.match(r"[\w-]+", line)[0] for line in declared["install_requires"]}
    optional = {line for extra in declared["extras_require"].values() for line in extra}
    imported = {name for path in sources() for name in third_party_imports(path)}
    assert imported - optional - NOT_DECLARED == requirements


def test_every_folder_of_the_package_is_packaged(declared):
    folders = {path.parent for path in (ROOT / "ris_d2").rglob("*.py")}
    names = {".".join(folder.relative_to(ROOT).parts) for folder in folders}
    assert names == set(declared["packages"])


@pytest.mark.parametrize(
    "module, advice",
    [("cv2", "opencv-python-headless"), ("detectron2", "tools/install_detectron2.py")],
)
def test_a_missing_dependency_says_how_to_get_it(module, advice):
    script = f"import sys; sys.modules[{module!r}] = None; import ris_d2"
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    message = result.stderr.rpartition("ImportError: ")[2]
    assert message.startswith(f"ris_d2 needs {module}, which does not import here")
    assert advice in message


def test_files_that_are_no_modules_are_packaged(declared):
    others = {
        p for p in (ROOT / "ris_d2").rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }
    others -= set((ROOT / "ris_d2").rglob("*.py"))
    packaged = {
        path
        for package, patterns in declared["package_data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert others == packaged
