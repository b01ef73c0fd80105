"""What nvcc made of csrc/cuda: the kernels in the objects that `setup.py` keeps, by ptxas' log beside each and by their
machine code. `cuda_limits.json` and the rules here say what the figures may be."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tts_kernels.configs import cuda_tree_config

from . import assembly
from .archs import ARCHS, Arch

LIMITS = Path(__file__).with_name("cuda_limits.json")
BUILD = Path(__file__).resolve().parents[2] / "build"

ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FUNCTION = re.compile(r"^\s*Function : (\w+)", re.MULTILINE)
THREADS = re.compile(r"^\.nv\.info\.(\w+)\n(?:(?!^\.nv).*\n)*?\s*Attribute:\s+EIATTR_MAX_THREADS\n.*\n"
                     r"\s*Value:\s+(0x[0-9a-f]+)", re.MULTILINE)  # fmt: skip
COMPLAINT = re.compile(r"\(C75\d\d\) .*")
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class Kernel:
    """shared is dynamic shared memory: of tree attention the most that a call can ask for on the architecture. That of
    the others depends on the call, a few KiB, and bounds none of them: it is not counted."""

    registers: int
    spills: dict[str, int]
    shared: int
    threads: int
    instructions: dict[str, int] = field(repr=False)
    complaints: tuple[str, ...] = ()  # of ptxas: products of warpgroups one by one, registers not handed over

    def blocks(self, arch: Arch) -> int:
        return arch.blocks(self.registers, self.shared, self.threads // 32)

    def count(self, *beginnings: str) -> int:
        """Instructions whose name begins so."""
        return sum(count for name, count in self.instructions.items() if name.startswith(beginnings))

    @property
    def mma(self) -> int:
        """Products of warps (HMMA) and of warpgroups (HGMMA)."""
        return self.count("HMMA", "HGMMA")

    @property
    def copies(self) -> dict[int, int]:
        """Asynchronous copies from global to shared memory, by the bytes that a thread copies."""
        counts: Counter[int] = Counter()
        for name, count in self.instructions.items():
            if name.startswith("LDGSTS"):
                width = next((int(word) for word in name.split(".") if word in ("64", "128")), 32)  # bits
                counts[width // 8] += count
        return dict(counts)


def objects_folder() -> Path:
    return BUILD / f"objects-release-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def missing() -> str | None:
    """Why there is nothing to look at here."""
    try:
        from tts_kernels import _C as native
    except ImportError as error:
        return f"the native module is not built: {error}"
    if hasattr(native, "no_cuda"):
        return f"the native module has no CUDA kernels: {native.no_cuda}"
    if not list(objects_folder().glob("cuda/**/*.log")):
        return f"there are no objects of csrc/cuda in {objects_folder()}"
    absent = [tool for tool in ("cuobjdump", "nvdisasm") if not tool_path(tool).exists()]
    if absent or not shutil.which("c++filt"):
        return f"there is no {' and no '.join(absent or ['c++filt'])}"
    return None


def tool_path(name: str) -> Path:
    """Of NVIDIA's tools that come with triton."""
    import triton

    return Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name


