"""Builds `tts_kernels._C`; everything else is declared in pyproject.toml.

The compilers are called directly rather than through distutils, because every file under csrc/cpu/isa has its own
instruction set and those under csrc/cuda have another compiler, objects are compiled in parallel, and only what changed
is compiled again.

Where the module cannot be built (no C++ compiler, no OpenMP, no Python headers), the package installs without it after
one warning. Where there is no nvcc, the module has no CUDA kernels, and `tts-kernels doctor` says why. Code of ours
that does not compile fails the installation.

Environment: CXX, CXXFLAGS, LDFLAGS; MAX_JOBS, compiler processes at a time (default: one per core); CUDA_HOME, whose
nvcc is taken (default: that of /usr/local/cuda, or the one on the PATH); TTS_KERNELS_CUDA_ARCHS, architectures to
compile for (default: those of "80 90a 100a" that nvcc knows), empty for none; TTS_KERNELS_SANITIZE, e.g.
`address,undefined`, for an instrumented module, without CUDA.
"""

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = Path("csrc")

# -Wmaybe-uninitialized and -Wpsabi speak about GCC's own vector headers; clang knows neither.
WARNINGS = ["-Wall", "-Wextra", "-Wno-maybe-uninitialized", "-Wno-psabi", "-Wno-unknown-warning-option"]

AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mprefer-vector-width=512"]
AMX = [*AVX512, "-mamx-tile", "-mamx-bf16"]

# Files of csrc/cpu/isa that need more than the default flags: the flags, the macro that tells all files that the code
# path is in the module, and statements on `float* x` that compile only where the compiler knows the instructions.
ISA = {
    "avx2": (AVX2, "TTS_HAVE_AVX2", "__m256 a = _mm256_loadu_ps(x); _mm256_storeu_ps(x, _mm256_fmadd_ps(a, a, a));"),
    "avx512": (AVX512, "TTS_HAVE_AVX512", "__m512 a = _mm512_loadu_ps(x); _mm512_storeu_ps(x, _mm512_or_ps(a, a));"),
    "amx": (AMX, "TTS_HAVE_AMX", "_tile_dpbf16ps(0, 1, 2); _mm512_storeu_ps(x, _mm512_setzero_ps());"),
}

CUDA_ARCHS = "80 90a 100a"
ARCH_OF = {"hopper": "90a"}  # folders of csrc/cuda whose kernels are for one architecture

TOOLCHAIN_PROBE = """
#include <Python.h>
#include <omp.h>
#include <vector>
int probe() { return std::vector<int>(omp_get_max_threads()).size() + PY_VERSION_HEX; }
"""

PTXAS_INFO = re.compile(r"ptxas info|    \d+ bytes stack frame")

CUDA_PROBE = """
#include <cuda_runtime.h>
template <typename T>
__global__ void probe(const __grid_constant__ T x) {}
int main() { return cudaGetLastError(); }
"""


class MissingToolchain(Exception):
    """The native module cannot be built on this machine, for a reason that is not our code's."""


class MissingCuda(Exception):
    """Nor can its CUDA kernels."""


