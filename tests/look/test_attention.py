"Attention, Grad-CAM and the pointing game, on models whose maps are known"
import gc
import json
from functools import partial, wraps

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from timm.utils import ModelEmaV3
from torch import nn

from cprfl.data.dataset import ArrayDataset, from_coco, from_voc, resize
from cprfl.data.shapes import shapes_lt
from cprfl.look.attention import (
    attention_maps,
    box_mask,
    centre_map,
    explain_image,
    grad_cam,
    patch_grid,
    pointing_baselines,
    pointing_game,
    pointing_summary,
    score_maps,
    upsample_maps,
)
from cprfl.look.explorers import AttentionExplorer
from cprfl.look.prompts import class_similarity
from cprfl.model.backbones import Backbone, build_backbone, plain_model
from cprfl.model.baselines import ERM, LearnedContext, ZeroShotCLIP
from cprfl.model.cprfl import CPRFL
from cprfl.model.semantics import Clip, load_clip
from cprfl.train.alignment import purification
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import Trainer, predict


def small_cprfl(num_classes=4):
    torch.manual_seed(0)
    backbone = build_backbone('resnet10t', channels=(8, 8, 16, 16))
    return CPRFL(backbone, torch.randn(num_classes, 8), d=16, heads=2, head_dim=8, ffn_dim=16)


def twice(forward):
    "A decorator of `forward`"
    @wraps(forward)
    def doubled(self, x): return 2 * forward(self, x)
    return doubled


# ---- geometry

def centroid(maps):
    "Centre of mass (x, y) in pixels; the middle of the first pixel is at (0.5, 0.5)"
    y, x = (torch.arange(n) + 0.5 for n in maps.shape[-2:])
    mass = maps.sum((-2, -1))
    return torch.stack([(maps.sum(-2) * x).sum(-1) / mass, (maps.sum(-1) * y).sum(-1) / mass], -1)


@pytest.mark.parametrize('grid,size', [((8, 8), (64, 64)), ((4, 6), (48, 96)), ((14, 14), (140, 140))])
def test_a_lit_patch_stays_in_its_place(grid, size):
    (h, w), (H, W) = grid, size
    lit = torch.eye(h * w).reshape(-1, h, w)
    rows, columns = torch.arange(h * w) // w, torch.arange(h * w) % w
    centres = torch.stack([(columns + 0.5) * W / w, (rows + 0.5) * H / h], -1)
    up = upsample_maps(lit, size)
    inner = (rows > 0) & (rows < h - 1) & (columns > 0) & (columns < w - 1)
    assert (centroid(up) - centres)[inner].abs().max() < 1e-3
    # outside of the outermost centres a map is constant, which moves rim patches by about 1/24 of their edge
    assert ((centroid(up) - centres).abs() < torch.tensor([W / w, H / h]) / 20).all()
    if max(H / h, W / w) <= 12: assert (centroid(up) - centres).abs().max() <= 0.5
    assert torch.allclose(up.sum((1, 2)), torch.tensor(H * W / (h * w)), rtol=1e-4)  # every patch counts alike


def test_upsampling_keeps_leading_shape_and_the_peak():
    maps = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    up = upsample_maps(maps, (35, 35))
    assert up.shape == (2, 3, 35, 35)
    assert torch.allclose(up[..., 3::7, 3::7], maps, atol=1e-6)  # odd patches have a middle pixel


@pytest.mark.parametrize('v,size,grid', [
    (49, (224, 224), (7, 7)), (6, (64, 96), (2, 3)), (1, (32, 32), (1, 1)), (512, (256, 128), (32, 16))])
def test_patch_grid(v, size, grid):
    assert patch_grid(v, size) == grid


def test_patches_that_fill_no_grid():
    with pytest.raises(ValueError, match='50 patches'): patch_grid(50, (224, 224))


# ---- attention

def _constructed_cprfl():
    "One head; q of class c is e_c, k of a patch is its own feature: attention is a softmax that one can write down"
    m = CPRFL(nn.AvgPool2d(8), torch.eye(3), d=3, heads=1, head_dim=3, ffn_dim=4, feature_dim=3)
    class Eye(nn.Module):
        def forward(self, x): return x
    with torch.no_grad():
        m.fc.weight.copy_(torch.eye(3))
        m.fc.bias.zero_()
        m.pi = Eye()
        m.vsi.layers[0].norm1 = Eye()
        m.vsi.layers[0].attention.to_qkv.weight.copy_(torch.cat([5 * torch.eye(3), torch.eye(3), torch.eye(3)]))
    return m


