// How is a part of a file compiled for an instruction set that the rest of the build does not assume?
//
// Everything between VA_TARGET_BEGIN and VA_TARGET_END may use the instruction set, and may run only where level.h says
// that the processor has it. The headers in this folder stand between the two and keep all that they define in unnamed
// namespaces or in templates over an instruction set: no function compiled here may be merged with one of the same name
// that another file needs on an older processor. For that reason nothing of the standard library is instantiated here.
#pragma once

#define VA_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define VA_TARGET_BEGIN(set) VA_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define VA_TARGET_END VA_PRAGMA(clang attribute pop)
#else
// GCC 12 takes the undefined inputs inside its own intrinsics for mistakes (its bug 105593).
#define VA_TARGET_BEGIN(set)                          \
  VA_PRAGMA(GCC diagnostic ignored "-Wuninitialized") \
  VA_PRAGMA(GCC diagnostic ignored "-Wmaybe-uninitialized") VA_PRAGMA(GCC push_options) VA_PRAGMA(GCC target(set))
#define VA_TARGET_END VA_PRAGMA(GCC pop_options)
#endif

#define VA_INLINE __attribute__((always_inline)) inline
#if defined(__clang__)
#define VA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define VA_UNROLL _Pragma("GCC unroll 16")
#endif
