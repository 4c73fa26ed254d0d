"""The operators against dense algebra (section 7, 1 to 5, 16), construction, refusals, and dhg and PyG as peers."""

import numpy as np
import pytest
import reference
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from isotone.lighthgnn import Graph, Hypergraph, Incidences, SparseMatrix, StoredHypergraph, make_synthetic
from isotone.lighthgnn.blocks import predict_in_blocks, train_teacher_in_blocks
from isotone.lighthgnn.features import as_features
from isotone.lighthgnn.sparse import SparseLinear
from isotone.lighthgnn.teachers import TEACHERS, make_teacher
from isotone.lighthgnn.training import TrainConfig
from isotone.shared.errors import InputError

EDGES = [[0, 1, 2], [2, 3], [4, 5, 0, 3], [1, 5], [6]]
WEIGHTS = [1.0, 2.0, 0.5, 1.5, 3.0]


@st.composite
def hypergraphs(draw):
    n = draw(st.integers(2, 8))
    edges = draw(st.lists(st.lists(st.integers(0, n - 1), min_size=1, max_size=5), min_size=1, max_size=8))
    return n, edges


def canonical(edges):
    found = []
    for edge in edges:
        if sorted(set(edge)) not in found:
            found.append(sorted(set(edge)))
    return found


@settings(deadline=None, max_examples=60)
@given(hypergraphs(), st.randoms(use_true_random=False))
def test_operators_equal_dense_algebra(given_, random):
    n, edges = given_
    hg = Hypergraph(n, edges)
    kept = canonical(edges)
    assert hg.edges() == kept
    shuffled = [random.sample(edge * 2, 2 * len(edge)) for edge in edges]
    assert Hypergraph(n, shuffled).edges() == kept, "order and repeats within a hyperedge do not matter"
    h = reference.incidence(n, kept)
    X = torch.randn(n, 3, dtype=torch.float64)
    ones = torch.ones(len(kept), dtype=torch.float64)
    torch.testing.assert_close(hg.v2e(X), h.T @ X / h.sum(0)[:, None])
    torch.testing.assert_close(hg.v2e(X, "sum"), h.T @ X)
    Y = torch.randn(len(kept), 3, dtype=torch.float64)
    torch.testing.assert_close(hg.e2v(Y, "sum"), h @ Y)
    torch.testing.assert_close(hg.smooth(X, "hgnn"), reference.hgnn(h, ones) @ X, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hg.smooth(X, "hgnnp"), reference.hgnnp(h, ones) @ X, rtol=1e-5, atol=1e-5)


