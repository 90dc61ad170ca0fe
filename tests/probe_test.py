"""The linear probe, against PyTorch's own loop and the toolkit's search by hand."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import real_features
from real_features import several

from unicl_jax.errors import InputError
from unicl_jax.evaluation import elevater, heads
from unicl_jax.evaluation.probe import Curve, Protocol, linear_probe

QUICK = Protocol(
    learning_rates=(1e-3, 1e-1), weight_decays=(1e-6, 1e-3, 1e-1), coarse=1, epochs=3
)._replace(final_epochs=4)


def fashion(records=400, test=200):
    return real_features.fashion(records, test, 48)


def by_pytorch(train, held, start, rate, decay, order, scale, several):
    """The toolkit's loop, one setting: weights, bias and held-out logits an epoch."""
    torch = pytest.importorskip("torch")
    dim, ways = start[0].shape[::-1]
    norm = torch.nn.BatchNorm1d(dim, affine=False)
    linear = torch.nn.Linear(dim, ways)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor(start[0]))
        linear.bias.copy_(torch.tensor(start[1]))
    optimizer = torch.optim.SGD(
        linear.parameters(), lr=rate, momentum=0.9, weight_decay=decay
    )
    loss = torch.nn.BCEWithLogitsLoss() if several else torch.nn.CrossEntropyLoss()
    features, labels = torch.tensor(train[0]), torch.tensor(train[1])
    labels = labels.float() if several else labels.long()
    logits = []
    for epoch in order:
        norm.train()
        for rows in epoch:
            rows = torch.tensor(rows[rows >= 0]).long()
            optimizer.zero_grad()
            loss(scale * linear(norm(features[rows])), labels[rows]).backward()
            optimizer.step()
        norm.eval()
        with torch.no_grad():
            logits.append((scale * linear(norm(torch.tensor(held[0])))).numpy())
    return linear.weight.detach().numpy(), linear.bias.detach().numpy(), logits


@pytest.mark.parametrize("labels", ["one", "several"])
def test_the_sweep_is_pytorchs_loop_setting_by_setting(labels):
    x, y, hx, hy = fashion(150, 60)
    if labels == "several":
        y, hy = several(y), several(hy)
    ways = 12 if labels == "several" else 10
    rng = np.random.default_rng(1)
    start = (
        rng.normal(size=(ways, x.shape[1])).astype(np.float32) / 7,
        rng.normal(size=ways).astype(np.float32),
    )
    order = heads.batches(len(x), 3, 64, 0)  # the last batch has 22
    assert order.shape == (3, 3, 64) and (order[:, -1, 22:] == -1).all()
    rates, decays = [0.1, 0.01, 0.001, 0.1, 0.03], [0.0, 1e-3, 10.0, 0.1, 1.0]
    target = np.float32 if labels == "several" else np.int32
    together = heads.train(
        *map(jnp.asarray, (x, y.astype(target), hx, hy.astype(target))),
        start,
        rates,
        decays,
        order,
        scale=1.5,
        want_logits=True,
        group=2,  # the last of the three groups is filled up
    )
    assert together.finite.shape == (3, 5) and together.finite.all()
    for i, setting in enumerate(zip(rates, decays, strict=True)):
        weights, bias, logits = by_pytorch(
            (x, y), (hx, hy), start, *setting, order, 1.5, labels == "several"
        )
        # float32 sums in another order, 9 steps.
        close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=2e-5)
        close(together.heads.weights[i], weights)
        close(together.heads.bias[i], bias)
        close(together.logits[:, i], logits)
        if labels == "one":
            right = np.argmax(logits, -1) == hy
            hits = [np.bincount(hy[r], minlength=10) for r in right]
            np.testing.assert_array_equal(together.hits[:, i], hits)


def test_together_is_one_run_a_setting():
    x, y, hx, hy = fashion()
    start = np.zeros((10, x.shape[1]), np.float32), np.zeros(10, np.float32)
    order = heads.batches(len(x), 3, 64, 0)
    data = [jnp.asarray(a) for a in (x, y, hx, hy)]
    rates, decays = [0.1, 0.01, 0.001], [0.0, 1e-2, 1.0]
    together = heads.train(*data, start, rates, decays, order, want_logits=True)
    for i in range(3):
        alone = heads.train(
            *data, start, rates[i : i + 1], decays[i : i + 1], order, want_logits=True
        )
        np.testing.assert_allclose(
            together.logits[:, i], alone.logits[:, 0], rtol=1e-4, atol=1e-5
        )
        np.testing.assert_array_equal(together.hits[:, i], alone.hits[:, 0])


