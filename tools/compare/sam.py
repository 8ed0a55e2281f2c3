"""SAM in RISAM: encoder, neck and mask decoder against segment-anything's, same seeded weights.

    python tools/compare/sam.py path/to/segment-anything [--part vit_b decoder]

Needs a checkout of facebookresearch/segment-anything at dca509f. Images have SAM's own size, 1024;
vit_h takes about 8 GB and a few minutes on two cores.
"""

from functools import partial
from pathlib import Path

import torch
from comparison import Source, Table, randomise, run

from ris_d2.checkpoint import convert_state_dict
from ris_d2.modeling.backbone.sam_vit import RISSAMViT
from ris_d2.modeling.risam.mutual_aware_attention import MutualFeatures
from ris_d2.modeling.risam.variants import SAMMaskDecoder

SOURCE = Source(
    "facebookresearch/segment-anything",
    "dca509fe793f601edb92606367a655c15ac00fdf",
    "segment_anything/build_sam.py",
)
ENCODERS = {
    "vit_b": {"embed_dim": 768, "depth": 12, "num_heads": 12, "global_blocks": (2, 5, 8, 11)},
    "vit_l": {"embed_dim": 1024, "depth": 24, "num_heads": 16, "global_blocks": (5, 11, 17, 23)},
    "vit_h": {"embed_dim": 1280, "depth": 32, "num_heads": 16, "global_blocks": (7, 15, 23, 31)},
}
TOLERANCE = 1e-4  # sums of up to 5,120 products through 32 layers
DECODER_TOLERANCE = 1e-5


@torch.no_grad()
def compare_encoder(checkouts: list[Path], table: Table, *, name: str) -> None:
    from segment_anything import sam_model_registry

    size = ENCODERS[name]
    theirs = randomise(sam_model_registry[name]())
    ours = RISSAMViT(image_size=(1024, 1024), neck=True, **size).eval()
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), "sam"))

    outputs = []
    for block in size["global_blocks"]:
        theirs.image_encoder.blocks[block].register_forward_hook(
            lambda module, inputs, output: outputs.append(output.permute(0, 3, 1, 2))
        )
    images = torch.randn(1, 3, 1024, 1024, generator=torch.Generator().manual_seed(1))
    neck = theirs.image_encoder(images)
    features = ours(images)
    for number, output in enumerate(outputs, 1):
        table.add(f"{name}, global block {number}", features[f"global{number}"], output, TOLERANCE)
    table.add(f"{name}, neck", features["neck"], neck, TOLERANCE)


@torch.no_grad()
def compare_decoder(checkouts: list[Path], table: Table) -> None:
    """The words of two sentences as sparse prompts, no mask as the dense one, the single mask."""
    from segment_anything import sam_model_registry

    theirs = randomise(sam_model_registry["vit_b"]())
    ours = SAMMaskDecoder(dim=256, num_heads=8).eval()
    ours.load_state_dict(convert_state_dict(theirs.state_dict(), "sam_decoder"))

    generator = torch.Generator().manual_seed(1)
    grid, words = (64, 64), 17
    regions = torch.randn(2, 64 * 64, 256, generator=generator)
    prompts = torch.randn(2, words, 256, generator=generator)
    dense = theirs.prompt_encoder.no_mask_embed.weight[:, :, None, None].expand(-1, -1, *grid)
    masks = [
        theirs.mask_decoder(
            image_embeddings=image.T.unflatten(1, grid)[None],
            image_pe=theirs.prompt_encoder.get_dense_pe(),
            sparse_prompt_embeddings=sentence[None],
            dense_prompt_embeddings=dense,
            multimask_output=False,
        )[0][:, 0]
        for image, sentence in zip(regions, prompts, strict=True)
    ]
    text_mask = torch.ones(2, words, dtype=torch.bool)
    logits, _ = ours(MutualFeatures(regions=regions, words=prompts), text_mask, grid)
    table.add("mask decoder, logits", logits, torch.cat(masks), DECODER_TOLERANCE)


if __name__ == "__main__":
    encoders = {name: partial(compare_encoder, name=name) for name in ENCODERS}
    run(__doc__, [SOURCE], {**encoders, "decoder": compare_decoder})
