"""DeRIS: masks, scores and existence of all rounds, and losses, against the public code.

    python tools/compare/deris.py path/to/DeRIS path/to/torchscale [--part refcoco_b losses]

Needs checkouts of Dmmm1997/DeRIS at 2406687 and microsoft/torchscale at 4d1e0e8; addict, einops.
The models have the same seeded weights, which go through our converter of released checkpoints; the
settings are the public config files'. Of mmcv a registry is read and replaced by ours; the compiled
deformable attention is replaced by the public code's own PyTorch version.
"""

import importlib
import runpy
from functools import partial
from pathlib import Path

import numpy as np
import pycocotools.mask as maskUtils
import torch
import torch.nn.functional as F
from comparison import Source, Table, inside, randomise, run, stub, unit
from torch import Tensor

from ris_d2 import load_config
from ris_d2.checkpoint import convert_state_dict
from ris_d2.modeling.deris import DeRIS
from ris_d2.modeling.deris.criterion import DeRISCriterion

SOURCE = Source(
    "Dmmm1997/DeRIS",
    "2406687c1feb9edd2802521f2db5818ac17dbc9d",
    "deris/models/branchs/perception_branch/perception_branch_loopback.py",
)
TORCHSCALE = Source(
    "microsoft/torchscale",
    "4d1e0e82e5adf86dd424f1463192635b73fc8efc",
    "torchscale/component/multiway_network.py",
)
CONFIGS = Path(__file__).parents[2] / "configs"
PARTS = {  # their config, ours
    "refcoco_b": ("configs/refcoco/DERIS-B-refcoco.py", "deris_swin_s.yaml"),
    "refcoco_l": ("configs/refcoco/DERIS-L-refcoco.py", "deris_swin_b.yaml"),
    "grefcoco_b": ("configs/gres/DERIS-B-grefcoco.py", "deris_swin_s_grefcoco.yaml"),
}
TOLERANCE = 1e-3  # mask logits are about 20; a wrong detail shows from 1e-2 on
LOSS_TOLERANCE = 1e-3  # of sums of 40 terms on 12,544 points each


class Registry(dict):
    """What DeRIS asks of mmcv's."""

    def register_module(self):
        def register(cls):
            self[cls.__name__] = cls
            return cls

        return register

    def build(self, cfg):
        arguments = dict(cfg)
        return self[arguments.pop("type")](**arguments)


@torch.no_grad()
def compare(checkouts: list[Path], table: Table, *, name: str) -> None:
    their_file, our_file = PARTS[name]
    settings = runpy.run_path(str(checkouts[0] / their_file))
    understanding, perception = _public_branches(checkouts[0], settings["model"])
    options = ["MODEL.DEVICE", "cpu", "MODEL.INIT", "[]"]
    options += ["MODEL.DERIS.INSTANCE_ATTENTION", "released"]
    ours = DeRIS(load_config(str(CONFIGS / our_file), options)).eval()
    released = {
        **{f"understanding_branch.{key}": v for key, v in understanding.state_dict().items()},
        **{f"perception_branch.{key}": v for key, v in perception.state_dict().items()},
    }
    ours.load_state_dict(convert_state_dict(released, "deris"))

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 384, 384, generator=generator)
    small = torch.randn(2, 3, 224, 224, generator=generator)
    length = settings["max_token"]
    input_ids = torch.randint(4, 64000, (2, length), generator=generator)
    text_mask = torch.arange(length) < torch.tensor([[length], [7]])
    input_ids[~text_mask] = 1

    # One sentence at a time: the released instance attention runs along the batch, and published
    # results depend on what stood in it.
    their_results, our_results = [], []
    for i in range(len(images)):
        one = slice(i, i + 1)
        their_results.append(
            _theirs(
                understanding, perception, images[one], small[one], input_ids[one], ~text_mask[one]
            )
        )
        features = ours.encode_images(images[one], {"cognition": small[one]})
        outputs = ours.segment(features, torch.tensor([0]), input_ids[one], text_mask[one])
        our_results.append(_ours(outputs, images.shape[-2:]))
    for what in our_results[0]:
        our, their = (torch.cat([x[what] for x in y]) for y in (our_results, their_results))
        table.add(f"{name}, {what}", our, their, TOLERANCE)
    one = slice(1, 2)
    table.race(
        name,
        lambda: _theirs(
            understanding, perception, images[one], small[one], input_ids[one], ~text_mask[one]
        ),
        ours,
        lambda count: unit(
            torch.randint(256, (3, 384, 384), dtype=torch.uint8),
            {"cognition": torch.randint(256, (3, 224, 224), dtype=torch.uint8)},
            input_ids[one].repeat(count, 1),
            text_mask[one].repeat(count, 1),
        ),
    )


def _theirs(
    understanding: torch.nn.Module,
    perception: torch.nn.Module,
    image: Tensor,
    small: Tensor,
    input_ids: Tensor,
    pads: Tensor,
) -> dict[str, Tensor]:
    read = understanding.pre_forward(small, input_ids, pads)
    result = perception(image, read["img_feat"], read["text_feat"], pads, read["query_feat"])
    judged = understanding.post_forward(
        result["query_feat"], result, None, read["text_feat"], pads, read["cls_feat"]
    )
    named = {"existence": judged["pred_existence"]}
    last = {"pred_masks": result["pred_masks"], "pred_logits": result["pred_refer_logits"]}
    for number, x in enumerate([*result["aux_outputs_refer"], last]):
        named[f"masks of round {number}"] = x["pred_masks"]
        named[f"scores of round {number}"] = x["pred_logits"]
    return named


