"""setup.py names what the code imports and packages every room; what it leaves out is explained."""

import ast
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import setuptools
import yaml

ROOT = Path(__file__).resolve().parents[1]
DISTRIBUTIONS = {"PIL": "Pillow", "yaml": "PyYAML", "sklearn": "scikit-learn"}
# See setup.py; triton comes with the wheels of torch that can use it.
NOT_DECLARED = {"cv2", "detectron2", "triton"}


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
    """Distributions that ``path`` imports anywhere, its own package and standard library aside.

    Comparisons import public code inside of functions, from the checkouts that they are given.
    """
    own = {
        "ris_d2",
        "setuptools",
        path.parent.name,
        *(other.stem for other in ROOT.glob("tools/_*.py")),
        *(other.stem for other in path.parent.glob("*.py")),
    }
    tree = ast.parse(path.read_text())
    for node in tree.body if path.parent.name == "compare" else ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        else:
            continue
        for module in (name.partition(".")[0] for name in modules):
            if module not in sys.stdlib_module_names and module not in own:
                yield DISTRIBUTIONS.get(module, module)


def test_every_import_is_declared_and_every_declaration_imported(declared):
    extras = [line for extra in declared["extras_require"].values() for line in extra]
    requirements, optional = (
        {re.match(r"[\w-]+", line)[0] for line in lines}
        for lines in (declared["install_requires"], extras)
    )
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
    others |= {ROOT / "ris_d2" / p.relative_to(ROOT) for p in (ROOT / "configs").rglob("*.yaml")}
    packaged = {
        path
        for package, patterns in declared["package_data"].items()
        for pattern in patterns
        for path in ROOT.joinpath(*package.split(".")).glob(pattern)
    }
    assert others == packaged


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy: building in place leaves folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "ris_d2", folder / "ris_d2")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "."]
    subprocess.run([*command, "-w", "dist"], cwd=folder, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    return wheel


def test_a_wheel_carries_license_types_data_and_recipes(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = [name for name in names if name.endswith(".dist-info/METADATA")]
        (license_file,) = [name for name in names if name.endswith("/LICENSE")]
        fields = message_from_bytes(archive.read(metadata))
        assert archive.read(license_file) == (ROOT / "LICENSE").read_bytes()
    assert "Apache-2.0" in (fields["License"], fields["License-Expression"])
    assert "ris_d2/py.typed" in names
    files = {path.relative_to(ROOT).as_posix() for path in (ROOT / "ris_d2").rglob("*.json")}
    recipes = {
        f"ris_d2/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "configs").rglob("*.yaml")
    }
    assert files and files <= set(names) and recipes and recipes <= set(names)


def test_the_first_minute_takes_the_wheel_alone(wheel, tmp_path):
    """Installed in an environment of its own, far from the checkout: a picture, models by name."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    (site,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    # What ris_d2 requires is taken from here; its own site-packages come first.
    (site / "requirements.pth").write_text(sysconfig.get_paths()["purelib"])
    command = [sys.executable, "-m", "pip", "-q", "--python", python, "install", "--no-deps", wheel]
    subprocess.run(command, check=True, capture_output=True)
    settings = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    settings["HF_HUB_OFFLINE"] = "1"

    def run(*words):
        done = subprocess.run(words, cwd=tmp_path, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert "the circles on the right side" in run(python.with_name("ris_d2"), "--output", "out")
    assert (tmp_path / "out" / "0_overlay.png").is_file()
    script = (
        "from ris_d2 import Predictor, load_config, zoo\n"
        "Predictor.from_pretrained('example').save_pretrained('model')\n"
        "print(load_config(zoo.config_file('papers/deris.yaml:deris_l')).MODEL.META_ARCHITECTURE)\n"
        "import ris_d2, ris_d2.__main__; print(ris_d2.__file__)\n"
        "words = ['out/0_overlay.png', 'the circles', '--model', 'model', '--output', 'again']\n"
        "ris_d2.__main__.main(words)"
    )
    printed = run(python, "-c", script)
    assert printed.startswith("DeRIS\n") and str(site) in printed
    assert json.loads((tmp_path / "again" / "results.json").read_text())["model"] == "model"


def test_citation_names_this_version_and_the_five_papers(declared):
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == declared["version"]
    assert citation["license"] == declared["license"]
    papers = citation["references"]
    texts = [f"{paper['title']} {paper.get('notes', '')}" for paper in papers]
    for method in ("DeRIS", "RISAM", "VIPA", "ASDA", "Shared-RIS"):
        assert sum(method in text for text in texts) == 1
    assert all(paper["authors"] and paper["year"] for paper in papers)
