import copy
import logging
from collections import Counter

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from PIL import Image

from ris_d2 import get_ris_cfg
from ris_d2.data import mapper as mapper_module
from ris_d2.data.augmentations import (
    Affine,
    Place,
    RandomAffine,
    RandomFlip,
    RandomHSV,
    resize_image,
)
from ris_d2.data.images import read_image
from ris_d2.data.mapper import ReferringMapper, swap_left_right
from ris_d2.masks import encode, rasterize, resize_nearest

AFFINE = {"rotation": 5.0, "scale": 0.1, "translation": 0.1, "shear": 2.0}


class FixedDraws:
    """An rng whose every random() is the value given."""

    def __init__(self, value):
        self.value = value

    def random(self):
        return self.value

    def uniform(self, low, high, size=None):
        return np.full(size, high) if size else high


def rgb(record):
    return cv2.imread(record["file_name"])[..., ::-1]


def image_of(mapped):
    return mapped["image"].permute(1, 2, 0).numpy()


def test_test_input(make_record, tokenizer, make_mapper):
    record = make_record()
    before = copy.deepcopy(record)
    mapped = make_mapper(is_train=False, size=(10, 20))(record)
    assert mapped["image"].dtype == torch.uint8 and mapped["image"].shape == (3, 10, 20)
    expected = cv2.resize(rgb(record), (20, 10), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(image_of(mapped), expected)
    assert mapped["views"] == {}
    assert mapped["content_box"] == (0.0, 0.0, 20.0, 10.0)
    assert (mapped["height"], mapped["width"]) == (12, 16)
    for key in ("image_id", "file_name", "source", "annotations", "expressions"):
        assert mapped[key] == record[key]
    ids, mask = tokenizer([expression["text"] for expression in record["expressions"]])
    assert torch.equal(mapped["input_ids"], ids) and torch.equal(mapped["text_mask"], mask)
    assert "instances" not in mapped and "targets" not in mapped
    mapped["expressions"][0]["text"] = "changed"
    assert record == before


def test_resolution_is_the_output_size(make_record, make_mapper):
    mapper = make_mapper(is_train=False, size=(8, 8), resolution=(48, 40))
    mapped = mapper(make_record())
    assert (mapped["height"], mapped["width"]) == (48, 40)
    assert mapped["original_size"] == (12, 16)  # where the evaluator draws the annotations


def test_prepare_needs_no_file(make_record, make_mapper):
    record = make_record()
    mapper = make_mapper(is_train=False, size=(9, 9), geometry="letterbox")
    prepared, mapped = mapper.prepare(rgb(record), record["expressions"]), mapper(record)
    assert torch.equal(prepared["image"], mapped["image"])
    assert torch.equal(prepared["input_ids"], mapped["input_ids"])
    for key in ("content_box", "height", "width", "expressions"):
        assert prepared[key] == mapped[key]


def test_training_input(make_record, make_mapper):
    record = make_record()
    before = copy.deepcopy(record)
    mapper = make_mapper(is_train=True, size=(24, 32))
    mapped = mapper(record, np.random.default_rng(0))  # a unit as it stands: all expressions
    masks = mapped["instances"].gt_masks.tensor
    assert masks.dtype == torch.bool and masks.shape == (2, 24, 32)
    for mask, annotation in zip(masks, record["annotations"]):
        original = rasterize(annotation["segmentation"], 12, 16)
        np.testing.assert_array_equal(mask, resize_nearest(original, 24, 32))
    assert mapped["instances"].image_size == (24, 32)
    assert mapped["instances"].annotation_id.tolist() == [1, 2]
    assert mapped["targets"].int().tolist() == [[1, 0], [1, 0], [1, 1], [0, 0]]
    assert mapped["targets"].dtype == torch.bool
    assert (mapped["height"], mapped["width"]) == (12, 16)
    assert "annotations" not in mapped and "content_box" not in mapped
    assert record == before


def test_unit_without_targets(make_record, make_mapper):
    mapper = make_mapper(is_train=True, size=(8, 8))
    mapped = mapper(make_record(refs=[(2, ())]), np.random.default_rng(0))
    assert mapped["instances"].gt_masks.tensor.shape == (0, 8, 8)
    assert mapped["targets"].shape == (2, 0) and mapped["targets"].dtype == torch.bool
    assert mapped["instances"].annotation_id.dtype == torch.int64


@pytest.mark.parametrize(
    "size, box", [((8, 8), (0, 2, 8, 6)), ((9, 8), (0, 2, 8, 6)), ((4, 11), (1, 0, 9, 4))]
)
def test_letterbox_is_exact_at_scale_one(make_record, make_mapper, size, box):
    record = make_record(height=4, width=8, refs=[(1, (1,))])
    record["annotations"][0]["segmentation"] = [[3, 1, 7, 1, 7, 3, 3, 3]]
    x0, y0, x1, y1 = box
    arguments = dict(size=size, geometry="letterbox")
    test = make_mapper(is_train=False, **arguments)(record)
    assert test["content_box"] == box
    expected = np.full((*size, 3), (124, 116, 104), np.uint8)  # 123.7, 116.3, 103.5
    expected[y0:y1, x0:x1] = rgb(record)
    np.testing.assert_array_equal(image_of(test), expected)
    train = make_mapper(is_train=True, **arguments)(record, np.random.default_rng(0))
    np.testing.assert_array_equal(image_of(train), expected)
    mask = np.zeros(size, bool)
    mask[y0 + 1 : y0 + 3, x0 + 3 : x0 + 7] = True
    np.testing.assert_array_equal(train["instances"].gt_masks.tensor[0], mask)


def test_longest_side_has_no_border(make_record, make_mapper):
    arguments = dict(size=(32, 32), geometry="longest_side")
    wide = make_mapper(is_train=False, **arguments)(make_record(height=10, width=16))
    assert wide["image"].shape == (3, 20, 32) and wide["content_box"] == (0, 0, 32, 20)
    record = make_record(height=16, width=11)
    tall = make_mapper(is_train=True, **arguments)(record, np.random.default_rng(0))
    assert tall["image"].shape == (3, 32, 22)
    assert tall["instances"].gt_masks.tensor.shape == (2, 32, 22)


@pytest.mark.parametrize("geometry", ["squash", "letterbox", "longest_side"])
def test_content_box_undoes_the_geometry(make_record, make_mapper, geometry):
    # At twice the size or a multiple, cropping to the box and resizing back loses nothing.
    record = make_record(height=8, width=16, refs=[(1, (1, 3, 5))])
    arguments = dict(size=(32, 32), geometry=geometry)
    test = make_mapper(is_train=False, **arguments)
    x0, y0, x1, y1 = (int(edge) for edge in test(record)["content_box"])
    restore = test.augmentations[0].get_transform(rgb(record)).inverse()
    train = make_mapper(is_train=True, **arguments)(record, np.random.default_rng(0))
    masks = train["instances"].gt_masks.tensor.numpy()
    for mask, annotation in zip(masks, record["annotations"]):
        original = rasterize(annotation["segmentation"], 8, 16)
        np.testing.assert_array_equal(restore.apply_segmentation(mask), original)
        back = resize_nearest(np.ascontiguousarray(mask[y0:y1, x0:x1]), 8, 16)
        np.testing.assert_array_equal(back, original)
        assert mask.sum() == mask[y0:y1, x0:x1].sum() > 0


@pytest.mark.parametrize("geometry", ["squash", "letterbox", "longest_side"])
def test_content_box_holds_the_whole_image_for_any_size(geometry):
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 900, (200, 2)):
        image = np.empty((int(height), int(width), 3), np.uint8)
        placement = Place((416, 352), geometry).get_transform(image)
        x0, y0, x1, y1 = placement.content_box
        assert 0 <= x0 < x1 <= placement.canvas[1] and 0 <= y0 < y1 <= placement.canvas[0]
        corners = placement.apply_coords(np.array([[0.0, 0.0], [width, height]]))
        np.testing.assert_allclose(corners, [[x0, y0], [x1, y1]])
        back = placement.inverse().apply_coords(corners)
        np.testing.assert_allclose(back, [[0, 0], [width, height]], atol=1e-9)
        if geometry != "squash":  # one factor for both axes, but for rounding to whole pixels
            ratio = max(y1 - y0, x1 - x0) / max(height, width)
            if geometry == "letterbox":
                ratio = min(416 / height, 352 / width)
                assert 0 <= 416 - y1 - y0 <= 1 and 0 <= 352 - x1 - x0 <= 1  # centred
            assert max(abs(y1 - y0 - height * ratio), abs(x1 - x0 - width * ratio)) <= 1


