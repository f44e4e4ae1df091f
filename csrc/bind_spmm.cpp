#include "bind.hpp"

void bind_spmm(nb::module_&) {}
