"""What validations have shown so far."""

from __future__ import annotations

from sagittal.training.standing import Standing


def test_the_first_best_stays_until_a_better_one() -> None:
    standing = Standing().after(10, 0.4).after(20, 0.4).after(30, 0.3)
    assert (standing.best_step, standing.best_dice, standing.stale) == (10, 0.4, 2)
    assert standing.after(40, 0.5) == Standing(best_dice=0.5, best_step=40)


def test_nothing_found_yet_is_neither_good_nor_stale() -> None:
    standing = Standing().after(10, 0.0).after(20, 0.0).after(30, 0.0)
    assert (standing.best_step, standing.stale) == (30, 0)
    assert standing.after(40, 0.1).after(50, 0.0).stale == 1
