"""Non-referent sample conversion: a sentence gives way to one that is not true of the image.

An augmentation of DeRIS (Dai et al., ICCV 2025) against the scarcity of sentences without target.
"""

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .catalog import image_key
from .tokenizer import clean_text
from .units import take

logger = logging.getLogger(__name__)

RULES = ("paper", "released")
# Candidates tried for a sentence before it is left as it is; released code.
_ATTEMPTS = 51


class SentencePool:
    """The sentences of a training set, drawn from and looked up by image.

    An image is its file: ids collide across data sets, and mixed sets have several records of one.
    """

    def __init__(self, records: Sequence[dict]):
        """``records``: indexed at every draw, so that a serialised list serves all workers."""
        self._records = records
        self._of_image: dict[str, list[int]] = {}
        nonempty = []
        for index in range(len(records)):
            record = records[index]
            self._of_image.setdefault(image_key(record), []).append(index)
            if record["expressions"]:
                nonempty.append(index)
        self._nonempty = np.array(nonempty)

    def draw(self, rng: np.random.Generator) -> tuple[str, str]:
        """Draw an image uniformly, then one of its sentences: (image, text)."""
        record = self._records[int(self._nonempty[rng.integers(len(self._nonempty))])]
        expression = record["expressions"][rng.integers(len(record["expressions"]))]
        return image_key(record), expression["text"]

    def true_sentences(self, image: str) -> list[str]:
        """All sentences that have a target in the image, whatever data set annotates them."""
        return [
            expression["text"]
            for index in self._of_image.get(image, ())
            for expression in self._records[index]["expressions"]
            if expression["annotation_ids"]
        ]


@dataclass(frozen=True, kw_only=True)
class NonReferentConversion:
    """Converts a share of the sentences that have a target.

    A candidate is drawn from the pool and accepted if

    1. it belongs to another image (rule "paper"),
    2. it has more than ``min_words`` words (rule "released": any),
    3. its similarity to the sentence that it replaces is below ``max_similarity``, and
    4. no sentence with a target in this image consists of the same words (ours, always: such a
       candidate would be true, and the sample false).

    Rule "paper" compares words of cleaned sentences; "released" compares characters of raw ones, as
    the released code does (but, unlike that code, nothing is converted in place for all later
    epochs).

    Args:
        rate: R_c, probability of trying to convert a sentence with a target.
        min_words: N_w of rule "paper"; rule "released" has 0.
        max_similarity: T_s, see :func:`similarity`.
        rules: "paper" or "released".

    Raises:
        ValueError: unknown rules, or a rate outside of [0, 1].
    """

    rate: float
    min_words: int = 2
    max_similarity: float = 0.6
    rules: str = "paper"

    def __post_init__(self) -> None:
        if self.rules not in RULES:
            raise ValueError(f"INPUT.RIS.NSC.RULES is {self.rules!r}, not {' or '.join(RULES)}")
        if not 0 <= self.rate <= 1:
            raise ValueError(f"INPUT.RIS.NSC.RATE lies in [0, 1], not {self.rate}")

    def __call__(self, unit: dict, pool: SentencePool, rng: np.random.Generator) -> dict:
        """Convert some of a unit's expressions.

        Args:
            unit: of :func:`ris_d2.data.units.take`; not changed.
            pool: of the whole training set.
            rng: the random numbers of this draw; nothing else decides.

        Returns:
            The unit, or a copy in which a converted expression has the new "text", the old one as
            "replaced_text" and no "annotation_ids"; annotations that no expression names are left
            out.
        """
        chosen = rng.random(len(unit["expressions"])) < self.rate
        expressions = [
            self._convert(e, image_key(unit), pool, rng) if choice and e["annotation_ids"] else e
            for e, choice in zip(unit["expressions"], chosen)
        ]
        if not any("replaced_text" in expression for expression in expressions):
            return unit
        return take({**unit, "expressions": expressions}, range(len(expressions)))

    def _convert(
        self, expression: dict, image: str, pool: SentencePool, rng: np.random.Generator
    ) -> dict:
        true = {_bag_of_words(text) for text in pool.true_sentences(image)}
        own = self._parts(expression["text"])
        min_words = self.min_words if self.rules == "paper" else 0
        for _ in range(_ATTEMPTS):
            candidate_image, text = pool.draw(rng)
            if (
                (self.rules == "released" or candidate_image != image)
                and len(_bag_of_words(text)) > min_words
                and _bag_of_words(text) not in true
                and similarity(self._parts(text), own) < self.max_similarity
            ):
                changes = {"annotation_ids": [], "replaced_text": expression["text"]}
                return {**expression, **changes, "text": text}
        return expression

    def _parts(self, text: str) -> Sequence[str]:
        return clean_text(text).split() if self.rules == "paper" else text


class ConversionLog:
    """Logs every so many batches how many sentences were converted."""

    def __init__(self, period: int = 1000):
        self._period = period
        self._batches = self._sentences = self._with_target = self._converted = 0

    def count(self, batch: Iterable[dict]) -> None:
        """Count a batch of units or model inputs."""
        self._batches += 1
        for expression in (expression for unit in batch for expression in unit["expressions"]):
            converted = "replaced_text" in expression
            self._sentences += 1
            self._converted += converted
            self._with_target += converted or bool(expression["annotation_ids"])
        if self._batches % self._period == 0 and self._with_target:
            before, share = self._with_target, 100 / self._sentences
            logger.info(
                f"NSC: {self._converted} of {before} sentences with a target converted "
                f"({100 * self._converted / before:.1f} %); "
                f"{100 - share * (before - self._converted):.1f} % of all {self._sentences} "
                f"sentences have no target, {100 - share * before:.1f} % without conversion"
            )


def similarity(one: Sequence[str], other: Sequence[str]) -> float:
    """Mean of Jaccard and cosine similarity of two multisets, in [0, 1].

    With shared = sum of min counts: shared / (|a| + |b| - shared), and shared / sqrt(|a| |b|),
    which is the cosine of the count vectors where nothing occurs twice.

    Args:
        one, other: words, or a str for its characters.
    """
    if not one or not other:
        return 0.0
    shared = (Counter(one) & Counter(other)).total()
    jaccard = shared / (len(one) + len(other) - shared)
    return (jaccard + shared / (len(one) * len(other)) ** 0.5) / 2


def _bag_of_words(text: str) -> tuple[str, ...]:
    return tuple(sorted(clean_text(text).split()))
