"""What runs in a process of its own, once for all: compiled decoding beside eager, since the array checker's wrappers
cannot be compiled, and the Triton kernel in its interpreter, which is chosen before triton's functions are made.

Prints, as JSON, how far the logits of three steps are apart for each case, whether generated tokens are the same, and
how far the kernel is from the plain path.
"""

import functools
import json
import os
import subprocess
import sys

import torch
import workers
from models import ids, make

from isotone.swiftkv import convert, decode, extend, generation, make_cache
from isotone.swiftkv.decoders import Decoder

CASES = [("mistral-window", "int8")]  # a Llama generates; the slow tests have more


def shaken(model, seed=3):
    """The new weights moved away from their initialisation, so that nothing holds by being a copy."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "swiftkv" in name:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def difference(family, kv_dtype, backend="eager"):
    """fullgraph is on: a break in the graph would raise."""
    model = shaken(convert(make(family, num_hidden_layers=4), 2, 2))
    rows = [ids(1, n, 1 + i)[0] for i, n in enumerate((5, 8))]
    eager, static = (make_cache(model, 2, 12, kv_dtype) for _ in range(2))
    extend(model, rows, eager)
    extend(model, rows, static)
    torch._dynamo.reset()
    decoder = Decoder(model, static, "compile", backend=backend)
    worst = 0.0
    for step in range(3):
        tokens = ids(2, 1, 30 + step)[:, 0]
        wanted = decode(model, tokens, eager)
        worst = max(worst, float((decoder(tokens) - wanted).abs().max()) / max(1.0, float(wanted.abs().max())))
    return worst


def generated():
    model = shaken(convert(make(num_hidden_layers=4), 2, 2))
    options = dict(max_new_tokens=12, pad_token_id=0)
    wanted = model.generate(ids(1, 9), **options)
    whole = generation.Decoder
    generation.Decoder = lambda m, cache, mode: whole(m, cache, mode, backend="eager")
    torch._dynamo.reset()
    return torch.equal(model.generate(ids(1, 9), decode_mode="compile", **options), wanted)


@functools.cache
def found():
    """What the process of its own says."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    said = {"decode": {" ".join(case): difference(*case) for case in CASES}, "generate": generated()}
    said["kernel"] = workers.differences() if workers.kernels.HAVE_TRITON else {}
    print(json.dumps(said))
