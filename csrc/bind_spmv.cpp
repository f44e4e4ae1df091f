#include "bind.hpp"

void bind_spmv(nb::module_&) {}
