"The baselines: linear head, label graph, zero-shot CLIP, learned context"
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cprfl.data.shapes import shapes_lt
from cprfl.model.baselines import (
    ERM,
    MLGCN,
    FrozenCLIP,
    LearnedContext,
    ZeroShotCLIP,
    label_correlation,
    normalize_adjacency,
    readable_scores,
)
from cprfl.model.semantics import Clip, load_clip
from cprfl.train.cache import cache_features
from cprfl.train.config import TrainConfig
from cprfl.train.trainer import Trainer

NAMES = ['red circle', 'blue star', 'green_square']
TEMPLATE = 'a photo of a {}.'


@pytest.fixture(scope='module')
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8, generator=generator)


def real_tokens():
    "A small, untrained CLIP with open_clip's own tokenizer, whose words are of several tokens"
    import open_clip
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg
    torch.manual_seed(0)
    vision = CLIPVisionCfg(layers=1, width=32, head_width=16, patch_size=32, image_size=64)
    model = CLIP(32, vision, CLIPTextCfg(width=32, heads=2, layers=1))
    return Clip(model.eval(), open_clip.get_tokenizer('ViT-B-32'), (0.5,) * 3, (0.5,) * 3, 64)


def gcn(targets='some', C=4, D=24, **kw):
    torch.manual_seed(0)
    targets = (torch.rand(50, C) < 0.4).numpy().astype(np.uint8) if isinstance(targets, str) else targets
    return MLGCN(None, torch.randn(C, 16), targets, hidden=12, feature_dim=D, **kw)


def two_steps(model, x, y, lr):
    "The loss before and after two steps, on the same batch"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr)
    seen = []
    for step in range(3):
        loss = F.binary_cross_entropy_with_logits(model(x), y)
        seen.append(loss.item())
        if step < 2:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return seen


# ---- what all of them have in common

@pytest.mark.parametrize('make', [
    lambda: ERM('resnet10t', 4), lambda: MLGCN('resnet10t', torch.randn(4, 16), torch.eye(4))])
def test_images_and_their_patches_give_the_same_logits(images, make):
    model = make().eval()
    logits = model(images)
    assert logits.shape == (6, 4)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(model(model.backbone.patches(images)), logits)
    assert torch.equal(model.from_features(model.backbone.patches(images)), model(model.backbone.patches(images)))


@pytest.mark.parametrize('make', [lambda b: ERM(b, 4), lambda b: MLGCN(b, torch.zeros(4, 16), torch.eye(4))])
def test_a_backbone_without_a_width_needs_one(make):
    with pytest.raises(ValueError, match='feature_dim: the backbone has no `num_features`'): make(nn.Conv2d(3, 8, 3))


def test_scores_to_show_are_sigmoids():
    scores, kind = readable_scores(ERM(None, 3, feature_dim=8), torch.tensor([0., 2.]))
    torch.testing.assert_close(scores, torch.tensor([0.5, 0.8808]), atol=1e-4, rtol=0)
    assert kind == 'sigmoid'


def test_zero_shot_shows_cosines_that_differ(images):
    "Also at the temperature of a web-scale CLIP, at which all sigmoids are 1"
    clip = real_tokens()
    with torch.no_grad(): clip.model.logit_scale.fill_(np.log(100))
    model = ZeroShotCLIP(clip, NAMES)
    cosines, kind = readable_scores(model, model(images))
    want = F.normalize(clip.encode_image(images), dim=-1) @ model.text.T
    torch.testing.assert_close(cosines, want)
    assert kind == 'cosine similarity'


# ---- ML-GCN

def test_label_correlation_by_hand():
    "i seen 5 times, j with it twice: 0.4 is kept, one third is not"
    y = np.zeros((20, 5), np.uint8)
    # P(1|0) = 2/5, P(0|1) = 2/6, P(3|0) = 2/5, P(0|3) = P(1|3) = 1; class 4 is absent
    for c, rows in enumerate([slice(5), slice(3, 9), slice(8, 18), slice(3, 5)]): y[rows, c] = 1
    want = 0.8 * torch.eye(5)
    want[0, [1, 3]] = want[3, [0, 1]] = 0.1
    torch.testing.assert_close(label_correlation(y), want)
    torch.testing.assert_close(label_correlation(torch.from_numpy(y)), want)
    looser = label_correlation(y, threshold=0.3, p=0.5)
    torch.testing.assert_close(looser[1], torch.tensor([0.25, 0.5, 0., 0.25, 0.]))
    stricter = label_correlation(y, threshold=0.41)
    assert stricter[0].tolist() == pytest.approx([0.8, 0, 0, 0, 0])
    assert torch.equal(stricter[3], label_correlation(y)[3])


def test_normalized_adjacency_by_hand():
    got = normalize_adjacency(torch.tensor([[3., 1.], [0., 1.]]))
    torch.testing.assert_close(got, torch.tensor([[0.75, 0.5], [0., 1.]]))
    torch.testing.assert_close(normalize_adjacency(0.8 * torch.eye(3)), torch.eye(3))


