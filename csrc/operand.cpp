#include "operand.h"

#include <stdexcept>

namespace nb = nanobind;

namespace offpath {
namespace {

// DLPack's table, whose layout is part of its standard: https://dmlc.github.io/dlpack/latest/c_api.html.
struct ExchangeApi {
    static constexpr uint32_t known_version = 1;

    uint32_t major_version, minor_version;
    const ExchangeApi *previous; // of an older version
    void *allocate, *own, *give;
    // Fills in what a tensor is, while somebody else keeps it alive; 0, or a Python error is set.
    int (*describe)(void *object, nb::dlpack::dltensor *fields);
    void *stream;
};

const ExchangeApi *api = nullptr;

} // namespace

void describe_by(nb::handle tensor_type) {
    const nb::object capsule = nb::getattr(tensor_type, "__dlpack_c_exchange_api__", nb::none());
    const void *const table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    PyErr_Clear(); // that it is no such capsule
    const auto *found = static_cast<const ExchangeApi *>(table);
    while (found && found->major_version > ExchangeApi::known_version)
        found = found->previous;
    if (!found || found->major_version != ExchangeApi::known_version || !found->describe)
        throw std::runtime_error("expected torch tensors with DLPack's C functions of version 1, which torch has since "
                                 "2.10; install a version of torch that offpath's metadata allows");
    api = found;
}

Operand::Operand(nb::handle object) : is_none(object.is_none()) {
    if (is_none)
        return;
    if (api->describe(object.ptr(), &fields) == 0)
        is_dense = fields.device.device_type == nb::device::cpu::value && fields.dtype.lanes == 1 && fields.strides;
    else
        PyErr_Clear(); // no tensor, or one without memory: sparse, fake, a wrapper
}

int64_t Operand::entries() const {
    int64_t count = 1;
    for (int d = 0; d < fields.ndim; ++d)
        count *= fields.shape[d];
    return count;
}

bool Operand::is_contiguous() const {
    int64_t expected = 1;
    for (int d = fields.ndim - 1; d >= 0; --d) {
        if (fields.shape[d] != 1 && fields.strides[d] != expected)
            return entries() == 0;
        expected *= fields.shape[d];
    }
    return true;
}

} // namespace offpath
