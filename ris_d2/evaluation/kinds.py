"""What a sentence tells its referent by, from its words alone.

A sentence has one kind or several: "second man from the left behind the table" has an ordinal and a
relation. On RefShapes each has exactly one, and it is the one that the generator meant ("the left
circle", of two, is a position). On real sets the list is a rule of thumb: it takes "2" for a count
and knows no misspelt word.
"""

import re

_SIDE = "left|right|top|bottom|front|back|middle|cent(?:er|re)|background|foreground"
# The first pattern that fits takes its words: in "left of", left is no position any more.
_WORDS = {
    # a rank among several: ordinal numbers, superlatives
    "ordinal": r"first|second|third|fourth|fifth|sixth|[1-9](?:st|nd|rd|th)|last|"
    rf"from (?:the )?(?:{_SIDE})|(?:left|right|top|bottom|upper|lower) ?most|"
    rf"(?:farthest|furthest|closest|nearest)(?: (?:to|on) the (?:{_SIDE}))?|"
    r"highest|lowest|biggest|largest|smallest|tallest|shortest|longest|oldest|youngest|"
    r"brightest|darkest|lightest",
    # a place relative to another thing, or what is done with that
    "relation": r"(?:left|right)(?: (?:hand )?side)? of|"
    r"(?:in|at|on) (?:the )?(?:front|back|top|end) of|"
    r"(?:next|close|closer|beside) to|(?:higher|lower|bigger|larger|smaller|taller) than|"
    r"above|below|under|underneath|beneath|over|behind|beside|between|among|near|by|against|along|"
    r"around|across|inside|outside|opposite|"
    r"on(?! (?:the )?(?:far |very |lower |upper )?"
    rf"(?:{_SIDE}|side|end|edge|corner|lower|upper|far)\b)|"
    r"holding|carrying|riding|touching|facing|leaning|watching|eating|hitting|pulling|pushing",
    # a place in the image
    "position": rf"{_SIDE}|upper|lower|corner|side|half|edge|end|far",
    # what it is not
    "negation": r"not|no|without|but|except|other than|neither|nor|\w+n't|(?:is|are|does|do)nt",
    # how many there are
    "count": r"two|three|four|five|six|seven|eight|nine|both|pair|couple|trio|[2-9]",
    # things that are named one by one
    "conjunction": r"and|plus|as well as",
}
# "attribute" stands alone: the sentence says what the thing is and looks like, and none of the
# others.
KINDS = ("attribute", *_WORDS)
_BITS = {kind: 1 << position for position, kind in enumerate(KINDS)}
_NO_KIND = r"black and white|white and black"
_PATTERN = re.compile(
    rf"\b(?:{_NO_KIND}|"
    + "|".join(f"(?P<{kind}>{words})" for kind, words in _WORDS.items())
    + r")\b"
)


def kinds_of(text: str) -> int:
    """The kinds of a sentence: bit i is set if it is of KINDS[i]."""
    bits = 0
    for match in _PATTERN.finditer(text.lower()):
        bits |= _BITS.get(match.lastgroup, 0)
    return bits or _BITS["attribute"]


def kind_names(bits: int) -> list[str]:
    """What :func:`kinds_of` says, in words."""
    return [kind for position, kind in enumerate(KINDS) if bits >> position & 1]
