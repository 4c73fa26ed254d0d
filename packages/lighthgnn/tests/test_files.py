"""Readers and writers: HIF, edge lists, HyperNetX, XGI, old pickles, data sets; exports in their own runtimes."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from isotone.lighthgnn import (
    Hypergraph,
    LightMLP,
    digits_knn,
    export_onnx,
    export_torch,
    from_hypernetx,
    from_xgi,
    known_dataset,
    load_dataset,
    load_student,
    make_teacher,
    read_edge_list,
    read_hif,
    save_student,
    write_hif,
)
from isotone.lighthgnn.dataset import KNOWN, make_dataset
from isotone.lighthgnn.export import load_teacher, quantize_rows, save_teacher, with_int8_weights
from isotone.lighthgnn.jobs import read_features
from isotone.lighthgnn.old_pickles import read_pickle
from isotone.lighthgnn.readers import read_hypergcn, read_planetoid
from isotone.shared.data import local
from isotone.shared.errors import InputError

EDGES = [[0, 1, 2], [2, 3], [1, 4]]


def test_hif_round_trip_and_peers(tmp_path):
    hg = Hypergraph(6, EDGES, [1.0, 2.0, 0.5])
    path = write_hif(hg, tmp_path / "a.json", names="uvwxyz")
    again, names = read_hif(path)
    assert again.edges() == EDGES and again.edge_weight.tolist() == [1.0, 2.0, 0.5] and names == list("uvwxyz")
    xgi = pytest.importorskip("xgi")
    theirs = xgi.read_hif(path)
    assert {frozenset(e) for e in theirs.edges.members()} == {frozenset("uvwxyz"[v] for v in e) for e in EDGES}
    read, names = from_xgi(theirs)
    assert {frozenset(names[v] for v in e) for e in read.edges()} == {frozenset(e) for e in theirs.edges.members()}
    assert read.num_vertices == 6, "the vertex without hyperedges too"
    xgi.write_hif(theirs, tmp_path / "b.json")
    back, _ = read_hif(tmp_path / "b.json")
    assert back.num_vertices == 6 and sorted(map(len, back.edges())) == [2, 2, 3]


def test_hypernetx():
    hnx = pytest.importorskip("hypernetx")
    hg, names = from_hypernetx(hnx.Hypergraph({"p": ["a", "b"], "q": ["b", "c", "d"]}))
    assert {frozenset(names[v] for v in e) for e in hg.edges()} == {frozenset("ab"), frozenset("bcd")}
    theirs = hnx.Hypergraph({"p": ["a", "b"], "q": ["b", "c"]}, edge_properties={"p": {"weight": 2.5}, "q": {}})
    assert from_hypernetx(theirs)[0].edge_weight.tolist() == [2.5, 1.0]


def test_weights_of_hyperedges_are_kept(tmp_path):
    document = {"incidences": [{"edge": e, "node": v} for e, edge in enumerate(EDGES) for v in edge]}
    document["edges"] = [{"edge": 0, "weight": 2.0}, {"edge": 1, "attrs": {"weight": 3.0}}, {"edge": 2, "attrs": None}]
    assert read_hif(document)[0].edge_weight.tolist() == [2.0, 3.0, 1.0]
    xgi = pytest.importorskip("xgi")
    theirs = xgi.Hypergraph()
    theirs.add_edge([0, 1], weight=2.5)
    theirs.add_edge([1, 2])
    assert from_xgi(theirs)[0].edge_weight.tolist() == [2.5, 1.0]
    xgi.write_hif(theirs, tmp_path / "w.json")
    assert read_hif(tmp_path / "w.json")[0].edge_weight.tolist() == [2.5, 1.0]


@pytest.mark.parametrize(
    "document, words",
    [
        ("{", "JSON"),
        ({"nodes": []}, "incidences"),
        ({"network-type": "directed", "incidences": []}, "'directed'"),
        ({"network-type": "asc", "incidences": []}, "'asc'"),
        ({"incidences": [{"edge": 1}]}, "'node'"),
        ({"edges": [{"edge": 1}], "incidences": [{"edge": 2, "node": 0}]}, "hyperedge 0 without"),
        ({"edges": [{"edge": 1, "weight": -1}], "incidences": [{"edge": 1, "node": 0}]}, "got -1"),
    ],
)
def test_bad_hif(document, words, tmp_path):
    (tmp_path / "h.json").write_text(document if isinstance(document, str) else json.dumps(document))
    with pytest.raises(InputError, match=words):
        read_hif(tmp_path / "h.json")


def test_edge_list(tmp_path):
    (tmp_path / "e.txt").write_text("# authors\n0 1,2\n\n2 3 # last\n")
    assert read_edge_list(tmp_path / "e.txt").edges() == [[0, 1, 2], [2, 3]]
    assert read_edge_list(tmp_path / "e.txt", 9).num_vertices == 9
    for text, words in [("0 x\n", "line 1"), ("#\n", "found none"), ("0 7\n", "got 7")]:
        (tmp_path / "e.txt").write_text(text)
        with pytest.raises(InputError, match=words):
            read_edge_list(tmp_path / "e.txt", 5)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_old_pickles_are_read_without_unpickling(protocol, tmp_path):
    matrix = scipy.sparse.csr_matrix(np.arange(12.0).reshape(3, 4))
    value = {
        "array": np.arange(6, dtype=">i4").reshape(2, 3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "matrix": matrix,
        "set": {np.int32(3), np.int32(4)},
        "list": [1, 2.5, "text", None, True, (1, 2), 2**40],
    }
    if protocol == 5:
        del value["fortran"], value["array"], value["matrix"]  # NumPy's buffers out of band are another form
    (tmp_path / "p").write_bytes(pickle.dumps(value, protocol=protocol))
    found = read_pickle(tmp_path / "p")
    assert found["list"] == value["list"] and found["set"] == {3, 4}
    for name in set(value) & {"array", "fortran"}:
        np.testing.assert_array_equal(found[name], value[name])
    if "matrix" in value:
        assert (found["matrix"] != matrix).nnz == 0


class _Evil:
    def __reduce__(self):
        return (Path.touch, (Path("touched"),))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_what_would_run_code_is_refused(protocol, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("evil").write_bytes(pickle.dumps([_Evil()], protocol=protocol))
    with pytest.raises(InputError, match="expected"):
        read_pickle("evil")
    assert not Path("touched").exists()
    Path("cut").write_bytes(pickle.dumps(np.arange(9), protocol=2)[:-20])
    Path("none").write_bytes(b"hello")
    for name in ("cut", "none"):
        with pytest.raises(InputError, match=name):
            read_pickle(name)
    objects = np.array([{}, None], dtype=object)
    Path("objects").write_bytes(pickle.dumps(objects, protocol=2))
    with pytest.raises(InputError, match="objects"):
        read_pickle("objects")


def test_hypergcn_and_planetoid_files(tmp_path):
    X = scipy.sparse.csr_matrix(np.eye(5, dtype=np.float32))
    folder = tmp_path / "cora"
    folder.mkdir()
    parts = {"features": X, "hypergraph": {"a": [0, 1], "b": {2, 3}}, "labels": [0, 1, 1, 0, 1]}
    for name, value in parts.items():
        (folder / f"{name}.pickle").write_bytes(pickle.dumps(value, protocol=2))
    made = read_hypergcn(folder, normalize=True)
    assert made.hypergraph.edges() == [[0, 1], [2, 3]] and made.y.tolist() == [0, 1, 1, 0, 1] and made.X.shape == (5, 5)
    onehot = np.eye(2, dtype=np.int32)
    planetoid = {"allx": X[:3], "tx": X[3:], "ally": onehot[[0, 1, 1]], "ty": onehot[[0, 1]]}
    planetoid["graph"] = {0: [1], 1: [0, 2], 2: [1], 5: [3], 3: [5]}
    for name, value in planetoid.items():
        (tmp_path / f"ind.x.{name}").write_bytes(pickle.dumps(value, protocol=2))
    (tmp_path / "ind.x.test.index").write_text("5\n3\n")
    graph = read_planetoid(tmp_path / "ind.x")
    assert graph.y.tolist() == [0, 1, 1, 1, -1, 0], "row i of ty belongs to test_index[i]; 4 is in no file"
    assert graph.X.to_dense()[5].tolist() == X[3].toarray()[0].tolist() and graph.graph is not None
    again = load_dataset(graph.save(tmp_path / "x.npz"))
    assert again.hypergraph.edges() == graph.hypergraph.edges()
    assert torch.equal(again.graph.adjacency.indices, graph.graph.adjacency.indices)


def test_datasets(tmp_path):
    digits = digits_knn(3)
    assert digits.X.shape == (1797, 64) and digits.num_classes == 10 and digits.source["sha256"]
    again = load_dataset(digits.save(tmp_path / "digits.npz"), normalize=True)
    assert again.hypergraph.edges() == digits.hypergraph.edges()
    for arrays, words in [
        ({"x": np.eye(3)}, "'y'"),
        ({"x": np.eye(3), "y": np.arange(3), "hyperedge_index": np.zeros((3, 1), int)}, "shape"),
        ({"x": np.eye(2), "y": np.arange(3), "hyperedge_index": np.zeros((2, 1), int)}, "2 rows of features, 3 labels"),
    ]:
        np.savez(tmp_path / "bad.npz", **arrays)
        with pytest.raises(InputError, match=words):
            load_dataset(tmp_path / "bad.npz")
    with pytest.raises(InputError, match="data set"):
        known_dataset("imagenet")
    with pytest.raises(InputError, match="k from 1"):
        Hypergraph.from_knn(np.eye(3), 3)
    with pytest.raises(InputError, match="equal numbers"):
        make_dataset("a", np.eye(3), np.arange(3), Hypergraph(4, [[0, 3]]))


@pytest.mark.parametrize("name", KNOWN)
def test_known_data(name, monkeypatch, tmp_path):
    try:
        path = local(KNOWN[name])
    except InputError:
        path = None
    if path is None:
        monkeypatch.setenv("ISOTONE_DATA_DIR", str(tmp_path))
        assert known_dataset(name) is None
        pytest.skip(f"{KNOWN[name]} is not in ISOTONE_DATA_DIR")
    made = known_dataset(name)
    sizes = {
        "coauthorship-cora": 2708,
        "cocitation-cora": 2708,
        "cocitation-citeseer": 3312,
        "cora": 2708,
        "citeseer": 3327,
    }
    assert len(made.y) == sizes[name] and (made.graph is not None) == (name in ("cora", "citeseer"))
    sums = made.X.to_scipy().sum(1)
    assert ((abs(sums - 1) < 1e-5) | (sums == 0)).all()


def test_features_from_files(tmp_path):
    np.save(tmp_path / "a.npy", np.eye(3))
    (tmp_path / "a.csv").write_text("1,2\n3,4\n")
    np.savez(tmp_path / "a.npz", x=np.ones((2, 2)))
    assert read_features(tmp_path / "a.npy").shape == (3, 3) and read_features(tmp_path / "a.csv").shape == (2, 2)
    assert read_features(tmp_path / "a.npz").shape == (2, 2)
    digits_like = scipy.sparse.csr_matrix(np.eye(4))
    parts = {f"x_{k}": getattr(digits_like, k) for k in ("data", "indices", "indptr")}
    np.savez(tmp_path / "s.npz", x_shape=digits_like.shape, **parts)
    assert read_features(tmp_path / "s.npz").shape == (4, 4)
    np.savez(tmp_path / "b.npz", y=np.ones(2))
    (tmp_path / "b.csv").write_text("1,x\n")
    (tmp_path / "c.csv").write_text("1,nan\n")
    (tmp_path / "b.npy").write_bytes(b"?")
    for name, words in [("b.npz", "array x"), ("b.csv", "b.csv"), ("c.csv", "NaN"), ("b.npy", "b.npy")]:
        with pytest.raises(InputError, match=words):
            read_features(tmp_path / name)


def _student():
    torch.manual_seed(0)
    student = LightMLP(6, 16, 3, layers=3)
    for _ in range(5):
        student(torch.randn(40, 6) * 2 + 1)  # batch norm with statistics
    student.temperature.fill_(1.7)
    return student.eval()


def test_exports_answer_as_the_student_does(tmp_path):
    student, X = _student(), torch.randn(7, 6)
    expected = student.predict_proba(X)
    save_student(student, tmp_path)
    torch.testing.assert_close(load_student(tmp_path).predict_proba(X), expected)
    program = torch.export.load(export_torch(student, tmp_path / "s.pt2")).module()
    for rows in (1, 7):
        torch.testing.assert_close(program(X[:rows]), expected[:rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("int8", [False, True])
def test_onnx(int8, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    student = _student()
    X = torch.randn(500, 6)
    path = student.export_onnx(tmp_path / "s.onnx", int8=int8)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for rows in (1, 500):
        (found,) = session.run(None, {"X": X[:rows].numpy()})
        tolerance = 0.03 if int8 else 1e-5
        np.testing.assert_allclose(found, student.predict_proba(X[:rows]).numpy(), atol=tolerance)


def test_int8_weights_answer_as_the_int8_file_does(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    student, X = _student(), torch.randn(50, 6)
    path = export_onnx(student, tmp_path / "s.onnx", int8=True)
    (found,) = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"X": X.numpy()})
    np.testing.assert_allclose(found, with_int8_weights(student).predict_proba(X).numpy(), atol=1e-5)


def test_int8_codes_are_within_half_a_step():
    matrix = torch.randn(5, 40)
    codes, scale = quantize_rows(matrix)
    assert codes.dtype == torch.int8 and ((codes * scale[:, None] - matrix).abs() <= scale[:, None] / 2 + 1e-7).all()


def _broken(content):
    """The first half of a file, an empty one, and 50 zeroed bytes anywhere."""
    yield content[: len(content) // 2]
    yield b""
    for start in range(0, len(content), max(1, len(content) // 60)):
        yield content[:start] + bytes(50) + content[start + 50 :]


def test_broken_arrays_are_one_sentence_that_names_the_file(tmp_path):
    source = np.random.default_rng(0)
    hg = Hypergraph(50, [source.choice(50, 5, replace=False).tolist() for _ in range(60)], source.uniform(1, 2, 60))
    X, y = scipy.sparse.random(50, 90, 0.04, "csr", np.float32, source), source.integers(3, size=50)
    paths = {"hg.npz": hg.save, "data.npz": make_dataset("d", X, y, hg).save}
    paths["x.npy"] = lambda path: np.save(path, np.eye(9)) or path
    paths["x.npz"] = lambda path: np.savez_compressed(path, x=source.normal(size=(50, 9))) or path
    readers = {"hg.npz": Hypergraph.load, "data.npz": load_dataset}
    for name, write in paths.items():
        path, read = write(tmp_path / name), readers.get(name, read_features)
        content, refused = path.read_bytes(), 0
        read(path)
        for broken in _broken(content):
            path.write_bytes(broken)
            try:
                read(path)
            except InputError as error:
                assert name in str(error)
                refused += 1
        assert refused >= (30 if name.endswith("npz") else 3), "zeros among the numbers of an npy are numbers"
    np.savez(tmp_path / "hg.npz", num_vertices=5, indptr=[0, 3, 2], indices=[0, 1])
    with pytest.raises(InputError, match="hg.npz.*ascend"):
        Hypergraph.load(tmp_path / "hg.npz")
    with pytest.raises(FileNotFoundError):
        load_dataset(tmp_path / "none.npz")


@pytest.mark.parametrize("text", ["[]", '{"a": 1}', '{"in_channels": "6"}', '{"in_channels": -1}'])
def test_a_config_of_something_else_is_one_sentence(text, tmp_path):
    save_student(_student(), tmp_path)
    (tmp_path / "student.json").write_text(text)
    with pytest.raises(InputError, match="student.json"):
        load_student(tmp_path)
    sizes = {"in_channels": 6, "num_classes": 3}
    save_teacher(make_teacher("hgnn", **sizes), tmp_path, "hgnn", **sizes)
    (tmp_path / "teacher.json").write_text(text.replace("{", '{"name": "hgnn", '))
    with pytest.raises(InputError, match="teacher.json"):
        load_teacher(tmp_path)


def test_broken_files_are_one_sentence(tmp_path):
    with pytest.raises(InputError, match="student.json"):
        load_student(tmp_path)
    path = save_student(_student(), tmp_path)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match="whole student"):
        load_student(tmp_path)
    sizes = {"in_channels": 6, "num_classes": 3, "hidden": 8}
    teacher = make_teacher("unigcn", **sizes)
    save_teacher(teacher, tmp_path, "unigcn", **sizes)
    assert type(load_teacher(tmp_path)) is type(teacher)
    (tmp_path / "teacher.json").write_text(json.dumps({"name": "unigcn", **sizes, "hidden": 9}))
    with pytest.raises(InputError, match="fit the config"):
        load_teacher(tmp_path)
    (tmp_path / "teacher.json").write_text(json.dumps({"name": "other"}))
    with pytest.raises(InputError, match="hgnnp"):
        load_teacher(tmp_path)