@pytest.mark.parametrize(
    "height, size, corner", [(480, (312, 416), (52, 0)), (427, (278, 416), (69, 0))]
)
def test_asda_letterbox_size(height, size, corner):
    image = np.empty((height, 640, 3), np.uint8)
    placement = Place((416, 416), "letterbox").get_transform(image)
    assert (placement.size, placement.corner, placement.canvas) == (size, corner, (416, 416))


@pytest.mark.parametrize(
    "interpolation, flag",
    [("bilinear", cv2.INTER_LINEAR), ("bicubic", cv2.INTER_CUBIC), ("area", cv2.INTER_AREA)],
)
def test_interpolation(interpolation, flag):
    image = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smaller = cv2.resize(image, (10, 7), interpolation=flag)
    np.testing.assert_array_equal(resize_image(image, 7, 10, interpolation), smaller)
    if interpolation == "area":
        flag = cv2.INTER_LINEAR
    larger = cv2.resize(image, (20, 10), interpolation=flag)
    np.testing.assert_array_equal(resize_image(image, 10, 20, interpolation), larger)


def test_flip_moves_image_masks_views_and_words(make_record, tokenizer, make_mapper):
    record = make_record(height=8, width=8, refs=[(1, (1, 2))])
    record["expressions"][0]["text"] = "Left one right of the LEFTMOST bright dog"
    mapper = make_mapper(is_train=True, size=(8, 8), flip_prob=0.5, views={"small": (4, 4)})
    kept, flipped = mapper(record, FixedDraws(0.5)), mapper(record, FixedDraws(0.49))
    np.testing.assert_array_equal(image_of(kept), rgb(record))
    assert torch.equal(flipped["image"], kept["image"].flip(-1))
    masks = kept["instances"].gt_masks.tensor
    assert torch.equal(flipped["instances"].gt_masks.tensor, masks.flip(-1))
    assert not torch.equal(masks, masks.flip(-1))
    small = cv2.resize(rgb(record)[:, ::-1], (4, 4), interpolation=cv2.INTER_LINEAR)
    np.testing.assert_array_equal(flipped["views"]["small"].permute(1, 2, 0), small)
    text = "Right one left of the RIGHTMOST bright dog"
    assert flipped["expressions"][0]["text"] == text
    assert torch.equal(flipped["input_ids"], tokenizer([text])[0])
    assert kept["expressions"] == record["expressions"]  # the record is not changed
    assert torch.equal(kept["input_ids"], tokenizer([record["expressions"][0]["text"]])[0])


