import json
import logging
import math
import os
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Instances

from ris_d2.evaluation import ReferringEvaluator
from ris_d2.evaluation import evaluator as evaluator_module
from ris_d2.masks import encode

pytestmark = pytest.mark.usefixtures("placed")  # masks that a model gave
SIZE = (20, 30)


def box(x0, y0, x1, y1, size=SIZE):
    mask = np.zeros(size, bool)
    mask[y0:y1, x0:x1] = True
    return mask


def rectangle(x0, y0, x1, y1):
    return [[x0, y0, x1, y0, x1, y1, x0, y1]]


def unit(annotations, expressions, *, image_id=1, size=SIZE, **more):
    """annotations: {id: segmentation}; expressions: {id: annotation ids}."""
    return {
        "height": size[0],
        "width": size[1],
        "original_size": size,
        "image_id": image_id,
        "file_name": f"images/{image_id:06d}.jpg",
        "source": "test",
        "annotations": [{"id": k, "segmentation": s} for k, s in annotations.items()],
        "expressions": [
            {"expression_id": k, "ref_id": 100 * image_id, "text": "a red one", "annotation_ids": a}
            for k, a in expressions.items()
        ],
        **more,
    }


def result(expression_id, mask, *, no_target=False, score=0.5, instances=None):
    return {
        "expression_id": expression_id,
        "mask": torch.as_tensor(np.array(mask)),
        "score": score,
        "no_target": no_target,
        "instances": instances,
    }


def evaluate(*pairs, **options):
    evaluator = ReferringEvaluator("test", **options)
    for inputs, results in pairs:
        evaluator.process([inputs], [{"referring": results}])
    return evaluator.evaluate()["referring"]


def test_ground_truth_is_the_union_of_the_named_annotations():
    """A 10x10 and a 10x10 box that share 5x10: their union has 150 pixels, the mask covers 100."""
    inputs = unit(
        {7: rectangle(0, 0, 10, 10), 8: encode(box(5, 0, 15, 10)), 9: rectangle(0, 15, 30, 20)},
        {1: [7, 8], 2: [8]},
    )
    metrics = evaluate((inputs, [result(1, box(0, 0, 10, 10)), result(2, box(5, 0, 15, 10))]))
    assert (metrics["cIoU_I"], metrics["cIoU_U"]) == (100 + 100, 150 + 100)
    assert metrics["mIoU"] == pytest.approx(100 * (100 / 150 + 1) / 2)


def test_no_target_is_an_empty_list_of_annotations_not_an_empty_mask():
    """Annotation 7 encloses no pixel: its expression has a target all the same (TN, IoU 0)."""
    inputs = unit({7: rectangle(3.1, 3.1, 3.2, 3.2)}, {1: [7], 2: []})
    nothing = np.zeros(SIZE, bool)
    metrics = evaluate((inputs, [result(1, nothing), result(2, nothing, no_target=True)]))
    assert (metrics["TN"], metrics["TP"], metrics["num_no_target"]) == (1, 1, 1)
    assert metrics["gIoU"] == 50
    assert math.isnan(metrics["cIoU"])


def test_masks_count_as_given_when_no_target_is_said():
    """Rule 3 on pixels: ground truth 100, mask 50 inside it + 50 outside: U = 150."""
    inputs = unit({7: rectangle(0, 0, 10, 10)}, {1: [7]})
    metrics = evaluate((inputs, [result(1, box(5, 0, 15, 10), no_target=True)]))
    assert (metrics["cIoU_I"], metrics["cIoU_U"], metrics["FP"]) == (0, 150, 1)
    assert metrics["mIoU"] == pytest.approx(100 / 3)


@pytest.mark.parametrize("segmentation", [rectangle(0, 0, 10, 10), encode(box(0, 0, 10, 10))])
def test_ground_truth_is_resized_to_the_requested_size(segmentation, tmp_path):
    """A 10x10 box of a 20x30 image is 20x30 at 40x90; the masks fill it but for 100 pixels."""
    inputs = unit({7: segmentation}, {1: [7]}, height=40, width=90)
    mask = box(0, 0, 30, 20, (40, 90))
    mask[:10, :10] = False
    metrics = evaluate((inputs, [result(1, mask)]), output_dir=str(tmp_path))
    assert (metrics["cIoU_I"], metrics["cIoU_U"]) == (500, 600)
    assert json.loads((tmp_path / "results.json").read_text())["resolution"] == [40, 90]


