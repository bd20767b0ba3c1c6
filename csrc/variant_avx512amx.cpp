// What AMX adds to the kernels of avx512bf16. Compiled with its flags as variant.cpp is with those of an ISA; it
// exports one symbol.
#include "amx_dots-inl.h"
#include "amx_filled-inl.h"

extern "C" const offpath::AmxKernels offpath_table_avx512amx;
extern "C" const offpath::AmxKernels offpath_table_avx512amx = {pack_tiles, amx_product, amx_dx,  amx_dvalues,
                                                                line_sums,  level_tiles, amx_dots};
