"""The life of a process group."""

import weakref

import pytest
import torch

from fastalex import distributed


class Model:
    """What only a weak reference watches."""


@pytest.fixture
def ends(monkeypatch):
    """What `watched` references are alive when the group ends; no group is made."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *args, **kwargs: None)
    watched, alive = [], []
    monkeypatch.setattr(
        torch.distributed, "destroy_process_group", lambda: alive.append([one() is not None for one in watched])
    )
    return watched, alive


def fails(watched):
    model = Model()
    watched.append(weakref.ref(model))
    raise KeyError("in training")


def fails_as_the_command_line(watched):
    try:
        fails(watched)
    except KeyError:
        raise SystemExit(3) from None


@pytest.mark.parametrize(("run", "error"), [(fails, KeyError), (fails_as_the_command_line, SystemExit)])
def test_what_an_error_came_through_is_gone_before_the_group(run, error, ends):
    watched, alive = ends
    with pytest.raises(error), distributed.process_group(torch.device("cpu")):
        run(watched)
    assert alive == [[False]]


def test_a_group_ends_without_an_error_too(ends):
    with distributed.process_group(torch.device("cpu")):
        pass
    assert ends[1] == [[]]
