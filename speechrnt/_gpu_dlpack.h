/* Capsules of the DLPack protocol, by which arrays of other libraries share memory.

   The structs are those of dlpack.h 1.0 (https://github.com/dmlc/dlpack), which is a standard of
   binary layout. A capsule refers to a Python object that keeps the memory. */

#pragma once

#include <Python.h>

#include <cstdint>
#include <new>

namespace speechrnt_gpu {

struct DLDevice {
    std::int32_t device_type;
    std::int32_t device_id;
};

struct DLDataType {
    std::uint8_t code;
    std::uint8_t bits;
    std::uint16_t lanes;
};

struct DLTensor {
    void *data;
    DLDevice device;
    std::int32_t ndim;
    DLDataType dtype;
    std::int64_t *shape;
    std::int64_t *strides;
    std::uint64_t byte_offset;
};

struct DLManagedTensor {
    DLTensor dl_tensor;
    void *manager_ctx;
    void (*deleter)(DLManagedTensor *self);
};

struct DLManagedTensorVersioned {
    std::uint32_t major;
    std::uint32_t minor;
    void *manager_ctx;
    void (*deleter)(DLManagedTensorVersioned *self);
    std::uint64_t flags;
    DLTensor dl_tensor;
};

constexpr int kMaxDimensions = 8;
constexpr std::int32_t kCuda = 2;

template <typename Managed>
struct Exported {
    Managed managed;
    std::int64_t shape[kMaxDimensions];
    std::int64_t strides[kMaxDimensions];
    PyObject *owner;
};

/* Consumers call this on any thread, and perhaps after the interpreter. */
template <typename Managed>
void delete_exported(Managed *managed) {
    auto *exported = static_cast<Exported<Managed> *>(managed->manager_ctx);
    if (Py_IsInitialized()) {
        const PyGILState_STATE state = PyGILState_Ensure();
        Py_DECREF(exported->owner);
        PyGILState_Release(state);
    }
    delete exported;
}

/* A capsule that nobody consumed still has the name that it was made with. */
template <typename Managed>
void destroy_capsule(PyObject *capsule) {
    const char *name = sizeof(Managed) == sizeof(DLManagedTensor) ? "dltensor" : "dltensor_versioned";
    if (PyCapsule_IsValid(capsule, name)) {
        delete_exported(static_cast<Managed *>(PyCapsule_GetPointer(capsule, name)));
    }
}

template <typename Managed>
PyObject *make_capsule(PyObject *owner, const DLTensor &tensor, const std::int64_t *shape,
                       const char *name, void (*prepare)(Managed *)) {
    auto *exported = new (std::nothrow) Exported<Managed>{};
    if (exported == nullptr) {
        return PyErr_NoMemory();
    }
    std::int64_t stride = 1;
    for (int i = tensor.ndim; i-- > 0;) {
        exported->shape[i] = shape[i];
        exported->strides[i] = stride;
        stride *= shape[i];
    }
    prepare(&exported->managed);
    exported->managed.dl_tensor = tensor;
    exported->managed.dl_tensor.shape = exported->shape;
    exported->managed.dl_tensor.strides = exported->strides;
    exported->managed.manager_ctx = exported;
    exported->managed.deleter = delete_exported<Managed>;
    exported->owner = owner;
    PyObject *capsule = PyCapsule_New(&exported->managed, name, destroy_capsule<Managed>);
    if (capsule == nullptr) {
        delete exported;
        return nullptr;
    }
    Py_INCREF(owner);
    return capsule;
}

/* A capsule of a C-contiguous array; null with an exception set if there is no memory. */
inline PyObject *dlpack_capsule(PyObject *owner, void *data, int device, int code, int bits,
                                int ndim, const std::int64_t *shape, bool versioned) {
    const DLTensor tensor = {data,
                             {kCuda, device},
                             ndim,
                             {static_cast<std::uint8_t>(code), static_cast<std::uint8_t>(bits), 1},
                             nullptr,
                             nullptr,
                             0};
    if (versioned) {
        return make_capsule<DLManagedTensorVersioned>(
            owner, tensor, shape, "dltensor_versioned",
            [](DLManagedTensorVersioned *managed) { managed->major = 1; });
    }
    return make_capsule<DLManagedTensor>(owner, tensor, shape, "dltensor",
                                         [](DLManagedTensor *) {});
}

}  // namespace speechrnt_gpu
