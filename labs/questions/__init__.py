"""Questions with drawn numbers. Their answers are what the project's code says, not what somebody wrote down."""

from collections.abc import Callable
from random import Random
from typing import NamedTuple


class Question(NamedTuple):
    """Asked of a student, who is right within `tolerance` of what `answer` returns, as a share of it."""

    text: str
    # How one gets there, with the numbers, and the number at which that arrives.
    solution: str
    result: float
    # What the project's code says: it counts, runs or simulates, and knows no formula of the solution.
    answer: Callable[[], float]
    tolerance: float = 0.01


# A function of each question's numbers.
Ask = Callable[[Random], Question]
