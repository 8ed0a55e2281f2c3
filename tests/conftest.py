"""Small dataset files in the published formats, for every test that reads some; the suite's device."""

import copy
import json
import os
import pickle
import struct
import sys
from pathlib import Path

import pytest
import torch

# Helper modules of all tests; and programs, run from their files, find each other.
sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "tools")]

from placement import made_on


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        default="cpu",
        help="cpu: the whole suite, as if there were no GPU; cuda: the tests that compute, on it; "
        "pretended: the same on a GPU that is not there (tests/pretended_device.py)",
    )


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a configuration's default would be a GPU
    config.addinivalue_line("markers", "cpu_only: does not follow --device")
    config.addinivalue_line(
        "markers", "not_pretended: needs kernels, or minutes, on a GPU that is not there"
    )
    config.addinivalue_line("markers", "places_itself: puts on the device what it makes")


def pytest_collection_modifyitems(config, items):
    name = config.getoption("--device")
    if name == "cpu":
        return
    left_out = ["cpu_only"] + ["not_pretended"] * (name == "pretended")
    chosen = [
        item
        for item in items
        if "device" in item.fixturenames and not any(map(item.get_closest_marker, left_out))
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
    items[:] = chosen


@pytest.fixture
def device(pytestconfig):
    """MODEL.DEVICE of the test."""
    name = pytestconfig.getoption("--device")
    if name != "pretended":
        if name != "cpu":
            torch.backends.cudnn.allow_tf32 = False  # it is on by default
        yield name
        return
    from pretended_device import pretended_device

    with pretended_device():
        yield "cuda"


@pytest.fixture
def placed(request, device):
    """The tensors that the test makes, and the weights of its modules, lie on the device."""
    if device == "cpu" or request.node.get_closest_marker("places_itself"):
        yield
    else:
        with made_on(device):
            yield


SIZE = {"height": 40, "width": 60}
SQUARE = [[10, 10, 20, 10, 20, 20, 10, 20]]
BAR = [[0, 0, 30, 0, 30, 5, 0, 5]]


class Python2Pickler(pickle._Pickler):
    """Writes as Python 2 did: protocol 2, str as latin-1 bytes."""

    dispatch = dict(pickle._Pickler.dispatch)

    def save_str(self, text):
        data = text.encode("latin-1")
        short = len(data) < 256
        head = b"U" + bytes([len(data)]) if short else b"T" + struct.pack("<i", len(data))
        self.write(head + data)
        self.memoize(text)

    dispatch[str] = save_str


class DatasetFiles:
    """A dataset root under construction: change the content, then write it.

    ``instances`` has images 1 to 4 with two annotations each (10 and 11, 20 and 21, ...), the
    second of image 4 a crowd; ``refs`` has one ref of two sentences per image: 1, 2 train, 3 val,
    4 testA. ``grefs`` has single, multi and no-target refs.
    """

    def __init__(self, root):
        self.root = root
        self.instances = {
            "images": [
                {"id": i, "file_name": f"COCO_train2014_{i:012d}.jpg", **SIZE} for i in range(1, 5)
            ],
            "annotations": [
                {
                    "id": 10 * i + k,
                    "image_id": i,
                    "category_id": (90, 3)[k],
                    "segmentation": copy.deepcopy((SQUARE, BAR)[k]),
                    "bbox": [[10, 10, 10, 10], [0, 0, 30, 5]][k],
                    "iscrowd": 0,
                }
                for i in range(1, 5)
                for k in range(2)
            ],
            "categories": [{"id": 90, "name": "last"}, {"id": 3, "name": "first"}],
        }
        self.instances["annotations"][-1].update(
            segmentation={"size": [40, 60], "counts": [0, 5, 2395]}, iscrowd=1
        )
        self.refs = [
            self.ref(i, ann_id=10 * i, image_id=i, split=split)
            for i, split in ((1, "train"), (2, "train"), (3, "val"), (4, "testA"))
        ]
        self.grefs = [
            self.ref(1, ann_id=[10], image_id=1, split="train", no_target=False),
            self.ref(2, ann_id=[10, 11], image_id=1, split="train", no_target=False),
            self.ref(3, ann_id=[-1], image_id=1, split="train", no_target=True),
            self.ref(4, ann_id=[30], image_id=3, split="val", no_target=False),
            self.ref(5, ann_id=[-1], image_id=4, split="testA", no_target=True),
            self.ref(6, ann_id=[41], image_id=4, split="testB", no_target=False),
        ]
        self.tasks = [
            {
                "task_id": "2__101",
                "image_id": 2,
                "ann_ids": [101],
                "phrase": "striped cup",
                "instance_boxes": [[10, 10, 10, 10]],
                "Polygons": [[[[10, 10], [20, 10], [20, 20], [10, 20]]]],
            },
            {
                "task_id": "2__102_103",
                "image_id": 2,
                "ann_ids": [102, 103],
                "phrase": "two plates",
                "instance_boxes": [[0, 0, 30, 5], [30, 30, 5, 5]],
                "Polygons": [
                    [[[0, 0], [30, 0], [30, 5]], [[1, 1], [2, 2]]],
                    [[[30, 30], [35, 30], [35, 35]], []],
                ],
            },
        ]
        self.phrasecut_images = [
            {"image_id": i, "coco_id": None, "split": "val", "url": "", **SIZE} for i in (1, 2)
        ]
        self.custom = {
            "images": [{"id": 1, "file_name": "a.jpg", **SIZE}],
            "annotations": [
                {"id": 10, "image_id": 1, "segmentation": copy.deepcopy(SQUARE)},
                {
                    "id": 11,
                    "image_id": 1,
                    "segmentation": {"size": [40, 60], "counts": [0, 5, 2395]},
                },
            ],
            "expressions": [
                {"id": 100, "image_id": 1, "text": "the left cup", "annotation_ids": [10]},
                {"id": 101, "image_id": 1, "text": "both", "annotation_ids": [10, 11], "ref_id": 7},
                {"id": 102, "image_id": 1, "text": "the dog", "annotation_ids": []},
            ],
        }

    @staticmethod
    def ref(ref_id, *, ann_id, image_id, split, **more):
        sentences = [
            {
                "sent_id": 100 * ref_id + k,
                "raw": f"The LEFT man, {ref_id}.{k}",
                "sent": f"the left man {ref_id} {k}",
                "tokens": ["the", "left", "man"],
            }
            for k in range(2)
        ]
        return {
            "ref_id": ref_id,
            "ann_id": ann_id,
            "category_id": 90,
            "image_id": image_id,
            "split": split,
            "file_name": f"COCO_train2014_{image_id:012d}_7.jpg",
            "sent_ids": [s["sent_id"] for s in sentences],
            "sentences": sentences,
            **more,
        }

    def refclef(self):
        """Make instances and refs RefCLEF's: string annotation ids, lists of RLE, no iscrowd."""
        for image in self.instances["images"]:
            image["file_name"] = f"{image['id'] + 1200}.jpg"
        for annotation in self.instances["annotations"]:
            annotation["id"] = f"{annotation['image_id']}_{annotation['id'] % 10}"
            annotation["segmentation"] = [{"size": [40, 60], "counts": [0, 5, 2395]}]
            del annotation["iscrowd"]
        for ref in self.refs:
            ref["ann_id"] = f"{ref['image_id']}_0"
            del ref["file_name"]

    def json(self, path, data):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(data))
        return str(path)

    def pickle(self, path, data):
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            Python2Pickler(file, protocol=2).dump(data)
        return str(path)

    def write_refer(self, folder="refcoco", splitby="unc"):
        """Write refs and instances; return their paths."""
        refs = self.pickle(f"{folder}/refs({splitby}).p", self.refs)
        return refs, self.json(f"{folder}/instances.json", self.instances)

    def write_grefer(self):
        grefs = self.json("grefcoco/grefs(unc).json", self.grefs)
        return grefs, self.json("grefcoco/instances.json", self.instances)

    def write_phrasecut(self, split="val"):
        refer = self.json(f"phrasecut/refer_{split}.json", self.tasks)
        return refer, self.json("phrasecut/image_data_split.json", self.phrasecut_images)

    def write_images(self, folder="images/train2014"):
        """Empty files under the images' names."""
        for image in self.instances["images"]:
            path = self.root / folder / image["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()


@pytest.fixture
def dataset_files(tmp_path, monkeypatch):
    """A DatasetFiles whose root is $DETECTRON2_DATASETS."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return DatasetFiles(tmp_path)
