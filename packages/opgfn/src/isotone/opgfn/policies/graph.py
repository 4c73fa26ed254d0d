"""A graph transformer over fragment trees, in plain torch: dense attention over the few nodes of each tree.

Legend: B trees, M nodes (the most of the batch; the rest of the N places is not computed), K stems, C channels. A
virtual node carries the condition and what is said of the whole graph. Nothing depends on the order of nodes, nor
on which end of an edge is the parent.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from isotone.opgfn.envs.fragments import FragmentEnv
from isotone.opgfn.policies.base import Policy, PolicyOutput

_GROUPED_ROWS = 128


class _Block(nn.Module):
    """Pre-norm attention over all nodes, biased by adjacency, and messages along edges that know their stems."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.adjacent = nn.Parameter(torch.zeros(heads))
        self.out = nn.Linear(channels, channels)
        self.message = nn.Linear(channels, channels)
        self.mlp = nn.Sequential(
            nn.LayerNorm(channels), nn.Linear(channels, 2 * channels), nn.LeakyReLU(), nn.Linear(2 * channels, channels)
        )

    def forward(self, hidden: Tensor, bias: Tensor, adjacency: Tensor, edges: Tensor) -> Tensor:
        b, m, c = hidden.shape
        normed = self.norm(hidden)
        query, key, value = self.qkv(normed).view(b, m, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        mask = bias[:, None] + self.adjacent[:, None, None] * adjacency[:, None]
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to(query.dtype))
        heard = torch.bmm(adjacency.to(normed.dtype), self.message(normed)) + edges
        hidden = hidden + self.out(attended.transpose(1, 2).reshape(b, m, c)) + heard
        return hidden + self.mlp(hidden)