def kernels(folder: Path, shared_bytes: Callable[[str, Arch], int]) -> dict[tuple[str, str], Kernel]:
    """By (architecture, name). shared_bytes: of a kernel of that name."""
    found = {}
    for log in sorted(folder.glob("cuda/**/*.log")):
        text = log.read_text()
        entries = list(ENTRY.finditer(text))
        starts = [entry.start() for entry in entries] + [len(text)]
        names = demangled({entry[1] for entry in entries})
        made = log.with_suffix(".o")
        complaints = COMPLAINT.findall(text)
        threads: dict[tuple[str, str], int] = {}
        instructions: dict[tuple[str, str], dict[str, int]] = {}
        for code in {entry[2] for entry in entries}:
            threads |= {(code, name): int(value, 0) for name, value in THREADS.findall(dump(made, "-elf", code))}
            listing = FUNCTION.split(dump(made, "-sass", code))
            for name, body in zip(listing[1::2], listing[2::2]):
                instructions[code, name] = dict(Counter(INSTRUCTION.findall(body)))
        for entry, end in zip(entries, starts[1:]):
            symbol, code = entry.groups()
            arch = ARCHS[code.rstrip("af")]
            figures = assembly.ptxas_resources(text[entry.start() : end])
            found[code, names[symbol]] = Kernel(
                registers=figures["registers"],
                spills=figures["spills"],
                shared=figures["shared"] + shared_bytes(names[symbol], arch),
                threads=threads[code, symbol],
                instructions=instructions[code, symbol],
                complaints=tuple(said for said in complaints if symbol in said or "function" not in said),
            )
    return found


def dump(made: Path, what: str, code: str) -> str:
    command = [str(tool_path("cuobjdump")), what, "-arch", code, str(made)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def demangled(symbols: set[str]) -> dict[str, str]:
    """As in the source, without namespaces and parameters: "tree_attention_kernel<BF16, 128>"."""
    symbols = sorted(symbols)
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    names = {}
    for symbol, full in zip(symbols, done.stdout.splitlines()):
        full = full.replace("(anonymous namespace)", "unnamed").partition("(")[0].removeprefix("void ")
        names[symbol] = re.sub(r"\w+::", "", full)
    return names


def tree_shared_bytes(name: str, arch: Arch) -> int:
    """Of the two kinds of caches, the one that takes more: with the stages that it has on the architecture."""
    match = re.fullmatch(r"tree_(attention|hopper)_kernel<\w+, (\d+)>", name)
    if not match:
        return 0
    from tts_kernels import _C as native

    head_dim, sizes = int(match[2]), []
    if match[1] == "hopper":
        return native.cuda_tree_hopper_shared_bytes(head_dim, 3)
    for fp8 in (False, True):

        def size(stages: int, fp8=fp8) -> int:
            return native.cuda_tree_attention_shared_bytes(head_dim, stages, fp8)

        config = cuda_tree_config("", head_dim, 8, 1 if fp8 else 2, 32, lambda n, _: size(n) <= arch.shared_per_block)
        sizes.append(size(config.num_stages))
    return max(sizes)


def broken_rules(name: str, arch: Arch, kernel: Kernel) -> list[str]:
    """What every kernel has to keep, whatever the limits say."""
    broken = [f"spills: {count} {what}" for what, count in kernel.spills.items() if count]
    if kernel.shared > arch.shared_per_block:
        broken.append(f"{kernel.shared} bytes of shared memory, a block may have {arch.shared_per_block}")
    elif not kernel.blocks(arch):
        broken.append(f"no block fits: {kernel.threads} threads of {kernel.registers} registers")
    broken += [f"ptxas: {said}" for said in kernel.complaints]
    if name.startswith("tree_"):
        if not kernel.mma:
            broken.append("no tensor core instruction (HMMA, HGMMA)")
        if name.startswith("tree_hopper") and not (kernel.count("HGMMA") and kernel.count("UTMALDG")):
            broken.append("products of warpgroups and tile copies: expected HGMMA and UTMALDG, got none")
        narrow = {width: count for width, count in kernel.copies.items() if width < assembly.WIDE}
        if narrow or not kernel.copies:
            broken.append(f"copies of KV: expected all of 16 bytes (LDGSTS.128), got {kernel.copies}")
    return broken


def recorded(arch: Arch, kernel: Kernel) -> dict[str, int]:
    return {"registers": kernel.registers, "shared": kernel.shared, "blocks": kernel.blocks(arch)}


def exceeded(arch: Arch, kernel: Kernel, limits: dict | None) -> list[str]:
    if limits is None:
        return ["no limits: python -m benchmarks.static --update-limits"]
    now = recorded(arch, kernel)
    broken = [f"{name}: expected at most {limits[name]}, got {now[name]}"
              for name in ("registers", "shared") if now[name] > limits[name]]  # fmt: skip
    if now["blocks"] < limits["blocks"]:
        broken.append(f"blocks: expected at least {limits['blocks']}, got {now['blocks']}")
    return broken


def compiler(folder: Path) -> str:
    """The nvcc that made the objects, by its release: limits are for one."""
    nvcc = next(folder.glob("cuda/**/*.cmd")).read_text().split()[0]
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"V([\d.]+)", said)[1]


