"""RRSIS-D: REFER's form, masks as lists of RLE, images in a folder of their own."""

import pytest
from detectron2.data import DatasetCatalog

from ris_d2.data.catalog import register_all
from ris_d2.masks import rasterize


def test_masks_are_lists_of_run_lengths(dataset_files):
    for image in dataset_files.instances["images"]:
        image["file_name"] = f"{image['id']:05d}.jpg"
    for annotation in dataset_files.instances["annotations"]:
        annotation["segmentation"] = [
            {"size": [40, 60], "counts": [first, 5, 2395 - first]} for first in (0, 40)
        ]
    dataset_files.refs[3]["split"] = "test"
    dataset_files.write_refer("rrsisd")
    register_all()
    assert len(DatasetCatalog.get("ris_rrsisd_unc_train")) == 2
    (record,) = DatasetCatalog.get("ris_rrsisd_unc_test")
    assert record["file_name"].endswith("images/rrsisd/JPEGImages/00004.jpg")
    mask = rasterize(record["annotations"][0]["segmentation"], 40, 60)
    assert mask.sum() == 10 and mask[:5, :2].all()
    with pytest.raises(KeyError):  # its classes are not COCO's
        DatasetCatalog.get("ris_rrsisd_unc_train_seen")
