#include "bind.hpp"

void bind_program(nb::module_&) {}
