"""What the text that compilers leave says: ptxas' log, PTX and AMD's assembly."""

from __future__ import annotations

import ast
import functools
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

# Tensor core instructions, by what stands at the beginning of the name in limits and tables.
MMA = re.compile(r"\b(?:(wgmma)\.mma_async|(mma\.sync)|(tcgen05)\.mma|v_s?(mfma))[\w.:]*")
# Multiply-adds of fp32 on the ordinary units: what tl.dot becomes where no tensor core takes it. Softmax has some too.
FMA = re.compile(r"\b(?:fma\.rn(?:\.ftz)?\.f32(?:x2)?|v_(?:pk_)?fmac?_f32)")
# The last alternative is TMA, a block at a time.
PTX_LOAD = re.compile(
    r"\bld\.global(?P<suffix>[\w.:]*)"
    r"|\bcp\.async\.c[ag]\.shared\.global[\w.:]*\s*\[[^]]*\]\s*,\s*\[[^]]*\]\s*,\s*(?P<bytes>0x[0-9a-f]+|\d+)"
    r"|\b(?P<tma>cp\.async\.bulk\.tensor\.\dd\.shared)"
)
AMD_LOAD = re.compile(r"\b(?:global|buffer|flat)_load_(?:lds_)?(?P<suffix>\w+)")
AMD_WIDTHS = {"dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16, "ushort": 2, "sshort": 2, "short": 2, "ubyte": 1,
              "sbyte": 1}  # fmt: skip
WIDE = 16  # bytes, the most that one load of one thread takes on all four architectures

PLACE = re.compile(r"\s*\.loc\s+(\d+)\s+(\d+)")
FILE = re.compile(r'\s*\.file\s+(\d+)\s+"([^"]*)"(?:\s+"([^"]*)")?')


def ptxas_resources(log: str) -> dict:
    """Of `ptxas -v`: registers per thread, static shared memory and spills in bytes. The spills are those of all
    functions of the kernel."""
    registers = re.search(r"Used (\d+) registers", log)
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if not registers or not spills:
        raise ValueError(f"log: expected what ptxas -v says of registers and spills, got {log!r}")
    shared = re.search(r"(\d+) bytes smem", log)
    return {
        "registers": int(registers[1]),
        "shared": int(shared[1]) if shared else 0,
        "spills": {
            "bytes stored": sum(int(stored) for stored, _ in spills),
            "bytes loaded": sum(int(loaded) for _, loaded in spills),
        },
    }


def amd_resources(text: str) -> dict:
    """Of the metadata in AMD's assembly. `.vgpr_count` counts AGPRs too."""

    def value(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s+(\d+)$", text, re.MULTILINE)
        if not found:
            raise ValueError(f"text: expected assembly with .{name} in its metadata, got none")
        return int(found[1])

    return {
        "registers": value("vgpr_count"),
        "shared": value("group_segment_fixed_size"),
        "spills": {
            "VGPRs": value("vgpr_spill_count"),
            "SGPRs": value("sgpr_spill_count"),
            "bytes of scratch": value("private_segment_fixed_size"),
        },
    }


def instructions(text: str) -> dict[str, int]:
    """How many tensor core instructions of each name there are in the text, and under "fma" the fp32 multiply-adds."""
    counts = Counter(match[0] for match in MMA.finditer(text))
    counts["fma"] = sum(1 for _ in FMA.finditer(text))
    return dict(counts)


def mma_kinds(counts: dict[str, int]) -> dict[str, int]:
    """`instructions` by kind: wgmma, mma.sync, tcgen05, mfma. Where there are none: fma, or nothing at all."""
    kinds: Counter[str] = Counter()
    for name, count in counts.items():
        if match := MMA.match(name):
            kinds[next(filter(None, match.groups()))] += count
    if not kinds and counts["fma"]:
        kinds["fma"] = counts["fma"]
    return dict(kinds)


def loads(text: str) -> list[tuple[str, int, int]]:
    """(statement of the kernel's source, bytes that one thread loads, how many such instructions) of all loads from
    global memory. TMA counts as WIDE."""
    files = {int(number): str(Path(first, rest or "")) for number, first, rest in FILE.findall(text)}
    counts: Counter[tuple[str, int]] = Counter()
    file = line = 0
    for row in text.splitlines():
        if place := PLACE.match(row):
            file, line = int(place[1]), int(place[2])
        for width in widths(row):
            counts[statement(files.get(file, ""), line), width] += 1
    return [(source, width, count) for (source, width), count in counts.items()]


def widths(row: str) -> Iterator[int]:
    for match in PTX_LOAD.finditer(row):
        if match["tma"]:
            yield WIDE
        elif match["bytes"]:
            yield int(match["bytes"], 0)
        else:
            vector = re.search(r"\.v(\d)", match["suffix"])
            bits = re.search(r"\.[busf](\d+)$", match["suffix"])
            if not bits:
                raise ValueError(f"row: expected a load whose type says its width, got {row!r}")
            yield int(bits[1]) // 8 * (int(vector[1]) if vector else 1)
    for match in AMD_LOAD.finditer(row):
        suffix = match["suffix"].partition("_")[0]
        if suffix not in AMD_WIDTHS:
            raise ValueError(f"row: expected a load of a known width, got {row!r}")
        yield AMD_WIDTHS[suffix]


def statement(file: str, line: int) -> str:
    """The whole statement that the line belongs to, in one line; "" where the compiler does not say."""
    return statements(file).get(line, "") if file and line else ""


@functools.cache
def statements(file: str) -> dict[int, str]:
    source = Path(file).read_text()
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            text = " ".join((ast.get_source_segment(source, node) or "").split())
            found.update(dict.fromkeys(range(node.lineno, node.end_lineno + 1), text))
    return found
