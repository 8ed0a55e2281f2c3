"""tools/attention/main.py: its pictures and measures follow from what the models look at."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from attention import drawing, looking
from attention.explanation import Explanation
from PIL import Image

from ris_d2 import load_config, refshapes
from ris_d2.data.catalog import register_all

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture
def attention(load_tool):
    return load_tool("attention/main")


@pytest.fixture
def shapes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_all()
    refshapes.write(str(tmp_path / "refshapes"), {"train": 1, "val": 6}, refshapes.Options())


def test_auc(attention):
    target = np.array([[True, True], [False, False]])
    values = np.array([[3.0, 2.0], [1.0, 2.0]])
    assert attention.auc(values, target) == (1 + 1 + 1 + 0.5) / 4
    assert attention.auc(-values, target) == 0.125
    assert attention.auc(np.ones((2, 2)), target) == 0.5
    assert np.isnan(attention.auc(values, np.ones((2, 2), bool)))


def test_two_models_side_by_side(attention, tiny_config, shapes, tmp_path, capsys):
    output = tmp_path / "out"
    report = attention.main(
        ["--model", "A", tiny_config, "", "--model", "B", tiny_config, ""]
        + ["--dataset", "ris_refshapes_val", "--images", "3", "--draw", "2"]
        + ["--output", str(output)]
    )
    assert json.loads((output / "attention.json").read_text()) == report
    assert set(report) == {"A", "B"} and report["A"]["sentences"] >= 3
    assert set(report["A"]["auc"]) == {"encoder", "FPN", "decoder"}
    assert all(0 < value < 100 for value in report["A"]["auc"].values())
    assert set(report["A"]["cosine"]) == {"on target", "off target"}
    (entropy,) = report["A"]["entropy"].values()
    assert 0 < entropy < np.log(1 + 16 + 20)
    assert len(report["A"]["drawn"]) == 2 and report["A"]["drawn"][0]["tokens"][0] == "<s>"
    names = {path.name for path in output.iterdir()}
    assert names == {"maps.png", "attention.json"}
    # Text, target, and mask and three maps of each model.
    assert Image.open(output / "maps.png").width == 12 + (1 + 1 + 2 * 4) * (160 + 12)
    assert "decoder 1" in capsys.readouterr().out


def test_visual_and_linguistic_expression_side_by_side(attention, shapes, tmp_path):
    visual = str(REPOSITORY / "configs" / "instant_test" / "vipa.yaml")
    language = tmp_path / "advanced_le.yaml"
    language.write_text(f"_BASE_: {visual}\nMODEL: {{VIPA: {{KEY_VALUES: language}}}}\n")
    output = tmp_path / "out"
    report = attention.main(
        ["--model", "VE", visual, "", "--model", "Advanced LE", str(language), ""]
        + ["--dataset", "ris_refshapes_val", "--images", "3", "--draw", "2"]
        + ["--output", str(output), "MODEL.DEVICE", "cpu"]
    )
    stages = {f"decoder {i}" for i in (4, 3, 2, 1)}
    assert set(report["Advanced LE"]["auc"]) == stages
    assert set(report["VE"]["auc"]) == stages | {"relevance", "retrieved"}
    for figures in report.values():
        assert set(figures["entropy"]) == stages
        assert all(0 < value <= np.log(16) for value in figures["entropy"].values())
        assert set(figures["cosine"]) == {"on target", "off target"}
    assert report["VE"]["drawn"][0]["tokens"] == report["Advanced LE"]["drawn"][0]["tokens"]
    names = {path.name for path in output.iterdir()}
    assert names == {"maps.png", "words_0.png", "words_1.png", "attention.json"}


def test_models_without_maps_show_their_masks(attention, shapes, tmp_path, capsys):
    """RISAM's Figs. 2 and 6: among others SAM's mask decoder, and convolutions as fusion."""
    base = REPOSITORY / "configs" / "instant_test" / "risam.yaml"
    models = []
    for name in ("ma", "conv"):
        (tmp_path / f"{name}.yaml").write_text(
            f"_BASE_: {base}\nMODEL: {{RISAM: {{FUSION: {name}}}}}\n"
        )
        models += ["--model", name, str(tmp_path / f"{name}.yaml"), ""]
    report = attention.main(
        [*models, "--dataset", "ris_refshapes_val", "--images", "2", "--draw", "2"]
        + ["--output", str(tmp_path / "out"), "MODEL.DEVICE", "cpu"]
    )
    assert set(report["ma"]["auc"]) == {"vision-guided", "language-guided"}
    assert "auc" not in report["conv"] and report["conv"]["sentences"] > 0
    # Text, target; mask and two maps; mask.
    picture = Image.open(tmp_path / "out" / "maps.png")
    assert picture.width == 12 + (1 + 1 + 3 + 1) * (160 + 12)


def test_tsne_has_a_picture_per_sentence(attention, tiny_config, shapes, tmp_path):
    pytest.importorskip("sklearn")
    attention.main(
        ["--model", "A", tiny_config, "", "--model", "B", tiny_config, ""]
        + ["--dataset", "ris_refshapes_val", "--images", "2", "--draw", "2", "--tsne"]
        + ["--output", str(tmp_path / "out")]
    )
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"maps.png", "tsne_0.png", "tsne_1.png", "attention.json"}


class Looks:
    """In place of Predictor's model: looks at the left half, each word at a column of its own."""

    input_size = (64, 64)
    trims_text = False

    def __call__(self, batched_inputs):
        (inputs,) = batched_inputs
        mask = torch.zeros(inputs["height"], inputs["width"], dtype=torch.bool)
        return [{"referring": [{"mask": mask} for _ in inputs["expressions"]]}]

    @staticmethod
    def explanations(model, batched_inputs):
        (inputs,) = batched_inputs
        count, length = inputs["input_ids"].shape
        left = torch.tensor([1.0, 1.0, 0.0, 0.0]).expand(count, 4, 4)
        words = torch.eye(length, 4)[None, :, None].expand(count, length, 4, 4)
        return [
            Explanation(
                maps={"left": left, "words": words},
                entropy={"decoder": torch.arange(count).float()},
                pixels=left[..., None] * torch.tensor([1.0, 0.0]),
                tokens=torch.tensor([[1.0, 0.0]]).expand(count, length, 2),
                attended=inputs["text_mask"].float(),
            )
        ]