def test_known_attention():
    image = torch.zeros(1, 3, 32, 32)
    image[0, 0, 8:16, 16:24] = 4  # red: row 1, column 2
    image[0, 1, 24:32, 0:8] = 4  # green: row 3, column 0
    a = attention_maps(_constructed_cprfl(), image)
    assert a.heads.shape == (1, 1, 3, 4, 4)
    assert [divmod(int(a.mean[0, c].argmax()), 4) for c in (0, 1)] == [(1, 2), (3, 0)]
    keys = torch.cat([F.avg_pool2d(image, 8)[0].flatten(1).T, torch.eye(3)])
    expected = (5 * torch.eye(3) @ keys.T / 3**0.5).softmax(-1)[:, :16]
    assert torch.allclose(a.heads[0, 0].flatten(1), expected, atol=1e-6)
    assert torch.allclose(a.on_patches[0], expected.sum(-1), atol=1e-6)
    assert a.on_patches.max() < 1
    assert torch.allclose(a.mean[0, 2], a.mean[0, 2, 0, 0], atol=1e-6)  # nothing is blue: blue looks everywhere alike


def test_attention_of_cached_patches_equals_that_of_images():
    m = small_cprfl().eval()
    images = torch.randint(0, 256, (2, 3, 96, 96), dtype=torch.uint8)
    a, b = attention_maps(m, images), attention_maps(m, m.backbone.patches(images).detach())
    assert torch.allclose(a.heads, b.heads, atol=1e-5)
    assert torch.allclose(a.logits, m(images), atol=1e-4)


# ---- Grad-CAM

def _images(n=2, size=64):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def test_grad_cam_of_pooling_and_a_linear_layer_in_closed_form():
    torch.manual_seed(0)
    m, images = ERM('resnet18', 6).eval(), _images()
    with grad_cam(m) as cam: maps, logits = cam(images, [5, 2])
    A = m.backbone(images)
    expected = torch.einsum('bk,bkij->bij', m.fc.weight[[5, 2]], A).relu() / 4
    assert torch.allclose(maps, expected, atol=1e-5)
    assert torch.allclose(logits, m(images), atol=1e-4)


def test_grad_cam_agrees_with_the_package_up_to_its_stretching():
    from pytorch_grad_cam import GradCAM
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
    torch.manual_seed(0)
    m, x = ERM(build_backbone('resnet18', output_stride=8), 6).eval(), torch.rand(1, 3, 64, 64)
    with grad_cam(m) as cam: ours = upsample_maps(cam(x, [1])[0], (64, 64))[0].numpy()
    cam = GradCAM(m, m.backbone.cam_layer)
    theirs = cam(x, [ClassifierOutputTarget(1)])[0]
    cam.activations_and_grads.release()
    ours = (ours - ours.min()) / (ours.max() - ours.min())
    assert np.abs(ours - theirs).max() < 0.02


def test_grad_cam_does_not_depend_on_the_rest_of_the_batch():
    m, images = small_cprfl(), _images(3, 96)
    with grad_cam(m) as cam:
        together = cam(images, [0, 1, 2])[0]
        alone = torch.cat([cam(images[i:i + 1], [i])[0] for i in range(3)])
    assert torch.allclose(together, alone, atol=1e-6)
    assert together.shape == (3, 3, 3)


def _tiny_vit_clip():
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=16, image_size=64)
    text = CLIPTextCfg(context_length=8, vocab_size=40, width=16, heads=2, layers=1)
    model = CLIP(16, vision, text)
    return Clip(model.eval(), lambda texts: torch.randint(1, 39, (len(texts), 8)), (0.5,) * 3, (0.5,) * 3, 64)


