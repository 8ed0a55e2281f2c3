"""What every converter is, and the wrappings that published files put around a state dict."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Converter", "unwrap_state_dict"]

StateDict = dict[str, Tensor]
_MAX_WRAPPERS = 10


@dataclass(frozen=True, kw_only=True)
class Converter:
    """One published weight format.

    Attributes:
        convert: published name -> tensor to ris_d2 name -> tensor. Keys that ris_d2 has no use for
            are left out; ValueError if the dict is not of this format.
        may_miss: regexes (searched) of ris_d2 names that files of this format need not fill.
        recognises: for released whole methods, whose files serve as MODEL.WEIGHTS: is a state dict
            of this format?
    """

    convert: Callable[[StateDict], StateDict]
    may_miss: tuple[str, ...] = ()
    recognises: Callable[[StateDict], bool] | None = None


def unwrap_state_dict(content: Mapping) -> StateDict:
    """Return the tensors by name of a file's content, unwrapped, without "module." prefixes.

    Wrappers are the keys "model", "module" and "state_dict", in any nesting.

    Raises:
        ValueError: what is inside is not a dict of tensors.
    """
    for _ in range(_MAX_WRAPPERS):  # a pickled dict may also contain itself
        wrapper = next(
            (
                key
                for key in ("model", "module", "state_dict")
                if isinstance(content.get(key), Mapping)
            ),
            None,
        )
        if wrapper is None:
            break
        content = content[wrapper]
    others = [
        name
        for name, value in content.items()
        if not isinstance(value, Tensor) or not isinstance(name, str)
    ]
    if others or not content:
        raise ValueError(
            "not a state dict: "
            + (f"{others[0]!r} is no name of a tensor" if others else "it holds nothing")
            + "; expected tensors by name, alone or under 'model', 'module' or 'state_dict'"
        )
    if all(name.startswith("module.") for name in content):
        content = {name[len("module.") :]: value for name, value in content.items()}
    return dict(content)
