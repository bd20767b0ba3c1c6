// Takes the place of amx_permission.cpp where the tile registers are emulated.
#include "isa.h"

bool offpath::may_use_tiles() { return true; }