def test_every_family_has_maps_on_its_grid():
    torch.manual_seed(0)
    models = {(2, 2): ERM('resnet18', 5), (4, 4): ERM(build_backbone('vit_tiny_patch16_224', img_size=64), 5)}
    for grid, m in models.items():
        with grad_cam(m) as cam: maps, _ = cam(_images(), [0, 1])
        assert maps.shape == (2, *grid)
        assert (maps >= 0).all()
        assert maps.max() > 0
    vit = ZeroShotCLIP(_tiny_vit_clip(), list('abc'))
    with grad_cam(vit) as cam: maps, cosines = cam(_images(), [0, 1])
    assert maps.shape == (2, 4, 4)
    assert maps.max() > 0
    assert cosines.abs().max() <= 1


@pytest.mark.parametrize('name, kw, size, grid', [
    ('swin_tiny_patch4_window7_224', dict(depths=(1, 1, 1, 1), embed_dim=24), 64, (2, 2)),
    ('vit_small_patch14_reg4_dinov2', dict(depth=1), 28, (2, 2)),
    ('vit_small_patch14_reg4_dinov2', dict(depth=1), 70, (5, 5)),
    ('deit_tiny_distilled_patch16_224', dict(depth=1), 64, (4, 4)), ('xcit_nano_12_p16_224', dict(depth=1), 64, (4, 4)),
    ('test_mambaout', {}, 96, (3, 3)), ('test_efficientnet', {}, 96, (3, 3)), ('pit_ti_224', {}, 64, (2, 2))])
def test_grad_cam_of_every_layout(name, kw, size, grid):
    torch.manual_seed(0)
    m = ERM(build_backbone(name, image_size=size, **kw), 3)
    with grad_cam(m) as cam: maps, logits = cam(_images(2, size), [0, 1])
    assert maps.shape == (2, *grid)
    assert torch.allclose(logits, m.eval()(_images(2, size)), atol=1e-4)


def test_clip_is_explained_by_its_cosine():
    test = shapes_lt('test')
    m, images = ZeroShotCLIP(load_clip('shapes'), test.classes), _images()
    with grad_cam(m) as cam: maps, cosines = cam(images, [3, 4])
    assert maps.shape == (2, 4, 4)
    assert torch.allclose(cosines * m.tower.logit_scale.exp(), m(images), atol=1e-3)
    coop = LearnedContext(load_clip('shapes'), test.classes)
    with grad_cam(coop) as cam: maps, logits = cam(images, [3, 4])
    assert maps.shape == (2, 4, 4)
    assert torch.allclose(logits, coop(images), atol=1e-3)


def test_cam_needs_a_backbone():
    with pytest.raises(ValueError, match='has no backbone'), grad_cam(ERM(None, 3, feature_dim=8)): pass


def test_cam_needs_a_category_per_image():
    with grad_cam(ERM('resnet18', 3)) as cam:
        with pytest.raises(ValueError, match='2 images and 1 categories'): cam(_images(), [0])


# ---- models as a training leaves them

ANALYSES = {
    'attention': lambda m, data: attention_maps(m, data[0][0][None]).heads.numpy(),
    'Grad-CAM': lambda m, data: explain_image(m, data[0][0], 1)['gradcam'],
    'alignment': lambda m, data: purification(m, data)['auc'].to_numpy(),
    'explorer': lambda m, data: AttentionExplorer(m, data).map().numpy(),
    'similarity': lambda m, data: class_similarity(plain_model(m).prompts(), data.classes).to_numpy(),
    'logits': lambda m, data: predict(m, data).numpy()}


def _fresh(trained):
    fresh = small_cprfl(num_classes=3)
    fresh.load_state_dict(trained.state_dict())
    return fresh.eval()


@pytest.fixture(scope='module', params=['bf16', 'bf16, average', 'fp32, average'])
def trained(request):
    "What a training leaves behind, by precision"
    precision, _, average = request.param.partition(', ')
    config = TrainConfig(epochs=1, batch_size=10, select='last', augment='none', precision=precision, device='cpu',
                         ema=0.9 if average else 0.)
    return Trainer(small_cprfl(num_classes=3), _squares(20), None, config, progress=False).fit().evaluated


@pytest.mark.parametrize('analysis', ANALYSES)
def test_a_trained_model_is_analysed_like_a_fresh_one(trained, analysis):
    run, data = ANALYSES[analysis], _squares(6)
    assert np.allclose(run(trained, data), run(_fresh(trained), data), atol=1e-5, equal_nan=True)