def test_weighted_smoothing_and_its_spectrum():
    hg = Hypergraph(7, EDGES, WEIGHTS)
    h, w = reference.incidence(7, EDGES), torch.tensor(WEIGHTS, dtype=torch.float64)
    eye = torch.eye(7, dtype=torch.float64)
    L = hg.smooth(eye, "hgnn")
    torch.testing.assert_close(L, reference.hgnn(h, w), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(L, L.T, rtol=0, atol=1e-7)
    values = torch.linalg.eigvalsh(L)
    assert values[0] > -1e-6 and abs(values[-1] - 1) < 1e-6
    top = hg.vertex_degree.double().sqrt()
    torch.testing.assert_close(L @ top, top, rtol=1e-6, atol=1e-6)
    P = hg.smooth(eye, "hgnnp")
    torch.testing.assert_close(P.sum(1), torch.ones(7, dtype=torch.float64), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(P, reference.hgnnp(h, w), rtol=1e-6, atol=1e-6)


def test_pairs_give_the_graph_laplacian():
    pairs = [[0, 1], [1, 2], [2, 3], [3, 0], [0, 2]]
    A = torch.zeros(4, 4, dtype=torch.float64)
    for a, b in pairs:
        A[a, b] = A[b, a] = 1
    root = A.sum(1).rsqrt().diag()
    expected = (torch.eye(4, dtype=torch.float64) + root @ A @ root) / 2
    found = Hypergraph(4, pairs).smooth(torch.eye(4, dtype=torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", TEACHERS)
def test_permutations(name):
    torch.manual_seed(0)
    hg = Hypergraph(7, EDGES, WEIGHTS)
    model = make_teacher(name, 5, 3, hidden=8).eval()
    X = torch.randn(7, 5)
    out = model(X, hg)
    order = torch.randperm(7)
    place = torch.empty(7, dtype=torch.long)
    place[order] = torch.arange(7)
    moved = Hypergraph(7, [[int(place[v]) for v in e] for e in EDGES], WEIGHTS)
    torch.testing.assert_close(model(X[order], moved), out[order], rtol=1e-5, atol=1e-5)
    back = Hypergraph(7, EDGES[::-1], WEIGHTS[::-1])
    torch.testing.assert_close(model(X, back), out, rtol=1e-5, atol=1e-5)


def test_a_singleton_vertex_keeps_its_own_features():
    torch.manual_seed(0)
    bare = Hypergraph(5, [[0, 1], [1, 2]])
    assert bare.isolated().tolist() == [3, 4]
    assert bare.smooth(torch.randn(5, 2))[3:].abs().sum() == 0, "without singletons they lose everything"
    hg = bare.add_singletons()
    model = make_teacher("hgnn", 4, 3, layers=1).eval()
    X = torch.randn(5, 4)
    torch.testing.assert_close(model(X, hg)[3:], model.layers[0].theta(X[3:]))
    assert hg.add_singletons() is hg


def test_duplicates_merge_at_the_mean_weight_and_are_traced():
    hg = Hypergraph(4, [[0, 1], [2, 3], [1, 0, 1], [2]], [1.0, 1.0, 3.0, 1.0])
    assert hg.edges() == [[0, 1], [2, 3], [2]] and hg.edge_weight.tolist() == [2.0, 1.0, 1.0]
    assert hg.merged_into.tolist() == [0, 1, 0, 2]
    assert Hypergraph(4, [[0, 1], [1, 0]], merge=False).num_edges == 2


@pytest.mark.parametrize(
    "edges, weight, words",
    [
        ([[0, 5]], None, "got 5"),
        ([[-1, 2]], None, "got -1"),
        ([[0], []], None, "hyperedge 1 without"),
        ([], None, "at least 1 hyperedge"),
        ([[0, 1]], [0.0], "got 0.0"),
        ([[0, 1]], [float("nan")], "got nan"),
        ([[0, 1]], [1.0, 1.0], "expected 1 hyperedge weights"),
        ([[0.5, 1]], None, "integers"),
        ((np.array([0, 1]), np.array([0, 2])), None, "hyperedge 1 without"),
    ],
)
def test_bad_hypergraphs_are_refused(edges, weight, words):
    with pytest.raises(InputError, match=words):
        Hypergraph(5, edges, weight)


def test_other_forms_of_input_agree(tmp_path):
    hg = Hypergraph(7, EDGES, WEIGHTS)
    h = reference.incidence(7, EDGES)
    assert Hypergraph.from_incidence(scipy.sparse.csr_matrix(h.numpy())).edges() == hg.edges()
    assert Hypergraph.from_incidence(h.to_sparse()).edges() == hg.edges()
    with pytest.raises(InputError, match="without vertices"):
        Hypergraph.from_incidence(np.array([[1, 0], [1, 0]]))
    again = Hypergraph.load(hg.save(tmp_path / "hg.npz"))
    assert again.edges() == hg.edges() and torch.equal(again.edge_weight, hg.edge_weight)
    (tmp_path / "bad.npz").write_bytes(b"no")
    with pytest.raises(InputError, match="bad.npz"):
        Hypergraph.load(tmp_path / "bad.npz")
    graph = Hypergraph.from_graph(4, np.array([[0, 1, 1], [1, 0, 2]]))
    assert graph.edges() == [[0, 1], [1, 2], [0, 1, 2], [3]], "edges, then neighbourhoods, equal ones merged"
    two_hops = Hypergraph.from_graph(3, np.array([[0, 1], [1, 2]]), khop=2)
    assert [0, 1, 2] in two_hops.edges()
    X = np.array([[0.0], [1.0], [10.0], [11.0]])
    assert Hypergraph.from_knn(X, 1).edges() == [[0, 1], [2, 3]]
    assert repr(hg) == "Hypergraph(num_vertices=7, num_edges=5, nnz=12)" and hg.laplacian_entries() == 34


def test_two_rows_of_an_array_are_incidences():
    hg = Hypergraph(7, EDGES)
    index = hg.hyperedge_index
    pair = (index[0].tolist(), index[1].tolist())
    for form in (index, index.numpy(), tuple(index), tuple(index.numpy()), pair, tuple(map(tuple, pair))):
        assert Hypergraph(7, form).edges() == hg.edges()
    assert Hypergraph(7, [[0, 1, 2], [3, 4, 5]]).edges() == [[0, 1, 2], [3, 4, 5]], "a list of two is two hyperedges"
    assert Hypergraph(7, np.arange(6).reshape(3, 2)).edges() == [[0, 1], [2, 3], [4, 5]]
    for form, words in [(index.float(), "integers"), (([0, 1], [0]), "got 2 and 1"), (index - 1, "0 or more")]:
        with pytest.raises(InputError, match=words):
            Hypergraph(7, form)


def test_observed_subgraph():
    hg = Hypergraph(7, EDGES, WEIGHTS)
    seen = hg.subgraph(torch.tensor([0, 2, 3, 5]))
    assert seen.edges() == [[0, 1], [1, 2], [0, 2, 3], [3]], "renumbered; the one left empty is gone"
    assert seen.edge_weight.tolist() == WEIGHTS[:4]


def test_sparse_matrix_and_its_gradient():
    torch.manual_seed(0)
    dense = torch.randn(6, 5, dtype=torch.float64) * (torch.rand(6, 5) < 0.4)
    sparse = SparseMatrix.from_scipy(scipy.sparse.csr_matrix(dense.numpy()), torch.float64)
    X = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(sparse @ X, dense @ X)
    assert torch.autograd.gradcheck(lambda x: sparse @ x, (X,))
    torch.testing.assert_close(sparse.T.to_dense(), dense.T)
    rows = torch.tensor([4, 0, 4])
    torch.testing.assert_close(sparse.rows(rows).to_dense(), dense[rows])
    with pytest.raises(ValueError, match="expected 5 rows"):
        sparse @ torch.ones(4, 1)
    with pytest.raises(InputError, match="finite"):
        SparseMatrix.from_scipy(scipy.sparse.csr_matrix([[float("nan")]]))
    theirs = scipy.sparse.csr_matrix(([1.0, 2.0], [0, 0], [0, 2]), (1, 1))
    SparseMatrix.from_scipy(theirs)
    assert theirs.nnz == 2, "the caller's matrix is left as it is"


def test_sparse_first_layer_equals_dense_with_gradients():
    torch.manual_seed(0)
    X = (torch.rand(40, 100) < 0.02).float()
    sparse = as_features(X)
    assert isinstance(sparse, SparseMatrix)
    layer = SparseLinear(100, 7)
    grads = []
    for features in (X, sparse):
        layer.zero_grad()
        layer(features).square().sum().backward()
        grads.append((layer.weight.grad.clone(), layer.bias.grad.clone()))
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in TEACHERS if not TEACHERS[name].on_graph])
def test_exact_closures_equal_the_whole_pass(name):
    torch.manual_seed(1)
    made = make_synthetic(num_vertices=400, num_edges=150, dim=6, sizes=(2, 4))
    weighted = Hypergraph(400, made.hypergraph.edges(), torch.rand(made.hypergraph.num_edges) + 0.5)
    model = make_teacher(name, 6, 3, hidden=8).eval()
    asked = torch.tensor([3, 77, 5])
    blocks, needed = Incidences.of(weighted).blocks(asked, 2)
    assert needed[:3].tolist() == asked.tolist() and len(needed) < 200
    blocks = [block.to("cpu") for block in blocks]
    torch.testing.assert_close(model(made.X[needed], blocks), model(made.X, weighted)[asked], rtol=1e-5, atol=1e-5)


def test_sampled_blocks_are_limited_and_unbiased():
    made = make_synthetic(num_vertices=200, num_edges=150, dim=3)
    parts = Incidences.of(made.hypergraph)
    source = np.random.default_rng(0)
    seeds = torch.arange(5)
    exact = made.hypergraph.e2v(made.hypergraph.v2e(made.X), "sum")[:5]
    draws = []
    for _ in range(3000):
        (block,), needed = parts.blocks(seeds, 1, edges_per_vertex=2, vertices_per_edge=3, generator=source)
        assert int(block.out_of_edges.row_counts().max()) <= 2 and int(block.into_edges.row_counts().max()) <= 3
        draws.append(block.e2v(block.v2e(made.X[needed]), "sum"))
    stacked = torch.stack(draws)
    error = stacked.std(0) / len(draws) ** 0.5
    # 15 numbers at 4.5 standard errors: a false alarm in 1e-4 of runs
    assert ((stacked.mean(0) - exact).abs() < 4.5 * error + 1e-6).all()


def test_a_teacher_learns_from_files_by_blocks(tmp_path):
    made = make_synthetic(num_vertices=300, num_edges=200, dim=16, num_classes=3, signal=0.6)
    stored = StoredHypergraph(StoredHypergraph.write(tmp_path / "hg", made.hypergraph, made.X))
    assert isinstance(stored.features, np.memmap)
    torch.manual_seed(0)
    model = make_teacher("hgnnp", 16, 3)
    train, val = torch.arange(60), torch.arange(60, 160)
    history = train_teacher_in_blocks(
        model,
        stored,
        made.y,
        train,
        val,
        TrainConfig(epochs=15),
        batch_size=20,
        edges_per_vertex=4,
        vertices_per_edge=5,
        folder=tmp_path / "checkpoints",
    )
    with pytest.raises(InputError, match="resume"):
        train_teacher_in_blocks(model, stored, made.y, val, train, TrainConfig(epochs=15), batch_size=20,
                                edges_per_vertex=4, vertices_per_edge=5, folder=tmp_path / "checkpoints")  # fmt: skip
    assert history.best_accuracy > 0.8
    logits = predict_in_blocks(model, stored, torch.arange(300), batch_size=64)
    torch.testing.assert_close(logits, model(made.X, made.hypergraph).detach(), rtol=1e-4, atol=1e-5)
    (tmp_path / "hg" / "degree.npy").unlink()
    with pytest.raises(InputError, match="degree.npy"):
        StoredHypergraph(tmp_path / "hg")


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_stream_writes_the_files_of_the_whole(chunk, weighted, tmp_path):
    made = make_synthetic(num_vertices=80, num_edges=50, dim=4)
    weight = np.random.default_rng(0).random(made.hypergraph.num_edges).astype(np.float32) + 0.5 if weighted else None
    hypergraph = Hypergraph(80, made.hypergraph.edges(), weight)
    edges = ([*edge, edge[0]] for edge in hypergraph.edges())  # a generator, with a vertex listed twice
    whole = StoredHypergraph(StoredHypergraph.write(tmp_path / "whole", hypergraph, made.X))
    folder = StoredHypergraph.write_stream(tmp_path / "stream", 80, edges, iter(made.X.split(33)), weight, chunk)
    stream = StoredHypergraph(folder)
    for name in ("edge_indptr", "edge_indices", "vertex_indptr", "vertex_indices", "features"):
        assert np.array_equal(getattr(stream, name), getattr(whole, name)), name
    np.testing.assert_allclose(stream.degree, whole.degree, rtol=1e-6)
    assert (stream.edge_weight is None) is (not weighted)


@pytest.mark.parametrize(
    "edges, rows, weight, words",
    [
        ([[0, 9]], 4, None, "got 9"),
        ([[0], []], 4, None, "hyperedge 1"),
        ([], 4, None, "at least 1 hyperedge"),
        ([[0]], 3, None, "got 3"),
        ([[0]], 5, None, "got 5"),
        ([[0]], 4, [1.0, 2.0], "1 hyperedge weights"),
    ],
)
def test_refusals_of_a_stream(edges, rows, weight, words, tmp_path):
    with pytest.raises(InputError, match=words):
        StoredHypergraph.write_stream(tmp_path, 4, edges, [torch.zeros(rows, 2)], weight)


def test_graph():
    graph = Graph.from_edges(4, [[0, 1, 1], [1, 2, 0]])
    A = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 0], [0, 0, 0, 1.0]])
    torch.testing.assert_close(graph.adjacency.to_dense(), A)
    root = A.sum(1).rsqrt().diag()
    torch.testing.assert_close(graph.smooth(torch.eye(4)), root @ A @ root)
    expanded = Graph.clique_expansion(Hypergraph(4, [[0, 1], [1, 2]])).adjacency.to_dense()
    torch.testing.assert_close(expanded, A)
    with pytest.raises(InputError, match="got 9"):
        Graph.from_edges(4, [[0], [9]])


