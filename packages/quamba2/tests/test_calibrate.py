"""Observers against their definitions, the scales' places, and a calibration that is killed and goes on."""

import numpy as np
import pytest
import torch
from models import calibration, ids, make

from isotone.quamba2.architecture import Architecture
from isotone.quamba2.calibrate import calibrate, channel_statistics, groupings, groups_of, samples_of
from isotone.quamba2.clustering import sort_and_cluster
from isotone.quamba2.config import QuambaConfig
from isotone.quamba2.fake import round_trip
from isotone.quamba2.forward import HEAD, Cache, Probe, forward
from isotone.quamba2.observers import Grouping, Observer, quantile
from isotone.shared.errors import InputError


class Recorder(Probe):
    def __init__(self):
        self.seen = {}

    def site(self, layer, name, values):
        self.seen.setdefault((layer, name), []).append(values)
        return values


def seen(model, samples):
    recorder = Recorder()
    for sample in samples:
        forward(model, sample, recorder, Cache(3))
    return recorder.seen


@pytest.mark.parametrize("part", [0.5, 0.9, 0.9995, 1.0])
def test_quantile_is_numpy_s(part):
    values = torch.randn(1001).abs()
    assert float(quantile(values, part)) == pytest.approx(np.quantile(values.numpy(), part), rel=1e-5)


def test_the_running_percentile():
    observer, values = Observer(Grouping.tensor(8, quantile=0.9)), torch.randn(5, 7, 8).abs()
    observer.update(values[:2, ..., None])
    observer.update(values[2:, ..., None])
    running = None
    for sample in values:
        now = np.quantile(sample.numpy(), 0.9)
        running = now if running is None else running + 0.01 * (now - running)
    assert float(observer.value) == pytest.approx(running, rel=1e-5)
    assert float(observer.scales()) == pytest.approx(running / 127, rel=1e-5)


def test_scales_of_every_site():
    model, samples = make(), samples_of(calibration(), 4, 17, 61)
    arch, config = Architecture.of(model.config), QuambaConfig(dt_scales="head", group_size=32)
    plans = [sort_and_cluster(stats, arch.head_dim, arch.groups) for stats in channel_statistics(model, samples)]
    found, values = calibrate(model, samples, config, plans), seen(model, samples)
    assert set(found) == set(values)
    for (layer, name), scale in found.items():
        parts = values[layer, name]
        flat = torch.cat([part.flatten(1, 2).transpose(1, 2) if name == "state" else part for part in parts], 1)
        if name == "state":
            wanted = torch.stack([part.abs().flatten(1, 2)[0] for part in parts]).amax(0)
            labels = plans[layer].labels
            wanted = torch.stack([wanted[labels == label].amax(0) for label in range(plans[layer].count)])
        elif name == "conv_x":
            labels = plans[layer].labels
            wanted = torch.stack([flat[..., labels == label].abs().amax() for label in range(plans[layer].count)])[
                :, None
            ]
        elif name in ("conv_B", "conv_C", "dt"):
            count = arch.heads if name == "dt" else arch.groups
            wanted = flat.abs().amax((0, 1)).reshape(count, -1).amax(1)[:, None]
        else:
            wanted = flat.abs().amax().reshape(1, 1)
        torch.testing.assert_close(scale, (wanted.clamp_min(1e-5) / 127).clamp_min(1e-6), msg=f"{layer} {name}")
    kept = groupings(arch, QuambaConfig(per_state_group=False), groups_of(plans[0]))
    assert kept["conv_B"].count == 1 and kept["dt"].count == 1 and kept["state"].states == arch.state
    assert found[HEAD, "lm_head"].shape == (1, 1)


@pytest.mark.parametrize("stat", ["absmax", "meanabs"])
def test_channel_statistics(stat):
    model, samples = make(), samples_of(calibration(), 4, 17, 61)
    found, parts = channel_statistics(model, samples, stat), seen(model, samples)[1, "conv_x"]
    sizes = [part[0].abs().amax(0) if stat == "absmax" else part[0].abs().mean(0) for part in parts]
    torch.testing.assert_close(found[1], torch.stack(sizes).amax(0), rtol=1e-4, atol=1e-5)


