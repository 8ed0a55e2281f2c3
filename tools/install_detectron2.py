#!/usr/bin/env python3
"""Install detectron2 where there is none: pure Python, from PyPI alone, no compiler.

An importable detectron2 (official main or v0.6, conda-forge) is left alone. Otherwise one source
distribution is downloaded by hash (a third party's re-upload of the official v0.6: its Python files
are the tag's, byte for byte), a table of small substitutions makes it run without compiled code on
today's Python, torch, numpy and setuptools, and the result is packed as a wheel named
``detectron2`` that pip installs together with what it requires.

Needs the standard library, pip, and torch and OpenCV already installed. Without network: build the
wheel elsewhere with ``--wheel-dir DIR`` and ``pip install`` it, or pass a copy of the downloaded
file with ``--sdist FILE``.
"""

import argparse
import base64
import hashlib
import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

SDIST = "pb1-detectron2==0.6"
SHA256 = "5d2e9e51e523ec72f6a31cca04b0a515492e9514b773a3d134cedc0677170b29"
VERSION = "0.6+py"
DIST_INFO = f"detectron2-{VERSION}.dist-info"
# setup.py's list without what only lazily imported or dead code uses (black, hydra-core, pydot).
REQUIRES = (
    "Pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "termcolor>=1.1",
    "yacs>=0.1.8",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore<0.1.6,>=0.1.5",
    "iopath<0.1.10,>=0.1.7",
    "omegaconf<2.4,>=2.1",
)
PROJECTS = {
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}
PIP = (sys.executable, "-m", "pip")
QUIET = ("--quiet", "--disable-pip-version-check")


class Substitution(NamedTuple):
    """A regular expression (multi-line mode), its replacement, and how often it must match."""

    pattern: str
    replacement: str
    count: int = 1


# Path inside the wheel -> what makes that file run today. A count that differs is an error.
PATCHES: dict[str, tuple[Substitution, ...]] = {
    # Pillow 10 removed the alias.
    "detectron2/data/transforms/transform.py": (Substitution(r"Image\.LINEAR", "Image.BILINEAR"),),
    # setuptools 82 removed pkg_resources.
    "detectron2/model_zoo/model_zoo.py": (
        Substitution(r"^import pkg_resources\n", ""),
        Substitution(
            r"pkg_resources\.resource_filename\(\s*\"detectron2\.model_zoo\", "
            r"os\.path\.join\(\"configs\", config_path\)\s*\)",
            'os.path.join(os.path.dirname(__file__), "configs", config_path)',
        ),
    ),
    # Python 3.11 no longer samples from a set (reached when a mapper returns None).
    "detectron2/data/common.py": (
        Substitution(
            r"self\._rng\.sample\(self\._fallback_candidates, k=1\)",
            "self._rng.sample(list(self._fallback_candidates), k=1)",
        ),
    ),
    # numpy 1.24 removed the aliases of builtins (np.bool came back in 2.0 with another meaning).
    "detectron2/data/build.py": (Substitution(r"\bnp\.int\b", "int", 2),),
    "detectron2/data/datasets/pascal_voc.py": (Substitution(r"\bnp\.str\b", "str"),),
    "detectron2/evaluation/pascal_voc_evaluation.py": (Substitution(r"\bnp\.bool\b", "bool", 2),),
    "detectron2/evaluation/sem_seg_evaluation.py": (
        Substitution(r"\bnp\.(int|float)\b", r"\1", 7),
    ),
    "detectron2/structures/masks.py": (Substitution(r"\bnp\.bool\b", "bool", 3),),
    "detectron2/utils/visualizer.py": (Substitution(r"\bnp\.bool\b", "bool", 3),),
    "detectron2/utils/video_visualizer.py": (Substitution(r"\bnp\.bool\b", "bool"),),
    # The fast evaluator is compiled; official main falls back the same way.
    "detectron2/evaluation/coco_evaluation.py": (
        Substitution(
            r"from detectron2\.evaluation\.fast_eval_api import COCOeval_opt",
            "from pycocotools.cocoeval import COCOeval as COCOeval_opt",
        ),
    ),
    # torch 2 schedulers are LRScheduler: with the old name their state is silently not saved.
    "detectron2/engine/hooks.py": (
        Substitution(r"lr_scheduler\._LRScheduler", "lr_scheduler.LRScheduler", 2),
    ),
    # caffe2 is gone; the tracing exporter stays usable.
    "detectron2/export/__init__.py": (
        Substitution(
            r"^from \.api import \*\n",
            "try:\n    from .api import *\nexcept ImportError:  # caffe2 is gone\n    pass\n",
        ),
    ),
    # torch warns that typed storages will be removed.
    "detectron2/utils/comm.py": (
        Substitution(
            r"storage = torch\.ByteStorage\.from_buffer\(buffer\)\n"
            r"    tensor = torch\.ByteTensor\(storage\)",
            "tensor = torch.frombuffer(bytearray(buffer), dtype=torch.uint8)",
        ),
    ),
    # Several processes without a GPU, through gloo, as official main does.
    "detectron2/engine/launch.py": (
        Substitution(
            r"    assert torch\.cuda\.is_available\(\), \"cuda is not available\. "
            r"Please check your installation\.\"\n",
            "",
        ),
        Substitution(
            r"backend=\"NCCL\"", 'backend="NCCL" if torch.cuda.is_available() else "GLOO"'
        ),
        Substitution(
            r"    assert num_gpus_per_machine <= torch\.cuda\.device_count\(\)\n"
            r"    torch\.cuda\.set_device\(local_rank\)\n",
            "    if torch.cuda.is_available():\n"
            "        assert num_gpus_per_machine <= torch.cuda.device_count()\n"
            "        torch.cuda.set_device(local_rank)\n",
        ),
    ),
}