class Toolchain:
    """A C++ compiler that was seen to build a Python module with OpenMP, and the flags that every file gets."""

    def __init__(self):
        self.cxx = self._find_compiler()
        try:
            import pybind11
        except ImportError:
            raise MissingToolchain("the Python package pybind11 is not installed") from None

        self.sanitize = os.environ.get("TTS_KERNELS_SANITIZE", "")
        self.flags = ["-std=c++17", f"-I{CSRC}", "-fPIC", "-fopenmp", "-fvisibility=hidden", *WARNINGS]
        includes = {sysconfig.get_path("include"), sysconfig.get_path("platinclude"), pybind11.get_include()}
        for include in sorted(includes):
            self.flags += ["-isystem", include]
        self.link_flags = ["-fopenmp"]
        if sys.platform == "darwin":
            self.link_flags += ["-bundle", "-undefined", "dynamic_lookup"]
        else:
            self.link_flags += ["-shared"]
        if self.sanitize:
            instrument = [f"-fsanitize={self.sanitize}", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"]
            self.flags += ["-O1", "-g", *instrument]
            self.link_flags += instrument
        else:
            self.flags += ["-O3", "-DNDEBUG"]
        self.flags += shlex.split(os.environ.get("CXXFLAGS", ""))
        self.link_flags += shlex.split(os.environ.get("LDFLAGS", ""))

        with tempfile.TemporaryDirectory() as tmp:
            self._probe(Path(tmp))
            self.isa = self._find_isa(Path(tmp))
            self.cuda, self.no_cuda = self._find_cuda(Path(tmp))
        self.flags += [f"-D{ISA[name][1]}=1" for name in self.isa]
        if self.cuda:
            self.link_flags += self.cuda.link_flags

    @staticmethod
    def _find_compiler():
        if os.name == "nt":
            raise MissingToolchain("Windows is not supported")
        named = os.environ.get("CXX")
        candidates = [named] if named else ["c++", "g++", "clang++"]
        for candidate in candidates:
            command = shlex.split(candidate)
            if command and shutil.which(command[0]):
                return command
        raise MissingToolchain(f"no C++ compiler was found (looked for {' '.join(candidates)})")

    def _probe(self, tmp):
        source, module = tmp / "probe.cpp", tmp / "probe.so"
        source.write_text(TOOLCHAIN_PROBE)
        command = [*self.cxx, *self.flags, str(source), "-o", str(module), *self.link_flags]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            said = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise MissingToolchain(f"{self.cxx[0]} cannot build a Python module with OpenMP: {said}")

    def _find_isa(self, tmp):
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return []

        def compiles(name):
            flags, _, statement = ISA[name]
            source = tmp / f"{name}.cpp"
            source.write_text(f"#include <immintrin.h>\nvoid probe(float* x) {{ (void)x; {statement} }}\n")
            command = [*self.cxx, *self.flags, *flags, "-c", str(source), "-o", os.devnull]
            return subprocess.run(command, capture_output=True, check=False).returncode == 0

        with ThreadPoolExecutor() as pool:
            return [name for name, ok in zip(ISA, pool.map(compiles, ISA)) if ok]

    def _find_cuda(self, tmp):
        """(nvcc, None), or (None, why the module is built without)."""
        archs = os.environ.get("TTS_KERNELS_CUDA_ARCHS")
        if not list((CSRC / "cuda").rglob("*.cu")):
            return None, "there is no csrc/cuda"
        if archs is not None and not archs.split():
            return None, "TTS_KERNELS_CUDA_ARCHS is empty"
        if self.sanitize:
            return None, "it is instrumented by a sanitizer"
        try:
            return Nvcc(self.cxx, archs and archs.split(), tmp), None
        except MissingCuda as missing:
            if archs:
                raise CompileError(f"TTS_KERNELS_CUDA_ARCHS asks for {archs}: {missing}") from None
            return None, str(missing)

    def sources(self):
        """(source, its own flags), in link order.

        The order matters: an inline function that two objects hold is taken from the first one, so plainer instruction
        sets come first and no path runs an instruction beyond its own because of a header both include.
        """
        plain = [*sorted((CSRC / "cpu").glob("*.cpp")), *sorted((CSRC / "tree").glob("*.cpp"))]
        isa = {path.stem: path for path in sorted((CSRC / "cpu" / "isa").glob("*.cpp"))}
        plain += [path for name, path in isa.items() if name not in ISA]
        if self.cuda:
            archs = json.dumps(" ".join(self.cuda.archs))
            of_bindings = ["-DTTS_HAVE_CUDA=1", f"-DTTS_CUDA_ARCHS={archs}", *self.cuda.includes]
        else:
            of_bindings = [f"-DTTS_NO_CUDA={json.dumps(self.no_cuda)}"]
        files = [(CSRC / "bindings.cpp", of_bindings), *((path, []) for path in plain)]
        if self.cuda:
            files += [(path, []) for path in sorted((CSRC / "cuda").rglob("*.cu")) if self.cuda.codes(path)]
        return files + [(isa[name], ISA[name][0]) for name in self.isa if name in isa]

    def compile(self, source, flags, objects):
        """Compiles `source` unless the object is newer than all it was made from and was made by the same command."""
        target = objects / source.relative_to(CSRC).with_suffix(".o")
        compiler = [*self.cxx, *self.flags]
        if source.suffix == ".cu":
            compiler = [self.cuda.nvcc, *self.cuda.flags, *self.cuda.codes(source)]
        dependencies, said, heard = (target.with_suffix(suffix) for suffix in (".d", ".cmd", ".log"))
        command = [*compiler, *flags, "-MMD", "-MF", str(dependencies), "-c", str(source), "-o", str(target)]
        if not _is_current(target, dependencies, said, command):
            target.parent.mkdir(parents=True, exist_ok=True)
            said.unlink(missing_ok=True)
            began = time.time_ns()
            heard.write_text(_run(command, f"{compiler[0]} {shlex.join([str(source), *flags])}"))
            os.utime(target, ns=(began, began))  # what changes while it compiles is newer
            said.write_text(shlex.join(command))
        return target

    def link(self, targets, module):
        module.parent.mkdir(parents=True, exist_ok=True)
        # Written beside and moved into place: a process that has the old module mapped keeps it.
        fresh = module.with_name(f".{module.name}.{os.getpid()}")
        _run([*self.cxx, *map(str, targets), "-o", str(fresh), *self.link_flags], f"{self.cxx[0]} -o {module}")
        fresh.replace(module)


class Nvcc:
    """An nvcc that was seen to compile; every object holds the code of all the architectures, where ARCH_OF does not
    say otherwise."""

    def __init__(self, cxx, archs, tmp):
        self.nvcc = self._find()
        # The word of CXX that is the compiler: not a launcher before it, not a flag behind it.
        host = [word for word in cxx if not word.startswith("-")][-1]
        # Products and sums stay apart except where the kernels say fma: their bits are not the compiler's choice.
        self.flags = ["-std=c++17", "-O3", "--fmad=false", "-DNDEBUG", "-DTTS_HAVE_CUDA=1", f"-I{CSRC}", "-ccbin", host]
        self.flags += ["-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
        self.source = tmp / "probe.cu"
        self.source.write_text(CUDA_PROBE)

        refused = {arch: self._probe(arch, "--dryrun")[0] for arch in archs or CUDA_ARCHS.split()}
        self.archs = [arch for arch, why in refused.items() if not why]
        if not self.archs or (archs and archs != self.archs):
            raise MissingCuda(next(why for why in refused.values() if why))
        why, _ = self._probe(self.archs[0], "-o", str(tmp / "probe.o"))
        if why:
            raise MissingCuda(why)
        if "90a" in self.archs:
            self.flags += ["-DTTS_HAVE_HOPPER=1"]
        said = self._probe(self.archs[0], "--dryrun")[1]
        self.includes = []  # for files of the C++ compiler that name CUDA's types
        for folder in dict.fromkeys(re.findall(r'"-I([^"]*)"', said)):
            self.includes += ["-isystem", folder]
        # Static: it loads the driver on first use, so the module can be imported where there is none.
        self.link_flags = [self._runtime(re.findall(r'"-L([^"]*)"', said)), "-ldl", "-lrt", "-lpthread"]

    def codes(self, source):
        """The flags that say for which architectures a file is compiled; none: it is left out."""
        only = ARCH_OF.get(source.parent.name)
        archs = [arch for arch in self.archs if only in (None, arch)]
        flags = [flag for arch in archs for flag in self._code(arch)]
        # The oldest one's PTX too, from which drivers make code for GPUs that are none of these.
        oldest = min(self.archs, key=lambda arch: int(re.match(r"\d+", arch)[0]))
        if not only and oldest.isdigit():
            flags += ["-gencode", f"arch=compute_{oldest},code=compute_{oldest}"]
        return flags

    @staticmethod
    def _find():
        home = os.environ.get("CUDA_HOME")
        if home:
            found = shutil.which("nvcc", path=os.path.join(home, "bin"))
        else:
            found = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
        if not found:
            raise MissingCuda(f"no nvcc was found{f' in CUDA_HOME={home}' if home else ''}")
        return found

    @staticmethod
    def _code(arch):
        return ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]

    def _probe(self, arch, *more):
        """(why the probe does not compile for the architecture, or None; what nvcc said)"""
        command = [self.nvcc, *self.flags, *self._code(arch), "-c", str(self.source), *more]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if not done.returncode:
            return None, done.stderr
        said = next((line for line in done.stderr.splitlines() if re.search("error|fatal", line)), done.stderr.strip())
        return f"{self.nvcc} for {arch}: {said}", done.stderr

    def _runtime(self, folders):
        for path in (Path(folder, "libcudart_static.a") for folder in folders):
            if path.exists():
                return str(path)
        raise MissingCuda(f"{self.nvcc} comes without libcudart_static.a")


def _is_current(target, dependencies, said, command):
    try:
        if said.read_text() != shlex.join(command):
            return False
        made = target.stat().st_mtime_ns
        needed = shlex.split(dependencies.read_text().replace("\\\n", " ").partition(":")[2])
        return all(os.stat(path).st_mtime_ns <= made for path in needed)
    except OSError:
        return False


def _run(command, summary):
    sys.stdout.write(f"{summary}\n")
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise CompileError(f"{shlex.join(command)}\n{done.stderr}exit status {done.returncode}")
    # Registers and spills of each kernel are for the log that is kept beside the object.
    sys.stderr.writelines(line for line in done.stderr.splitlines(True) if not PTXAS_INFO.match(line))
    return done.stderr


class BuildExt(build_ext):
    def run(self):
        try:
            self.toolchain = Toolchain()
        except MissingToolchain as missing:
            self.extensions = []
            self.warn_without_module(missing)
        super().run()

    def build_extension(self, extension):
        os.chdir(ROOT)
        kind = self.toolchain.sanitize.replace(",", "-") or "release"
        # Not self.build_temp: an editable install would throw the objects away.
        objects = Path("build", f"objects-{kind}-{sysconfig.get_platform()}-{sys.implementation.cache_tag}")
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
            files = self.toolchain.sources()
            # CUDA files first, since they take longest.
            order = sorted(range(len(files)), key=lambda i: files[i][0].suffix != ".cu")
            compiled = {i: pool.submit(self.toolchain.compile, *files[i], objects) for i in order}
            try:
                targets = [compiled[i].result() for i in range(len(files))]
            except CompileError:
                pool.shutdown(cancel_futures=True)
                raise
        self.toolchain.link(targets, Path(self.get_ext_fullpath(extension.name)))

    @staticmethod
    def warn_without_module(reason):
        lines = [
            f"tts_kernels is built without its native module: {reason}.",
            "CPU tensors will run on the plain torch `reference` backend, without the `cpu` one.",
            "To have it, install a C++17 compiler with OpenMP (for example g++), then install tts_kernels again.",
        ]
        print(*(f"warning: {line}" for line in lines), sep="\n", file=sys.stderr, flush=True)


setup(
    ext_modules=[Extension("tts_kernels._C", sources=["csrc/bindings.cpp"])],
    cmdclass={"build_ext": BuildExt},
)
