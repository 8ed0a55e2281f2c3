"""MODEL.RIS.PRECISION auto: which precision is the faster one here."""

import torch
from torch import nn

# Parameters from which bf16 is faster. On a CPU with AVX512-BF16, a BEiT-3 of 10 M on 256 x 256
# needs 0.56 of its time in fp32, one of 77 M 0.42; of the small models on 64 x 64 (2 M), whose
# tensors are converted for as long as they are multiplied, some need more.
MIN_PARAMETERS = 10_000_000


def has_fast_bf16(device: torch.device) -> bool:
    """Whether bf16 has units of its own: CUDA 8.0 and later, CPUs with AMX or AVX512-BF16."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    # torch 2.10 has no public question yet.
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def fastest_precision(model: nn.Module, device: torch.device) -> str:
    """bf16 where the hardware has it and the model is large enough to gain, else fp32."""
    large = sum(parameter.numel() for parameter in model.parameters()) >= MIN_PARAMETERS
    return "bf16" if large and has_fast_bf16(device) else "fp32"
