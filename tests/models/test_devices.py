import pytest
import torch

from diffalign.errors import ConfigError
from diffalign.models.devices import choose_device, send


def test_rows_that_share_their_memory_reach_the_device(monkeypatch):
    def pin_memory(tensor: torch.Tensor) -> torch.Tensor:
        assert tensor.is_contiguous(), "torch writes to every row of what it pins"
        return tensor

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin_memory)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, non_blocking: tensor)
    sent = send(torch.tensor(3).expand(4), torch.device("cuda"))
    assert sent.tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("name", ["cudaa", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_naming_those_that_are(name):
    with pytest.raises(ConfigError, match=rf"device is '{name}', which is not here .*auto, cpu"):
        choose_device(name)
