"""Which operations serve a device."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, TypeGuard

import torch

from dmsae_ray.sae.ops import native
from dmsae_ray.sae.ops.cpu_ops import NativePairs
from dmsae_ray.sae.ops.torch_ops import TorchPairs

if TYPE_CHECKING:
    from dmsae_ray.sae.ops.cuda_ops import TritonPairs


def is_fused(ops: TorchPairs) -> TypeGuard[TritonPairs]:
    """Whether product and scan are one kernel, so that nothing between batch and weights need wait for the device."""
    return ops.fused


def pairs_on(device: torch.device | str, kernels: str = "auto", dtype: torch.dtype = torch.float32) -> TorchPairs:
    """The operations for tensors on this device: C kernels on CPUs, Triton's on CUDA devices (float32 only), else plain
    torch.

    kernels: `auto` (a warning says so where plain torch has to do), `compiled` (raises native.NotBuilt where
    impossible), `torch`. Raises ValueError for a CUDA device that is not the current one, where kernels would be
    started.
    """
    device = torch.device(device)
    kind = device.type
    if kind == "cuda" and device.index not in (None, torch.cuda.current_device()):
        raise ValueError(
            f"the SAE is on {device}, the current device is cuda:{torch.cuda.current_device()}: call "
            "torch.cuda.set_device first"
        )
    if kernels == "torch" or (kernels == "auto" and kind not in ("cpu", "cuda")):
        return TorchPairs()
    try:
        if kind == "cpu":
            return NativePairs()
        if kind != "cuda" or dtype != torch.float32:
            raise native.NotBuilt(f"there are none for {dtype} on {kind}")
        try:
            from dmsae_ray.sae.ops.cuda_ops import TritonPairs  # triton comes with torch's CUDA wheels only
        except ImportError as error:
            raise native.NotBuilt(f"triton cannot be imported ({error})") from error
        return TritonPairs()
    except native.NotBuilt as error:
        if kernels == "compiled":
            raise
        warnings.warn(f"no compiled kernels: {error}. Training runs in plain torch, several times slower", stacklevel=2)
        return TorchPairs()
