#include "bind.hpp"

void bind_probe(nb::module_&) {}
