"""Every launch of a training step, compiled for an H100 without one: run by test_sae_triton.py in a process of its own.

The step runs on the meta device, whose tensors have shapes and no content. So whatever asks the device for a number fails here:
the step does without.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import native_specialize_impl

from dmsae_ray.sae import triton_pairs
from dmsae_ray.sae.pairs import AdamStep, Candidates, Margin, Pairs
from dmsae_ray.sae.triton_pairs import TritonPairs

TARGET = GPUTarget("cuda", 90, 32)


class Compiler:
    """Stands in for `triton_pairs.launch`: compiles what would be started, once per specialisation."""

    def __init__(self):
        self.backend = make_backend(TARGET)
        self.seen = {}

    def __call__(self, kernel, grid, *arguments, **options):
        assert all(isinstance(n, int) for n in grid)
        options["enable_fp_fusion"] = True
        fn_options = {name: options[name] for name in options if name not in kernel.arg_names}
        values = dict(zip(kernel.arg_names, arguments, strict=False)) | {n: v for n, v in options.items() if n in kernel.arg_names}
        assert list(values) == kernel.arg_names, kernel.__name__
        signature, constants, attributes = {}, {}, {}
        for index, param in enumerate(kernel.params):
            value = values[param.name]
            kind, key = ("constexpr", value) if param.is_constexpr else native_specialize_impl(type(self.backend), value, False, True, True)
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
            compiled = triton.compile(ASTSource(kernel, signature, constants, attributes), target=TARGET, options=fn_options)
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


def operations(B, D, F, C, N, low):
    """Every operation once, with so many rows, columns, latents, candidates and pairs."""
    ops, f32 = TritonPairs(), {"device": "meta"}
    x_BD, b_D, W_FD, b_F = torch.empty(B, D, **f32), torch.empty(D, **f32), torch.empty(F, D, **f32), torch.empty(F, **f32)
    ends = [F // 32, F // 8, F // 4, F // 2, F]
    centred_BD, rows = ops.centre(x_BD, b_D, low)
    latents = ops.round(W_FD, low)
    left, right = (rows.low_ND, latents.low_ND) if low else (centred_BD, W_FD)
    margin = Margin(rows.norm_N, rows.norm_N, 0.0, 1e-6, 1e-30)
    cut, go, wanted = torch.empty((), **f32), torch.empty((), dtype=torch.int32, **f32), torch.empty((), dtype=torch.int64, **f32)
    found, _ = ops.append(left, right, b_F, latents, margin, cut, 0, C, go)
    ops.sure_level(left, right, b_F, latents, margin, 0, wanted, go)
    ops.kth_largest(found.approx_N, wanted)
    value_C, _ = ops.refined(centred_BD, W_FD, b_F, found, cut, 0)
    pairs = Pairs(torch.empty(B + 1, dtype=torch.int64, **f32), found.row_N[:N], found.latent_N[:N], value_C[:N])
    S_BGD = torch.empty(B, len(ends), D, **f32)
    gradient_N, _ = ops.decode(x_BD, b_D, W_FD, pairs, ends, S_BGD)
    start_F1, order_N = ops.by_latent(pairs.latent_N, F)
    ops.weight_gradients(S_BGD, centred_BD, pairs, gradient_N, start_F1, order_N, ends, 0, 0.1, W_FD, b_F, W_FD)
    ops.gradient_squares(W_FD, None)
    _, parallel_F = ops.gradient_squares(W_FD, W_FD)
    step = AdamStep(0.9, 0.999, 1e-8, 1e-4, 1.1)
    ops.adam(W_FD, W_FD, W_FD, W_FD, parallel_F, cut, step, True, None, go)
    ops.adam(W_FD, W_FD, W_FD, W_FD, None, cut, step, False, latents, go)
    ops.adam(b_F, b_F, b_F, b_F, None, cut, step, False, None, go)


def main():
    triton.knobs.nvidia.dump_ptxas_log = True
    triton.knobs.compilation.always_compile = True
    compiler = triton_pairs.launch = Compiler()
    operations(2048, 2304, 65536, 4 * 40 * 2048, 40 * 2048, low=True)
    if "--all" in sys.argv:
        operations(1024, 100, 1000, 5000, 3000, low=False)
    for entry in compiler.seen.values():
        print(json.dumps(entry))


if __name__ == "__main__":
    main()
