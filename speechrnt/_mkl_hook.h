/* Puts a SpanPool under the MKL inside CTranslate2's library.

   CTranslate2's x86-64 wheel allocates CPU tensors with mkl_malloc of the MKL that is linked into
   its library. MKL lets its host replace the functions underneath, by the variables i_malloc,
   i_calloc, i_realloc and i_free (oneMKL Developer Guide, "Redefining Memory Functions"), and the
   library exports them. MKL copies all four when it allocates for the first time, so they have to
   be set before the first model is loaded; whether they were is seen by allocating.

   Nothing is written unless the one loaded library of that name defines these variables itself, in
   writable data, and they hold the process's own functions. Blocks that are not the pool's go on to
   those. Other copies of MKL in the process have variables of their own.

   Included by _inference_memory.pyx only. */

#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#if defined(__x86_64__) && defined(__GLIBC__)

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

#include "_span_pool.h"

namespace speechrnt_memory {

/* Smaller blocks stay with libc, which keeps memory below its mmap threshold resident itself. */
constexpr std::size_t kSmallest = std::size_t{512} << 10;

inline SpanPool pool;

inline std::uint32_t now() {
    timespec time;
    clock_gettime(CLOCK_MONOTONIC_COARSE, &time);
    return static_cast<std::uint32_t>(time.tv_sec) + 1;
}

inline void *pool_malloc(std::size_t size) {
    if (size >= kSmallest) {
        if (void *block = pool.allocate(size, now())) return block;
    }
    return std::malloc(size);
}

inline void *pool_calloc(std::size_t count, std::size_t size) {
    std::size_t total;
    if (!__builtin_mul_overflow(count, size, &total) && total >= kSmallest) {
        if (void *block = pool.allocate(total, now())) return std::memset(block, 0, total);
    }
    return std::calloc(count, size);
}

inline void pool_free(void *block) {
    if (pool.owns(block)) {
        pool.deallocate(block, now());
    } else {
        std::free(block);
    }
}

/* A block stays with whom it came from while it can: libc's never moves into the pool. */
inline void *pool_realloc(void *block, std::size_t size) {
    if (!block) return pool_malloc(size);
    if (!pool.owns(block)) return std::realloc(block, size);
    if (size == 0) {
        pool_free(block);
        return nullptr;
    }
    const std::size_t room = pool.size_of(block);
    if (size <= room && size > room - kGranule) return block;
    void *moved = pool_malloc(size);
    if (moved) {
        std::memcpy(moved, block, std::min(room, size));
        pool_free(block);
    }
    return moved;
}

/* What MKL exports. */
struct Mkl {
    decltype(pool_malloc) **malloc;
    decltype(pool_calloc) **calloc;
    decltype(pool_realloc) **realloc;
    decltype(pool_free) **free;
    void *(*aligned_malloc)(std::size_t, int);
    void (*aligned_free)(void *);
};

/* A loaded library, looked for by the name of its file up to the version: libx.so.4,
   libx-1a2b3c.so.4. Its name and headers stay valid while it is loaded. */
struct Library {
    const char *name;
    int count;
    dl_phdr_info info;
};

inline int visit_library(dl_phdr_info *info, std::size_t, void *argument) {
    auto *library = static_cast<Library *>(argument);
    const char *slash = std::strrchr(info->dlpi_name, '/');
    const char *file = slash ? slash + 1 : info->dlpi_name;
    const std::size_t length = std::strlen(library->name);
    if (std::strncmp(file, library->name, length) == 0 && std::strchr(".-", file[length]) &&
        std::strstr(file + length, ".so")) {
        library->info = *info;
        ++library->count;
    }
    return 0;
}

/* Whether a segment of this type, with all of these flags, covers a pointer at `address`. */
inline bool covers(const dl_phdr_info &info, const void *address, ElfW(Word) type,
                   ElfW(Word) flags) {
    for (int i = 0; i < info.dlpi_phnum; ++i) {
        const ElfW(Phdr) &segment = info.dlpi_phdr[i];
        const auto offset =
            reinterpret_cast<std::uintptr_t>(address) - (info.dlpi_addr + segment.p_vaddr);
        if (segment.p_type == type && (segment.p_flags & flags) == flags &&
            offset < segment.p_memsz && segment.p_memsz - offset >= sizeof(void *)) {
            return true;
        }
    }
    return false;
}

/* The variable or function of this name, of this library itself and not of one that it needs. */
template <typename T>
bool find_symbol(void *handle, const dl_phdr_info &info, const char *name, ElfW(Word) flags,
                 T **symbol) {
    void *address = dlsym(handle, name);
    *symbol = reinterpret_cast<T *>(address);
    return address && covers(info, address, PT_LOAD, flags) &&
           !covers(info, address, PT_GNU_RELRO, 0);
}

/* Fill `mkl` from a loaded library; null, or why that cannot be. */
inline const char *find_mkl(const char *name, Mkl *mkl) {
    Library library = {name, 0, {}};
    dl_iterate_phdr(visit_library, &library);
    if (library.count == 0) return "it is not loaded";
    if (library.count > 1) return "it is loaded more than once";
    const dl_phdr_info &info = library.info;
    void *handle = dlopen(info.dlpi_name, RTLD_LAZY | RTLD_NOLOAD);
    if (!handle) return "it cannot be opened";
    const bool found = find_symbol(handle, info, "i_malloc", PF_R | PF_W, &mkl->malloc) &&
                       find_symbol(handle, info, "i_calloc", PF_R | PF_W, &mkl->calloc) &&
                       find_symbol(handle, info, "i_realloc", PF_R | PF_W, &mkl->realloc) &&
                       find_symbol(handle, info, "i_free", PF_R | PF_W, &mkl->free) &&
                       find_symbol(handle, info, "MKL_malloc", PF_X, &mkl->aligned_malloc) &&
                       find_symbol(handle, info, "MKL_free", PF_X, &mkl->aligned_free);
    dlclose(handle);  // only what RTLD_NOLOAD added
    return found ? nullptr : "it has no MKL of its own whose memory functions can be replaced";
}

inline bool is_plain(const Mkl &mkl) {
    return *mkl.malloc == std::malloc && *mkl.calloc == std::calloc &&
           *mkl.realloc == std::realloc && *mkl.free == std::free;
}

inline bool is_hooked(const Mkl &mkl) {
    return *mkl.malloc == pool_malloc && *mkl.calloc == pool_calloc &&
           *mkl.realloc == pool_realloc && *mkl.free == pool_free;
}

/* Whoever takes memory from a new function must find the new one to return it to: free is the first
   to be replaced and the last to be put back. */
inline void hook(const Mkl &mkl) {
    __atomic_store_n(mkl.free, &pool_free, __ATOMIC_RELEASE);
    __atomic_store_n(mkl.realloc, &pool_realloc, __ATOMIC_RELEASE);
    __atomic_store_n(mkl.calloc, &pool_calloc, __ATOMIC_RELEASE);
    __atomic_store_n(mkl.malloc, &pool_malloc, __ATOMIC_RELEASE);
}

inline void unhook(const Mkl &mkl) {
    __atomic_store_n(mkl.malloc, &std::malloc, __ATOMIC_RELEASE);
    __atomic_store_n(mkl.calloc, &std::calloc, __ATOMIC_RELEASE);
    __atomic_store_n(mkl.realloc, &std::realloc, __ATOMIC_RELEASE);
    __atomic_store_n(mkl.free, &std::free, __ATOMIC_RELEASE);
}

/* Whether MKL uses the pool: it copies all four pointers when it allocates for the first time. */
inline bool reaches_pool(const Mkl &mkl) {
    void *block = mkl.aligned_malloc(kSmallest, 64);
    const bool reached = pool.owns(block);
    mkl.aligned_free(block);
    return reached;
}

/* Why the pool cannot be put under `library`; null if nothing speaks against it. Writes nothing. */
inline const char *why_not(const char *library) {
    Mkl mkl;
    if (const char *reason = find_mkl(library, &mkl)) return reason;
    const bool known = is_plain(mkl) || is_hooked(mkl);
    return known ? nullptr : "its memory functions have already been replaced by others";
}

inline void lock_pool() { pool.lock(); }
inline void unlock_pool() { pool.unlock(); }

/* Returning a mapped block makes glibc keep blocks up to that size on its heap, and trim the heap
   later (the dynamic threshold of mallopt(3), 32 MiB at most). CTranslate2's own large blocks did
   that before the pool took them, for those that oneDNN still takes from libc. */
inline void raise_libc_thresholds() {
    void *volatile block = std::malloc(std::size_t{31} << 20);  // volatile: not to be optimized away
    std::free(block);
}

inline bool prepare_pool() {
    raise_libc_thresholds();
    // No more than the machine's memory can ever be resident.
    const auto memory = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE);
    return pool.reserve(memory) && pthread_atfork(lock_pool, unlock_pool, unlock_pool) == 0;
}

