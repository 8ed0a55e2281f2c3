import math
import re

import pytest
import torch
from detectron2.modeling import build_model

C, FFN, EXISTENCE_FFN, PIXEL_FFN = 256, 384, 512, 320
BEIT3, RES2, RES3, RES4, RES5 = 32, 8, 16, 32, 64  # channels
LINEAR = C**-0.5  # torch's linear layers, biases too
XAVIER = math.sqrt(6 / (C + C))
FUSED = math.sqrt(6 / (C + 3 * C))  # queries, keys, values of nn.MultiheadAttention: one matrix

# What the public code (Dmmm1997/DeRIS) draws each random tensor from: the bound of a uniform
# distribution, or in brackets the standard deviation of a normal one.
STARTS = {
    r"perception\.layers\.\d\.(self|cross)_attention\.(query|key|value)\.weight": FUSED,
    r"perception\.layers\.\d\.(self|cross)_attention\.out\.weight": XAVIER,
    r"perception\.layers\.\d\.(self|cross)_attention\.\w+\.bias": 0,
    r"perception\.layers\.\d\.ffn\.\d\.weight": math.sqrt(6 / (C + FFN)),
    r"perception\.layers\.\d\.ffn\.0\.bias": LINEAR,
    r"perception\.layers\.\d\.ffn\.2\.bias": FFN**-0.5,
    r"perception\.mask_embed\.\d\.(weight|bias)": LINEAR,
    # f_m = Conv(Concat(f_h4, f_v)) is one convolution of 2 C channels.
    r"perception\.(mask|visual)_proj\.(weight|bias)": (2 * C) ** -0.5,
    r"perception\.(query_position|level_embed)\.weight": [1.0],
    r"perception\.pixel_decoder\.level_embed": [1.0],
    r"perception\.pixel_decoder\.input_proj\.0\.0\.weight": math.sqrt(6 / (C + RES5)),
    r"perception\.pixel_decoder\.input_proj\.1\.0\.weight": math.sqrt(6 / (C + RES4)),
    r"perception\.pixel_decoder\.input_proj\.2\.0\.weight": math.sqrt(6 / (C + RES3)),
    r"perception\.pixel_decoder\.input_proj\.\d\.0\.bias": 0,
    r"perception\.pixel_decoder\.layers\.\d\.attention\.(value|out)\.weight": XAVIER,
    r"perception\.pixel_decoder\.layers\.\d\.attention\.(value|out|weights)\.bias": 0,
    r"perception\.pixel_decoder\.layers\.\d\.attention\.(offsets|weights)\.weight": 0,
    r"perception\.pixel_decoder\.layers\.\d\.ffn\.\d\.weight": math.sqrt(6 / (C + PIXEL_FFN)),
    r"perception\.pixel_decoder\.layers\.\d\.ffn\.0\.bias": LINEAR,
    r"perception\.pixel_decoder\.layers\.\d\.ffn\.2\.bias": PIXEL_FFN**-0.5,
    r"perception\.pixel_decoder\.lateral\.0\.weight": math.sqrt(3 / RES2),
    r"perception\.pixel_decoder\.output\.0\.weight": math.sqrt(3 / (9 * C)),
    r"perception\.pixel_decoder\.mask_features\.weight": math.sqrt(3 / C),
    r"perception\.pixel_decoder\.(lateral\.0|output\.0|mask_features)\.bias": 0,
    r"cognition\.(visual_proj|text_proj|query_proj)\.(weight|bias)": BEIT3**-0.5,
    r"cognition\.query\.weight": [1.0],
    # Mask2Former's self-attention, torch's, and one of four plain linear layers.
    r"cognition\.layers\.\d\.instance_attention\.(query|key|value)\.weight": FUSED,
    r"cognition\.layers\.\d\.instance_attention\.out\.weight": XAVIER,
    r"cognition\.layers\.\d\.instance_attention\.\w+\.bias": 0,
    r"cognition\.layers\.\d\.instance_text\.self_attention\.(query|key|value)\.weight": FUSED,
    r"cognition\.layers\.\d\.instance_text\.self_attention\.out\.weight": LINEAR,
    r"cognition\.layers\.\d\.instance_text\.self_attention\.\w+\.bias": 0,
    r"cognition\.layers\.\d\.instance_text\.text_attention\.\w+\.(weight|bias)": LINEAR,
    r"cognition\.layers\.\d\.instance_text\.ffn\.0\.(weight|bias)": LINEAR,
    r"cognition\.layers\.\d\.instance_text\.ffn\.3\.(weight|bias)": FFN**-0.5,
    r"cognition\.layers\.\d\.fusion\.(weight|bias)": (2 * C) ** -0.5,
    r"cognition\.referring\.(weight|bias)": LINEAR,
    r"cognition\.existence\.layers\.\d\.\w+_attention\.(query|key|value)\.weight": FUSED,
    r"cognition\.existence\.layers\.\d\.\w+_attention\.out\.weight": LINEAR,
    r"cognition\.existence\.layers\.\d\.\w+_attention\.\w+\.bias": 0,
    r"cognition\.existence\.layers\.\d\.ffn\.0\.(weight|bias)": LINEAR,
    r"cognition\.existence\.layers\.\d\.ffn\.3\.(weight|bias)": EXISTENCE_FFN**-0.5,
    r"cognition\.existence\.logit\.(weight|bias)": LINEAR,
}
# Encoders have tests of their own, norms are 1 and 0, the heads' directions are no random numbers.
ELSEWHERE = r"perception\.backbone\.|cognition\.encoder\.|.*(norm|proj\.\d\.1|lateral\.1|output\.1|offsets)\."


def test_each_random_tensor_starts_from_the_released_distribution(deris_cfg):
    deris_cfg.MODEL.DERIS.merge_from_list(
        [
            *("DIM", C, "NUM_HEADS", 8, "FFN_DIM", FFN, "NUM_QUERIES", 20),
            *("PIXEL_DECODER_LAYERS", 1, "PIXEL_DECODER_FFN_DIM", PIXEL_FFN),
            *("EXISTENCE_FFN_DIM", EXISTENCE_FFN),
        ]
    )
    torch.manual_seed(0)
    seen = set()
    for name, value in build_model(deris_cfg).named_parameters():
        fitting = [pattern for pattern in STARTS if re.fullmatch(pattern, name)]
        if re.match(ELSEWHERE, name) and not fitting:
            continue
        assert len(fitting) == 1, name
        seen.update(fitting)
        start = STARTS[fitting[0]]
        if isinstance(start, list):
            expected = start[0]
        else:
            expected = start / math.sqrt(3)
            assert value.abs().max() <= start * (1 + 1e-6), name
        # The standard error of a standard deviation is below 1 / sqrt(2 n).
        std = value.square().mean().sqrt().item()
        assert std == pytest.approx(expected, rel=3 / math.sqrt(value.numel())), name
    assert seen == STARTS.keys()
