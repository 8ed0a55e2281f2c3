"""tools/install_detectron2.py on a small stand-in for the sdist; the network is not touched."""

import hashlib
import importlib.util
import io
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = {
    "LICENSE": "Apache-2.0\n",
    "setup.py": "raise RuntimeError('must not run')\n",
    "detectron2/__init__.py": "answer = numpy_alias = 'np.int np.int'\n",
    "detectron2/engine.py": "import os\nlast = np.bool\n",
    "projects/PointRend/point_rend/__init__.py": "name = 'point_rend'\n",
    "projects/PointRend/train_net.py": "not packaged\n",
    "tests/test_all.py": "not packaged\n",
}


@pytest.fixture
def installer(monkeypatch):
    spec = importlib.util.spec_from_file_location(
        "install_detectron2", ROOT / "tools/install_detectron2.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    patches = {
        "detectron2/__init__.py": (module.Substitution(r"\bnp\.int\b", "int", 2),),
        "detectron2/engine.py": (
            module.Substitution(r"^import os\n", ""),
            module.Substitution(r"np\.(bool)", r"\1"),
        ),
    }
    monkeypatch.setattr(module, "PATCHES", patches)
    return module


@pytest.fixture
def make_sdist(installer, monkeypatch, tmp_path):
    """Return a function that writes files as an sdist and makes its hash the expected one."""

    def make(sources=SOURCES):
        path = tmp_path / "pb1-detectron2-0.6.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            for name, text in sources.items():
                member = tarfile.TarInfo(f"pb1-detectron2-0.6/{name}")
                member.size = len(text)
                archive.addfile(member, io.BytesIO(text.encode()))
        monkeypatch.setattr(installer, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return make


@pytest.fixture
def commands(installer, monkeypatch):
    """Record subprocesses instead of running them; returns the list of (command, environment)."""
    recorded = []

    def run(command, env=None, **kwargs):
        recorded.append(([str(part) for part in command], env))
        if "download" in command:
            directory = Path(command[command.index("--dest") + 1])
            (directory / "pb1-detectron2-0.6.tar.gz").write_bytes(b"")
        return subprocess.CompletedProcess(command, 0, stdout="", stderr="")

    monkeypatch.setattr(installer.subprocess, "run", run)
    return recorded


def use_versions(monkeypatch, **versions):
    """Make ``versions`` the only installed distributions."""

    def version(name):
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


def test_wheel_holds_the_patched_files_and_nothing_else(installer, make_sdist, tmp_path):
    wheel = installer.build_wheel(make_sdist(), tmp_path / "new" / "wheels")
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist()}
    info = "detectron2-0.6+py.dist-info"
    assert set(files) == {
        "detectron2/__init__.py",
        "detectron2/engine.py",
        "detectron2/_C.py",
        "detectron2/projects/point_rend/__init__.py",
        f"{info}/licenses/LICENSE",
        f"{info}/METADATA",
        f"{info}/WHEEL",
        f"{info}/RECORD",
    }
    assert files["detectron2/__init__.py"] == "answer = numpy_alias = 'int int'\n"
    assert files["detectron2/engine.py"] == "last = bool\n"
    assert "Name: detectron2\nVersion: 0.6+py\n" in files[f"{info}/METADATA"]
    assert "Requires-Dist: omegaconf<2.4,>=2.1\n" in files[f"{info}/METADATA"]


def test_wheel_is_bit_identical_on_every_build(installer, make_sdist, tmp_path):
    sdist = make_sdist()
    first = installer.build_wheel(sdist, tmp_path / "first").read_bytes()
    assert installer.build_wheel(sdist, tmp_path / "second").read_bytes() == first


