import pytest
import torch

from diffalign.data.responses.corruptions.diffuse import Diffuse, kept_signal
from diffalign.seeding import cpu_generator


@pytest.mark.parametrize(
    ("step", "signal"),
    [
        (0, 0.999989),
        (100, 0.998293),
        (300, 0.980984),
        (500, 0.863017),
        (700, 0.592677),
        (999, 0.285043),
    ],
)
def test_share_of_the_signal_at_a_step(step, signal):
    assert float(kept_signal()[step].sqrt()) == pytest.approx(signal, abs=1e-6)


def test_noise_at_the_usual_step():
    assert float((1 - kept_signal()[500]).sqrt()) == pytest.approx(0.505175, abs=1e-6)


def test_signal_and_noise_add_up_with_their_shares():
    tiles = torch.full((2, 3, 64, 64), 2.0)
    noisy = Diffuse(step=500).pixels(tiles, cpu_generator(0))
    assert noisy.mean() == pytest.approx(2 * 0.863017, abs=0.01)
    assert noisy.std() == pytest.approx(0.505175, abs=0.01)
    assert noisy.dtype == torch.float32
    assert (tiles == 2).all()  # not changed in place


@pytest.mark.parametrize("step", [-1, 1000])
def test_a_step_outside_the_schedule_is_refused(step):
    with pytest.raises(ValueError, match="between 0 and 999"):
        Diffuse(step=step)
