"Two processes that share a batch compute what one does"
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "The same training on one process and on two (gloo)"
    out = {}
    for n in (1, 2):
        folder = tmp_path_factory.mktemp(f"processes{n}")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", n, HERE / "processes.py", folder]
        done = subprocess.run([str(a) for a in launch], capture_output=True, text=True, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        out[n] = json.loads((folder / "said.json").read_text()) | dict(folder=folder)
    return out


def test_each_of_fifty_steps_has_the_same_loss(trained):
    one, two = trained[1], trained[2]
    assert (one["processes"], two["processes"]) == (1, 2) and len(one["losses"]) == len(two["losses"]) == 50
    assert torch.allclose(torch.tensor(one["losses"]), torch.tensor(two["losses"]), rtol=0, atol=1e-5)


def test_metrics_are_gathered_exactly(trained):
    "37 images do not divide by two; none is counted twice, and their order is kept"
    one, two = trained[1], trained[2]
    assert torch.tensor(two["logits"]).shape == (37, 20)
    assert torch.allclose(torch.tensor(one["logits"]), torch.tensor(two["logits"]), atol=1e-4)
    for a, b in zip(one["history"], two["history"]): assert a["total"] == pytest.approx(b["total"], abs=1e-3) and a["loss"] == pytest.approx(b["loss"], abs=1e-5)


def test_one_process_writes_the_folder(trained):
    names = [sorted(f.relative_to(trained[n]["folder"]).as_posix() for f in trained[n]["folder"].rglob("*") if f.is_file()) for n in (1, 2)]
    assert names[0] == names[1] and "run/state/epoch_0005.pt" in names[0]
    a, b = (load_file(trained[n]["folder"] / "run" / "last.safetensors") for n in (1, 2))
    assert a.keys() == b.keys() and all(torch.allclose(a[k].float(), b[k].float(), atol=1e-4) for k in a)
