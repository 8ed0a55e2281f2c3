import errno
import logging
import os

import pytest
import torch
from torch import nn

from ris_d2.checkpoint import RISCheckpointer, load_init


class Encoder(nn.Module):
    """Stands for a backbone: a position table of its own size, one layer."""

    def __init__(self, positions=4):
        super().__init__()
        self.positions = nn.Embedding(positions, 2)
        self.layer = nn.Linear(2, 20)
        self.register_buffer("index", torch.arange(3))

    def fit_state_dict(self, state_dict):
        table = state_dict.get("positions.weight")
        size = len(self.positions.weight)
        if table is None or len(table) == size:
            return state_dict, []
        return {**state_dict, "positions.weight": table.mean().expand(size, 2)}, [
            "positions.weight"
        ]


class Model(nn.Module):
    weight_parts = {"beit3": "encoder"}

    def __init__(self, positions=4, frozen=False, width=10, head=None):
        super().__init__()
        self.encoder = Encoder(positions).requires_grad_(not frozen)
        self.decoder = nn.Sequential(nn.Linear(20, width), nn.BatchNorm1d(width))
        if head:
            self.head = nn.Linear(head, 1)
        self.register_buffer("pixel_mean", torch.zeros(3))


def published(seed=0, positions=4, **changes):
    torch.manual_seed(seed)
    state = Encoder(positions).state_dict()
    state = {**state, "mask_token": torch.ones(2), **changes}
    return {
        "model": {f"beit3.{name}": value for name, value in state.items() if value is not None}
        | {"mlm_head.weight": torch.ones(3)}
    }


def write(path, content):
    torch.save(content, path)
    return str(path)


def equal(a, b):
    a, b = a.state_dict(), b.state_dict()
    return all(torch.equal(a[name], b[name]) for name in b)


def test_init_fills_its_part_and_says_how(tmp_path, caplog):
    content = published(positions=7)
    path = write(tmp_path / "beit3.zip", content)
    model = Model()
    decoder = model.decoder[0].weight.clone()
    with caplog.at_level(logging.INFO, "ris_d2"):
        filled = load_init(model, [["beit3", path]])
    table = content["model"]["beit3.positions.weight"]
    assert torch.allclose(model.encoder.positions.weight, table.mean().expand(4, 2))
    assert torch.equal(model.encoder.layer.weight, content["model"]["beit3.layer.weight"])
    assert torch.equal(model.decoder[0].weight, decoder)
    assert filled == {f"encoder.{name}": ("beit3", path) for name in Encoder().state_dict()}
    assert (
        "4 used; 1 resized (positions.weight); 2 ignored (mask_token, mlm_head.weight)"
        in caplog.text
    )
    assert "0 missing; 0 of another shape" in caplog.text


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"layer.bias": None}, "leaves 1 of 4 tensors of Encoder unfilled .layer.bias."),
        ({"layer.weight": torch.ones(3, 2)}, "leaves 1 of 4 .*layer.weight.*same architecture"),
    ],
)
def test_init_that_does_not_fill_its_part_is_refused(tmp_path, changes, message):
    path = write(tmp_path / "beit3.pth", published(**changes))
    model = Model()
    before = model.encoder.layer.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_init(model, [["beit3", path]])
    assert torch.equal(model.encoder.layer.weight, before)


def test_init_errors_name_what_is_wrong(tmp_path):
    path = write(tmp_path / "other.pth", {"a": torch.ones(1)})
    with pytest.raises(ValueError, match="other.pth: not a BEiT-3 checkpoint"):
        load_init(Model(), [["beit3", path]])
    with pytest.raises(ValueError, match="unknown weight source 'resnet'"):
        load_init(Model(), [["resnet", path]])
    with pytest.raises(ValueError, match="names 'beit3', but Linear has parts for no source"):
        load_init(nn.Linear(1, 1), [["beit3", path]])
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_init(Model(), [["beit3", str(tmp_path / "absent.pth")]])


def test_init_from_a_converted_file(tmp_path):
    state = {name: value for name, value in Encoder().state_dict().items()}
    path = write(tmp_path / "converted.pth", {"model": state, "converted_from": "beit3"})
    model = Model()
    load_init(model, [["beit3", path]])
    assert equal(model.encoder, nn.ModuleDict({"e": model.encoder})["e"])
    assert torch.equal(model.encoder.layer.weight, state["layer.weight"])
    path = write(tmp_path / "swin.pth", {"model": state, "converted_from": "swin"})
    with pytest.raises(ValueError, match="converted from 'swin'"):
        load_init(model, [["beit3", path]])


def test_whole_checkpoint_returns_the_same_model(tmp_path):
    model = Model()
    RISCheckpointer(model, str(tmp_path)).save("model_0000001", iteration=1)
    other = Model()
    assert not equal(other, model)
    checkpointer = RISCheckpointer(other, str(tmp_path))
    assert checkpointer.resume_or_load("", resume=True) == {"iteration": 1}
    assert equal(other, model)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model_0000001.pth"]


