"""What may be answered: the policy's weighted rules over a task's final text.

Invariants: pure. An answer begins at 1 and loses the weight of each rule that holds; below the policy's `least` it is
withheld, with the names of those rules. A rule that cannot be judged holds.
"""

from __future__ import annotations

import re

from edge_agent.agent.rules import OutputRule, Policy
from edge_agent.agent.workflow import evaluate


def shown(answer: str, policy: Policy) -> tuple[str, list[str]]:
    """The answer, or why there is none; and the names of the rules that withhold it."""
    found = [rule for rule in policy.output if answer and _holds(rule, answer)]
    score = max(0.0, 1.0 - sum(rule.weight for rule in found))
    if score >= policy.least:
        return answer, []
    names = [rule.name for rule in found]
    return f"withheld: {', '.join(names)} (score {score:.2f}, at least {policy.least:.2f} is shown)", names


def _holds(rule: OutputRule, answer: str) -> bool:
    if rule.match:
        return re.search(rule.match, answer) is not None
    try:
        return evaluate(rule.when, {"answer": answer}) is not False
    except ValueError:
        return True
