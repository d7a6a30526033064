"""How the library is tested, usable from anybody's tests: the tolerance rule, the cases, the `verify` suite.

from transformer_fast.testing import verify
assert verify().passed
"""

from transformer_fast.testing.cases import Case, Problem, make_problem
from transformer_fast.testing.runner import Outcome, Target, available_targets, check
from transformer_fast.testing.suite import standard_cases
from transformer_fast.testing.tolerance import Verdict, judge
from transformer_fast.testing.verify import Report, verify

__all__ = [
    "Case",
    "Outcome",
    "Problem",
    "Report",
    "Target",
    "Verdict",
    "available_targets",
    "check",
    "judge",
    "make_problem",
    "standard_cases",
    "verify",
]
