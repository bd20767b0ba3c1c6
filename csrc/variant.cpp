// Compiled once per ISA, with that ISA's flags. It exports one symbol: its table. No functions of std::, no statics, no
// allocation, no threads: whatever else it emitted could be linked into another ISA's path.
#include "bitmap-inl.h"
#include "bitmap_gradients-inl.h"
#include "bucketed-inl.h"
#include "convolve-inl.h"
#include "encode-inl.h"
#include "filled-inl.h"
#include "filled_dx-inl.h"
#include "filled_gradient-inl.h"
#include "gather-inl.h"
#include "int8-inl.h"
#include "int8_dots-inl.h"
#include "layout-inl.h"
#include "pack-inl.h"
#include "row_sums-inl.h"
#include "rows-inl.h"
#include "runs-inl.h"
#include "sddmm-inl.h"
#include "select-inl.h"
#include "sparse_rows-inl.h"
#include "spmm-inl.h"
#include "strips-inl.h"
#include "table.h"
#include "tiled-inl.h"
#include "transpose-inl.h"

#define OFFPATH_STRING_OF(x) #x
#define OFFPATH_STRING(x) OFFPATH_STRING_OF(x)
#define OFFPATH_JOIN_OF(a, b) a##b
#define OFFPATH_JOIN(a, b) OFFPATH_JOIN_OF(a, b)

extern "C" const offpath::KernelTable OFFPATH_JOIN(offpath_table_, OFFPATH_ISA);

namespace {

template <class T>
constexpr offpath::Kernels<T> kernels = {
#define OFFPATH_KERNEL(op) op<T>,
#include "kernels.def"
#undef OFFPATH_KERNEL
    layout<T>, nullptr};

} // namespace

extern "C" const offpath::KernelTable OFFPATH_JOIN(offpath_table_, OFFPATH_ISA) = {
    OFFPATH_STRING(OFFPATH_ISA), kernels<float>, kernels<double>, kernels<bfloat16>};