WRAPPERS = {
    'several processes': nn.DataParallel,
    'compiled': partial(torch.compile, backend='eager'),
    'both': lambda m: torch.compile(nn.DataParallel(m), backend='eager'),
    'average': torch.optim.swa_utils.AveragedModel,
    'average of timm': ModelEmaV3,
    'channels last': lambda m: m.to(memory_format=torch.channels_last)}


@pytest.mark.parametrize('analysis', [name for name in ANALYSES if name != 'logits'])
@pytest.mark.parametrize('wrapper', WRAPPERS)
def test_a_wrapped_model_is_analysed_like_the_plain_one(wrapper, analysis):
    run, data, plain = ANALYSES[analysis], _squares(6), small_cprfl(num_classes=3)
    assert np.allclose(run(WRAPPERS[wrapper](_fresh(plain)), data), run(_fresh(plain), data), atol=1e-4, equal_nan=True)


def test_a_decorated_forward_survives_a_training_in_bf16():
    class Doubled(ERM):
        @twice
        def forward(self, x): return super().forward(x)
    config = TrainConfig(epochs=1, batch_size=10, select='last', augment='none', precision='bf16', device='cpu')
    m = Trainer(Doubled('resnet18', 3), _squares(10), None, config, progress=False).fit().evaluated
    images = _images()
    assert torch.allclose(m(images), 2 * m.from_features(m.patches(images)), atol=1e-5)


# ---- what is left behind

def _hooks(m):
    kinds = '_forward_hooks', '_backward_hooks', '_forward_pre_hooks'
    return sum(len(getattr(x, kind)) for x in m.modules() for kind in kinds)


def _live_tensors():
    gc.collect()
    return sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())


def test_hooks_modes_and_gradients_are_as_before():
    m = small_cprfl().train()
    m.backbone.eval()
    m.fc.weight.requires_grad_(False)
    m.fc.bias.grad = torch.ones_like(m.fc.bias)
    with pytest.raises(RuntimeError, match='on purpose'), grad_cam(m) as cam:
        cam(_images(), [0, 1])
        assert _hooks(m) > 0
        assert not m.training
        raise RuntimeError('on purpose')
    assert _hooks(m) == 0
    assert m.training
    assert not m.backbone.training
    assert not m.fc.weight.requires_grad
    assert m.fc.bias.requires_grad
    assert (m.fc.bias.grad == 1).all()
    assert all(p.grad is None for n, p in m.named_parameters() if n != 'fc.bias')


def test_an_index_error_is_not_swallowed():
    with pytest.raises(IndexError), grad_cam(ERM('resnet18', 3)) as cam: cam(_images(), [0, 99])


@pytest.mark.parametrize('inside', [True, False], ids=['one context', 'a context each'])
def test_no_tensor_is_left_after_twenty_calls(inside):
    m, images = small_cprfl(), _images()
    def calls(n):
        if not inside:
            for _ in range(n): explain_image(m, images[0], 1)
            return
        with grad_cam(m) as cam:
            for _ in range(n): cam(images, [0, 1])
    calls(2)
    before = _live_tensors()
    calls(20)
    assert _live_tensors() == before
    assert _hooks(m) == 0


def test_explain_image_names_what_each_model_has():
    out = explain_image(small_cprfl(), _images()[0], 2, size=(50, 40))
    shapes = {name: np.shape(value) for name, value in out.items()}
    assert shapes == dict(logit=(), gradcam=(50, 40), attention=(50, 40), heads=(2, 50, 40))
    assert set(explain_image(ERM('resnet18', 3), _images()[0], 2)) == {'logit', 'gradcam'}


# ---- scores

def test_hits_and_energy_by_hand():
    m = torch.zeros(3, 4, 4)
    m[0, 2, 1] = 1
    m[1] = 3
    scores = score_maps(m, [[(4, 8, 8, 12)]] * 3, (16, 16))
    assert scores['hit'].tolist() == [1, 0, 0]
    assert scores['area'].tolist() == [1 / 16] * 3
    inside = (3 / 4)**2  # of a patch, after interpolation
    assert scores['energy'].tolist() == pytest.approx([inside, 1 / 16, 0])
    assert score_maps(-m[:1], [[(4, 8, 8, 12)]], (16, 16))['hit'].tolist() == [0]  # only what is positive points


