"""The attention weights inside of a model that knows nothing of being watched."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class AttentionRecorder(TorchFunctionMode):
    """Keeps the attention weights and the inputs of named sub-modules while it is entered.

    It sees every ``scaled_dot_product_attention`` that runs inside them, so that no layer has to
    know of it; ``nn.MultiheadAttention`` hides its own.

    Example:
        with AttentionRecorder(model, ["decoder.layers.0.fusion"]) as recorder:
            model.segment(...)
        recorder.weights["decoder.layers.0.fusion"]    # one (B, heads, Q, K) per call, in order

    Attributes:
        weights: module name -> float32 (B, heads, Q, K) per attention that ran in it.
        inputs: module name -> the positional arguments of each of its calls.

    Raises:
        AttributeError: the model has no sub-module of that name.
    """

    def __init__(self, model: nn.Module, names: Sequence[str]):
        super().__init__()
        self.weights: dict[str, list[Tensor]] = defaultdict(list)
        self.inputs: dict[str, list[tuple]] = defaultdict(list)
        self._modules = {name: model.get_submodule(name) for name in names}
        self._running: list[str] = []
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "AttentionRecorder":
        for name, module in self._modules.items():
            self._hooks += [
                module.register_forward_pre_hook(
                    lambda _, args, name=name: self._begin(name, args)
                ),
                module.register_forward_hook(lambda *_: self._end(), always_call=True),
            ]
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)

    def _begin(self, name: str, args: tuple) -> None:
        self._running.append(name)
        self.inputs[name].append(args)

    def _end(self) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and self._running:
            self.weights[self._running[-1]].append(_weights(*args, **kwargs))
        return func(*args, **kwargs)


def _weights(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """The softmax inside ``scaled_dot_product_attention``, which has the same arguments."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = scale * query.float() @ key.float().transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        scores = scores + attn_mask
    return scores.softmax(-1)


def row_entropy(weights: Tensor) -> Tensor:
    """Entropy of attention rows in nats, mean over heads and queries: (E, heads, Q, K) -> (E,).

    0: each query looks at one key; log K: at all alike. Ours for want of a definition in VIPA's
    Fig. 6 c ("projection entropy").
    """
    return torch.special.entr(weights.float()).sum(-1).flatten(1).mean(1)
