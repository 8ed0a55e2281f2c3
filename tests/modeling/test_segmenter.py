import pytest
import torch
from torch import nn

from ris_d2.engine.optimizer import parameter_groups
from ris_d2.modeling import ReferringSegmenter


class Probe(ReferringSegmenter):
    """Echoes given mask logits; counts how often each hook is called."""

    def __init__(self, logits=None, **arguments):
        defaults = {"pixel_mean": [0.0] * 3, "pixel_std": [1.0] * 3, "input_size": (32, 48)}
        super().__init__(**{**defaults, **arguments})
        self.logits = logits
        self.backbone = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 3))
        self.calls = []

    def encode_images(self, images, views):
        self.calls.append(("encode", tuple(images.shape), {k: v.shape for k, v in views.items()}))
        self.images = images
        return images.mean((2, 3))

    def segment(self, features, image_index, input_ids, text_mask):
        self.calls.append(("segment", image_index.tolist(), tuple(input_ids.shape)))
        if self.logits is None:
            logits = self.backbone[1](features)[image_index].sum(1)[:, None, None].expand(-1, 8, 12)
        else:
            logits = self.logits[input_ids[:, 0]]
        return {"mask_logits": logits, "sentence": torch.ones(len(input_ids), 4)}

    def mask_losses(self, outputs, masks):
        self.masks = masks
        return {"loss_mask": outputs["mask_logits"].flatten(1).mean(1)}


def results(model, inputs):
    return model.eval()(inputs)


def test_images_once_and_expressions_in_slices(make_inputs):
    model = Probe(max_expressions=4)
    out = results(model, [make_inputs(3, seed=1), make_inputs(4, seed=2)])
    assert [call[0] for call in model.calls] == ["encode", "segment", "segment"]
    assert [call[1] for call in model.calls[1:]] == [[0, 0, 0, 1], [1, 1, 1]]
    ids = [[r["expression_id"] for r in x["referring"]] for x in out]
    assert ids == [[100, 101, 102], [200, 201, 202, 203]]


def test_padding_comes_after_normalisation(make_inputs):
    model = Probe(pixel_mean=[100.0] * 3, pixel_std=[2.0] * 3)
    inputs = make_inputs(size=(20, 48))
    inputs["content_box"] = (0, 0, 48, 20)
    results(model, [inputs])
    assert torch.equal(model.images[0, :, :20].cpu(), (inputs["image"] - 100.0) / 2)
    assert not model.images[0, :, 20:].any()
    with pytest.raises(ValueError, match="exceeds INPUT.RIS.SIZE"):
        results(model, [make_inputs(size=(33, 48))])


def test_views_are_normalised_and_batched(make_inputs):
    inputs = [make_inputs(seed=s) for s in (0, 1)]
    for x in inputs:
        x["views"] = {"cognition": x["image"][:, :16, :16]}
    model = Probe()
    results(model, inputs)
    assert model.calls[0][2] == {"cognition": (2, 3, 16, 16)}


def test_content_box_is_cut_out_before_resizing(make_inputs):
    """Foreground in the middle half of the input's width; that half is the image: all foreground."""
    logits = torch.full((1, 32, 48), -9.0)
    logits[:, :, 12:36] = 9.0
    inputs = make_inputs(1)
    inputs.update(
        input_ids=torch.zeros(1, 8, dtype=torch.int64), content_box=(12.0, 0.0, 36.0, 32.0)
    )
    mask = results(Probe(logits), [inputs])[0]["referring"][0]["mask"]
    assert mask.shape == (40, 60) and mask[:, 2:-2].all()
    inputs["content_box"] = (0.0, 0.0, 48.0, 32.0)
    mask = results(Probe(logits), [inputs])[0]["referring"][0]["mask"]
    assert abs(int(mask.sum()) - 40 * 30) <= 2 * 40


def test_orders_of_sigmoid_and_threshold(make_inputs):
    """One row of logits 2, -4 to four pixels. Pixel 1 lies a quarter of the way: logit 0.5, but the mean
    probability is 0.75 sigmoid(2) + 0.25 sigmoid(-4) = 0.665; a threshold of 0.64 parts the two."""
    logits = torch.tensor([[[2.0, -4.0]]])
    inputs = make_inputs(1, size=(1, 2))
    inputs.update(input_ids=torch.zeros(1, 8, dtype=torch.int64), height=1, width=4)
    masks = {}
    for order in ("probabilities", "logits", "binary"):
        model = Probe(logits, input_size=(1, 2), mask_threshold=0.64, mask_order=order)
        mask = results(model, [inputs])[0]["referring"][0]["mask"]
        masks[order] = mask[0].tolist()
    assert masks["probabilities"] == [True, True, False, False]
    assert masks["logits"] == [True, False, False, False]
    assert masks["binary"] == [True, True, False, False]
    with pytest.raises(ValueError, match="MODEL.RIS.MASK_ORDER is 'first', not one of"):
        Probe(mask_order="first")


