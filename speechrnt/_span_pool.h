/* A pool of large blocks of memory whose pages stay resident between uses.

   The pool lives in one reserved range of addresses, so that anybody can tell by its address alone
   whether a block is the pool's. The range is divided into spans of 64 KiB granules, which are in
   use or idle; two idle spans never touch. A block takes the low end of the smallest idle span that
   holds it (best fit, the lowest address among equals), so an unchanging sequence of calls gets the
   same addresses each time, and untouched addresses, which are all in the last and largest span,
   come last.

   Residency is counted in huge pages of 2 MiB: a page is resident from the first block that
   overlaps it until it is released to the system, which takes a whole idle page. Pages that were
   not used for kKeepSeconds are released by the next call that takes or returns a block, at most
   once a second; with no calls nothing happens, as the pool has no thread. `limit` bounds resident
   pages.

   All state is in tables beside the range, indexed by granule and by page, which the system hands
   out zeroed: the pool never allocates, so it cannot fail when a block is returned, and it is
   usable in the child after a fork. It is trivially destructible, so that blocks may be returned
   until the very end of the process; a pool that ends before is unmapped by hand.

   Time is given by the caller, in seconds of any steady clock that is never 0. */

#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <type_traits>

namespace speechrnt_memory {

constexpr std::size_t kGranule = std::size_t{64} << 10;
constexpr std::size_t kHugePage = std::size_t{2} << 20;
constexpr std::size_t kWritableStep = std::size_t{64} << 20;
constexpr std::uint32_t kGranulesPerPage = kHugePage / kGranule;
constexpr std::uint32_t kKeepSeconds = 10;
constexpr std::uint32_t kNone = UINT32_MAX;

/* Sizes in bytes; `in_use` and `peak` are of blocks rounded up to granules. */
struct Counters {
    std::size_t limit, in_use, peak, reserved;
    std::uint64_t blocks;
    std::uint64_t hits;       // blocks of resident pages only
    std::uint64_t misses;     // blocks with pages still to be faulted in
    std::uint64_t overflows;  // blocks that the limit left to libc
    std::uint64_t trims;      // times that pages were released
};

class SpanPool {
public:
    /* Reserve the range, of `capacity` bytes rounded up to huge pages; false if the system refuses.
       Once, before anything else is called. */
    bool reserve(std::size_t capacity) {
        pages_ = static_cast<std::uint32_t>((capacity + kHugePage - 1) / kHugePage);
        granules_ = pages_ * kGranulesPerPage;
        // One page more than needed leaves room to align the range.
        void *range = map((std::size_t{pages_} + 1) * kHugePage, PROT_NONE);
        void *spans = map(granules_ * sizeof(Granule), PROT_READ | PROT_WRITE);
        void *used = map(pages_ * sizeof(*last_used_), PROT_READ | PROT_WRITE);
        if (range == MAP_FAILED || spans == MAP_FAILED || used == MAP_FAILED) {
            unmap(range, (std::size_t{pages_} + 1) * kHugePage);
            unmap(spans, granules_ * sizeof(Granule));
            unmap(used, pages_ * sizeof(*last_used_));
            return false;
        }
        const auto address = reinterpret_cast<std::uintptr_t>(range);
        range_ = range;
        base_ = static_cast<char *>(range) + (kHugePage - address % kHugePage) % kHugePage;
        table_ = static_cast<Granule *>(spans);
        last_used_ = static_cast<std::uint32_t *>(used);
#ifdef MADV_HUGEPAGE
        // Refused by kernels without huge pages; small ones then do, more slowly at first touch.
        madvise(base_, capacity_bytes(), MADV_HUGEPAGE);
#endif
        insert_idle(0, granules_);
        return true;
    }

    /* Unmap everything, blocks that are out too. Nothing may be called any more. */
    void unmap_all() {
        unmap(range_, (std::size_t{pages_} + 1) * kHugePage);
        unmap(table_, granules_ * sizeof(Granule));
        unmap(last_used_, pages_ * sizeof(*last_used_));
    }

    bool owns(const void *block) const {
        const auto offset = reinterpret_cast<std::uintptr_t>(block) -
                            reinterpret_cast<std::uintptr_t>(base_);
        return offset < capacity_bytes();
    }