@pytest.mark.parametrize(
    "text, swapped",
    [
        ("left", "right"),
        ("man on the right, left of her", "man on the left, right of her"),
        ("LEFT Right left", "RIGHT Left right"),
        ("leftmost / right-most / Rightest", "rightmost / left-most / Leftest"),
        ("left-hand side, righthand rightside", "right-hand side, lefthand leftside"),
        ("the left's", "the right's"),
        ("the bright upright one by the leftover cleft", None),
        ("rights lefty", None),
        ("", None),
    ],
)
def test_swap_left_right(text, swapped):
    swapped = text if swapped is None else swapped
    assert swap_left_right(text) == swapped
    assert swap_left_right(swapped) == text


def test_flip_is_drawn_at_its_probability(make_record, make_mapper):
    record = make_record()
    mapper = make_mapper(is_train=True, size=(4, 4), flip_prob=0.25)
    texts = [mapper(record, np.random.default_rng(n))["expressions"][0]["text"] for n in range(400)]
    assert abs(sum("right" in text for text in texts) - 100) < 30


def test_jitter_scales_value_and_saturation(make_record, make_mapper):
    record = make_record(height=2, width=2)
    pixels = np.array([[[100, 50, 50], [60, 60, 60]], [[200, 100, 100], [0, 0, 0]]], np.uint8)
    cv2.imwrite(record["file_name"], pixels[..., ::-1])

    def jitter(**kwargs):
        for annotation in record["annotations"]:
            annotation["segmentation"] = [[0, 0, 2, 0, 2, 2, 0, 2]]
        mapper = make_mapper(is_train=True, size=(2, 2), **kwargs)
        return image_of(mapper(record, FixedDraws(1.0)))  # the upper end of every range

    bright = jitter(brightness=0.5)
    expected = [[[150, 75, 75], [90, 90, 90]], [[255, 128, 128], [0, 0, 0]]]  # 300 is clipped
    np.testing.assert_allclose(bright, expected, atol=1)
    saturated = jitter(saturation=0.5)
    expected = [[[100, 25, 25], [60, 60, 60]], [[200, 50, 50], [0, 0, 0]]]
    np.testing.assert_allclose(saturated, expected, atol=1)
    np.testing.assert_array_equal(jitter(), pixels)


