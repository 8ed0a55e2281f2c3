"""Does a model listen to its sentence? A split in which each sentence is another one's."""

from collections.abc import Sequence


def with_other_sentences(records: Sequence[dict]) -> list[dict]:
    """Give each expression the text of the next one of its image that has other targets.

    What a model reaches here, against the targets of before, it reaches without listening. Images
    whose expressions all have the same targets are left out.

    Args:
        records: of one split, as the readers make them; they are not changed.
    """
    exchanged = []
    for record in records:
        expressions = record["expressions"]
        targets = [frozenset(expression["annotation_ids"]) for expression in expressions]
        if len(set(targets)) > 1:
            others = [expressions[_next_other(targets, i)]["text"] for i in range(len(targets))]
            pairs = zip(expressions, others, strict=True)
            exchanged.append({**record, "expressions": [{**e, "text": text} for e, text in pairs]})
    return exchanged


def _next_other(targets: Sequence[frozenset], index: int) -> int:
    following = [*range(index + 1, len(targets)), *range(index)]
    return next(i for i in following if targets[i] != targets[index])
