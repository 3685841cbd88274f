"Batch norms fold into convolutions, and only where nothing changes"
import pytest
import torch
from torch import nn

from cprfl.model.backbones import build_backbone
from cprfl.model.folding import folded

IMAGES = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    "A convolution and a batch norm, put together by a function"
    def __init__(self, how, conv=None, norm=None):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = conv or nn.Conv2d(3, 3, 3, padding=1), norm or nn.BatchNorm2d(3)
        if self.norm.running_mean is not None: self.norm.running_mean += 0.3
        self.how = how
        self.eval()

    def forward(self, x): return self.how(self, x)


def number(net):
    with folded(net, IMAGES) as n: return n


def after(net, x): return net.norm(net.conv(x))


def test_a_batch_norm_after_a_convolution_is_folded():
    assert number(Net(after)) == 1


def test_a_network_that_looks_at_several_sizes_is_folded():
    net = Net(lambda net, x: after(net, x) + after(net, x[..., ::2, ::2]).mean())
    before = net(IMAGES)
    with torch.no_grad(), folded(net, IMAGES) as n:
        assert n == 1
        torch.testing.assert_close(net(IMAGES), before)


LEFT_ALONE = {
    'used besides': lambda net, x: net.norm(y := net.conv(x)) + y,
    'something between': lambda net, x: net.norm(net.conv(x).relu()),
    'before': lambda net, x: net.conv(net.norm(x)),
    'another input of the norm': lambda net, x: net.norm(net.conv(x)) + net.norm(x),
    'another user of the convolution': lambda net, x: net.norm(net.conv(x)) + net.conv(2 * x),
    'none': lambda net, x: x}


@pytest.mark.parametrize('name', LEFT_ALONE)
def test_others_are_left_alone(name):
    net = Net(LEFT_ALONE[name])
    with torch.no_grad(), folded(net, IMAGES) as n:
        assert n == 0
        assert torch.equal(net(IMAGES), LEFT_ALONE[name](net, IMAGES))
        assert isinstance(net.norm, nn.BatchNorm2d)


def test_statistics_of_a_batch_are_not_folded():
    assert number(Net(after, norm=nn.BatchNorm2d(3, track_running_stats=False))) == 0


def test_a_network_in_training_is_left_alone():
    assert number(Net(after).train()) == 0


def test_a_convolution_that_changes_its_weights_is_left_alone():
    class Scaled(nn.Conv2d):
        def forward(self, x): return 2 * super().forward(x)
    assert number(Net(after, conv=Scaled(3, 3, 3))) == 0


@pytest.mark.parametrize('name', ['resnet18', 'torchvision:resnet18', 'efficientnet_lite0', 'shapes'])
def test_networks_compute_the_same(name):
    net = build_backbone(name)
    net = net.eval().requires_grad_(False)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    before = net(images)
    with folded(net, images[:1]) as n:
        assert n >= 3
        assert (net(images) - before).norm() < 1e-4 * before.norm()
    assert torch.equal(net(images), before)


def test_an_error_inside_puts_the_modules_back():
    net = Net(after)
    norm = net.norm
    with pytest.raises(KeyError), folded(net, IMAGES): raise KeyError
    assert net.norm is norm
