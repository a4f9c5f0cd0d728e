"""A training that shows itself in a notebook."""

import time

from IPython.display import display
from matplotlib.figure import Figure

from protoclip_lab import plots
from protoclip_lab.runs import Run


class Live:
    """A figure of a training that is drawn anew in its place: hand it to :func:`protoclip_lab.training.train` as ``after_row``.

    Under papermill the last one stays.
    """

    def __init__(self) -> None:
        self._shown, self._next = None, 0.0

    def __call__(self, run: Run) -> None:
        """Draw anew, unless that was done just now: a fiftieth of the time is spent on it, however long the run."""
        begin = time.monotonic()
        if begin >= self._next:
            self.draw(run)
            self._next = begin + max(2.0, 50 * (time.monotonic() - begin))

    def draw(self, run: Run) -> Figure:
        """Losses, prototype accuracies and gap so far, shown in the figure's place."""
        config = run.config
        figure = plots.training_curves(run.metrics(), config.infonce_warmup_episodes, config.lit_start_episode)
        if self._shown is None:
            self._shown = display(figure, display_id=True)
        else:
            self._shown.update(figure)
        return figure
