import pytest
import torch
from transformers import BertConfig, BertForPreTraining, BertModel

from ris_d2 import get_ris_cfg
from ris_d2.checkpoint import convert_state_dict, load_init
from ris_d2.modeling.text import BertStack, RISBert, build_text_encoder


def ours(**changes):
    values = {"vocab_size": 40, "dim": 16, "depth": 3, "num_heads": 2}
    return RISBert(**{**values, **changes})


def theirs(kind=BertModel, **changes):
    values = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3}
    sizes = {**values, "num_attention_heads": 2, "intermediate_size": 64, **changes}
    return kind(BertConfig(**sizes))


class Model(torch.nn.Module):
    weight_parts = {"bert": "text"}

    def __init__(self, text):
        super().__init__()
        self.text = text


def load(text, state_dict, tmp_path):
    torch.save(state_dict, tmp_path / "bert.bin")
    load_init(Model(text), [("bert", str(tmp_path / "bert.bin"))])


@pytest.fixture
def sentences():
    torch.manual_seed(0)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    return torch.randint(1, 40, (2, 7)) * mask, mask


def test_equals_transformers(sentences, tmp_path):
    ids, mask = sentences
    reference = theirs().eval()
    model = ours().eval()
    load(model, reference.state_dict(), tmp_path)
    with torch.no_grad():
        expected = reference(ids, attention_mask=mask.long()).last_hidden_state
        found = model(ids, mask)
        stages = model.run_layers(model.embed(ids), mask, 0, 2)
        stages = model.run_layers(stages, mask, 2, 3)
    assert torch.allclose(found[mask], expected[mask], atol=1e-6)
    assert torch.equal(found, stages)


def test_default_is_bert_base_without_pooler():
    cfg = get_ris_cfg()
    cfg.MODEL.RIS.TEXT.NAME = "RISBert"
    with torch.device("meta"):
        model = build_text_encoder(cfg)
    assert (model.dim, model.depth, model.vocab_size) == (768, 12, 30522)
    # bert-base-uncased has 109,482,240 with its pooler
    assert sum(p.numel() for p in model.parameters()) == 109_482_240 - 768 * 769


def test_pads_change_nothing_and_every_parameter_learns(sentences):
    ids, mask = sentences
    model = ours(dropout=0.0, init="scratch")
    shorter = model(ids[1:, :4], mask[1:, :4])
    assert torch.allclose(model(ids, mask)[1, :4], shorter[0], atol=1e-6)
    model(ids, mask).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_dropout_only_in_training(sentences):
    model = ours(dropout=0.5)
    assert not torch.equal(model(*sentences), model(*sentences))
    model.eval()
    assert torch.equal(model(*sentences), model(*sentences))


def test_layers_read_another_modality(sentences):
    """As BertLayer with the keys and values of the context in place of the text's."""
    _, mask = sentences
    torch.manual_seed(1)
    stack = BertStack(dim=16, depth=2, num_heads=2, context_dims={0: 6}).eval()
    hidden, context = torch.randn(2, 7, 16), torch.randn(2, 5, 6)
    found = stack.run_layers(hidden, mask, 0, 1, context)
    layer, attention = stack.layers[0], stack.layers[0].attention.self
    q, k, v = (
        attention.query(hidden),
        attention.context_key(context),
        attention.context_value(context),
    )
    q, k, v = (x.view(2, -1, 2, 8).transpose(1, 2) for x in (q, k, v))
    weights = (q @ k.transpose(2, 3) / 8**0.5).softmax(-1)
    attended = layer.attention.output((weights @ v).transpose(1, 2).flatten(2), hidden)
    inner = torch.nn.functional.gelu(layer.intermediate.dense(attended))
    expected = layer.output(inner, attended)
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.equal(stack.run_layers(hidden, mask, 0, 1, context + 1), found)


@pytest.mark.parametrize("kind", [BertModel, BertForPreTraining])
def test_published_files(kind, tmp_path):
    state = theirs(kind).state_dict()
    if kind is BertForPreTraining:  # the oldest files name LayerNorm's parameters otherwise
        state = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"
            ): v
            for n, v in state.items()
        }
        state["bert.embeddings.position_ids"] = torch.arange(512)[None]
    model = ours()
    load(model, state, tmp_path)
    assert set(convert_state_dict(state, "bert")) == set(model.state_dict())
    name = next(n for n in state if n.endswith("layer.2.output.dense.weight"))
    assert torch.equal(model.layers[2].output.dense.weight, state[name])


def test_cross_layers_take_what_fits_and_keep_their_keys(tmp_path):
    state = theirs().state_dict()
    model = ours(context_dims={1: 6})
    keys = model.layers[1].attention.self.context_key.weight.clone()
    load(model, state, tmp_path)
    attention = model.layers[1].attention
    assert torch.equal(
        attention.self.query.weight, state["encoder.layer.1.attention.self.query.weight"]
    )
    assert torch.equal(attention.self.context_key.weight, keys)


def test_other_files_and_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not a BERT checkpoint.*other"):
        load(ours(), {"other": torch.ones(1)}, tmp_path)
    with pytest.raises(ValueError, match="unfilled"):
        load(ours(depth=4), theirs().state_dict(), tmp_path)
    with pytest.raises(ValueError, match="INIT is 'best'"):
        ours(init="best")
