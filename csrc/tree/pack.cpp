#include "tree/pack.h"

#include <climits>
#include <cstring>

namespace py = pybind11;

namespace tts {

py::object token_bytes(py::object ids) {
  if (!PyList_CheckExact(ids.ptr())) return py::none();
  const Py_ssize_t count = PyList_GET_SIZE(ids.ptr());
  py::object bytes = py::reinterpret_steal<py::object>(PyBytes_FromStringAndSize(nullptr, count * 8));
  if (!bytes) throw py::error_already_set();
  char* to = PyBytes_AS_STRING(bytes.ptr());
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PyList_GET_ITEM(ids.ptr(), i);
    if (!PyLong_CheckExact(item)) return py::none();
    int overflow = 0;
    const int64_t token = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (overflow != 0 || token < 0 || token > INT_MAX) return py::none();
    std::memcpy(to + i * 8, &token, 8);
  }
  return bytes;
}

}  // namespace tts