    /* A block aligned to a granule, or null if the limit, the range or the system has no room. */
    void *allocate(std::size_t size, std::uint32_t now) {
        Guard guard(this);
        if (limit_ == 0) return nullptr;
        release_stale(now);
        if (size <= capacity_bytes()) {
            const auto length = static_cast<std::uint32_t>((size + kGranule - 1) / kGranule);
            const std::uint32_t start = best_fit(length);
            if (start != kNone && make_resident(start, length, now)) {
                take(start, length);
                return base_ + start * kGranule;
            }
        }
        ++counters_.overflows;
        return nullptr;
    }

    /* Return a block. Like libc, abort on an address in the range that is not a block's. */
    void deallocate(void *block, std::uint32_t now) {
        Guard guard(this);
        std::uint32_t start = granule_of(block);
        std::uint32_t length = table_[start].length;
        if (block != base_ + start * kGranule || length == 0 || is_idle(start)) std::abort();
        table_[start].length = 0;
        counters_.in_use -= length * kGranule;
        --counters_.blocks;
        std::fill(last_used_ + first_page(start), last_used_ + end_page(start, length), now);

        const std::uint32_t after = start + length;
        if (after < granules_ && is_idle(after)) length += remove_idle(after);
        if (start > 0 && table_[start - 1].idle_before > 0) {
            start -= table_[start - 1].idle_before;
            length += remove_idle(start);
        }
        insert_idle(start, length);
        release_stale(now);
    }

    /* Bytes that the caller's own block has room for. */
    std::size_t size_of(const void *block) const {
        return table_[granule_of(block)].length * kGranule;
    }

    /* Release the idle pages that were not used in the last `seconds`; return how many bytes. */
    std::size_t trim(std::uint32_t seconds, std::uint32_t now) {
        Guard guard(this);
        return release_pages(seconds, now) * kHugePage;
    }

    /* Bound the resident pages, from now on; 0 leaves every new block to libc, uncounted. */
    void set_limit(std::size_t bytes) {
        Guard guard(this);
        limit_ = std::min(bytes / kHugePage, std::size_t{pages_});
        if (resident_ > limit_) release_pages(0, 0);
    }

    Counters counters() {
        Guard guard(this);
        Counters counters = counters_;
        counters.limit = limit_ * kHugePage;
        counters.reserved = resident_ * kHugePage;
        return counters;
    }

    /* Around a fork, so that the child finds the pool consistent and unlocked. */
    void lock() { pthread_mutex_lock(&mutex_); }
    void unlock() { pthread_mutex_unlock(&mutex_); }

private:
    struct Granule {
        std::uint32_t length;          // of the span that begins here; 0 if none does
        std::uint32_t idle_before;     // length of the idle span that ends here; 0 if none does
        std::uint32_t previous, next;  // idle spans, where one begins here
    };

    struct Guard {
        explicit Guard(SpanPool *pool) : pool(pool) { pool->lock(); }
        ~Guard() { pool->unlock(); }
        SpanPool *pool;
    };

    static void *map(std::size_t bytes, int protection) {
        return mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    }

    static void unmap(void *mapping, std::size_t bytes) {
        if (mapping != MAP_FAILED) munmap(mapping, bytes);
    }

    /* Have the system take pages back; the next touch finds zeros. */
    static bool give_back(void *memory, std::size_t bytes) {
#ifdef __linux__
        return madvise(memory, bytes, MADV_DONTNEED) == 0;
#else  // advice alone: there a new mapping does it
        return mmap(memory, bytes, PROT_READ | PROT_WRITE,
                    MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0) != MAP_FAILED;
#endif
    }

    std::size_t capacity_bytes() const { return pages_ * kHugePage; }

    std::uint32_t granule_of(const void *block) const {
        return static_cast<std::uint32_t>((static_cast<const char *>(block) - base_) / kGranule);
    }

    static std::uint32_t first_page(std::uint32_t start) { return start / kGranulesPerPage; }
    static std::uint32_t end_page(std::uint32_t start, std::uint32_t length) {
        return (start + length - 1) / kGranulesPerPage + 1;
    }

    bool is_idle(std::uint32_t start) const {
        const std::uint32_t length = table_[start].length;
        return length > 0 && table_[start + length - 1].idle_before == length;
    }

    void insert_idle(std::uint32_t start, std::uint32_t length) {
        table_[start].length = length;
        table_[start + length - 1].idle_before = length;
        table_[start].previous = kNone;
        table_[start].next = first_idle_;
        if (first_idle_ != kNone) table_[first_idle_].previous = start;
        first_idle_ = start;
    }

