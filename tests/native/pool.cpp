/* The pool and what MKL calls, for test_inference_memory.py: a library for ctypes, and a program
   that uses them from several threads, for the sanitizers. */

#include "_mkl_hook.h"

#include <cstdio>
#include <random>
#include <thread>
#include <vector>

using namespace speechrnt_memory;

extern "C" {

/* The functions that MKL calls, on a pool of this library. */
void prepare(std::size_t limit) {
    static const bool prepared = prepare_pool();
    if (!prepared) std::abort();
    set_limit(limit);
}
void *test_malloc(std::size_t size) { return pool_malloc(size); }
void *test_calloc(std::size_t count, std::size_t size) { return pool_calloc(count, size); }
void *test_realloc(void *block, std::size_t size) { return pool_realloc(block, size); }
void test_free(void *block) { pool_free(block); }
bool test_owns(const void *block) { return owns(block); }
std::size_t test_trim() { return trim(0); }
void test_counters(Counters *result) { *result = counters(); }

/* A pool by itself, at times that the test tells. */
SpanPool *new_pool(std::size_t capacity, std::size_t limit) {
    auto *result = new SpanPool;
    if (!result->reserve(capacity)) std::abort();
    result->set_limit(limit);
    return result;
}
void *allocate(SpanPool *pool, std::size_t size, std::uint32_t now) {
    return pool->allocate(size, now);
}
void deallocate(SpanPool *pool, void *block, std::uint32_t now) { pool->deallocate(block, now); }
std::size_t trim_pool(SpanPool *pool, std::uint32_t seconds, std::uint32_t now) {
    return pool->trim(seconds, now);
}
void set_pool_limit(SpanPool *pool, std::size_t limit) { pool->set_limit(limit); }
void pool_counters(SpanPool *pool, Counters *result) { *result = pool->counters(); }
}

namespace {

/* Blocks full of one byte each, allocated, moved and returned at random. */
void use_pool(unsigned seed, int steps) {
    std::mt19937 random(seed);
    const auto any = [&](std::size_t least, std::size_t most) {
        return std::uniform_int_distribution<std::size_t>(least, most)(random);
    };
    struct Block {
        unsigned char *data;
        std::size_t size;
        unsigned char value;
    };
    std::vector<Block> blocks;
    const auto check = [](const Block &block, std::size_t size) {
        for (std::size_t i = 0; i < size; i += 997) {
            if (block.data[i] != block.value) std::abort();
        }
    };
    for (int step = 0; step < steps; ++step) {
        const std::size_t size = any(kSmallest / 2, 8 * kSmallest);
        const std::size_t action = any(0, 99);
        if (blocks.empty() || (action < 45 && blocks.size() < 12)) {
            const bool zeroed = action % 2;
            void *data = zeroed ? pool_calloc(3, size / 3 + 1) : pool_malloc(size);
            Block block = {static_cast<unsigned char *>(data), size, 0};
            if (zeroed) check(block, size);
            block.value = static_cast<unsigned char>(any(1, 255));
            std::memset(block.data, block.value, size);
            blocks.push_back(block);
            continue;
        }
        Block &block = blocks[any(0, blocks.size() - 1)];
        check(block, block.size);
        if (action < 55) {
            block.data = static_cast<unsigned char *>(pool_realloc(block.data, size));
            check(block, std::min(block.size, size));
            block.size = size;
            std::memset(block.data, block.value, size);
        } else {
            pool_free(block.data);
            block = blocks.back();
            blocks.pop_back();
        }
        if (action == 99) trim(0);
    }
    for (const Block &block : blocks) pool_free(block.data);
}

}  // namespace

int main(int, char **arguments) {
    prepare(std::size_t{16} << 20);  // less than the threads ask for
    std::vector<std::thread> threads;
    for (unsigned seed = 0; seed < 4; ++seed) {
        threads.emplace_back(use_pool, seed, std::atoi(arguments[1]));
    }
    for (std::thread &thread : threads) thread.join();
    const Counters end = counters();
    std::printf("in_use %zu blocks %zu overflows %d hits %d trims %d\n", end.in_use,
                static_cast<std::size_t>(end.blocks), end.overflows > 0, end.hits > 0,
                end.trims > 0);
}
