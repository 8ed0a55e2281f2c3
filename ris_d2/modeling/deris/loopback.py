"""Loopback synergy: how queries travel between perception and cognition."""

from typing import Any

from torch import Tensor

from ..options import check_choice
from .cognition import CognitionBranch
from .perception import PerceptionBranch

QUERY_FLOWS = ("loopback", "p_to_c", "c_to_p", "hierarchical")


def cognition_rounds(query_flow: str, num_rounds: int) -> list[int]:
    """Rounds 0..N_r that end with a cognition layer.

    Raises:
        ValueError: unknown flow.
    """
    check_choice("MODEL.DERIS.QUERY_FLOW", query_flow, QUERY_FLOWS)
    if query_flow == "loopback":
        return list(range(num_rounds + 1))
    return [0] if query_flow == "c_to_p" else [num_rounds]


def run_rounds(
    perception: PerceptionBranch,
    cognition: CognitionBranch,
    *,
    thinking_rounds: list[int],
    num_rounds: int,
    features: Any,
    image_index: Tensor,
    visual: Tensor | None,
    text: Tensor,
    text_mask: Tensor,
) -> tuple[list[dict[str, Tensor]], Tensor]:
    """Run round 0 on the initial queries, then ``num_rounds`` perception layers.

    A round predicts masks, and if it is a thinking round, a cognition layer scores the queries and
    fuses what it learned into them; they and the masks, as the area they may attend, go to the next.

    Args:
        thinking_rounds: of ``cognition_rounds``.
        features: of ``perception.encode_images``.
        image_index: int64 (E,).
        visual: f_v (E, C, g, g) or None.
        text, text_mask: words (E, L, C), bool (E, L).

    Returns:
        rounds, see the package's docstring (scores of the last thinking round belong to the last
        round), and the last queries (E, Q, C).
    """
    mask_features = perception.mask_features(features, image_index, visual)
    queries = cognition.initial_queries(image_index.shape[0])
    rounds: list[dict[str, Tensor]] = []
    for number in range(num_rounds + 1):
        if number > 0:
            attention = perception.attention_mask(rounds[-1]["mask_logits"], number - 1)
            queries = perception.layer(
                number - 1, queries, attention, features, image_index, mask_features
            )
        rounds.append({"mask_logits": perception.predict_masks(queries, mask_features)})
        if number in thinking_rounds:
            prior = perception.mask_prior(rounds[-1]["mask_logits"], mask_features)
            layer = thinking_rounds.index(number)
            queries, scores = cognition(layer, queries, prior, text, text_mask)
            # Cognition before perception scores masks that are yet to come.
            rounds[-1]["class_logits"] = scores
    if "class_logits" not in rounds[-1]:
        rounds[-1]["class_logits"] = rounds[thinking_rounds[-1]].pop("class_logits")
    return rounds, queries
