"""How the validations of a run stand: the best so far, and for how long none was better."""

from __future__ import annotations

from sagittal.plan.base import Frozen


class Standing(Frozen):
    """What validations have shown so far; a checkpoint keeps it."""

    best_dice: float | None = None
    """Mean Dice of the best validation."""
    best_step: int = 0
    """Finished steps at that validation."""
    stale: int = 0
    """Validations since then."""

    def after(self, step: int, mean_dice: float) -> Standing:
        """Return the standing after one more validation; an equal score is no better one.

        As long as nothing was found at all, the newest weights are the best: training has just begun.
        """
        if not self.best_dice or mean_dice > self.best_dice:
            return Standing(best_dice=mean_dice, best_step=step)
        return self.replace(stale=self.stale + 1)
