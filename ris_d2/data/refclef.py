"""RefCLEF (ReferIt): REFER's ``refs(unc).p`` or ``refs(berkeley).p`` on SAIAPR TC-12 -> records."""

import logging
import os
from typing import Any

from .refer import load_refer

logger = logging.getLogger(__name__)

# REFER's README: "2 train and 1 test images missed"; their refs are in the files.
KNOWN_MISSING_IMAGES = ("19579.jpg", "17975.jpg", "19575.jpg")


def load_refclef(*files_and_split: str, source: str = "refclef", **options: Any) -> list[dict]:
    """Read one split of RefCLEF, as ``load_refer``, whose arguments it takes, except:

    Annotation ids are strings in these files and become positions in ``instances.json`` from 1;
    masks are lists of RLE. Images lie in ``image_root`` as <id>.jpg, or in the folders of SAIAPR
    TC-12, <NN>/images/<id>.jpg with NN = id // 1000: whichever the first image is found in.
    Records of ``KNOWN_MISSING_IMAGES`` are left out, with a warning, where the file is not there.

    Args:
        split: train, val, testA, testB, testC (unc); train, val, test (berkeley).
    """
    records = load_refer(*files_and_split, source=source, **options)
    if records and not os.path.exists(records[0]["file_name"]):
        in_folders = [_in_folder(record["file_name"]) for record in records]
        if os.path.exists(in_folders[0]):
            for record, file_name in zip(records, in_folders):
                record["file_name"] = file_name
    missing = [record for record in records if _known_missing(record)]
    for record in missing:
        logger.warning(
            f"RefCLEF: leaving out {len(record['expressions'])} expressions of "
            f"{record['file_name']}, an image known to be missing"
        )
    return [record for record in records if record not in missing]


def _in_folder(file_name: str) -> str:
    root, name = os.path.split(file_name)
    number = os.path.splitext(name)[0]
    folder = f"{int(number) // 1000:02d}" if number.isdigit() else ""
    return os.path.join(root, folder, "images", name)


def _known_missing(record: dict) -> bool:
    file_name = record["file_name"]
    return os.path.basename(file_name) in KNOWN_MISSING_IMAGES and not os.path.exists(file_name)
