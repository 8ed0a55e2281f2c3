"""Predictor: what it accepts, what it refuses, and that it says what the model says."""

import functools
import json
import os
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from ris_d2 import example, get_ris_cfg, load_config
from ris_d2.predictor import Predictor, load_rgb
from ris_d2.refshapes import write_tokenizer


@META_ARCH_REGISTRY.register()
class BrightestChannel(nn.Module):
    """A model that keeps the contract: the mask is where the input is brighter than its threshold."""

    def __init__(self, cfg):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(250.0))
        self.calls = 0

    def forward(self, batched_inputs):
        assert not self.training and not torch.is_grad_enabled()
        self.calls += 1
        return [{"referring": self._results(inputs)} for inputs in batched_inputs]

    def _results(self, inputs):
        size = (inputs["height"], inputs["width"])
        bright = inputs["image"].to(self.threshold.device).float().amax(0, keepdim=True)[None]
        mask = nn.functional.interpolate(bright, size=size)[0, 0] > self.threshold
        lengths = inputs["text_mask"].sum(1).tolist()
        return [
            {
                "expression_id": e["expression_id"],
                "mask": mask & (length > 0),
                "score": length / 10,
                "no_target": not bool(mask.any()),
                "instances": None,
            }
            for e, length in zip(inputs["expressions"], lengths)
        ]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "tokenizer"
    write_tokenizer(str(path))
    return str(path)


@pytest.fixture
def cfg(tokenizer, device):
    cfg = get_ris_cfg()
    cfg.MODEL.DEVICE = device
    cfg.MODEL.META_ARCHITECTURE = "BrightestChannel"
    cfg.MODEL.WEIGHTS = ""
    cfg.INPUT.RIS.SIZE = (32, 32)
    cfg.INPUT.RIS.TOKENIZER.KIND = "hf"
    cfg.INPUT.RIS.TOKENIZER.PATH = tokenizer
    return cfg


@pytest.fixture
def picture():
    """48 rows, 64 columns, black with a red box whose mask the toy model finds."""
    picture = np.zeros((48, 64, 3), dtype=np.uint8)
    picture[12:24, 32:56] = (255, 0, 0)
    return picture


def test_results_are_one_per_sentence_at_the_images_size_on_the_cpu(cfg, picture):
    predictor = Predictor(cfg)
    results = predictor(picture, ["the red square", "the big red square on the left side"])
    assert predictor.model.calls == 1, "the image is encoded once for all sentences"
    assert [r["expression_id"] for r in results] == [0, 1]
    for result in results:
        assert result["mask"].dtype == torch.bool and result["mask"].device.type == "cpu"
        assert result["mask"].shape == (48, 64)
        assert not result["mask"].requires_grad
        assert not result["no_target"]
        mask = result["mask"].numpy()
        assert mask[14:22, 34:54].all() and not mask[:10].any() and not mask[:, :30].any()
    assert results[0]["score"] < results[1]["score"], "each sentence meets its own tokens"


def test_one_sentence_may_be_a_plain_string(cfg, picture):
    predictor = Predictor(cfg)
    one, listed = predictor(picture, "red square"), predictor(picture, ["red square"])
    assert len(one) == 1 and one[0]["score"] == listed[0]["score"]
    assert torch.equal(one[0]["mask"], listed[0]["mask"])


def test_the_evaluation_resolution_is_ignored_and_the_callers_cfg_untouched(cfg, picture):
    cfg.TEST.RESOLUTION = (20, 20)
    cfg.freeze()
    assert Predictor(cfg)(picture, "red square")[0]["mask"].shape == (48, 64)
    assert tuple(cfg.TEST.RESOLUTION) == (20, 20) and cfg.is_frozen()


