"""Published files fill VIPA's encoders: what fits is used, what has no counterpart stays random."""

import pytest
import torch
from transformers import BertConfig, BertModel

from ris_d2.checkpoint import load_init
from ris_d2.modeling.backbone import RISBEiT3, RISSwin
from ris_d2.modeling.vipa import VIPA


@pytest.fixture
def bert(tmp_path):
    torch.manual_seed(1)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 7}
    config = BertConfig(**sizes, num_attention_heads=2, intermediate_size=64)
    state = BertModel(config).state_dict()
    torch.save(state, tmp_path / "bert.bin")
    return ["bert", str(tmp_path / "bert.bin")], state


@pytest.fixture
def swin(tmp_path, vipa_cfg):
    """A classifier's weights: no norms at the outputs of the stages."""
    torch.manual_seed(2)
    state = RISSwin(**RISSwin.from_config(vipa_cfg), out_features=()).state_dict()
    torch.save({"model": {**state, "head.weight": torch.ones(3, 64)}}, tmp_path / "swin.pth")
    return ["swin", str(tmp_path / "swin.pth")], state


@pytest.mark.parametrize("encoder", ["early", "one_way", "late", "none"])
def test_swin_and_bert(encoder, vipa_cfg, bert, swin):
    vipa_cfg.MODEL.VIPA.ENCODER = encoder
    model = VIPA(vipa_cfg)
    filled = load_init(model, [bert[0], swin[0]])
    for name, value in swin[1].items():
        assert torch.equal(model.encoder.vision.state_dict()[name], value)
    layers = model.encoder.text.layers
    for number in range(7):
        for name in ("attention.self.query", "attention.output.dense", "output.dense"):
            value = bert[1][f"encoder.layer.{number}.{name}.weight"]
            assert torch.equal(layers[number].get_submodule(name).weight, value)
    random = {
        name.removeprefix("encoder.")
        for name, _ in model.named_parameters()
        if name.startswith(("encoder.text.", "encoder.vision.")) and name not in filled
    }
    if encoder == "early":  # keys and values that read the image
        assert random == {
            f"text.layers.{n}.attention.self.context_{part}.{kind}"
            for n in (1, 3, 5)
            for part in ("key", "value")
            for kind in ("weight", "bias")
        }
    else:
        assert all(name.startswith("vision.norms.") for name in random)


def test_stages_may_start_random_as_in_crossvlt(vipa_cfg, bert):
    vipa_cfg.MODEL.VIPA.INIT_STAGES_FROM_BERT = False
    model = VIPA(vipa_cfg)
    stages = {
        name: value.clone() for name, value in model.encoder.language_stages.state_dict().items()
    }
    load_init(model, [bert[0]])
    assert len(model.encoder.text.layers) == 1
    value = bert[1]["encoder.layer.0.output.dense.weight"]
    assert torch.equal(model.encoder.text.layers[0].output.dense.weight, value)
    for name, value in model.encoder.language_stages.state_dict().items():
        assert torch.equal(value, stages[name])


def test_beit3_and_sources_of_another_encoder(tmp_path, vipa_cfg, bert):
    vipa_cfg.MODEL.VIPA.ENCODER = "beit3"
    torch.manual_seed(3)
    state = {f"beit3.{name}": value for name, value in RISBEiT3(vipa_cfg).state_dict().items()}
    torch.save({"model": state}, tmp_path / "beit3.pth")
    model = VIPA(vipa_cfg)
    load_init(model, [["beit3", str(tmp_path / "beit3.pth")]])
    assert torch.equal(model.encoder.beit3.text_embed.weight, state["beit3.text_embed.weight"])
    with pytest.raises(ValueError, match="'bert', but VIPA has parts for beit3"):
        load_init(model, [bert[0]])
