#include "tree/plan.h"

#include <algorithm>
#include <climits>
#include <cstring>
#include <vector>

namespace py = pybind11;

namespace tts {
namespace {

// Appends a list of exact ints in [low, high]; false if it is anything else.
bool read_ints(PyObject* list, int64_t low, int64_t high, std::vector<int32_t>* to) {
  if (!PyList_CheckExact(list)) return false;
  const Py_ssize_t count = PyList_GET_SIZE(list);
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* item = PyList_GET_ITEM(list, i);
    if (!PyLong_CheckExact(item)) return false;
    int overflow = 0;
    const long long value = PyLong_AsLongLongAndOverflow(item, &overflow);
    if (overflow != 0 || value < low || value > high) return false;
    to->push_back(static_cast<int32_t>(value));
  }
  return true;
}

struct Forest {
  std::vector<int32_t> parent, length, rows, pages, page_begin, page_count;
};

bool read_forest(PyObject* parent, PyObject* length, PyObject* pages, PyObject* rows, int64_t page_size, Forest* f) {
  if (page_size < 1 || page_size > INT_MAX || !PyList_CheckExact(parent)) return false;
  const Py_ssize_t count = PyList_GET_SIZE(parent);
  for (auto* column : {&f->parent, &f->length, &f->rows, &f->page_begin, &f->page_count}) column->reserve(count);
  if (!read_ints(parent, -1, INT_MAX, &f->parent) || !read_ints(length, 0, INT_MAX, &f->length) ||
      !read_ints(rows, 0, INT_MAX, &f->rows) || !PyList_CheckExact(pages))
    return false;
  if (PyList_GET_SIZE(length) != count || PyList_GET_SIZE(rows) != count || PyList_GET_SIZE(pages) != count)
    return false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    f->page_begin.push_back(static_cast<int32_t>(f->pages.size()));
    if (f->parent[i] >= i || f->rows[i] > f->length[i] || f->pages.size() > INT_MAX / 2 ||
        !read_ints(PyList_GET_ITEM(pages, i), 0, INT_MAX, &f->pages))
      return false;
    f->page_count.push_back(static_cast<int32_t>(f->pages.size()) - f->page_begin[i]);
    if (f->page_count[i] * page_size < f->length[i]) return false;
  }
  return true;
}

}  // namespace

py::object plan_from_nodes(py::object parent, py::object length, py::object pages, py::object rows, int64_t page_size) {
  Forest f;
  if (!read_forest(parent.ptr(), length.ptr(), pages.ptr(), rows.ptr(), page_size, &f)) return py::none();
  const int n = static_cast<int>(f.parent.size());
  int64_t num_rows = 0, num_tokens = 0;
  for (int i = 0; i < n; ++i) num_rows += f.rows[i], num_tokens += f.length[i];
  if (num_tokens > INT_MAX) return py::none();

  // A node's place in depth-first preorder: behind its parent and the subtrees of its earlier siblings.
  std::vector<int32_t> size(n, 1), subtree_rows(f.rows), place(n), next_place(n), first_row(n), next_row(n), level(n);
  for (int i = n - 1; i >= 0; --i)
    if (f.parent[i] >= 0) size[f.parent[i]] += size[i], subtree_rows[f.parent[i]] += subtree_rows[i];
  int32_t root_place = 0, root_row = 0, depth = 0;
  for (int i = 0; i < n; ++i) {
    const int32_t p = f.parent[i];
    int32_t& at = p < 0 ? root_place : next_place[p];
    int32_t& row = p < 0 ? root_row : next_row[p];
    place[i] = at, first_row[i] = row;
    next_place[i] = at + 1, next_row[i] = row + f.rows[i];
    at += size[i], row += subtree_rows[i];
    level[i] = p < 0 ? 1 : level[p] + 1;
    depth = std::max(depth, level[i]);
  }

  const int64_t num_pages = static_cast<int64_t>(f.pages.size());
  const int64_t total = 8 * int64_t(n) + 2 * num_rows + num_pages;
  py::object tables = py::reinterpret_steal<py::object>(PyByteArray_FromStringAndSize(nullptr, total * 4));
  if (!tables) throw py::error_already_set();
  int32_t* nodes = reinterpret_cast<int32_t*>(PyByteArray_AS_STRING(tables.ptr()));
  int32_t* row_source = nodes + 7 * int64_t(n);
  int32_t* row_node = row_source + num_rows;
  int32_t* grows = row_node + num_rows;
  std::copy(f.pages.begin(), f.pages.end(), grows + n);

  int32_t caller_row = 0, num_growing = 0;
  int64_t capacity = INT64_MAX;
  std::vector<int32_t> end(n);  // absolute position behind a node
  for (int i = 0; i < n; ++i) {
    const int32_t at = place[i], p = f.parent[i];
    const int32_t position = p < 0 ? 0 : end[p];
    end[i] = position + f.length[i];
    nodes[at] = p < 0 ? -1 : place[p];
    nodes[n + at] = f.length[i];
    nodes[2 * n + at] = position;
    nodes[3 * n + at] = f.page_begin[i];
    nodes[4 * n + at] = first_row[i];
    nodes[5 * n + at] = first_row[i] + f.rows[i];
    nodes[6 * n + at] = first_row[i] + subtree_rows[i];
    for (int32_t r = 0; r < f.rows[i]; ++r)
      row_source[first_row[i] + r] = caller_row++, row_node[first_row[i] + r] = at;
    grows[at] = size[i] == 1 && f.rows[i] > 0;
    if (grows[at]) {
      ++num_growing;
      capacity = std::min(capacity, f.page_count[i] * page_size - f.length[i]);
    }
  }
  const int32_t max_page = f.pages.empty() ? -1 : *std::max_element(f.pages.begin(), f.pages.end());
  return py::make_tuple(tables, num_rows, num_pages, num_growing, num_tokens, num_growing ? capacity : 0, depth,
                        max_page);
}

}  // namespace tts
