"""Weights placed in a model with an account of each; checkpoints that are whole or refused."""

import bisect
import dataclasses
import logging
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from ..io import atomic_write, reading
from .converters import convert_released, convert_state_dict, get_converter, unwrap_state_dict
from .files import file_hash, is_whole, read_weights
from .paths import local_path

logger = logging.getLogger(__name__)

# A checkpoint that starts a training (MODEL.WEIGHTS) must fill, together with MODEL.INIT, at least
# this share of the parameters, counted by elements: a new head may be missing, a method may not.
MIN_FILLED = 0.9
# State that the config or the next step gives anyway.
_NEGLIGIBLE = ("pixel_mean", "pixel_std", "num_batches_tracked")


@dataclasses.dataclass
class _Fit:
    """Which tensors of a state dict a module can take, and which it lacks."""

    used: dict[str, Tensor]
    resized: list[str]
    ignored: list[str]
    missing: list[str]
    misshapen: list[str]

    def __str__(self) -> str:
        return "; ".join(
            f"{len(names)} {what}{_some(names) if what != 'used' else ''}"
            for what, names in (
                ("used", list(self.used)),
                ("resized", self.resized),
                ("ignored", self.ignored),
                ("missing", self.missing),
                ("of another shape", self.misshapen),
            )
        )


def load_init(model: nn.Module, init: Iterable[Sequence[str]]) -> dict[str, tuple[str, str]]:
    """Fill parts of ``model`` with published weights (MODEL.INIT).

    Each file is read, converted, fitted to ``model.weight_parts[source]`` (by the
    ``fit_state_dict`` of its modules, where sizes differ) and loaded. The log says what was used,
    resized, ignored and missing.

    Args:
        model: a meta-architecture with ``weight_parts``: source -> path of a sub-module, or names
            of several children, which the converted names then begin with.
        init: (source, path) pairs; a path is a file or a URL (https://, hf://, timm://).

    Returns:
        name in the model -> the (source, path) that filled it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: unknown source, a source that the model has no part for, a damaged file, or one
            that leaves some of the part unfilled (beyond what its format may miss).
    """
    # Under DistributedDataParallel the model is its "module".
    getattr(getattr(model, "module", model), "to_be_applied", set()).discard("MODEL.INIT")
    filled = {}
    for source, path in init:
        converter = get_converter(source)
        prefix, part = _part(model, source)
        published = read_weights(local_path(path))
        state_dict = _converted(published, source, path)
        fit = _fit(part, state_dict)
        fit.ignored += _dropped_by_conversion(unwrap_state_dict(published), state_dict)
        names = model.weight_parts[source]
        into = (names if isinstance(names, str) else ", ".join(names)) or "model"
        logger.info("MODEL.INIT %s from %s into %s: %s", source, path, into, fit)
        unfilled = [
            name
            for name in fit.missing + fit.misshapen
            if not any(re.search(pattern, name) for pattern in converter.may_miss)
        ]
        if unfilled:
            raise ValueError(
                f"{path} ({source}) leaves {len(unfilled)} of {len(part.state_dict())} tensors of "
                f"{type(part).__name__} unfilled{_some(unfilled)}; does the config describe the "
                "same architecture (depth, width, patch size, vocabulary)?"
            )
        _check_finite(fit.used, path)
        part.load_state_dict(fit.used, strict=False)
        filled.update({prefix + name: (source, path) for name in fit.used})
    return filled


class RISCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer with MODEL.INIT; every load is accounted for, or refused.

    Files are read without running what they name, and written whole or not at all; infinite and NaN
    weights are neither written nor loaded. With
    ``save_frozen`` False, frozen parameters that came from MODEL.INIT are left out of the file,
    which then names their sources under "frozen_sources": [[source, path, SHA-256], ...]. Buffers
    always stay in (they are small, and BatchNorm may move in a frozen part). Loading such a file,
    on resume too, loads the sources first; a source that moved is also looked for in ``init``.

    Args:
        model: the model, or its DistributedDataParallel wrapper.
        save_dir: directory of checkpoints.
        init: MODEL.INIT, (source, path) pairs; read when the checkpoint does not hold everything.
        save_frozen: MODEL.SAVE_FROZEN.
        keep: numbered checkpoints in ``save_dir``, the newest ones; saving deletes older ones. 0
            keeps all.
        weights: makes a context in which the model has the weights to save.
        save_to_disk: whether this process writes; None = the main process does.
        checkpointables: further objects with state_dict() and load_state_dict().
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        init: Iterable[Sequence[str]] = (),
        save_frozen: bool = True,
        keep: int = 0,
        weights: Callable[[], AbstractContextManager] = nullcontext,
        save_to_disk: bool | None = None,
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, save_to_disk=save_to_disk, **checkpointables)
        self.init = [tuple(pair) for pair in init]
        self.save_frozen = save_frozen
        self._keep = keep
        self._weights = weights
        self._whole: dict[tuple[str, int, int], bool] = {}
        self._filled_by_init: dict[str, tuple[str, str]] = {}
        self._hashes: dict[str, str] = {}
        self._loading = ""
        self._required = 1.0

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Fill the model from MODEL.INIT and ``path``.

        Args:
            path: a checkpoint (file or URL); "" fills from MODEL.INIT alone.
            checkpointables: which further objects to load. None (resuming, evaluating) means all,
                and the checkpoint must then fill the whole model; [] (MODEL.WEIGHTS as the start of
                a training, as ``resume_or_load`` calls it) accepts 90 % of the parameters.

        Returns:
            what else the file holds.

        Raises:
            FileNotFoundError: no such file.
            ValueError: damaged, of another method, fills too little, or a frozen source is missing
                or has another hash. The model is not changed by the checkpoint then.
        """
        if not path:
            logger.info("No checkpoint given: the model starts from MODEL.INIT and random numbers")
            self._filled_by_init = load_init(self.model, self.init)
            return {}
        self._loading, self._required = path, 1.0 if checkpointables is None else MIN_FILLED
        return super().load(local_path(path), checkpointables)

    def save(self, name: str, **kwargs: Any) -> None:
        """Write model, checkpointables and ``kwargs`` to ``<name>.pth``, for --resume.

        Raises:
            FloatingPointError: a weight is infinite or NaN. Nothing is written.
            OSError: the disk is full, or does not let us write. The file is as it was.
        """
        state = {key: item.state_dict() for key, item in self.checkpointables.items()}
        with self._weights():
            written = self._write(name, {**state, **kwargs})
        if written:
            self.tag_last_checkpoint(f"{name}.pth")
            self._delete_old(f"{name}.pth")

    def save_weights(self, name: str, **kwargs: Any) -> None:
        """Write the model and ``kwargs`` alone; --resume does not start from such a file."""
        with self._weights():
            self._write(name, kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        with atomic_write(os.path.join(self.save_dir, "last_checkpoint")) as file:
            file.write(last_filename_basename)

    def has_checkpoint(self) -> bool:
        return bool(self.get_checkpoint_file())

    def get_checkpoint_file(self) -> str:
        """Return the path of the checkpoint that --resume starts from; "" if there is none.

        It is the one that last_checkpoint names. Where that name or that file is missing or broken
        (a process killed between two writes, a disk), it is the newest whole one.
        """
        tagged = super().get_checkpoint_file()
        if self._is_whole(tagged):
            return tagged
        for path in self._saved(r"model_(\d+|final)\.pth"):
            if self._is_whole(path):
                logger.warning("last_checkpoint names no whole file; the newest one is %s", path)
                return path
        return tagged  # loading it says what is wrong with it

    def _is_whole(self, path: str) -> bool:
        try:
            status = os.stat(path)
        except OSError:
            return False
        key = (path, status.st_mtime_ns, status.st_size)
        if key not in self._whole:  # the check reads all of the file
            self._whole[key] = is_whole(path)
        return self._whole[key]

    def _saved(self, pattern: str) -> list[str]:
        """Paths of the checkpoints whose name is ``pattern``, newest first."""
        names = os.listdir(self.save_dir) if os.path.isdir(self.save_dir) else []
        paths = [os.path.join(self.save_dir, n) for n in names if re.fullmatch(pattern, n)]
        return sorted(paths, key=lambda path: (os.stat(path).st_mtime_ns, path), reverse=True)

    def _delete_old(self, tagged: str) -> None:
        if not self._keep:
            return
        for path in self._saved(r"model_\d+\.pth")[self._keep :]:
            if os.path.basename(path) != tagged:  # clocks can be set back
                logger.info("Deleting %s: SOLVER.RIS.KEEP_CHECKPOINTS is %d", path, self._keep)
                os.remove(path)

    def _write(self, name: str, extra: Mapping[str, Any]) -> bool:
        if not self.save_dir or not self.save_to_disk:
            return False
        state_dict = self.model.state_dict()
        path = os.path.join(self.save_dir, f"{name}.pth")
        broken = _not_finite(state_dict)
        if broken:
            raise FloatingPointError(
                f"{path} is not written: {len(broken)} tensors are infinite or NaN{_some(broken)}"
            )
        data = {"model": state_dict, **extra}
        left_out = [
            key
            for key, parameter in self.model.named_parameters()
            if not (self.save_frozen or parameter.requires_grad) and key in self._filled_by_init
        ]
        for key in left_out:
            del state_dict[key]
        if left_out:
            sources = sorted({self._filled_by_init[key] for key in left_out})
            data["frozen_sources"] = [[*source, self._hash(source[1])] for source in sources]
        logger.info("Saving checkpoint to %s (%d frozen tensors left out)", path, len(left_out))
        with atomic_write(path, "wb") as file:
            try:
                torch.save(data, file)
            except RuntimeError as error:
                # On a full disk torch fails once more when it closes its archive ("unexpected
                # pos").
                cause = error.__context__
                if not isinstance(cause, OSError):
                    raise
                raise OSError(cause.errno, cause.strerror, path) from None
        return True

    def _hash(self, path: str) -> str:
        if path not in self._hashes:
            self._hashes[path] = file_hash(local_path(path))
        return self._hashes[path]

    def _load_file(self, f: str) -> dict[str, Any]:
        content = read_weights(f)
        return content if isinstance(content.get("model"), Mapping) else {"model": content}

    def _load_model(self, checkpoint: dict[str, Any]) -> None:
        with reading(self._loading):
            content = unwrap_state_dict(checkpoint.pop("model"))
            state_dict = convert_released(content)
            fit = _fit(self.model, state_dict)
        fit.ignored += _dropped_by_conversion(content, state_dict)
        init = self.init if fit.missing or fit.misshapen else []
        if "frozen_sources" in checkpoint:
            init = [self._find_source(*entry) for entry in checkpoint.pop("frozen_sources")]
        self._check_filled(fit, init)
        _check_finite(fit.used, self._loading)
        filled = load_init(self.model, init)
        logger.info("Checkpoint %s: %s", self._loading, fit)
        missing = [name for name in fit.missing + fit.misshapen if name not in filled]
        if missing:
            logger.warning("No file fills %d tensors%s", len(missing), _some(missing))
        self.model.load_state_dict(fit.used, strict=False)
        self._filled_by_init = {k: v for k, v in filled.items() if k not in fit.used}

    def _find_source(self, source: str, recorded_path: str, digest: str) -> tuple[str, str]:
        """Find the file of that hash where MODEL.INIT says, else where it was at saving."""
        candidates = [path for kind, path in self.init if kind == source] + [recorded_path]
        tried = []
        for path in dict.fromkeys(candidates):
            try:
                found = self._hash(path)
            except FileNotFoundError:
                tried.append(f"{path} (not found)")
                continue
            if found == digest:
                return source, path
            tried.append(f"{path} (SHA-256 {found[:12]}...)")
        raise ValueError(
            f"{self._loading} leaves its frozen {source} weights out and needs the file with "
            f"SHA-256 {digest[:12]}...; tried {', '.join(tried)}. Name it: "
            f"MODEL.INIT '[[\"{source}\", PATH]]'"
        )

    def _check_filled(self, fit: _Fit, init: Iterable[Sequence[str]]) -> None:
        parts = [_part(self.model, source) for source, _ in init]
        by_init = {prefix + name for prefix, part in parts for name in part.state_dict()}
        sizes = {name: parameter.numel() for name, parameter in self.model.named_parameters()}
        filled = fit.used.keys() | by_init
        unfilled = [n for n in fit.missing + fit.misshapen if n not in by_init]
        total = max(1, sum(sizes.values()))
        share = sum(size for name, size in sizes.items() if name in filled) / total
        own = sum(size for name, size in sizes.items() if name in fit.used) / total
        if share < self._required or (self._required == 1.0 and unfilled):
            raise ValueError(
                f"{self._loading} fills {own:.1%} of {type(self.model).__name__}'s parameters "
                f"({share:.1%} with MODEL.INIT, {self._required:.0%} needed): {fit}. It is of "
                "another method, or of another configuration of this one"
            )


def _part(model: nn.Module, source: str) -> tuple[str, nn.Module]:
    """What a source fills, and what to put before its names to get the model's."""
    parts = getattr(model, "weight_parts", {})
    if source not in parts:
        raise ValueError(
            f"MODEL.INIT names {source!r}, but {type(model).__name__} has parts for "
            f"{', '.join(sorted(parts)) or 'no source'} only"
        )
    path = parts[source]
    if not isinstance(path, str):
        return "", nn.ModuleDict({name: model.get_submodule(name) for name in path})
    return f"{path}." if path else "", model.get_submodule(path)  # "" is the model itself


