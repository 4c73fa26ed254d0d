"""The commands on files and over loopback, killed and resumed."""

import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import workers
from safetensors.numpy import load_file

from isotone.shared.testing import kill_and_resume, run_cli
from isotone.sketching.cli import app

SMALL = ["--clients", "3", "--rounds", "4", "--local-steps", "2", "--batch", "8", "--concentration", "0"]
MODULE = [sys.executable, "-m", "isotone.sketching"]


def run(folder, *argv):
    result = run_cli(app, [*argv, "--json"], folder)
    assert result.code == 0, result.stderr
    return json.loads(result.stdout)


def test_train_says_what_was_sent_and_spent(tmp_path):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 3))
    np.savez(tmp_path / "mine.npz", x=x, y=(x[:, 0] > 0).astype(int))
    mine = ["train", "--data", "mine.npz", "--ratio", "2", *SMALL]
    found = run(tmp_path, *mine, "--out", "plain", "--eta-g", "0.5", "--kind", "countsketch", "--ordered")
    assert json.loads((tmp_path / "plain" / "history.json").read_text())["config"]["ordered"] is True
    assert found["bytes up, a client's round"] == 16 and found["bytes up"] == 16 * 3 * 4 == found["bytes down"]
    assert 0 <= found["test accuracy (%)"] <= 100
    private = run(tmp_path, *mine, "--out", "private", "--noise", "2", "--sampling", "0.2")
    assert private["releases"] == 8 and "Renyi" in private["epsilon"] and "one example" in private["adjacency"]
    assert {path.name for path in (tmp_path / "private").iterdir()} == {
        *("checkpoints", "params.safetensors", "history.json", "ledger.json", "noise.key")
    }
    refused = run_cli(app, [*mine, "--out", "plain", "--rate", "0.1"], tmp_path)
    assert refused.code == 2 and "holds one of rate 0.5" in refused.stderr


def test_a_killed_training_resumes_bit_for_bit(tmp_path):
    command = [*MODULE, "train", *SMALL, "--rounds", "600", "--checkpoint-every", "20", "--arm", "topk", "--quiet"]

    def ready():
        return any((tmp_path / "killed" / "checkpoints").glob("step-*"))

    done = kill_and_resume([*command, "--out", "killed"], ready=ready, seed=3, cwd=tmp_path, delay=0.1)
    assert done.returncode == 0, done.stderr
    whole = run_cli(app, [*command[3:], "--out", "whole"], tmp_path)
    assert whole.code == 0, whole.stderr
    for name in ("params.safetensors", "history.json", "ledger.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow  # three processes; the same in threads is tested beside the server
def test_processes_on_loopback_and_a_killed_server(tmp_path):
    """A server that is killed in the middle and started again, one client as a process, two beside: the end is the
    simulation's."""
    options = [*SMALL, "--rounds", "300", "--ratio", "8"]
    command = [*MODULE, "server", *options, "--out", "server", "--quiet", "--linger", "10"]

    def start(port):
        return subprocess.Popen([*command, "--port", port], cwd=tmp_path, stderr=subprocess.PIPE, text=True)

    def until(ready):
        deadline = time.monotonic() + 100
        while not ready():
            assert time.monotonic() < deadline and server.poll() is None
            time.sleep(0.01)

    server = start("0")
    address, log = tmp_path / "server" / "address.txt", tmp_path / "server" / "rounds.log"
    until(address.exists)
    port = address.read_text().strip().split(":")[1]
    join = [*MODULE, "client", "--client", "2", "--clients", "3", "--port", port, "--out", "client-2", "--quiet"]
    other = subprocess.Popen(join, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    threads = [workers.client(c, int(port), tmp_path) for c in range(2)]
    until(lambda: log.exists() and log.stat().st_size > 1000)
    server.send_signal(signal.SIGKILL)
    server.communicate()
    assert server.returncode == -signal.SIGKILL
    before = log.stat().st_size
    server = start(port)
    finished = [task.result(120) for task in threads]
    assert other.wait(60) == 0 and server.wait(60) == 0
    assert all(one.reconnected for one in finished) and before < log.stat().st_size
    heard = json.loads((tmp_path / "server" / "ledger.json").read_text())["heard"]
    assert heard == [[0, 1, 2]] * 300
    alone = run(tmp_path, "train", *options, "--out", "alone")
    weights = [
        load_file(tmp_path / name / "params.safetensors") for name in ("client-0", "client-1", "client-2", "alone")
    ]
    for name in "wb":
        assert np.array_equal(weights[0][name], weights[1][name])
        assert np.array_equal(weights[0][name], weights[2][name])
        assert np.abs(weights[0][name] - weights[3][name]).max() < 1e-5
    assert alone["test accuracy (%)"] == pytest.approx(100 * finished[0].accuracy, abs=0.3)
