import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.structures import Instances

from ris_d2.evaluation import ReferringEvaluator


@pytest.fixture
def analyze_errors(load_tool):
    return load_tool("analyze_errors")


@pytest.fixture
def evaluated(tmp_path):
    """Evaluate one image: returns the directory of results."""

    def evaluate(name="model", with_instances=True):
        square = torch.zeros(10, 10, dtype=torch.bool)
        square[:5, :4] = True  # a fifth of the image
        nothing = torch.zeros_like(square)
        masks = [square, ~square, nothing, square]
        expressions = [
            {"expression_id": i, "ref_id": i, "text": "a b", "annotation_ids": [7] * (i < 3)}
            for i in range(4)
        ]
        polygon = [[0, 0, 4, 0, 4, 5, 0, 5]]
        results = []
        for i, mask in enumerate(masks):
            instances = None
            if with_instances:
                instances = Instances((10, 10))
                # The third expression's queries have nothing of the target.
                instances.pred_masks = torch.stack([~square] if i == 2 else [square, ~square])
            results.append(
                {
                    "expression_id": i,
                    "mask": mask,
                    "score": 0.9,
                    "no_target": i == 2,
                    "instances": instances,
                }
            )
        unit = {
            "height": 10,
            "width": 10,
            "image_id": 1,
            "file_name": "1.jpg",
            "annotations": [{"id": 7, "segmentation": polygon}],
            "expressions": expressions,
        }
        directory = tmp_path / name
        evaluator = ReferringEvaluator("toy", output_dir=str(directory), distributed=False)
        evaluator.process([unit], [{"referring": results}])
        evaluator.evaluate()
        return str(directory / "per_expression.jsonl")

    return evaluate


def test_tables_files_and_figure(analyze_errors, evaluated, tmp_path, capsys):
    written, drawn = tmp_path / "errors.json", tmp_path / "sizes.png"
    files = [evaluated(), evaluated("plain", with_instances=False)]
    analyze_errors.main([*files, "--json", str(written), "--plot", str(drawn)])
    output = " ".join(capsys.readouterr().out.split())
    # gIoU 1, 0, 0, 0: the second chose wrongly, the third had no mask, the fourth invents one.
    assert "| all | 4 | 25.00 | 75.00 | 75.00 | 25.00 | 50.00 |" in output
    assert "perception loses 25.00 (33.3 %: no query has the mask)" in output
    assert "cognition 50.00 (66.7 %: the wrong queries were chosen)" in output
    assert "66.7 % of the expressions with a target stay below IoU 0.5; for 50.0 %" in output
    assert "| 20-30 % | 3 | 33.33 | 33.33 | 66.67 |" in output
    assert "No result carries instances" in output
    figures = json.loads(written.read_text())
    assert figures[files[0]]["loss"]["1 target"]["denied"] == 0
    assert figures[files[0]]["loss"]["1 target"]["wrong_choice"] == pytest.approx(100 / 3)
    assert figures[files[1]]["loss"] == {}
    assert figures[files[1]]["target_size"][0]["oracle_mIoU"] is None
    image = cv2.imread(str(drawn))
    assert image is not None and len(np.unique(image)) > 10


def test_edges_are_percent(analyze_errors, evaluated, capsys):
    analyze_errors.main([evaluated(), "--edges", "0", "15", "100"])
    assert "| 15-100 %" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jsonl"], "missing.jsonl"),
        (["--edges", "0", "10"], "do not fit into the edges"),
        (["--board", "b.png"], "predictions.jsonl: no such file; evaluate with TEST.SAVE_PRED"),
    ],
)
def test_mistakes_end_with_one_line(analyze_errors, evaluated, arguments, message):
    files = [] if "missing" in arguments[0] else [evaluated()]
    with pytest.raises((ValueError, OSError), match=message):
        analyze_errors.main([*files, *arguments])
