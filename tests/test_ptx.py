"""The machine that runs compiled kernels: it computes what the instructions say, and sees what threads must not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import ptx
from ptx_memory import Faults
from ptx_run import run as run_ptx

LANES = torch.arange(32, dtype=torch.int32)


def run(body: str, *arguments: Tensor | int, threads: int = 32, grid: tuple[int, int, int] = (1, 1, 1)) -> None:
    """`body` with its arguments in %a0, %a1 ..., and the address of its own entry of the first one in %mine."""
    parameters = ",\n".join(f".param .u64 parameter_{i}" for i in range(len(arguments)))
    loads = "\n".join(f"ld.param.b64 %a{i}, [parameter_{i}];" for i in range(len(arguments)))
    text = f"""
        .extern .shared .align 16 .b8 global_smem[];
        .visible .entry kernel(\n{parameters}\n)
        {{
        .reg .pred %p<9>;
        .reg .b16 %h<9>;
        .reg .b32 %r<99>;
        .reg .b64 %d<9>;
        .reg .b64 %a<9>;
        .reg .b64 %mine;
        {loads}
        mov.u32 %r90, %tid.x;
        mov.u32 %r91, %ctaid.x;
        mov.u32 %r92, %ntid.x;
        mad.lo.s32 %r93, %r91, %r92, %r90;
        mad.wide.s32 %mine, %r93, 4, %a0;
        {body}
        ret;\n}}\n"""
    text = "\n".join(line if line.startswith("}") else line.lstrip() for line in text.splitlines())
    run_ptx(ptx.parse(text), grid, threads, 512, arguments)


def result(body: str, *others: Tensor | int, threads: int = 32) -> Tensor:
    """What `body` leaves in %r0 of each thread."""
    y = torch.full((threads,), -1, dtype=torch.int32)
    run(f"{body}\nst.global.b32 [%mine], {{%r0}};", y, *others, threads=threads)
    return y


@pytest.mark.parametrize(
    ("shuffle", "expected"),
    [
        ("up.b32 %r0, %r90, 3, 0, -1", [*range(3), *range(29)]),
        ("down.b32 %r0, %r90, 3, 31, -1", [*range(3, 32), 29, 30, 31]),
        ("bfly.b32 %r0, %r90, 5, 31, -1", [lane ^ 5 for lane in range(32)]),
        ("idx.b32 %r0, %r90, 7, 31, -1", [7] * 32),
        ("bfly.b32 %r0, %r90, 1, 0x1C1F, -1", [lane ^ 1 for lane in range(32)]),  # in segments of four
        ("down.b32 %r0, %r90, 1, 0x1C1F, -1", [lane if lane % 4 == 3 else lane + 1 for lane in range(32)]),
        ("idx.b32 %r0, %r90, 2, 0x1C1F, -1", [lane // 4 * 4 + 2 for lane in range(32)]),
    ],
)
def test_shuffles(shuffle: str, expected: list[int]) -> None:
    assert result(f"shfl.sync.{shuffle};").tolist() == expected


@pytest.mark.parametrize(
    ("instruction", "expected"),
    [
        ("prmt.b32 %r0, 0x33221100, 0x77665544, 0x7531U", 0x77553311),
        ("prmt.b32 %r0, 0x80, 0, 0x0008U", 0x808080FF - 2**32 & 0x000000FF | 0x80808000),
        ("bfe.u32 %r0, 0xABCD1234, 8, 12", 0xD12),
        ("bfe.s32 %r0, 0x00000F00, 8, 4", -1),
        ("bfe.s32 %r0, 0x00000F00, 8, 5", 15),
        ("shr.s32 %r0, -8, 40", -1),
        ("shr.u32 %r0, -8, 40", 0),
        ("shl.b32 %r0, 1, 32", 0),
        ("div.s32 %r0, -7, 2", -3),
        ("rem.s32 %r0, -7, 2", -1),
        ("popc.b32 %r0, 0xF0F", 8),
        ("mul.hi.u32 %r0, 0x80000000, 6", 3),
        ("lop3.b32 %r0, 12, 10, 9, 0xF8", 12 | 10 & 9),
        ("redux.sync.add.s32 %r0, %r90, -1", 31 * 16),
        ("redux.sync.max.s32 %r0, %r90, -1", 31),
        ("cvt.rn.bf16x2.f32 %r0, 0f3F800000, 0f40000000", 0x3F804000),
        ("cvt.rzi.s32.f32 %r0, 0fC0200000", -2),
        ("cvt.rzi.s32.f32 %r0, 0f7FC00000", 0),
        ("max.f32 %r0, 0f7FC00000, 0f3F800000", 0x3F800000),
        ("fma.rn.f32 %r0, 0f40000000, 0f40400000, 0f3F800000", 0x40E00000),
        ("add.s16x2 %r0, 0x0001FFFF, 0x00010001", 0x00020000),
        ("mov.b16 %h1, 0x4040; fma.rn.f32.bf16 %r0, %h1, %h1, 0f3F800000", 0x41200000),
        ("mov.b16 %h1, 0x4040; sub.rn.f32.bf16 %r0, %h1, 0f3F800000", 0x40000000),
        ("mov.b64 %d1, 0x400000003F800000; mul.rn.f32x2 %d1, %d1, %d1; mov.b64 {%r1, %r0}, %d1", 0x40800000),
    ],
)
def test_one_instruction(instruction: str, expected: int) -> None:
    assert set(result(f"{instruction};").tolist()) == {(expected + 2**31) % 2**32 - 2**31}


@pytest.mark.parametrize(
    ("comparison", "of_a_nan"),
    [("eq", 0), ("ne", 0), ("neu", 1), ("lt", 0), ("ltu", 1), ("geu", 1), ("nan", 1), ("num", 0)],
)
def test_comparisons_of_a_nan(comparison: str, of_a_nan: int) -> None:
    body = f"setp.{comparison}.f32 %p1, 0f7FC00000, 0f3F800000; selp.b32 %r0, 1, 0, %p1;"
    assert set(result(body).tolist()) == {of_a_nan}


def test_registers_of_other_widths() -> None:
    assert set(result("mov.b32 %r1, 0x1234FFFE; mov.b32 {%h1, %h2}, %r1; cvt.s32.s16 %r0, %h1;").tolist()) == {-2}
    assert set(result("mov.b16 %h1, 7; mov.b16 %h2, 1; mov.b32 %r0, {%h1, %h2};").tolist()) == {0x10007}
    assert set(result("mul.wide.s32 %d1, -3, 5; cvt.u32.u64 %r0, %d1;").tolist()) == {-15}


def test_threads_that_go_different_ways_meet_again() -> None:
    """Thread i counts to i, then all exchange what they have."""
    body = """
        mov.b32 %r0, 0;
        loop:
        setp.ge.s32 %p1, %r0, %r90;
        @%p1 bra done;
        add.s32 %r0, %r0, 1;
        bra.uni loop;
        done:
        shfl.sync.bfly.b32 %r0, %r0, 1, 31, -1;"""
    assert torch.equal(result(body), LANES ^ 1)


def test_a_barrier_waits_for_threads_whose_way_is_longer() -> None:
    """Half of a warp comes to the barrier by what stands behind it."""
    body = """
        mov.b32 %r0, %r90;
        setp.lt.s32 %p1, %r90, 16;
        @%p1 bra elsewhere;
        meet:
        bar.sync 0;
        shfl.sync.bfly.b32 %r0, %r0, 31, 31, -1;
        bra.uni done;
        elsewhere:
        add.s32 %r0, %r0, 100;
        bra.uni meet;
        done:"""
    assert result(body, threads=64).tolist()[:32] == [*range(31, 15, -1), *range(115, 99, -1)]


def test_a_guard_leaves_registers_alone() -> None:
    body = "mov.b32 %r0, 5; setp.lt.s32 %p1, %r90, 4; @%p1 mov.b32 %r0, 6; @!%p1 add.s32 %r0, %r0, 2;"
    assert result(body).tolist() == [6] * 4 + [7] * 28


THROUGH_SHARED = """
    shl.b32 %r1, %r90, 2;
    st.shared.b32 [%r1], %r90;
    {barrier}
    xor.b32 %r2, %r1, {other};
    ld.shared.b32 %r0, [%r2];
    {after}"""


def test_what_another_warp_wrote_is_read_behind_a_barrier() -> None:
    expected = torch.arange(64, dtype=torch.int32) ^ 32
    body = THROUGH_SHARED.format(barrier="bar.sync 0;", other=128, after="")
    assert torch.equal(result(body, threads=64), expected)
    inside = THROUGH_SHARED.format(barrier="bar.warp.sync -1;", other=4, after="")
    assert torch.equal(result(inside, threads=64), torch.arange(64, dtype=torch.int32) ^ 1)


def test_two_warps_may_write_the_same_at_once() -> None:
    body = "mov.b32 %r1, 7; st.shared::cta.b32 [global_smem], %r1; bar.sync 0; ld.shared.b32 %r0, [global_smem];"
    assert torch.equal(result(body, threads=64), torch.full((64,), 7, dtype=torch.int32))


SECOND = "st.shared.b32 [%r1], %r0;"
STORE = "st.global.b32 [%mine], {%r0};"


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (THROUGH_SHARED.format(barrier="", other=128, after=""), "reads what another one writes, without a barrier"),
        (
            THROUGH_SHARED.format(barrier="bar.sync 0;", other=128, after=SECOND),
            "what another one reads, without a bar",
        ),
        ("st.shared.b32 [global_smem], %r90;", "write different numbers to the same place"),
        ("setp.lt.s32 %p1, %r90, 40; @%p1 bar.sync 0;", "wait for others that do not come"),
        ("setp.lt.s32 %p1, %r90, 4; @%p1 shfl.sync.idx.b32 %r0, %r90, 0, 31, -1;", "wait for others that do not come"),
        ("st.shared.b32 [%r90], %r90;", "no multiple of its width"),
        ("shl.b32 %r1, %r90, 3; st.shared.b64 [%r1+256], %mine;", "writes outside of its shared memory"),
        ("ld.global.b32 {%r0}, [%mine + 4];", "reads outside of its operands"),
        ("st.global.b32 [%a0], {%r90};", "write"),
        ("mov.b32 %r0, 1; st.global.b32 [%mine], {%r0}; ld.global.b32 {%r1}, [%a0];", "what another one writes"),
        ("atom.global.add.u32 %r0, [%a0], 1;", "no instruction"),
    ],
)
def test_what_threads_must_not(body: str, seen: str) -> None:
    with pytest.raises(Faults, match=seen):
        run(body, torch.zeros(64, dtype=torch.int32), threads=64)


@pytest.mark.parametrize(
    ("body", "seen"),
    [
        (
            "mad.wide.s32 %d1, %r90, 4, %a0; st.global.b32 [%d1], {%r90};",
            "a program writes what another one has written",
        ),
        ("ld.global.b32 {%r0}, [%a0]; st.global.b32 [%mine], {%r0};", "a program writes what another one has read"),
        (f"mov.b32 %r0, 1; {STORE} bar.sync 0; ld.global.b32 {{%r1}}, [%a0];", "reads what another one has written"),
    ],
)
def test_what_programs_must_not(body: str, seen: str) -> None:
    with pytest.raises(Faults, match=seen):
        run(body, torch.zeros(64, dtype=torch.int32), grid=(2, 1, 1))


def test_matrices_of_a_warp() -> None:
    """Four of 8 x 8 through shared memory, as they are and the other way round."""
    x = torch.arange(256, dtype=torch.int32).to(torch.int16).view(32, 8)  # a row of a matrix for each lane
    registers = torch.zeros(32, 4, dtype=torch.int32)
    body = """
        mad.wide.s32 %d1, %r90, 16, %a1;
        ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%d1];
        shl.b32 %r10, %r90, 4;
        st.shared.v4.b32 [%r10], {%r1, %r2, %r3, %r4};
        bar.warp.sync -1;"""
    store = "mad.wide.s32 %d2, %r90, 16, %a0; st.global.v4.b32 [%d2], {%r5, %r6, %r7, %r8};"
    for trans in ("", ".trans"):
        load = f"ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {{%r5, %r6, %r7, %r8}}, [%r10];"
        run(body + load + store, registers, x)
        matrices = x.view(4, 8, 8).transpose(1, 2) if trans else x.view(4, 8, 8)
        expected = matrices.reshape(4, 32, 2).contiguous().view(torch.int32)[..., 0].t()
        assert torch.equal(registers, expected)
        back = f"stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 [%r10], {{%r5, %r6, %r7, %r8}}; bar.warp.sync -1;"
        again = "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r10]; st.global.v4.b32 [%d1], {%r1, %r2, %r3, %r4};"
        y = torch.zeros_like(x)
        run(
            body + load + back + again.replace("%d1", "%d3").replace("ld.", "mad.wide.s32 %d3, %r90, 16, %a0; ld.", 1),
            y,
            x,
        )
        assert torch.equal(y, x)