def test_resized_ground_truth_is_sampled_at_corners_or_centers():
    """Halved, rows 0 and 2 stay in one case and rows 1 and 3 in the other: the box is row 1 alone."""
    inputs = unit({7: encode(box(0, 1, 30, 2))}, {1: [7]}, height=10, width=15)
    one_row = [result(1, box(0, 0, 15, 1, (10, 15)))]
    assert evaluate((inputs, one_row), sample="center")["cIoU"] == 100
    assert evaluate((inputs, one_row))["cIoU"] == 0


def test_without_original_size_an_rle_brings_its_own():
    inputs = unit({7: encode(box(0, 0, 10, 10))}, {1: [7]}, height=40, width=60)
    del inputs["original_size"]
    assert evaluate((inputs, [result(1, box(0, 0, 20, 20, (40, 60)))]))["cIoU"] == 100


def test_results_may_come_in_any_order():
    inputs = unit({7: rectangle(0, 0, 10, 10), 8: rectangle(20, 0, 30, 10)}, {1: [7], 2: [8]})
    swapped = [result(2, box(20, 0, 30, 10)), result(1, box(0, 0, 10, 10))]
    assert evaluate((inputs, swapped))["gIoU"] == 100


def test_agrees_with_the_evaluator_of_rela():
    """Our random masks; the digits are what ReLA's refer_evaluation.py printed for them.

    Its accuracies are fractions and multiplied by 100 here.
    """
    metrics = evaluate(*random_pairs())
    published = {
        "gIoU": 48.62599033151196,
        "cIoU": 42.54898560776834,
        "T_acc": 86.66666666666667,
        "N_acc": 58.66666666666667,
        "Pr@0.7": 25.77777777777778,
        "Pr@0.8": 15.555555555555555,
        "Pr@0.9": 8.88888888888889,
    }
    for name, value in published.items():
        assert metrics[name] == pytest.approx(value, rel=1e-13)


def random_pairs(count=300, size=(24, 24)):
    rng = np.random.default_rng(2)
    for index in range(count):
        no_target = rng.random() < 0.3
        truth = rng.random(size) < rng.random()
        mask = truth ^ (rng.random(size) < 0.5 * rng.random())
        mask &= rng.random() < 0.9
        denied = rng.random() < (0.6 if no_target else 0.15)
        annotations = {} if no_target else {7: encode(truth)}
        inputs = unit(annotations, {index: list(annotations)}, image_id=index, size=size)
        yield inputs, [result(index, mask, no_target=bool(denied))]


def test_two_processes_give_the_numbers_of_one(tmp_path):
    """Through gloo and detectron2's inference_on_dataset, images interleaved, to the last byte."""
    script = pathlib.Path(__file__).with_name("evaluate_in_processes.py")
    runpy.run_path(str(script))["main"](0, 1, str(tmp_path / "1"))
    environment = {
        **os.environ,
        "PYTHONPATH": str(pathlib.Path(__file__).parents[2]),
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen([sys.executable, script, str(rank), "2", tmp_path / "2"], env=environment)
        for rank in range(2)
    ]
    assert [process.wait(timeout=300) for process in processes] == [0, 0]
    for name in ("results.json", "per_expression.jsonl", "predictions.jsonl"):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()
    assert (tmp_path / "2" / "rank1.txt").read_text() == "{}"
    assert json.loads((tmp_path / "1" / "results.json").read_text())["referring"]["TP"] > 0


class Perfect(torch.nn.Module):
    """Answers with the boxes it is told."""

    def forward(self, batched_inputs):
        return [
            {"referring": [result(e["expression_id"], box(0, 0, 10, 10)) for e in x["expressions"]]}
            for x in batched_inputs
        ]


def test_runs_under_detectron2():
    loader = [
        [unit({7: rectangle(0, 0, 10, 10)}, {1: [7], 2: [7]}, image_id=image_id)]
        for image_id in range(3)
    ]
    results = inference_on_dataset(Perfect(), loader, ReferringEvaluator("test"))
    assert list(results) == ["referring"]
    assert results["referring"]["gIoU"] == 100
    assert results["referring"]["num_expressions"] == 6


def test_reset_forgets():
    evaluator = ReferringEvaluator("test")
    inputs = [unit({7: rectangle(0, 0, 10, 10)}, {1: [7]})]
    outputs = [{"referring": [result(1, box(0, 0, 5, 10))]}]
    evaluator.process(inputs, outputs)
    evaluator.reset()
    evaluator.process(inputs, outputs)
    assert evaluator.evaluate()["referring"]["num_expressions"] == 1


