"""A CUDA device that is not there: models run on it as on a GPU, and what makes the host wait is written down.

Tensors of the device say "cuda:0" and compute on the CPU. An operator that is given tensors of both
devices fails, as it would on a GPU. ``waits`` are the places at which a GPU would have to finish
before the host can go on, ``copies`` those at which the host hands it data without waiting.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
aten = torch.ops.aten

# The shape of the result, or the result itself, is known only when the GPU has finished.
READS = {
    *(aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default),
    *(aten._unique2.default, aten.unique_consecutive.default, aten.unique_dim.default),
    *(aten.equal.default, aten.repeat_interleave.Tensor, aten.bincount.default),
}
# They take no numbers from the host, where others do.
FUSED = {aten._fused_adam_.default, aten._fused_adamw_.default}
# They take an index, or a source, of the other device: that is copied, or the two are the same value.
INDEXING = {
    *(aten.index.Tensor, aten.index_put.default, aten.index_put_.default),
    aten._index_put_impl_.default,
}


class OnDevice(Tensor):
    """A tensor of the device; ``content`` holds its values."""

    @staticmethod
    def __new__(cls, real: Tensor) -> "OnDevice":
        # To C++ it lies on "meta": the backward pass would ask a CUDA driver for its streams.
        return Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=torch.device("meta"),
            requires_grad=real.requires_grad,
        )

    device = property(lambda self: GPU)
    is_cuda, is_meta = True, False

    def __init__(self, real: Tensor):
        self.content = real.detach()

    data = property(
        lambda self: self.detach(),
        lambda self, other: self._take(other),
    )

    def _take(self, other: "OnDevice") -> None:
        torch._C.TensorBase.data.__set__(self, other)
        self.content = other.content

    def __repr__(self) -> str:
        return f"OnDevice({self.content!r})"

    def tolist(self) -> list:
        LOG.wait("tolist")
        return self.content.tolist()

    def __reduce_ex__(self, protocol: int):
        return self.content.__reduce_ex__(protocol)  # files are read to the CPU

    def numpy(self, *args, **kwargs):
        raise TypeError("can't convert a cuda:0 tensor to numpy")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class Log:
    """Where the host waits, and where it copies: (what, file:line) -> how often."""

    def __init__(self) -> None:
        self.waits: Counter = Counter()
        self.copies: Counter = Counter()

    def wait(self, what: str) -> None:
        self.waits[what, _place()] += 1

    def copy(self, what: str, *, waits: bool) -> None:
        (self.waits if waits else self.copies)[what, _place()] += 1


LOG = Log()


def _place() -> str:
    """The innermost line of ris_d2 that runs; "" in the backward pass."""
    frame = sys._getframe()
    while frame is not None:
        path = frame.f_code.co_filename
        if "/ris_d2/" in path and "site-packages" not in path:
            return f"{path.rsplit('/ris_d2/', 1)[1]}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


def _run(func, args: tuple, kwargs: dict):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, OnDevice)]
    if tensors and not here and tensors[0].is_meta:
        return func(*args, **kwargs)
    own = 0 if func in FUSED else 1
    elsewhere = [x for x in tensors if not isinstance(x, OnDevice) and x.dim() >= own]
    result_here = bool(here)
    if kwargs.get("device") is not None:
        result_here = torch.device(kwargs["device"]).type in ("cuda", "meta")
        kwargs = {**kwargs, "device": CPU}
    if func is aten._to_copy.default:
        if result_here != bool(here):
            LOG.copy("to", waits=not kwargs.get("non_blocking", False))
    elif func is aten.copy_.default:
        if isinstance(args[0], OnDevice) != isinstance(args[1], OnDevice):
            LOG.copy("copy_", waits=not (len(args) > 2 and args[2]))
    elif func in INDEXING:
        indices = [x for x in args[1] if x is not None]
        if here and not isinstance(args[0], OnDevice):
            raise RuntimeError(f"{func}: a cpu tensor is indexed by one of cuda:0 at {_place()}")
        if here and any(x.dtype == torch.bool for x in indices):
            LOG.wait("index by a mask")
        elif here and elsewhere:
            LOG.wait("index from the host")
    elif here and elsewhere:
        shape = tuple(elsewhere[0].shape)
        raise RuntimeError(f"{func}: cuda:0 meets a cpu tensor of {shape} at {_place()}")
    elif here and func in READS:
        LOG.wait(str(func).split(".")[1])
    result = func(*tree_map_only(OnDevice, _real, args), **tree_map_only(OnDevice, _real, kwargs))
    if not func._schema.returns:  # in place, of lists
        return None
    name = func._schema.name.split("::")[1]
    if name.endswith("_") and not name.endswith("__"):
        return args[0]  # in place
    return tree_map_only(Tensor, OnDevice, result) if result_here else result


def _real(tensor: OnDevice) -> Tensor:
    return tensor.content


class _Operators(TorchDispatchMode):
    """Operators that make tensors on the device of nothing that is there."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


class _Constructors(TorchFunctionMode):
    """What does not pass the dispatcher: tensors, and indices, made of Python numbers."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            with _disable_current_modes():  # asked for, where the operators see what OnDevice says to C++
                return func(*args, **kwargs)
        if func in (torch.tensor, torch.as_tensor) and torch.device(device or CPU).type == "cuda":
            LOG.copy("torch.tensor", waits=True)
            return OnDevice(func(*args, **{**kwargs, "device": CPU}))
        if name == "new_tensor" and isinstance(args[0], OnDevice):
            LOG.copy(name, waits=True)
            return OnDevice(torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}))
        if name in ("__getitem__", "__setitem__") and isinstance(args[0], OnDevice):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if any(isinstance(x, list) for x in index):
                LOG.copy("index by a list", waits=True)
                index = tuple(
                    OnDevice(torch.tensor(x)) if isinstance(x, list) else x for x in index
                )
                args = (args[0], index, *args[2:])
        return func(*args, **kwargs)


def to_device(module: nn.Module) -> nn.Module:
    """Move parameters and buffers, in place."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(OnDevice(parameter.data), parameter.requires_grad)
                part._parameters[name] = moved
        for name, buffer in part._buffers.items():
            part._buffers[name] = None if buffer is None else OnDevice(buffer)
    return module


@contextmanager
def pretended_device() -> Iterator[Log]:
    """Within it the device is there; what ``to_device`` moved stays there."""
    global LOG
    LOG = Log()
    torch._C._ensureCUDADeviceGuardSet()
    # Kernels that exist for GPUs alone are chosen before an operator passes here.
    with (
        mock.patch.object(torch.cuda, "_lazy_init", lambda: None),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (7, 0)),
        torch.backends.cudnn.flags(enabled=False),
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        _Constructors(),
        _Operators(),
    ):
        yield LOG