def test_affine_matrix():
    rng, image = np.random.default_rng(0), np.empty((30, 40, 3), np.uint8)

    def draw(*, rotation=0.0, scale=0.0, translation=0.0, shear=0.0):
        affine = RandomAffine(rotation, scale, translation, shear, color=(0, 0, 0))
        return affine.get_transform(image, rng).matrix

    np.testing.assert_allclose(draw(), [[1, 0, 0], [0, 1, 0]], atol=1e-12)
    for _ in range(50):
        matrix = draw(rotation=5.0, scale=0.1)
        np.testing.assert_allclose(matrix @ [20, 15, 1], [20, 15], atol=1e-9)  # about the centre
        scale = np.sqrt(np.linalg.det(matrix[:, :2]))
        angle = np.degrees(np.arctan2(matrix[0, 1], matrix[0, 0]))
        assert 0.9 <= scale <= 1.1 and abs(angle) <= 5
        matrix = draw(translation=0.1)
        assert abs(matrix[0, 2]) <= 4 and abs(matrix[1, 2]) <= 3
        matrix = draw(shear=2.0)
        assert 0 < abs(matrix[[0, 1], [1, 0]]).max() <= np.tan(np.radians(2))
        np.testing.assert_allclose(np.diag(matrix), 1)


def test_affine_moves_image_and_masks_alike(make_record, make_mapper, monkeypatch):
    record = make_record(height=8, width=8, refs=[(1, (1, 4))])
    mapper = make_mapper(is_train=True, size=(8, 8), geometry="letterbox", affine=AFFINE)
    shift = np.array([[1.0, 0, 3], [0, 1, -2]])  # 3 right, 2 up
    moved_by = Affine(shift, (124, 116, 104))
    monkeypatch.setattr(RandomAffine, "get_transform", lambda self, image, rng: moved_by)
    mapped = mapper(record, np.random.default_rng(0))
    expected = np.full((8, 8, 3), (124, 116, 104), np.uint8)
    expected[:6, 3:] = rgb(record)[2:, :5]
    np.testing.assert_array_equal(image_of(mapped), expected)
    for mask, annotation in zip(mapped["instances"].gt_masks.tensor, record["annotations"]):
        moved = np.zeros((8, 8), bool)
        moved[:6, 3:] = rasterize(annotation["segmentation"], 8, 8)[2:, :5]
        np.testing.assert_array_equal(mask, moved)


