"""Times, rates and memory of this machine, measured so that they can be compared.

Calls are timed in turns: a machine that becomes faster or slower does so for all.
"""

import importlib.metadata
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence

import detectron2
import torch
from torch import nn

# A first call computes what depends on sizes alone, a second compiles, a third has all in caches.
WARM_UP = 3
# What of a CPU decides how fast it multiplies.
CPU_FLAGS = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16")


def in_turns(
    functions: Mapping[Hashable, Callable[[], object]],
    *,
    seconds: float,
    pause: float = 0.0,
    enough: Sequence[Hashable] = (),
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Hashable, list[float]]:
    """Call functions one after the other, again and again, and time each call.

    Args:
        seconds: at least that long for each, and at least five rounds, after WARM_UP.
        pause: seconds of sleep before each call, as between the requests that a service gets.
        enough: those whose times decide how long; default: all.
        clock: time.process_time counts what this process computes, all threads together.

    Returns:
        name -> seconds of its calls; the i-th ones of all names are of the same round.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in functions}
    rounds = -WARM_UP
    while rounds < 5 or min(sum(times[name]) for name in enough or times) < seconds:
        for name, function in functions.items():
            time.sleep(pause)
            begin = clock()
            function()
            if rounds >= 0:
                times[name].append(clock() - begin)
        rounds += 1
    return times


def median_ratio(times: Sequence[float], others: Sequence[float]) -> float:
    """How much longer calls took than others of the same rounds."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


def percentile(times: Sequence[float], percent: float) -> float:
    """The least of the times that ``percent`` of them do not exceed (nearest rank)."""
    return sorted(times)[max(0, -int(-len(times) * percent // 100) - 1)]


def synchronize(device: torch.device | None) -> None:
    """Wait until a GPU has done what it was asked."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_mb(device: torch.device | None = None) -> float:
    """Most memory so far: of torch's allocator on a GPU, else resident memory of this process."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def state_mb(model: nn.Module, optimizer: torch.optim.Optimizer) -> float:
    """Weights, buffers, gradients and the optimizer's state."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    tensors += [
        value
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    return sum(tensor.nbytes for tensor in tensors) / 2**20


def saved_for_backward_mb(model: nn.Module, inputs: list[dict]) -> float:
    """What autograd keeps between forward and backward, weights aside; shared memory counts once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    sizes: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(inputs)  # alive while the sizes are added up: nothing is freed and reused
    return sum(sizes.values()) / 2**20 if losses else 0.0


def set_tf32(on: bool) -> None:
    """Whether a GPU rounds the operands of fp32 products and convolutions to 10 bits."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if on else "ieee"
    torch.backends.cudnn.allow_tf32 = on


def matrix_product(device: torch.device, dtype: torch.dtype) -> tuple[Callable[[], object], int]:
    """A product that is as fast as products become on the device, and its multiply-adds."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return lambda: torch.nn.functional.linear(a, b), size**3


def machine(threads: int) -> dict:
    """What ran: processor, cores, threads, the flags that matter, and GPUs."""
    flags = getattr(torch.cpu, "get_capabilities", dict)()
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": threads,
        "flags": [name for name in CPU_FLAGS if flags.get(name)],
        "gpus": [torch.cuda.get_device_name(i) for i in range(count)],
    }


def versions() -> dict[str, str | None]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "detectron2": detectron2.__version__,
        "ris_d2": _installed("ris_d2"),
    }


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # imported from a checkout
        return None


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [
                line.split(":", 1)[1].strip() for line in file if line.startswith("model name")
            ]
    except OSError:  # no Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()
