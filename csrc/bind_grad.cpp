#include "bind.hpp"

void bind_grad(nb::module_&) {}
