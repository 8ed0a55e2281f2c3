"""DeRIS: "Decoupling Perception and Cognition for Enhanced Referring Image Segmentation through
Loopback Synergy" (Dai et al., ICCV 2025)."""

from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import Instances
from torch import Tensor

from ..options import arguments, check_choice
from ..segmenter import ReferringSegmenter
from .cognition import CognitionBranch
from .criterion import DeRISCriterion
from .perception import ImageFeatures, PerceptionBranch

QUERY_FLOWS = ("loopback", "p_to_c", "c_to_p", "hierarchical")
_NOWHERE = -100.0  # logit of a mask without a pixel


@META_ARCH_REGISTRY.register()
class DeRIS(ReferringSegmenter):
    """Fig. 2: perception (Swin, pixel decoder, queries) and cognition (BEiT-3, scores) in loopback.

    - ``perception``: levels and f_h4 of the image, N queries, f_m = Conv(Concat(f_h4, f_v)), masks.
    - ``cognition``: f_v and words of the small view and the sentence, a score for each query.
    - ``segment`` is the loop of N_r + 1 rounds between the two.

    Swin and pixel decoder run once per image; BEiT-3, whose first layer lets image and sentence
    meet, and the rounds run once per expression.
    """

    weight_parts = {
        "mask2former": "perception",
        "swin": "perception.backbone",
        "beit3": "cognition.encoder",
        "bert": "cognition.encoder",
        "deris": "",
    }
    trims_text = True

    @configurable
    def __init__(
        self,
        *,
        perception: PerceptionBranch,
        cognition: CognitionBranch,
        criterion: DeRISCriterion,
        query_flow: str,
        score_threshold: float,
        keep_best: bool,
        return_instances: bool,
        **segmenter: Any,
    ):
        """
        Args:
            query_flow: see MODEL.DERIS.QUERY_FLOW.
            score_threshold: T_ref; queries with a higher score make up the mask.
            keep_best: keep the best query where no score exceeds the threshold.
            return_instances: results carry the masks and scores of all queries.
            segmenter: see ReferringSegmenter.
        """
        super().__init__(**segmenter)
        self.perception, self.cognition = perception, cognition
        self.vocab_size = cognition.vocab_size
        self.criterion = criterion
        self.thinking_rounds = thinking_rounds(query_flow, len(perception.layers))
        self.score_threshold = score_threshold
        self.keep_best = keep_best
        self.return_instances = return_instances

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        deris = cfg.MODEL.DERIS
        num_layers = len(thinking_rounds(deris.QUERY_FLOW, deris.ROUNDS))
        return {
            **super().from_config(cfg),
            "perception": PerceptionBranch(cfg),
            "cognition": CognitionBranch(cfg, num_layers),
            "criterion": DeRISCriterion(cfg),
            **arguments(deris, "QUERY_FLOW", "SCORE_THRESHOLD", "KEEP_BEST"),
            "return_instances": cfg.TEST.INSTANCES,
        }

    def encode_images(
        self, images: Tensor, views: dict[str, Tensor]
    ) -> tuple[ImageFeatures, Tensor | None]:
        return self.perception.encode_images(images), self.cognition.encode_images(views)

    def segment(
        self,
        features: tuple[ImageFeatures, Tensor | None],
        image_index: Tensor,
        input_ids: Tensor,
        text_mask: Tensor,
    ) -> dict[str, Any]:
        """Loopback synergy: queries travel between perception and cognition.

        Round 0 has the initial queries, each of the N_r others those of a perception layer. A round
        predicts masks, and if it is a thinking round, a cognition layer scores the queries and
        fuses what it learned into them; they and the masks, as the area they may attend, go to the
        next.

        Returns:
            "rounds" (see the package's docstring; scores of the last thinking round belong to the
            last round) and "existence_logits" (E,).
        """
        perceived, image_tokens = features
        visual, text = self.cognition.read(image_tokens, image_index, input_ids, text_mask)
        mask_features = self.perception.mask_features(perceived, image_index, visual)
        queries = self.cognition.initial_queries(image_index.shape[0])
        rounds: list[dict[str, Tensor]] = []
        for number in range(len(self.perception.layers) + 1):
            if number > 0:
                attention = self.perception.attention_mask(rounds[-1]["mask_logits"], number - 1)
                queries = self.perception.layer(
                    number - 1, queries, attention, perceived, mask_features
                )
            logits = self.perception.predict_masks(queries, mask_features)
            rounds.append({"mask_logits": logits})
            if number in self.thinking_rounds:
                prior = self.perception.mask_prior(logits, mask_features)
                layer = self.thinking_rounds.index(number)
                queries, scores = self.cognition(layer, queries, prior, text, text_mask)
                rounds[-1]["class_logits"] = scores
        if "class_logits" not in rounds[-1]:  # cognition came first, and scored masks yet to come
            rounds[-1]["class_logits"] = rounds[self.thinking_rounds[-1]].pop("class_logits")
        existence_logits = self.cognition.existence(queries, text, text_mask)
        return {"rounds": rounds, "existence_logits": existence_logits}

    def prepare_targets(self, batched_inputs: list[dict]) -> dict[str, Any]:
        """The criterion's last three arguments; the instances' masks are moved in one piece."""
        masks = [self._pad(x["instances"].gt_masks.tensor) for x in batched_inputs]
        return {
            "instance_masks": self._move(torch.cat(masks)).split([len(own) for own in masks]),
            "targets": [x["targets"] for x in batched_inputs],
            "names": [
                str(x.get("file_name", x.get("image_id")))
                for x in batched_inputs
                for _ in x["targets"]
            ],
        }

    def losses(self, outputs: dict[str, Any], targets: dict[str, Any]) -> dict[str, Tensor]:
        return self.criterion(outputs["rounds"], outputs["existence_logits"], **targets)

    def loss_counts(self, batched_inputs: list[dict]) -> dict[str, float]:
        """What the criterion's normalisers count: start of a loss's name -> count."""
        return self.criterion.counts(
            [x["targets"] for x in batched_inputs], self.perception.query_position.num_embeddings
        )

    def predict(
        self, outputs: dict[str, Any], rows: slice, inputs: dict
    ) -> tuple[Tensor, Tensor, Tensor, list[Instances | None]]:
        """Union of the queries whose score exceeds T_ref.

        The result's score is the existence probability.
        """
        existence, scores, chosen = self._choose(outputs, rows, inputs)
        # A wait for the GPU: of ten queries one or two are chosen, and only their masks
        # are restored.
        wanted = torch.ones(chosen.shape) if self.return_instances else chosen.cpu()
        expressions, queries = wanted.nonzero().T.to(chosen.device, non_blocking=True)
        logits = outputs["rounds"][-1]["mask_logits"][rows]
        masks = self._restore_queries(logits[expressions, queries], inputs)
        union = masks.new_zeros(len(chosen), *masks.shape[1:], dtype=torch.uint8)
        own = masks & chosen[expressions, queries][:, None, None]
        union.index_add_(0, expressions, own.to(torch.uint8))
        instances: list[Instances | None] = [None] * len(chosen)
        if self.return_instances:
            instances = [
                Instances(masks.shape[1:], pred_masks=own, scores=own_scores)
                for own, own_scores in zip(masks.split(chosen.shape[1]), scores, strict=True)
            ]
        return union > 0, existence, ~chosen.any(1), instances

    def probabilities(self, outputs: dict[str, Any], rows: slice, inputs: dict) -> Tensor:
        """The highest of the chosen queries, 0 where none is chosen."""
        _, _, chosen = self._choose(outputs, rows, inputs)
        logits = outputs["rounds"][-1]["mask_logits"][rows][chosen]
        maps = self._restore_queries(logits, inputs, threshold=None).float()
        index = chosen.nonzero()[:, :1, None].expand_as(maps)
        return maps.new_zeros(len(chosen), *maps.shape[1:]).scatter_reduce_(0, index, maps, "amax")

    def decide(
        self, outputs: dict[str, Any], rows: slice, inputs: dict
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The highest logit of the chosen queries, at the input's size."""
        existence, _, chosen = self._choose(outputs, rows, inputs)
        logits = self._enlarge(outputs["rounds"][-1]["mask_logits"][rows])
        logits = logits.masked_fill(~chosen[..., None, None], _NOWHERE).amax(1)
        return logits, existence, ~chosen.any(1)

    @property
    def thresholds(self) -> dict[str, float]:
        return {**super().thresholds, "score_threshold": self.score_threshold}

    def _choose(
        self, outputs: dict[str, Any], rows: slice, inputs: dict
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Existence (E,), the queries' scores (E, Q), bool (E, Q): which make up the mask."""
        existence = outputs["existence_logits"][rows].float().sigmoid()
        scores = outputs["rounds"][-1]["class_logits"][rows].float().softmax(-1)[..., 0]
        chosen = scores > self.threshold("score_threshold", inputs)
        if self.keep_best:
            chosen |= ~chosen.any(1, keepdim=True) & (scores == scores.max(1, keepdim=True).values)
        return existence, scores, chosen

    def _restore_queries(self, logits: Tensor, inputs: dict, **threshold: None) -> Tensor:
        """(M, h, w) -> bool (M, height, width), M may be 0; see ``restore``."""
        if len(logits) == 0:
            return logits.new_zeros(0, inputs["height"], inputs["width"], dtype=torch.bool)
        return self.restore(self._enlarge(logits[None])[0], inputs, **threshold)

    def _enlarge(self, logits: Tensor) -> Tensor:
        """(E, Q, h, w) -> (E, Q, H, W), as released, and as the loss sees them."""
        return F.interpolate(
            logits.float(), size=self.input_size, mode="bilinear", align_corners=True
        )


def thinking_rounds(query_flow: str, num_rounds: int) -> list[int]:
    """Rounds of 0..N_r that end with a cognition layer.

    Raises:
        ValueError: unknown flow.
    """
    check_choice("MODEL.DERIS.QUERY_FLOW", query_flow, QUERY_FLOWS)
    if query_flow == "loopback":
        return list(range(num_rounds + 1))
    return [0] if query_flow == "c_to_p" else [num_rounds]
