import argparse
import pickle

import numpy as np
import pytest
import torch

from ris_d2.checkpoint import read_weights

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.ones(2)}


def same(found, expected=WEIGHTS):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["model.pth", "beit3_base_patch16_224.zip", "pytorch_model.bin"])
def test_torch_file_under_any_name(tmp_path, name):
    torch.save({"model": WEIGHTS}, tmp_path / name)
    same(read_weights(tmp_path / name)["model"])


def test_plain_values_beside_the_weights(tmp_path):
    # As training scripts write them: argparse's namespace and numpy's scalars and arrays.
    others = {"args": argparse.Namespace(lr=1e-3), "best": np.float64(0.5), "order": np.arange(3)}
    torch.save({"model": WEIGHTS, **others}, tmp_path / "model.pth")
    content = read_weights(tmp_path / "model.pth")
    same(content["model"])
    assert content["args"].lr == 1e-3 and content["best"] == 0.5


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    save_file(WEIGHTS, tmp_path / "model.safetensors")
    same(read_weights(tmp_path / "model.safetensors"))


def test_zoo_pickle(tmp_path):
    arrays = {name: value.numpy() for name, value in WEIGHTS.items()}
    zoo = {"model": arrays, "__author__": "Caffe2"}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(zoo, protocol=2))
    same(read_weights(tmp_path / "model.pkl")["model"])


class Hostile:
    def __reduce__(self):
        return (open, ("hostile_was_here", "w"))


@pytest.mark.parametrize("name", ["model.pth", "model.pkl"])
def test_hostile_file_is_not_run(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    if name.endswith(".pkl"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": Hostile()}))
    else:
        torch.save({"model": WEIGHTS, "extra": Hostile()}, tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.*io\.open"):
        read_weights(tmp_path / name)
    assert not (tmp_path / "hostile_was_here").exists()


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "model.pkl"])
@pytest.mark.parametrize("kept", [0, 10, 300])
def test_truncated_file(tmp_path, name, kept):
    weights = {"weight": torch.ones(500)}
    path = tmp_path / name
    if name == "model.pkl":
        path.write_bytes(pickle.dumps({"weight": weights["weight"].numpy()}))
    elif name == "model.safetensors":
        from safetensors.torch import save_file

        save_file(weights, path)
    else:
        torch.save(weights, path)
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{name}.*(truncated|damaged)"):
        read_weights(path)


def test_other_content(tmp_path):
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="list.pth: holds a list"):
        read_weights(tmp_path / "list.pth")
    (tmp_path / "page.pth").write_text("<html>not found</html>")
    with pytest.raises(ValueError, match="page.pth .*no readable torch file"):
        read_weights(tmp_path / "page.pth")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        read_weights(tmp_path / "absent.pth")