def _ours(outputs: dict, size: tuple[int, int]) -> dict[str, Tensor]:
    named = {"existence": outputs["existence_logits"][:, None]}
    for number, x in enumerate(outputs["rounds"]):
        # As where masks are restored, and as released.
        masks = F.interpolate(x["mask_logits"], size=size, mode="bilinear", align_corners=True)
        named[f"masks of round {number}"] = masks
        named[f"scores of round {number}"] = x["class_logits"]
    return named


@torch.no_grad()
def compare_losses(checkouts: list[Path], table: Table) -> None:
    """Four rounds of random predictions; three sentences with two targets, none, and one.

    Points are drawn at random on both sides: here both get the same ones, for every mask.
    """
    settings = runpy.run_path(str(checkouts[0] / PARTS["refcoco_b"][0]))["model"]
    registry = _stand_in(checkouts[0])
    importlib.import_module(
        "deris.models.heads.simplehead_Independent_matching"
    )  # registers itself
    head = dict(settings["head"])
    with inside(checkouts[0]):
        theirs = registry.build(head)
    options = ["MODEL.DEVICE", "cpu", "MODEL.INIT", "[]"]
    ours = DeRISCriterion(load_config(str(CONFIGS / PARTS["refcoco_b"][1]), options))

    generator = torch.Generator().manual_seed(1)
    rounds = [
        {
            "mask_logits": 3 * torch.randn(3, 10, 96, 96, generator=generator),
            "class_logits": torch.randn(3, 10, 2, generator=generator),
        }
        for _ in range(4)
    ]
    existence = torch.randn(3, generator=generator)
    masks = torch.zeros(3, 384, 384, dtype=torch.bool)
    for i, mask in enumerate(masks):
        mask[40 * i : 120 + 90 * i, 30 : 140 + 60 * i] = True
    referred = [[0, 2], [], [1]]

    parts = [maskUtils.encode(np.asfortranarray(mask.numpy().astype(np.uint8))) for mask in masks]
    shown = [
        {
            # As the public model gives them.
            "pred_masks": F.interpolate(
                x["mask_logits"], scale_factor=4, mode="bilinear", align_corners=True
            ),
            "pred_boxes": torch.full((3, 10, 4), 0.5),
            "pred_logits": x["class_logits"],
        }
        for x in rounds
    ]
    targets = {
        "bbox": [torch.tensor([[10.0, 10, 90, 90]] * 3)] * 3,
        "mask_parts": [parts] * 3,
        "img_metas": [{"refer_target_index": i, "img_shape": (384, 384)} for i in referred],
    }
    points = torch.rand(1, 3 * 12544, 2, generator=generator)
    random, torch.rand = torch.rand, lambda *size, **_: points[:, : size[1]].repeat(size[0], 1, 1)
    try:
        predictions = {**shown[-1], "pred_existence": existence, "aux_outputs": shown[:-1]}
        their_losses = theirs.forward_train(predictions, targets)
        wanted = torch.tensor([[i in row for i in range(3)] for row in referred])
        our_losses = ours(rounds, existence, [masks], [wanted], ["random"] * 3)
    finally:
        torch.rand = random
    for name, terms in {
        "loss_class": ("loss_class",),
        "loss_mask": ("loss_mask", "loss_dice"),
        "loss_label_nt": ("loss_existence",),
    }.items():
        our = sum(value for key, value in our_losses.items() if key.startswith(terms))
        table.add(f"losses, {name}", our, their_losses[name], LOSS_TOLERANCE)


def _stand_in(checkout: Path) -> Registry:
    registry = Registry()
    # The packages' own __init__ import mmdet for parts that are not compared; what is compared
    # stands in files that can be imported one by one.
    for package in ("deris.models", "deris.models.heads", "deris.models.vis_encs", "deris.layers"):
        stub(package, __path__=[str(checkout / package.replace(".", "/"))])
    stub("deris", __path__=[str(checkout / "deris")])
    stub("deris.models", VIS_ENCODERS=registry, HEADS=registry)
    stub("deris.models.builder", BRANCHS=registry, build_vis_enc=registry.build)
    stub("deris.models.vis_encs.beit.utils", load_state_dict=None)
    stub("deris.models.vis_encs.beit", __path__=[str(checkout / "deris/models/vis_encs/beit")])
    stub("fairscale.nn")
    stub("MultiScaleDeformableAttention", ms_deform_attn_forward=None)
    branchs = "deris.models.branchs"
    stub(branchs, __path__=[str(checkout / branchs.replace(".", "/"))])
    if not torch.cuda.is_available():  # a constant is sent to the GPU in the forward pass
        torch.Tensor.cuda = lambda tensor: tensor
    return registry


def _public_branches(checkout: Path, settings: dict) -> tuple[torch.nn.Module, torch.nn.Module]:
    registry = _stand_in(checkout)
    from deris.models.branchs.perception_branch import PerceptionBranchLoopBack
    from deris.models.branchs.understanding_branch import UnderstandingBranchLoopBack
    from deris.models.vis_encs.beit.beit3 import BEIT3

    registry["BEIT3"] = BEIT3
    understanding = {**settings["understanding_branch"]}
    understanding["vis_enc"] = {**understanding["vis_enc"], "pretrain": None}
    perception = {**settings["perception_branch"], "pretrain_weights": None}
    for arguments in (understanding, perception):
        arguments.pop("type")
    with inside(checkout):
        branches = UnderstandingBranchLoopBack(**understanding), PerceptionBranchLoopBack(
            **perception
        )
    return tuple(randomise(branch, seed) for seed, branch in enumerate(branches))


if __name__ == "__main__":
    models = {name: partial(compare, name=name) for name in PARTS}
    run(__doc__, [SOURCE, TORCHSCALE], {**models, "losses": compare_losses})