def test_who_says_nothing(make_inputs):
    logits = torch.full((2, 32, 48), -9.0)
    logits[1, :4, :6] = 9.0  # 24 of 1536 input pixels, about 37 of 2400 at the output
    inputs = make_inputs(2)
    inputs["input_ids"] = torch.tensor([[0] * 8, [1] * 8])
    empty, small = results(Probe(logits, no_target="none"), [inputs])[0]["referring"]
    assert not empty["no_target"] and not empty["mask"].any() and small["mask"].any()
    assert small["score"] > 0.99 > 0.01 > empty["score"]
    empty, small = results(Probe(logits, no_target="area", min_area=10), [inputs])[0]["referring"]
    assert (empty["no_target"], small["no_target"]) == (True, False)
    empty, small = results(Probe(logits, no_target="area", min_area=50), [inputs])[0]["referring"]
    assert small["no_target"] and not small["mask"].any()
    model = Probe(logits, no_target="head", sentence_dim=4, existence_threshold=1.1)
    empty, small = results(model, [inputs])[0]["referring"]
    assert small["no_target"] and not small["mask"].any() and 0 < small["score"] < 1


def test_losses_are_means_over_expressions(make_inputs):
    model = Probe(no_target="head", sentence_dim=4).train()
    inputs = [make_inputs(1, seed=1), make_inputs(3, seed=2)]
    losses = model(inputs)
    separate = [model([x]) for x in inputs]
    for name in ("loss_mask", "loss_existence"):
        weighted = (separate[0][name] + 3 * separate[1][name]) / 4
        assert torch.allclose(losses[name], weighted)


def test_referred_masks_are_unions_of_the_targets(make_inputs):
    model = Probe().train()
    inputs = make_inputs(3)
    model([inputs])
    first, second = inputs["instances"].gt_masks.tensor
    masks = model.masks.cpu()
    assert torch.equal(masks[0], first)
    assert torch.equal(masks[1], first | second)
    assert not masks[2].any()


def test_text_is_trimmed_only_where_pads_are_masked(make_inputs):
    inputs = [make_inputs(2, lengths=[3, 5])]
    model = Probe()
    results(model, inputs)
    assert model.calls[1][2] == (2, 8)
    model.trims_text = True
    results(model, inputs)
    assert model.calls[3][2] == (2, 5)


@pytest.mark.parametrize("training", [True, False])
def test_images_without_a_sentence_are_refused_unless_another_has_one(training, make_inputs):
    model, empty = Probe().train(training), make_inputs()
    empty.update({name: empty[name][:0] for name in ("input_ids", "text_mask", "expressions")})
    with pytest.raises(ValueError, match="no input has an expression"):
        model([empty, empty])
    if not training:
        counts = [len(result["referring"]) for result in model([empty, make_inputs()])]
        assert counts == [0, 3]


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_frozen_parts_keep_their_mode(mode):
    model = Probe(freeze={"backbone": mode})
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert model.train().backbone.training == (mode == "train")
    assert not model.eval().backbone.training


def test_optimizer_and_ddp_see_frozen_parts_of_a_model_that_nobody_prepared():
    """A part of a part, after a constructor that calls nothing, before any call of train()."""
    model = Probe(freeze={"backbone.1": "eval"})
    model.head = nn.Linear(3, 1)
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [
        "head.weight",
        "head.bias",
    ]
    groups = parameter_groups(model, lr=0.1, weight_decay=0.0)
    assert sum(len(group["params"]) for group in groups) == 2
    assert model.backbone[0].training and not model.backbone[1].training
    model.backbone = nn.Sequential(nn.Identity(), nn.Linear(3, 3))  # replaced: frozen, too
    assert not any(p.requires_grad for p in model.backbone.parameters())


def test_a_part_that_a_base_config_freezes_can_be_left_free():
    model = Probe(freeze={"backbone": "none"})
    assert all(p.requires_grad for p in model.backbone.parameters())
    assert model.train().backbone.training


@pytest.mark.cpu_only
def test_bfloat16_on_a_cpu(make_inputs):
    model = Probe(precision="bf16").train()
    model([make_inputs()])
    with model._autocast():
        assert model.backbone[1](torch.ones(1, 3)).dtype == torch.bfloat16
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        Probe(precision="fp16")([make_inputs()])


def test_bad_settings_are_named():
    with pytest.raises(ValueError, match="PRECISION is 'half'"):
        Probe(precision="half")
    with pytest.raises(ValueError, match="NO_TARGET is 'maybe'"):
        Probe(no_target="maybe")
    with pytest.raises(ValueError, match="names 'encoder'; the parts are .*backbone"):
        Probe(freeze={"encoder": "eval"}).train()
    with pytest.raises(ValueError, match="names 'backbone.2'; the parts are .*backbone"):
        Probe(freeze={"backbone.2": "eval"})
    with pytest.raises(ValueError, match="backbone is 'frozen', not one of .*eval"):
        Probe(freeze={"backbone": "frozen"})
