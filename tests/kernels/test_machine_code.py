"""Reading machine code: loops out of a disassembly, and how many thread blocks fit on a multiprocessor."""

from __future__ import annotations

import pytest

from transformer_fast.testing.control_flow import natural_loops, parse_sass
from transformer_fast.testing.machine_code import LIMITS, ctas_per_sm, inner_loops, producer_loops
from transformer_fast.testing.overlap import beside_products

# A wait for a full stage, two products and a conditional block, all in a loop of an outer loop. The wait is polled far
# behind the code, from where a branch goes back into the loop, but not to its head; the kernel ends in a trap.
SASS = """
	.section	.text.helper,"ax",@progbits
.text.helper:
        /*0000*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0010*/                   BRA `(.text.helper) ;
	.section	.text.kernel,"ax",@progbits
        .global         kernel
kernel:
.text.kernel:
        /*0000*/                   LDC R1, c[0x0][0x28] ;
.L_x_0:
        /*0010*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0020*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0030*/              @!P0 BRA `(.L_x_5) ;
.L_x_2:
        /*0040*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR48], RZ, !UPT ;
        /*0050*/                   BRA.U !UP1, `(.L_x_3) ;
        /*0060*/                   STL [R1], R5 ;
.L_x_3:
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR48], R24, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*00a0*/               @P1 UTMALDG.4D [UR8], [UR14] ;
        /*00b0*/               @P1 BRA `(.L_x_1) ;
        /*00c0*/                   DEPBAR.LE SB0, 0x0 ;
        /*00d0*/               @P2 BRA `(.L_x_0) ;
        /*00e0*/               @P3 EXIT ;
        /*00f0*/                   FADD R1, R1, R1 ;
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0120*/              @!P0 BRA `(.L_x_5) ;
        /*0130*/                   BRA `(.L_x_2) ;
.L_x_6:
        /*0140*/                   BRA `(.L_x_6);
        /*0150*/                   NOP;
"""


TABLE = """
	.section	.text.kernel,"ax",@progbits
.text.kernel:
        /*0000*/                   ULDC.64 UR4, c[0x2][0x0] ;
        /*0010*/                   BRXU UR4 -0x20                     (*"BRANCH_TARGETS .L_x_1,.L_x_2"*);
.L_x_3:
        /*0020*/                   EXIT ;
.L_x_1:
        /*0030*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0040*/                   UTMALDG.4D [UR8], [UR14] ;
        /*0050*/               @P1 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
.L_x_2:
        /*0070*/                   HMMA.16816.F32 R4, R8, R10, R4 ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/                   BRA `(.L_x_3) ;
"""


def test_a_branch_by_a_table_leads_to_all_of_its_targets() -> None:
    blocks = parse_sass(TABLE, "kernel")
    labels = [blocks[n].label for n in blocks[0].successors]
    assert labels == [".L_x_1", ".L_x_2"]
    loops = natural_loops(blocks)
    assert len(producer_loops(loops)) == len(inner_loops(loops)) == 1


def test_loops_are_those_that_turn() -> None:
    loops = natural_loops(parse_sass(SASS, "kernel"))
    heads = [loop.graph[loop.head].label for loop in loops]
    assert heads == [".L_x_0", ".L_x_1", ".L_x_5"]  # neither the way back from the poll, nor the trap
    outer, inner, poll = loops
    assert poll.blocks < inner.blocks < outer.blocks
    assert len(poll.instructions) == 2


def test_one_turn_of_the_inner_loop() -> None:
    (loop,) = inner_loops(natural_loops(parse_sass(SASS, "kernel")))
    assert loop.instructions == 11  # with the branch back from the poll, without the poll itself
    assert (loop.tensor_cores, loop.tma_loads, loop.spills) == (2, 1, 1)
    assert loop.waits == {"wgmma": 1, "mbarrier": 1, "barrier": 1}  # DEPBAR comes after


def test_without_tensor_cores_the_loop_is_where_the_arithmetic_is() -> None:
    loops = natural_loops(parse_sass(SASS.replace("HGMMA", "FFMA"), "kernel"))
    assert [loop.instructions for loop in inner_loops(loops)] == [11]
    assert inner_loops(natural_loops(parse_sass(SASS.replace("HGMMA", "MOV"), "kernel"))) == []


def test_only_the_kernel_itself_is_read() -> None:
    opcodes = [i.opcode for block in parse_sass(SASS, "kernel") for i in block.instructions]
    assert opcodes[0] == "LDC"
    assert not any(opcode.startswith("HMMA") for opcode in opcodes)
    with pytest.raises(RuntimeError, match="no instructions of another"):
        parse_sass(SASS, "another")


