"Threads of a training beside other programs"
import psutil
import pytest
import torch

from cprfl.train.cores import FreeCores


@pytest.fixture
def taken(monkeypatch):
    "Threads that were asked for, on eight cores of which all are busy"
    asked = []
    monkeypatch.setattr(torch, 'get_num_threads', lambda: 8)
    monkeypatch.setattr(torch, 'set_num_threads', asked.append)
    monkeypatch.setattr(psutil, 'cpu_count', lambda: 8)
    monkeypatch.setattr(psutil, 'cpu_percent', lambda: 100.)
    return asked


@pytest.mark.parametrize('own, threads', [(0., 1), (3., 3), (8., 8)])
def test_what_the_training_uses_itself_is_free(taken, monkeypatch, own, threads):
    used = iter([0., own, own])
    monkeypatch.setattr(FreeCores, '_own', lambda self: next(used))
    monkeypatch.setattr('time.perf_counter', iter(range(9)).__next__)
    FreeCores().look()
    assert taken == [threads]


def test_a_training_looks_again_after_some_seconds(taken):
    FreeCores(seconds=0.).before_batch(None)
    FreeCores(seconds=1000.).before_batch(None)
    assert len(taken) == 1
