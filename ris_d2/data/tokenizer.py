"""Sentences to token ids: BEiT-3, BERT, CLIP or any fast tokenizer behind one call."""

import logging
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode, configurable

from ..io import dataset_root, reading

logger = logging.getLogger(__name__)

_DELETED = str.maketrans({**dict.fromkeys(".,'!?\"()*#:;"), "-": " ", "/": " "})
# Files that a kind is read from, in this order of preference.
_FILES = {
    "beit3": ("beit3.spm", "tokenizer.json"),
    "bert": ("tokenizer.json", "vocab.txt"),
    "clip": ("tokenizer.json", "vocab.json"),
    "hf": ("tokenizer.json",),
}
_ADVICE = {
    "beit3": "beit3.spm is published with microsoft/unilm, folder beit3",
    "bert": "published as bert-base-uncased on the Hugging Face hub (vocab.txt)",
    "clip": "published as openai/clip-vit-base-patch16 on the Hugging Face hub "
    "(vocab.json and merges.txt)",
    "hf": "RefShapes' own is the folder tokenizer/ that datasets/make_refshapes.py writes",
}
_BESIDE = ("merges.txt", "tokenizer_config.json", "special_tokens_map.json")
_BEIT3_SPECIAL = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3}
_BEIT3_SIZE = 64002  # pieces of the released beit3.spm, with the offset and <mask>
_PROBE = "the red man on the left"


