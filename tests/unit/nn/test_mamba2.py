"""What of Mamba-2 depends on the text, how it starts, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from octavo.nn import mamba2 as module
from octavo.nn.contracts import Dims, Inputs
from octavo.nn.mamba2 import Mamba2
from octavo.nn.projection import InitConfig, initialise
from octavo.nn.state import place


def mamba2(**settings):
    layer = Mamba2(Mamba2.Config(**settings), Dims(16, 1, 64))
    initialise(layer, InitConfig(std=0.5), 1, torch.Generator().manual_seed(0))
    return layer


def scanned(layer, x, monkeypatch):
    """What one pass hands to the recurrence: C, B, and the logarithm of the decay."""
    seen, scan = [], module.scan

    def spy(q, k, v, log_decay, *rest, **named):
        seen.append((q, k, log_decay))
        return scan(q, k, v, log_decay, *rest, **named)

    monkeypatch.setattr(module, "scan", spy)
    layer(x, place(Inputs(torch.zeros(x.shape[:2], dtype=torch.long)))[0])
    monkeypatch.undo()
    return seen[0]


def test_trap_e21_only_delta_b_and_c_depend_on_the_input(monkeypatch):
    """The note has A, B and C as functions of the input. A is a parameter: the decay's logarithm is Delta A."""
    layer = mamba2()
    texts = torch.randn(2, 1, 9, 16, generator=torch.Generator().manual_seed(1))
    found = [scanned(layer, x, monkeypatch) for x in texts]
    for one, other in zip(*found, strict=True):
        assert (one != other).any(-1).all(), "C, B and Delta change with the text at every token"
    for x, (_, _, log_decay) in zip(texts, found, strict=True):
        delta = F.softplus(layer.up(x)[..., -layer.n_heads :] + layer.dt_bias)
        torch.testing.assert_close(log_decay / delta, -layer.log_a.exp().expand_as(delta))


def test_the_start_is_that_of_the_paper():
    layer = mamba2(n_heads=32, head_dim=2)
    dt, a, taps = F.softplus(layer.dt_bias).detach(), layer.log_a.detach().exp(), layer.conv_weight.detach()
    assert float(dt.min()) == pytest.approx(0.001, rel=1e-3) and float(dt.max()) == pytest.approx(0.1, rel=1e-3)
    assert 1 <= float(a.min()) < 2 and 15 < float(a.max()) <= 16
    assert abs(float(torch.corrcoef(torch.stack([dt.log(), a]))[0, 1])) < 0.2, "slow steps have every A"
    assert float(taps.abs().max()) <= 0.5 and float(taps.std()) == pytest.approx(12**-0.5, rel=0.1)
    other = Mamba2(layer.config, Dims(16, 2, 64, depth=1))
    other.reset()
    assert not torch.equal(layer.conv_weight, other.conv_weight), "layers start with kernels of their own"


def test_steps_stay_within_their_limits(monkeypatch):
    layer = mamba2(dt_limit=(0.3, 0.5))
    *_, log_decay = scanned(layer, 5 * torch.randn(1, 9, 16, generator=torch.Generator().manual_seed(1)), monkeypatch)
    delta = -log_decay.detach() / layer.log_a.detach().exp()
    assert float(delta.min()) >= 0.3 - 1e-6 and float(delta.max()) <= 0.5 + 1e-6 and float(delta.std()) > 0.01


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"n_heads": 4, "n_groups": 3}, "n_groups = 3 must divide n_heads = 4"),
        ({"dt_limit": (0.5, 0.1)}, "the lower one first"),
        ({"a_init": (0.0, 2.0)}, "a_init"),
    ],
)
def test_impossible_settings_are_refused(settings, said):
    with pytest.raises(ValidationError, match=said):
        Mamba2.Config(**settings)


def test_widths_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="n_heads = 5 must divide"):
        mamba2(n_heads=5)
    with pytest.raises(ValueError, match="norm_groups = 3 must divide"):
        mamba2(n_heads=4, norm_groups=3)