# A producer that copies lane by lane, in a loop of its own, what it waits for a place for; and a consumer.
PRODUCER = """
.text.kernel:
        /*0000*/              @P0 BRA `(.L_consumer) ;
.L_produce:
        /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*0020*/              @!P0 BRA `(.L_poll) ;
.L_lanes:
        /*0030*/                   R2UR UR4, R4 ;
        /*0040*/                   UTMALDG.4D [UR8], [UR14] ;
        /*0050*/              @P1 BRA `(.L_lanes) ;
        /*0060*/              @P2 BRA `(.L_produce) ;
        /*0070*/                   EXIT ;
.L_consumer:
        /*0080*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR48], R24, gsb0 ;
        /*0090*/              @P3 BRA `(.L_consumer) ;
        /*00a0*/                   EXIT ;
.L_poll:
        /*00b0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R2 ;
        /*00c0*/              @!P0 BRA `(.L_poll) ;
        /*00d0*/                   BRA `(.L_lanes) ;
"""


def test_a_producer_waits_and_loads() -> None:
    loops = natural_loops(parse_sass(PRODUCER, "kernel"))
    (producer,) = producer_loops(loops)
    assert (producer.tma_loads, producer.tensor_cores, producer.instructions) == (1, 0, 7)
    (consumer,) = inner_loops(loops)
    assert (consumer.tma_loads, consumer.tensor_cores) == (0, 1)
    assert producer_loops(natural_loops(parse_sass(SASS, "kernel"))) == []  # those who load there compute too


def overlapped(*lines: str) -> int:
    """Exponentials beside products in a kernel of these instructions."""
    text = ".text.kernel:\n" + "\n".join(n if n.endswith(":") else f"/*0000*/ {n} ;" for n in (*lines, "EXIT"))
    return sum(beside_products(parse_sass(text, "kernel")))


_FIRST, _LAST = "HGMMA.64x64x16 R8, gdesc[UR4], R8", "HGMMA.64x64x16 R8, gdesc[UR4], R8, gsb0"
_ALL, _BUT_ONE = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


def test_what_runs_beside_products() -> None:
    assert overlapped("MUFU.EX2 R0, R0", _LAST, "MUFU.EX2 R0, R0", "MUFU.RCP R0, R0", _ALL, "MUFU.EX2 R0, R0") == 1
    assert overlapped(_LAST, _BUT_ONE, "MUFU.EX2 R0, R0") == 1
    assert overlapped(_LAST, _LAST, _BUT_ONE, "MUFU.EX2 R0, R0", _ALL) == 1
    assert overlapped(_LAST, _LAST, _ALL, "MUFU.EX2 R0, R0") == 0
    assert overlapped(_FIRST, "MUFU.EX2 R0, R0") == 0  # not yet a group


def test_it_has_to_do_so_on_every_road() -> None:
    before_the_loop = (_LAST, ".L_1:", "MUFU.EX2 R0, R0", "@P0 BRA `(.L_1)")
    assert overlapped(*before_the_loop) == 1
    waits_inside = (_LAST, ".L_1:", "MUFU.EX2 R0, R0", _ALL, "@P0 BRA `(.L_1)")
    assert overlapped(*waits_inside) == 0, "from the second turn on nothing is under way"
    one_side_waits = (_LAST, "@P0 BRA `(.L_1)", _ALL, ".L_1:", "MUFU.EX2 R0, R0")
    assert overlapped(*one_side_waits) == 0
    both_sides_go_on = (_LAST, "@P0 BRA `(.L_1)", "FADD R0, R0, R0", ".L_1:", "MUFU.EX2 R0, R0")
    assert overlapped(*both_sides_go_on) == 1


# Occupancy as NVIDIA's calculator gives it.
@pytest.mark.parametrize(
    ("capability", "registers", "threads", "shared", "expected"),
    [
        (90, 32, 128, 0, 16),  # threads
        (90, 32, 32, 0, 32),  # blocks
        (86, 32, 32, 0, 16),
        (90, 255, 256, 0, 1),  # registers
        (90, 168, 384, 0, 1),
        (90, 128, 256, 0, 2),
        (90, 129, 256, 0, 1),  # handed out by eights
        (80, 40, 1024, 0, 1),
        (80, 32, 1024, 0, 2),
        (90, 64, 128, 113 * 1024, 2),  # shared memory, and 1 KiB a block
        (90, 64, 128, 113 * 1024 + 1, 1),
        (90, 64, 128, 227 * 1024, 1),
        (90, 64, 128, 227 * 1024 + 1, 0),
        (80, 64, 128, 163 * 1024, 1),
        (120, 64, 128, 99 * 1024, 1),
    ],
)
def test_ctas_per_sm(capability: int, registers: int, threads: int, shared: int, expected: int) -> None:
    assert ctas_per_sm(capability, registers, threads, shared) == expected


@pytest.mark.parametrize(("columns", "expected"), [(0, 4), (128, 4), (130, 2), (256, 2), (512, 1), (544, 0)])
def test_tensor_memory_limits_too(columns: int, expected: int) -> None:
    assert ctas_per_sm(100, 128, 128, 0, tensor_memory=columns) == expected


def test_every_capability_has_limits() -> None:
    assert {80, 90, 100} <= set(LIMITS)