# --- peers on shared weights; skipped where they are not installed ---------------------------------------


def _peer_problem(weighted):
    made = make_synthetic(num_vertices=80, num_edges=40, dim=12)
    weights = (torch.rand(made.hypergraph.num_edges, generator=torch.Generator().manual_seed(3)) + 0.5).tolist()
    hg = Hypergraph(80, made.hypergraph.edges(), weights if weighted else None)
    return hg, made.X


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name, theirs", [("hgnn", "HGNN"), ("hgnnp", "HGNNP"), ("hnhn", "HNHN"), ("unigcn", "UniGCN"),
                                          ("unisage", "UniSAGE"), ("unigin", "UniGIN")])  # fmt: skip
def test_equal_to_dhg(name, theirs, weighted):
    dhg = pytest.importorskip("dhg")
    hg, X = _peer_problem(weighted)
    torch.manual_seed(0)
    peer = getattr(dhg.models, theirs)(12, 16, 5).eval()
    ours = make_teacher(name, 12, 5, hidden=16).eval()
    ours.load_state_dict(peer.state_dict())
    peer_hg = dhg.Hypergraph(80, hg.edges(), hg.edge_weight.tolist())
    torch.testing.assert_close(ours(X, hg), peer(X, peer_hg), rtol=1e-5, atol=1e-5)
    assert Hypergraph.from_dhg(peer_hg).edges() == hg.edges()