def test_classifiers_are_two_graph_convolutions():
    m = gcn()
    A, W = m.adjacency.double().numpy(), m.semantics.double().numpy()
    T1, T2 = (g.weight.detach().double().numpy().T for g in (m.gc1, m.gc2))
    H = A @ W @ T1
    H = np.where(H > 0, H, 0.2 * H)
    np.testing.assert_allclose(m.classifiers().detach().numpy(), A @ H @ T2, rtol=1e-4, atol=1e-6)
    f = torch.randn(3, 9, 24)
    logits = m.from_features(f).detach().numpy()
    np.testing.assert_allclose(logits, f.numpy().max(1) @ (A @ H @ T2).T, rtol=1e-4, atol=1e-5)


def test_mlgcn_learns_its_convolutions_alone():
    m = gcn()
    m(torch.rand(2, 9, 24)).square().sum().backward()
    assert sorted(n for n, p in m.named_parameters() if p.grad.norm() > 0) == ['gc1.weight', 'gc2.weight']
    assert sorted(n for n, _ in m.named_buffers()) == ['adjacency', 'semantics']


def test_mlgcn_training_lowers_the_loss():
    x = torch.rand(16, 4, 24, generator=torch.Generator().manual_seed(1))
    y = (torch.arange(16)[:, None] % 4 == torch.arange(4)).float()
    seen = two_steps(gcn(), x, y, 0.05)
    assert seen[0] > seen[1] > seen[2]


def test_mlgcn_reloads_without_labels():
    m, f = gcn(), torch.rand(2, 9, 24)
    blank = gcn(targets=None).train()
    with pytest.raises(ValueError, match=r'no label correlations; pass targets=\[N, C\]'): blank(f)
    assert blank.eval()(f).isnan().all(), 'nothing that looks like an answer'
    blank.load_state_dict(m.state_dict())
    assert torch.equal(blank.train()(f), m(f))


def test_mlgcn_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r'got \[4, 16\] and \[50, 3\]'): gcn(targets=np.zeros((50, 3), np.uint8))


@pytest.mark.parametrize('kw, match', [
    (dict(p=1.), 'p: expected at least 0 and below 1, got 1'), (dict(p=-0.1), 'p: expected'),
    (dict(threshold=0.), 'threshold: expected above 0 and at most 1, got 0')])
def test_label_correlation_out_of_range(kw, match):
    with pytest.raises(ValueError, match=match): label_correlation(np.eye(3), **kw)


# ---- learned context

@pytest.fixture(scope='module', params=['shapes', 'real tokens'])
def make_clip(request): return (lambda: load_clip('shapes')) if request.param == 'shapes' else real_tokens


def test_the_templates_own_words_give_zero_shot_clip(make_clip, images):
    model = LearnedContext(make_clip(), NAMES, context='a photo of a', offset=0.).eval()
    assert model.context.shape == (4, model.backbone.model.token_embedding.embedding_dim)
    torch.testing.assert_close(model(images), ZeroShotCLIP(make_clip(), NAMES, TEMPLATE)(images), rtol=1e-4, atol=1e-4)
    with torch.no_grad(): model.context[1].neg_()
    assert (model(images) - ZeroShotCLIP(make_clip(), NAMES, TEMPLATE)(images)).abs().max() > 1e-3


def test_names_of_several_tokens_keep_them():
    names = ['fire hydrant', 'hippopotamus', 'zzyzx qwv']
    model = LearnedContext(real_tokens(), names, context='a photo of a')
    want = model.backbone.clip.tokenizer([TEMPLATE.format(n) for n in names])
    assert torch.equal(model.tokens[:, 5:], want[:, 5:])
    assert torch.equal(model.tokens[:, 0], want[:, 0])
    assert (want[2] != 0).sum() > 8
    assert torch.equal(model.tokens.argmax(1), want.argmax(1)), 'the end is where it has to be'


def test_the_offset_shifts_all_logits_alike(images):
    a, b = (LearnedContext(load_clip('shapes'), NAMES, context='a photo of a', offset=o).eval() for o in (0., 0.2))
    torch.testing.assert_close(a(images) - b(images), (0.2 * a.log_scale.exp()).expand(6, 3), rtol=1e-3, atol=1e-4)


def test_gradients_reach_what_is_learned_and_nothing_else(images):
    model, learned = LearnedContext(load_clip('shapes'), NAMES), ['context', 'offset']
    model(images).square().sum().backward()
    assert sorted(n for n, p in model.named_parameters() if p.grad is not None) == learned
    assert all(p.grad.norm() > 0 for n, p in model.named_parameters() if n in learned)
    assert model.context.grad.shape == (4, 64)
    assert not model.backbone.patches(images).requires_grad


def test_the_towers_stay_in_eval_mode(images):
    model = LearnedContext(load_clip('shapes'), NAMES).train()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    model(images)
    assert model.training
    assert not any(m.training for m in model.backbone.modules())
    assert all(torch.equal(v, before[k]) for k, v in model.backbone.state_dict().items())


