"""What every converter is, and the wrappings that published files put around a state dict."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

StateDict = dict[str, Tensor]
_MAX_WRAPPERS = 10


@dataclass(frozen=True, kw_only=True)
class Converter:
    """One published weight format.

    Attributes:
        title: what files of this format hold, for messages.
        needs: how some of their names begin; a tuple inside lists alternatives.
        rename: published name -> tensor to ris_d2 name -> tensor. Keys that ris_d2 has no use for
            are left out.
        may_miss: regexes (searched) of ris_d2 names that files of this format need not fill.
        is_whole_model: released methods, whose files serve as MODEL.WEIGHTS.
    """

    title: str
    needs: tuple[str | tuple[str, ...], ...]
    rename: Callable[[StateDict], StateDict]
    may_miss: tuple[str, ...] = ()
    is_whole_model: bool = False

    def recognises(self, state_dict: StateDict) -> bool:
        return all(any(name.startswith(need) for name in state_dict) for need in self.needs)

    def convert(self, state_dict: StateDict) -> StateDict:
        """Rename a state dict; ValueError if it is not of this format."""
        if not self.recognises(state_dict):
            needs = ", ".join(n if isinstance(n, str) else " or ".join(n) for n in self.needs)
            raise ValueError(
                f"not {self.title}, which has names that start with {needs}; it has e.g. "
                + ", ".join(list(state_dict)[:3])
            )
        return self.rename(state_dict)


def below(state_dict: StateDict, prefix: str) -> StateDict:
    """The tensors whose names start with ``prefix``, without it."""
    return {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}


def substitute(name: str, rules: Mapping[str, str | Callable[[re.Match], str]]) -> str:
    """Apply every rule, regex -> replacement, one after the other."""
    for pattern, replacement in rules.items():
        name = re.sub(pattern, replacement, name)
    return name


def rename_module(name: str, rules: Iterable[tuple[str, str]]) -> str | None:
    """Rename a module path by the first rule (regex, replacement) that it meets; None: by none."""
    for pattern, ours in rules:
        match = re.match(rf"{pattern}(?=\.|$)", name)
        if match:
            return match.expand(ours) + name[match.end() :]
    return None


def split_attention(name: str, value: Tensor) -> StateDict:
    """``nn.MultiheadAttention``'s names and tensors -> ``MultiheadAttention``'s; others pass."""
    if ".in_proj_" in name:
        parts = zip(("query", "key", "value"), value.chunk(3), strict=True)
        return {name.replace("in_proj_", f"{part}."): chunk for part, chunk in parts}
    return {name.replace(".out_proj.", ".out."): value}


def unwrap_state_dict(content: Mapping) -> StateDict:
    """Return the tensors by name of a file's content, unwrapped, without "module." prefixes.

    Wrappers are the keys "model", "module" and "state_dict", in any nesting.

    Raises:
        ValueError: what is inside is not a dict of tensors.
    """
    wrappers = ("model", "module", "state_dict")
    for _ in range(_MAX_WRAPPERS):  # a pickled dict may also contain itself
        content = next(
            (content[k] for k in wrappers if isinstance(content.get(k), Mapping)), content
        )
    if not content:
        raise ValueError("not a state dict: it holds nothing")
    for name, value in content.items():
        if not isinstance(value, Tensor) or not isinstance(name, str):
            raise ValueError(
                f"not a state dict: {name!r} is no name of a tensor; expected tensors by name, "
                "alone or under 'model', 'module' or 'state_dict'"
            )
    is_prefixed = all(name.startswith("module.") for name in content)
    return below(content, "module.") if is_prefixed else dict(content)
