import pytest
from detectron2.utils.file_io import PathManager

import ris_d2.checkpoint  # noqa: F401  (registers the handlers)
from ris_d2.checkpoint.paths import local_path, register_path_handlers


@pytest.fixture
def downloads(monkeypatch, tmp_path):
    """What the hub was asked for; every file exists there and holds its own address."""
    import huggingface_hub

    asked = []

    def download(repo_id, filename, revision=None, force_download=False):
        asked.append((repo_id, filename, revision))
        path = tmp_path / "cached"
        path.write_text(f"{repo_id} {filename}")
        return str(path)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hugging_face_path(downloads):
    path = local_path("hf://org/repo/folder/model.pth")
    assert open(path).read() == "org/repo folder/model.pth"
    local_path("hf://org/repo@v1.0/model.pth")
    assert downloads == [
        ("org/repo", "folder/model.pth", None),
        ("org/repo", "model.pth", "v1.0"),
    ]


def test_opens_through_detectron2(downloads):
    register_path_handlers()  # a second time
    with PathManager.open("hf://org/repo/a.txt") as file:
        assert file.read() == "org/repo a.txt"
    with pytest.raises(ValueError, match="only be read"):
        PathManager.open("hf://org/repo/a.txt", "w")


@pytest.mark.parametrize("path", ["hf://repo/model.pth", "hf://org/repo", "hf://org//model.pth"])
def test_incomplete_hugging_face_path(path, downloads):
    with pytest.raises(ValueError, match="hf://organisation/repository"):
        local_path(path)
    assert not downloads


def test_timm_path(downloads):
    local_path("timm://beit3_base_patch16_224.in22k_ft_in1k")
    assert downloads == [("timm/beit3_base_patch16_224.in22k_ft_in1k", "model.safetensors", None)]


@pytest.mark.parametrize("name", ["no_such_model", "vit_base_patch16_224.no_such_tag"])
def test_unknown_timm_weights(name, downloads):
    with pytest.raises(ValueError, match=name.split(".")[-1]):
        local_path(f"timm://{name}")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.pth: no such weight file"):
        local_path(str(tmp_path / "absent.pth"))