def test_whole_checkpoint_needs_no_init(tmp_path):
    RISCheckpointer(Model(), str(tmp_path)).save("whole")
    model = Model()
    absent = [["beit3", str(tmp_path / "absent.pth")]]
    RISCheckpointer(model, init=absent).load(str(tmp_path / "whole.pth"))
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        RISCheckpointer(model, init=absent).load("")


def test_init_alone_and_under_a_checkpoint(tmp_path):
    content = published()
    path = write(tmp_path / "beit3.pth", content)
    model = Model()
    RISCheckpointer(model, init=[["beit3", path]]).load("")
    assert torch.equal(model.encoder.layer.weight, content["model"]["beit3.layer.weight"])

    decoder = {n: v for n, v in Model().state_dict().items() if n.startswith("decoder")}
    decoder_path = write(tmp_path / "decoder.pth", {"model": decoder})
    model = Model()
    RISCheckpointer(model, init=[["beit3", path]]).load(decoder_path)
    assert torch.equal(model.encoder.layer.weight, content["model"]["beit3.layer.weight"])
    assert torch.equal(model.decoder[0].weight, decoder["decoder.0.weight"])


def test_positions_of_another_size_are_fitted(tmp_path, caplog):
    RISCheckpointer(Model(positions=9), str(tmp_path)).save("larger")
    model = Model(positions=4)
    with caplog.at_level(logging.INFO, "ris_d2"):
        RISCheckpointer(model).load(str(tmp_path / "larger.pth"))
    assert "1 resized (encoder.positions.weight)" in caplog.text


def test_checkpoint_of_another_method_is_refused(tmp_path):
    path = write(tmp_path / "other.pth", {"model": {"backbone.weight": torch.ones(5, 5)}})
    model = Model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for checkpointables in (None, []):
        with pytest.raises(
            ValueError, match=r"other.pth fills 0.0% of Model's.*backbone.weight.*another method"
        ):
            RISCheckpointer(model).load(path, checkpointables)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_new_head_may_start_a_training_but_not_be_evaluated(tmp_path, caplog):
    RISCheckpointer(Model(), str(tmp_path)).save("old")
    path = str(tmp_path / "old.pth")
    with caplog.at_level(logging.WARNING, "ris_d2"):
        RISCheckpointer(Model(head=5)).resume_or_load(path, resume=False)
    assert "fills 2 tensors (head.bias, head.weight)" in caplog.text
    with pytest.raises(ValueError, match="100% needed"):
        RISCheckpointer(Model(head=5)).load(path)
    with pytest.raises(ValueError, match="90% needed"):
        RISCheckpointer(Model(head=500)).resume_or_load(path, resume=False)


def test_another_width_is_refused(tmp_path):
    RISCheckpointer(Model(width=11), str(tmp_path)).save("wide")
    with pytest.raises(ValueError, match="of another shape .decoder.0.bias"):
        RISCheckpointer(Model()).resume_or_load(str(tmp_path / "wide.pth"), resume=False)


def test_missing_batch_norm_statistics_are_refused(tmp_path):
    state = Model().state_dict()
    del state["decoder.1.running_mean"], state["pixel_mean"]
    path = write(tmp_path / "no_mean.pth", state)
    with pytest.raises(ValueError, match="1 missing .decoder.1.running_mean."):
        RISCheckpointer(Model()).load(path)


def test_truncated_last_checkpoint(tmp_path):
    RISCheckpointer(Model(), str(tmp_path)).save("model_0000001")
    path = tmp_path / "model_0000001.pth"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="model_0000001.pth.*truncated"):
        RISCheckpointer(Model(), str(tmp_path)).resume_or_load("", resume=True)