def test_the_point_is_the_centre_of_the_strongest_patch():
    m = torch.zeros(1, 2, 2)
    m[0, 0, 1] = 1  # its centre on 16 x 16 pixels: x 12, y 4
    def hit(*box, **kw): return score_maps(m, [[box]], (16, 16), **kw)['hit'].item()
    assert hit(12, 4, 13, 5) == 1
    assert hit(11, 3, 12, 4) == 0  # ends are exclusive
    assert hit(0, 0, 10, 10) == 0
    assert hit(0, 0, 10, 10, tolerance=2.5) == 1
    assert score_maps(m, [[(0, 0, 1, 1), (12, 4, 16, 8)]], (16, 16))['hit'].item() == 1


def test_overlapping_boxes_count_once_and_end_at_the_image():
    assert box_mask([(0, 0, 4, 4), (2, 2, 6, 6)], (8, 8)).sum() == 28
    assert box_mask([(-3, 6, 2, 99)], (8, 8)).sum() == 4


def test_images_of_several_sizes():
    m = torch.zeros(2, 2, 2)
    m[:, 1, 1] = 1
    assert score_maps(m, [[(30, 20, 40, 30)], [(60, 40, 90, 80)]], [(30, 40), (80, 90)])['hit'].tolist() == [1, 1]


def test_the_centre_map_peaks_in_the_centre():
    m = centre_map()
    assert divmod(int(m.argmax()), 31) == (15, 15)
    assert torch.allclose(m, m.flip(0))
    assert torch.allclose(m, m.T)


class Squares(nn.Module):
    "For noise with a bright square per class, in the class's channel: 'attends' to brightness in that channel"
    def __init__(self, wrong=()):
        super().__init__()
        self.vsi, self.one, self.wrong = None, nn.Parameter(torch.ones(1)), list(wrong)
    def forward(self, x, return_attention=False):
        a = F.adaptive_avg_pool2d(x.float(), 8).flatten(2)
        a[:, self.wrong] = -a[:, self.wrong]
        a = (a / 8).softmax(-1)[:, None] * self.one
        return (a.amax((1, 3)), a) if return_attention else a.amax((1, 3))


def _squares(n=30):
    rng = np.random.default_rng(0)
    images, boxes, targets = rng.integers(0, 60, (n, 64, 64, 3), dtype=np.uint8), [], np.zeros((n, 3), int)
    for i in range(n):
        boxes.append([])
        for c in range(3):
            if c == i % 3: continue
            x, y = rng.integers(0, 40, 2)
            images[i, y:y + 24, x:x + 24, c] = 255
            boxes[i].append((c, x, y, x + 24, y + 24))
            targets[i, c] = 1
    groups = dict(head=[0], medium=[1], tail=[2])
    return ArrayDataset(images, targets, ['red', 'green', 'blue'], groups=groups, boxes=boxes)


def test_a_model_that_looks_at_the_object_always_hits():
    good = pointing_game(Squares(), _squares(), batch_size=7)
    assert list(good.columns) == ['image', 'path', 'class', 'group', 'method', 'rank', 'hit', 'energy', 'area']
    assert len(good) == 60
    assert good['hit'].mean() == 1
    assert good['energy'].mean() > 0.7
    assert (good['rank'] <= 2).all()


def test_a_class_that_is_looked_away_from_is_never_hit():
    bad = pointing_summary(dict(bad=pointing_game(Squares(wrong=[2]), _squares()))).loc['bad', 'attention']
    assert bad[['head', 'medium', 'tail']].tolist() == [1, 1, 0]
    assert bad['total'] == pytest.approx(2 / 3)


def test_the_baselines_score_the_area_and_the_centre():
    total = pointing_summary(dict(baseline=pointing_baselines(_squares())))['total']
    assert total['baseline', 'random'] == pytest.approx((24 / 64)**2)
    assert 0 < total['baseline', 'centre'] < 0.6


def test_boxes_need_no_scaling_when_images_are_enlarged():
    small, large = _squares(), _squares()
    large.transform = resize(128)
    a, b = pointing_game(Squares(), small), pointing_game(Squares(), large)
    assert a['hit'].equals(b['hit'])
    assert a['area'].equals(b['area'])
    assert np.allclose(a['energy'], b['energy'], atol=0.02)


