"""The topology-aware score (section 2.7): how far embeddings scatter within hyperedges. Lower is smoother."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from isotone.lighthgnn.hypergraph import Hypergraph


def topology_score(
    embedding: Float[Tensor, "N c"], hypergraph: Hypergraph, normalize: bool = False
) -> Float[Tensor, ""]:
    """Mean over hyperedges of the mean distance of their vertices' embeddings to their centre.

    0 where every hyperedge is of one embedding; scales with the embedding, so `normalize` divides it first by the
    root mean square of its centred rows: compare architectures with that. One pass over the incidences.
    """
    if normalize:
        centred = embedding - embedding.mean(0)
        embedding = embedding / centred.square().sum(1).mean().sqrt().clamp(min=1e-12)
    centres = hypergraph.v2e(embedding, "mean")
    members, owner = hypergraph.into_edges.indices, hypergraph.into_edges.row_ids()
    distances = torch.linalg.vector_norm(embedding[members] - centres[owner], dim=1)
    sums = distances.new_zeros(hypergraph.num_edges).index_add(0, owner, distances)
    return (sums / hypergraph.edge_size).mean()