# detectron2/_C.py: collect_env calls the first three inside default_setup; four modules import the
# compiled ops by name and get an error only when they use one.
COMPILED_STUB = '''"""Stand-in for detectron2's compiled ops; this is a pure-Python install."""


def get_compiler_version():
    return "none (pure-Python install)"


def get_cuda_version():
    return "none (pure-Python install)"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise NotImplementedError(
        f"detectron2._C.{name} needs detectron2's C++/CUDA extension, which this pure-Python "
        "install does not have. Build detectron2 from its official sources to use it."
    )
'''

# Prints where detectron2 lies, or nothing where there is none. It must not name model_zoo, which
# official main cannot import beside setuptools 82 while everything else of it works.
PROBE = """
import importlib.util
spec = importlib.util.find_spec("detectron2")
if spec is not None and spec.origin is not None:
    import detectron2.engine, detectron2.evaluation, detectron2.projects.point_rend
    print(spec.origin)
"""


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line ``argv`` (default: this process's); failures raise SystemExit."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sdist", type=Path, metavar="FILE", help="use this file, no download")
    parser.add_argument(
        "--wheel-dir", type=Path, metavar="DIR", help="only build the wheel, into DIR"
    )
    parser.add_argument("--force", action="store_true", help="replace an installed detectron2")
    args = parser.parse_args(argv)

    if args.wheel_dir is None and not args.force:
        location = find_detectron2()
        if location is not None:
            print(f"detectron2 is already installed ({location}): left alone")
            return
    if args.wheel_dir is None and importlib.util.find_spec("cv2") is None:
        # detectron2's visualizer imports it; which distribution it comes from is the user's choice.
        raise SystemExit("Install OpenCV first: pip install opencv-python-headless")
    with tempfile.TemporaryDirectory() as directory:
        sdist = args.sdist or download_sdist(Path(directory))
        wheel = build_wheel(sdist, args.wheel_dir or Path(directory))
        if args.wheel_dir is not None:
            print(f"wrote {wheel}")
            return
        install(wheel, replace=args.force)
    print(f"installed detectron2 {VERSION} ({find_detectron2()})")


def find_detectron2() -> str | None:
    """Return the path of this Python's detectron2, or None where there is none.

    Raises:
        SystemExit: there is one that does not import; it is somebody's, not ours to replace.
    """
    with tempfile.TemporaryDirectory() as empty:  # a working directory that shadows nothing
        probe = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROBE],
            cwd=empty,
            capture_output=True,
            text=True,
        )
    if probe.returncode != 0:
        reason = probe.stderr.strip().rpartition("\n")[2]
        raise SystemExit(
            f"detectron2 is installed but does not import: {reason}\n"
            "Mend what that line names, or replace this detectron2 with --force."
        )
    return probe.stdout.strip() or None


def download_sdist(directory: Path) -> Path:
    """Download the pinned sdist into ``directory`` with pip and return its path.

    Raises:
        SystemExit: torch, setuptools or pip is missing, or pip failed (no network, hash mismatch).
    """
    # pip runs the sdist's setup.py (it imports torch) by the bdist_wheel that setuptools 70.1 has.
    if importlib.util.find_spec("torch") is None or installed_version("setuptools") < (70, 1):
        raise SystemExit(
            "Install these first: pip install 'torch>=2.10' torchvision 'setuptools>=70.1'"
        )
    if installed_version("pip") == (0, 0):
        raise SystemExit(f"This Python has no pip: {sys.executable} -m ensurepip")
    requirements = directory / "requirements.txt"
    requirements.write_text(f"{SDIST} --hash=sha256:{SHA256}\n")
    command = [*PIP, "download", *QUIET, "--no-deps", "--no-build-isolation"]
    command += ["--no-binary", ":all:", "--require-hashes", "-r", str(requirements)]
    environment = dict(os.environ)
    try:
        if installed_version("pip") >= (26, 3):
            # From 26.3 on, pip refuses every file of PyPI whose metadata names a URL, here in an
            # extra that nobody asks for. An earlier pip, beside the installed one, still takes it.
            print("fetching a pip before 26.3 into a temporary directory", flush=True)
            earlier = directory / "pip"
            subprocess.run(
                [*PIP, "install", *QUIET, "--target", str(earlier), "pip<26.3"], check=True
            )
            paths = [str(earlier), environment.get("PYTHONPATH")]
            environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
        subprocess.run([*command, "--dest", str(directory)], env=environment, check=True)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            f"pip could not download {SDIST} (its own message is above).\n"
            "Without network, pass a copy of the file with --sdist FILE, or run this script with "
            "--wheel-dir DIR on a connected machine and pip install the wheel it writes. With "
            "network and a compiler, the official sources do as well: pip install "
            "--no-build-isolation 'git+https://github.com/facebookresearch/detectron2.git'"
        ) from error
    (sdist,) = directory.glob("*.tar.gz")
    return sdist


