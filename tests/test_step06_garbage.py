"""step06: garbage is collected where it is said."""

import gc
from types import SimpleNamespace

import pytest
from conftest import load_step
from ranks import run_ranks
from running import train

STEP = "step06_4d"


def _collections(args):
    """After which of its steps garbage of all generations was collected, and what is left behind."""
    steps, collected = 0, []

    def clip(original):
        def clip_grad_norm(*args):
            nonlocal steps
            steps += 1
            return original(*args)

        return clip_grad_norm

    def note(phase, info):
        if phase == "start" and steps and info["generation"] == 2:
            collected.append(steps)

    gc.callbacks.append(note)
    train(args, STEP, clip_grad_norm=clip)
    gc.callbacks.clear()
    return [step for step in collected if step < 6], gc.isenabled(), gc.get_freeze_count()


@pytest.mark.quick
def test_garbage_is_collected_at_fixed_steps_only(small_run):
    args = [*small_run, "--dp", "2", "--steps", "6", "--eval-every", "0", "--gc-every", "2"]
    assert run_ranks(2, _collections, args) == [([2, 4], True, 0)] * 2


@pytest.mark.parametrize("enabled", [True, False])
def test_the_state_of_the_collector_is_restored_after_an_error(enabled):
    load_step(STEP)
    from survive.garbage import collected

    was_enabled = gc.isenabled()
    try:
        gc.enable() if enabled else gc.disable()
        with pytest.raises(ArithmeticError), collected(SimpleNamespace(gc_every=3)):
            assert not gc.isenabled() and gc.get_freeze_count()
            raise ArithmeticError
        assert gc.isenabled() == enabled and not gc.get_freeze_count()
    finally:
        gc.enable() if was_enabled else gc.disable()
