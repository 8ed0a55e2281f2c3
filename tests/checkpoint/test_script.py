import pickle
import zipfile

import pytest
import torch
from torch import nn

from ris_d2.checkpoint import read_weights

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit's farewell


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = nn.Sequential(nn.Conv2d(3, 4, 2), nn.BatchNorm2d(4)).half()
        self.positional_embedding = nn.Parameter(torch.rand(3, 4))
        self.scale: int = 3

    def forward(self, x):
        return self.visual(x) * self.scale


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "model.pt"
    torch.jit.save(torch.jit.script(Toy()), str(path))
    return path


def test_tensors_of_an_archive(archive):
    expected = torch.jit.load(str(archive)).state_dict()
    content = read_weights(archive)
    assert content.keys() == expected.keys()
    assert all(torch.equal(content[name], value) for name, value in expected.items())
    assert content["visual.0.weight"].dtype == torch.float16


def test_archive_with_other_objects_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("owned",)

    path = tmp_path / "evil.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("evil/data.pkl", pickle.dumps(Evil()))
        file.writestr("evil/constants.pkl", b"")
    with pytest.raises(ValueError, match="evil.pt: holds Python objects .builtins.print."):
        read_weights(path)


def test_damaged_archive_is_named(archive, tmp_path):
    path = tmp_path / "damaged.pt"
    with zipfile.ZipFile(archive) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            if name != "model/data/0":
                new.writestr(name, old.read(name))
    with pytest.raises(ValueError, match="damaged.pt: damaged TorchScript archive"):
        read_weights(path)
    path.write_bytes(archive.read_bytes()[:500])
    with pytest.raises(ValueError, match="damaged.pt"):
        read_weights(path)


def test_an_empty_tensor(tmp_path):
    module = nn.Module()
    module.register_buffer("nothing", torch.zeros(0))
    torch.jit.save(torch.jit.script(module), str(tmp_path / "model.pt"))
    assert read_weights(tmp_path / "model.pt")["nothing"].shape == (0,)


def nothing_but_modules(depth):
    """A data.pkl whose modules contain the next one twice each."""
    module = b"c__torch__\nM\n)R}"
    data = b"\x80\x02" + module + b"b"
    for _ in range(depth):
        data += b"q\x00" + module + b"(X\x01\x00\x00\x00ah\x00X\x01\x00\x00\x00bh\x00ub"
    return data + b"."


def test_modules_inside_each_other_without_end(tmp_path):
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("model/data.pkl", nothing_but_modules(40))
        file.writestr("model/constants.pkl", b"")
    with pytest.raises(ValueError, match=r"model\.pt: more than 10000 modules"):
        read_weights(path)
