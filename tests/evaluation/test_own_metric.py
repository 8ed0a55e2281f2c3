"""A user's metric beside ours, by the public method."""

import json

import torch

from ris_d2.evaluation import ReferringEvaluator


class Mine(ReferringEvaluator):
    def metrics(self, rows):
        right = rows["intersection"] == rows["union"]
        return {**super().metrics(rows), "exact": 100.0 * right.mean()}


def test_a_metric_of_ones_own_is_returned_and_written(tmp_path):
    square = [[0, 0, 4, 0, 4, 4, 0, 4]]
    unit = {
        "file_name": "a.png",
        "image_id": 1,
        "source": "mine",
        "height": 8,
        "width": 8,
        "annotations": [{"id": 1, "segmentation": square}],
        "expressions": [
            {"expression_id": i, "text": "it", "annotation_ids": [1], "ref_id": i} for i in range(2)
        ],
    }
    masks = torch.zeros(2, 8, 8, dtype=torch.bool)
    masks[0, :4, :4] = True
    results = [
        {"expression_id": i, "mask": masks[i], "score": 1.0, "no_target": False, "instances": None}
        for i in range(2)
    ]
    evaluator = Mine("mine", output_dir=str(tmp_path), distributed=False)
    evaluator.reset()
    evaluator.process([unit], [{"referring": results}])
    assert evaluator.evaluate()["referring"]["exact"] == 50.0
    assert json.loads((tmp_path / "results.json").read_text())["referring"]["exact"] == 50.0
