"""What runs beside the products of a warpgroup: the point of an asynchronous `wgmma`.

A compiler that moves the wait for a product up, above the exponentials that should have run meanwhile, makes a kernel
that is as right as before, no longer, and much slower.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial

from transformer_fast.testing.control_flow import Block, Instruction, predecessors_of

#: More groups than any kernel has under way: what is not known yet.
_MANY = 8
_WAIT = re.compile(r"gsb0, 0x([0-9a-f]+)")
_EXPONENTIAL = "MUFU.EX2"


def beside_products(blocks: Sequence[Block]) -> list[int]:
    """For each block, how many of its exponentials run while products are under way on every road that leads there."""
    events = [[i for i in block.instructions if _is_event(i)] for block in blocks]
    counts = []
    for block, groups in zip(events, _groups_before(blocks, events), strict=True):
        count = 0
        for instruction in block:
            groups = _after(instruction, groups)
            count += instruction.opcode.startswith(_EXPONENTIAL) and groups > 0
        counts.append(count)
    return counts


def _is_event(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("HGMMA", "WARPGROUP.DEPBAR", _EXPONENTIAL))


def _after(instruction: Instruction, groups: int) -> int:
    """How many groups of products are under way after an instruction.

    The last product of a group names the scoreboard that counts groups: `HGMMA ..., gsb0`. Those before it are under
    way too, but what stands between them and it is neither here nor there.
    """
    if instruction.name == "HGMMA":
        return min(groups + ("gsb0" in instruction.operands), _MANY)
    if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        left = _WAIT.search(instruction.operands)
        return min(groups, int(left[1], 16) if left else 0)
    return groups


def _groups_before(blocks: Sequence[Block], events: Sequence[Sequence[Instruction]]) -> list[int]:
    """Groups that are under way before each block, the fewest over all roads."""
    steps = [[partial(_after, i) for i in block if not i.opcode.startswith(_EXPONENTIAL)] for block in events]
    predecessors = predecessors_of(blocks)
    before = [0] + [_MANY] * (len(blocks) - 1)
    after = [_MANY] * len(blocks)
    changed = True
    while changed:
        changed = False
        for number in range(len(blocks)):
            if number:
                before[number] = min((after[p] for p in predecessors[number]), default=_MANY)
            groups = before[number]
            for step in steps[number]:
                groups = step(groups)
            changed |= groups != after[number]
            after[number] = groups
    return before
