"""setup.py, on copies of the package with a native module of a few lines: what it builds, and what when it cannot."""

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = next(filter(shutil.which, ["c++", "g++", "clang++"]), None)

pytestmark = pytest.mark.skipif(
    not (ROOT / "setup.py").exists() or sys.platform == "win32", reason="needs the source tree, on Linux or macOS"
)
NVCC = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_nvcc = pytest.mark.skipif(COMPILER is None or NVCC is None, reason="no nvcc")

MODULE = """
#include <Python.h>

#include "cpu/answer.h"

int cuda_answer();
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_C", nullptr, 0, nullptr, nullptr, nullptr, nullptr, nullptr};

PyMODINIT_FUNC PyInit__C() {
  PyObject* module = PyModule_Create(&definition);
  PyModule_AddIntConstant(module, "answer", ANSWER);
#ifdef TTS_HAVE_AVX2
  PyModule_AddIntConstant(module, "avx2", avx2_answer());
#endif
#ifdef TTS_HAVE_AMX
  PyModule_AddIntConstant(module, "amx", 1);
#endif
#ifdef TTS_NO_CUDA
  PyModule_AddStringConstant(module, "no_cuda", TTS_NO_CUDA);
#endif
#ifdef TTS_HAVE_CUDA
  PyModule_AddStringConstant(module, "cuda_archs", TTS_CUDA_ARCHS);
  PyModule_AddIntConstant(module, "cuda", cuda_answer());
#endif
  return module;
}
"""
KERNEL = """
#include <cuda_runtime.h>

#include "cuda/brick.cuh"

#ifndef TTS_HAVE_CUDA
#error not told
#endif

__global__ void triple(float* x) { x[threadIdx.x] = brick(x[threadIdx.x]); }

int cuda_answer() {
  triple<<<1, 32>>>(nullptr);  // without a driver an error, with one nothing: the kernel is never waited for
  cudaGetLastError();
  return ANSWER;
}
"""
BRICK = "#define ANSWER 3\ninline __device__ float brick(float x) { return 3 * x; }\n"