def test_pip_installs_the_wheel_and_its_stub_explains_itself(installer, make_sdist, tmp_path):
    wheel = installer.build_wheel(make_sdist(), tmp_path)
    site = tmp_path / "site"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, "--target", str(site), str(wheel)], check=True)
    record = metadata.PathDistribution(site / "detectron2-0.6+py.dist-info")
    assert (record.name, record.version) == ("detectron2", "0.6+py")
    script = (
        "import detectron2, detectron2.projects.point_rend as p, detectron2._C as c\n"
        "print(detectron2.answer, p.name, c.has_cuda(), hasattr(c, '__path__'))\n"
        "c.deform_conv_forward\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert result.stdout.split() == ["int", "int", "point_rend", "False", "False"]
    assert "NotImplementedError: detectron2._C.deform_conv_forward needs" in result.stderr


def test_another_hash_is_refused(installer, make_sdist, tmp_path):
    sdist = make_sdist()
    sdist.write_bytes(sdist.read_bytes() + b"\0")
    with pytest.raises(SystemExit, match="sha256 is [0-9a-f]{64}, not that of pb1-detectron2==0.6"):
        installer.main(["--sdist", str(sdist), "--wheel-dir", str(tmp_path / "wheels")])
    assert not (tmp_path / "wheels").exists()


def test_a_substitution_that_matches_another_number_of_times_is_refused(
    installer, make_sdist, tmp_path
):
    sdist = make_sdist({**SOURCES, "detectron2/__init__.py": "a = 'np.int'\n"})
    with pytest.raises(SystemExit, match=r"detectron2/__init__.py: .* matches 1 times, not 2"):
        installer.build_wheel(sdist, tmp_path / "wheels")
    assert not (tmp_path / "wheels").exists()


def test_a_file_to_patch_that_the_sdist_lacks_is_refused(installer, make_sdist, tmp_path):
    sources = {name: text for name, text in SOURCES.items() if name != "detectron2/engine.py"}
    with pytest.raises(SystemExit, match="detectron2/engine.py is to be patched and is not in"):
        installer.build_wheel(make_sdist(sources), tmp_path)


def test_an_sdist_that_is_not_there_is_named(installer, tmp_path):
    with pytest.raises(SystemExit, match="cannot read .*absent.tar.gz: No such file"):
        installer.build_wheel(tmp_path / "absent.tar.gz", tmp_path)


def test_offline_says_how_to_go_on(installer, monkeypatch, tmp_path):
    def fail(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    use_versions(monkeypatch, pip="25.3", setuptools="84.2.1")
    monkeypatch.setattr(installer.subprocess, "run", fail)
    with pytest.raises(SystemExit) as stop:
        installer.download_sdist(tmp_path)
    for part in ("--sdist FILE", "--wheel-dir DIR", "facebookresearch/detectron2.git"):
        assert part in str(stop.value)


def test_download_is_pinned_by_hash(installer, commands, monkeypatch, tmp_path):
    use_versions(monkeypatch, pip="26.2.1", setuptools="84.2.1")
    assert installer.download_sdist(tmp_path) == tmp_path / "pb1-detectron2-0.6.tar.gz"
    ((command, _),) = commands
    assert "--require-hashes" in command and "--no-deps" in command
    requirements = Path(command[command.index("-r") + 1]).read_text()
    assert requirements == f"pb1-detectron2==0.6 --hash=sha256:{installer.SHA256}\n"


def test_pip_26_3_downloads_through_an_earlier_pip(installer, commands, monkeypatch, tmp_path):
    use_versions(monkeypatch, pip="26.3", setuptools="84.2.1")
    monkeypatch.setenv("PYTHONPATH", "mine")
    installer.download_sdist(tmp_path)
    (fetch, _), (download, environment) = commands
    target = fetch[fetch.index("--target") + 1]
    assert fetch[-1] == "pip<26.3" and Path(target).parent == tmp_path
    assert environment["PYTHONPATH"].split(installer.os.pathsep) == [target, "mine"]
    assert "--require-hashes" in download


@pytest.mark.parametrize(
    "versions, message",
    [
        ({"setuptools": "84.2.1"}, "has no pip: .* -m ensurepip"),
        ({"pip": "25.3"}, "pip install 'torch>=2.10' torchvision 'setuptools>=70.1'"),
        ({"pip": "25.3", "setuptools": "70.0.0"}, "setuptools>=70.1"),
    ],
)
def test_what_the_download_needs_is_said(installer, monkeypatch, tmp_path, versions, message):
    use_versions(monkeypatch, **versions)
    with pytest.raises(SystemExit, match=message):
        installer.download_sdist(tmp_path)


def test_without_opencv_it_says_what_to_install(installer, commands, monkeypatch):
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install opencv-python-headless"):
        installer.main(["--force"])
    assert commands == []


def test_without_torch_it_says_what_to_install(installer, monkeypatch, tmp_path):
    monkeypatch.setattr(installer.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="pip install 'torch>=2.10' torchvision"):
        installer.download_sdist(tmp_path)


def test_failing_pip_install_is_an_error(installer, make_sdist, monkeypatch):
    sdist = make_sdist()

    def fail(command, **kwargs):
        raise subprocess.CalledProcessError(1, command)

    monkeypatch.setattr(installer.subprocess, "run", fail)
    with pytest.raises(SystemExit, match="pip could not install the wheel"):
        installer.main(["--force", "--sdist", str(sdist)])


def fake_detectron2(directory, text):
    """Lay out an importable detectron2 whose __init__ is ``text``."""
    for name in ("engine", "evaluation", "projects", "projects/point_rend"):
        package = directory / "detectron2" / name
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
    (directory / "detectron2" / "__init__.py").write_text(text)


def test_an_importable_detectron2_is_left_alone(installer, monkeypatch, tmp_path, capsys):
    fake_detectron2(tmp_path, "")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(installer, "build_wheel", None)
    installer.main([])
    assert f"already installed ({tmp_path}" in capsys.readouterr().out


def test_a_broken_detectron2_is_not_overwritten(installer, monkeypatch, tmp_path):
    fake_detectron2(tmp_path, "raise ImportError('libGL.so.1: no such file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(installer, "build_wheel", None)
    with pytest.raises(SystemExit, match="(?s)ImportError: libGL.so.1: no such file.*--force"):
        installer.main([])


def test_force_replaces_without_asking_what_is_there(installer, make_sdist, commands):
    installer.main(["--force", "--sdist", str(make_sdist())])
    installs = [command for command, _ in commands if "install" in command]
    assert [("--force-reinstall" in command) for command in installs] == [False, True]
    assert all(command[-1].endswith("detectron2-0.6+py-py3-none-any.whl") for command in installs)