def test_affine_is_drawn_from_the_rng(make_record, make_mapper):
    record = make_record()
    mapper = make_mapper(is_train=True, size=(32, 32), geometry="letterbox", affine=AFFINE)
    first, again, other = (mapper(record, np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert torch.equal(first["image"], again["image"])
    assert not torch.equal(first["image"], other["image"])


def test_emptied_masks_keep_their_rows(make_record, make_mapper, monkeypatch):
    record = make_record(height=8, width=8, refs=[(1, (1, 4))])
    mapper = make_mapper(is_train=True, size=(8, 8), geometry="letterbox", affine=AFFINE)
    away = np.array([[1.0, 0, 4], [0, 1, 0]])  # annotation 4 leaves at the right
    moved_by = Affine(away, (124, 116, 104))
    monkeypatch.setattr(RandomAffine, "get_transform", lambda self, image, rng: moved_by)
    mapped = mapper(record, np.random.default_rng(0))
    assert mapped["instances"].gt_masks.tensor.any(-1).any(-1).tolist() == [True, False]
    assert mapped["targets"].tolist() == [[True, True]]


def test_polygon_without_area_stays_a_target_and_is_reported(make_record, make_mapper, caplog):
    record = make_record(refs=[(1, (1,))])
    record["annotations"][0]["segmentation"] = [[1, 1, 9, 1, 1, 1]]
    mapper = make_mapper(is_train=True, size=(8, 8))
    with caplog.at_level(logging.WARNING):
        mapped = mapper(record, np.random.default_rng(0))
    assert not mapped["instances"].gt_masks.tensor.any()
    assert mapped["targets"].tolist() == [[True]]
    assert f"{record['file_name']}: annotation 1 encloses no pixel" in caplog.text


def test_run_lengths_and_crowds(make_record, make_mapper):
    record = make_record(refs=[(1, (1, 2, 3))])
    shapes = [rasterize(a["segmentation"], 12, 16) for a in record["annotations"]]
    record["annotations"][0].update(segmentation=encode(shapes[0]), iscrowd=1)
    flat = shapes[1].T.ravel()
    changes = np.flatnonzero(np.diff(flat.astype(int), prepend=0))
    runs = np.diff(np.concatenate([[0], changes, [flat.size]])).tolist()
    record["annotations"][1].update(segmentation={"size": [12, 16], "counts": runs}, iscrowd=1)
    mapper = make_mapper(is_train=True, size=(12, 16))
    mapped = mapper(record, np.random.default_rng(0))
    np.testing.assert_array_equal(mapped["instances"].gt_masks.tensor, np.stack(shapes))


def test_each_annotation_is_drawn_once(make_record, make_mapper, monkeypatch):
    drawn = []

    def counting(segmentation, height, width):
        drawn.append(segmentation)
        return rasterize(segmentation, height, width)

    monkeypatch.setattr(mapper_module, "rasterize", counting)
    record = make_record(refs=[(3, (1,)), (2, (1, 2))])
    make_mapper(is_train=True, size=(8, 8))(record, FixedDraws(1.0))
    assert len(drawn) == 2


@pytest.mark.parametrize("unit, count", [("sentence", 1), ("referent", 1), ("image", 3)])
def test_a_plain_record_in_training_is_drawn_from(make_record, make_mapper, unit, count):
    record = make_record(refs=[(3, (1,)), (2, (1, 2)), (1, ())])
    mapper = make_mapper(is_train=True, size=(8, 8), unit=unit, max_expressions=3)
    torch.manual_seed(0)
    mapped = [mapper(record) for _ in range(40)]
    drawn = [tuple(e["expression_id"] for e in one["expressions"]) for one in mapped]
    assert {len(ids) for ids in drawn} == {count}
    assert len(set(drawn)) > 3
    for one in mapped:
        named = {id_ for e in one["expressions"] for id_ in e["annotation_ids"]}
        assert one["instances"].annotation_id.tolist() == sorted(named)
    torch.manual_seed(0)
    again = [tuple(e["expression_id"] for e in mapper(record)["expressions"]) for _ in range(40)]
    assert again == drawn


def test_images_of_other_kinds(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4) * 20
    cv2.imwrite(str(tmp_path / "grey.png"), grey)
    image = read_image(str(tmp_path / "grey.png"))
    np.testing.assert_array_equal(image, grey[..., None].repeat(3, axis=2))
    smooth = np.zeros((20, 30, 3), np.uint8)
    smooth[:10], smooth[:, :15, 1] = (200, 0, 0), 120
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(smooth).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    image = read_image(str(tmp_path / "turned.jpg"))
    expected = detection_utils.read_image(str(tmp_path / "turned.jpg"), "RGB")
    assert image.shape == expected.shape == (30, 20, 3)
    assert abs(image.astype(int) - expected.astype(int)).mean() < 3


def test_missing_and_damaged_images(make_record, make_mapper, tmp_path):
    mapper = make_mapper(is_train=False, size=(8, 8))
    record = make_record()
    record["file_name"] = str(tmp_path / "nowhere.jpg")
    with pytest.raises(FileNotFoundError, match="nowhere.jpg: no such image"):
        mapper(record)
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    whole = cv2.imencode(".jpg", noise)[1].tobytes()
    for data in (b"", b"not an image", whole[: len(whole) // 2], whole[:-20]):
        record["file_name"] = str(tmp_path / "damaged.jpg")
        (tmp_path / "damaged.jpg").write_bytes(data)
        with pytest.raises(ValueError, match=r"damaged.jpg: .*damaged \(\d+ bytes\)"):
            mapper(record)
    (tmp_path / "damaged.jpg").write_bytes(whole)
    assert mapper(record)["image"].shape == (3, 8, 8)


def change_size(record):
    record["height"] = 13


def empty_text(record):
    record["expressions"][0]["text"] = "  "


def unknown_annotation(record):
    record["annotations"] = record["annotations"][1:]


def odd_polygon(record):
    record["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, 5, 1]]


@pytest.mark.parametrize(
    "damage, message",
    [
        (change_size, "the image is 12 x 16 .* its record says 13 x 16"),
        (empty_text, "expression 100 is empty"),
        (unknown_annotation, r"expressions \[100\] name the annotations \[1\]"),
        (odd_polygon, "annotation 1: .*7 numbers"),
    ],
)
def test_bad_records_are_errors_that_name_the_file(make_record, make_mapper, damage, message):
    record = make_record(refs=[(1, (1,))])
    damage(record)
    mapper = make_mapper(is_train=True, size=(8, 8))
    with pytest.raises(ValueError, match=f"1.png: {message}"):
        mapper(record)


@pytest.mark.parametrize("is_train", [True, False])
def test_an_image_that_is_off_by_a_pixel_is_resized_and_reported(
    make_record, make_mapper, caplog, monkeypatch, is_train
):
    """As many of RRSIS-D's are (RMSIN's issue 12)."""
    monkeypatch.setattr("detectron2.utils.logger._LOG_COUNTER", Counter())  # it warns but once
    mapper = make_mapper(is_train=is_train, size=(100, 120))
    record = make_record(height=101, width=119, refs=[(1, (1,))]) | {"height": 100, "width": 120}
    with caplog.at_level(logging.WARNING):
        mapped = mapper(record)
    assert mapped["image"].shape == (3, 100, 120)
    assert mapped["original_size"] == (mapped["height"], mapped["width"]) == (100, 120)
    assert (
        "1.png: the image is 101 x 119 (height x width), its record says 100 x 120" in caplog.text
    )
    if is_train:
        mask = mapped["instances"].gt_masks.tensor[0]
        assert mask.shape == (100, 120) and mask[2:6, 1:5].all() and mask.sum() == 16
    with pytest.raises(ValueError, match="the image is 101 x 119 .* its record says 100 x 123"):
        mapper(record | {"width": 123})


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"geometry": "crop"}, "GEOMETRY is one of squash, letterbox, longest_side, not 'crop'"),
        ({"interpolation": "nearest"}, "INTERPOLATION is one of"),
        ({"unit": "phrase"}, "UNIT is one of"),
        ({"size": (8, 0)}, r"INPUT.RIS.SIZE.* is \(height, width\)"),
        ({"size": (8,)}, r"INPUT.RIS.SIZE.* is \(height, width\)"),
        ({"resolution": (480,)}, "TEST.RESOLUTION"),
        ({"views": {"small": (0, 4)}}, r"VIEWS, is \(height, width\) in pixels, not \(0, 4\)"),
        ({"max_expressions": 0}, "MAX_EXPRESSIONS"),
        ({"flip_prob": 1.5}, "FLIP_PROB"),
        ({"brightness": -0.1}, "BRIGHTNESS"),
        ({"saturation": 2}, "SATURATION"),
        ({"affine": AFFINE}, "AFFINE needs GEOMETRY letterbox"),
        ({"affine": AFFINE, "geometry": "letterbox", "views": {"v": (4, 4)}}, "no VIEWS"),
    ],
)
def test_settings_that_make_no_sense(make_mapper, arguments, message):
    with pytest.raises(ValueError, match=message):
        make_mapper(**{"is_train": True, "size": (8, 8), **arguments})


def test_every_key_of_the_config_arrives(tokenizer, monkeypatch):
    monkeypatch.setattr(mapper_module, "Tokenizer", lambda cfg: tokenizer)
    cfg = get_ris_cfg()
    cfg.merge_from_list(
        [
            "INPUT.RIS.SIZE", (416, 352), "INPUT.RIS.GEOMETRY", "letterbox",
            "INPUT.RIS.INTERPOLATION", "area", "INPUT.RIS.MASK_SAMPLE", "corner", "INPUT.RIS.LETTERBOX_COLOR", (1.0, 2.0, 3.6),
            "INPUT.RIS.UNIT", "image", "INPUT.MAX_EXPRESSIONS", 5, "INPUT.RIS.FLIP_PROB", 0.5,
            "INPUT.RIS.BRIGHTNESS", 0.4, "INPUT.RIS.SATURATION", 0.3,
            "INPUT.RIS.AFFINE.ENABLED", True, "INPUT.RIS.AFFINE.ROTATION", 1.0,
            "INPUT.RIS.AFFINE.SCALE", 0.2, "INPUT.RIS.AFFINE.TRANSLATION", 0.3,
            "INPUT.RIS.AFFINE.SHEAR", 4.0, "TEST.RESOLUTION", (480, 384),
        ]  # fmt: skip
    )
    mapper = ReferringMapper(cfg)
    assert mapper.is_train and mapper.tokenizer is tokenizer
    flip, hsv, place, affine = mapper.augmentations
    assert isinstance(place, Place) and isinstance(flip, RandomFlip) and isinstance(hsv, RandomHSV)
    assert (place.size, place.geometry, place.interpolation) == ((416, 352), "letterbox", "area")
    assert place.mask_sample == "corner" and place.color == (1, 2, 4)
    assert (mapper.unit, mapper.max_expressions, flip.probability) == ("image", 5, 0.5)
    assert (hsv.brightness, hsv.saturation) == (0.4, 0.3)
    assert affine == RandomAffine(1.0, 0.2, 0.3, 4.0, color=(1, 2, 4))
    assert mapper.resolution == (480, 384)
    cfg.INPUT.RIS.AFFINE.ENABLED, cfg.INPUT.RIS.VIEWS = False, [["cognition", 224, 200]]
    cfg.TEST.RESOLUTION = ()
    mapper = ReferringMapper(cfg, is_train=False)
    (place,) = mapper.augmentations
    assert not mapper.is_train and mapper.resolution is None and place.size == (416, 352)
    assert {name: view.size for name, view in mapper.views.items()} == {"cognition": (224, 200)}
    assert (mapper.views["cognition"].geometry, place.geometry) == ("squash", "letterbox")


def test_augmentations_of_detectron2_and_ones_own(make_record, tokenizer):
    """Without a Place, the image fills the model's input; two flips leave the words as they are."""
    record = make_record(height=8, width=12)
    shrink = T.Resize((4, 6), interp=Image.NEAREST)
    arguments = dict(is_train=True, tokenizer=tokenizer)
    kept = ReferringMapper(**arguments, augmentations=[shrink])(record, FixedDraws(0))
    flip = T.RandomFlip(prob=1.0)
    flipped = ReferringMapper(**arguments, augmentations=[shrink, flip])(record, FixedDraws(0))
    twice = ReferringMapper(
        **arguments, augmentations=[T.AugmentationList([flip, RandomFlip(1.0)]), shrink]
    )(record, FixedDraws(0))
    assert kept["image"].shape == (3, 4, 6) and kept["instances"].image_size == (4, 6)
    assert torch.equal(flipped["image"], kept["image"].flip(-1))
    masks = kept["instances"].gt_masks.tensor
    assert masks.any() and torch.equal(flipped["instances"].gt_masks.tensor, masks.flip(-1))
    assert "right" in flipped["expressions"][0]["text"]
    assert torch.equal(twice["image"], kept["image"])
    assert twice["expressions"] == kept["expressions"] == record["expressions"]
    test = ReferringMapper(is_train=False, tokenizer=tokenizer, augmentations=[shrink])(record)
    assert test["content_box"] == (0, 0, 6, 4)


def test_coordinates_move_as_the_image_does():
    """The centre of a white pixel, wherever it is taken."""
    image = np.zeros((20, 30, 3), np.uint8)
    image[4, 7] = 255
    moves = [
        RandomFlip(1.0).get_transform(image, np.random.default_rng(0)),
        Place((80, 80), "letterbox", color=(0, 0, 0)).get_transform(image),
        Affine(np.array([[1.0, 0, 3], [0, 1, -2]]), (0, 0, 0)),
    ]
    coords = np.array([[7.5, 4.5]])
    for move in moves:
        image, coords = move.apply_image(image), move.apply_coords(coords)
    centre = np.argwhere(image[..., 0] > 127).mean(0)[::-1] + 0.5
    np.testing.assert_allclose(coords[0], centre, atol=0.5)