class GraphPolicy(Policy):
    """Logits of AddNode from each node, of SetEdge from both ends of each edge, of stop and log F(s) from the virtual
    node (section 2.7). One softmax is over the union of all three.

    `autocast`: on a GPU, run the blocks in bfloat16; heads and logits stay in float32.
    """

    def __init__(
        self,
        env: FragmentEnv,
        channels: int = 128,
        layers: int = 4,
        heads: int = 2,
        *,
        backward: bool = False,
        flow: bool = False,
        inter: bool = False,
        condition_dim: int = 0,
        autocast: bool = False,
    ) -> None:
        super().__init__()
        if channels < 1 or layers < 1 or heads < 1 or channels % heads:
            raise ValueError(f"expected channels divisible by heads and a layer, got {channels}, {heads}, {layers}")
        self.env, self.condition_dim, self.autocast = env, condition_dim, autocast
        self._span = max(1, -(-env.n // 3))
        self.fragment = nn.Embedding(env.v + 1, channels)
        self.used = nn.Linear(env.k, channels, bias=False)
        self.size = nn.Embedding(env.n + 1, channels)
        self.condition = nn.Linear(condition_dim, channels) if condition_dim else None
        self.near, self.far = nn.Embedding(env.k + 1, channels), nn.Embedding(env.k + 1, channels)
        self.blocks = nn.ModuleList(_Block(channels, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(channels)
        self.add = nn.Linear(channels, env.v)
        self.end, self.other = nn.Linear(channels, channels), nn.Linear(channels, channels, bias=False)
        self.choose = nn.Linear(channels, env.k)
        self.whole = nn.Linear(channels, 3)
        self.has_flow, self.has_inter = flow, inter
        self.remove = nn.Linear(channels, 1) if backward else None
        self.unset = nn.Linear(channels, 1) if backward else None

    def forward(self, states: Int[Tensor, "B width"], condition: Float[Tensor, "B c"] | None = None) -> PolicyOutput:
        self.check_condition(condition)
        # small trees are not computed at the width of the largest: an update has as many of every size
        group = (self.env.sizes(states) + self._span - 1).div(self._span, rounding_mode="floor").clamp(min=1)
        found = torch.unique(group)
        if len(states) < _GROUPED_ROWS or len(found) == 1:
            return self._output(states, condition)
        members = [(group == number).nonzero().squeeze(1) for number in found]
        parts = [self._output(states[rows], None if condition is None else condition[rows]) for rows in members]
        back = torch.argsort(torch.cat(members))
        joined = [None if part[0] is None else torch.cat(part)[back] for part in zip(*parts, strict=True)]
        return PolicyOutput._make(joined)

    def _output(self, states: Tensor, condition: Tensor | None) -> PolicyOutput:
        env = self.env
        fragment, parent, upper, lower = env.split(states)
        size = (fragment < env.v).sum(1)
        m = max(1, int(size.max()))
        joined = (parent < env.n)[:, 1:m, None]
        above = parent[:, 1:m].clamp(max=m - 1)
        # what each end of an edge hears of its own stem and of the other's: to the parent, and to the child
        to_parent = (self.near(upper[:, 1:m]) + self.far(lower[:, 1:m])) * joined
        to_child = (self.near(lower[:, 1:m]) + self.far(upper[:, 1:m])) * joined
        with torch.autocast(states.device.type, torch.bfloat16, enabled=self.autocast and states.is_cuda):
            hidden = self._encode(states, condition, size, m, above, joined, to_parent, to_child)
        hidden = self.norm(hidden.to(self.norm.weight.dtype))
        graph, nodes = hidden[:, 0], hidden[:, 1:]
        child, top = nodes[:, 1:], nodes.gather(1, above[..., None].expand(-1, -1, nodes.shape[2]))
        ends = torch.stack(
            [self.end(top) + self.other(child) + to_parent, self.end(child) + self.other(top) + to_child], 2
        )
        ends = F.leaky_relu(ends)
        whole = self.whole(graph)
        rows = len(states)
        add = F.pad(self.add(nodes), (0, 0, 0, env.n - m)).flatten(1)
        choose = F.pad(self.choose(ends), (0, 0, 0, 0, 0, env.n - m)).flatten(1)
        backward = None
        if self.remove is not None and self.unset is not None:
            remove = F.pad(self.remove(nodes)[..., 0], (0, env.n - m))
            backward = torch.cat([remove, F.pad(self.unset(ends)[..., 0], (0, 0, 0, env.n - m)).reshape(rows, -1)], 1)
        return PolicyOutput(
            torch.cat([add, choose, whole[:, :1]], 1),
            backward,
            whole[:, 1] if self.has_flow else None,
            whole[:, 2] if self.has_inter else None,
        )

    def _encode(
        self,
        states: Tensor,
        condition: Tensor | None,
        size: Tensor,
        m: int,
        above: Tensor,
        joined: Tensor,
        to_parent: Tensor,
        to_child: Tensor,
    ) -> Tensor:
        """(B, 1 + M, C): the virtual node first."""
        env = self.env
        rows = len(states)
        nodes = self.fragment(states[:, :m]) + self.used(env.used_stems(states)[:, :m].to(self.used.weight.dtype))
        virtual = self.size(size)
        if self.condition is not None and condition is not None:
            virtual = virtual + self.condition(condition.to(virtual.dtype))
        hidden = torch.cat([virtual[:, None], nodes], 1)
        # the empty tree keeps its first place, which is where a first fragment is added
        there = torch.arange(m, device=states.device) < size.clamp(min=1)[:, None]
        there = torch.cat([there.new_ones(rows, 1), there], 1)
        bias = torch.zeros(there.shape, device=states.device).masked_fill(~there, -torch.inf)[:, None, :]
        bias = bias.expand(-1, 1 + m, -1)
        adjacency = hidden.new_zeros(rows, 1 + m, 1 + m, dtype=torch.float32)
        batch = torch.arange(rows, device=states.device)[:, None]
        place = torch.arange(2, m + 1, device=states.device)
        weight = joined[..., 0].to(adjacency.dtype)
        adjacency[batch, place, above + 1] = weight
        adjacency[batch, above + 1, place] += weight
        edges = torch.zeros_like(hidden)
        edges[:, 2:] = to_child
        edges = edges.scatter_add(1, (above + 1)[..., None].expand(-1, -1, edges.shape[2]), to_parent.to(edges.dtype))
        for block in self.blocks:
            hidden = block(hidden, bias, adjacency, edges)
        return hidden
