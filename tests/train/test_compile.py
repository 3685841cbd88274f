"Compiled steps learn the same, and a missing compiler is no end"
import numpy as np
import pytest
import torch
from torch import nn
from torch._inductor import config as inductor
from toys import CutOff, Dropping, Head, Toy, build, same, toy

from cprfl.train.trainer import predict


@pytest.fixture
def fresh_compiler(tmp_path, monkeypatch):
    "No compiled code of an earlier test, a folder for what is compiled, and no pool of processes, which starts slowly"
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path / 'compiled'))
    torch.compiler.reset()
    with inductor.patch(compile_threads=1): yield
    torch.compiler.reset()


@pytest.fixture
def compiler(fresh_compiler):
    "A compiler that works on this machine"
    try: torch.compile(lambda x: x.sin() + 1)(torch.zeros(3))
    except Exception as e: pytest.skip(f'PyTorch cannot compile here: {type(e).__name__}')


class Normed(Head):
    "With batch statistics"
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(16)

    def forward(self, x): return self.fc(self.norm(x.mean(1)))


# ---- where there is a compiler

def test_a_compiled_step_resumes_bit_for_bit(compiler, tmp_path):
    whole = toy(model=Dropping(), compile='default')
    run = tmp_path / 'run'
    with pytest.raises(KeyboardInterrupt): toy(run, [CutOff(1)], model=Dropping(), compile='default')
    assert same(whole, toy(run, model=Dropping(), resume=True, compile='default'))


def test_a_compiled_step_learns_the_same(compiler):
    compiled, plain = toy(compile='default'), toy()
    assert np.allclose([r['loss'] for r in compiled.history], [r['loss'] for r in plain.history], rtol=1e-4)


def test_what_is_kept_is_the_model_and_not_its_compiled_form(compiler):
    trainer, seen = toy(compile='default'), []
    assert trainer.run is not trainer.model
    assert list(trainer.trained_state()) == ['fc.weight', 'fc.bias']
    trainer.evaluated.fc.register_forward_hook(lambda *a: seen.append(1))
    predict(trainer.evaluated, Toy())
    assert seen


# ---- where there is none

def test_without_a_compiler_training_goes_on(fresh_compiler):
    plain = toy(model=Dropping())
    no_compiler = inductor.patch({'cpp.cxx': (None, '/no/such/compiler')})
    with no_compiler, pytest.warns(UserWarning, match='could not compile.*trains as it is') as said:
        fallen = toy(model=Dropping(), compile='default')
    assert same(plain, fallen)
    assert len([w for w in said if 'trains as it is' in str(w.message)]) == 1


class Backward(torch.autograd.Function):
    "A backward pass that cannot be compiled; this comes to light long after the forward pass"
    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, g):
        raise torch._dynamo.exc.BackendCompilerFailed(torch.compile, RuntimeError('no C++ compiler'), None)


@pytest.mark.parametrize('kind', [Dropping, Normed], ids=['dropout', 'batch_statistics'])
def test_a_failed_compilation_of_the_backward_pass_is_no_end(monkeypatch, kind):
    "The batch is repeated: it draws the same dropout, and counts once in the statistics"
    plain = toy(model=kind())
    monkeypatch.setattr(torch, 'compile', lambda model, **kw: lambda x: Backward.apply(model(x)))
    with pytest.warns(UserWarning, match='trains as it is'): fallen = toy(model=kind(), compile='default')
    assert same(plain, fallen)


def test_a_python_that_torch_cannot_compile_is_no_end(monkeypatch):
    def refuse(model, **kw): raise RuntimeError('torch.compile is not supported on Python 3.99+')
    monkeypatch.setattr(torch, 'compile', refuse)
    with pytest.warns(UserWarning, match='3.99.*'): trainer = toy(compile='default')
    assert len(trainer.history) == 3


def test_an_error_of_the_model_is_no_matter_of_compiling():
    class Wrong(Head):
        def forward(self, x): raise ValueError('two by three')
    with pytest.raises(ValueError, match='two by three'): build(Wrong(), compile='default').fit()
