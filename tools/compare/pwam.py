"""LAVT's pixel-word attention (Shared-RIS's Table IV), on the same seeded weights.

    python tools/compare/pwam.py path/to/LAVT-RIS

Needs a checkout of yz93/LAVT-RIS at 1da0af9. mmseg and mmcv, which its backbone imports for logging
and loading, are replaced by empty stand-ins.
"""

from pathlib import Path

import torch
from comparison import Source, Table, randomise, run, stub

from ris_d2.modeling.shared_ris.variants import PixelWordAttention

SOURCE = Source("yz93/LAVT-RIS", "1da0af9f21b637c0cae9ea1363d2dd9b40e19628", "lib/backbone.py")
DIM, PIXELS, WORDS = 768, 900, 20
TOLERANCE = 1e-4
# LAVT's module -> ours. Its biases in front of instance norms (f_query, W) are no part of ours: the
# norms take them away.
NAMES = {
    "image_lang_att.f_query.0": "query",
    "image_lang_att.f_key.0": "key",
    "image_lang_att.f_value.0": "value",
    "image_lang_att.W.0": "out",
    "vis_project.0": "pixel",
    "project_mm.0": "product",
}


@torch.no_grad()
def compare(checkouts: list[Path], table: Table) -> None:
    stub("mmseg.utils")
    stub("lib.mmcv_custom")
    # The stand-in is inside the package lib, of which the rest is the checkout's.
    stub("lib", __path__=[str(checkouts[0] / "lib")])
    from lib.backbone import PWAM

    theirs = randomise(PWAM(DIM, DIM, DIM, DIM, DIM, num_heads=1))
    norm = randomise(torch.nn.LayerNorm(DIM))  # LAVT's, between its PWAM and its decoder
    state = {f"norm.{name}": value for name, value in norm.state_dict().items()}
    for name, value in theirs.state_dict().items():
        module, _, kind = name.rpartition(".")
        if kind == "weight":
            state[f"{NAMES[module]}.weight"] = value[:, :, 0]
        elif NAMES[module] not in ("query", "out"):
            state[f"{NAMES[module]}.bias"] = value
    ours = PixelWordAttention(dim=DIM).eval()
    ours.load_state_dict(state)

    generator = torch.Generator().manual_seed(1)
    vision = torch.randn(2, PIXELS, DIM, generator=generator)
    text = torch.randn(2, WORDS, DIM, generator=generator)
    text_mask = torch.arange(WORDS) < torch.tensor([[WORDS], [7]])
    expected = norm(theirs(vision, text.transpose(1, 2), text_mask[..., None].float()))
    table.add("PWAM", ours(vision, text, text_mask), expected, TOLERANCE)


if __name__ == "__main__":
    run(__doc__, [SOURCE], {"pwam": compare})