def _fit(module: nn.Module, state_dict: dict[str, Tensor]) -> _Fit:
    """Compare ``state_dict`` with ``module``, once its sub-modules have resized what they can."""
    state_dict, resized = dict(state_dict), []
    for name, child in module.named_modules():
        if not hasattr(child, "fit_state_dict"):
            continue
        prefix = f"{name}." if name else ""
        own = {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        if not own:
            continue
        fitted, names = child.fit_state_dict(own)
        state_dict = {k: v for k, v in state_dict.items() if not k.startswith(prefix)}
        state_dict.update({prefix + k: v for k, v in fitted.items()})
        resized += [prefix + k for k in names]
    expected = module.state_dict()
    common = expected.keys() & state_dict.keys()
    used = {n: state_dict[n] for n in common if state_dict[n].shape == expected[n].shape}
    missing = [n for n in expected.keys() - state_dict.keys() if not n.endswith(_NEGLIGIBLE)]
    ignored, misshapen = state_dict.keys() - expected.keys(), common - used.keys()
    return _Fit(used, resized, sorted(ignored), sorted(missing), sorted(misshapen))


def _not_finite(state_dict: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors that hold an infinite number or NaN."""
    floating = {name: value for name, value in state_dict.items() if value.is_floating_point()}
    # A norm is many times as fast as ``isfinite``; it may overflow where no number is infinite.
    norms = [torch.linalg.vector_norm(value).float() for value in floating.values()]
    values = torch.stack(norms).tolist() if norms else []  # together: reading waits for the GPU
    return [
        name
        for (name, value), norm in zip(floating.items(), values, strict=True)
        if not math.isfinite(norm) and not value.isfinite().all()
    ]


def _check_finite(state_dict: Mapping[str, Tensor], path: str) -> None:
    broken = _not_finite(state_dict)
    if broken:
        raise ValueError(
            f"{path} holds infinite numbers or NaN in {len(broken)} tensors{_some(broken)}; its "
            "training had failed, take an earlier checkpoint"
        )


def _converted(published: Mapping[str, Any], source: str, path: str) -> dict[str, Tensor]:
    """Convert a published file; one that tools/convert_checkpoint.py wrote is converted already."""
    done = published.get("converted_from")
    if done not in (None, source):
        raise ValueError(f"{path}: converted from {done!r}, but MODEL.INIT gives it as {source!r}")
    with reading(path):
        return unwrap_state_dict(published) if done else convert_state_dict(published, source)


def _dropped_by_conversion(
    published: Mapping[str, Tensor], converted: Mapping[str, Tensor]
) -> list[str]:
    """Names of published tensors of which no converted one shows a part."""
    starts = sorted(value.data_ptr() for value in converted.values())

    def kept(value: Tensor) -> bool:
        begin = value.data_ptr()
        first = bisect.bisect_left(starts, begin)
        return first < len(starts) and starts[first] < begin + value.nbytes

    return sorted(name for name, value in published.items() if not kept(value))


def _some(names: Sequence[str], limit: int = 6) -> str:
    if not names:
        return ""
    more = f", ... ({len(names)} in all)" if len(names) > limit else ""
    return f" ({', '.join(names[:limit])}{more})"
