"""The private integer that every operator takes: which kernels run (csrc/ssd/plan.h)."""

BATCH_INVARIANT = 1 << 8

_plan = 0  # choose from the problem's sizes


def current_plan():
    """What the public functions hand to the operators."""
    return _plan


class _PlanSetting:
    """Sets the plan at once; as a context manager, puts the former one back at the end."""

    def __init__(self, plan):
        global _plan
        self._former = _plan
        _plan = plan

    def __enter__(self):
        return self

    def __exit__(self, *_):
        global _plan
        _plan = self._former


def batch_invariant(enabled=True):
    """Whether a sequence's result may depend on what it is batched or packed with.

    When enabled, kernels are chosen from sequence length, h, g, p and n alone, never from the batch
    or from the number of packed sequences, and every sum has the same order in any batch. It holds
    from the call on, for all threads, or for a block: `with batch_invariant(): ...`. The backward
    of a call follows what held at its forward.
    """
    return _PlanSetting(_plan | BATCH_INVARIANT if enabled else _plan & ~BATCH_INVARIANT)


def force_plan(plan):
    """For tests: the plan itself (tier in bits 0-3, variant in bits 4-7), in the same two ways."""
    return _PlanSetting(plan)