def test_weights_are_loaded(cfg, picture, tmp_path):
    torch.save({"model": {"threshold": torch.tensor(256.0)}}, tmp_path / "model.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "model.pth")
    result = Predictor(cfg)(picture, "red square")[0]
    assert result["no_target"] and not result["mask"].any()


def test_weights_of_another_model_and_missing_weights_are_refused(cfg, tmp_path):
    torch.save({"model": {"encoder.weight": torch.zeros(3)}}, tmp_path / "other.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "other.pth")
    with pytest.raises(ValueError, match="other.pth"):
        Predictor(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        Predictor(cfg)


@pytest.mark.parametrize(
    "sentences, message",
    [
        ([], "at least one"),
        ("", "sentence 0 is empty"),
        (["red square", "  "], "sentence 1 is empty"),
        (["red square", 3], "sentence 1 must be a str"),
        (None, "sentences"),
    ],
)
def test_bad_sentences_are_refused(cfg, picture, sentences, message):
    with pytest.raises(ValueError, match=message):
        Predictor(cfg)(picture, sentences)


def test_path_pil_and_array_give_the_same_mask(cfg, picture, tmp_path):
    path = tmp_path / "picture.png"
    Image.fromarray(picture).save(path)
    predictor = Predictor(cfg)
    masks = [
        predictor(image, "red square")[0]["mask"]
        for image in (path, str(path), Image.open(path), picture)
    ]
    assert masks[0].any()
    assert all(torch.equal(masks[0], mask) for mask in masks[1:])


def test_shared_ris_answers_as_in_evaluation(tokenizer, tmp_path, device):
    """The real method through the real mapper: the same masks as a test loader's input gives."""
    from ris_d2.data.mapper import ReferringMapper

    cfg = get_ris_cfg()
    cfg.MODEL.DEVICE = device
    cfg.MODEL.META_ARCHITECTURE = "SharedRIS"
    cfg.MODEL.PIXEL_MEAN = cfg.MODEL.PIXEL_STD = [127.5] * 3
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RIS.BEIT3.EMBED_DIM, cfg.MODEL.RIS.BEIT3.DEPTH = 32, 2
    cfg.MODEL.RIS.BEIT3.NUM_HEADS, cfg.MODEL.RIS.BEIT3.VOCAB_SIZE = 2, 300
    cfg.MODEL.SHARED_RIS.DIM, cfg.MODEL.SHARED_RIS.NUM_HEADS = 32, 2
    cfg.MODEL.SHARED_RIS.STAGES = (1, 2)
    cfg.INPUT.RIS.SIZE = (64, 64)
    cfg.INPUT.RIS.TOKENIZER.KIND = "hf"
    cfg.INPUT.RIS.TOKENIZER.PATH = tokenizer
    cfg.TEST.MAX_EXPRESSIONS = 2  # fewer than the sentences
    torch.manual_seed(0)
    predictor = Predictor(cfg)
    pixels = np.random.default_rng(0).integers(256, size=(50, 70, 3), dtype=np.uint8)
    path = str(tmp_path / "noise.jpg")
    Image.fromarray(pixels).save(path)
    texts = ["the red circle", "the big blue square", "small shapes"]
    results = predictor(path, texts)

    record = {
        "file_name": path,
        "image_id": 1,
        "height": 50,
        "width": 70,
        "source": "test",
        "annotations": [],
        "expressions": [
            {"expression_id": i, "ref_id": i, "text": text, "annotation_ids": []}
            for i, text in enumerate(texts)
        ],
    }
    expected = predictor.model([ReferringMapper(cfg, is_train=False)(record)])[0]["referring"]
    assert len(results) == 3
    for result, other in zip(results, expected):
        assert result["mask"].shape == (50, 70)
        assert (result["mask"] != other["mask"].cpu()).float().mean() < 0.02  # two jpeg decoders
        assert result["score"] == pytest.approx(other["score"], abs=0.02)


# load_rgb: every form becomes the same upright RGB array.


@pytest.fixture
def rgb():
    return np.random.default_rng(1).integers(256, size=(6, 9, 3), dtype=np.uint8)


def test_grey_becomes_three_equal_channels(rgb, tmp_path):
    grey = rgb[..., 0]
    expected = np.stack([grey] * 3, axis=2)
    assert (load_rgb(grey) == expected).all()
    assert (load_rgb(grey[..., None]) == expected).all()
    Image.fromarray(grey).save(tmp_path / "grey.png")
    assert (load_rgb(tmp_path / "grey.png") == expected).all()


def test_transparency_is_composited_on_white(rgb, tmp_path):
    rgba = np.dstack([rgb, np.full((6, 9), 255, dtype=np.uint8)])
    rgba[0, 0] = (10, 20, 30, 0)
    rgba[0, 1] = (0, 100, 200, 51)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    for image in (rgba, Image.fromarray(rgba), tmp_path / "rgba.png"):
        loaded = load_rgb(image)
        assert loaded.shape == (6, 9, 3)
        assert loaded[0, 0].tolist() == [255, 255, 255]
        assert loaded[0, 1].tolist() == [204, 224, 244]
        assert (loaded[1:] == rgb[1:]).all()


def test_palette_with_a_transparent_colour(tmp_path):
    image = Image.new("P", (4, 4), 0)
    image.putpalette([10, 20, 30, 200, 0, 0])
    image.putpixel((1, 1), 1)
    image.save(tmp_path / "palette.png", transparency=0)
    loaded = load_rgb(tmp_path / "palette.png")
    assert loaded[0, 0].tolist() == [255, 255, 255] and loaded[1, 1].tolist() == [200, 0, 0]


def test_sixteen_bit_grey_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "deep.png")
    assert load_rgb(tmp_path / "deep.png")[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(rgb, tmp_path, orientation):
    """The stored pixels are the upright picture under the inverse of each EXIF orientation."""
    stored = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }[orientation](rgb)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(np.ascontiguousarray(stored)).save(path, exif=exif)
    assert (load_rgb(path) == rgb).all()


def test_cmyk_jpeg_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "print.jpg")
    red, green, blue = load_rgb(tmp_path / "print.jpg")[4, 4].tolist()
    assert red > 200 and green < 60 and blue < 60


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4, 3), dtype=np.float32), "float32"),
        (np.zeros((4, 4, 3), dtype=np.uint16), "uint16"),
        (np.zeros((4, 4, 2), dtype=np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((3, 4, 4), dtype=np.uint8)[None], r"\(1, 3, 4, 4\)"),
        (np.zeros((0, 4, 3), dtype=np.uint8), r"\(0, 4, 3\)"),
        (np.zeros(5, dtype=np.uint8), r"\(5,\)"),
        ([[0, 0]], "list"),
        (Image.new("F", (4, 4)), "'F'"),
    ],
)
def test_other_arrays_are_refused(image, message):
    with pytest.raises(ValueError, match=message):
        load_rgb(image)