def test_failing_save_keeps_the_old_file(tmp_path, monkeypatch):
    checkpointer = RISCheckpointer(Model(), str(tmp_path))
    checkpointer.save("model")
    before = (tmp_path / "model.pth").read_bytes()

    def full_disk(data, file):
        file.write(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(OSError, match="no space"):
        checkpointer.save("model")
    assert (tmp_path / "model.pth").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last_checkpoint", "model.pth"]


class TestFrozenLeftOut:
    @pytest.fixture
    def source(self, tmp_path):
        return write(tmp_path / "beit3.pth", published(positions=7))

    @pytest.fixture
    def model(self, tmp_path, source):
        """Trained and saved to tmp_path/partial.pth."""
        model = Model(frozen=True)
        checkpointer = RISCheckpointer(
            model, str(tmp_path), init=[["beit3", source]], save_frozen=False
        )
        checkpointer.resume_or_load("", resume=False)
        nn.init.normal_(model.decoder[0].weight)
        checkpointer.save("partial")
        return model

    def test_file_has_the_rest_and_names_its_source(self, tmp_path, source, model):
        content = torch.load(tmp_path / "partial.pth", weights_only=True)
        assert {n for n in content["model"] if n.startswith("encoder")} == {"encoder.index"}
        assert {n for n in content["model"] if n.startswith("decoder")} == {
            f"decoder.{n}" for n in model.decoder.state_dict()
        }
        ((kind, path, digest),) = content["frozen_sources"]
        assert (kind, path) == ("beit3", source) and len(digest) == 64

    def test_resume_and_save_again(self, tmp_path, source, model):
        other = Model(frozen=True)
        checkpointer = RISCheckpointer(other, str(tmp_path), save_frozen=False)
        checkpointer.resume_or_load("", resume=True)
        assert equal(other, model)
        checkpointer.save("again")
        first, again = (
            torch.load(tmp_path / f"{name}.pth", weights_only=True) for name in ("partial", "again")
        )
        assert again["frozen_sources"] == first["frozen_sources"]
        assert again["model"].keys() == first["model"].keys()

    def test_source_that_moved_is_found_through_init(self, tmp_path, source, model):
        moved = str(tmp_path / "elsewhere.pth")
        (tmp_path / "beit3.pth").rename(moved)
        other = Model(frozen=True)
        RISCheckpointer(other, init=[["beit3", moved]]).load(str(tmp_path / "partial.pth"))
        assert equal(other, model)

    def test_source_that_is_gone_or_changed_is_refused(self, tmp_path, source, model):
        partial = str(tmp_path / "partial.pth")
        write(source, published(seed=1))
        with pytest.raises(ValueError, match=r"beit3.pth \(SHA-256 .*MODEL.INIT"):
            RISCheckpointer(Model(frozen=True)).load(partial)
        (tmp_path / "beit3.pth").unlink()
        with pytest.raises(ValueError, match=r"needs the file with SHA-256.*not found"):
            RISCheckpointer(Model(frozen=True)).load(partial)

    def test_frozen_weights_that_no_source_gives_are_kept(self, tmp_path, source):
        """Fine-tuned, then frozen: the published file is not where they come from."""
        RISCheckpointer(Model(), str(tmp_path)).save("tuned")
        model = Model(frozen=True)
        checkpointer = RISCheckpointer(
            model, str(tmp_path), init=[["beit3", source]], save_frozen=False
        )
        checkpointer.resume_or_load(str(tmp_path / "tuned.pth"), resume=False)
        checkpointer.save("second_stage")
        content = torch.load(tmp_path / "second_stage.pth", weights_only=True)
        assert "frozen_sources" not in content
        assert content["model"].keys() == model.state_dict().keys()

    def test_saving_whole_is_the_default(self, tmp_path, source):
        model = Model(frozen=True)
        checkpointer = RISCheckpointer(model, str(tmp_path), init=[["beit3", source]])
        checkpointer.load("")
        checkpointer.save("whole")
        content = torch.load(tmp_path / "whole.pth", weights_only=True)
        assert content["model"].keys() == model.state_dict().keys()


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path):
    model = Model()
    RISCheckpointer(model, str(tmp_path)).save("model_0000001")
    with torch.no_grad():
        model.decoder[1].running_var[3] = float("nan")
    for save in ("save", "save_weights"):
        with pytest.raises(FloatingPointError, match="b.pth is not written: 1 .*running_var"):
            getattr(RISCheckpointer(model, str(tmp_path)), save)("b")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert not (tmp_path / "b.pth").exists()
    path = write(tmp_path / "nan.pth", {"model": model.state_dict()})
    intact = Model()
    before = {name: value.clone() for name, value in intact.state_dict().items()}
    with pytest.raises(
        ValueError, match="nan.pth holds infinite numbers or NaN in 1 .*running_var"
    ):
        RISCheckpointer(intact).load(path)
    assert all(torch.equal(value, before[name]) for name, value in intact.state_dict().items())
    content = published()
    content["model"]["beit3.layer.weight"][0, 0] = float("inf")
    path = write(tmp_path / "beit3.pth", content)
    with pytest.raises(ValueError, match="beit3.pth holds infinite numbers"):
        load_init(intact, [["beit3", path]])


def test_a_full_disk_is_called_so_and_costs_nothing(tmp_path, monkeypatch):
    checkpointer = RISCheckpointer(Model(), str(tmp_path))
    checkpointer.save("model_0000001")
    before = (tmp_path / "model_0000001.pth").read_bytes()

    class Full:
        """A file on a disk that has room for 1,000 bytes."""

        def __init__(self, file):
            self.file, self.left = file, 1000

        def __getattr__(self, name):
            return getattr(self.file, name)

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self.file.write(data)

    save = torch.save
    monkeypatch.setattr(torch, "save", lambda data, file: save(data, Full(file)))
    for name in ("model_0000001", "model_0000002"):
        with pytest.raises(OSError, match=f"No space left on device: .*{name}.pth"):
            checkpointer.save(name)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "last_checkpoint",
        "model_0000001.pth",
    ]
    assert (tmp_path / "model_0000001.pth").read_bytes() == before
