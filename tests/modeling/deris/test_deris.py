import pytest
import torch
from detectron2.modeling import build_model

from ris_d2.modeling.deris.deris import QUERY_FLOWS
from ris_d2.modeling.layers.deformable_attention import MultiScaleDeformableAttention

VARIANTS = [
    *(["QUERY_FLOW", flow] for flow in QUERY_FLOWS),
    ["INSTANCE_ATTENTION", "released"],
    ["VISUAL_FEATURES", False],
    ["ROUNDS", 1],
    ["ROUNDS", 4, "TEXT_POSITIONS", "sine"],
    ["COGNITION", "text"],
]


def build(cfg, *changes):
    cfg = cfg.clone()
    cfg.MODEL.DERIS.merge_from_list(list(changes))
    if cfg.MODEL.DERIS.COGNITION == "text":
        cfg.MODEL.RIS.TEXT.NAME = "RISBert"
        cfg.MODEL.RIS.TEXT.BERT.merge_from_list(
            ["EMBED_DIM", 32, "DEPTH", 1, "NUM_HEADS", 2, "VOCAB_SIZE", 50, "DROPOUT", 0.0]
        )
    torch.manual_seed(0)
    return build_model(cfg)


def stir(model):
    """Deformable attention starts with places and weights that depend on nothing."""
    for module in model.modules():
        if isinstance(module, MultiScaleDeformableAttention):
            torch.nn.init.normal_(module.offsets.weight, std=0.1)
            torch.nn.init.normal_(module.weights.weight, std=0.1)


@pytest.mark.parametrize("changes", VARIANTS, ids=lambda changes: "-".join(map(str, changes)))
def test_every_parameter_learns_and_every_variant_segments(
    changes, deris_cfg, make_deris_inputs, without_gradient
):
    model = build(deris_cfg, *changes)
    stir(model)
    losses = model([make_deris_inputs(seed=0), make_deris_inputs(2, seed=1)])
    last = {"loss_class", "loss_mask", "loss_dice", "loss_existence"}
    assert last <= losses.keys()
    rounds = changes[1] if changes[0] == "ROUNDS" else 3
    # Flows that score once have class terms in the last round only.
    scores_once = changes[0] == "QUERY_FLOW" and changes[1] != "loopback"
    assert len(losses) == 4 + rounds * (2 if scores_once else 3)
    sum(losses.values()).backward()
    assert without_gradient(model) == []
    results = model.eval()([make_deris_inputs(seed=0)])[0]["referring"]
    assert [r["mask"].shape for r in results] == [(40, 60)] * 3
    assert all(r["mask"].dtype == torch.bool and 0 < r["score"] < 1 for r in results)