def test_nothing_to_evaluate(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    metrics = evaluate((unit({}, {}), []), output_dir=str(tmp_path))
    assert metrics["num_expressions"] == 0 and math.isnan(metrics["gIoU"])
    assert json.loads((tmp_path / "results.json").read_text())["referring"]["gIoU"] is None
    assert (tmp_path / "per_expression.jsonl").read_text() == ""


def write_example(tmp_path, **options):
    """Two referents of image 1 (IoU 1 and 0.5; 0), a missed no-target expression of image 2."""
    boxes = {7: rectangle(0, 0, 10, 10), 8: rectangle(20, 0, 30, 20)}
    inputs = unit(boxes, {3: [7], 1: [7], 2: [8]})
    inputs["expressions"][2]["ref_id"] = 101
    inputs["expressions"][0]["text"] = "left"
    results = [
        result(3, box(0, 0, 10, 10), score=0.75),
        result(1, box(0, 0, 5, 10)),
        result(2, box(0, 0, 5, 10), score=math.nan),
    ]
    other = unit({}, {4: []}, image_id=2)
    missed = [result(4, box(0, 0, 3, 1))]
    return evaluate((other, missed), (inputs, results), output_dir=str(tmp_path), **options)


def test_files(tmp_path):
    metrics = write_example(tmp_path, save_predictions=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "per_expression.jsonl",
        "predictions.jsonl",
        "results.json",
    ]
    record = json.loads((tmp_path / "results.json").read_text())
    assert (record["dataset"], record["resolution"]) == ("test", "original")
    assert record["referring"] == metrics
    lines = [json.loads(line) for line in (tmp_path / "per_expression.jsonl").open()]
    assert [line["expression_id"] for line in lines] == [1, 2, 3, 4]
    assert lines[2] == {
        "source": "test",
        "file_name": "images/000001.jpg",
        "image_id": 1,
        "ref_id": 100,
        "expression_id": 3,
        "I": 100,
        "U": 100,
        "IoU": 1.0,
        "gIoU": 1.0,
        "score": 0.75,
        "no_target": False,
        "num_targets": 1,
        "area_ratio": 100 / 600,
        "num_words": 1,
        "kinds": ["position"],
        "oracle_IoU": None,
    }
    assert lines[1]["score"] is None
    predictions = [json.loads(line) for line in (tmp_path / "predictions.jsonl").open()]
    assert [line["expression_id"] for line in predictions] == [1, 2, 3, 4]
    assert predictions[3]["segmentation"] == encode(box(0, 0, 3, 1))


def test_undefined_metrics_are_nan_null_and_not_available(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    inputs = unit({7: rectangle(0, 0, 10, 10)}, {1: [7]})
    metrics = evaluate((inputs, [result(1, box(0, 0, 10, 10))]), output_dir=str(tmp_path))
    assert math.isnan(metrics["N_acc"])
    record = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert record["referring"]["N_acc"] is None
    assert "n/a" in caplog.text and "original resolution" in caplog.text


def test_breakdowns(tmp_path):
    """By hand: box 7 covers 100/600 of the image (10-30%), box 8 200/600 (>=30%).

    Referent 100 has IoUs 1 and 0.5, referent 101 has 0: best (1 + 0)/2, mean (0.75 + 0)/2, worst
    (0.5 + 0)/2.
    """
    write_example(tmp_path)
    groups = json.loads((tmp_path / "results.json").read_text())["breakdowns"]
    sizes = {
        kind: {group: values["num_expressions"] for group, values in by_group.items()}
        for kind, by_group in groups.items()
        if kind != "referent"
    }
    assert sizes == {
        "num_targets": {"0": 1, "1": 3},
        "target_area": {"10-30%": 2, ">=30%": 1},
        "num_words": {"1-2": 1, "3": 3},
        "kind": {"attribute": 3, "position": 1, "absence": 1},
        "source": {"test": 4},
    }
    assert groups["target_area"]["10-30%"]["gIoU"] == 75
    assert groups["num_targets"]["0"]["N_acc"] == 0
    assert groups["referent"] == {
        "num_referents": 2,
        "best_mIoU": 50,
        "mean_mIoU": 37.5,
        "worst_mIoU": 25,
    }


def instances(*masks, size=SIZE):
    stacked = np.stack(masks) if masks else np.zeros((0, *size), bool)
    return Instances(size, pred_masks=torch.from_numpy(stacked), scores=torch.ones(len(masks)))


def test_oracle_takes_the_instances_that_lie_mostly_inside(tmp_path):
    """Ground truth 10x10. Instances: 6x10 wholly inside it, 4x10 with exactly half inside (left
    out: not more than half), 3x10 with 2/3 inside. I = 60 + 20, U = 100 + 10: 80/110.
    """
    masks = [box(0, 0, 6, 10), box(8, 0, 12, 10), box(8, 0, 11, 10)]
    found = instances(*masks)
    inputs = unit({7: rectangle(0, 0, 10, 10)}, {1: [7], 2: [], 3: [7]})
    results = [
        result(1, box(0, 0, 1, 1), instances=found),
        result(2, box(0, 0, 1, 1), instances=found),
        result(3, box(0, 0, 1, 1), instances=instances()),
    ]
    metrics = evaluate((inputs, results), output_dir=str(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "per_expression.jsonl").open()]
    assert [line["oracle_IoU"] for line in lines] == [80 / 110, 1.0, 0.0]
    assert metrics["oracle_mIoU"] == pytest.approx(100 * (80 / 110) / 2)


def test_bad_results_are_named():
    inputs = unit({7: rectangle(0, 0, 10, 10)}, {1: [7], 2: [7]}, image_id=5)
    good, other = result(1, box(0, 0, 1, 1)), result(2, box(0, 0, 1, 1))
    where = r"images/000005.jpg \(id 5\)"
    with pytest.raises(ValueError, match=f"{where}: expression 2 has no result"):
        evaluate((inputs, [good]))
    with pytest.raises(ValueError, match=f"{where}: expression 1 has 2 results"):
        evaluate((inputs, [good, good, other]))
    with pytest.raises(ValueError, match=f"{where}: a result for expression 3"):
        evaluate((inputs, [good, other, result(3, box(0, 0, 1, 1))]))
    with pytest.raises(ValueError, match=f"{where}, expression 2: expected .* shape .20, 30.,"):
        evaluate((inputs, [good, result(2, box(0, 0, 1, 1, (30, 20)))]))
    with pytest.raises(ValueError, match=f"{where}, expression 2: .*float32"):
        evaluate((inputs, [good, result(2, np.zeros(SIZE, np.float32))]))
    with pytest.raises(ValueError, match=f"{where}: no 'referring' in the output"):
        ReferringEvaluator("test").process([inputs], [{"instances": []}])
    with pytest.raises(ValueError, match="1 inputs, but 0 outputs"):
        ReferringEvaluator("test").process([inputs], [])


def test_an_expression_scored_twice_is_named():
    inputs = unit({7: rectangle(0, 0, 10, 10)}, {1: [7]}, image_id=5)
    pair = (inputs, [result(1, box(0, 0, 1, 1))])
    with pytest.raises(ValueError, match=r"000005.jpg \(id 5\): expression 1 was scored twice"):
        evaluate(pair, pair)


def test_same_ids_in_images_of_two_families_are_two_expressions():
    first = unit({7: rectangle(0, 0, 10, 10)}, {1: [7]}, file_name="coco/1.jpg")
    second = unit({7: rectangle(0, 0, 10, 10)}, {1: [7]}, file_name="saiapr/1.jpg")
    answer = [result(1, box(0, 0, 10, 10))]
    assert evaluate((first, answer), (second, answer))["num_expressions"] == 2


def test_bad_ground_truth_is_named():
    answer = [result(1, box(0, 0, 1, 1))]
    with pytest.raises(ValueError, match="000001.jpg.*expression 1: annotation 8 is not among"):
        evaluate((unit({7: rectangle(0, 0, 10, 10)}, {1: [8]}), answer))
    with pytest.raises(ValueError, match="000001.jpg.*annotation 7: a polygon needs"):
        evaluate((unit({7: [[0, 0, 1, 1, 2]]}, {1: [7]}), answer))


def test_saving_predictions_needs_a_place():
    with pytest.raises(ValueError, match="output_dir"):
        ReferringEvaluator("test", save_predictions=True)


def test_counting_on_a_device_equals_counting_in_numpy():
    rng = np.random.default_rng(0)
    masks = [torch.from_numpy(rng.random(SIZE) < 0.5) for _ in range(5)]
    masks[1] = torch.from_numpy(np.asfortranarray(masks[1].numpy()))
    truths = [rng.random(SIZE) < 0.5, np.zeros(SIZE, bool)]
    which = np.array([0, 0, 1, 1, 0])
    by_hand = [mask.numpy().sum() for mask in masks], [
        (mask.numpy() & truths[index]).sum() for mask, index in zip(masks, which)
    ]
    for count in (evaluator_module._count_numpy, evaluator_module._count_torch):
        np.testing.assert_array_equal(count(masks, truths, which), by_hand)


def test_memory_does_not_depend_on_image_size():
    def kept(size):
        evaluator = ReferringEvaluator("test")
        inputs = unit({7: encode(box(0, 0, 10, 10, size))}, {1: [7], 2: []}, size=size)
        masks = [result(1, box(0, 0, 9, 9, size)), result(2, box(0, 0, 9, 9, size))]
        evaluator.process([inputs], [{"referring": masks}])
        return sum(sys.getsizeof(value) for value in vars(evaluator).values())

    assert kept((400, 600)) == kept(SIZE) < 1000