@pytest.fixture
def copy(tmp_path):
    """The source tree without its C++."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    ignore = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "tts_kernels", tmp_path / "tts_kernels", ignore=ignore)
    (tmp_path / "csrc" / "cpu" / "isa").mkdir(parents=True)
    (tmp_path / "csrc" / "bindings.cpp").write_text(MODULE)
    (tmp_path / "csrc" / "cpu" / "answer.h").write_text("#define ANSWER 42\nint avx2_answer();\n")
    (tmp_path / "csrc" / "cpu" / "isa" / "avx2.cpp").write_text(
        "#ifndef __AVX2__\n#error not compiled for AVX2\n#endif\nint avx2_answer() { return 2; }\n"
    )
    return tmp_path


def build(copy, **environment):
    """`setup.py build` into copy/lib, where Python code and module lie together as in an installation."""
    command = [sys.executable, "setup.py", "build", "--build-lib", "lib"]
    environment = {**os.environ, "TTS_KERNELS_SANITIZE": "", "MAX_JOBS": "1", **environment}
    return subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, check=False)


def run(copy, code):
    done = subprocess.run([sys.executable, "-c", code], cwd=copy / "lib", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def attributes(copy):
    """What the built module says, asked in a process of its own and without the package around it."""
    (module,) = (copy / "lib" / "tts_kernels").glob("_C*.so")
    code = (
        "from importlib.util import module_from_spec, spec_from_file_location\n"
        f"spec = spec_from_file_location('_C', {str(module)!r})\n"
        "module = module_from_spec(spec)\n"
        "print({name: value for name, value in vars(module).items() if isinstance(value, int | str)})"
    )
    return eval(run(copy, code))  # noqa: S307


def test_without_a_compiler_it_installs_with_one_warning(copy):
    done = build(copy, CXX="/nonexistent/c++")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("is built without its native module: no C++ compiler was found") == 1
    assert not list(copy.rglob("_C*"))
    code = (
        "import tts_kernels, torch\n"
        "plan = tts_kernels.TreePlan.from_nodes([-1], [3], [[0]], [1], page_size=4)\n"
        "cache = torch.ones(1, 4, 1, 32)\n"
        "print(tts_kernels.tree_attention(torch.ones(1, 1, 32), cache, cache, plan).sum().item())"
    )
    assert float(run(copy, code)) == pytest.approx(32)


@needs_compiler
def test_a_compiler_without_openmp_counts_as_none(copy):
    done = build(copy, CXX=compiler_that_refuses(copy, "-fopenmp"))
    assert done.returncode == 0, done.stderr
    assert "cannot build a Python module with OpenMP: error: refused -fopenmp" in done.stderr
    assert not list(copy.rglob("_C*"))


@needs_compiler
def test_our_own_error_fails_the_build(copy):
    (copy / "csrc" / "cpu" / "broken.cpp").write_text("#error this file is broken\n")
    done = build(copy)
    assert done.returncode != 0
    assert "this file is broken" in done.stderr


@needs_compiler
def test_a_changed_header_is_compiled_again(copy):
    assert build(copy).returncode == 0
    assert attributes(copy)["answer"] == 42
    again = build(copy)
    assert again.returncode == 0
    assert ".cpp" not in again.stdout
    (copy / "csrc" / "cpu" / "answer.h").write_text("#define ANSWER 43\nint avx2_answer();\n")
    changed = build(copy)
    assert changed.returncode == 0
    assert "csrc/bindings.cpp" in changed.stdout
    assert "avx2.cpp" not in changed.stdout
    assert attributes(copy)["answer"] == 43


@needs_compiler
def test_a_code_path_the_compiler_lacks_is_left_out(copy):
    done = build(copy, CXX=compiler_that_refuses(copy, "-mavx2"))
    assert done.returncode == 0, done.stderr
    assert "avx2.cpp" not in done.stdout
    assert attributes(copy).keys() & {"avx2", "amx"} <= {"amx"}


def compiler_that_refuses(copy, flag):
    path = copy / "refusing-c++"
    path.write_text(
        f'#!/bin/sh\nfor flag; do [ "$flag" = {flag} ] && echo "error: refused {flag}" >&2 && exit 1; done\n'
        f'exec {COMPILER} "$@"\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.fixture
def cuda_copy(copy):
    (copy / "csrc" / "cuda").mkdir()
    (copy / "csrc" / "cuda" / "kernel.cu").write_text(KERNEL)
    (copy / "csrc" / "cuda" / "brick.cuh").write_text(BRICK)
    return copy


@needs_nvcc
def test_cuda_kernels_are_built_and_the_module_is_imported_without_a_driver(cuda_copy):
    """Kept are what ptxas says of each kernel, and the objects: only what changed is compiled again."""
    done = build(cuda_copy)
    assert done.returncode == 0, done.stderr
    assert "ptxas" not in done.stderr
    found = attributes(cuda_copy)
    assert found["cuda"] == 3 and set(found["cuda_archs"].split()) <= {"80", "90a", "100a"}
    (log,) = cuda_copy.glob("build/*/cuda/kernel.log")
    assert log.read_text().count("Compiling entry function") == len(found["cuda_archs"].split())
    assert ".cu" not in build(cuda_copy).stdout
    (cuda_copy / "csrc" / "cuda" / "brick.cuh").write_text(BRICK.replace("3", "4"))
    again = build(cuda_copy)
    assert "csrc/cuda/kernel.cu" in again.stdout and ".cpp" not in again.stdout
    assert attributes(cuda_copy)["cuda"] == 4


@needs_nvcc
def test_cuda_architectures_are_chosen(cuda_copy):
    assert build(cuda_copy, TTS_KERNELS_CUDA_ARCHS="90a").returncode == 0
    assert attributes(cuda_copy)["cuda_archs"] == "90a"
    # Files of a folder that is for one architecture are compiled for it alone, or left out.
    (cuda_copy / "csrc" / "cuda" / "hopper").mkdir()
    (cuda_copy / "csrc" / "cuda" / "hopper" / "kernel.cu").write_text(
        "#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)\n#error\n#endif\n"
        "__global__ void of_hopper() {}\n"
    )
    both = build(cuda_copy, TTS_KERNELS_CUDA_ARCHS="80 90a")
    assert both.returncode == 0 and "hopper/kernel.cu" in both.stdout
    without = build(cuda_copy, TTS_KERNELS_CUDA_ARCHS="80")
    assert without.returncode == 0 and "cuda/kernel.cu" in without.stdout and "hopper" not in without.stdout
    wrong = build(cuda_copy, TTS_KERNELS_CUDA_ARCHS="80 12345")
    assert wrong.returncode != 0
    assert "TTS_KERNELS_CUDA_ARCHS asks for 80 12345: " in wrong.stderr and "compute_12345" in wrong.stderr
    assert build(cuda_copy, TTS_KERNELS_CUDA_ARCHS="").returncode == 0
    found = attributes(cuda_copy)
    assert found["no_cuda"] == "TTS_KERNELS_CUDA_ARCHS is empty" and "cuda" not in found


@needs_nvcc
def test_our_own_error_in_a_kernel_fails_the_build(cuda_copy):
    (cuda_copy / "csrc" / "cuda" / "kernel.cu").write_text("#error this kernel is broken\n")
    done = build(cuda_copy)
    assert done.returncode != 0
    assert "this kernel is broken" in done.stderr


@needs_compiler
def test_without_an_nvcc_that_works_the_module_is_built_without_cuda(cuda_copy):
    home = cuda_copy / "cuda"
    done = build(cuda_copy, CUDA_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert attributes(cuda_copy)["no_cuda"] == f"no nvcc was found in CUDA_HOME={home}"
    asked = build(cuda_copy, CUDA_HOME=str(home), TTS_KERNELS_CUDA_ARCHS="80")
    assert asked.returncode != 0 and "TTS_KERNELS_CUDA_ARCHS asks for 80: no nvcc was found" in asked.stderr
    (home / "bin").mkdir(parents=True)
    broken = home / "bin" / "nvcc"
    broken.write_text("#!/bin/sh\necho 'nvcc fatal: \"unsupported\" host compiler' >&2\nexit 1\n")
    broken.chmod(0o755)
    assert build(cuda_copy, CUDA_HOME=str(home)).returncode == 0
    assert attributes(cuda_copy)["no_cuda"] == f'{broken} for 80: nvcc fatal: "unsupported" host compiler'
    assert attributes(cuda_copy)["answer"] == 42
