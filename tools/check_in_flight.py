"""Finds instructions that write registers which a warpgroup product in flight still reads.

    cuobjdump -sass mamba2_cuda/_ops.abi3.so | python tools/check_in_flight.py

A product (HGMMA) reads its A fragments from registers until a wait says that it is complete. The
assembler keeps them up to a wait on the way forward, but has been seen to give them away around a
loop, without a warning: the product then reads what is written for the next one. This follows every
branch of every kernel, backward ones too, and fails on such a write.
"""

import re
import sys

FUNCTION = re.compile(r"^\s*Function : (\S+)")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
REGISTER = re.compile(r"R(\d+)\b")
NO_RESULT = re.compile(r"(ST|RED|SYNCS|UTMA|R2UR|WARPGROUP|BAR|BRA|MEMBAR|CCTL|HGMMA|.*SETP)")


class Instruction:
    """One line: its address, whether it always happens, opcode, operands."""

    def __init__(self, found):
        self.address, self.guard, self.opcode = int(found[1], 16), found[2], found[3]
        self.operands = [operand.strip() for operand in found[4].split(",")]

    def writes(self):
        """The vector registers that it writes."""
        first = REGISTER.match(self.operands[0])
        if not first or NO_RESULT.match(self.opcode):
            return range(0)
        wide = 4 if ".128" in self.opcode else 2 if re.search(r"\.64\b|WIDE", self.opcode) else 1
        if matrices := re.match(r"LDSM.*\.([124])$", self.opcode):
            wide = int(matrices[1])
        return range(int(first[1]), int(first[1]) + wide)

    def fragments(self):
        """The A registers of a product, if it has any."""
        if self.opcode.startswith("HGMMA") and (a := REGISTER.match(self.operands[1])):
            return range(int(a[1]), int(a[1]) + 4)
        return range(0)

    def successors(self, following):
        if self.opcode.startswith(("EXIT", "RET")) and not self.guard:
            return []
        if not self.opcode.startswith("BRA"):
            return following
        target = re.search(r"0x([0-9a-f]+)", self.operands[-1])
        taken = [int(target[1], 16)] if target else []
        always = not self.guard and len(self.operands) == 1 and self.opcode == "BRA"
        return taken if always else taken + following


def functions(text):
    """The instructions of each kernel, by name."""
    kernels, current = {}, []
    for line in text.splitlines():
        if name := FUNCTION.match(line):
            current = kernels.setdefault(name[1], [])
        elif found := INSTRUCTION.match(line):
            current.append(Instruction(found))
    return kernels


def after(instruction, groups):
    """What is in flight after an instruction: the registers of every group of products, oldest
    first; the last group is still open."""
    if "DEPBAR" in instruction.opcode and "gsb0" in instruction.operands:
        pending = int(instruction.operands[-1], 16)
        closed = groups[:-1]
        return (*closed[len(closed) - pending :], groups[-1]) if pending else (groups[-1],)
    if not instruction.opcode.startswith("HGMMA"):
        return groups
    groups = (*groups[:-1], groups[-1] | frozenset(instruction.fragments()))
    return (*groups, frozenset()) if "gsb0" in instruction.operands else groups


def joined(one, other):
    """In flight on one way or the other; the newest groups correspond."""
    count = max(len(one), len(other))
    one, other = ((frozenset(),) * (count - len(g)) + g for g in (one, other))
    return tuple(a | b for a, b in zip(one, other))


def hazards(code):
    """The instructions that write what a product in flight reads."""
    at = {instruction.address: k for k, instruction in enumerate(code)}
    before, found = {}, {}
    for entry in range(len(code)):
        # No branch leads to the start, and none that says so to what a table of addresses names.
        todo = [] if entry in before else [entry]
        before.setdefault(entry, (frozenset(),))
        while todo:
            k = todo.pop()
            instruction, groups = code[k], before[k]
            if frozenset().union(*groups).intersection(instruction.writes()):
                found[k] = instruction
            following = [code[k + 1].address] if k + 1 < len(code) else []
            then = after(instruction, groups)
            for n in (at[a] for a in instruction.successors(following) if a in at):
                met = joined(before[n], then) if n in before else then
                if met != before.get(n):
                    before[n] = met
                    todo.append(n)
    return [found[k] for k in sorted(found)]


def main(text):
    kernels = functions(text)
    with_products = {n: c for n, c in kernels.items() if any(i.fragments() for i in c)}
    bad = 0
    for name, code in with_products.items():
        for instruction in hazards(code):
            bad += 1
            print(f"{name} {instruction.address:#x}: {instruction.opcode} {instruction.operands}")
    print(f"{len(kernels)} kernels, {len(with_products)} with fragments in registers, {bad} writes")
    if not with_products:
        print("no product was found: nothing was checked")
    return 1 if bad or not with_products else 0


if __name__ == "__main__":
    sys.exit(main(sys.stdin.read()))