def test_held_out_records_are_scored_in_blocks(monkeypatch):
    x, y, hx, hy = fashion()
    start = np.zeros((10, x.shape[1]), np.float32), np.zeros(10, np.float32)
    order = heads.batches(len(x), 2, 64, 0)
    data = [jnp.asarray(a) for a in (x, y, hx, hy)]
    whole = heads.train(*data, start, [0.1], [0.0], order, want_logits=True)
    monkeypatch.setattr(heads, "_ROWS", 64)  # 200 records: the last block has 8
    heads._train.clear_cache()
    blocks = heads.train(*data, start, [0.1], [0.0], order, want_logits=True)
    heads._train.clear_cache()
    np.testing.assert_allclose(blocks.logits, whole.logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(blocks.hits, whole.hits)


def test_batches_have_every_record_once_but_no_batch_of_one():
    order = heads.batches(130, 3, 64, 0)
    assert order.shape == (3, 3, 64)
    for epoch in order:
        assert sorted(epoch[epoch >= 0]) == list(range(130))
    assert not np.array_equal(order[0], order[1])
    left_out = heads.batches(129, 3, 64, 0)  # the 129th would be alone
    assert left_out.shape == (3, 2, 64) and (left_out >= 0).all()
    assert heads.batches(5, 1, 64, 0).shape == (1, 1, 5)


def test_overflows_are_foreseen():
    x, y, hx, hy = fashion(100)
    start = np.ones((10, x.shape[1]), np.float32), np.ones(10, np.float32)
    order = heads.batches(len(x), 60, 20, 0)  # 300 steps
    decays = np.array([10.0, 30, 37, 42, 100, 1e4])
    foreseen = [heads.overflows(0.1, decay, 0.9, 300) for decay in decays]
    assert foreseen == [False, False, False, True, True, True]
    assert not heads.overflows(0.1, 42, 0.9, 10)  # grows, but not so far
    data = [jnp.asarray(a) for a in (x, y, hx, hy)]
    found = heads.train(*data, start, np.full(6, 0.1), decays, order)
    np.testing.assert_array_equal(found.finite[-1], np.logical_not(foreseen))


def test_split_takes_the_first_fifth_of_every_class():
    labels = np.array([0] * 5 + [1] * 6 + [2] + [0] * 5)
    train, held = elevater.split(labels)
    assert held.tolist() == [0, 1, 5, 6, 11]
    assert sorted([*train, *held]) == list(range(17))


def test_split_of_several_labels_counts_what_others_brought():
    labels = np.zeros((10, 3), int)
    labels[:, 0] = 1  # wants 2: rows 0 and 1
    labels[[1, 4, 5, 6, 7, 8], 1] = 1  # wants 2, has row 1: row 4
    labels[[2, 4], 2] = 1  # wants 1, has row 4
    train, held = elevater.split(labels)
    assert held.tolist() == [0, 1, 4]


def test_split_of_a_part():
    labels = np.repeat([0, 1], 50)
    train, held = elevater.split(labels, shots=10, seed=3)
    assert (len(train), len(held)) == (16, 4)
    rows = elevater.subset(labels, 10, 3)
    assert sorted([*train, *held]) == rows.tolist()
    assert held.tolist() == [*rows[:2], *rows[10:12]]


def test_the_sweep_has_a_part_and_the_final_run_all():
    x, y, tx, ty = fashion()
    part = QUICK._replace(sweep_shots=10)
    found = linear_probe(x, y, tx, ty, protocol=part)
    score = 20 * np.array([s for curve in found.sweep for s in curve.scores])
    np.testing.assert_allclose(score, np.round(score), atol=1e-9)  # of 20 held out
    one = part._replace(
        learning_rates=(found.learning_rate,),
        weight_decays=(found.weight_decay,),
        sweep_shots=None,
    )
    whole = linear_probe(x, y, tx, ty, protocol=one)
    np.testing.assert_array_equal(found.scores, whole.scores)


def test_split_needs_something_to_train_on():
    with pytest.raises(InputError, match="2 records of each class"):
        elevater.split(np.arange(4))


def toolkits_search(table):
    """The toolkit's two loops, a run at a time, in percent."""
    best_score, best, runs = 0, None, 0
    for rate, row in enumerate(table):
        peak_idx, peak_score = -1, 0
        for idx in range(0, len(row), 16):
            runs += 1
            if row[idx] > peak_score:
                peak_idx, peak_score = idx, row[idx]
        span = 8
        while span > 0:
            left, right = max(peak_idx - span, 0), min(peak_idx + span, len(row) - 1)
            for idx in [i for i in (left, right) if i != peak_idx]:
                runs += 1
                if row[idx] > peak_score:
                    peak_idx, peak_score = idx, row[idx]
            span //= 2
        if best_score < peak_score:
            best_score, best = peak_score, (rate, peak_idx)
    return best, runs


@pytest.mark.parametrize("seed", range(20))
def test_search_is_the_toolkits(seed):
    rng = np.random.default_rng(seed)
    # Few values, so that many are equal.
    table = rng.integers(1, 6 if seed % 2 else 1000, (6, 97)).astype(float)
    asked = []

    def evaluate(settings):
        asked.extend(settings)
        return [table[setting] for setting in settings]

    best, runs = toolkits_search(table)
    assert elevater.search(evaluate, 6, 97) == best
    assert len(asked) == runs <= 90


def test_search_of_every_setting_and_of_none():
    assert elevater.search(lambda s: [b == 2 for _, b in s], 2, 5, coarse=1) == (0, 2)
    assert elevater.search(lambda s: [-1.0] * len(s), 2, 5) == (0, 0)


def test_the_grid_is_elevaters():
    assert len(elevater.LEARNING_RATES) == 6 and len(elevater.WEIGHT_DECAYS) == 97
    assert elevater.LEARNING_RATES[0] == 1e-6 and elevater.LEARNING_RATES[-1] == 0.1
    coarse = elevater.WEIGHT_DECAYS[:: elevater.COARSE]
    np.testing.assert_allclose(coarse, [1e-6, 1e-4, 1e-2, 1, 1e2, 1e4, 1e6])


def test_probe_on_real_images_is_as_good_as_logistic_regression():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y, tx, ty = fashion(2000, 1000)
    found = linear_probe(x, y, tx, ty)
    peer = linear_model.LogisticRegression(max_iter=2000).fit(x, y).score(tx, ty)
    # Standard error of 1,000 records at 0.8 is 0.013.
    assert found.selected > peer - 0.03
    theirs = found.elevater
    assert theirs.last_epoch == theirs.test_curve[-1] and theirs.finite
    assert theirs.best_test_epoch == max(theirs.test_curve)
    assert theirs.last_epoch > peer - 0.04
    assert found.selected == pytest.approx((found.scores.argmax(1) == ty).mean())
    assert found.per_class.shape == (10,)
    assert 70 < len(found.sweep) <= 90
    assert found.diverged == sum(c.diverged for c in found.sweep) >= 9
    alive = [curve for curve in found.sweep if not curve.diverged]
    assert theirs.validation == max(max(curve.scores) for curve in alive)
    assert found.validation == max(np.mean(curve.scores[5:]) for curve in alive)
    logits = found.head(jnp.asarray(tx))[:, 0]
    np.testing.assert_allclose(logits, found.scores, rtol=1e-5, atol=1e-5)


def test_nothing_is_chosen_on_the_test_set():
    x, y, tx, ty = fashion()
    found = linear_probe(x, y, tx, ty, protocol=QUICK)
    other = linear_probe(x, y, tx, np.roll(ty, 7), protocol=QUICK)
    assert found.sweep == other.sweep
    for name in ("learning_rate", "weight_decay", "validation"):
        assert getattr(found, name) == getattr(other, name)
    assert found.elevater[:4] == other.elevater[:4]
    np.testing.assert_array_equal(found.scores, other.scores)
    assert found.selected > other.selected


def test_mean_per_class_weighs_classes_alike():
    x, y, tx, ty = fashion()
    keep = np.flatnonzero((ty > 2) | (np.arange(len(ty)) < 40))
    found = linear_probe(
        x, y, tx[keep], ty[keep], metric="mean_per_class", protocol=QUICK
    )
    assert found.selected == pytest.approx(np.nanmean(found.per_class))
    assert found.selected != pytest.approx((found.scores.argmax(1) == ty[keep]).mean())


@pytest.mark.parametrize("metric", ["map11", "map"])
def test_probe_of_several_labels(metric):
    x, y, tx, ty = fashion()
    found = linear_probe(x, several(y), tx, several(ty), metric=metric, protocol=QUICK)
    # What labels drawn at random would give: the mean share of a class.
    assert found.selected > 2 * several(ty).mean()
    assert found.per_class is None and found.scores.shape == (200, 12)
    plain = QUICK._replace(softmax_scores=False)
    plain = linear_probe(x, several(y), tx, several(ty), metric=metric, protocol=plain)
    assert plain.selected != found.selected


def test_probe_of_two_classes_by_roc_auc():
    x, y, tx, ty = fashion()
    found = linear_probe(x, y % 2, tx, ty % 2, metric="roc_auc", protocol=QUICK)
    assert 0.8 < found.selected < 1


def test_start_from_texts_and_a_validation_set_of_its_own():
    x, y, tx, ty = fashion()
    centre = np.stack([x[y == k].mean(0) for k in range(10)])
    start = centre - centre.mean(0)
    slow = QUICK._replace(learning_rates=(1e-6,), weight_decays=(0.0,))
    found = linear_probe(
        x[:300],
        y[:300],
        tx,
        ty,
        validation=(x[300:], y[300:]),
        start=start,
        protocol=slow,
    )
    # Hardly trained: what it starts from is what scores.
    np.testing.assert_allclose(found.head.weights[0], start, atol=1e-3)
    assert found.selected > 0.5
    alone = linear_probe(
        x[:300],
        y[:300],
        tx,
        ty,
        validation=(x[300:], y[300:]),
        start=start,
        protocol=slow._replace(merge=False),
    )
    assert not np.array_equal(alone.head.mean, found.head.mean)


def test_divergence_is_counted_and_never_chosen():
    x, y, tx, ty = fashion()
    wild = QUICK._replace(learning_rates=(0.01, 1e38), weight_decays=(1e-3, 1e5))
    found = linear_probe(x, y, tx, ty, protocol=wild._replace(epochs=8))
    assert (found.learning_rate, found.weight_decay) == (0.01, 1e-3)
    assert found.diverged == 3
    assert [c.scores for c in found.sweep if c.learning_rate == 0.01][1] == ()
    with pytest.raises(InputError, match="diverged"):
        linear_probe(x, y, tx, ty, protocol=wild._replace(learning_rates=(1e38,)))


def test_a_lucky_epoch_of_a_setting_that_jumps_is_not_chosen():
    steady = Curve(1e-3, 1e-4, (0.5, 0.7, 0.8, 0.81, 0.8), False)
    jumps = Curve(1e-1, 1e1, (0.1, 0.9, 0.0, 0.88, 0.1), False)
    assert max((jumps, steady), key=lambda curve: curve.steady) is steady
    assert Curve(1.0, 1.0, (), True).steady == -1


def test_what_diverges_in_elevaters_final_run_is_scored_after_the_sweeps_epochs():
    x, y, tx, ty = fashion()
    # Grows by 1.65 a step: 15 steps are fine, 280 are not.
    growing = QUICK._replace(
        learning_rates=(0.1,), weight_decays=(40.95,), final_epochs=40
    )
    found = linear_probe(x, y, tx, ty, protocol=growing)
    assert not found.elevater.finite and found.diverged == 0
    assert found.elevater.last_epoch == 0 and np.isfinite(found.scores).all()
    # The same batches: the final run has been there.
    assert found.selected == found.elevater.test_curve[growing.epochs - 1] > 0
    assert found.selected == pytest.approx((found.scores.argmax(1) == ty).mean())


def test_few_records_and_a_class_without_any():
    x, y, tx, ty = fashion()
    two = np.r_[np.flatnonzero(y == 0)[:2], np.flatnonzero(y == 1)[:2]]
    found = linear_probe(x[two], y[two], tx[:1], ty[:1], classes=10, protocol=QUICK)
    assert found.selected in (0, 1) and found.scores.shape == (1, 10)


DATA = "features", "labels", "test_features", "test_labels"
WRONG = {
    "labels past the classes": (dict(classes=5), r"\[0, 5\)"),
    "one class": (dict(labels=np.zeros(400, int), test_labels=np.zeros(200, int)), "2"),
    "nan": (dict(features=np.full((400, 48), np.nan)), "finite"),
    "floats": (dict(labels=np.zeros(400)), "integers"),
    "negative": (dict(labels=np.full(400, -1)), r"\[0, "),
    "short": (dict(labels=np.zeros(3, int)), r"\[n\]"),
    "size": (dict(test_features=np.zeros((200, 9))), "size"),
    "empty": (dict(test_features=np.zeros((0, 48)), test_labels=np.zeros(0, int)), "n"),
    "metric": (dict(metric="acuracy"), "accuracy"),
    "shape for several": (dict(metric="map11"), r"\[n, K\]"),
    "auc of ten": (dict(metric="roc_auc"), "two classes"),
    "start": (dict(start=np.zeros((3, 48))), "start"),
    "one record": (
        dict(
            features=np.zeros((1, 48)),
            labels=np.zeros(1, int),
            validation=(np.zeros((1, 48)), np.zeros(1, int)),
        ),
        "2 records",
    ),
    "epochs": (dict(protocol=Protocol(epochs=0)), "epochs"),
    "batch": (dict(protocol=Protocol(batch_size=1)), "batch_size"),
    "coarse": (dict(protocol=Protocol(coarse=3)), "power of 2"),
    "rates": (dict(protocol=Protocol(learning_rates=())), "learning rate"),
    "decay": (dict(protocol=Protocol(weight_decays=(-1.0,))), "negative"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_said(what):
    change, message = WRONG[what]
    given = dict(
        zip(DATA, fashion(), strict=True),
        protocol=QUICK,
    )
    with pytest.raises(InputError, match=message):
        linear_probe(**{**given, **change})
