"""What each method shows of itself: one function per method, after the figures of its paper."""

from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from ris_d2.modeling.asda import ASDA
from ris_d2.modeling.risam import RISAM
from ris_d2.modeling.risam.variants import TransformerEncoder
from ris_d2.modeling.segmenter import ReferringSegmenter
from ris_d2.modeling.shared_ris import SharedRIS
from ris_d2.modeling.shared_ris.fpn import SharedFPN
from ris_d2.modeling.vipa import VIPA

from .explanation import Explanation
from .recorder import AttentionRecorder, row_entropy


@torch.no_grad()
def explanations(model: ReferringSegmenter, batched_inputs: list[dict]) -> list[Explanation]:
    """Attention maps for people and analyses.

    Args:
        model: in evaluation mode.
        batched_inputs: as in evaluation.

    Returns:
        per unit, the ``Explanation`` of its expressions, on the CPU.

    Raises:
        NotImplementedError: there is no ``explain`` for the model's method.
    """
    image_index, input_ids, text_mask = model._collate_text(batched_inputs)
    parts = []
    with model._autocast():
        features = model.encode_images(*model._collate_images(batched_inputs))
        for start in range(0, len(input_ids), model.max_expressions):
            part = slice(start, start + model.max_expressions)
            explained = explain(
                model, features, image_index[part], input_ids[part], text_mask[part]
            )
            parts.append(explained.apply(lambda x: x.float().cpu()))
    whole = Explanation.concatenate(parts)
    rows = [image_index.cpu() == i for i in range(len(batched_inputs))]
    return [whole.apply(lambda x, own=own: x[own]) for own in rows]


@singledispatch
def explain(
    model: ReferringSegmenter,
    features: Any,
    image_index: Tensor,
    input_ids: Tensor,
    text_mask: Tensor,
) -> Explanation:
    """Say where E expressions look; arguments as ``model.segment``.

    A method's function runs ``segment`` under ``AttentionRecorder`` and picks what its paper shows;
    your own method's is made known by ``explain.register``, in the module that --import names.
    """
    raise NotImplementedError(f"{type(model).__name__} has no attention maps to show")


@explain.register
def explain_shared_ris(
    model: SharedRIS, features: Any, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
) -> Explanation:
    """Figs. 7 and 8: the patches that the textual [CLS] attends in encoder, FPN and decoder.

    The FPN's map is the mean over its levels, the encoder's and the decoder's that of the last
    layer; all are means over heads.
    """
    last = f"encoder.encoder.layers.{model.encoder.depth - 1}.self_attn"
    num_levels = len(model.fpn.fusions) if isinstance(model.fpn, SharedFPN) else 0
    levels = [f"fpn.fusions.{i}" for i in range(num_levels)]
    layers = [f"decoder.layers.{i}.fusion" for i in range(len(model.decoder.layers))]
    with AttentionRecorder(model, [last, *levels, *layers]) as recorder:
        model.segment(features, image_index, input_ids, text_mask)
    maps = {"encoder": _sentence_row(model, recorder.weights[last][-1])}
    if levels:
        rows = [_sentence_row(model, recorder.weights[level][-1]) for level in levels]
        maps["FPN"] = sum(rows) / len(rows)
    if not layers:
        return Explanation(maps=maps)
    maps["decoder"] = _sentence_row(model, recorder.weights[layers[-1]][-1])
    (vision, text), _ = recorder.inputs[layers[0]][0]
    return Explanation(
        maps=maps,
        entropy={
            f"decoder {number}": row_entropy(recorder.weights[name][-1])
            for number, name in enumerate(layers, 1)
        },
        pixels=vision[:, 1:].unflatten(1, model.encoder.grid),
        tokens=text,
        attended=text_mask,
    )


def _sentence_row(model: SharedRIS, weights: Tensor) -> Tensor:
    """Weights of the textual [CLS] on the patches: (E, heads, Q, K) -> (E, H/p, W/p).

    Keys are the visual tokens, or those and the text; then queries are both, too, else the text
    alone.
    """
    num_vision = 1 + model.encoder.grid[0] * model.encoder.grid[1]
    query = num_vision if weights.shape[-1] > num_vision else 0
    return weights[:, :, query, 1:num_vision].mean(1).unflatten(1, model.encoder.grid)