def test_unreadable_files_are_refused(rgb, tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.jpg"):
        load_rgb(tmp_path / "absent.jpg")
    with pytest.raises(FileNotFoundError):
        load_rgb(tmp_path)
    (tmp_path / "text.jpg").write_text("not a picture")
    with pytest.raises(ValueError, match="text.jpg"):
        load_rgb(tmp_path / "text.jpg")
    Image.fromarray(np.tile(rgb, (20, 20, 1))).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cut.jpg"):
        load_rgb(tmp_path / "cut.jpg")


# What a trained model adds: sessions, batches, thresholds, exports.


@pytest.fixture(scope="module")
def trained():
    return Predictor.from_pretrained("example")


@pytest.fixture
def count_encodings(monkeypatch):
    def count(model):
        calls, encode_images = [], model.encode_images
        monkeypatch.setattr(
            model, "encode_images", lambda *inputs: calls.append(1) or encode_images(*inputs)
        )
        return calls

    return count


def assert_same(results, expected):
    assert len(results) == len(expected) > 0
    for result, other in zip(results, expected):
        assert torch.equal(result["mask"], other["mask"]) and result["box"] == other["box"]
        assert result["score"] == pytest.approx(other["score"], abs=1e-5)
        assert result["no_target"] == other["no_target"] and result["text"] == other["text"]
        if "probabilities" in other:
            assert torch.allclose(result["probabilities"], other["probabilities"], atol=1e-5)


@pytest.mark.parametrize("method", ["deris", "risam", "vipa", "asda", "shared_ris"])
def test_a_session_encodes_its_image_once_and_answers_as_single_calls(
    method, tokenizer, count_encodings
):
    path = ["INPUT.RIS.TOKENIZER.PATH", tokenizer, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
    recipe = Path(__file__).parents[1] / "configs" / "instant_test" / f"{method}.yaml"
    torch.manual_seed(0)
    predictor = Predictor(load_config(str(recipe), path))
    # Between the scores of the untrained queries, so that some of them make up a mask.
    threshold = {"score_threshold": 0.18} if method == "deris" else {"mask_threshold": 0.45}
    settings = {"probabilities": True, **threshold}
    sentences = ["the red circle", "small shapes", "the big blue square on the left side"]
    expected = [predictor(example.SCENE, sentence, **settings)[0] for sentence in sentences]
    assert any(result["probabilities"].any() for result in expected)
    calls = count_encodings(predictor.model)
    session = predictor.set_image(example.SCENE)
    answers = [*session(sentences[:2], **settings), *session(sentences[2], **settings)]
    assert len(calls) == 1
    assert_same(answers, expected)


def test_a_batch_answers_as_single_calls(trained, picture):
    sentences = [list(example.SENTENCES), "the red square"]
    batch = trained.batch([example.SCENE, picture], sentences)
    for results, image, own in zip(batch, [example.SCENE, picture], sentences):
        assert_same(results, trained(image, own))
    assert batch[1][0]["mask"].shape == (48, 64)
    with pytest.raises(ValueError, match="2 images and 1 lists of sentences"):
        trained.batch([example.SCENE, picture], ["the red square"])


def test_thresholds_hold_for_one_call(trained):
    session = trained.set_image(example.SCENE)
    usual = session(example.SENTENCES)
    assert [r["no_target"] for r in usual] == [False, False, True]
    wide = session(example.SENTENCES, mask_threshold=0.1)
    narrow = session(example.SENTENCES, mask_threshold=0.9)
    for a, b, c in zip(narrow[:2], usual, wide):
        assert 0 < a["mask"].sum() < b["mask"].sum() < c["mask"].sum()
        assert (c["mask"] | ~b["mask"]).all() and (b["mask"] | ~a["mask"]).all()
    always = session(example.SENTENCES, existence_threshold=0.0)
    assert not any(r["no_target"] for r in always)
    assert all(r["no_target"] and r["box"] is None for r in session("a", existence_threshold=1.0))
    assert_same(session(example.SENTENCES), usual)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"score_threshold": 0.5}, "score_threshold: the thresholds of this model are mask_thresh"),
        ({"mask_threshold": 1.5}, "mask_threshold is 1.5"),
        ({"existence_threshold": float("nan")}, "existence_threshold is nan"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(trained, settings, message):
    with pytest.raises(ValueError, match=message):
        trained(example.SCENE, "the circle", **settings)
    with pytest.raises(ValueError, match=message):
        trained.set_image(example.SCENE)("the circle", **settings)


def test_probabilities_are_what_the_masks_are_cut_from(trained):
    for result in trained(example.SCENE, example.SENTENCES, probabilities=True):
        probabilities = result["probabilities"]
        assert probabilities.shape == result["mask"].shape and probabilities.dtype == torch.float32
        if not result["no_target"]:
            assert torch.equal(probabilities > 0.5, result["mask"])
    assert "probabilities" not in trained(example.SCENE, "the circle")[0]


def test_coco_annotations_are_read_by_pycocotools(trained):
    results = trained(example.SCENE, example.SENTENCES)
    annotations = json.loads(json.dumps(results.to_coco(image_id=7, first_id=30)))
    assert [a["id"] for a in annotations] == [30, 31] and annotations[1]["image_id"] == 7
    for annotation, result in zip(annotations, results):
        assert (coco_mask.decode(annotation["segmentation"]) == result["mask"].numpy()).all()
        assert annotation["bbox"] == coco_mask.toBbox(annotation["segmentation"]).tolist()
        assert annotation["area"] == coco_mask.area(annotation["segmentation"])
        assert annotation["text"] == result["text"] and annotation["iscrowd"] == 0


def test_supervision_detections(trained, monkeypatch):
    results = trained(example.SCENE, example.SENTENCES)
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(ImportError, match="pip install supervision"):
        results.to_supervision()
    given = {}
    stand_in = types.SimpleNamespace(Detections=lambda **fields: given.update(fields))
    monkeypatch.setitem(sys.modules, "supervision", stand_in)
    results.to_supervision()
    assert given["mask"].shape == (2, *results[0]["mask"].shape) and given["mask"].dtype == bool
    assert given["xyxy"].tolist() == [r["box"] for r in results[:2]]
    assert given["class_id"].tolist() == [0, 1]
    assert given["data"]["class_name"].tolist() == list(example.SENTENCES[:2])


def test_four_threads_may_ask_one_predictor(trained):
    sentences = [[s] * n for n in (1, 2, 3) for s in (*example.SENTENCES, "the little red shapes")]
    expected = [trained(example.SCENE, s, probabilities=True) for s in sentences]
    session = trained.set_image(example.SCENE)

    def answer(i):
        ask = session if i % 2 else functools.partial(trained, example.SCENE)
        return ask(sentences[i % len(sentences)], probabilities=True)

    with ThreadPoolExecutor(4) as threads:
        for i, results in enumerate(threads.map(answer, range(4 * len(sentences)))):
            assert_same(results, expected[i % len(sentences)])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_as_it_is(trained):
    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    session = trained.set_image(example.SCENE)
    for _ in range(30):
        session(example.SENTENCES)
    before = resident()
    for _ in range(60):
        session(example.SENTENCES)
    assert resident() - before < 8e6
