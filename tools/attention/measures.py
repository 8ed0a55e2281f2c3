"""How sharply models look, and how well where they look tells the target from the rest."""

from collections import defaultdict

import numpy as np
import torch.nn.functional as F

from .looking import Looked


class Measures:
    """Means over the sentences of one model."""

    def __init__(self) -> None:
        self._values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        self.sentences = 0

    def add(self, looked: Looked, target: np.ndarray | None) -> None:
        self.sentences += 1
        for name, value in looked.entropy.items():
            self._values["entropy"][name].append(value)
        if target is None:
            return
        for name, values in looked.maps.items():
            of_sentence = values if values.ndim == 2 else values[0]
            self._values["auc"][name].append(100 * auc(of_sentence.numpy(), target))
        if looked.pixels is not None:
            cosines = F.normalize(looked.pixels, dim=-1) @ F.normalize(looked.embeddings, dim=-1).T
            per_pixel = cosines.mean(1).numpy()
            for name, where in (("on", looked.on_target), ("off", ~looked.on_target)):
                if where.any():
                    self._values["cosine"][f"{name} target"].append(per_pixel[where].mean())

    def means(self) -> dict[str, dict[str, float]]:
        return {
            kind: {name: float(np.mean(values)) for name, values in by_name.items()}
            for kind, by_name in self._values.items()
        }


def auc(values: np.ndarray, target: np.ndarray) -> float:
    """Probability that a pixel on target has a higher value than one off it, ties counting half.

    nan if the target is nothing or everything.
    """
    on, off = values[target], np.sort(values[~target])
    if not len(on) or not len(off):
        return float("nan")
    below = np.searchsorted(off, on, "left") + np.searchsorted(off, on, "right")
    return float(below.mean() / 2 / len(off))
