"""Every launch of a training step, compiled for an H100 without one: run by test_triton.py in a process of its own.

The step runs on the meta device, whose tensors have shapes and no content. So whatever asks the device for a number
fails here: the step does without.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
from itertools import accumulate

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import native_specialize_impl

from dmsae_ray.sae import loss, steps_on_device
from dmsae_ray.sae.ops import cuda_ops
from dmsae_ray.sae.ops.pairs import Pairs
from dmsae_ray.sae.sae import MatryoshkaSAE
from dmsae_ray.sae.settings import SAESettings, group_sizes
from dmsae_ray.sae.step_report import RECENT
from dmsae_ray.sae.trainer import Trainer

TARGET = GPUTarget("cuda", 90, 32)


class Compiler:
    """Stands in for `cuda_ops.launch`: compiles what would be started, once per specialisation."""

    def __init__(self):
        self.backend = make_backend(TARGET)
        self.seen = {}

    def __call__(self, kernel, grid, *arguments, **options):
        assert all(isinstance(n, int) for n in grid)
        options["enable_fp_fusion"] = True
        fn_options = {name: options[name] for name in options if name not in kernel.arg_names}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | {
            n: v for n, v in options.items() if n in kernel.arg_names
        }
        assert list(values) == kernel.arg_names, kernel.__name__
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(kernel.params):
            value = values[param.name]
            kind, key = (
                ("constexpr", value)
                if param.is_constexpr
                else native_specialize_impl(type(self.backend), value, False, True, True)
            )
            signature[param.name] = kind
            if kind == "constexpr":
                constants[index,] = value
            elif key:
                attributes[index,] = self.backend.parse_attr(key)
        name = (kernel.__name__, str(signature), str(constants), str(attributes), str(fn_options))
        if name in self.seen:
            return
        log = io.StringIO()
        with contextlib.redirect_stdout(log):
            compiled = triton.compile(
                ASTSource(kernel, signature, constants, attributes), target=TARGET, options=fn_options
            )
        text = log.getvalue()
        self.seen[name] = {
            "kernel": kernel.__name__,
            "types": " ".join(dict.fromkeys(kind for kind in signature.values() if kind.startswith("*"))),
            "registers": int(re.search(r"Used (\d+) registers", text)[1]),
            "spilled": sum(int(n) for n in re.findall(r"(\d+) bytes spill", text)),
            "stack": int(re.search(r"(\d+) bytes stack frame", text)[1]),
            "shared": compiled.metadata.shared,
            "warps": compiled.metadata.num_warps,
            "tensor_cores": "wgmma" in compiled.asm["ptx"],
        }


def step(d, width, batch, k, core, **fields):
    """A training step's launches: with dead latents, a core, and a guess."""
    settings = SAESettings(d=d, width=width, batch=batch, k=k, kernels="compiled", **fields)
    sizes = group_sizes(width - core, settings.prefix_fractions)
    with torch.device("meta"):
        sae = MatryoshkaSAE(d, [core + end for end in accumulate(sizes)], core, settings.core_gate)
    trainer = Trainer(sae, settings)
    assert trainer.loss.ops.name == "triton"
    x_BD, order_B = torch.empty(batch, d, device="meta"), torch.arange(batch, device="meta")
    with torch.device("meta"):
        carried = steps_on_device.Carried(
            torch.zeros_like(trainer.silent_F), torch.ones(RECENT), torch.ones(()).double(), torch.tensor(True)
        )
    for number in range(2):
        outcome, numbers, carried = steps_on_device.launch_step(trainer, x_BD, order_B, carried, number, 128)
    assert numbers.device.type == "meta" and len(outcome.latent_N) == k * batch + (
        core * batch if settings.core_gate == "relu" else 0
    )


def micro_batches(d, width):
    """Gradients that are added to those of an earlier part of the batch."""
    with torch.device("meta"):
        x_BD, W_FD, b_F, S_BGD = torch.empty(8, d), torch.empty(width, d), torch.empty(width), torch.empty(8, 5, d)
        row_N, start_F1 = torch.empty(9, dtype=torch.int32), torch.empty(width + 1, dtype=torch.int64)
        pairs = Pairs(torch.empty(9, dtype=torch.int64), row_N, row_N, torch.empty(9))
        ends = [width // 16, width // 8, width // 4, width // 2, width]
        ops = cuda_ops.TritonPairs()
        ops.weight_gradients(
            S_BGD, x_BD, pairs, pairs.value_N, start_F1, row_N, ends, 0, 1.0, W_FD, b_F, W_FD, add=True
        )


def main():
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    compiler = cuda_ops.launch = Compiler()
    loss.pairs_on = lambda device, kernels, dtype: cuda_ops.TritonPairs()
    step(2304, 65536, 2048, 40, core=200, screen="bf16")  # the paper's
    step(100, 1000, 512, 40, core=30, screen="fp32", core_gate="relu", core_transfer="init")
    micro_batches(2304, 65536)
    for entry in compiler.seen.values():
        print(json.dumps(entry))


if __name__ == "__main__":
    main()
