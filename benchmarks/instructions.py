"""Count the instructions of compiled kernels: of each innermost loop, and of what surrounds it.

    python benchmarks/instructions.py LIBRARY FUNCTION... [--cpu znver4] [--mca llvm-mca]

FUNCTION is a name in the library's table of symbols, or a part of one that no other has. A loop is
listed by its address with the instructions of one round: those that multiply and add (dot), other
ones of vectors, reads of memory, prefetches, stores. `around` are the fewest instructions from the
function's start to its end through that loop without its rounds: what a call costs besides.
Cycles are those of `llvm-mca`, which simulates a processor whose memory never lets it wait.
"""

from __future__ import annotations

import argparse
import itertools
import re
import subprocess
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Rounds that are simulated, for the cycles of one.
ROUNDS = 200
DOT = re.compile(r"vpdp|vdpbf16|vpmadd|vpmaddubs|vfn?m(add|sub)")
LINE = re.compile(r"^\s*([0-9a-f]+):\t(?:data16 |cs |bnd )*(\S+)\s*(.*)$")


@dataclass(frozen=True, slots=True)
class Instruction:
    """An instruction at an address; `target`: where it may jump to."""

    address: int
    name: str
    operands: str
    target: int | None

    @property
    def kind(self) -> str:
        if self.name.startswith("prefetch"):
            return "prefetch"
        if DOT.match(self.name):
            return "dot"
        return "vector" if self.name.startswith("v") else "scalar"

    @property
    def memory(self) -> str | None:
        """Whether memory is read or stored to."""
        if "(" not in self.operands or self.name.startswith(("lea", "nop", "prefetch")):
            return None
        is_last = self.operands.rstrip().endswith(")")
        only_reads = self.name.startswith(("cmp", "test", "vcmp", "push"))
        return "stored" if is_last and not only_reads else "read"


def disassemble(library: Path, function: str) -> dict[int, Instruction]:
    """Return the instructions of a function by address, in order.

    Raises:
        SystemExit: no function, or more than one, has that name.
    """
    table = subprocess.run(["nm", library], capture_output=True, text=True, check=True).stdout
    names = [line.split()[-1] for line in table.splitlines() if line.split()[-2] in "tT"]
    found = [name for name in names if name == function]
    found = found or [name for name in names if function in name]
    if len(set(found)) != 1:
        raise SystemExit(f"{library} has {len(found)} functions named {function}")
    words = ["objdump", "-d", "--no-show-raw-insn", f"--disassemble={found[0]}", library]
    text = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    instructions = {}
    for line in text.splitlines():
        if (match := LINE.match(line)) is None:
            continue
        operands = match[3].partition("#")[0]
        jump = re.match(r"([0-9a-f]+) <", operands) if match[2].startswith("j") else None
        address = int(match[1], 16)
        target = int(jump[1], 16) if jump else None
        instructions[address] = Instruction(address, match[2], operands, target)
    return instructions


def edges(code: dict[int, Instruction]) -> dict[int, list[int]]:
    """Return the addresses that may follow each one."""
    order = list(code)
    following = dict(itertools.pairwise(order))
    found = {}
    for address, each in code.items():
        nexts = [each.target] if each.target in code else []
        if each.name not in ("ret", "jmp", "jmpq") and address in following:
            nexts.append(following[address])
        found[address] = nexts
    return found


def reachable(graph: dict[int, list[int]], start: Iterable[int], inside: set[int]) -> set[int]:
    """Return what can be reached from any start within a set."""
    seen: set[int] = set()
    queue = [each for each in start if each in inside]
    while queue:
        at = queue.pop()
        if at not in seen:
            seen.add(at)
            queue += [each for each in graph[at] if each in inside]
    return seen


def innermost_loops(graph: dict[int, list[int]]) -> list[list[int]]:
    """Return the addresses of each loop that holds no other."""
    backward: dict[int, list[int]] = {at: [] for at in graph}
    for at, nexts in graph.items():
        for each in nexts:
            backward[each].append(at)

    def loops(inside: set[int]) -> list[list[int]]:
        found, left = [], set(inside)
        while left:
            at = min(left)
            cycle = reachable(graph, graph[at], inside) & reachable(backward, backward[at], inside)
            left -= cycle | {at}
            if at in cycle:
                # Without its first address a loop falls apart, except for loops in it.
                found += loops(cycle - {at}) or [sorted(cycle)]
        return found

    return loops(set(graph))


def path(graph: dict[int, list[int]], start: Iterable[int], ends: set[int]) -> list[int]:
    """Return the shortest way from one of the starts to one of the ends, both included."""
    came: dict[int, int | None] = dict.fromkeys(start)
    queue = deque(came)
    while queue:
        at = queue.popleft()
        if at in ends:
            way = [at]
            while (before := came[way[-1]]) is not None:
                way.append(before)
            return way[::-1]
        for each in graph[at]:
            if each not in came:
                came[each] = at
                queue.append(each)
    return []


def cycles(code: Sequence[Instruction], cpu: str, mca: str) -> float:
    """Return the cycles of instructions that are repeated."""
    # Where a jump goes does not matter; a call is not simulated.
    lines = [
        f"{each.name} {'0' if each.target is not None else each.operands}"
        for each in code
        if not each.name.startswith(("call", "ret", "nop", "vzero"))
    ]
    text = re.sub(r"<[^>]*>", "", "\n".join(lines))
    words = [mca, "-mtriple=x86_64", f"-mcpu={cpu}", f"-iterations={ROUNDS}", "-"]
    done = subprocess.run(words, input=text, capture_output=True, text=True, check=True)
    total = re.search(r"Total Cycles:\s+(\d+)", done.stdout)
    assert total is not None
    return int(total[1]) / ROUNDS


def show(what: str, code: Sequence[Instruction], cpus: Sequence[str], mca: str) -> None:
    """Print the counts of some instructions."""
    kinds = Counter(each.kind for each in code)
    memory = Counter(each.memory for each in code)
    counts = [len(code), *(kinds[kind] for kind in ("dot", "vector", "prefetch"))]
    counts += [memory["read"], memory["stored"]]
    simulated = [f"{cycles(code, cpu, mca):9.1f}" for cpu in cpus]
    print(f"{what:26}" + "".join(f"{count:9}" for count in counts) + "".join(simulated))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("library", type=Path)
    parser.add_argument("functions", nargs="+")
    parser.add_argument("--cpu", nargs="+", default=["znver4"], help="processors of llvm-mca")
    parser.add_argument("--mca", default="llvm-mca", help="the program")
    given = parser.parse_args()
    heads = ("all", "dot", "vector", "prefetch", "read", "stored", *given.cpu)
    for name in given.functions:
        code = disassemble(given.library, name)
        graph = edges(code)
        print(f"\n{name:26}" + "".join(f"{head[:8]:>9}" for head in heads))
        ends = {at for at, each in code.items() if each.name.startswith("ret")}
        for loop in innermost_loops(graph):
            show(f"loop at {loop[0]:x}", [code[at] for at in loop], given.cpu, given.mca)
            before = path(graph, [min(code)], set(loop))[:-1]
            leaving = [each for at in loop for each in graph[at] if each not in loop]
            around = before + path(graph, leaving, ends)
            if around:
                show("  around", [code[at] for at in around], given.cpu, given.mca)


if __name__ == "__main__":
    main()
