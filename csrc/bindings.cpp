// tts_kernels._C: pointers, sizes and strides as integers; no torch. A tensor is (address, strides in elements...).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#ifndef TTS_ONLY_CUDA  // for the host's emulation of the CUDA kernels, a module of its own
#include "cpu/bind.h"
#include "cpu/bind_scoring.h"
#include "cpu/code_path.h"
#include "tree/pack.h"
#include "tree/plan.h"
#endif
#ifdef TTS_EMULATED
#include "cuda/launch.h"
#endif
#ifdef TTS_HAVE_CUDA
#include "cuda/bind_scoring.h"
#include "cuda/bind_states.h"
#include "cuda/bind_tree.h"
#include "cuda/bind_work_list.h"
#endif

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
#ifndef TTS_ONLY_CUDA
  m.def("plan_from_nodes", &tts::plan_from_nodes);
  m.def("token_bytes", &tts::token_bytes);
  m.def("cpu_tree_attention", &tts::cpu_tree_attention, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_count_work", &tts::cpu_count_work);
  m.def("cpu_append_kv", &tts::cpu_append_kv, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_merge_states", &tts::cpu_merge_states, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_score_logits", &tts::cpu_score_logits, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_token_logprobs", &tts::cpu_token_logprobs, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_reduce_scores", &tts::cpu_reduce_scores, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_select", &tts::cpu_select, py::call_guard<py::gil_scoped_release>());
  m.def("cpu_code_paths", &tts::code_paths);
  m.def("cpu_active_code_path", &tts::active_code_path_name);
#endif
#ifdef TTS_HAVE_CUDA
  m.def("cuda_is_emulated", &tts::cuda_is_emulated);
  m.def("cuda_tree_attention", &tts::cuda_tree_attention, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_tree_attention_shared_bytes", &tts::cuda_tree_attention_shared_bytes);
  m.def("cuda_tree_hopper_shared_bytes", &tts::cuda_tree_hopper_shared_bytes);
  m.def("cuda_work_list", &tts::cuda_work_list, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_append_kv", &tts::cuda_append_kv, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_merge_states", &tts::cuda_merge_states, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_gather_rows", &tts::cuda_gather_rows, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_step_scores", &tts::cuda_step_scores, py::call_guard<py::gil_scoped_release>());
  m.def("cuda_select", &tts::cuda_select, py::call_guard<py::gil_scoped_release>());
#endif
#ifdef TTS_EMULATED
  m.def("cuda_emulation_seed", &tts::cuda_emulation_seed, py::arg("seed"), py::arg("multiprocessors") = 3,
        py::arg("most_turns") = 2'000'000'000);
#elif defined(TTS_HAVE_CUDA)
  m.def("cuda_versions", &tts::cuda_versions);
#endif
#ifdef TTS_NO_CUDA
  m.attr("no_cuda") = TTS_NO_CUDA;  // why there are no cuda_ functions
#endif
#ifdef TTS_CUDA_ARCHS
  m.attr("cuda_archs") = TTS_CUDA_ARCHS;  // "80 90a 100a"
#endif
}
