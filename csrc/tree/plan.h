// TreePlan.from_nodes in one pass over the caller's lists.
#pragma once

#include <pybind11/pybind11.h>

namespace tts {

// The tables of a plan, or None where anything is out of the ordinary (another type than list and int, a value that is
// wrong or does not fit): the caller then takes the path that checks one thing after the other and names the culprit.
//
// parent, length, pages, rows: the arguments of TreePlan.from_nodes. Returns
//   (tables, num_rows, num_pages, num_growing, num_tokens, capacity, depth, max_page)
// tables: bytearray of int32: nodes [7, num_nodes], rows [2, num_rows], grows [num_nodes], pages [num_pages]
pybind11::object plan_from_nodes(pybind11::object parent, pybind11::object length, pybind11::object pages,
                                 pybind11::object rows, int64_t page_size);

}  // namespace tts
