"""K-means and back translation against loops, scikit-learn and their own definitions."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from protoclip_lab import clustering
from protoclip_lab.clustering import back_translate, balance, kmeans, nearest

ENGINES = ["faiss", "torch"]


def blobs(seed=0, centres=5, each=40, d=8, spread=0.05):
    generator = torch.Generator().manual_seed(seed)
    middle = torch.randn(centres, d, generator=generator)
    truth = torch.arange(centres).repeat_interleave(each)
    return middle[truth] + spread * torch.randn(len(truth), d, generator=generator), truth


def drifted():
    """Rows without clusters, and centroids at which k-means starts badly and then gains less with every iteration."""
    x = torch.randn(600, 6, generator=torch.Generator().manual_seed(12))
    return x, x[:12] * 0.2


def squared_distances(x, c):
    return ((x[:, None].double() - c[None].double()) ** 2).sum(-1)


@pytest.mark.parametrize("engine", ENGINES)
def test_labels_are_nearest_of_returned_centroids_and_objective_is_their_cost(engine):
    x = torch.randn(300, 7, generator=torch.Generator().manual_seed(1))
    found = kmeans(x, 20, seed=3, engine=engine)
    d = squared_distances(x, found.centroids)
    np.testing.assert_allclose(d.gather(1, found.labels[:, None])[:, 0], d.min(1).values, rtol=1e-4, atol=1e-5)
    assert found.objective == pytest.approx(float(d.min(1).values.sum()), rel=1e-5)
    assert found.sizes.tolist() == np.bincount(found.labels, minlength=20).tolist()


@pytest.mark.parametrize("engine", ENGINES)
def test_well_separated_blobs_are_found(engine):
    from sklearn.metrics import adjusted_rand_score

    x, truth = blobs()
    assert adjusted_rand_score(truth, kmeans(x, 5, restarts=10, seed=0, engine=engine).labels) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_objective_is_as_good_as_scikit_learn(engine):
    from sklearn.cluster import KMeans

    x = torch.randn(500, 5, generator=torch.Generator().manual_seed(2))
    ours = kmeans(x, 12, iterations=50, restarts=5, seed=0, engine=engine).objective
    theirs = KMeans(12, init="random", n_init=5, max_iter=50, random_state=0).fit(x.numpy()).inertia_
    assert ours < 1.03 * theirs


@pytest.mark.parametrize("engine", ENGINES)
def test_lloyd_from_given_centroids_equals_written_out_loop(engine):
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(4))
    init = x[:6].clone()
    centroids = init.double()
    for _ in range(5):
        labels = squared_distances(x, centroids).argmin(1)
        centroids = torch.stack([x[labels == j].double().mean(0) for j in range(6)])
    found = kmeans(x, 6, iterations=5, init=init, engine=engine)
    torch.testing.assert_close(found.centroids.double(), centroids, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
def test_same_seed_same_bits_and_other_seed_other_bits(engine):
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(5))
    first, again, other = (kmeans(x, 30, seed=s, engine=engine) for s in (7, 7, 8))
    assert torch.equal(first.centroids, again.centroids) and torch.equal(first.labels, again.labels)
    assert first.objective == again.objective
    assert not torch.equal(first.centroids, other.centroids)


@pytest.mark.parametrize("engine", ENGINES)
def test_more_restarts_never_cost_more_by_much(engine):
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(6))
    single = [kmeans(x, 10, seed=s, engine=engine).objective for s in range(8)]
    assert kmeans(x, 10, restarts=8, seed=0, engine=engine).objective <= np.median(single)


@pytest.mark.parametrize("engine", ENGINES)
def test_emptied_clusters_are_filled_by_splitting(engine):
    x, _ = blobs(centres=3, each=50)
    far = torch.full((1, x.shape[1]), 1e3)
    init = torch.cat([x[:1], far, far + 1, far + 2])  # three of four start where nobody is
    found = kmeans(x, 4, iterations=20, init=init, engine=engine)
    assert (found.sizes > 0).all()


@pytest.mark.parametrize("engine", ENGINES)
def test_every_row_its_own_cluster(engine):
    x = torch.eye(6)
    found = kmeans(x, 6, seed=0, engine=engine)
    assert found.objective == pytest.approx(0, abs=1e-6)
    assert sorted(found.labels.tolist()) == list(range(6))


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_rows_do_not_break_it(engine):
    found = kmeans(torch.ones(50, 3), 5, seed=0, engine=engine)
    assert torch.isfinite(found.centroids).all()
    assert int(found.sizes.sum()) == 50


def test_all_rows_are_used(recwarn):
    """faiss would sample 256 rows for each centroid: the centroid is then not the mean of all."""
    x = torch.randn(2000, 3, generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(kmeans(x, 1).centroids[0], x.mean(0), rtol=1e-4, atol=1e-5)
    kmeans(x[:10], 8)
    assert not list(recwarn)


def test_few_points_print_no_warning(capfd):
    kmeans(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), 20)
    printed = capfd.readouterr()
    assert printed.out == "" and printed.err == ""


@pytest.mark.parametrize("k", [0, 11])
def test_impossible_k_is_refused(k):
    with pytest.raises(ValueError, match=f"k = {k} .* 10 rows"):
        kmeans(torch.randn(10, 2), k)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_rows_are_refused_by_number(value):
    x = torch.zeros(10, 2)
    x[4, 1] = value
    with pytest.raises(ValueError, match="row 4"):
        kmeans(x, 2)


@pytest.mark.parametrize("engine", ENGINES)
def test_tolerance_stops_after_the_first_iteration_that_gains_too_little(engine):
    x, init = drifted()
    spent = [kmeans(x, 12, iterations=n, init=init, engine=engine).objective for n in range(1, 12)]
    gains = [1 - later / earlier for earlier, later in pairwise(spent)]
    assert all(a > b for a, b in pairwise(gains[:5])) and gains[3] > 0  # the case is one of slow convergence
    tolerance = (gains[1] + gains[2]) / 2
    found = kmeans(x, 12, iterations=50, init=init, tolerance=tolerance, engine=engine).objective
    # The engines see a gain one iteration after it was made.
    assert spent[-1] < found and found in spent[2:6]
    assert kmeans(x, 12, iterations=50, init=init, engine=engine).objective <= spent[-1]


def test_warm_start_needs_few_iterations_and_keeps_the_numbers_of_its_clusters():
    x, _ = blobs(centres=9, each=60)
    before = kmeans(x, 9, init=x[::60])
    moved = x + 0.05 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    warm = kmeans(moved, 9, init=before.centroids, iterations=2)
    assert torch.equal(warm.labels, before.labels)
    assert warm.objective <= 1.001 * kmeans(moved, 9, restarts=30, seed=2).objective


def test_nearest_adds_the_penalty_to_half_the_squared_distance():
    generator = torch.Generator().manual_seed(0)
    x, c, penalty = (torch.randn(*shape, generator=generator) for shape in ((50, 4), (7, 4), (7,)))
    penalty[3] = torch.inf
    expected = (torch.cdist(x, c).square() / 2 + penalty).argmin(dim=1)
    assert torch.equal(nearest(x, c, penalty), expected)
    assert not (expected == 3).any() and not torch.equal(expected, nearest(x, c))


def test_balance_is_the_sinkhorn_of_swav(monkeypatch):
    """Against the loop of SwAV's code over a dense matrix."""
    x = F.normalize(torch.randn(60, 5, generator=torch.Generator().manual_seed(0)), dim=1)
    c = F.normalize(torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), dim=1)
    Q = torch.exp(x @ c.T / 0.05).T.double()
    Q /= Q.sum()
    for _ in range(3):
        Q /= Q.sum(dim=0, keepdim=True) * 60
        Q /= Q.sum(dim=1, keepdim=True) * 6
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 50)
    assert torch.equal(nearest(x, c, balance(x, c)), Q.argmax(dim=0))
    assert not torch.equal(nearest(x, c), Q.argmax(dim=0))