class Tokenizer:
    """Turns sentences into ids of one length: start token, words, end token, padding.

    The first token (``input_ids[:, 0]``) stands for the sentence: <s>, [CLS] or <|startoftext|>.
    A sentence that is too long loses its last words, never the end token.

    ==========  ======================  ======================  ====================================
    kind        start, end              pad                     path
    ==========  ======================  ======================  ====================================
    ``beit3``   <s> 0, </s> 2           <pad> 1                 .spm file (sentencepiece), or folder
                                                                with beit3.spm or tokenizer.json
    ``bert``    [CLS], [SEP]            [PAD]                   vocab.txt, or folder with it or
                                                                tokenizer.json
    ``clip``    <|startoftext|> 49406,  0, as openai/CLIP and   folder with tokenizer.json, or
                <|endoftext|> 49407     ASDA (Hugging Face      vocab.json and merges.txt
                                        pads with 49407)
    ``hf``      bos or cls, eos or sep  as its config says      folder with tokenizer.json and
                                                                tokenizer_config.json
    ==========  ======================  ======================  ====================================

    A .spm is read as fairseq does (XLM-R, BEiT-3): id = piece + 1, unknown = 3. CLIP texts do not
    go through ftfy, which openai/CLIP applies: typographic quotes differ, plain text does not.

    Attributes:
        vocab_size: number of rows that an embedding table needs.
        start_id, end_id, pad_id: int.
        warnings_left: calls that may still warn of unknown words and of sentences that are cut. Few
            at first: a loader calls for every sentence of a dataset. Predictor sets infinity.
    """

    @configurable
    def __init__(self, *, kind: str, path: str, max_tokens: int, clean: bool) -> None:
        """
        Args:
            kind: beit3, bert, clip or hf.
            path: file or folder, as given or under ``dataset_root()``; else a name on the Hugging
                Face hub.
            max_tokens: L, special tokens included.
            clean: apply ``clean_text`` first.

        Raises:
            ValueError: unknown kind, L below 3, or a tokenizer that is damaged, knows no English
                word, lacks special tokens or is not the released beit3.spm of that name.
            FileNotFoundError: nothing at ``path``; says what was tried and where to get it.
            ImportError: a .spm without the package sentencepiece.
        """
        if kind not in _FILES:
            raise ValueError(f"tokenizer kind {kind!r} is unknown; there are {', '.join(_FILES)}")
        if max_tokens < 3:
            raise ValueError(f"INPUT.RIS.MAX_TOKENS is {max_tokens}: no room for a word")
        self.kind, self.max_tokens, self.clean = kind, max_tokens, clean
        self.file = _find_file(kind, path)
        self.warnings_left = 5
        is_spm = self.file.suffix == ".spm"
        self._words = _Pieces(self.file) if is_spm else _load_fast(kind, self.file)
        self.vocab_size = len(self._words)
        with reading(self.file):
            self.start_id, self.end_id, self.pad_id = _special_ids(kind, self._words, self.file)
            encoded = self._encode([_PROBE])[0]
        if set(encoded) <= {self._words.unk_token_id}:
            raise ValueError(
                f"{self.file}: not a usable {kind} tokenizer: of its {self.vocab_size} tokens none "
                f"is in {_PROBE!r}. Is the file complete and of that kind? {_ADVICE[kind]}"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        node = cfg.INPUT.RIS.TOKENIZER
        return {
            "kind": node.KIND,
            "path": node.PATH,
            "max_tokens": cfg.INPUT.RIS.MAX_TOKENS,
            "clean": node.CLEAN,
        }

    def __call__(self, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ``input_ids`` int64 (E,L) and ``text_mask`` bool (E,L), True = real token.

        A call with words that the tokenizer does not know, or with sentences that are too long,
        logs one warning that names them all, as long as there are ``warnings_left``.

        Raises ``ValueError`` naming a text in which no word is left.
        """
        cleaned = [clean_text(text) for text in texts] if self.clean else list(texts)
        encoded = self._encode(cleaned)
        for text, ids in zip(texts, encoded):
            if not ids:
                raise ValueError(f"the sentence {text!r} is empty: no word is left to tokenize")
        rows = [[self.start_id, *ids[: self.max_tokens - 2], self.end_id] for ids in encoded]
        lengths = torch.tensor([len(row) for row in rows])
        text_mask = torch.arange(self.max_tokens) < lengths[:, None]
        input_ids = torch.full(text_mask.shape, self.pad_id)
        input_ids[text_mask] = torch.tensor([id_ for row in rows for id_ in row], dtype=torch.int64)
        if self.warnings_left > 0:
            self._warn(cleaned, encoded)
        return input_ids, text_mask

    def unread(self, texts: list[str]) -> tuple[list[str], list[str]]:
        """What a model cannot take from the sentences: words that the tokenizer does not know, and
        the sentences that are too long, each with a note of how much is read."""
        cleaned = [clean_text(text) for text in texts] if self.clean else list(texts)
        return self._unread(cleaned, self._encode(cleaned))

    def _unread(self, texts: list[str], encoded: list[list[int]]) -> tuple[list[str], list[str]]:
        most, unknown_id = self.max_tokens - 2, self._words.unk_token_id
        unknown, cut = [], []
        for text, ids in zip(texts, encoded):
            if unknown_id in ids:
                words = text.split()
                found = [w for w, own in zip(words, self._encode(words)) if unknown_id in own]
                unknown += found or [text]
            if len(ids) > most:
                cut.append(f"{text!r} (its first {most} of {len(ids)} tokens are read)")
        return list(dict.fromkeys(unknown)), cut

    def _warn(self, texts: list[str], encoded: list[list[int]]) -> None:
        unknown, cut = self._unread(texts, encoded)
        if unknown:
            names = ", ".join(map(repr, unknown))
            logger.warning("The tokenizer %s does not know: %s", self.file, names)
        if cut:
            names = ", ".join(cut)
            logger.warning("Longer than INPUT.RIS.MAX_TOKENS %d: %s", self.max_tokens, names)
        self.warnings_left -= bool(unknown or cut)

    def save(self, folder: str | os.PathLike) -> None:
        """Copy what it was read from into ``folder``; its path is ``folder / self.file.name``."""
        os.makedirs(folder, exist_ok=True)
        for file in (self.file, *map(self.file.with_name, _BESIDE)):
            if file.is_file():
                shutil.copyfile(file, os.path.join(folder, file.name))

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """How a person reads the ids: the pieces of words, without the marks of their edges."""
        pieces = self._words.convert_ids_to_tokens(list(ids))
        return [p.strip("\u2581\u0120").removeprefix("##").removesuffix("</w>") for p in pieces]

    def _encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of the words alone."""
        if not texts:
            return []
        with reading(self.file):  # what is damaged in it may be met with the first odd word
            # By default the library makes lists of masks, too, which takes longer than the ids.
            options = {"return_attention_mask": False, "return_token_type_ids": False}
            encoded = self._words(texts, add_special_tokens=False, verbose=False, **options)
            return encoded["input_ids"]


def clean_text(text: str) -> str:
    """Lower-case, delete . , ' ! ? " ( ) * # : ; and turn - and / into spaces (DeRIS, C3VG)."""
    return text.lower().translate(_DELETED).strip()


def _find_file(kind: str, path: str) -> Path:
    """The file to read: ``path`` itself, one in the folder ``path``, or one from the hub."""
    if not path:
        raise FileNotFoundError(f"INPUT.RIS.TOKENIZER.PATH is empty ({kind}: {_ADVICE[kind]})")
    tried = [Path(path).expanduser(), Path(dataset_root(), path)]
    found = next((place for place in tried if place.exists()), None) or _fetch(kind, path, tried)
    names = _FILES[kind]
    if found.is_file():
        if found.name in names or (kind == "beit3" and found.suffix == ".spm"):
            return found
        raise ValueError(f"{found}: a tokenizer of kind {kind} is read from {' or '.join(names)}")
    for file in (found / name for name in names):
        if file.is_file():
            return file
    raise FileNotFoundError(
        f"{found}: no {' and no '.join(names)} in this folder, for kind {kind}; {_ADVICE[kind]}"
    )


def _fetch(kind: str, name: str, tried: list[Path]) -> Path:
    """Folder with the tokenizer files of the hub's repository ``name``, from its cache if there."""
    reason = "it is not a repository name"
    if re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) and not name.endswith((".spm", ".json", ".txt")):
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(name, allow_patterns=[*_FILES[kind], *_BESIDE]))
        except Exception as error:  # many kinds: offline, no such repository, gated, disk full, ...
            reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    places = " and ".join(str(place.absolute()) for place in tried)
    raise FileNotFoundError(
        f"no tokenizer {name!r} (INPUT.RIS.TOKENIZER.PATH, kind {kind}): there is no {places}, and "
        f"the Hugging Face hub did not give it ({reason}). {_ADVICE[kind]}"
    )


