"""The loops of a GPU kernel, found in its disassembly.

A branch that goes back is not yet a loop: a warp that has to wait polls in a few instructions far behind the code, and
jumps back from there. So this is the textbook's way: basic blocks, dominators, natural loops.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

_LABEL = re.compile(r"^(\.L\w+|\.text\.\S+):$")
_INSTRUCTION = re.compile(r"^/\*[0-9a-f]+\*/\s+(?:(@!?U?P[T\d]+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\((\.L\w+)\)")
_TABLE = re.compile(r"BRANCH_TARGETS ([\w.,]+)")  # what nvdisasm adds to a branch through a register
_UNIFORM_CONDITION = re.compile(r"^!?U?P\d|^~?UR\d")
_TABLE_BRANCHES = ("BRX", "BRXU", "JMX", "JMXU")
_BRANCHES = ("BRA", "JMP", *_TABLE_BRANCHES)
_ENDS = ("EXIT", "RET")


@dataclass(frozen=True)
class Instruction:
    """One instruction: what guards it, its name with all modifiers, and its operands as text."""

    guard: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def targets(self) -> list[str]:
        if self.name in _TABLE_BRANCHES:
            table = _TABLE.search(self.operands)
            return table[1].split(",") if table else []
        return _TARGET.findall(self.operands) if self.name in _BRANCHES else []

    @property
    def falls_through(self) -> bool:
        """Whether the next instruction may follow."""
        if self.name not in _BRANCHES + _ENDS:
            return True
        if self.guard is not None:
            return True
        return self.name not in _TABLE_BRANCHES and _UNIFORM_CONDITION.match(self.operands) is not None


@dataclass
class Block:
    """Instructions that run one after the other, and the numbers of the blocks that may follow."""

    label: str | None = None
    instructions: list[Instruction] = field(default_factory=list)
    successors: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Loop:
    """A natural loop: the block that it is entered by, and the numbers of all its blocks."""

    graph: list[Block]
    head: int
    blocks: frozenset[int]

    @property
    def instructions(self) -> list[Instruction]:
        return [i for block in sorted(self.blocks) for i in self.graph[block].instructions]


def parse_sass(text: str, kernel: str) -> list[Block]:
    """The blocks of a kernel, from what `nvdisasm -c` prints."""
    blocks: list[Block] = []
    inside = False
    for line in map(str.strip, text.splitlines()):
        if line.startswith(".section"):
            inside = False
        elif label := _LABEL.match(line):
            inside |= label[1] == f".text.{kernel}"
            if inside:
                blocks.append(Block(label[1]))
        elif inside and (match := _INSTRUCTION.match(line)):
            instruction = Instruction(*match.groups())
            blocks[-1].instructions.append(instruction)
            if instruction.name in _BRANCHES + _ENDS:
                blocks.append(Block())
    if not any(block.instructions for block in blocks):
        raise RuntimeError(f"the disassembly has no instructions of {kernel}")
    _connect(blocks)
    return blocks


def _connect(blocks: list[Block]) -> None:
    numbers = {block.label: number for number, block in enumerate(blocks) if block.label}
    for number, block in enumerate(blocks):
        last = block.instructions[-1] if block.instructions else None
        if (last is None or last.falls_through) and number + 1 < len(blocks):
            block.successors.append(number + 1)
        if last is not None:
            block.successors += [numbers[target] for target in last.targets if target in numbers]


def natural_loops(blocks: list[Block]) -> list[Loop]:
    """All loops in the order of their heads; two branches back to one head are one loop."""
    dominators = _dominators(blocks)
    predecessors = predecessors_of(blocks)
    bodies: dict[int, set[int]] = {}
    for number in dominators:
        for head in blocks[number].successors:
            if head in dominators[number]:
                bodies.setdefault(head, {head}).update(_reaching(number, head, predecessors))
    return [Loop(blocks, head, frozenset(body)) for head, body in sorted(bodies.items())]


def _reaching(number: int, head: int, predecessors: list[list[int]]) -> set[int]:
    """The blocks from which `number` is reached without passing `head`."""
    found = {head}
    waiting = [number]
    while waiting:
        block = waiting.pop()
        if block not in found:
            found.add(block)
            waiting += predecessors[block]
    return found


def predecessors_of(blocks: Sequence[Block]) -> list[list[int]]:
    """For each block the numbers of those that it may follow."""
    predecessors: list[list[int]] = [[] for _ in blocks]
    for number, block in enumerate(blocks):
        for successor in block.successors:
            predecessors[successor].append(number)
    return predecessors


def _dominators(blocks: list[Block]) -> dict[int, set[int]]:
    """For each block that can be reached, the blocks on every way to it, itself among them."""
    order = _reverse_postorder(blocks)
    predecessors = predecessors_of(blocks)
    dominators: dict[int, set[int]] = {0: {0}}
    changed = True
    while changed:
        changed = False
        for number in order[1:]:
            known = [dominators[p] for p in predecessors[number] if p in dominators]
            new = set.intersection(*known) | {number}
            if dominators.get(number) != new:
                dominators[number] = new
                changed = True
    return dominators


def _reverse_postorder(blocks: list[Block]) -> list[int]:
    order: list[int] = []
    seen = {0}
    stack = [(0, iter(blocks[0].successors))]
    while stack:
        number, successors = stack[-1]
        for successor in successors:
            if successor not in seen:
                seen.add(successor)
                stack.append((successor, iter(blocks[successor].successors)))
                break
        else:
            order.append(number)
            stack.pop()
    return order[::-1]