def test_grad_cam_plays_the_pointing_game_too():
    data = _squares()
    m = ERM(Backbone(nn.AvgPool2d(8), 3, normalize=False), 3)
    with torch.no_grad(): m.fc.weight.copy_(torch.eye(3))
    t = pointing_game(m, data, 'gradcam', batch_size=16)
    assert t['hit'].mean() == 1
    assert (t['method'] == 'gradcam').all()
    with pytest.raises(ValueError, match='expected one of attention, gradcam'): pointing_game(m, data, 'rollout')


def test_the_same_images_are_drawn_for_every_model():
    data = _squares()
    a, b = pointing_game(Squares(), data, n=5), pointing_game(Squares([1]), data, n=5)
    assert a['image'].equals(b['image'])
    assert a['image'].nunique() == 5
    assert a['image'].equals(pointing_baselines(data, n=5).query("method == 'centre'")['image'])


def test_images_without_boxes_are_refused():
    data = _squares()
    data.boxes = None
    with pytest.raises(ValueError, match='have no boxes'): pointing_game(Squares(), data)


# ---- boxes from files

VOC = """<annotation><filename>{name}</filename><size><width>64</width><height>48</height></size>
<object><name>{label}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>
</annotation>"""
PLACES = dict(red=(8, 8, 24, 24), green=(40, 24, 56, 40), blue=(8, 32, 24, 48)) # x0, y0, x1, y1, ends exclusive


def photograph(label):
    "A dark image of 48 x 64 pixels with a square in its place, in the channel of its class"
    x0, y0, x1, y1 = PLACES[label]
    pixels = np.full((48, 64, 3), 20, np.uint8)
    pixels[y0:y1, x0:x1, list(PLACES).index(label)] = 255
    return Image.fromarray(pixels)


def voc_files(folder, places):
    "The form of PASCAL VOC: corners begin with 1 and belong to the box"
    for name in ('Annotations', 'JPEGImages'): (folder / name).mkdir()
    for label, (x0, y0, x1, y1) in places.items():
        photograph(label).save(folder / 'JPEGImages' / f'{label}.png')
        text = VOC.format(x0 + 1, y0 + 1, x1, y1, name=f'{label}.png', label=label)
        (folder / 'Annotations' / f'{label}.xml').write_text(text)
    return from_voc(folder, classes=list(PLACES), transform=resize(64))


def coco_files(folder, places):
    "The form of COCO: a corner, width and height"
    images, annotations = [], []
    for i, (label, (x0, y0, x1, y1)) in enumerate(places.items()):
        photograph(label).save(folder / f'{label}.png')
        images.append(dict(id=i, file_name=f'{label}.png', width=64, height=48))
        about = dict(id=i, image_id=i, category_id=list(PLACES).index(label))
        annotations.append(about | dict(bbox=[x0, y0, x1 - x0, y1 - y0]))
    categories = [dict(id=c, name=name) for c, name in enumerate(PLACES)]
    file = folder / 'instances.json'
    file.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return from_coco(file, transform=resize(64))


@pytest.mark.parametrize('write', [voc_files, coco_files])
def test_boxes_of_files_are_hit(tmp_path, write):
    found = pointing_game(Squares(), write(tmp_path, PLACES))
    assert found['class'].tolist() == (sorted(PLACES) if write is voc_files else list(PLACES))
    assert found['hit'].tolist() == [1, 1, 1]
    assert found['area'].to_numpy() == pytest.approx(256 / (48 * 64))
    assert found['energy'].min() > 0.5


@pytest.mark.parametrize('write', [voc_files, coco_files])
def test_boxes_elsewhere_are_missed(tmp_path, write):
    found = pointing_game(Squares(), write(tmp_path, PLACES | dict(green=PLACES['blue'])))
    assert dict(zip(found['class'], found['hit'])) == dict(red=1, green=0, blue=1)


@pytest.mark.parametrize('write', [voc_files, coco_files])
def test_boxes_of_files_need_no_scaling_for_squashed_images(tmp_path, write):
    data = write(tmp_path, PLACES)
    data.transform = resize(32)
    assert pointing_game(Squares(), data)['hit'].tolist() == [1, 1, 1]


def test_baselines_know_the_boxes_of_files(tmp_path):
    found = pointing_baselines(coco_files(tmp_path, PLACES)).query('method == "random"')
    assert found['hit'].to_numpy() == pytest.approx(256 / (48 * 64))