/* Put the pool, bounded by `limit`, under `library` for the rest of the process's life; null, or
   why that cannot be, with everything as it was. */
inline const char *install(const char *library, std::size_t limit) {
    static std::mutex mutex;
    const std::lock_guard<std::mutex> guard(mutex);
    if (const char *reason = why_not(library)) return reason;
    static const bool prepared = prepare_pool();
    if (!prepared) return "the system refuses to reserve addresses for the pool";
    Mkl mkl;
    find_mkl(library, &mkl);
    pool.set_limit(limit);
    if (is_hooked(mkl)) return nullptr;
    hook(mkl);
    if (reaches_pool(mkl)) return nullptr;
    unhook(mkl);
    pool.set_limit(0);
    return "it had allocated before, and its MKL keeps the memory functions it started with";
}

inline bool owns(const void *block) { return pool.owns(block); }
inline void set_limit(std::size_t bytes) { pool.set_limit(bytes); }
inline std::size_t trim(std::uint32_t seconds) { return pool.trim(seconds, now()); }
inline Counters counters() { return pool.counters(); }

}  // namespace speechrnt_memory

#else

namespace speechrnt_memory {

struct Counters {
    std::size_t limit, in_use, peak, reserved;
    std::uint64_t blocks, hits, misses, overflows, trims;
};

inline const char *why_not(const char *) { return "only its x86-64 build for Linux is known"; }
inline const char *install(const char *library, std::size_t) { return why_not(library); }
inline bool owns(const void *) { return false; }
inline void set_limit(std::size_t) {}
inline std::size_t trim(std::uint32_t) { return 0; }
inline Counters counters() { return {}; }

}  // namespace speechrnt_memory

#endif

namespace speechrnt_memory {

/* Have libc keep large blocks of the whole process instead of mapping each: none is mapped, from
   one arena (the others cannot hold more than 64 MiB) that is hardly ever trimmed. */
inline bool tune_malloc() {
#if defined(__GLIBC__)
    return mallopt(M_MMAP_MAX, 0) && mallopt(M_ARENA_MAX, 1) &&
           mallopt(M_TRIM_THRESHOLD, 1 << 30) && mallopt(M_TOP_PAD, 64 << 20);
#else
    return false;
#endif
}

}  // namespace speechrnt_memory
