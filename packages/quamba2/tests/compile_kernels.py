"""Compiles every kernel for a GPU that need not be there, as the public functions would launch it on real shapes.

The interpreter takes programs that the compiler refuses. `python compile_kernels.py 90` prints a JSON list: name of the
kernel, bytes of shared memory.
"""

import json
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from isotone.quamba2 import gated_norm, hadamard, linear, ssd

NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.int8: "i8", torch.int32: "i32", torch.int64: "i64"}
HALF = torch.float16
compiled: dict[str, list] = {}


def compile_only(self, *args, grid=None, warmup=False, **options):
    """In place of `JITFunction.run`: the specialisation that Triton would choose, compiled and not launched."""
    names = [parameter.name for parameter in self.params]
    values = dict(zip(names, args, strict=False)) | {k: options.pop(k) for k in list(options) if k in names}
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(self.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (type(value) is int and value == 1 and not parameter.do_not_specialize):
            signature[parameter.name], constants[(i,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if type(value) is int and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
    key = f"{self.__name__} {signature} {constants} {options}"
    if key not in compiled:
        source = ASTSource(self, signature, constants, attributes)
        made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
        compiled[key] = [self.__name__, made.metadata.shared]


def int8(*shape):
    return torch.ones(shape, dtype=torch.int8)


def half(*shape):
    return torch.ones(shape, dtype=HALF)


def everything():
    step = torch.tensor(0.1)
    gated_norm.add_rms_norm(half(2, 4096), half(2, 4096), None, scale=step)
    gated_norm.gated_rms_norm(torch.ones(2, 8192), int8(2, 8192), torch.ones(8192), 8, z_scale=step)
    width = torch.ones(10240)
    for length, state in ((1, int8(2, 3, 10240)), (64, None)):
        gated_norm.conv1d_silu(int8(2, length, 10240), int8(10240, 4), width, width, width, state)
    gated_norm.conv1d_silu_float(half(2, 1, 10240), half(10240, 4), half(10240), half(2, 3, 10240))
    for n in (16, 1536, 5120, 8192):
        hadamard.hadamard_quantize(torch.zeros(1, n), step)
    hadamard.hadamard_transform(half(1, 5120), transpose=True)
    packed, scales, rows = torch.zeros(512, 512, dtype=torch.int32), half(512, 32), torch.ones(512)
    for count in (1, 2, 64):
        for x in (half(count, 4096), torch.ones(count, 4096)):
            linear.matmul_w4a16(x, packed, scales)
        linear.matmul_w4a8(int8(count, 4096), packed, scales, rows, rows, torch.int8)
        linear.matmul_w8a8(int8(count, 4096), int8(512, 4096), rows, None, HALF)
    for heads, p, groups, states in ((128, 64, 8, 128), (4, 20, 2, 16)):
        labels, each = torch.zeros(heads, p, dtype=torch.int64), torch.ones(groups)
        steps = ssd.ScanScales(labels, torch.ones(4), each, each, torch.ones(1), torch.ones(4, states))
        A, D = -torch.ones(heads), torch.ones(heads)
        x, dt, B = int8(2, 64, heads, p), int8(2, 64, heads), int8(2, 64, groups, states)
        state = int8(2, heads, p, states)
        ssd.ssd_chunk_scan_int8(x, dt, A, B, B, steps, D, D, initial_state=state)
        ssd.ssd_chunk_scan(x.to(HALF), dt.float(), A, B.to(HALF), B.to(HALF), D)
        ssd.ssd_step_int8(state, x[:, 0], dt[:, 0], A, B[:, 0], B[:, 0], steps, D, D)
        floats = [values.to(HALF) for values in (state, x[:, 0], dt[:, 0], B[:, 0])]
        ssd.ssd_step(*floats[:3], A, floats[3], floats[3], D)


if __name__ == "__main__":
    JITFunction.run = compile_only
    for module in (gated_norm, hadamard, linear, ssd):
        module.takes = lambda *_: True
    everything()
    print(json.dumps(list(compiled.values())))
