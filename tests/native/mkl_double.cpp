/* A library that takes memory as MKL does, for test_inference_memory.py. Macros make some that must
   be left alone: with READ_ONLY, the variables cannot be written; with ELSEWHERE, they are another
   library's; with INCOMPLETE, one is missing; with REPLACED, another function is in one. */

#include <cstdlib>

#ifdef READ_ONLY
#define QUALIFIER const
#else
#define QUALIFIER
#endif

extern "C" {

extern void *(*QUALIFIER i_malloc)(std::size_t);
extern void *(*QUALIFIER i_calloc)(std::size_t, std::size_t);
extern void *(*QUALIFIER i_realloc)(void *, std::size_t);
extern void (*QUALIFIER i_free)(void *);

#ifndef ELSEWHERE
#ifdef REPLACED
static void *another_malloc(std::size_t size) { return std::malloc(size); }
void *(*QUALIFIER i_malloc)(std::size_t) = another_malloc;
#else
void *(*QUALIFIER i_malloc)(std::size_t) = std::malloc;
#endif
void *(*QUALIFIER i_calloc)(std::size_t, std::size_t) = std::calloc;
#ifndef INCOMPLETE
void *(*QUALIFIER i_realloc)(void *, std::size_t) = std::realloc;
#endif
void (*QUALIFIER i_free)(void *) = std::free;
#endif

static void *(*chosen_malloc)(std::size_t);
static void (*chosen_free)(void *);

void *MKL_malloc(std::size_t size, int) {
    if (!chosen_malloc) {
        chosen_malloc = i_malloc;
        chosen_free = i_free;
    }
    return chosen_malloc(size);
}

void MKL_free(void *block) { chosen_free(block); }
}
