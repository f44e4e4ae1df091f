#include "bind.hpp"

void bind_lowp(nb::module_&) {}
