import os
import random

import numpy as np
import pytest
import torch
from helpers import ROOT, SHARED


@pytest.hookimpl(optionalhook=True) # pytest runs without xdist, too
def pytest_xdist_auto_num_workers(config):
    "One more than there are cores, because tests of browsers and of other processes wait"
    return (os.cpu_count() or 1) + 1


@pytest.hookimpl(tryfirst=True) # before the fixtures of the test, those of its module among them
def pytest_runtest_setup(item):
    "Random numbers of a test are the same in each run"
    for seed in (random.seed, np.random.seed, torch.manual_seed): seed(0)


@pytest.fixture(scope='session')
def root():
    "The project's folder"
    return ROOT


@pytest.fixture(scope='session')
def shared():
    "Folder with real data, where there is one"
    if not SHARED.is_dir():
        pytest.skip(f'no real data at {SHARED.name}/ (set CPRFL_SHARED to its folder)')
    return SHARED