def test_no_hook_is_left_behind(images):
    tower = FrozenCLIP(load_clip('shapes'))
    tokens = tower.clip.tokenizer(['a photo of a red circle.'])
    tower.encode_text(tokens, torch.zeros(4, 64))
    with pytest.raises(RuntimeError): tower.encode_text(tokens, torch.zeros(4, 63))
    assert not tower.model.token_embedding._forward_hooks
    assert torch.equal(tower.model.encode_text(tokens), tower.clip.encode_text(['a photo of a red circle.']))


def test_one_batch_of_sentences_per_step(images):
    model, calls = LearnedContext(load_clip('shapes'), NAMES), []
    model.backbone.model.transformer.register_forward_hook(lambda m, args, out: calls.append(args[0].shape[0]))
    model(images)
    assert calls == [3]


def test_learned_context_training_lowers_the_loss(images):
    model = LearnedContext(load_clip('shapes'), NAMES, context='a photo of a')
    y = (torch.arange(6)[:, None] % 3 == torch.arange(3)).float()
    seen = two_steps(model, model.backbone.patches(images), y, 0.01)
    assert seen[0] > seen[1] > seen[2]


def test_a_random_start_follows_the_seed():
    def start(seed):
        torch.manual_seed(seed)
        return LearnedContext(load_clip('shapes'), NAMES, context=5).context
    assert start(0).shape == (5, 64)
    assert torch.equal(start(0), start(0))
    assert not torch.equal(start(0), start(1))
    assert 0.015 < start(0).std() < 0.025


def test_learned_context_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="13 vectors and the name 'red circle' do not fit into 16 tokens"):
        LearnedContext(load_clip('shapes'), NAMES, context=13)
    assert LearnedContext(load_clip('shapes'), NAMES, context=12).tokens.shape == (3, 16)
    with pytest.raises(ValueError, match='context: expected at least 1, got 0'):
        LearnedContext(load_clip('shapes'), NAMES, context=0)
    with pytest.raises(ValueError, match="does not know 'dog'"): LearnedContext(load_clip('shapes'), ['dog'])
    clip = load_clip('shapes')
    clip.model = nn.Linear(1, 1)
    with pytest.raises(ValueError, match="Linear has no `token_embedding`; expected open_clip's CLIP"):
        LearnedContext(clip, NAMES)


# ---- in the trainer

@pytest.fixture(scope='module')
def embedded(tmp_path_factory):
    "Cached embeddings of 48 scenes"
    train = shapes_lt('train').subset(range(48))
    quiet = dict(precision='fp32', num_workers=0, progress=False)
    return cache_features(FrozenCLIP(load_clip('shapes')), train, tmp_path_factory.mktemp('cache'), 64, **quiet)


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
def test_learned_context_in_the_trainer(embedded, tmp_path, precision):
    "The average is of the context, the saved weights leave the towers out, and they are enough to come back"
    from safetensors.torch import load_file
    config = TrainConfig(epochs=2, batch_size=16, lr=0.01, ema=0.5, loss='bce', precision=precision,
                         device='cpu', select='last')
    model = LearnedContext(load_clip('shapes'), embedded.classes, context='a photo of a')
    start = model.context.detach().clone()
    t = Trainer(model, embedded, config=config, folder=tmp_path, progress=False).fit()
    saved = load_file(tmp_path / 'last.safetensors')
    assert t.frozen
    assert sorted(saved) == ['context', 'log_scale', 'offset']
    assert t.history[1]['loss'] < t.history[0]['loss']
    assert not torch.equal(saved['context'], start)
    assert not torch.equal(saved['context'], t.model.context)
    for k, v in load_clip('shapes').model.state_dict().items():
        assert torch.equal(v, t.evaluated.backbone.model.state_dict()[k]), k
    fresh = LearnedContext(load_clip('shapes'), embedded.classes).eval()
    missing, unknown = fresh.load_state_dict(saved, strict=False)
    assert all(k.startswith('backbone.') for k in missing)
    assert not unknown
    x = torch.stack([embedded[i][0] for i in range(5)]).float()
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bf16'):
        torch.testing.assert_close(fresh(x), t.evaluated(x))


def test_cached_embeddings_are_the_images(embedded):
    model = LearnedContext(load_clip('shapes'), embedded.classes).eval()
    scenes = torch.stack([shapes_lt('train')[i][0] for i in range(3)])
    assert embedded[0][0].shape == (1, 128)
    cached = torch.stack([embedded[i][0] for i in range(3)])
    torch.testing.assert_close(model(cached), model(scenes), rtol=1e-2, atol=2e-2)


def test_mlgcn_in_the_trainer(embedded):
    config = TrainConfig(epochs=5, batch_size=16, lr=1e-3, ema=0.5, loss='bce', sampler='class_aware',
                         device='cpu', select='last')
    W = torch.randn(20, 16, generator=torch.Generator().manual_seed(0))
    model = MLGCN(None, W, embedded.targets, feature_dim=128)
    t = Trainer(model, embedded, config=config, progress=False).fit()
    assert t.history[-1]['loss'] < t.history[0]['loss']
    assert {'adjacency', 'semantics', 'gc1.weight'} <= set(t.trained_state())
