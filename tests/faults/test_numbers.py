"""Numbers that are none stop a run where its last good checkpoint is usable; features that are all the same do not."""

import math

import pytest
import torch

from faults.children import ALL, assert_same
from protoclip_lab import encoders, training
from protoclip_lab.runs import Run, damaged_files
from protoclip_lab.training import train


def tainted_features(patch):
    """The third extraction has an image feature that is NaN."""
    real, calls = encoders.TwoTowers.forward, iter(range(1, 99))

    def forward(self, *args):
        found = real(self, *args)
        # Three batches an extraction.
        if not self.training and next(calls) == 7:
            found.image_projection[5] = math.nan
        return found

    patch.setattr(encoders.TwoTowers, "forward", forward)


def tainted_loss(patch):
    real, calls = training.ClipLoss.forward, iter(range(1, 99))
    patch.setattr(training.ClipLoss, "forward", lambda *a, **k: real(*a, **k) * (math.nan if next(calls) == 8 else 1))


def tainted_gradient(patch, value=math.nan):
    """One number of one gradient, while the loss is finite."""
    real, calls = encoders.create, iter(range(1, 99))

    def taint(gradient):
        if next(calls) == 8:
            gradient = gradient.clone()
            gradient[0, 0] = value
        return gradient

    def create(config):
        model = real(config)
        model.clip.text_projection.register_hook(taint)
        return model

    patch.setattr(encoders, "create", create)


FAULTS = {
    "features": (
        tainted_features,
        ValueError,
        "row 5 of the features to cluster holds NaN or Inf: their model has diverged, take a lower lr",
    ),
    "loss": (
        tainted_loss,
        FloatingPointError,
        "loss is nan, .* at step 8 of episode 3: take a lower lr; last good checkpoint: .*episode_0002",
    ),
    "gradient": (tainted_gradient, FloatingPointError, "gradient norm is nan at step 8 of episode 3: take a lower lr; .*episode_0002"),
    "infinite gradient": (
        lambda patch: tainted_gradient(patch, math.inf),
        FloatingPointError,
        "gradient norm is (inf|nan) at step 8 of episode 3: take a lower lr; .*episode_0002",
    ),
}


@pytest.mark.parametrize("where", FAULTS if ALL else ["features", "gradient"])
def test_a_nan_stops_the_run_and_the_last_good_checkpoint_goes_on(where, settings, unbroken, tmp_path, monkeypatch):
    taint, error, message = FAULTS[where]
    config = settings(tmp_path / "run")
    with monkeypatch.context() as patch:
        taint(patch)
        with pytest.raises(error, match=message):
            train(config)
    run = Run(tmp_path / "run")
    assert not run.finished and not damaged_files(run.latest) and run.latest.name == "episode_0002"
    # What was no number has not been learnt: without the fault the run ends as one that never had it.
    train(config)
    assert_same(run.path, unbroken)


@pytest.mark.parametrize("changes", [{}, {"kmeans_engine": "torch"}, {"temperature": -1}, {"kmeans_balanced": True}], ids=str)
def test_features_that_are_all_the_same_are_learnt_from_without_a_nan(changes, settings, tmp_path, monkeypatch):
    real = encoders.TwoTowers.forward

    def forward(self, *args):
        found = real(self, *args)
        if self.training:
            return found
        same = [torch.nn.functional.normalize(torch.ones_like(feature), dim=1) for feature in found[2:]]
        return encoders.Outputs(*found[:2], *same)

    monkeypatch.setattr(encoders.TwoTowers, "forward", forward)
    run = train(settings(tmp_path / "run", episodes=1, **changes))
    assert run.finished
    steps, (episode,) = run.metrics(kind="step"), run.metrics(kind="episode").to_dict("records")
    assert torch.tensor(steps["loss"]).isfinite().all() and torch.tensor(steps["grad_norm"]).isfinite().all()
    assert episode["clusters/image_4/objective"] == pytest.approx(0, abs=1e-3)
