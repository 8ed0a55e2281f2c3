"""The comparisons with public code start, and say what they lack; their own parts are right."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[2] / "tools" / "compare"
SCRIPTS = sorted(path for path in FOLDER.glob("*.py") if path.stem != "comparison")
# It compares our own forms.
WITHOUT_CHECKOUT = "deformable_attention"


@pytest.fixture(scope="module")
def comparison():
    spec = importlib.util.spec_from_file_location("comparison", FOLDER / "comparison.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def sources(script, comparison):
    """The repositories that a script's module names, in the order of its arguments."""
    spec = importlib.util.spec_from_file_location(f"compare_{script.stem}", script)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [x for x in vars(module).values() if isinstance(x, comparison.Source)], module


@pytest.mark.parametrize(
    "script", [x for x in SCRIPTS if x.stem != WITHOUT_CHECKOUT], ids=lambda path: path.stem
)
def test_a_missing_checkout_is_one_line(script, comparison, tmp_path, capsys):
    needed, module = sources(script, comparison)
    for source in needed:
        assert source.repository in module.__doc__ and source.commit[:7] in module.__doc__
    with pytest.raises(SystemExit) as stop:
        comparison.run(module.__doc__, needed, {"part": None}, [str(tmp_path)] * len(needed))
    assert f"no checkout of {needed[0].repository}" in str(stop.value)
    with pytest.raises(SystemExit) as stop:
        comparison.run(module.__doc__, needed, {"part": None}, ["--help"])
    assert stop.value.code == 0 and needed[0].commit[:7] in capsys.readouterr().out


def test_a_script_stands_by_itself():
    script = FOLDER / "pwam.py"
    help_text = subprocess.run(
        [sys.executable, str(script), "--help"],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(FOLDER.parents[1]), "PATH": ""},
    ).stdout
    assert "yz93/LAVT-RIS" in help_text and "--part" in help_text


def test_every_script_is_on_the_page():
    page = (FOLDER / "README.md").read_text()
    for script in SCRIPTS:
        assert f"`{script.name}`" in page


def test_differences_above_what_is_allowed_end_with_1(comparison, tmp_path, capsys):
    source = comparison.Source("a/b", "0" * 40, "file.py")
    (tmp_path / "file.py").touch()
    ones = torch.ones(2)

    def part(checkouts, table):
        assert checkouts == [tmp_path.resolve()]
        table.add("near", ones + 1e-6, ones, 1e-5)

    comparison.run("doc", [source], {"near": part}, [str(tmp_path)])
    assert "| near" in capsys.readouterr().out
    for bad in (ones + 1, ones * float("nan")):
        parts = {"far": lambda checkouts, table: table.add("far", bad, ones, 1e-5)}
        with pytest.raises(SystemExit, match="far"):
            comparison.run("doc", [source], parts, [str(tmp_path)])
    with pytest.raises(ValueError, match="shape|ours is"):
        comparison.Table().add("shapes", ones, torch.ones(3), 1)


def test_randomised_models_are_seeded_and_leave_nothing_at_its_start(comparison):
    def model():
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Embedding(5, 8))

    first, again, other = (comparison.randomise(model(), seed) for seed in (0, 0, 1))
    for name, value in first.state_dict().items():
        if value.is_floating_point():
            assert torch.equal(value, again.state_dict()[name])
            assert not torch.equal(value, other.state_dict()[name])
            assert value.unique().numel() == value.numel()
    assert not first.training


def test_stand_ins_serve_imports_and_decorators(comparison, monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    comparison.stub("not_there.inner", answer=42)
    from not_there.inner import answer, decorate

    @decorate
    def function():
        return answer

    @decorate("with an argument")
    def other():
        return answer

    assert function() == other() == 42
