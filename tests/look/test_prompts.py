"Prompt drift of known rotations"
import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from cprfl.look.prompts import class_similarity, neighbour_changes, prompt_drift, prompt_trajectories, similarity_change

CLASSES, GROUPS = list('abcdef'), dict(head=[0, 1], medium=[2, 3], tail=[4, 5])


def rotation(d, degrees):
    "A rotation that turns every vector of R^d, d even, by the same angle"
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return torch.block_diag(*[torch.tensor([[c, s], [-s, c]], dtype=torch.float32)] * (d // 2))


@pytest.fixture
def rotated():
    P = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    return {e: P @ rotation(8, 15 * e) * (1 + e) for e in (0, 1, 2, 3)}


def test_the_table_has_a_row_per_epoch_and_class(rotated):
    drift = prompt_drift(rotated, CLASSES, GROUPS)
    assert list(drift.columns) == ['epoch', 'class', 'group', 'cosine', 'distance', 'relative', 'step', 'norm']
    assert len(drift) == 4 * 6


@pytest.mark.parametrize('epoch', range(4))
def test_drift_of_a_known_rotation(rotated, epoch):
    t = prompt_drift(rotated, CLASSES, GROUPS).query('epoch == @epoch')
    cosine, growth = np.cos(np.radians(15 * epoch)), 1 + epoch
    assert np.allclose(t['cosine'], cosine, atol=1e-5)
    assert np.allclose(t['relative'], np.sqrt(1 + growth**2 - 2 * growth * cosine), atol=1e-4)  # the law of cosines
    assert np.allclose(t['norm'], growth * rotated[0].norm(dim=1), atol=1e-4)
    assert np.allclose(t['step'], (rotated[epoch] - rotated[max(epoch - 1, 0)]).norm(dim=1), atol=1e-4)


def test_similarity_is_the_cosine(rotated):
    P = rotated[0]
    want = torch.nn.functional.cosine_similarity(P[:, None], P[None], dim=-1)
    assert np.allclose(class_similarity(P, CLASSES), want, atol=1e-6)


def test_a_rotation_of_all_prompts_changes_no_relation(rotated):
    assert similarity_change(rotated, CLASSES)['change'].abs().to_numpy().max() < 1e-5
    assert (neighbour_changes(rotated, CLASSES, GROUPS)['kept'] == 1).all()


def test_centring_takes_the_common_direction_away():
    P = torch.eye(6) + 50
    assert class_similarity(P, CLASSES).to_numpy().min() > 0.99
    off = class_similarity(P, CLASSES, centre=True).to_numpy()[~np.eye(6, dtype=bool)]
    assert np.allclose(off, -1 / 5, atol=1e-4)


def test_one_pca_for_all_epochs_equals_scikit_learn(rotated):
    paths, explained = prompt_trajectories(rotated, CLASSES, GROUPS, components=3)
    P = torch.cat([rotated[e] for e in range(4)]).numpy()
    reference = PCA(3).fit(P)
    assert np.allclose(explained, reference.explained_variance_ratio_, atol=1e-5)
    ours, theirs = paths[['pc1', 'pc2', 'pc3']].to_numpy(), reference.transform(P)
    assert np.allclose(np.abs(ours), np.abs(theirs), atol=1e-3)  # axes may point either way


def test_more_axes_than_dimensions_are_refused(rotated):
    with pytest.raises(ValueError, match='at most 8'): prompt_trajectories(rotated, CLASSES, GROUPS, components=9)


def test_neighbours_that_change():
    before, after = torch.eye(6), torch.eye(6)
    before[0, 1] = before[1, 0] = 0.5
    after[0, 5] = after[5, 0] = 0.5
    row = neighbour_changes({0: before, 7: after}, CLASSES, GROUPS, k=1).iloc[0]
    assert row[['before', 'after', 'kept']].tolist() == [['b'], ['f'], 0]
