import sys
from pathlib import Path

import pytest
import torch
from detectron2.structures import BitMasks, Instances

from ris_d2 import get_ris_cfg

sys.path.append(str(Path(__file__).parent))  # helper modules of these tests


@pytest.fixture(autouse=True)
def all_placed(placed):
    """Every test here follows --device."""


@pytest.fixture
def tiny_cfg(device):
    """Shared-RIS with a grid of 4 x 6 patches; the mask head upsamples to 16 x 24."""
    cfg = get_ris_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", device, "MODEL.META_ARCHITECTURE", "SharedRIS"),
            *("MODEL.PIXEL_MEAN", [127.5] * 3, "MODEL.PIXEL_STD", [127.5] * 3),
            *("INPUT.RIS.SIZE", (32, 48), "MODEL.RIS.BEIT3.PATCH_SIZE", 8),
            *("MODEL.RIS.BEIT3.EMBED_DIM", 32, "MODEL.RIS.BEIT3.DEPTH", 2),
            *("MODEL.RIS.BEIT3.NUM_HEADS", 2, "MODEL.RIS.BEIT3.VOCAB_SIZE", 50),
            *("MODEL.SHARED_RIS.DIM", 16, "MODEL.SHARED_RIS.NUM_HEADS", 2),
            *("MODEL.SHARED_RIS.STAGES", (1, 2)),
        ]
    )
    return cfg


@pytest.fixture
def make_inputs():
    """Model inputs of one image: two instances; E expressions, the last without target."""

    def make(num_expressions=3, size=(32, 48), seed=0, lengths=None):
        generator = torch.Generator().manual_seed(seed)
        height, width = size
        masks = torch.zeros(2, height, width, dtype=torch.bool)
        masks[0, : height // 2, : width // 2] = True
        masks[1, height // 2 :, width // 2 :] = True
        targets = torch.zeros(num_expressions, 2, dtype=torch.bool)
        targets[:-1, 0] = True
        targets[1:-1, 1] = True
        lengths = lengths or [6] * num_expressions
        text_mask = torch.arange(8) < torch.tensor(lengths)[:, None]
        ids = torch.randint(4, 50, (num_expressions, 8), generator=generator)
        instances = Instances(size)
        instances.gt_masks = BitMasks(masks)
        return {
            "image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8),
            "views": {},
            "content_box": (0.0, 0.0, float(width), float(height)),
            "height": 40,
            "width": 60,
            "image_id": seed,
            "file_name": f"{seed}.jpg",
            "expressions": [{"expression_id": 100 * seed + i} for i in range(num_expressions)],
            "input_ids": torch.where(text_mask, ids, 1),
            "text_mask": text_mask,
            "instances": instances,
            "targets": targets,
        }

    return make


@pytest.fixture
def without_gradient():
    """Names of the trainable parameters without gradient, but for those whose true gradient is zero:
    the bias of the keys of an attention adds the same to each of a query's scores."""

    def names(model):
        return [
            name
            for name, p in model.named_parameters()
            if p.requires_grad
            and (p.grad is None or not p.grad.any())
            and not name.endswith(("key.bias", "k_proj.bias", "k_proj.A.bias", "k_proj.B.bias"))
        ]

    return names


@pytest.fixture
def existence_differs():
    """Whether the existence scores of a model change when the image does, and when the sentences do."""

    def differs(model, inputs, other):
        def scores(**changes):
            (output,) = model.eval()([{**inputs, **changes}])
            return torch.tensor([result["score"] for result in output["referring"]])

        sentences = {key: other[key] for key in ("input_ids", "text_mask")}
        changed = (scores(image=other["image"]), scores(**sentences))
        return [((x - scores()).abs() > 1e-6).all().item() for x in changed]

    return differs


@pytest.fixture
def fit_one_image():
    """Train 60 steps on one image; returns the last loss as a share of the first."""

    def fit(model, inputs):
        optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), 3e-3)
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = sum(model([inputs]).values())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[-1] / losses[0]

    return fit