@explain.register
def explain_vipa(
    model: VIPA, features: Any, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
) -> Explanation:
    """Figs. 1, 5 and 6: what each token retrieves, and where the decoder's pixels attend it.

    Maps of the L tokens:
        "relevance" (E, L, h, w), on the grid of F_4: cosines S_c; not with language as keys.
        "retrieved" (E, L, h, w): 1 where the visual tokens lie that a token retrieves; 0 everywhere
        for a token that is no cue.
        "decoder i" (E, L, h_i, w_i), i = 4 ... 1 (strides 32 ... 4): the weight that the pixels of
        stage i give to each token's key, mean over heads. Not without retrieval, where keys are no
        tokens of the sentence.
    Entropies are called "decoder i", too; pixels and tokens are those of the first attention.
    """
    stages = list(model.decoder.attend)
    names = [f"decoder.attend.{stage}" for stage in stages]
    with AttentionRecorder(model, [*names, "decoder"]) as recorder:
        outputs = model.segment(features, image_index, input_ids, text_mask)
    features, _, keep = recorder.inputs["decoder"][0]
    sizes = [feature.shape[-2:] for feature in features]
    maps = {name: outputs[name] for name in ("relevance", "retrieved") if name in outputs}
    if "retrieved" in maps:
        maps["retrieved"] = maps["retrieved"] & keep[..., None, None]
    entropy = {}
    for stage, name in zip(stages, names, strict=True):
        weights = recorder.weights[name][0]
        entropy[f"decoder {stage}"] = row_entropy(weights)
        if keep is not None:
            rows = weights.mean(1).transpose(1, 2)
            maps[f"decoder {stage}"] = rows.unflatten(2, sizes[int(stage) - 1])
    pixels, tokens, _ = recorder.inputs[names[0]][0]
    return Explanation(
        maps=maps,
        entropy=entropy,
        pixels=pixels.unflatten(1, sizes[int(stages[0]) - 1]),
        tokens=tokens,
        attended=tokens.new_ones(tokens.shape[:2]) if keep is None else keep,
    )


@explain.register
def explain_risam(
    model: RISAM, features: Any, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
) -> Explanation:
    """Fig. 7, of the last block: the words' weights at each region, and the regions' of each word.

    Of MODEL.RISAM.FUSION te they are those of the last layer, mean over heads, which shares them
    out among regions and words together; conv and none have no attention between the two, and no
    maps.
    """
    names = []
    if isinstance(model.fusion, TransformerEncoder):
        names = [f"fusion.layers.{len(model.fusion.layers) - 1}"]
    with AttentionRecorder(model, names) as recorder:
        fused = model.fuse(features, image_index, input_ids, text_mask)
    of_words, of_regions = fused.vision_guided, fused.language_guided
    for name in names:
        weights, count = recorder.weights[name][0].mean(1), fused.regions.shape[1]
        of_words, of_regions = weights[:, :count, count:], weights[:, count:, :count]
    maps = {}
    if of_words is not None:
        maps["vision-guided"] = of_words.transpose(1, 2)
    if of_regions is not None:
        maps["language-guided"] = of_regions
    return Explanation(maps={name: m.unflatten(2, model.grid) for name, m in maps.items()})


@explain.register
def explain_asda(
    model: ASDA, features: Any, image_index: Tensor, input_ids: Tensor, text_mask: Tensor
) -> Explanation:
    """Fig. 4: coarse and fine features, as each pixel's distance from the mean pixel."""
    outputs = model.segment(features, image_index, input_ids, text_mask)
    maps = {name: outputs[name] for name in ("coarse", "fine") if name in outputs}
    return Explanation(
        maps={
            name: (x - x.mean((2, 3), keepdim=True)).float().norm(dim=1) for name, x in maps.items()
        }
    )