def test_maps_lie_where_the_model_looked(attention, tiny_config, tmp_path, monkeypatch):
    observer = attention.Observer(load_config(tiny_config, ["INPUT.RIS.GEOMETRY", "letterbox"]))
    observer.predictor.model = Looks()
    monkeypatch.setattr(looking, "explanations", Looks.explanations)
    # 64 x 32 of the 64 x 64 letterbox: the upper and lower quarter are not of the image.
    image = np.full((32, 64, 3), 200, np.uint8)
    target = np.zeros((32, 64), bool)
    target[:, :32] = True
    sample = attention.Sample(image=image, texts=["a circle", "all"], targets=[target, None])
    first, second = observer.look(sample)
    assert {name: tuple(m.shape) for name, m in first.maps.items()} == {
        "left": (32, 64),
        "words": (4, 32, 64),  # <s> a circle </s>
    }
    assert first.tokens == ["<s>", "a", "circle", "</s>"] or len(first.tokens) == 4
    assert attention.auc(first.maps["left"].numpy(), target) == 1
    assert first.maps["words"].mean((1, 2)).tolist() == pytest.approx([0.25] * 4, abs=0.01)
    assert first.on_target.reshape(4, 4).tolist() == [[False] * 4] + [
        [True, True, False, False]
    ] * 2 + [[False] * 4]
    assert second.on_target is None
    measures = attention.Measures()
    measures.add(first, target)
    measures.add(second, None)
    assert measures.sentences == 2
    means = measures.means()
    assert means["entropy"] == {"decoder": 0.5}
    assert means["auc"]["left"] == 100
    assert means["cosine"]["on target"] == 1
    # Off target lie the rest of the left half, outside the image, and the right half.
    assert means["cosine"]["off target"] == pytest.approx(4 / 12)
    small = np.zeros((32, 64), bool)
    small[1, 40] = True
    (looked,) = observer.look(attention.Sample(image=image, texts=["all"], targets=[small]))
    assert np.flatnonzero(looked.on_target).tolist() == [6]
    assert len(first.embeddings) == 4  # without the padding
    attention.draw_words(str(tmp_path / "words.png"), sample, 0, {"looks": first})
    assert Image.open(tmp_path / "words.png").width == 12 + 5 * (120 + 12)
    seen = {}

    def region_words(image, box, words, weights):
        seen.update(box=box, words=words, weights=weights.tolist())
        return np.zeros((9, 9, 3), np.uint8)

    monkeypatch.setattr(drawing, "region_words", region_words)
    attention.draw_region(str(tmp_path / "region.png"), sample, 0, {"looks": first}, (8, 16))
    assert seen["box"] == (6, 14, 10, 18) and seen["words"] == first.tokens
    assert seen["weights"] == pytest.approx([1, 0, 0, 0], abs=0.05)  # the first of four columns
    assert (tmp_path / "region.png").is_file()


def test_an_image_of_ones_own(attention, tiny_config, tmp_path):
    path = tmp_path / "photo.png"
    Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(path)
    report = attention.main(
        ["--model", "A", tiny_config, "", "--image", str(path), "--output", str(tmp_path / "out")]
        + ["--text", "the red circle", "--text", "blue squares"]
    )
    assert report["A"]["sentences"] == 2 and "auc" not in report["A"]
    assert Image.open(tmp_path / "out" / "maps.png").height > 2 * 100


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "either --dataset, or --image and --text"),
        (["--image", "a.png"], "either --dataset, or --image and --text"),
        (["--dataset", "d", "--model", "A", "c", ""], "a name of its own"),
        (["--dataset", "d", "--point", "1", "1"], "--point is a pixel of the --image"),
    ],
)
def test_arguments_that_say_too_little(arguments, message, attention, capsys):
    with pytest.raises(SystemExit):
        attention.main(["--model", "A", "c.yaml", "", "--output", "out", *arguments])
    assert message in capsys.readouterr().err
