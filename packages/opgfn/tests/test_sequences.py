"""String objectives against naive counts and Nussinov's recursion; the gymnasium wrapper."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import reference
from gymnasium.utils.env_checker import check_env

from isotone.opgfn.config import TrainConfig
from isotone.opgfn.envs import DNA, BindingTable, FragmentEnv, Grid, MOOGrid, NGrams
from isotone.opgfn.envs.gym import GymEnv
from isotone.opgfn.envs.sequences import count_ngram, max_base_pairs
from isotone.opgfn.gflownet import GFlowNet


def test_ngrams_count_and_scale() -> None:
    env = NGrams(("AC", "AA"), 6)
    u = env.objective(["ACACAC", "AAAAAA", "C", "AAC"])
    assert u.tolist() == [[1, 0], [0, 1], [0, 0], [1 / 3, 1 / 5]]
    assert count_ngram("AAAA", "AA") == 3 and count_ngram("A", "AA") == 0
    for ngram in ("ABA", "AAB", "ABAB"):
        scaled = NGrams((ngram,), 7, "AB")
        everything = ["".join(letters) for letters in itertools.product("AB", repeat=7)]
        assert scaled.objective(everything).max() == 1.0
    for bad in ((), ("",), ("XX",), ("AAAAAAA",)):
        with pytest.raises(ValueError, match="n-gram"):
            NGrams(bad, 6)


@pytest.mark.parametrize("loop", [0, 3])
def test_base_pairs_are_nussinovs(loop: int) -> None:
    source = random.Random(0)
    for _ in range(40):
        text = "".join(source.choice("ACGT") for _ in range(source.randrange(15)))
        assert max_base_pairs(text, loop) == reference.max_base_pairs(text, loop)
    assert max_base_pairs("GGGAAACCC", 3) == 3 and max_base_pairs("GC", 0) == 1 and max_base_pairs("GC", 3) == 0


def test_dna_objectives() -> None:
    env = DNA(("gc", "pairs", "melting", "length"), 10)
    u = env.objective(["GGGAAACCC", "AAAAAAAAAA", "GGGGGGGGGG", "GCAT"])
    assert u[:, 0].tolist() == pytest.approx([(3 / 9) / 0.4, 0.0, 0.0, 1.0])
    assert u[:, 1].tolist() == [0.6, 0.0, 0.0, 0.0]
    assert u[:, 2].tolist() == pytest.approx([(6 + 24) / 40, 0.5, 1.0, 12 / 40])
    assert u[:, 3].tolist() == pytest.approx([0.1, 0.0, 0.0, 0.6])
    for options in ({"objectives": ("energy",)}, {"objectives": ()}, {"loop": -1}):
        with pytest.raises(ValueError, match="expected"):
            DNA(**options)
    gfn = GFlowNet(DNA(length=8), config=TrainConfig(batch_size=8)).fit(steps=2)
    assert gfn.graph is None and len(gfn.buffer.archive) > 0


def test_binding_table() -> None:
    env = BindingTable()
    assert len(env.table) == 4**8 and env.table.min() == 0 and env.table.max() == 1
    assert 3 < len(env.modes) < 100
    for mode in env.modes:
        value = env.objective([mode])[0, 0]
        near = [mode[:i] + c + mode[i + 1 :] for i in range(8) for c in "ACGT" if c != mode[i]]
        assert value >= env.objective(near).max() and (env.table > value).sum() < 0.005 * 4**8
    assert (BindingTable(seed=0).table == env.table).all() and (BindingTable(seed=1).table != env.table).any()


def test_gymnasium_accepts_the_wrapper() -> None:
    wrapped = GymEnv(MOOGrid(("branin", "currin"), side=6))
    observation, info = wrapped.reset(seed=0)
    assert wrapped.observation_space.contains(observation) and info["action_mask"].tolist() == [1, 1, 1]
    observation, reward, done, truncated, info = wrapped.step(0)
    assert observation.tolist() == [1, 0] and not done and not truncated and reward == 0.0
    observation, reward, done, _, info = wrapped.step(2)
    assert done and reward == pytest.approx(info["objectives"].mean()) and len(info["objectives"]) == 2
    rows = np.array([[3, 5]])
    wrapped.reset()
    wrapped._state = wrapped._state.new_tensor(rows)
    with pytest.raises(ValueError, match="got 1 in state"):
        wrapped.step(1)
    with pytest.raises(ValueError, match="below 3, got 7"):
        wrapped.step(7)
    with pytest.raises(ValueError, match="none of its own"):
        GymEnv(Grid(2, 4))
    check_env(GymEnv(Grid(1, 50), lambda states: states[:, 0].double()), skip_render_check=True)
    molecules = GymEnv(FragmentEnv(max_fragments=2), lambda smiles: [float(len(text)) for text in smiles])
    molecules.reset()
    molecules.step(3)
    assert molecules.step(molecules.env.stop)[1] == len("C1=CCCCC1")


def test_a_stopped_episode_takes_no_further_step() -> None:
    wrapped = GymEnv(MOOGrid(("branin", "currin"), side=6))
    wrapped.reset()
    wrapped.step(wrapped.env.stop)
    with pytest.raises(ValueError, match="reset"):
        wrapped.step(0)
