#include "bind.hpp"

void bind_block(nb::module_&) {}
