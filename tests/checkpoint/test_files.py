import argparse
import io
import json
import pickle
import struct
import subprocess
import sys
import zipfile
from collections import OrderedDict

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


@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch.jit's farewell
def test_a_torchscript_archive_is_refused_with_the_file_to_use_instead(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "ViT-B-16.pt"))
    advice = "ViT-B-16.pt: a TorchScript archive .*hf://openai/clip-vit-base-patch16/pytorch_model"
    with pytest.raises(ValueError, match=advice):
        read_weights(tmp_path / "ViT-B-16.pt")


def test_a_flipped_bit_is_noticed(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"model": WEIGHTS, "iteration": 3}, path)
    data = bytearray(path.read_bytes())
    data[data.index(WEIGHTS["a.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(data)
    torch.load(path, weights_only=True)  # which says nothing
    with pytest.raises(ValueError, match=r"model\.pth: entry model/data/0 is damaged .*CRC-32"):
        read_weights(path)


def test_a_file_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "model.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    same(read_weights(tmp_path / "model.pth"))


def test_old_format_without_archive(tmp_path):
    torch.save(WEIGHTS, tmp_path / "model.pth", _use_new_zipfile_serialization=False)
    same(read_weights(tmp_path / "model.pth"))


def test_tied_and_expanded_weights(tmp_path):
    tied = {"a": torch.rand(1000), "ids": torch.zeros(1, 1).expand(1, 512)}
    tied["b"] = tied["c"] = tied["a"]
    torch.save(tied, tmp_path / "model.pth")
    same(read_weights(tmp_path / "model.pth"), tied)


def archive(path, *, numel=3, size=(3,), stride=(1,), compressed=False, content=bytes(12)):
    """A .pth as torch.save writes it, with anything that it says of its one tensor."""

    class Storage:
        pass

    class Pickler(pickle._Pickler):
        def persistent_id(self, value):
            is_storage = isinstance(value, Storage)
            return ("storage", torch.FloatStorage, "0", "cpu", numel) if is_storage else None

    class Tensor:
        def __reduce__(self):
            arguments = (Storage(), 0, size, stride, False, OrderedDict())
            return torch._utils._rebuild_tensor_v2, arguments

    data = io.BytesIO()
    Pickler(data, protocol=2).dump({"a": Tensor()})
    method = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", method) as file:
        entries = {"data.pkl": data.getvalue(), "byteorder": b"little", "data/0": content}
        for name, value in {**entries, "version": b"3\n"}.items():
            file.writestr(f"model/{name}", value)


def safetensors(path, shape, offsets):
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))


class Once:
    """A pickle of one dict that is named twice at each of 60 depths."""

    def __reduce__(self):
        value = {"x": 1}
        for _ in range(60):
            value = {"a": value, "b": value}
        return OrderedDict, (value,)


def write_bombs(folder):
    archive(folder / "numbers.pth", numel=2**40, size=(2**40,))
    archive(folder / "size.pth", size=(2**32,))
    archive(folder / "views.pth", size=(2**20, 2**20), stride=(0, 0))
    archive(folder / "negative.pth", size=(-3,))
    zeros = bytes(2**28)
    archive(folder / "zip.pth", numel=2**26, size=(2**26,), compressed=True, content=zeros)
    torch.save({"a": torch.zeros(3)}, folder / "old.pth", _use_new_zipfile_serialization=False)
    data = (folder / "old.pth").read_bytes()
    old, new = b"cpuq\x06K\x03", b"cpuq\x06\x8a\x06" + struct.pack("<q", 2**42)[:6]
    assert old in data
    (folder / "old.pth").write_bytes(data.replace(old, new))
    (folder / "header.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    (folder / "nested.safetensors").write_bytes(
        struct.pack("<Q", 10**6) + (b"[" * 10**6) + bytes(12)
    )
    safetensors(folder / "huge.safetensors", [2**40], [0, 2**42])
    safetensors(folder / "shape.safetensors", [2**40], [0, 12])
    safetensors(folder / "offsets.safetensors", [3], [12, 0])
    looped: dict = {}
    looped["model"] = looped
    (folder / "looped.pkl").write_bytes(pickle.dumps(looped))
    return sorted(path.name for path in folder.iterdir())


def test_bombs_are_refused_under_a_memory_cap(tmp_path):
    names = write_bombs(tmp_path)
    script = """
import resource, sys
from ris_d2.checkpoint import read_weights
now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + 2**27, now + 2**27))
for name in sys.argv[1:]:
    try:
        read_weights(name)
    except ValueError as error:
        print(str(error).splitlines()[0])
"""
    result = subprocess.run(
        [sys.executable, "-c", script, *names], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.partition(":")[0].partition(" ")[0] for line in lines] == names


def test_what_is_named_again_at_every_depth_is_read_once(tmp_path):
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(Once()))
    assert read_weights(path)["a"]["b"]["a"] is not None


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.ones(3, device="meta")])
def test_tensors_that_are_no_weights_are_refused(tmp_path, tensor):
    torch.save({"model": {"a": tensor}}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth: .*dense"):
        read_weights(tmp_path / "model.pth")


def test_arrays_in_a_checkpoint_are_numbers_too(tmp_path):
    torch.save({"model": WEIGHTS, "names": np.array(["a"])}, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"model\.pth.*numpy's dtype 'U1'"):
        read_weights(tmp_path / "model.pth")
    order = np.arange(6, dtype=">i2").reshape(2, 3)
    torch.save({"model": WEIGHTS, "order": order}, tmp_path / "model.pth")
    np.testing.assert_array_equal(read_weights(tmp_path / "model.pth")["order"], order)
