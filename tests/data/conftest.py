import cv2
import numpy as np
import pytest
import torch

from ris_d2 import get_ris_cfg
from ris_d2.data.augmentations import build_augmentations, build_views
from ris_d2.data.mapper import ReferringMapper


def stub_tokenizer(texts):
    """Two tokens for each word, so that different sentences give different ids."""
    input_ids = torch.zeros(len(texts), 6, dtype=torch.int64)
    for row, text in zip(input_ids, texts):
        words = [sum(map(ord, word)) for word in text.split()][:6]
        row[: len(words)] = torch.tensor(words)
    return input_ids, input_ids > 0


@pytest.fixture
def tokenizer():
    return stub_tokenizer


@pytest.fixture
def make_record(tmp_path):
    """Write a random image and return its record.

    refs: one (number of sentences, annotation ids) per referent; annotation k is a box of its own.
    """

    def make(image_id=1, height=12, width=16, refs=((2, (1,)), (1, (1, 2)), (1, ()))):
        rng = np.random.default_rng(image_id)
        file_name = str(tmp_path / f"{image_id}.png")
        cv2.imwrite(file_name, rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        ids = sorted({id_ for _, named in refs for id_ in named})
        annotations = [
            {
                "id": id_,
                "segmentation": [[id_, 2, id_ + 4, 2, id_ + 4, 6, id_, 6]],
                "bbox": [id_, 2, 4, 4],
                "bbox_mode": 1,
                "category_id": 0,
                "iscrowd": 0,
            }
            for id_ in ids
        ]
        expressions = [
            {
                "ref_id": ref_id,
                "text": f"the {n} of {ref_id} on the left",
                "annotation_ids": list(named),
            }
            for ref_id, (count, named) in enumerate(refs)
            for n in range(count)
        ]
        for number, expression in enumerate(expressions):
            expression["expression_id"] = 100 * image_id + number
        return {
            "file_name": file_name,
            "image_id": image_id,
            "height": height,
            "width": width,
            "source": "toy",
            "annotations": annotations,
            "expressions": expressions,
        }

    return make


@pytest.fixture
def make_mapper(tokenizer):
    """Build a mapper from the settings of INPUT.RIS, in lower case, beside those of its own."""

    def make(*, is_train, affine=None, views=None, **settings):
        cfg = get_ris_cfg()
        own = {k: settings.pop(k) for k in ("resolution", "max_expressions") if k in settings}
        for key, value in settings.items():
            setattr(cfg.INPUT.RIS, key.upper(), value)
        cfg.INPUT.RIS.VIEWS = [[name, *size] for name, size in (views or {}).items()]
        cfg.INPUT.RIS.AFFINE.ENABLED = affine is not None
        for key, value in (affine or {}).items():
            setattr(cfg.INPUT.RIS.AFFINE, key.upper(), value)
        return ReferringMapper(
            is_train=is_train,
            tokenizer=tokenizer,
            augmentations=build_augmentations(cfg, is_train),
            views=build_views(cfg),
            unit=cfg.INPUT.RIS.UNIT,
            **own,
        )

    return make