def installed_version(distribution: str) -> tuple[int, int]:
    """Return (major, minor) of an installed distribution; (0, 0) where there is none."""
    try:
        version = metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return 0, 0
    major, minor = re.match(r"(\d+)\.(\d+)", version).groups()
    return int(major), int(minor)


def build_wheel(sdist: Path, directory: Path) -> Path:
    """Write the wheel of the patched ``sdist`` into ``directory`` (created) and return its path.

    The same sdist gives the same bytes. Format: the Binary distribution format of PyPA.

    Raises:
        SystemExit: the file is missing, has another hash, or lacks what is to be patched.
    """
    files = read_sdist(sdist)
    apply_patches(files)
    files["detectron2/_C.py"] = COMPILED_STUB.encode()
    requires = "".join(f"Requires-Dist: {requirement}\n" for requirement in REQUIRES)
    files[f"{DIST_INFO}/METADATA"] = (
        f"Metadata-Version: 2.1\nName: detectron2\nVersion: {VERSION}\n"
        f"Requires-Python: >=3.8\n{requires}"
    ).encode()
    files[f"{DIST_INFO}/WHEEL"] = (
        b"Wheel-Version: 1.0\nGenerator: ris_d2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    )
    record = [f"{path},sha256={_record_hash(data)},{len(data)}" for path, data in files.items()]
    record_path = f"{DIST_INFO}/RECORD"
    files[record_path] = "\n".join([*record, f"{record_path},,\n"]).encode()

    directory.mkdir(parents=True, exist_ok=True)
    wheel = directory / f"detectron2-{VERSION}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, data in files.items():
            entry = zipfile.ZipInfo(path, date_time=(2021, 10, 25, 0, 0, 0))
            archive.writestr(entry, data, zipfile.ZIP_DEFLATED)
    return wheel


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def read_sdist(sdist: Path) -> dict[str, bytes]:
    """Check the hash of ``sdist`` and return the files that belong in the wheel, by wheel path."""
    try:
        content = sdist.read_bytes()
    except OSError as error:
        raise SystemExit(f"cannot read {sdist}: {error.strerror}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{sdist}: sha256 is {digest}, not that of {SDIST} ({SHA256})")
    files = {}
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in filter(tarfile.TarInfo.isfile, archive):
            path = wheel_path(member.name.partition("/")[2])
            if path is not None:
                files[path] = archive.extractfile(member).read()
    return files


def wheel_path(path: str) -> str | None:
    """Return where a file of the sdist lies in the wheel, or None if it does not belong there."""
    if path == "LICENSE":
        return f"{DIST_INFO}/licenses/LICENSE"
    for source, target in PROJECTS.items():
        if path.startswith(source):
            return target + path.removeprefix(source)
    return path if path.startswith("detectron2/") else None


def apply_patches(files: dict[str, bytes]) -> None:
    """Apply PATCHES to ``files`` in place.

    Raises:
        SystemExit: a file is missing, or a pattern does not match as often as it must.
    """
    for path, substitutions in PATCHES.items():
        if path not in files:
            raise SystemExit(f"{path} is to be patched and is not in the sdist")
        text = files[path].decode()
        for pattern, replacement, count in substitutions:
            text, found = re.subn(pattern, replacement, text, flags=re.MULTILINE)
            if found != count:
                raise SystemExit(f"{path}: {pattern!r} matches {found} times, not {count}")
        files[path] = text.encode()


def install(wheel: Path, *, replace: bool) -> None:
    """Install ``wheel`` and what it requires with pip; ``replace`` overwrites an installed one."""
    try:
        subprocess.run([*PIP, "install", *QUIET, str(wheel)], check=True)
        if replace:  # a second step, so that the requirements are not reinstalled as well
            subprocess.run(
                [*PIP, "install", *QUIET, "--no-deps", "--force-reinstall", str(wheel)], check=True
            )
    except subprocess.CalledProcessError as error:
        raise SystemExit("pip could not install the wheel (its own message is above)") from error


if __name__ == "__main__":
    main()
