// Tensors as Python hands them over: what torch tells of them through DLPack's table of C functions, and whether a
// product can take them. To ask them in Python for device, dtype, shape and strides takes longer than a small product.
#pragma once

#include "products.h"

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <optional>

namespace offpath {

// From now on, instances of this type (torch.Tensor) are what it tells of them. Throws std::runtime_error where it has
// no table of a version that is known.
void describe_by(nanobind::handle tensor_type);

// Activations [..., features] as [tokens, features].
template <class T> struct Tokens {
    Matrix<T> matrix;
    int64_t batch, features;
};

// A matrix [count, width] whose rows are contiguous.
template <class T> struct DenseRows {
    Rows<T> rows;
    int64_t count, width;
};

// Images [count, channels, height, width] with any strides.
template <class T> struct ImageBatch {
    T *data;
    Images images;
    int64_t count;
};

// A tensor on the CPU; anything else, such as None, is an operand that fits nowhere.
class Operand {
  public:
    Operand() = default;
    explicit Operand(nanobind::handle object);

    // Whether its entries are of this type and in memory: what had its storage freed has none.
    template <class T> bool holds() const {
        namespace dlpack = nanobind::dlpack;
        constexpr auto code = std::is_same_v<T, bfloat16>   ? dlpack::dtype_code::Bfloat
                              : std::is_floating_point_v<T> ? dlpack::dtype_code::Float
                                                            : dlpack::dtype_code::Int;
        return is_dense && fields.dtype.code == static_cast<uint8_t>(code) && fields.dtype.bits == 8 * sizeof(T) &&
               (fields.data || entries() == 0);
    }
    int64_t entries() const;
    // How many entries a vector has; -1 if it is none.
    int64_t length() const { return is_dense && fields.ndim == 1 ? fields.shape[0] : -1; }
    // Whether it is a vector of so many entries, one after the other; what has another number of dimensions has -1.
    template <class T> bool is_vector(int64_t count) const {
        return count >= 0 && holds<T>() && length() == count && is_contiguous();
    }
    // The same for a vector that may be left out.
    template <class T> bool is_vector_or_none(int64_t count) const { return is_none || is_vector<T>(count); }
    // Whether a result of so many entries can be written there.
    template <class T> bool has_room(int64_t count) const {
        return holds<T>() && entries() == count && is_contiguous();
    }
    // Null for None. A kernel writes into results alone.
    template <class T> T *data() const {
        return reinterpret_cast<T *>(static_cast<char *>(fields.data) + fields.byte_offset);
    }
    // Its tokens, if they have so many features (any number unless said) and one stride is 1; those in more than
    // two dimensions have to be contiguous.
    template <class T> std::optional<Tokens<T>> tokens(int64_t wanted = any) const {
        if (!holds<T>() || fields.ndim < 2)
            return {};
        const int64_t features = fields.shape[fields.ndim - 1];
        if (wanted != any && features != wanted)
            return {};
        Tokens<T> found{{data<const T>(), 1, features}, 1, features};
        for (int d = 0; d < fields.ndim - 1; ++d)
            found.batch *= fields.shape[d];
        if (is_contiguous())
            return found;
        found.matrix.batch_stride = fields.strides[0];
        found.matrix.feature_stride = fields.strides[1];
        const bool has_unit_stride = fields.strides[0] == 1 || fields.strides[1] == 1;
        return fields.ndim == 2 && has_unit_stride ? std::optional(found) : std::nullopt;
    }

    // The same in two dimensions.
    template <class T> std::optional<Tokens<T>> matrix(int64_t wanted = any) const {
        return fields.ndim == 2 ? tokens<T>(wanted) : std::nullopt;
    }

    // Its rows, if they are contiguous and do not overlap.
    template <class T> std::optional<DenseRows<T>> rows() const {
        if (!holds<std::remove_const_t<T>>() || fields.ndim != 2)
            return {};
        const int64_t count = fields.shape[0], width = fields.shape[1];
        if (is_contiguous())
            return DenseRows<T>{{data<T>(), width}, count, width};
        if (fields.strides[1] != 1 || fields.strides[0] < width)
            return {};
        return DenseRows<T>{{data<T>(), fields.strides[0]}, count, width};
    }

    // Its images, if they have these sizes.
    template <class T> std::optional<ImageBatch<T>> images(int64_t channels, int64_t height, int64_t width) const {
        if (!holds<std::remove_const_t<T>>() || fields.ndim != 4 || fields.shape[1] != channels ||
            fields.shape[2] != height || fields.shape[3] != width)
            return {};
        const int64_t *strides = fields.strides;
        return ImageBatch<T>{
            data<T>(), {channels, height, width, strides[0], strides[1], strides[2], strides[3]}, fields.shape[0]};
    }

  private:
    static constexpr int64_t any = -1;

    bool is_contiguous() const;

    nanobind::dlpack::dltensor fields{};
    bool is_none = false, is_dense = false;
};

// A row pointer and indices in int32. What they say is somebody else's to check, but for the number of entries.
inline std::optional<Csr> csr_of(const Operand &crow_indices, const Operand &indices) {
    const int64_t rows = crow_indices.length() - 1, nnz = indices.length();
    if (!(rows >= 0 && crow_indices.is_vector<int32_t>(rows + 1) && indices.is_vector<int32_t>(nnz)))
        return {};
    const Csr found{crow_indices.data<const int32_t>(), indices.data<const int32_t>(), rows};
    return found.crow_indices[rows] == nnz ? std::optional(found) : std::nullopt;
}

// What body, called with the type of the operand's entries, returns; false where no product computes with them.
template <class Body> bool by_dtype(const Operand &operand, const Body &body) {
    if (operand.holds<float>())
        return body.template operator()<float>();
    if (operand.holds<double>())
        return body.template operator()<double>();
    return operand.holds<bfloat16>() && body.template operator()<bfloat16>();
}

} // namespace offpath

template <> struct nanobind::detail::type_caster<offpath::Operand> {
    NB_TYPE_CASTER(offpath::Operand, const_name("Tensor | None"))
    bool from_python(handle source, uint8_t, cleanup_list *) noexcept {
        value = offpath::Operand(source);
        return true;
    }
};