def test_balanced_clusters_are_neither_giant_nor_empty():
    generator = torch.Generator().manual_seed(0)
    crowd = torch.randn(900, 8, generator=generator) * 0.02 + torch.eye(8)[0]
    x = F.normalize(torch.cat([crowd, torch.randn(300, 8, generator=generator)]), dim=1)
    plain, even = (kmeans(x, 12, seed=0, balanced=b, engine="torch") for b in (False, True))
    assert 50 < even.sizes.min() and even.sizes.max() < 2 * 100  # a mean of 100
    assert plain.sizes.min() < 50 and plain.sizes.max() > 2 * 100
    assert plain.objective < even.objective  # what evenness costs
    torch.testing.assert_close(even.centroids, back_translate(even.labels, x, 12), rtol=0, atol=0.05)
    assert torch.equal(kmeans(x, 12, seed=0, balanced=True).labels, even.labels)  # whatever the engine


def test_unknown_engine_is_refused():
    with pytest.raises(KeyError, match="'fais'"):
        kmeans(torch.randn(10, 2), 2, engine="fais")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_back_translation_equals_the_textbook_loop(dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 9, generator=generator).to(dtype)
    labels = torch.randint(40, (500,), generator=generator)
    labels[labels == 7] = 8  # an empty cluster
    expected = torch.zeros(41, 9, dtype=torch.float64)
    for j in range(41):
        if (labels == j).any():
            expected[j] = x[labels == j].double().mean(0)
    found = back_translate(labels, x, 41)
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert (found[[7, 40]] == 0).all()


def test_back_translation_refuses_labels_outside_and_other_lengths():
    for labels in ([0, 3], [-1, 2], [0, 1, 2]):
        with pytest.raises((IndexError, RuntimeError)):
            back_translate(torch.tensor(labels), torch.zeros(2, 2), 3)


def test_nearest_in_blocks_equals_one_block(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, c = torch.randn(100, 5, generator=generator), torch.randn(13, 5, generator=generator)
    whole = nearest(x, c)
    assert torch.equal(whole, squared_distances(x, c).argmin(1))
    monkeypatch.setattr(clustering, "BLOCK_ELEMENTS", 40)
    assert torch.equal(nearest(x, c), whole)