def test_all_expressions_without_target(deris_cfg, make_deris_inputs):
    inputs = [make_deris_inputs(1, seed=seed) for seed in (0, 1)]
    assert not any(x["targets"].any() for x in inputs)
    model = build(deris_cfg)
    losses = model(inputs)
    assert losses["loss_mask"] == losses["loss_dice_0"] == 0 < losses["loss_class"]
    assert losses.keys() == model([make_deris_inputs(3)]).keys()
    sum(losses.values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


def test_flows_put_scores_where_they_say(deris_cfg, make_deris_inputs):
    inputs = make_deris_inputs()
    scored, masks = {}, {}
    for flow in QUERY_FLOWS:
        model = build(deris_cfg, "QUERY_FLOW", flow).eval()
        with torch.no_grad():
            features = model.encode_images(*model._collate_images([inputs]))
            outputs = model.segment(features, *model._collate_text([inputs]))
        scored[flow] = ["class_logits" in r for r in outputs["rounds"]]
        masks[flow] = outputs["rounds"][-1]["mask_logits"]
        assert len(model.cognition.layers) == (4 if flow == "loopback" else 1)
    assert scored.pop("loopback") == [True] * 4
    assert set(map(tuple, scored.values())) == {(False, False, False, True)}
    # Sentence and image view reach the masks by f_v and the fused queries: three ways, three results.
    assert not torch.allclose(masks["loopback"], masks["p_to_c"], atol=1e-4)
    assert not torch.allclose(masks["c_to_p"], masks["p_to_c"], atol=1e-4)
    assert not torch.allclose(masks["hierarchical"], masks["p_to_c"], atol=1e-4)


def test_masks_know_the_sentence_by_f_v_and_by_the_loop_only(deris_cfg, make_deris_inputs):
    """Without f_v, perception first: its masks are the same whatever is asked."""
    inputs = make_deris_inputs(2)
    same = {}
    for flow, visual in (("p_to_c", False), ("p_to_c", True), ("loopback", False)):
        model = build(deris_cfg, "QUERY_FLOW", flow, "VISUAL_FEATURES", visual).eval()
        with torch.no_grad():
            features = model.encode_images(*model._collate_images([inputs]))
            outputs = model.segment(features, *model._collate_text([inputs]))
        first, second = outputs["rounds"][-1]["mask_logits"]
        same[flow, visual] = torch.allclose(first, second, atol=1e-5)
    assert list(same.values()) == [True, False, False]


def test_expressions_together_are_expressions_alone(deris_cfg, make_deris_inputs):
    """Image features are shared, words are trimmed and padded, nothing leaks between expressions."""
    deris_cfg.TEST.INSTANCES = True
    model = build(deris_cfg, "SCORE_THRESHOLD", 0.0).eval()
    both = [make_deris_inputs(3, seed=0, lengths=[3, 8, 5]), make_deris_inputs(2, seed=1)]
    together = [r for x in model(both) for r in x["referring"]]
    alone = []
    for x in both:
        for e in range(len(x["input_ids"])):
            part = {
                **x,
                **{
                    k: x[k][e : e + 1] for k in ("expressions", "input_ids", "text_mask", "targets")
                },
            }
            alone += model([part])[0]["referring"]
    for a, b in zip(together, alone, strict=True):
        assert a["expression_id"] == b["expression_id"]
        assert a["score"] == pytest.approx(b["score"], abs=1e-5)
        assert (a["mask"] != b["mask"]).float().mean() < 0.01
        assert torch.allclose(a["instances"].scores, b["instances"].scores, atol=1e-5)


def final_round(scores, existence=2.0, size=(16, 24)):
    """Outputs of one expression: query n is the n-th quarter of the columns."""
    logits = torch.full((1, len(scores), *size), -9.0)
    for n in range(len(scores)):
        logits[0, n, :, 6 * n : 6 * n + 6] = 9.0
    probabilities = torch.tensor(scores)
    class_logits = torch.stack([probabilities.log(), (1 - probabilities).log()], -1)[None]
    return {
        "rounds": [{"mask_logits": logits, "class_logits": class_logits}],
        "existence_logits": torch.tensor([existence]),
    }


def test_mask_is_the_union_of_queries_above_the_threshold(deris_cfg, make_deris_inputs):
    inputs = make_deris_inputs(1)
    inputs.update(height=64, width=96)

    def columns(model, outputs):
        masks, scores, absent, _ = model.predict(outputs, slice(0, 1), inputs)
        assert scores.item() == pytest.approx(torch.tensor(2.0).sigmoid().item())
        return masks[0, 32, 12::24].tolist(), absent.item()

    model = build(deris_cfg, "SCORE_THRESHOLD", 0.7)
    assert columns(model, final_round([0.9, 0.2, 0.8, 0.69])) == ([True, False, True, False], False)
    assert columns(model, final_round([0.1, 0.2, 0.7, 0.6])) == ([False] * 4, True)
    model = build(deris_cfg, "SCORE_THRESHOLD", 0.7, "KEEP_BEST", True)
    assert columns(model, final_round([0.1, 0.2, 0.3, 0.6])) == ([False] * 3 + [True], False)
    assert columns(model, final_round([0.9, 0.2, 0.8, 0.6])) == ([True, False, True, False], False)


def test_instances_are_all_queries_on_demand(deris_cfg, make_deris_inputs):
    deris_cfg.TEST.INSTANCES = True
    inputs = make_deris_inputs(1)
    model = build(deris_cfg, "SCORE_THRESHOLD", 0.7)
    masks, _, _, instances = model.predict(final_round([0.9, 0.2]), slice(0, 1), inputs)
    assert instances[0].pred_masks.shape == (2, 40, 60)
    assert instances[0].scores.tolist() == pytest.approx([0.9, 0.2])
    assert torch.equal(masks[0], instances[0].pred_masks[0]) and instances[0].pred_masks[1].any()
    model.return_instances = False
    masks, _, _, instances = model.predict(final_round([0.9, 0.2]), slice(0, 1), inputs)
    assert instances == [None] and masks.any()


def test_who_says_nothing(deris_cfg, make_deris_inputs):
    """RIS (none) reports an empty mask, GRES (head) an absent target as well."""
    said = {}
    for no_target in ("none", "head"):
        deris_cfg.MODEL.RIS.NO_TARGET = no_target
        model = build(deris_cfg, "SCORE_THRESHOLD", 1.0).eval()
        results = model([make_deris_inputs()])[0]["referring"]
        assert not any(r["mask"].any() for r in results)
        said[no_target] = {r["no_target"] for r in results}
    assert said == {"none": {False}, "head": {True}}


@pytest.mark.not_pretended
def test_it_learns_one_image(deris_cfg, make_deris_inputs):
    deris_cfg.MODEL.RIS.NO_TARGET = "head"
    model, inputs = build(deris_cfg, "SCORE_THRESHOLD", 0.5), make_deris_inputs()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = sum(model([inputs]).values())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.4 * losses[0]
    results = model.eval()([inputs])[0]["referring"]
    assert [r["no_target"] for r in results] == [False, False, True]


def test_bfloat16_trains_and_stays_near_fp32(deris_cfg, make_deris_inputs):
    model, inputs = build(deris_cfg), [make_deris_inputs()]
    losses = {}
    for precision in ("fp32", "bf16"):
        model.precision = precision
        torch.manual_seed(1)  # the same points
        losses[precision] = model(inputs)
    sum(losses["bf16"].values()).backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    for name in ("loss_class", "loss_existence"):
        assert losses["bf16"][name].item() == pytest.approx(losses["fp32"][name].item(), rel=0.1)


def test_a_causal_language_model_may_think(
    deris_cfg, make_deris_inputs, tmp_path, without_gradient
):
    """Frozen, as the paper's Qwen2: only what stands on it learns."""
    from transformers import Qwen2Config

    Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
    ).save_pretrained(tmp_path)
    deris_cfg.MODEL.RIS.TEXT.NAME = "RISCausalLM"
    deris_cfg.MODEL.RIS.TEXT.CAUSAL_LM.merge_from_list(["PATH", str(tmp_path), "PRETRAINED", False])
    deris_cfg.MODEL.RIS.FREEZE["cognition.encoder"] = "eval"
    deris_cfg.MODEL.DERIS.COGNITION, deris_cfg.INPUT.RIS.VIEWS = "text", []
    torch.manual_seed(0)
    model = build_model(deris_cfg)
    stir(model)
    sum(model([make_deris_inputs(), make_deris_inputs(2, seed=1)]).values()).backward()
    assert without_gradient(model) == []
    assert not any(p.requires_grad for p in model.cognition.encoder.parameters())
    assert model.cognition.text_proj.weight.grad.any()


def test_settings_that_make_no_sense_are_named(deris_cfg):
    for key in ("QUERY_FLOW", "COGNITION", "TEXT_POSITIONS", "INSTANCE_ATTENTION"):
        with pytest.raises(ValueError, match=f"MODEL.DERIS.{key} is 'best'"):
            build(deris_cfg, key, "best")
    deris_cfg.INPUT.RIS.VIEWS = []
    with pytest.raises(ValueError, match="INPUT.RIS.VIEWS lacks"):
        build(deris_cfg)
