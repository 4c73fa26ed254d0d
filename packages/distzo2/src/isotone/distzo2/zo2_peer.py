"""A step of the authors' ZO2, timed: run by a Python of its own (`bench --zo2`), which has zo2 and not this package."""

import json
import statistics
import sys
import time
from importlib.metadata import version
from typing import Any

WARM, STEPS = 5, 20


def main(given: dict) -> dict:
    """Seconds a step on a random OPT, fp16, blocks on the host, buckets and overlap as zo2 offers them."""
    import torch
    from transformers import OPTConfig
    from zo2 import ZOConfig, zo_hf_init

    config = ZOConfig(
        method="mezo-sgd",
        zo2=True,
        offloading_device="cpu",
        working_device="cuda",
        lr=1e-7,
        weight_decay=0.0,
        overlap=True,
        communicate_optimize_method="bucket",
    )
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float16)
    with zo_hf_init(config):
        from transformers import OPTForCausalLM

        shape = OPTConfig(
            vocab_size=50272,
            num_hidden_layers=given["layers"],
            num_attention_heads=given["heads"],
            hidden_size=given["hidden"],
            word_embed_proj_dim=given["hidden"],
            ffn_dim=given["ffn"],
            max_position_embeddings=given["length"],
        )
        model: Any = OPTForCausalLM(shape)
        model.zo_init(config)
    torch.set_default_dtype(torch.float32)
    ids = torch.randint(50272, (given["rows"], given["length"]), device="cuda")
    model.zo_train()
    times = []
    for _ in range(WARM + STEPS):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    peak = torch.cuda.max_memory_allocated()
    kept = times[WARM:]
    seconds = {"seconds": statistics.median(kept), "fastest": min(kept), "slowest": max(kept)}
    return {**seconds, "peak": peak, "version": version("zo2")}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(json.loads(sys.argv[1]))) + "\n")
