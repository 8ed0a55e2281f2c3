"""Tests name no device; what they make lies on that of the suite: their tensors, the weights of their modules."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.overrides import TorchFunctionMode

CONSTRUCTORS = {
    *(torch.arange, torch.eye, torch.full, torch.linspace, torch.ones, torch.rand, torch.randint),
    *(torch.randn, torch.tensor, torch.zeros, torch.as_tensor),
}


class _Constructors(TorchFunctionMode):
    """Of the tests alone: what the package makes is where it puts it, and so are the batches that helpers of
    the tests make, on the CPU as a data loader's. Random numbers are those of a CPU."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Kernels add in another order than a CPU's, and for a batch of another size.
        if func is torch.allclose:
            kwargs["atol"] = max(kwargs.get("atol", 0), 1e-5)
        caller = os.path.basename(sys._getframe(1).f_code.co_filename)
        if func not in CONSTRUCTORS or "device" in kwargs or not caller.startswith("test_"):
            return func(*args, **kwargs)
        learns = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).to(self.device).requires_grad_(learns)


@contextmanager
def made_on(device: str) -> Iterator[None]:
    """Within it, modules have their parameters and buffers on the device from the start."""

    def move(module: nn.Module, name: str, value: Tensor | None) -> Tensor | None:
        if value is None or value.device.type != "cpu":
            return None  # as it is
        moved = value.detach().to(device)
        if isinstance(value, nn.Parameter):
            moved = nn.Parameter(moved, value.requires_grad)
            vars(moved).update(vars(value))  # transformers notes there what it has loaded
        return moved

    with (
        global_hooks.register_module_parameter_registration_hook(move),
        global_hooks.register_module_buffer_registration_hook(move),
        _Constructors(device),
    ):
        yield