def _copy_heads(ours, theirs, first, second):
    """dhg keeps a module a head; ours keeps them side by side."""
    heads = theirs.multi_head_layer.layers
    ours.layers[0].theta.weight.data = torch.cat([h.theta.weight for h in heads]).detach()
    ours.layers[0].theta.bias.data = torch.cat([h.theta.bias for h in heads]).detach()
    for name in (first, second):
        getattr(ours.layers[0], name).data = torch.cat([getattr(h, name).weight for h in heads]).detach()
        getattr(ours.layers[1], name).data = getattr(theirs.out_layer, name).weight.detach()
    ours.layers[1].theta.load_state_dict(theirs.out_layer.theta.state_dict())


def test_attention_equals_dhg():
    dhg = pytest.importorskip("dhg")
    hg, X = _peer_problem(False)
    torch.manual_seed(0)
    peer = dhg.models.UniGAT(12, 4, 5, num_heads=2).eval()
    ours = make_teacher("unigat", 12, 5, hidden=8, heads=2).eval()
    _copy_heads(ours, peer, "atten_e", "atten_dst")
    torch.testing.assert_close(ours(X, hg), peer(X, dhg.Hypergraph(80, hg.edges())), rtol=1e-5, atol=1e-5)


def test_graph_teachers_equal_dhg():
    dhg = pytest.importorskip("dhg")
    torch.manual_seed(0)
    pairs = torch.randint(30, (2, 60))
    pairs = pairs[:, pairs[0] != pairs[1]]
    X = torch.randn(30, 6)
    graph = Graph.from_edges(30, pairs)
    peer_graph = dhg.Graph(30, pairs.T.tolist())
    peer = dhg.models.GCN(6, 8, 3).eval()
    ours = make_teacher("gcn", 6, 3, hidden=8).eval()
    ours.load_state_dict(peer.state_dict())
    torch.testing.assert_close(ours(X, graph), peer(X, peer_graph), rtol=1e-5, atol=1e-5)
    with_loops = dhg.Graph(30, pairs.T.tolist())
    with_loops.add_extra_selfloop()
    peer = dhg.models.GAT(6, 4, 3, num_heads=2).eval()
    ours = make_teacher("gat", 6, 3, hidden=8, heads=2).eval()
    _copy_heads(ours, peer, "atten_src", "atten_dst")
    torch.testing.assert_close(ours(X, graph), peer(X, with_loops), rtol=1e-5, atol=1e-5)


def test_equal_to_torch_geometric():
    nn = pytest.importorskip("torch_geometric.nn")
    hg, X = _peer_problem(False)
    conv = nn.HypergraphConv(12, 7, bias=False)
    ours = make_teacher("hgnnp", 12, 7, layers=1).eval()
    with torch.no_grad():
        ours.layers[0].theta.weight.copy_(conv.lin.weight)
        ours.layers[0].theta.bias.zero_()
    data = hg.to_pyg()
    theirs = conv(X, data.hyperedge_index, data.hyperedge_weight)
    torch.testing.assert_close(ours(X, hg), theirs, rtol=1e-5, atol=1e-5)