    std::uint32_t remove_idle(std::uint32_t start) {
        const Granule span = table_[start];
        (span.previous == kNone ? first_idle_ : table_[span.previous].next) = span.next;
        if (span.next != kNone) table_[span.next].previous = span.previous;
        table_[start].length = 0;
        table_[start + span.length - 1].idle_before = 0;
        return span.length;
    }

    /* Idle spans are few, at most one more than blocks, and their blocks take milliseconds to fill:
       a walk needs no index. */
    std::uint32_t best_fit(std::uint32_t length) const {
        std::uint32_t best = kNone;
        std::uint32_t best_length = UINT32_MAX;
        for (std::uint32_t span = first_idle_; span != kNone; span = table_[span].next) {
            const std::uint32_t found = table_[span].length;
            if (found < length || found > best_length) continue;
            if (found < best_length || span < best) {
                best = span;
                best_length = found;
            }
        }
        return best;
    }

    void take(std::uint32_t start, std::uint32_t length) {
        const std::uint32_t found = remove_idle(start);
        if (found > length) insert_idle(start + length, found - length);
        table_[start].length = length;
        counters_.in_use += length * kGranule;
        counters_.peak = std::max(counters_.peak, counters_.in_use);
        ++counters_.blocks;
    }

    /* Count the pages of a span as resident; false if the limit or the system refuses. */
    bool make_resident(std::uint32_t start, std::uint32_t length, std::uint32_t now) {
        std::uint32_t *const first = last_used_ + first_page(start);
        std::uint32_t *const end = last_used_ + end_page(start, length);
        std::size_t missing = std::count(first, end, 0u);
        if (missing == 0) {
            ++counters_.hits;
            return true;
        }
        if (counters_.in_use + length * kGranule > limit_ * kHugePage) return false;
        if (resident_ + missing > limit_) {
            release_pages(0, now);
            missing = std::count(first, end, 0u);
            if (resident_ + missing > limit_) return false;
        }
        if (!make_writable((end - last_used_) * kHugePage)) return false;
        std::replace(first, end, 0u, now);
        resident_ += missing;
        touched_ = std::max(touched_, end_page(start, length));
        ++counters_.misses;
        return true;
    }

    /* Reserved addresses become memory in steps, as each call splits or merges kernel mappings. */
    bool make_writable(std::size_t needed) {
        if (needed <= writable_) return true;
        const std::size_t step = (needed - writable_ + kWritableStep - 1) / kWritableStep;
        const std::size_t target = std::min(writable_ + step * kWritableStep, capacity_bytes());
        if (mprotect(base_, target, PROT_READ | PROT_WRITE) != 0) return false;
        writable_ = target;
        return true;
    }

    void release_stale(std::uint32_t now) {
        if (now == last_release_) return;
        last_release_ = now;
        release_pages(kKeepSeconds, now);
    }

    std::size_t release_pages(std::uint32_t seconds, std::uint32_t now) {
        const auto stale = [&](std::uint32_t page) {
            return last_used_[page] != 0 && (seconds == 0 || now - last_used_[page] >= seconds);
        };
        std::size_t released = 0;
        for (std::uint32_t span = first_idle_; span != kNone; span = table_[span].next) {
            const std::uint32_t end =
                std::min((span + table_[span].length) / kGranulesPerPage, touched_);
            std::uint32_t page = (span + kGranulesPerPage - 1) / kGranulesPerPage;
            while (page < end) {
                std::uint32_t run = page;
                while (run < end && stale(run)) ++run;
                if (run > page && give_back(base_ + page * kHugePage, (run - page) * kHugePage)) {
                    std::fill(last_used_ + page, last_used_ + run, 0u);
                    released += run - page;
                }
                page = run + 1;
            }
        }
        resident_ -= released;
        counters_.trims += released > 0;
        return released;
    }

    void *range_ = nullptr;
    char *base_ = nullptr;  // of the range, aligned to a huge page
    Granule *table_ = nullptr;
    std::uint32_t *last_used_ = nullptr;  // per page, when a block on it was returned; 0 not resident
    std::uint32_t granules_ = 0;
    std::uint32_t pages_ = 0;
    std::uint32_t touched_ = 0;  // pages from here on were never resident
    std::uint32_t first_idle_ = kNone;
    std::uint32_t last_release_ = 0;
    std::size_t writable_ = 0;
    std::size_t resident_ = 0;  // pages
    std::size_t limit_ = 0;     // pages
    Counters counters_ = {};
    pthread_mutex_t mutex_ = PTHREAD_MUTEX_INITIALIZER;
};

static_assert(std::is_trivially_destructible_v<SpanPool>);

}  // namespace speechrnt_memory
