"""The four kinds against sentencepiece and transformers, and every silent failure loud."""

import builtins
import json
import pickle
import time

import pytest
import torch
from ris_d2 import get_ris_cfg
from ris_d2.data.tokenizer import Tokenizer, clean_text
from ris_d2.refshapes import write_tokenizer

TEXTS = ["the red man on the left", "left square", "a man left of the red square with an umbrella"]
BERT_WORDS = (
    "[PAD] [unused0] [UNK] [CLS] [SEP] [MASK] the a red man left of on ##s sq ##uare".split()
)


def train_spm(target, **ids):
    """A tiny real sentencepiece model of TEXTS."""
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_prefix=str(target.with_suffix("")),
        vocab_size=45,
        hard_vocab_limit=False,
        minloglevel=2,
        **ids,
    )
    target.with_suffix(".model").rename(target)
    return target


@pytest.fixture
def beit3_file(tmp_path):
    return train_spm(tmp_path / "tiny.spm")


@pytest.fixture
def bert_folder(tmp_path):
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS))
    return folder


@pytest.fixture
def clip_folder(tmp_path):
    """Byte-level BPE in CLIP's format: 2 x 256 bytes, merges, start, end."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    merges = ["t h", "th e</w>", "r e", "re d</w>", "l e", "f t</w>", "le ft</w>"]
    tokens = [*letters, *(c + "</w>" for c in letters), *(m.replace(" ", "") for m in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return folder


@pytest.fixture
def shapes_folder(tmp_path):
    folder = tmp_path / "tokenizer"
    write_tokenizer(str(folder))
    return folder


def make(kind, path, max_tokens=12, clean=False):
    return Tokenizer(kind=kind, path=str(path), max_tokens=max_tokens, clean=clean)


def test_beit3_has_fairseq_ids(beit3_file):
    import sentencepiece

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(beit3_file))
    tokenizer = make("beit3", beit3_file, max_tokens=40)
    texts = [*TEXTS, "the \u2603 man"]  # the snowman is no piece
    ids, mask = tokenizer(texts)
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == (4, 40)
    for row, real, text in zip(ids.tolist(), mask.tolist(), texts):
        expected = [0] + [3 if p == 0 else p + 1 for p in pieces.encode(text)] + [2]
        assert row == expected + [1] * (40 - len(expected))
        assert real == [True] * len(expected) + [False] * (40 - len(expected))
    assert 3 in ids[3].tolist() and 3 not in ids[0].tolist()
    assert tokenizer.vocab_size == pieces.get_piece_size() + 2


def test_beit3_folder_with_spm_or_tokenizer_json(beit3_file, tmp_path):
    """The same pieces as tokenizer.json, laid out as a converted XLM-R, give the same ids."""
    import sentencepiece
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, pre_tokenizers

    pieces = sentencepiece.SentencePieceProcessor(model_file=str(beit3_file))
    words = [(pieces.id_to_piece(i), pieces.get_score(i)) for i in range(3, len(pieces))]
    special = [(token, 0.0) for token in ("<s>", "<pad>", "</s>", "<unk>")]
    backend = Backend(models.Unigram([*special, *words, ("<mask>", 0.0)], unk_id=3))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    folder = tmp_path / "converted"
    folder.mkdir()
    backend.save(str(folder / "tokenizer.json"))

    direct = make("beit3", beit3_file, max_tokens=40)
    converted = make("beit3", folder, max_tokens=40)
    assert converted.vocab_size == direct.vocab_size
    for ours, theirs in zip(direct(TEXTS), converted(TEXTS)):
        assert torch.equal(ours, theirs)


def test_bert_equals_transformers(bert_folder):
    from transformers import BertTokenizerFast

    reference = BertTokenizerFast.from_pretrained(str(bert_folder))
    for length in (4, 12):
        expected = reference(
            TEXTS, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        )
        for path in (bert_folder, bert_folder / "vocab.txt"):
            ids, mask = make("bert", path, max_tokens=length)(TEXTS)
            assert torch.equal(ids, expected["input_ids"])
            assert torch.equal(mask, expected["attention_mask"].bool())
    assert ids[1].tolist()[:5] == [3, 10, 14, 15, 4]  # [CLS] left sq ##uare [SEP]


def test_clip_equals_transformers_but_pads_with_zero(clip_folder):
    from transformers import CLIPTokenizerFast

    reference = CLIPTokenizerFast.from_pretrained(str(clip_folder))
    tokenizer = make("clip", clip_folder)
    ids, mask = tokenizer(TEXTS)
    for row, real, text in zip(ids, mask, TEXTS):
        expected = reference(text, truncation=True, max_length=12)["input_ids"]
        assert row[: len(expected)].tolist() == expected
        assert real.sum() == len(expected)
        assert not row[len(expected) :].any()
    # The first end token, where CLIP reads the sentence, is the highest id as in the published one.
    assert ids.argmax(-1).tolist() == (mask.sum(-1) - 1).tolist()
    assert tokenizer.end_id == tokenizer.vocab_size - 1


@pytest.mark.parametrize("kind", ["beit3", "bert", "clip", "hf"])
def test_truncation_keeps_the_end_token(kind, beit3_file, bert_folder, clip_folder, shapes_folder):
    path = {"beit3": beit3_file, "bert": bert_folder, "clip": clip_folder, "hf": shapes_folder}[
        kind
    ]
    tokenizer = make(kind, path, max_tokens=4)
    long = make(kind, path, max_tokens=60)
    ids, mask = tokenizer(TEXTS[:1])
    assert mask.all()
    assert ids[0, 0] == tokenizer.start_id and ids[0, -1] == tokenizer.end_id
    assert torch.equal(ids[0, :3], long(TEXTS[:1])[0][0, :3])
    restored = pickle.loads(pickle.dumps(tokenizer))  # loader workers may be spawned
    assert torch.equal(restored(TEXTS)[0], tokenizer(TEXTS)[0])


@pytest.mark.parametrize("kind", ["beit3", "bert", "clip", "hf"])
def test_a_saved_one_gives_the_same_ids(
    kind, beit3_file, bert_folder, clip_folder, shapes_folder, tmp_path
):
    path = {"beit3": beit3_file, "bert": bert_folder, "clip": clip_folder, "hf": shapes_folder}[
        kind
    ]
    tokenizer = make(kind, path)
    tokenizer.save(tmp_path / "saved")
    saved = make(kind, tmp_path / "saved" / tokenizer.file.name)
    assert torch.equal(saved(TEXTS)[0], tokenizer(TEXTS)[0])
    assert (saved.start_id, saved.end_id) == (tokenizer.start_id, tokenizer.end_id)


@pytest.mark.parametrize("kind", ["beit3", "bert", "clip", "hf"])
def test_tokens_for_a_person(kind, beit3_file, bert_folder, clip_folder, shapes_folder):
    path = {"beit3": beit3_file, "bert": bert_folder, "clip": clip_folder, "hf": shapes_folder}[
        kind
    ]
    tokenizer = make(kind, path, max_tokens=60)
    ids, mask = tokenizer(["left red square"])
    start, *words, end = tokenizer.tokens(ids[0, mask[0]].tolist())
    assert start in ("<s>", "[CLS]", "<|startoftext|>") and end in (
        "</s>",
        "[SEP]",
        "<|endoftext|>",
    )
    assert "".join(words) == "leftredsquare"
    assert tokenizer.tokens([tokenizer.pad_id])[0] in (
        "<pad>",
        "[PAD]",
        "!",
    )  # CLIP's 0 is a letter


def test_refshapes_tokenizer(shapes_folder):
    tokenizer = make("hf", shapes_folder, clean=True)
    ids, mask = tokenizer(["The red circle!", "shiny circle"])
    assert ids[0, 0] == 0 and ids[0, 4] == 2 and (ids[0, 5:] == 1).all() and mask[0].sum() == 5
    assert ids[1, :4].tolist() == [0, 3, ids[0, 3], 2]
    assert torch.equal(make("beit3", shapes_folder, clean=True)(["The red circle!"])[0], ids[:1])


def test_from_config_and_dataset_root(shapes_folder, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shapes_folder.parent))
    cfg = get_ris_cfg()
    cfg.INPUT.RIS.TOKENIZER.KIND = "hf"
    cfg.INPUT.RIS.TOKENIZER.PATH = shapes_folder.name
    cfg.INPUT.RIS.MAX_TOKENS = 7
    ids, _ = Tokenizer(cfg)(["The red circle, left!"])
    assert ids.shape == (1, 7)
    assert 3 not in ids.tolist()[0]


def test_cleaning():
    assert clean_text(' The man\'s "hat", (red): #1; what?! * left-most/top. ') == (
        "the mans hat red 1 what  left most top"
    )


def test_no_texts(bert_folder):
    ids, mask = make("bert", bert_folder)([])
    assert ids.shape == mask.shape == (0, 12)


@pytest.mark.parametrize("text", ["", "  ", "?!"])
def test_empty_sentence_is_an_error(text, bert_folder):
    with pytest.raises(ValueError, match="is empty") as error:
        make("bert", bert_folder, clean=True)(["the man", text])
    assert repr(text) in str(error.value)


def test_unknown_words_and_cut_sentences_are_named_once_per_call(shapes_folder, caplog):
    tokenizer = make("hf", shapes_folder, max_tokens=6)
    with caplog.at_level("WARNING"):
        tokenizer(["the circle", "the shiny teapot", "a teapot"])
        assert caplog.text.count("'teapot'") == caplog.text.count("'shiny'") == 1
        assert "circle" not in caplog.text and "MAX_TOKENS" not in caplog.text
        caplog.clear()
        tokenizer(["the circle", "the red circle left of the square"])
        assert "MAX_TOKENS 6: 'the red circle left of the square' (its first 4 of 7" in caplog.text
        assert "does not know" not in caplog.text


def test_what_is_not_read_can_be_asked_for(shapes_folder, caplog):
    tokenizer = make("hf", shapes_folder, max_tokens=6)
    texts = ["the circle", "the shiny teapot", "the teapot", "the red circle left of the square"]
    with caplog.at_level("WARNING"):
        unknown, cut = tokenizer.unread(texts)
    assert unknown == ["shiny", "teapot"] and not caplog.text
    assert cut == ["'the red circle left of the square' (its first 4 of 7 tokens are read)"]


def test_a_loaders_calls_stop_warning(shapes_folder, caplog):
    tokenizer = make("hf", shapes_folder)
    with caplog.at_level("WARNING"):
        for _ in range(9):
            tokenizer(["the teapot"])
        tokenizer(["the circle"])
    assert caplog.text.count("'teapot'") == 5


def test_unknown_pieces_are_named_by_their_word(beit3_file, bert_folder, caplog):
    with caplog.at_level("WARNING"):
        make("beit3", beit3_file)(["the \u2603man"])
        assert "'\u2603man'" in caplog.text and "'the'" not in caplog.text
        make("bert", bert_folder)(["the teapot"])
        assert "'teapot'" in caplog.text


@pytest.mark.parametrize("kind", ["beit3", "bert", "clip", "hf"])
def test_missing_path_says_what_was_tried(kind, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError) as error:
        make(kind, "weights/none.spm")
    message = str(error.value)
    assert "weights/none.spm" in message and str(tmp_path / "data/weights/none.spm") in message
    assert "published" in message or "make_refshapes" in message
    with pytest.raises(FileNotFoundError, match="PATH is empty"):
        make(kind, "")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="in this folder"):
        make(kind, tmp_path / "empty")


def test_hub_name_offline(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="hub did not give it"):
        make("bert", "nobody/no-such-bert")
    assert time.monotonic() - start < 5


def test_beit3_file_problems(beit3_file, tmp_path, monkeypatch):
    real_name = tmp_path / "beit3.spm"
    real_name.write_bytes(beit3_file.read_bytes())
    with pytest.raises(ValueError, match="released beit3.spm has 64002"):
        make("beit3", real_name)
    damaged = tmp_path / "damaged.spm"
    damaged.write_bytes(beit3_file.read_bytes()[:200])
    with pytest.raises(ValueError, match="damaged"):
        make("beit3", damaged)
    with pytest.raises(ValueError, match="is read from tokenizer.json or vocab.txt"):
        make("bert", beit3_file)

    def no_sentencepiece(name, *args, **kwargs):
        if name == "sentencepiece":
            raise ImportError(name)
        return importing(name, *args, **kwargs)

    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", no_sentencepiece)
    with pytest.raises(ImportError, match="pip install sentencepiece"):
        make("beit3", beit3_file)


def test_beit3_pieces_in_another_order(tmp_path):
    train_spm(tmp_path / "other.spm", unk_id=2, bos_id=0, eos_id=1)
    with pytest.raises(ValueError, match=r"pieces \(2, 0, 1\)"):
        make("beit3", tmp_path / "other.spm")


def test_tokenizers_without_words_or_special_tokens(bert_folder, clip_folder, shapes_folder):
    (bert_folder / "vocab.txt").write_text("\n".join(BERT_WORDS[:6]))
    with pytest.raises(ValueError, match="not a usable bert tokenizer: of its 6 tokens none"):
        make("bert", bert_folder)
    for kind in ("bert", "clip"):  # transformers would quietly append the missing tokens
        with pytest.raises(ValueError, match=f"{kind} tokenizer"):
            make(kind, shapes_folder)
    (clip_folder / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match="merges.txt"):
        make("clip", clip_folder)
    (shapes_folder / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ValueError, match="tokenizer_config.json beside it does not name them"):
        make("hf", shapes_folder)
    vocabulary = json.loads((shapes_folder / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"] = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "the": 4}
    vocabulary["added_tokens"] = []
    (shapes_folder / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(ValueError, match="BEiT-3 has"):
        make("beit3", shapes_folder)
    (shapes_folder / "tokenizer.json").write_text('{"version": "1.0", "model"')
    with pytest.raises(ValueError, match=r"tokenizer\.json: Expecting ':' delimiter"):
        make("hf", shapes_folder)


def test_wrong_arguments(bert_folder):
    with pytest.raises(ValueError, match="kind 'word2vec' is unknown"):
        make("word2vec", bert_folder)
    with pytest.raises(ValueError, match="MAX_TOKENS is 2"):
        make("bert", bert_folder, max_tokens=2)
