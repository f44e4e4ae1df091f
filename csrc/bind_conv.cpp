#include "bind.hpp"

void bind_conv(nb::module_&) {}
