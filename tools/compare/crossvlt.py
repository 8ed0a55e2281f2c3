"""VIPA's early fusion against CrossVLT, by the same authors, on the same seeded weights.

    python tools/compare/crossvlt.py path/to/CrossVLT

Needs a checkout of yubin1219/CrossVLT at e0e3254. requests, which its copy of transformers imports
for downloads, is replaced by an empty stand-in. Swin-B, BERT-base, 480 x 480 and 21 words, as
published. Swin's and BERT's weights go through our converters of released files.
"""

import re
from pathlib import Path

import torch
from comparison import Source, Table, inside, randomise, run, stub
from torch import Tensor

from ris_d2 import load_config
from ris_d2.checkpoint import convert_state_dict
from ris_d2.modeling.vipa.variants import build_encoder

SOURCE = Source("yubin1219/CrossVLT", "e0e32546a470be805fed0ed01c2fcbeb0c73d27c", "CrossVLT.py")
CONFIG = Path(__file__).parents[2] / "configs" / "vipa_swin_b.yaml"
FIRST_LAYERS, WORDS = 6, 21
# Instance norms divide by the little that words change between positions, which enlarges rounding:
# only double precision tells it from a difference.
TOLERANCES = {torch.float32: 1e-2, torch.float64: 1e-9}

# Of a stage's exchange; CrossVLT's biases in front of instance norms (v_q, w_v) are no part of
# ours, the norms take them away.
READ = {"v_q.0": "query", "l_q": "key", "values_l": "value", "w_v.0": "out", "project_mm.0": "mix"}
FUSION = {
    r"norm\d": "norm",
    **{rf"layers\.attn1\.{re.escape(k)}": f"read.{v}" for k, v in READ.items()},
    **{rf"layers\.attn2\.{re.escape(k)}": f"read_down.{v}" for k, v in READ.items()},
    r"layers\.linear1\.(\d)": r"gate.layers.\1",
    r"layers\.linear2\.(\d)": r"gate_down.layers.\1",
}


@torch.no_grad()
def compare(checkouts: list[Path], table: Table) -> None:
    theirs = _public_model(checkouts[0])
    options = [
        "MODEL.DEVICE",
        "cpu",
        "MODEL.INIT",
        "[]",
        "MODEL.VIPA.INIT_STAGES_FROM_BERT",
        "True",
    ]
    ours = build_encoder(load_config(str(CONFIG), options)).eval()
    ours.load_state_dict(_converted(theirs.state_dict()))

    maps, words = [], []
    for stage in theirs.backbone:
        stage.register_forward_hook(lambda module, inputs, output: maps.append(output[1]))
    theirs.lang_stage4.register_forward_hook(lambda m, i, output: words.append(output[0]))
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 480, 480, generator=generator)
    input_ids = torch.randint(1000, 30000, (2, WORDS), generator=generator)
    text_mask = torch.arange(WORDS) < torch.tensor([[WORDS], [7]])
    for dtype, tolerance in TOLERANCES.items():
        for model in (theirs, ours):
            model.to(dtype)
        maps.clear(), words.clear()
        theirs(images.to(dtype), input_ids, text_mask.long())
        encoded = ours.encode_images(images.to(dtype))
        features, text = ours(encoded, torch.arange(2), input_ids, text_mask)
        for number, (our, their) in enumerate(zip(features, maps, strict=True), 1):
            table.add(f"{dtype}, F_{number}", our, their, tolerance)
        table.add(f"{dtype}, words", text[text_mask], words[0][text_mask], tolerance)


def _public_model(checkout: Path) -> torch.nn.Module:
    stub("requests")
    import CrossVLT
    from bert.modeling_bert import BertModel

    # Both would read pretrained files; all weights are drawn below.
    BertModel._init_weights = CrossVLT.SegModel._init_weights = lambda self: None
    with inside(checkout):  # it reads its BERT configs from there
        model = CrossVLT.SegModel(
            None,
            embed_dim=128,
            depths=[2, 2, 18, 2],
            num_heads=[4, 8, 16, 32],
            window_size=12,
            training=False,
        )
    return randomise(model)


def _converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    swin, bert, fusions = {}, {}, {}
    for name, value in state.items():
        if match := re.match(r"backbone\.(\d)\.(.*)", name):
            stage, rest = match.groups()
            if rest.startswith("patch_embed."):
                swin[rest] = value
            elif rest.startswith(("layers.blocks.", "layers.downsample.")):
                swin[rest.replace("layers.", f"layers.{stage}.", 1)] = value
            else:
                fusions.update(_fusion(int(stage), rest, value))
        elif match := re.match(r"lang_stage(\d)\.(.*)", name):
            bert[_bert_name(int(match[1]), match[2])] = value
    return {
        **{f"vision.{k}": v for k, v in convert_state_dict(swin, "swin").items()},
        **{f"text.{k}": v for k, v in convert_state_dict(bert, "bert").items()},
        **fusions,
    }


def _fusion(stage: int, name: str, value: Tensor) -> dict[str, Tensor]:
    module, _, kind = name.rpartition(".")
    for theirs, ours in FUSION.items():
        if match := re.fullmatch(theirs, module):
            ours = match.expand(ours)
            if kind == "bias" and ours.endswith((".query", ".out")):
                return {}
            if stage == 3 and ours.startswith("gate"):  # nothing reads what it gates
                return {}
            return {
                f"fusions.{stage}.{ours}.{kind}": value.squeeze(-1) if value.ndim > 2 else value
            }
    return {}  # projections for the alignment losses


def _bert_name(stage: int, name: str) -> str:
    """As one BERT: stage 1 has six layers, each further stage two; the first reads."""
    if stage == 1:
        return name
    layer = FIRST_LAYERS + 2 * (stage - 2)
    name = re.sub(r"^layer\.0\.", f"encoder.layer.{layer + 1}.", name)
    name = re.sub(r"^crossattention\.", f"encoder.layer.{layer}.attention.", name)
    name = re.sub(r"^(intermediate|output)\.", rf"encoder.layer.{layer}.\1.", name)
    if f".{layer}." in name:
        name = re.sub(r"\.self\.(key|value)\.", r".self.context_\1.", name)
    return name


if __name__ == "__main__":
    run(__doc__, [SOURCE], {"crossvlt": compare})
