"""The naive forms that the fast paths are held to: written from the equations, one token and one head at a time."""

from __future__ import annotations

import math

import torch


def rms_norm(x, weight, eps):
    return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + eps)


def rope(x, position, theta):
    """`x` (heads, e) at `position`: pairs (i, i + e/2) turned by position * theta^(-2i/e)."""
    e = x.shape[-1]
    angle = position * theta ** (-torch.arange(0, e, 2, dtype=x.dtype) / e)
    cos, sin = torch.cos(angle), torch.sin(angle)
    a, b = x[..., : e // 2], x[..., e // 2 :]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def swiftkv_forward(model, ids, kept, group, first_position=0, copied=False):
    """Logits (n, V) of one row of ids (n,) by the paper's five steps, every token through every layer, in float64.

    `copied`: not SwiftKV, but the keys and values of layer l - 1 in every layer after it, with those layers' own
    queries. Of a Llama: each query head attends with a softmax written out to all tokens before its own.
    """
    config, inner = model.config, model.model
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    size, theta = config.head_dim, config.rope_parameters["rope_theta"]
    weight = {name: p.detach().double() for name, p in model.named_parameters()}

    def linear(name, x):
        y = x @ weight[f"{name}.weight"].T
        return y + weight[f"{name}.bias"] if f"{name}.bias" in weight else y

    hidden = weight["model.embed_tokens.weight"][ids]
    shared = {}
    for j in range(len(inner.layers)):
        at = f"model.layers.{j}"
        swift = "" if j < kept or copied else "_swiftkv"
        x = rms_norm(hidden, weight[f"{at}.input_layernorm.weight"], config.rms_norm_eps)
        if j == kept:  # step 2
            single = rms_norm(hidden, weight["model.norm_swiftkv.weight"], config.rms_norm_eps)
        source = x if j < kept else single
        if j < kept or ((j - kept) % group == 0 and not copied):  # steps 1 and 3
            keys = linear(f"{at}.self_attn.k_proj{swift}", source).view(-1, kv_heads, size)
            values = linear(f"{at}.self_attn.v_proj{swift}", source).view(-1, kv_heads, size)
            keys = torch.stack([rope(k, first_position + t, theta) for t, k in enumerate(keys)])
            shared = {"k": keys, "v": values}
        queries = linear(f"{at}.self_attn.q_proj{swift}", x).view(-1, heads, size)  # step 4
        out = torch.zeros(len(ids), heads, size, dtype=torch.float64)
        for t in range(len(ids)):
            turned = rope(queries[t], first_position + t, theta)
            for h in range(heads):
                k = shared["k"][: t + 1, h // (heads // kv_heads)]
                score = (k @ turned[h]) / math.sqrt(size)
                out[t, h] = torch.softmax(score, 0) @ shared["v"][: t + 1, h // (heads // kv_heads)]
        hidden = hidden + linear(f"{at}.self_attn.o_proj", out.flatten(1))
        x = rms_norm(hidden, weight[f"{at}.post_attention_layernorm.weight"], config.rms_norm_eps)
        gate = torch.nn.functional.silu(linear(f"{at}.mlp.gate_proj", x))
        hidden = hidden + linear(f"{at}.mlp.down_proj", gate * linear(f"{at}.mlp.up_proj", x))
    return rms_norm(hidden, weight["model.norm.weight"], config.rms_norm_eps) @ weight["lm_head.weight"].T


def kl(student, teacher, temperature, mask):
    """T^2 times the mean over all tokens of mask * sum_v p (log p - log q), with loops."""
    total = 0.0
    for s, t, m in zip(student.double(), teacher.double(), mask, strict=True):
        p, q = torch.softmax(t / temperature, -1), torch.softmax(s / temperature, -1)
        total += float(m) * float((p * (p.log() - q.log())).sum())
    return temperature**2 * total / len(student)


def rope_write(projected, cos, sin, rows, positions, groups, heads, size, batch, length):
    """Keys and values (groups, batch, heads, length, size) after the tokens of `projected` were put in, one by one."""
    keys = torch.zeros(groups, batch, heads, length, size)
    values = torch.zeros(groups, batch, heads, length, size)
    for t in range(len(projected)):
        for g in range(groups):
            for h in range(heads):
                start = (g * heads + h) * size
                k = projected[t, start : start + size]
                a, b = k[: size // 2], k[size // 2 :]
                turned = k * cos[t] + torch.cat([-b, a]) * sin[t]
                keys[g, rows[t], h, positions[t]] = turned
                start += groups * heads * size
                values[g, rows[t], h, positions[t]] = projected[t, start : start + size]
    return keys, values