class _Pieces:
    """A sentencepiece model with fairseq's ids, behind the calls of a transformers tokenizer."""

    unk_token_id = _BEIT3_SPECIAL["<unk>"]

    def __init__(self, file: Path) -> None:
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(
                f"{file} needs the package sentencepiece (pip install sentencepiece); without it, "
                "give INPUT.RIS.TOKENIZER.PATH a folder with the converted tokenizer.json"
            ) from error
        with reading(file):
            self._pieces = sentencepiece.SentencePieceProcessor(model_file=str(file))
            ids = self._pieces.unk_id(), self._pieces.bos_id(), self._pieces.eos_id()
        if ids != (0, 1, 2):
            raise ValueError(f"{file}: unknown, start, end are pieces {ids}, BEiT-3's (0, 1, 2)")
        if file.name == "beit3.spm" and len(self) != _BEIT3_SIZE:
            raise ValueError(
                f"{file}: {len(self)} tokens, but the released beit3.spm has {_BEIT3_SIZE}; "
                f"get it again ({_ADVICE['beit3']}), or name another model differently"
            )

    def __len__(self) -> int:
        return self._pieces.get_piece_size() + 2

    def __call__(self, texts: list[str], **options) -> dict[str, list[list[int]]]:
        encoded = self._pieces.encode(texts)
        return {"input_ids": [[p + 1 if p else self.unk_token_id for p in ids] for ids in encoded]}

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        special = {i: token for token, i in _BEIT3_SPECIAL.items()}
        return [special.get(i) or self._pieces.id_to_piece(i - 1) for i in ids]

    def get_vocab(self) -> dict[str, int]:
        return _BEIT3_SPECIAL


def _load_fast(kind: str, file: Path):
    """The transformers tokenizer whose files are ``file`` and its neighbours."""
    # The data loader forks; the library's threads would not survive that and it warns.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import BertTokenizerFast, CLIPTokenizerFast, PreTrainedTokenizerFast

    if kind == "clip" and file.name == "vocab.json" and not file.with_name("merges.txt").is_file():
        raise FileNotFoundError(f"{file.with_name('merges.txt')}: missing beside {file.name}")
    kinds = {"bert": BertTokenizerFast, "clip": CLIPTokenizerFast}
    with reading(file):
        return kinds.get(kind, PreTrainedTokenizerFast).from_pretrained(str(file.parent))


def _special_ids(kind: str, words, file: Path) -> tuple[int, int, int]:
    """Ids of start, end and padding; ``ValueError`` where the file lacks one."""
    vocabulary = words.get_vocab()
    if kind == "beit3":
        ids = {token: vocabulary.get(token) for token in _BEIT3_SPECIAL}
        if ids != _BEIT3_SPECIAL:
            raise ValueError(f"{file}: special tokens are {ids}, BEiT-3 has {_BEIT3_SPECIAL}")
        return ids["<s>"], ids["</s>"], ids["<pad>"]
    if kind != "hf":  # transformers appends what is missing to the vocabulary
        vocabulary = words.backend_tokenizer.get_vocab(with_added_tokens=False)
    start, end = words.cls_token or words.bos_token, words.sep_token or words.eos_token
    tokens = {
        "start (bos or cls)": start,
        "end (eos or sep)": end,
        "padding (pad)": words.pad_token,
    }
    missing = [f"{name} token {token}" for name, token in tokens.items() if token not in vocabulary]
    if missing:
        raise ValueError(
            f"{file}: no {', no '.join(missing)} in its vocabulary of {len(vocabulary)}; it is "
            f"not a {kind} tokenizer, or tokenizer_config.json beside it does not name them. "
            f"{_ADVICE[kind]}"
        )
    return vocabulary[start], vocabulary[end], 0 if kind == "clip" else vocabulary[words.pad_token]