def test_round_trips():
    """Invariant 4."""
    values, scale = torch.linspace(-12.7, 12.7, 2001), torch.tensor(0.1)
    once = round_trip(values, scale)
    assert ((once - values).abs() <= scale / 2 + 1e-6).all() and round_trip(torch.zeros(1), scale) == 0
    assert torch.equal(round_trip(once, scale), once)
    assert torch.equal(round_trip(-values, scale), -once)
    assert (
        round_trip(torch.tensor(-99.0), scale) == -128 * scale and round_trip(torch.tensor(99.0), scale) == 127 * scale
    )


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind, changes", [("mamba2", {}), ("mamba", {"x_percentile": 0.99})])
def test_a_killed_calibration_goes_on(tmp_path, kind, changes):
    model, config = make(kind), QuambaConfig(**changes)
    # of different lengths, so that each is a batch
    samples = [sample[:, : 9 + number] for number, sample in enumerate(samples_of(calibration(6), 6, 17, 61))]
    whole = calibrate(model, samples, config)

    def kill(_):
        kill.left -= 1
        if not kill.left:
            raise Killed

    for left in (3, 2):
        kill.left = left
        with pytest.raises(Killed):
            calibrate(model, samples, config, folder=tmp_path, every=1, advance=kill)
    done = []
    found = calibrate(model, samples, config, folder=tmp_path, every=1, advance=done.append)
    assert len(done) == 3, "three samples were done before"
    assert found.keys() == whole.keys() and all(torch.equal(found[site], whole[site]) for site in whole)
    with pytest.raises(InputError, match="checkpoints of this calibration"):
        calibrate(model, samples[1:], config, folder=tmp_path)


def test_batches_change_nothing():
    model, samples = make(), samples_of(calibration(), 4, 17, 61)
    together = calibrate(model, samples, QuambaConfig())
    apart = [calibrate(model, [sample], QuambaConfig()) for sample in samples]
    for site, scale in together.items():
        largest = torch.stack([one[site] for one in apart]).amax(0)
        torch.testing.assert_close(scale, largest, rtol=1e-4, atol=1e-7)


def test_refusals():
    with pytest.raises(InputError, match="at least one calibration sample"):
        samples_of([], 4, 4, 61)
    with pytest.raises(InputError, match="at least one calibration sample"):
        calibrate(make(), [], QuambaConfig())
    with pytest.raises(InputError, match="from 0 to 60 in calibration, got 61"):
        samples_of([[1, 61]], 4, 4, 61)
    with pytest.raises(InputError, match="float32"):
        samples_of([torch.ones(3)], 4, 4, 61)
    with pytest.raises(InputError, match="at least one calibration sample"):
        samples_of([[], torch.zeros(0, 3, dtype=torch.long)], 4, 4, 61)
    with pytest.raises(InputError, match="NaN"):
        Observer(Grouping.tensor(3)).update(torch.full((1, 1, 3, 1), float("nan")))
    with pytest.raises(InputError, match="got none"):
        Observer(Grouping.tensor(3)).scales()
    model = make()
    with torch.no_grad():
        model.backbone.layers[0].mixer.conv1d.weight[0] = float("inf")
    with pytest.raises(InputError, match="finite"):
        channel_statistics(model, [ids(1)])


@pytest.mark.parametrize(
    "options, words",
    [
        ({"w_bits": 2}, "W8A8, W4A8, W4A16"),
        ({"w_bits": 8, "a_bits": 16}, "W8A8, W4A8, W4A16"),
        ({"a_bits": "all"}, "W8A8, W4A8, W4A16"),
        ({"embedding_bits": 5}, "embedding_bits"),
        ({"state_bits": 4}, "state_bits"),
        ({"hadamard": "some"}, "none, out, all"),
        ({"stat": "median"}, "absmax, meanabs"),
        ({"clustering": "ward"}, "kmeans, dp"),
        ({"dt_scales": "token"}, "tensor, head"),
        ({"head_groups": 0}, "head_groups"),
        ({"group_size": 0}, "group_size"),
        ({"gptq_dampening": 0.0}, "gptq_dampening"),
        ({"x_percentile": 1.5}, "x_percentile"),
        ({"a16_blocks": (1,)}, "a_bits 'mixed'"),
        ({"a_bits": "mixed", "a16_blocks": (1, 1)}, "without repetition"),
        ({"a_bits": "mixed", "a16_blocks": (-1,)}, "a16_blocks"),
    ],
)
def test_options_are_checked(options, words):
    with pytest.raises(InputError, match=words):
        QuambaConfig(**options)


def test_options_as_json():
    config = QuambaConfig(a_bits="mixed", a16_blocks=(2, 0), hadamard=False, embedding_bits=8)
    assert QuambaConfig.from_dict(config.to_dict()) == config and config.a16_blocks == (0, 2)
    assert config.hadamard == "none" and config.lm_head_bits == 4 and config.state_bits == 8
    assert config.block_bits(3) == (16, 8, 16)
    with pytest.raises(InputError, match="below 2"):
        config.block_bits(2)
    with pytest.raises(InputError, match="colour"):
        QuambaConfig.from_dict({"colour": 1})
