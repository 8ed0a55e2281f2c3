"""BEiT-3: our backbone against torchscale's, on the same seeded weights of the base model.

    python tools/compare/beit3.py path/to/torchscale

Needs a checkout of microsoft/torchscale at 4d1e0e8, and einops. fairscale, which it imports for
training alone, is replaced by an empty stand-in.
"""

from pathlib import Path

import torch
from comparison import Source, Table, randomise, run, stub

from ris_d2.checkpoint import convert_state_dict
from ris_d2.modeling.backbone.beit3 import RISBEiT3

SOURCE = Source(
    "microsoft/torchscale", "4d1e0e82e5adf86dd424f1463192635b73fc8efc", "torchscale/model/BEiT3.py"
)
SIZE, PATCH = 224, 16
TOLERANCE = 1e-5


@torch.no_grad()
def compare(checkouts: list[Path], table: Table) -> None:
    stub("fairscale.nn")
    from torchscale.architecture.config import EncoderConfig
    from torchscale.model.BEiT3 import BEiT3

    width = {"encoder_embed_dim": 768, "encoder_attention_heads": 12, "encoder_layers": 12}
    config = EncoderConfig(
        multiway=True,
        vocab_size=64010,
        img_size=SIZE,
        patch_size=PATCH,
        normalize_output=True,
        no_output_layer=True,
        encoder_ffn_embed_dim=4 * 768,
        max_source_positions=1024,
        **width,
    )
    theirs = randomise(BEiT3(config))
    ours = RISBEiT3(image_size=(SIZE, SIZE)).eval()
    released = {f"beit3.{name}": value for name, value in theirs.state_dict().items()}
    converted = convert_state_dict(released, "beit3")
    converted.pop("vision_embed.mask_token")  # of the pre-training
    ours.load_state_dict(converted)

    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, SIZE, SIZE, generator=generator)
    input_ids = torch.randint(0, 64010, (2, 20), generator=generator)
    text_mask = torch.arange(20) < torch.tensor([[20], [7]])

    result = theirs(input_ids, images, text_padding_position=~text_mask)
    split = result["multiway_split_position"]
    tokens = result["encoder_out"]
    vision, text = ours.joint(ours.embed_image(images), input_ids, text_mask)
    table.add("vision and text, vision tokens", vision, tokens[:, :split], TOLERANCE)
    # What stands at padded places reaches nothing, and is not the same.
    table.add("vision and text, words", text[text_mask], tokens[:, split:][text_mask], TOLERANCE)

    alone = theirs(visual_tokens=images)["encoder_out"][:, 1:]
    last = ours(images)["last"].flatten(2).transpose(1, 2)
    table.add("vision alone", last, alone, TOLERANCE)

    words = theirs(input_ids, text_padding_position=~text_mask)["encoder_out"]
    encoded = ours.encode(None, ours.embed_text(input_ids, text_mask), text_mask)[ours.depth]
    text = ours.encoder.layer_norm(encoded)[1]
    table.add("text alone", text[text_mask], words[text_mask], TOLERANCE)


if __name__ == "__main__":
    run(__doc__, [SOURCE], {"beit3": compare})