def table(found: dict[tuple[str, str], Kernel]) -> str:
    """As the table of the Triton kernels."""
    width = max(len(name) for _, name in found)
    lines = []
    for code in dict.fromkeys(code for code, _ in found):
        arch = ARCHS[code.rstrip("af")]
        lines.append(f"{code:{width}}  regs  spill  shared  blocks  warps  copies of 16 B  HMMA, HGMMA")
        for name, kernel in sorted((name, k) for (c, name), k in found.items() if c == code):
            blocks = kernel.blocks(arch)
            lines.append(
                f"{name:{width}}  {kernel.registers:4}  {sum(kernel.spills.values()):5}  {kernel.shared / 1024:4.0f} K"
                f"  {blocks:6}  {blocks * kernel.threads // 32:2}/{arch.max_warps}"
                f"  {kernel.copies.get(assembly.WIDE, 0):14}  {kernel.mma:4}"
            )
        lines.append("")
    return "\n".join(lines)


def violations(found: dict[tuple[str, str], Kernel], limits: dict, made_by: str) -> list[str]:
    same_compiler = limits["nvcc"] == made_by
    if not same_compiler:
        print(f"limits are for nvcc {limits['nvcc']}, this is {made_by}: only the rules are checked")
    broken = []
    for (code, name), kernel in found.items():
        arch = ARCHS[code.rstrip("af")]
        texts = broken_rules(name, arch, kernel)
        if same_compiler:
            texts += exceeded(arch, kernel, limits["limits"].get(code, {}).get(name))
        broken += [f"{code} {name}: {text}" for text in texts]
    codes = {code for code, _ in found}
    stale = {(code, name) for code in codes for name in limits["limits"].get(code, {})} - found.keys()
    return broken + [f"{code} {name}: has limits, but there is no such kernel" for code, name in sorted(stale)]


def update(path: Path, found: dict[tuple[str, str], Kernel], made_by: str) -> None:
    """All of the architectures that there are objects for."""
    limits = read(path)["limits"]
    for code in {code for code, _ in found}:
        arch = ARCHS[code.rstrip("af")]
        limits[code] = {name: recorded(arch, kernel) for (c, name), kernel in sorted(found.items()) if c == code}
    parts = []
    for code in sorted(limits):
        lines = ",\n".join(f"      {json.dumps(name)}: {json.dumps(limit)}" for name, limit in limits[code].items())
        parts.append(f"    {json.dumps(code)}: {{\n{lines}\n    }}")
    path.write_text(f'{{\n  "nvcc": {json.dumps(made_by)},\n  "limits": {{\n' + ",\n".join(parts) + "\n  }\n}\n")


def read(path: Path) -> dict:
    """{"nvcc": the release that they are for, "limits": {architecture: {kernel: limits}}}"""
    return json.loads(path.read_text()) if path.exists() else {"nvcc": "", "limits": {}}


def check(update_limits: bool, path: Path = LIMITS, shared_bytes: Callable = tree_shared_bytes) -> list[str]:
    """Prints the table, and returns what is wrong with it."""
    folder = objects_folder()
    found = kernels(folder, shared_bytes)
    made_by = compiler(folder)
    print(table(found))
    if update_limits:
        update(path, found, made_by)
        print(f"wrote {path}")
    return violations(found, read(path), made_by)
